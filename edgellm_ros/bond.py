"""The bond to a lifecycle manager: heartbeats by which it sees that the node lives.

nav2_lifecycle_manager waits for a bond after it has activated a node, and gives the node up where none is formed. A
bond has an id, here the node's name; each side publishes ``bond/msg/Status`` with that id and an instance id of its own
on the topic ``bond`` (bond_core, bondcpp/src/bond.cpp: a bond is formed when each side has heard the other).
"""

from __future__ import annotations

import uuid
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from edgellm_ros import qos

MODES = ("auto", "always", "never")  # not on and off, which YAML takes for booleans
_PERIOD = 0.25  # s between heartbeats
_TIMEOUT = 4.0  # s without a heartbeat after which a bond counts as broken; Nav2's value


def status_type() -> Any:
    """Return the message type ``bond/msg/Status``, or None where the package bond is not installed."""
    try:
        from bond.msg import Status
    except ImportError:
        return None
    return Status


class Bond:
    """Heartbeats while the node is active: at once with mode ``always``, once a manager sends its own with ``auto``.

    ``status``: the message type. Everything runs on the executor's thread but ``start`` and ``stop``, which the thread
    of the transitions calls.
    """

    def __init__(self, node: Node, status: Any, mode: str) -> None:
        self._node = node
        self._mode = mode
        self._status = status
        self._instance = str(uuid.uuid4())
        self._active = self._beating = False
        self.is_formed = False
        group = ReentrantCallbackGroup()
        self._publisher = node.create_publisher(status, "bond", qos.COMMAND, event_callbacks=qos.NO_EVENTS)
        node.create_subscription(status, "bond", self._on_status, qos.COMMAND, callback_group=group)
        self._timer = node.create_timer(
            _PERIOD, self._beat, clock=Clock(clock_type=ClockType.STEADY_TIME), callback_group=group
        )

    def start(self) -> None:
        """The node is active: bonds may be formed."""
        self._active, self._beating, self.is_formed = True, self._mode == "always", False
        self._beat()

    def stop(self) -> None:
        """The node is not active any more: tell the other side that the bond has ended."""
        if self._active and self._beating:
            self._publish(active=False)
        self._active = self._beating = self.is_formed = False

    def _on_status(self, message: Any) -> None:
        if not self._active or message.id != self._node.get_name() or message.instance_id == self._instance:
            return
        if message.active and not self.is_formed:
            self.is_formed = self._beating = True
            self._node.get_logger().info("Bond to the lifecycle manager formed.")
            self._beat()
        elif not message.active and self.is_formed:
            self.is_formed, self._beating = False, self._mode == "always"
            self._node.get_logger().info("The lifecycle manager has ended its bond.")

    def _beat(self) -> None:
        if self._active and self._beating:
            self._publish(active=True)

    def _publish(self, *, active: bool) -> None:
        message = self._status(id=self._node.get_name(), instance_id=self._instance, active=active)
        message.heartbeat_timeout, message.heartbeat_period = _TIMEOUT, _PERIOD
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)


def make_bond(node: Node, mode: str) -> Bond | None:
    """Return the node's bond, or None if it is switched off or the package bond is not installed."""
    if mode == "never":
        return None
    status = status_type()
    if status is None:
        if mode == "always":
            node.get_logger().warning("The parameter bond is always, but the ROS package 'bond' is not installed.")
        return None
    return Bond(node, status, mode)
