"""The QoS of each topic, by name."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

# A stream loses nothing for a reader that keeps up within thousands of pieces.
STREAM = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=4096, reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)  # fmt: skip
# Feedback repeats what ~/tokens carries; the action's result is authoritative.
FEEDBACK = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1024, reliability=ReliabilityPolicy.RELIABLE)
COMMAND = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=10, reliability=ReliabilityPolicy.RELIABLE)
# Whoever comes late gets the last message.
LATCHED = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)  # fmt: skip
# The default depth of 10 is shared by all clients: of 16 requests that arrive while the executor is busy, 6 would be
# overwritten and never answered.
SERVICE = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=256, reliability=ReliabilityPolicy.RELIABLE)
