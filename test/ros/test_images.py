"""Images in messages and frames of topics: what reaches the engine, what comes back, and what is refused."""

from __future__ import annotations

import io
import threading
import time
from array import array
from pathlib import Path

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from PIL import Image as PillowImage
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from edgellm_ros.client import make_goal
from edgellm_ros.client_images import to_image_messages
from edgellm_ros.conversions import to_result
from edgellm_ros.frames import FrameBuffer
from edgellm_ros.images import RequestImages
from edgellm_ros.msg import ChatMessage, ErrorCode, GenerationRequest
from edgellm_ros.node import LlmNode
from engine_core.errors import InvalidImageError, NoFrameError
from engine_core.request import FinishReason, GenerationResult
from engine_core.serving.scheduler import Scheduler

RAW, COMPRESSED = "camera/image_raw", "wrist/image_raw/compressed"
WAIT = 10.0


def picture(level: int) -> np.ndarray:
    return np.full((2, 3, 3), level, np.uint8)


def raw(level: int, stamp: float = 0.0, frame_id: str = "optical", **changes) -> Image:
    fields = {"height": 2, "width": 3, "step": 9, "encoding": "rgb8", "data": array("B", picture(level).tobytes())}
    return Image(header=header(stamp, frame_id), **(fields | changes))


def compressed(level: int, stamp: float = 0.0, **changes) -> CompressedImage:
    file = io.BytesIO()
    PillowImage.fromarray(picture(level)).save(file, "PNG")
    fields = {"format": "rgb8; png compressed bgr8", "data": array("B", file.getvalue())}
    return CompressedImage(header=header(stamp, "wrist"), **(fields | changes))


def header(stamp: float, frame_id: str) -> Header:
    return Header(stamp=Time(sec=int(stamp), nanosec=int(stamp % 1 * 1e9)), frame_id=frame_id)


class Worker:
    """Notes the requests that reach it, and answers each at once."""

    busy = queued = longest_wait = 0  # what /diagnostics reads

    def __init__(self) -> None:
        self.requests: list = []
        self.scheduler = Scheduler(1)

    def check_admission(self, priority: int) -> None: ...

    def submit(self, request, *, on_piece, on_done, arrival, check) -> object:
        self.requests.append(request)
        threading.Timer(0.01, on_done, (GenerationResult(request.request_id, "a cup"),)).start()
        return object()

    def close(self, *, drain: bool, timeout: float) -> bool:
        return True


class Seeing:
    """A node of this process that listens to two cameras, in a namespace and with a name remapped."""

    def __init__(self) -> None:
        arguments = ["--ros-args", "-r", f"{COMPRESSED}:=/arm/camera/compressed"]
        self.node = LlmNode(
            "eyes", namespace="/robot", cli_args=arguments,
            parameter_overrides=[Parameter("max_image_age", Parameter.Type.DOUBLE, 5.0)],
        )  # fmt: skip
        self.worker = self.node._state.worker = Worker()
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.cameras = {
            RAW: self.node.create_publisher(Image, "/robot/camera/image_raw", 10),
            COMPRESSED: self.node.create_publisher(CompressedImage, "/arm/camera/compressed", 10),
        }

    def listen(self, num_frames=1, interval=0.0) -> None:
        self.node._frames.close()
        self.node._frames.open([RAW, COMPRESSED], num_frames, interval, 1 << 20)
        end = time.monotonic() + WAIT
        while not all(camera.get_subscription_count() for camera in self.cameras.values()):
            assert time.monotonic() < end
            self.executor.spin_once(timeout_sec=0.05)

    def publish(self, topic: str, message) -> None:
        """Until the node has it: what is sent best effort may be lost."""
        buffer, end = self.node._frames._buffers[topic], time.monotonic() + WAIT
        before = buffer._frames
        while buffer._frames is before:
            assert time.monotonic() < end
            self.cameras[topic].publish(message)
            self.executor.spin_once(timeout_sec=0.05)

    def now(self) -> float:
        return self.node.get_clock().now().nanoseconds / 1e9

    def ask(self, **fields):
        """The result as a message, and the levels of the images that the engine got."""
        message = GenerationRequest(messages=[ChatMessage(role="user", content="what is that?")], **fields)
        task = self.executor.create_task(self.node._intake.answer(message))
        self.executor.spin_until_future_complete(task, timeout_sec=WAIT)
        result = to_result(*task.result())
        images = self.worker.requests[-1].images if not result.error_code else ()
        return result, [int(image.pixels[1, 2, 0]) for image in images]


