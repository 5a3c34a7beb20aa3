"""/diagnostics: through diagnostic_updater where it is installed, else as diagnostic_msgs directly, once a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from edgellm_ros.qos import NO_EVENTS

PERIOD = 1.0  # s


@dataclass(frozen=True)
class Health:
    """The health of the node."""

    level: bytes  # a constant of DiagnosticStatus
    message: str
    hardware_id: str
    values: dict[str, str] = field(default_factory=dict)


class Diagnostics:
    """Publishes what ``observe`` returns; it is called on the executor's thread."""

    def __init__(self, node: Node, observe: Callable[[], Health]) -> None:
        self._node = node
        self._observe = observe
        try:
            from diagnostic_updater import Updater
        except ImportError:
            self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 1, event_callbacks=NO_EVENTS)
            # Steady: a simulation that stands still must not look like a node that does.
            node.create_timer(PERIOD, self._publish, clock=Clock(clock_type=ClockType.STEADY_TIME))
        else:
            self._updater = Updater(node)
            self._updater.setHardwareID(observe().hardware_id)
            self._updater.add(f"engine of {node.get_fully_qualified_name()}", self._fill)

    def _publish(self) -> None:
        health = self._observe()
        status = DiagnosticStatus(
            level=health.level,
            name=f"{self._node.get_fully_qualified_name()}: engine",
            message=health.message,
            hardware_id=health.hardware_id,
            values=[KeyValue(key=key, value=value) for key, value in health.values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)

    def _fill(self, status):
        """Fill in the diagnostics; the task of the updater."""
        health = self._observe()
        self._updater.setHardwareID(health.hardware_id)
        status.summary(health.level, health.message)
        for key, value in health.values.items():
            status.add(key, value)
        return status
