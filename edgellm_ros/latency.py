"""Two settings that shorten a first token's way through Python's threads, measured by benchmarks/ros_tuning.py.

Until its first token a request goes from thread to thread some ten times: executor, worker, backend, executor.

- ``HEAD_START``: seconds for which the executor waits for the first piece when the worker begins with the only open
  request. The executor's next rounds would take Python from the worker meanwhile.
- ``freeze``: no full garbage collection walks through all that the engine's libraries brought.
"""

from __future__ import annotations

import gc

HEAD_START = 0.005


def freeze() -> None:
    """Exempt all objects that there are from garbage collection."""
    gc.collect()
    gc.freeze()


def unfreeze() -> None:
    """Undo ``freeze`` and collect what has been given up: sessions and arenas now, not at some later allocation."""
    gc.unfreeze()
    gc.collect()
