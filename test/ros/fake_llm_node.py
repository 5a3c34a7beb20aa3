"""llm_node with FakeBackend registered; the product has no hook for it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "core")]

from edgellm_ros.node import main  # noqa: E402
from engine_core.backends import registry  # noqa: E402

# After the node's modules: what can be chosen is what the real backends say of themselves.
registry.BACKENDS["fake"] = ("fake_backend", "FakeBackend")

main()
