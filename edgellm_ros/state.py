"""The state of the node: what it has loaded, what serves, what failed last."""

from __future__ import annotations

from edgellm_ros.msg import EngineStatus
from edgellm_ros.parameters import Settings
from engine_core.serving.engine import Engine
from engine_core.serving.worker import Worker


class NodeState:
    """One object for all parts of the node. Each attribute is replaced as a whole, so any thread may read it.

    The thread of the transitions writes; the executor writes ``settings``. rclpy has no public accessor of the
    lifecycle state, so the transition callbacks say here what they lead to.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings  # the dynamic parameters
        self.engine: Engine | None = None  # while configured
        self.worker: Worker | None = None  # while active
        self.error: Exception | None = None  # of the last failed configure, or the engine's fault
        self.is_configuring = False
        self.load_progress = 0.0  # of the configure that is at work, 0 to 1
        self.is_finalized = False

    @property
    def lifecycle(self) -> int:
        """A constant of EngineStatus. During a transition: what is left of the state before it."""
        if self.is_finalized:
            return EngineStatus.FINALIZED
        if self.engine is None:
            return EngineStatus.UNCONFIGURED
        return EngineStatus.INACTIVE if self.worker is None else EngineStatus.ACTIVE

    @property
    def is_configured(self) -> bool:
        """Fixed parameters cannot be changed now."""
        return self.is_configuring or self.engine is not None