@pytest.fixture(scope="module")
def seeing():
    seeing = Seeing()
    yield seeing
    seeing.node._state.worker = None
    seeing.executor.shutdown()
    seeing.node.destroy_node()


def test_images_of_every_kind_keep_their_order_and_headers(seeing):
    seeing.listen()
    seeing.publish(RAW, raw(5, seeing.now()))
    seeing.publish(COMPRESSED, compressed(6, seeing.now()))
    result, levels = seeing.ask(
        images=[raw(1, 1.5, "a"), raw(2, 2.5, "b")], compressed_images=[compressed(3, 3.5)],
        image_topics=[COMPRESSED, RAW],
    )  # fmt: skip
    assert (result.text, levels) == ("a cup", [1, 2, 3, 6, 5])
    assert [each.frame_id for each in result.image_headers] == ["a", "b", "wrist", "wrist", "optical"]
    assert result.image_headers[1].stamp == Time(sec=2, nanosec=500_000_000)


def test_the_newest_frame_is_seen(seeing):
    seeing.listen()
    for level in (7, 8, 9):
        seeing.publish(RAW, raw(level, seeing.now()))
    assert seeing.ask(image_topics=[RAW])[1] == [9]
    assert seeing.ask()[1] == []


def test_several_frames_of_a_topic_are_seen_the_oldest_first(seeing):
    seeing.listen(num_frames=4)
    for level in range(1, 7):
        seeing.publish(RAW, raw(level, seeing.now()))
    result, levels = seeing.ask(image_topics=[RAW], frames_per_topic=4)
    stamps = [each.stamp.sec + each.stamp.nanosec / 1e9 for each in result.image_headers]
    assert levels == [3, 4, 5, 6] and stamps == sorted(stamps)
    seconds = [image.seconds for image in seeing.worker.requests[-1].images]
    assert seconds == pytest.approx([stamp - stamps[0] for stamp in stamps], abs=1e-6)
    result, levels = seeing.ask(
        images=[raw(9)], image_topics=[RAW], frames_per_topic=2, frames_span=stamps[3] - stamps[0]
    )
    assert levels == [9, 3, 6]
    assert [image.seconds for image in seeing.worker.requests[-1].images][:2] == [None, 0.0]


def test_a_frame_without_a_stamp_is_as_old_as_its_arrival(seeing):
    seeing.listen()
    seeing.publish(RAW, raw(4))
    assert seeing.ask(image_topics=[RAW])[1] == [4]
    time.sleep(0.02)
    result, _ = seeing.ask(image_topics=[RAW], max_image_age=0.01)
    assert result.error_code == ErrorCode.NO_FRAME and "s old, but at most 0.01 s" in result.error_message


def test_a_frame_with_a_stamp_before_1970_is_too_old(seeing):
    seeing.listen()
    seeing.publish(RAW, raw(4, -1.0))
    result, _ = seeing.ask(image_topics=[RAW])
    assert result.error_code == ErrorCode.NO_FRAME and "s old, but at most" in result.error_message
    assert seeing.ask(image_topics=[RAW], max_image_age=float("inf"))[1] == [4]


def test_what_waits_for_a_thread_or_is_read_is_cancelled_by_deactivate(seeing, monkeypatch):
    reading, go_on = threading.Semaphore(0), threading.Event()

    def read(images, request, check):
        reading.release()
        assert go_on.wait(WAIT)
        check()

    monkeypatch.setattr(RequestImages, "read_images", read)

    def ask():
        message = GenerationRequest(messages=[ChatMessage(role="user", content="what?")], images=[raw(1)])
        return seeing.executor.create_task(seeing.node._intake.answer(message))

    def results(tasks):
        for task in tasks:
            seeing.executor.spin_until_future_complete(task, timeout_sec=WAIT)
        return {task.result().result.finish_reason for task in tasks}

    read_now = [ask(), ask()]
    seeing.executor.spin_once(timeout_sec=0.1)
    seeing.executor.spin_once(timeout_sec=0.1)
    assert reading.acquire(timeout=WAIT) and reading.acquire(timeout=WAIT)
    waiting = ask()
    while seeing.node._intake.requests.num_open != 3:
        seeing.executor.spin_once(timeout_sec=0.1)
    assert seeing.node._stop_worker()
    seeing.node._state.worker = seeing.worker
    assert results([waiting]) == {FinishReason.CANCELLED}
    go_on.set()
    assert results(read_now) == {FinishReason.CANCELLED}


