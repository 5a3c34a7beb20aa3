"""A camera publishes frames of a table, and the node with the demo model that sees answers what is on it now."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from engine_core.backends.onnxruntime.build import build_engine
from llm_client import Nodes

pytest.importorskip("torch", reason="torch is not installed; 'make test' provides it")

from tools.demo_vision.questions import is_right  # noqa: E402
from tools.demo_vision.render import picture_of  # noqa: E402
from tools.demo_vision.scene import random_scene  # noqa: E402
from tools.demo_vision.words import a, listing, name, sentence  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo_vision"
TOPIC = "camera/image_raw"


class Camera:
    """Publishes the same frame again and again, each time with a new stamp."""

    def __init__(self, client) -> None:
        self._clock = client.node.get_clock()
        self._publisher = client.node.create_publisher(Image, f"/{TOPIC}", 10)

    def shows(self, scene) -> None:
        pixels = np.asarray(picture_of(scene, height=120))
        height, width, _ = pixels.shape
        self._frame = Image(height=height, width=width, encoding="rgb8", step=3 * width, data=pixels.tobytes())

    def publish(self) -> None:
        self._frame.header = Header(stamp=self._clock.now().to_msg(), frame_id="table_camera")
        self._publisher.publish(self._frame)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("seeing")
    build_engine(MODEL, directory / "engine")
    nodes = Nodes(directory)
    yield nodes.start(directory / "engine", image_topics=[TOPIC]).bring_up()
    nodes.close()


def ask(llm, camera: Camera, question: str):
    """Ask about the newest frame while the camera publishes; what is sent best effort may be lost."""
    for _ in range(10):
        camera.publish()
        llm.spin(0.05)
    answer = llm.generate_async(question, image_topics=[TOPIC], sampling={"max_new_tokens": 128})
    while not answer.done():
        camera.publish()
        llm.spin(0.05)
    result = answer.result()
    assert result.error_code == 0, result.error_message
    return result


def test_the_answers_are_about_the_newest_frame(llm):
    camera = Camera(llm)
    drawn = (random_scene(Random(seed)) for seed in itertools.count(2_000_000))
    of_three = (scene for scene in drawn if len({thing.kind for thing in scene.things}) == len(scene.things) == 3)
    scenes = list(itertools.islice(of_three, 3))
    right = 0
    for scene in scenes:
        camera.shows(scene)
        before = llm.node.get_clock().now().nanoseconds
        listed = ask(llm, camera, "What is on the table?")
        (header,) = listed.image_headers
        assert header.frame_id == "table_camera"
        assert header.stamp.sec * 10**9 + header.stamp.nanosec >= before
        right += listed.text == sentence(listing([a(name(thing.kind)) for thing in scene.things]))
        leftmost = scene.things[0]
        plan = {"plan": [{"do": "pick", "object": name(leftmost.kind), "at": leftmost.percent}]}
        right += is_right(json.dumps(plan), ask(llm, camera, f"Pick the {name(leftmost.kind)}.").text)
    assert right >= 5
