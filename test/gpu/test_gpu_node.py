"""The lifecycle node in front of a GPU engine, over real ROS 2: service, action, topic, and twenty of its lives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
try:
    import edgellm_ros.msg  # noqa: F401
except ImportError:
    pytest.skip("the interfaces of edgellm_ros are not built", allow_module_level=True)

import rclpy
from demo_engines import build_demo

from engine_core.cuda.driver import Device

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test" / "ros"), str(ROOT / "test" / "core")]

from llm_client import CLEANUP, DEACTIVATE, SUCCEEDED, LlmClient, NodeProcess  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
COMMAND = "Bring the cup from the kitchen."
ROUNDS, REQUESTS = 20, 200


@pytest.fixture(scope="module", autouse=True)
def ros():
    rclpy.init()
    yield
    rclpy.shutdown()


@pytest.fixture(scope="module", params=["tensorrt", "cuda"])
def llm(request, tmp_path_factory):
    """A node that nobody has configured yet, and its client."""
    directory = tmp_path_factory.mktemp(request.param)
    build_demo(request.param, directory / "engine")
    name = f"llm_{request.param}"
    process = NodeProcess(
        name, directory / "log", script=str(ROOT / "scripts" / "llm_node"), engine_dir=directory / "engine",
        backend=request.param, temperature=0.0,
    )  # fmt: skip
    client = LlmClient(name, process)
    yield client
    process.stop()
    client.close()


def test_service_action_and_topic_say_the_same(llm):
    llm.bring_up()
    info = llm.info()
    print(f"\n{info}")
    assert info.backend == llm.name.removeprefix("llm_")
    llm.listen()
    answer = llm.generate(COMMAND, sampling={"max_new_tokens": 200}, request_id="service")
    assert answer.error_code == 0 and answer.text.startswith('{"plan":') and answer.metrics.generated_tokens > 10
    goal = llm.goal(COMMAND, sampling={"max_new_tokens": 200}, request_id="action")
    status, result = goal.result()
    assert status == SUCCEEDED and result.text == answer.text
    assert len(goal.text) > 1 and answer.text.startswith(goal.text)  # a result may overtake the last pieces
    llm.until(lambda: sum(piece.done for piece in llm.pieces) == 2)
    for request_id in ("service", "action"):
        assert "".join(piece.text for piece in llm.pieces_of(request_id)) == answer.text
    metrics = answer.metrics
    print(f"{metrics.time_to_first_token * 1e3:.2f} ms to the first token, {metrics.tokens_per_second:.0f} tokens/s")
    llm.pieces.clear()
    assert llm.change(DEACTIVATE) and llm.change(CLEANUP)


def test_a_goal_is_cancelled_within_a_token(llm):
    llm.bring_up()
    goal = llm.goal("hello", prompt="a", sampling={"max_new_tokens": 1500, "temperature": 2.0, "ignore_eos": True})
    llm.until(lambda: len(goal.feedback) > 5)
    goal.cancel()
    _, result = goal.result()
    assert result.metrics.generated_tokens < 1500
    assert llm.change(DEACTIVATE) and llm.change(CLEANUP)


def test_twenty_rounds_give_all_device_memory_back(llm):
    def one_round(requests):
        llm.bring_up()
        for index in range(requests):
            answer = llm.generate(f"{COMMAND} Then wait {index} seconds.", sampling={"max_new_tokens": 8})
            assert answer.error_code == 0 and answer.metrics.generated_tokens == 8
        assert llm.change(DEACTIVATE) and llm.change(CLEANUP)

    one_round(5)  # the driver and the libraries keep some of their own the first time
    device = Device()
    before, first = device.memory_info()[0], llm.node_process.resident()
    for _ in range(ROUNDS):
        one_round(REQUESTS)
        print(
            f"{(before - device.memory_info()[0]) / 1e6:.1f} MB of the GPU and "
            f"{(llm.node_process.resident() - first) / 1e6:.1f} MB of the host more than before"
        )
    assert before - device.memory_info()[0] <= 8 << 20
    device.close()