TABLE = [
    ({"images": [raw(1, encoding="rgb12")]}, ErrorCode.INVALID_IMAGE, "'rgb12', but it must be one of"),
    ({"images": [raw(1, encoding="32FC1")]}, ErrorCode.INVALID_IMAGE, "for depths"),
    ({"images": [raw(1, width=0)]}, ErrorCode.INVALID_IMAGE, "0 × 2, so it has no pixels"),
    ({"images": [raw(1, step=8)]}, ErrorCode.INVALID_IMAGE, "step of 8 bytes"),
    ({"images": [raw(1, height=3)]}, ErrorCode.INVALID_IMAGE, "18 bytes of data, but 3 rows"),
    ({"compressed_images": [compressed(1, data=[1, 2])]}, ErrorCode.INVALID_IMAGE, "2 bytes is no JPEG or PNG"),
    ({"compressed_images": [compressed(1, format="16UC1; compressedDepth")]}, ErrorCode.INVALID_IMAGE, "for depths"),
    ({"images": [raw(1)] * 65}, ErrorCode.INVALID_IMAGE, "65 images, but at most 64"),
    ({"image_topics": ["left"]}, ErrorCode.INVALID_IMAGE, f"'left' is not in the node's parameter image_topics; "
     f"there is {RAW}, {COMPRESSED}"),
    ({"image_topics": [RAW], "frames_per_topic": 3}, ErrorCode.INVALID_IMAGE, "3 frames of each topic"),
    ({"image_topics": [RAW], "frames_per_topic": 2}, ErrorCode.NO_FRAME, "but 1 have come"),
    ({"image_topics": [COMPRESSED]}, ErrorCode.NO_FRAME, f"No image has come on {COMPRESSED}"),
    ({"image_topics": [RAW]}, ErrorCode.NO_FRAME, "s old, but at most 5 s are accepted (max_image_age)"),
    ({"image_topics": [RAW], "frames_per_topic": 2, "frames_span": float("nan")}, ErrorCode.INVALID_REQUEST,
     "frames_span is nan"),
    ({"image_topics": [RAW], "frames_span": 1.0}, ErrorCode.INVALID_REQUEST, "2 or more frames_per_topic"),
    ({"image_topics": [RAW], "max_image_age": -1.0}, ErrorCode.INVALID_REQUEST, "max_image_age is -1.0"),
]  # fmt: skip


def test_bad_images_are_refused_with_a_sentence(seeing):
    seeing.listen(num_frames=2)
    seeing.publish(RAW, raw(1, seeing.now() - 60))
    for fields, code, words in TABLE:
        result, _ = seeing.ask(**fields)
        assert (result.error_code, result.text) == (code, ""), (fields, result.error_message)
        assert words in result.error_message and "\n" not in result.error_message
    assert seeing.ask(image_topics=[RAW], max_image_age=float("inf"))[1] == [1]


def sent(stamp: float, size: int = 18) -> bytes:
    return serialize_message(raw(1, stamp, data=array("B", bytes(size))))


def stamps(frames) -> list[float]:
    return [round(frame.stamp, 1) for frame in frames]


