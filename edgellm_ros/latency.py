"""Three settings that shorten a first token's way through Python's threads, measured by benchmarks/ros_tuning.py.

Until its first token a request goes from thread to thread some ten times: executor, worker, backend, executor.

- ``HEAD_START``: seconds for which the executor waits for the first piece when the worker begins with the only open
  request. The executor's next rounds would take Python from the worker meanwhile.
- ``SWITCH_INTERVAL``: seconds a thread keeps Python from the others; Python's own value, 5 ms, is several tokens.
- ``freeze``: no full garbage collection walks through all that the engine's libraries brought.
"""

from __future__ import annotations

import gc
import sys

HEAD_START = 0.005
SWITCH_INTERVAL = 0.0001


def switch_often() -> None:
    """Set the process's switch interval to ``SWITCH_INTERVAL``."""
    sys.setswitchinterval(SWITCH_INTERVAL)


def freeze() -> None:
    """Exempt all objects that there are from garbage collection."""
    gc.collect()
    gc.freeze()


def unfreeze() -> None:
    """Undo ``freeze`` and collect what has been given up: sessions and arenas now, not at some later allocation."""
    gc.unfreeze()
    gc.collect()
