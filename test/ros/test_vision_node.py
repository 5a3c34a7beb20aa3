"""A small random model that sees, on the CPU: what it answers to pictures is what the engine answers by itself."""

from __future__ import annotations

import base64
import io
import time
from array import array

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("openai")

import openai
from builtin_interfaces.msg import Time
from PIL import Image as PillowImage
from sensor_msgs.msg import Image

import vision_checkpoints
from edgellm_ros.client import LLM, LLMError
from edgellm_ros.conversions import wire_text
from edgellm_ros.msg import ChatMessage, ErrorCode
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.request import ChatMessage as CoreMessage
from engine_core.request import GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine
from engine_core.vision.images import Image as CoreImage
from llm_client import ACTIVATE, DEACTIVATE, Nodes
from test_examples import load as example
from test_http_endpoint import free_port
from vision_checkpoints import picture

TOPIC = "camera/image_raw"
QUESTION, COUNT = "What is this?", 8
PICTURES = [picture(20, 30, seed) for seed in range(3)]


def message(image, encoding: str = "rgb8") -> Image:
    pixels = image.pixels if encoding == "rgb8" else image.pixels[:, :, ::-1]
    return Image(
        height=image.height, width=image.width, step=3 * image.width, encoding=encoding,
        data=array("B", np.ascontiguousarray(pixels).tobytes()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    directory = vision_checkpoints.write(tmp_path_factory.mktemp("smolvlm"))
    build_engine(directory, directory / "engine", quantization="fp32", max_context=512, report=lambda line: None)
    return directory / "engine"


@pytest.fixture(scope="module")
def expected(engine_dir):
    """The answers of the engine in this process: to none, one, two and all of the pictures, and to a video of them."""
    engine = Engine.open(EngineConfig(engine_dir), report=lambda line: None)
    sampling = SamplingParams(max_new_tokens=COUNT, ignore_eos=True)
    requests = [
        GenerationRequest(
            str(count), (CoreMessage("user", QUESTION),), images=tuple(PICTURES[:count]), sampling=sampling
        )
        for count in range(len(PICTURES) + 1)
    ]
    frames = tuple(CoreImage(each.pixels, index / 10) for index, each in enumerate(PICTURES))
    requests.append(requests[-1].replace(images=frames))
    answers = [wire_text(engine.answer(request).text) for request in requests]
    engine.close()
    assert len(set(answers)) == len(answers)
    return answers


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, engine_dir):
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    port = free_port()
    node = nodes.start(
        engine_dir,
        image_topics=[TOPIC],
        image_frames=3,
        image_frame_interval=0.0,
        http_port=port,
        max_images=3,
        max_image_age=0.0,
        max_batch=2,
    ).bring_up()
    node.port = port
    yield node
    nodes.close()


def ask(node, images=(), **fields):
    sampling = {"max_new_tokens": COUNT, "ignore_eos": True}
    return node.generate(QUESTION, images=[message(image) for image in images], sampling=sampling, **fields)


def test_the_node_says_what_it_takes(seeing):
    info = seeing.info()
    assert (info.max_images, info.image_topics) == (3, [TOPIC])
    assert info.max_image_tokens == 10 * vision_checkpoints.TILE_TOKENS


def test_images_of_a_message(seeing, expected):
    for count in range(len(PICTURES) + 1):
        assert ask(seeing, PICTURES[:count]).text == expected[count]
    again = ask(seeing, PICTURES[:2])
    assert again.metrics.image_tokens == 2 * ask(seeing, PICTURES[:1]).metrics.image_tokens > 0
    assert again.text == expected[2] and again.metrics.cached_tokens > again.metrics.prompt_tokens // 2


def test_frames_of_a_topic(seeing, expected, capsys):
    """The test of what an operator does: a camera publishes, and somebody asks."""
    camera = seeing.node.create_publisher(Image, TOPIC, 10)
    seeing.until(lambda: camera.get_subscription_count() == 1)
    frames = []
    for index, image in enumerate(PICTURES):
        frames.append(message(image, "bgr8"))
        frames[-1].header.stamp = Time(sec=1000, nanosec=index * 100_000_000)
        frames[-1].header.frame_id = "camera_optical"

    def all_came() -> bool:  # the node may find the camera later than the camera finds the node
        for frame in frames:
            camera.publish(frame)
            time.sleep(0.1)
        return ask(seeing, image_topics=[TOPIC], frames_per_topic=3).error_code == ErrorCode.NONE

    seeing.until(all_came)
    result = ask(seeing, image_topics=[TOPIC], frames_per_topic=3)
    assert result.text == expected[-1] and list(result.image_headers) == [frame.header for frame in frames]
    assert result.metrics.image_tokens == 3 * vision_checkpoints.TILE_TOKENS  # each frame of a video is one tile
    over = ask(seeing, image_topics=[TOPIC], frames_per_topic=2, frames_span=0.1)
    assert list(over.image_headers) == [frame.header for frame in frames[1:]]
    with LLM(f"/{seeing.name}") as llm:
        example("what_happens").what_happens(llm, TOPIC, QUESTION, frames=3, span=0.2)
        assert capsys.readouterr().out.startswith("Seen: -0.2 s, -0.1 s, 0.0 s\n")
        with pytest.raises(LLMError, match="over 9 s, but those that .* go back 0.2 s"):
            llm.ask(QUESTION, image_topics=[TOPIC], frames_per_topic=2, frames_span=9.0)
    newest = ask(seeing, image_topics=[TOPIC])
    assert [header.stamp for header in newest.image_headers] == [frames[-1].header.stamp]
    assert newest.text not in expected


def test_the_python_client_and_places_in_messages(seeing, expected):
    with LLM(f"/{seeing.name}") as llm:
        first = {"role": "user", "content": QUESTION, "image_offsets": [0]}
        turns = [first, {"role": "assistant", "content": "A cup."}, {"role": "user", "content": QUESTION}]
        images = [PICTURES[0].pixels]
        seen = llm.ask([first], images=images, max_new_tokens=COUNT).text
        assert expected[1].startswith(seen)
        assert llm.ask(turns, images=images, max_new_tokens=COUNT).text != seen


def test_openai_s_client(seeing, expected):
    file = io.BytesIO()
    PillowImage.fromarray(PICTURES[0].pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{seeing.port}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id, messages=[{"role": "user", "content": content}],
            max_tokens=COUNT, extra_body={"ignore_eos": True},
        )  # fmt: skip
    assert wire_text(answer.choices[0].message.content) == expected[1]


def test_more_images_than_planned_and_placeholders_in_a_text(seeing, expected):
    bad = seeing.generate(images=[Image(height=2, width=3, step=9, encoding="rgb12")])
    assert bad.error_code == ErrorCode.INVALID_IMAGE and "'rgb12', but it must be one of" in bad.error_message
    answer = ask(seeing, [*PICTURES, PICTURES[0]])
    assert answer.error_code == ErrorCode.INVALID_IMAGE and "at most 3 (max_images)" in answer.error_message
    typed = [ChatMessage(role="user", content="What is <image> for?")]
    assert seeing.generate(messages=typed, images=[message(PICTURES[0])]).error_code == ErrorCode.NONE
    assert ask(seeing, PICTURES[:1]).text == expected[1]


def test_cameras_are_heard_while_the_node_is_active(seeing):
    camera = seeing.node.create_publisher(Image, TOPIC, 10)
    assert seeing.change(DEACTIVATE) and seeing.info().image_topics == []
    seeing.until(lambda: camera.get_subscription_count() == 0)
    assert seeing.change(ACTIVATE) and seeing.info().image_topics == [TOPIC]
    answer = ask(seeing, image_topics=[TOPIC])
    assert answer.error_code == ErrorCode.NO_FRAME and f"No image has come on {TOPIC}" in answer.error_message
    seeing.until(lambda: camera.get_subscription_count() == 1)

    def came() -> bool:
        camera.publish(message(PICTURES[0]))
        return ask(seeing, image_topics=[TOPIC]).error_code == ErrorCode.NONE

    seeing.until(came)