class TestFrameBuffer:
    """A camera that stamps a frame every 0.3 s from 100.0 s on."""

    @staticmethod
    def buffer(count: int, num_frames: int = 3, interval: float = 1.0, step: float = 0.3, size: int = 1 << 20):
        buffer = FrameBuffer("camera", num_frames, interval, size)
        for number in range(count):
            buffer.add(sent(100.0 + number * step))
        return buffer

    def test_frames_are_kept_at_an_interval_by_their_stamps(self):
        buffer = self.buffer(30)
        assert stamps(buffer.pick(3)) == [106.0, 107.2, 108.7]
        assert stamps(buffer.pick(1)) == [108.7]
        with pytest.raises(InvalidImageError, match="4 frames of each topic, but the node keeps 3"):
            buffer.pick(4)
        with pytest.raises(NoFrameError, match="No image has come on camera"):
            self.buffer(0).pick(1)

    def test_frames_without_stamps_are_as_old_as_their_arrival(self):
        buffer = FrameBuffer("camera", 3, 1.0, 1 << 20)
        for number in range(30):
            buffer.add(sent(0.0), number * 0.3)
        assert [round(frame.time, 1) for frame in buffer.pick(3)] == [6.0, 7.2, 8.7]
        buffer.add(b"no message", 9.0)
        assert buffer.pick(1)[0].data == b"no message"

    @pytest.mark.parametrize(
        "count, span, found",
        [
            (2, 3.0, [105.7, 108.7]),
            (4, 1.5, [107.2, 107.8, 108.1, 108.7]),
            (4, 5.1, [103.6, 105.4, 106.9, 108.7]),
            (4, 0.9, [107.8, 108.1, 108.4, 108.7]),
        ],
    )
    def test_frames_over_a_span(self, count, span, found):
        assert stamps(self.buffer(30, num_frames=20, interval=0.2).pick(count, span)) == found

    def test_spans_that_cannot_be_had(self):
        with pytest.raises(NoFrameError, match="over 4 s, but those that have come since .* go back 0.6 s"):
            self.buffer(3, 20, 0.2).pick(4, 4.0)
        with pytest.raises(InvalidImageError, match=r"over 9 s, but those that the node keeps go back .* image_frames"):
            self.buffer(30, 10, 0.2).pick(4, 9.0)
        with pytest.raises(NoFrameError, match="4 frames of camera over 0.6 s, but 3 that far apart are kept"):
            self.buffer(30, 20, 0.2).pick(4, 0.6)
        buffer = self.buffer(5, 20, 0.2)
        buffer.add(sent(120.0))  # it had stopped
        with pytest.raises(NoFrameError, match="over 19 s, but 2 that far apart .* stopped meanwhile"):
            buffer.pick(4, 19.0)

    def test_a_bag_that_starts_over(self):
        buffer = self.buffer(30)
        buffer.add(sent(100.0))
        assert stamps(buffer.pick(1)) == [100.0]
        with pytest.raises(NoFrameError, match="2 frames of camera, 1 s apart, but 1 have come"):
            buffer.pick(2)

    def test_memory_is_bounded(self):
        size = len(sent(1.0))
        buffer = self.buffer(30, 20, 0.2, size=3 * size)
        assert stamps(buffer.pick(3)) == [108.1, 108.4, 108.7]
        with pytest.raises(NoFrameError, match=r"but 3 are kept \(image_frames_memory\)"):
            buffer.pick(4)
        buffer.add(sent(109.0, 4 * size))
        with pytest.raises(InvalidImageError, match=f"but {3 * size} are for the frames of a topic"):
            buffer.pick(1)
        buffer.add(sent(109.3))
        assert stamps(buffer.pick(1)) == [109.3]


def test_a_node_without_a_model_that_sees(llm):
    for image in (raw(1), raw(1, step=1)):  # nothing of it is looked at
        answer = llm.generate(images=[image])
        assert answer.error_code == ErrorCode.INVALID_IMAGE and "takes no images" in answer.error_message
    assert llm.info().max_images == 0
    assert "there is none" in llm.generate(image_topics=["camera"]).error_message
    assert llm.generate().error_code == ErrorCode.NONE


@pytest.mark.parametrize(
    "topics, words",
    [
        (["camera", "camera"], "camera twice"),
        (["a b"], "'a b', which is no topic's name"),
        (["camera/compressedDepth"], "has depths"),
    ],
)
def test_other_names_of_topics_are_refused(llm, topics, words):
    ((is_taken, reason),) = llm.set(image_topics=topics)
    assert not is_taken and words in reason


def test_the_client_makes_messages_of_images(tmp_path):
    path = tmp_path / "table.png"
    PillowImage.fromarray(picture(3)).save(path)
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    goal = make_goal(
        "cup?", images=[picture(1)[:, ::-1], grey, PillowImage.fromarray(picture(2)), raw(9), path],
        image_topics=[RAW], frames_per_topic=2, frames_span=3, max_image_age=1,
    )  # fmt: skip
    request = goal.request
    assert [(image.encoding, image.step) for image in request.images] == [
        ("rgb8", 9), ("mono8", 3), ("rgb8", 9), ("rgb8", 9),
    ]  # fmt: skip
    assert bytes(request.images[1].data) == grey.tobytes() and request.images[3].header.frame_id == "optical"
    assert request.compressed_images[0].format == "png"
    assert bytes(request.compressed_images[0].data) == Path(path).read_bytes()
    assert (request.image_topics, request.frames_per_topic, request.frames_span) == ([RAW], 2, 3.0)
    assert request.max_image_age == 1.0


@pytest.mark.parametrize(
    "images, error, words",
    [
        ([compressed(1), raw(1)], ValueError, "put them first"),
        ([picture(1).astype(float)], TypeError, "an array of uint8"),
        ([picture(1)[:, :, :2]], TypeError, r"shape \(2, 3, 2\)"),
        ([picture(1)[0, 0]], TypeError, r"shape \(3,\)"),
        ([3], TypeError, "An image is int"),
        (["/nowhere/cup.png"], FileNotFoundError, "cup.png"),
        ("cup.png", TypeError, "images is one str, but it must be a list"),
        (picture(1), TypeError, "images is one ndarray, but it must be a list"),
    ],
)
def test_the_client_refuses_other_images(images, error, words):
    with pytest.raises(error, match=words):
        to_image_messages(images)
