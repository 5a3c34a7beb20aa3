"""Read the images of a request, from its message and from camera topics, and note what was seen."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from rclpy.clock import Clock
from rclpy.serialization import deserialize_message
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage
from sensor_msgs.msg import Image as ImageMessage
from std_msgs.msg import Header

from edgellm_ros.frames import Frame, FrameTopics
from edgellm_ros.msg import GenerationRequest as GenerationRequestMessage
from engine_core.errors import InvalidRequestError, NoFrameError
from engine_core.request import LIMITS, GenerationRequest
from engine_core.vision.encodings import Picture, open_raw
from engine_core.vision.images import Image
from engine_core.vision.pictures import check_pictures, limit_images, open_picture


class Seen(NamedTuple):
    """An image that has been checked, and where it comes from."""

    header: Header
    picture: Picture


class RequestImages:
    """The images of one request: gathered on the executor's thread, decoded by ``read_images`` in another one."""

    def __init__(
        self,
        sent: Sequence[Callable[[], Seen]],
        frames: Sequence[Callable[[], Seen]],
        num_bytes: int,
        frame_times: Sequence[float] = (),
    ) -> None:
        """``sent``: by the client; ``frames``: of topics, which come after it. ``num_bytes``: of all, as they came.

        ``frame_times``: of ``frames`` that belong to videos, see ``Image.seconds``; none of others.
        """
        self._sent, self._frames = list(sent), list(frames)
        self.count, self.num_bytes = len(self._sent) + len(self._frames), num_bytes
        self.headers: list[Header] = []  # of the images that have been decoded, in their order
        self._frame_times = frame_times

    def read_images(self, request: GenerationRequest, go_on: Callable[[], None]) -> GenerationRequest:
        """Return the request with its images; ``go_on`` is called before each.

        What the client has sent is checked as a whole before any of it is decoded. Raises InvalidImageError,
        NoFrameError, and what ``go_on`` raises.
        """
        opened: list[Seen] = []
        while self._sent:
            go_on()
            opened.append(self._sent.pop(0)())
        check_pictures(seen.picture for seen in opened)
        return request.replace(images=self._in_videos(limit_images(self._decoded(opened, go_on))))

    def _in_videos(self, images: Sequence[Image]) -> tuple[Image, ...]:
        """Return the images, of which the last are frames of videos."""
        first = len(images) - len(self._frame_times)
        frames = (dataclasses.replace(image, seconds=time) for image, time in zip(images[first:], self._frame_times))
        return (*images[:first], *frames)

    def _decoded(self, opened: list[Seen], go_on: Callable[[], None]) -> Iterator[Image]:
        while opened or self._frames:  # each message goes when it has been decoded
            go_on()
            seen = opened.pop(0) if opened else self._frames.pop(0)()
            self.headers.append(seen.header)
            yield seen.picture.decode()


def gather_images(
    message: GenerationRequestMessage, frames: FrameTopics, max_age: float, clock: Clock
) -> RequestImages | None:
    """Return the images of a message; None if it has none. Nothing is decoded yet.

    ``max_age``: of a topic's newest frame where the message does not say, s; 0 = any. Raises InvalidImageError for too
    many, an unknown topic or too large ones, NoFrameError, InvalidRequestError.
    """
    count, span = message.frames_per_topic or 1, message.frames_span
    if not 0 <= span < math.inf or (span and count == 1):
        raise InvalidRequestError(
            f"frames_span is {span} s, but it must be 0, or seconds over which there are 2 or more frames_per_topic."
        )
    num_images = len(message.images) + len(message.compressed_images) + len(message.image_topics) * count
    LIMITS.check_images(num_images, 0)
    if not num_images:
        return None
    found = [frame for topic in message.image_topics for frame in frames.pick(topic, count, span)]
    num_bytes = sum(len(each.data) for each in (*message.images, *message.compressed_images, *found))
    LIMITS.check_images(num_images, num_bytes)
    if math.isnan(message.max_image_age) or message.max_image_age < 0:
        raise InvalidRequestError(
            f"max_image_age is {message.max_image_age} s, but it must be 0 (the node's) or more seconds."
        )
    limit = message.max_image_age or max_age
    age = _Age(limit, clock.now(), time.monotonic()) if limit else None
    last = {frame.topic: frame for frame in found}  # of each topic
    times = [frame.time - found[i - i % count].time for i, frame in enumerate(found)] if count > 1 else []
    return RequestImages(
        [
            *(partial(_open_raw, image) for image in message.images),
            *(partial(_open_compressed, image) for image in message.compressed_images),
        ],
        [partial(_open_frame, frame, age if last[frame.topic] is frame else None) for frame in found],
        num_bytes,
        times,
    )


class _Age(NamedTuple):
    """The greatest age of a frame, and when the request came."""

    limit: float  # s
    now: Time  # of the node's clock
    monotonic: float  # s, time.monotonic

    def check(self, frame: Frame, header: Header) -> None:
        """Raises NoFrameError if ``frame`` is too old by its stamp, or if it has none by its arrival."""
        stamp = header.stamp.sec * 10**9 + header.stamp.nanosec  # Time takes none before 1970
        age = (self.now.nanoseconds - stamp) / 1e9 if stamp else self.monotonic - frame.arrival
        if age > self.limit:
            raise NoFrameError(
                f"The newest image of {frame.topic} is {age:.1f} s old, but at most {self.limit:g} s are accepted "
                "(max_image_age)."
            )


def _open_frame(frame: Frame, age: _Age | None) -> Seen:
    message: Any = deserialize_message(frame.data, frame.kind)
    if age is not None:
        age.check(frame, message.header)
    return _open_compressed(message) if frame.kind is CompressedImage else _open_raw(message)


def _open_compressed(message: CompressedImage) -> Seen:
    encoding, _, transport = message.format.partition(";")
    source = transport.strip() if "compressedDepth" in transport else encoding.strip()
    return Seen(message.header, open_picture(message.data, source))


def _open_raw(message: ImageMessage) -> Seen:
    picture = open_raw(
        message.encoding, message.width, message.height, message.step, message.data,
        is_bigendian=bool(message.is_bigendian),
    )  # fmt: skip
    return Seen(message.header, picture)
