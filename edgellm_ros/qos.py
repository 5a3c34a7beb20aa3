"""The QoS of each topic, by name."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

try:
    from rclpy.event_handler import PublisherEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks

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
# The newest image of a camera, whether it sends reliably or not.
FRAMES = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
# The default depth of 10 is shared by all clients: of 16 requests that arrive while the executor is busy, 6 would be
# overwritten and never answered.
SERVICE = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1024, reliability=ReliabilityPolicy.RELIABLE)
# For each publisher. A reader whose QoS is refused hears of it in its own log; rclpy's default of saying so here, too,
# costs two more things to look at in each round of the executor, and a request waits for up to three rounds.
NO_EVENTS = PublisherEventCallbacks(use_default_callbacks=False)
