"""Videos in a prompt: the frames of a request that belong together, and the text that a model's processor writes."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine_core.models.vision import SMOLVLM_VIDEO, VisionSpec
from engine_core.request import ChatMessage
from engine_core.vision.images import Clip, Image

_SMALL_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Shown:
    """Content of one place of a prompt: an image, or the frames of a video."""

    images: tuple[Image, ...]
    is_video: bool = False

    def pictures(self, spec: VisionSpec) -> list[Image | Clip]:
        """Return what the encoder takes at once, in the order of its tokens."""
        if not self.is_video:
            return list(self.images)
        first, count = self.images[0], spec.temporal
        size = (first.height, first.width)
        return [Clip(self.images[i : i + count], size) for i in range(0, len(self.images), count)]

    def times(self, spec: VisionSpec) -> list[float]:
        """Return the time of each of ``pictures``, s since the first frame: the mean of its first and last frame."""
        times, count = [image.seconds or 0.0 for image in self.images], spec.temporal
        times += times[-1:] * (-len(times) % count)
        return [(times[i] + times[i + count - 1]) / 2 for i in range(0, len(times), count)]


def gather_videos(
    messages: Sequence[ChatMessage], images: Sequence[Image], spec: VisionSpec
) -> tuple[tuple[ChatMessage, ...], list[Shown]]:
    """Return the messages with one place for each video, and what stands at their places.

    A video is of frames one after another at the same place of a message, each of which is later than the one before.
    A model without a format for videos is shown all of them as images.
    """
    remaining, shown, changed = iter(images), list[Shown](), []
    for message in messages:
        places: list[int] = []
        for place, image in zip(message.images, remaining):
            last = shown[-1] if places and places[-1] == place else None
            if last is not None and last.is_video and _follows(image, last.images[-1]):
                shown[-1] = Shown((*last.images, image), True)
            else:
                places.append(place)
                shown.append(Shown((image,), is_video=bool(spec.video) and image.seconds is not None))
        changed.append(dataclasses.replace(message, images=tuple(places)) if message.images else message)
    return tuple(changed), shown


def _follows(image: Image, last: Image) -> bool:
    return image.seconds is not None and last.seconds is not None and image.seconds > last.seconds


def video_text(spec: VisionSpec, texts: Sequence[str], video: Shown) -> str:
    """Return what the model's processor writes for a video. ``texts``: of its ``pictures``, with their markers."""
    if spec.video == SMOLVLM_VIDEO:
        length = datetime.timedelta(seconds=int(video.images[-1].seconds or 0.0))
        stamps = (divmod(int(time), 60) for time in video.times(spec))
        frames = (f"\nFrame from {minutes:02d}:{seconds:02d}:" for minutes, seconds in stamps)
        return "".join(
            [
                f"You are provided the following series of {number_word(len(texts))} frames from a {length} [H:MM:SS] "
                "video.\n",
                *(part for pair in zip(frames, texts) for part in pair),
                "\n\n",
            ]
        )
    return "".join(f"<{time:.1f} seconds>{text}" for time, text in zip(video.times(spec), texts))


def number_word(number: int) -> str:
    """Return the English word of a number from 0 to 99."""
    if number < 20:
        return _SMALL_NUMBERS[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_SMALL_NUMBERS[ones]}" if ones else "")


def all_pictures(shown: Sequence[Shown], spec: VisionSpec) -> Iterator[Image | Clip]:
    """Yield what the encoder takes, in the order of the prompt."""
    for each in shown:
        yield from each.pictures(spec)
