"""The newest frames of camera topics, as they came over DDS: of a frame nobody asks for, the header alone is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from edgellm_ros import qos
from engine_core.errors import InvalidImageError, NoFrameError

_COMPRESSED = "compressed"  # the last part of a topic's name, as image_transport names it


@dataclass(frozen=True)
class Frame:
    """One message of a camera, serialized."""

    topic: str  # as the parameter names it
    kind: type  # Image or CompressedImage
    data: bytes
    arrival: float  # s, time.monotonic
    stamp: float | None  # s, of its header; None = it has none

    @property
    def time(self) -> float:
        """Seconds of the camera's clock, or without a stamp of the host's."""
        return self.arrival if self.stamp is None else self.stamp


def message_type(topic: str) -> type:
    """Return the type of the messages of ``topic``."""
    return CompressedImage if topic.rpartition("/")[2] == _COMPRESSED else Image


def topic_problem(topic: str) -> str:
    """Return why ``topic`` cannot be one of image_topics, "" if it can."""
    last = topic.rpartition("/")[2]
    if last == "compressedDepth":
        return f"{topic} has depths, which no model sees; name a topic of colour or grey images."
    if last == "theora" or last == "ffmpeg":
        return f"{topic} is a video stream; name the camera's raw topic, or the one that ends in /{_COMPRESSED}."
    return ""


class FrameBuffer:
    """Keeps the newest frame of a topic, and before it frames that are at least ``interval`` s apart by their stamps.

    All of them have ``max_bytes`` at most: the oldest are dropped.
    """

    def __init__(self, topic: str, num_frames: int, interval: float, max_bytes: int) -> None:
        self.topic = topic
        self._kind = message_type(topic)
        self._num_frames = num_frames
        self._num_kept = num_frames + (num_frames > 1)  # the last but one may be too near to the newest
        self._interval = interval
        self._max_bytes = max_bytes
        self._frames: list[Frame] = []  # the oldest first; replaced as a whole
        self._has_dropped = False  # a frame for want of room
        self._too_large = 0  # bytes of the newest frame, if they are more than ``max_bytes``
        self._lock = threading.Lock()

    def add(self, data: bytes, arrival: float | None = None) -> None:
        """``arrival``: time.monotonic() when it came; None: now."""
        now = time.monotonic() if arrival is None else arrival
        frame = Frame(self.topic, self._kind, data, now, _stamp(data))
        with self._lock:
            self._too_large = len(data) if len(data) > self._max_bytes else 0
            if self._too_large:
                self._frames, self._has_dropped = [], True
                return
            kept = self._frames
            if len(kept) > 1 and kept[-1].time - kept[-2].time < self._interval:
                kept = kept[:-1]
            # A bag that starts over, or a clock that was set back: what is later is of another time.
            kept = [each for each in kept if each.time < frame.time and (each.stamp is None) == (frame.stamp is None)]
            self._has_dropped = self._has_dropped and bool(kept)
            kept.append(frame)
            size = sum(len(each.data) for each in kept)
            while len(kept) > self._num_kept or size > self._max_bytes:
                size -= len(kept.pop(0).data)
                self._has_dropped = True
            self._frames = kept

    def pick(self, count: int, span: float = 0.0) -> list[Frame]:
        """Return ``count`` frames by their stamps, the oldest first; the last is the newest.

        ``span``: seconds from the first to the last, between which the others are as evenly as those that are kept
        allow. 0: those kept last, between two of which are at least half of ``interval``. Raises InvalidImageError,
        NoFrameError.
        """
        if count > self._num_frames:
            raise InvalidImageError(
                f"The request asks for {count} frames of each topic, but the node keeps {self._num_frames} "
                "(parameter image_frames)."
            )
        frames = self._frames
        if not frames:
            raise self._nothing()
        if count == 1:
            return frames[-1:]
        return self._over(frames, count, span) if span else self._last(frames, count)

    def _nothing(self) -> Exception:
        if self._too_large:
            return InvalidImageError(
                f"An image of {self.topic} has {self._too_large} bytes, but {self._max_bytes} are for the frames of a "
                "topic (parameter image_frames_memory)."
            )
        return NoFrameError(f"No image has come on {self.topic} since the node was activated.")

    def _last(self, frames: list[Frame], count: int) -> list[Frame]:
        *earlier, newest = frames
        if earlier and newest.time - earlier[-1].time < self._interval / 2:
            earlier.pop()
        frames = [*earlier, newest]
        if len(frames) < count:
            reason = "are kept (image_frames_memory)" if self._has_dropped else "have come since the node was activated"
            raise NoFrameError(
                f"The request asks for {count} frames of {self.topic}, {self._interval:g} s apart, but {len(frames)} "
                f"{reason}."
            )
        return frames[-count:]

    def _over(self, frames: list[Frame], count: int, span: float) -> list[Frame]:
        newest, step = frames[-1].time, span / (count - 1)
        reach = newest - frames[0].time
        if reach < span - step / 2:
            asked = f"The request asks for frames of {self.topic} over {span:g} s, but those that"
            if self._has_dropped:
                raise InvalidImageError(
                    f"{asked} the node keeps go back {reach:.1f} s (parameters image_frames, image_frame_interval, "
                    "image_frames_memory)."
                )
            raise NoFrameError(f"{asked} have come since the node was activated go back {reach:.1f} s.")
        wanted = [newest - step * index for index in reversed(range(count))]
        places = [min(range(len(frames)), key=lambda i, at=at: abs(frames[i].time - at)) for at in wanted]  # type: ignore[misc]
        near = {place for place, at in zip(places, wanted) if abs(frames[place].time - at) <= step / 2}
        if (found := len(near)) < count:
            raise NoFrameError(
                f"The request asks for {count} frames of {self.topic} over {span:g} s, but {found} that far apart are "
                "kept: the topic is too slow or stopped meanwhile, or image_frame_interval is too long."
            )
        return [frames[place] for place in places]


def _stamp(data: bytes) -> float | None:
    """Return the stamp of a serialized message, whose first field is a header; None if it has none."""
    try:
        header: Header = deserialize_message(data, Header)
    except Exception:  # the middleware's own; a request for this frame is told what is wrong with it
        return None
    seconds = header.stamp.sec + header.stamp.nanosec / 1e9
    return seconds if seconds else None


class FrameTopics:
    """Subscriptions to the node's image_topics, while it is active.

    Opened and closed by the thread of the transitions; frames come and are taken on the executor's.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._group = ReentrantCallbackGroup()
        self._buffers: dict[str, FrameBuffer] = {}  # replaced as a whole
        self._subscriptions: list[Subscription] = []

    @property
    def topics(self) -> list[str]:
        return list(self._buffers)

    def open(self, topics: Sequence[str], num_frames: int, interval: float, max_bytes: int) -> None:
        """Subscribe to ``topics``: relative names are in the node's namespace, and all can be remapped.

        ``max_bytes``: of the frames of all of them together, in equal parts.
        """
        each = max_bytes // max(1, len(topics))
        buffers = {topic: FrameBuffer(topic, num_frames, interval, each) for topic in topics}
        self._subscriptions = [
            self._node.create_subscription(
                message_type(topic), topic, buffer.add, qos.FRAMES, callback_group=self._group, raw=True
            )
            for topic, buffer in buffers.items()
        ]
        self._buffers = buffers

    def close(self) -> None:
        """End the subscriptions, and forget the frames."""
        self._buffers = {}
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            self._node.destroy_subscription(subscription)

    def pick(self, topic: str, count: int, span: float = 0.0) -> list[Frame]:
        """Return frames of a topic, as ``FrameBuffer.pick``. Raises InvalidImageError, NoFrameError."""
        buffers = self._buffers
        if topic not in buffers:
            known = f"there is {', '.join(buffers)}" if buffers else "there is none"
            raise InvalidImageError(f"The topic {topic[:64]!r} is not in the node's parameter image_topics; {known}.")
        return buffers[topic].pick(count, span)
