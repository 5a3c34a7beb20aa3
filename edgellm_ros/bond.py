"""The bond to a lifecycle manager: heartbeats by which it sees that the node lives.

nav2_lifecycle_manager waits for a bond after it has activated a node, and gives the node up where none is formed. A
bond has an id, here the node's name; each side publishes ``bond/msg/Status`` with that id and an instance id of its own
on the topic ``bond`` (bond_core, bondcpp/src/bond.cpp: a bond is formed when each side has heard the other).
"""

from __future__ import annotations

import os
import uuid
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from edgellm_ros import qos

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
        """Take note that the node is active: bonds may be formed."""
        self._active, self._beating, self.is_formed = True, self._mode == "always", False
        self._beat()

    def stop(self) -> None:
        """Tell the other side that the bond has ended: the node is not active any more."""
        if self._active and self._beating:
            self._publish(active=False)
        self._active = self._beating = self.is_formed = False

    def on_managed(self) -> None:
        """Take note that a lifecycle manager configures the node."""

    def _on_status(self, message: Any) -> None:
        if not self._active or message.id != self._node.get_name() or message.instance_id == self._instance:
            return
        if message.active and not self.is_formed:
            self.is_formed = self._beating = True
            self._node.get_logger().info("Bond to the lifecycle manager formed.")
            self._beat()
        elif not message.active and self.is_formed:
            self._publish(active=False)  # which the other side waits for
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


class NoBond:
    """Stands for a bond where none can be formed. ``hint``: said once, when a lifecycle manager configures the node."""

    is_formed = False

    def __init__(self, node: Node, hint: str = "") -> None:
        self._node = node
        self._hint = hint

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def on_managed(self) -> None:
        hint, self._hint = self._hint, ""
        if hint:
            self._node.get_logger().warning(hint)


def make_bond(node: Node, mode: str) -> Bond | NoBond:
    """Return the node's bond; one that does nothing if ``mode`` is ``never`` or the package bond is not installed."""
    if mode == "never":
        return NoBond(node)
    if (status := status_type()) is not None:
        return Bond(node, status, mode)
    package = f"ros-{os.environ.get('ROS_DISTRO', '$ROS_DISTRO')}-bond"
    hint = (
        f"No bond can be formed, since the ROS package 'bond' is not installed (sudo apt install {package}); without "
        "one nav2_lifecycle_manager gives the node up, unless its bond_timeout is 0.0."
    )
    if mode == "always":
        node.get_logger().warning(hint)
        return NoBond(node)
    return NoBond(node, hint)
