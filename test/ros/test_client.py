"""The Python client: pieces that always add up to the result, cancel on exit, typed errors."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
import rclpy
from rclpy.executors import MultiThreadedExecutor, SingleThreadedExecutor

from edgellm_ros import client as module
from edgellm_ros.client import LLM, InvalidRequestError, NotActiveError, PromptTooLongError, UnavailableError
from edgellm_ros.msg import FinishReason
from llm_client import NodeProcess, Nodes


@pytest.fixture
def client(llm):
    with LLM(llm.name) as client:
        yield client


@contextlib.contextmanager
def rclpy_node(name):
    node = rclpy.create_node(name)
    try:
        yield node
    finally:
        node.destroy_node()


def test_a_stream_adds_up_to_its_result(client, llm):
    async def run():
        stream = client.stream("hello", max_new_tokens=50, temperature=0)
        return "".join([piece async for piece in stream]), stream.result

    text, result = asyncio.run(run())
    assert text == result.text and result.metrics.generated_tokens == 50 and result.finish_reason == FinishReason.LENGTH
    assert client.ask("hello", max_new_tokens=50).text == text


def test_many_streams_at_once(client):
    async def one(number):
        stream = client.stream([{"role": "user", "content": f"number {number}"}], max_new_tokens=20)
        return "".join([piece async for piece in stream]) == stream.result.text

    async def run():
        return await asyncio.gather(*(one(number) for number in range(16)))

    assert all(asyncio.run(run()))


def test_leaving_a_stream_cancels_the_request(client, llm):
    async def run():
        async for _ in client.stream("hello", max_new_tokens=1000):
            break
        await asyncio.sleep(0)

    asyncio.run(run())
    llm.until(lambda: not llm.status().busy)
    pieces = client.pieces("hello", max_new_tokens=1000)
    next(pieces)
    pieces.close()
    llm.until(lambda: not llm.status().busy)


def test_cancel_ends_the_request_with_what_there_was(client):
    pieces = client.pieces("hello", max_new_tokens=1900)
    text = next(pieces)
    pieces.cancel()
    text += "".join(pieces)
    assert pieces.result.finish_reason == FinishReason.CANCELLED and pieces.result.text == text


@pytest.mark.parametrize("make", [SingleThreadedExecutor, MultiThreadedExecutor])
def test_with_a_node_of_the_application(llm, make):
    with rclpy_node("application") as node:
        executor = make()
        executor.add_node(node)
        thread = threading.Thread(target=executor.spin, daemon=True)
        thread.start()
        with LLM(llm.name, node=node) as client:
            texts = {client.ask("hello", max_new_tokens=5, temperature=0).text for _ in range(20)}
        executor.shutdown()
        thread.join(5.0)
    assert len(texts) == 1


def test_clients_of_one_process_share_a_participant(client, llm):
    def ask(each):
        return each.ask("hello", max_new_tokens=3, temperature=0).text

    with LLM(llm.name) as other:
        assert other._node.context is client._node.context is not rclpy.get_default_context()
        assert ask(other) == ask(client)
    assert ask(client)
    client.close()
    assert not client._node.context.ok()
    with LLM(llm.name) as later:
        assert ask(later)


@pytest.mark.parametrize("make", [SingleThreadedExecutor, MultiThreadedExecutor])
def test_closing_it_does_not_disturb_the_application(llm, make):
    with rclpy_node("application") as node:
        node.create_timer(0.0005, lambda: None)  # the executor waits anew all the time
        executor = make()
        executor.add_node(node)
        thread = threading.Thread(target=executor.spin, daemon=True)
        thread.start()
        for _ in range(40):
            with LLM(llm.name, node=node) as client:
                client.wait()
        alive = thread.is_alive()
        executor.shutdown()
        thread.join(5.0)
    assert alive


def test_what_has_arrived_for_a_closed_client_is_not_taken(llm, monkeypatch):
    """A thread of an executor may have chosen the client before it is closed, and take from it afterwards."""
    taken = []
    monkeypatch.setattr(module.ActionClient, "take_data", lambda self: taken.append(self) or {"status": None})
    with rclpy_node("application") as node:
        client = module._Action(node, f"/{llm.name}/generate").client
        assert client.take_data() == {"status": None} and taken == [client]
        client.destroy()
        assert client.take_data() == {} and taken == [client]


def test_a_node_that_nobody_spins_is_told(llm, monkeypatch):
    monkeypatch.setattr(module, "_SEND_LIMIT", 0.5)
    with (
        rclpy_node("idle_application") as node,
        LLM(llm.name, node=node) as client,
        pytest.raises(UnavailableError, match="no executor"),
    ):
        client.ask("hello")


@pytest.mark.parametrize("how", ["break", "error", "cancel"])
def test_leaving_the_client_with_the_stream_cancels_the_request(llm, how):
    """The client is closed at once, as the documentation shows it."""

    async def run():
        async with LLM(llm.name) as client:
            async for _ in client.stream("hello", max_new_tokens=1900):
                if how == "break":
                    break
                if how == "error":
                    raise ZeroDivisionError
                asyncio.current_task().cancel()

    expected = {"break": (), "error": (ZeroDivisionError,), "cancel": (asyncio.CancelledError,)}[how]
    try:
        asyncio.run(run())
        assert not expected
    except expected:
        pass
    llm.until(lambda: not llm.statuses[-1].busy, limit=5.0)  # 1,900 tokens take at least 7.6 s


def test_a_node_that_is_killed_and_started_again_ends_its_requests(tmp_path, engine_dir):
    nodes = Nodes(tmp_path)
    try:
        llm = nodes.start(engine_dir).bring_up()
        with LLM(llm.name) as client:
            pieces = client.pieces("hello", max_new_tokens=1900)
            next(pieces)
            llm.node_process.process.kill()
            llm.node_process.process.wait()
            again = NodeProcess(llm.name, tmp_path / "again.log", engine_dir=engine_dir)
            start = time.monotonic()
            with pytest.raises(UnavailableError):
                list(pieces)
            assert time.monotonic() - start < 30.0
            again.stop()
    finally:
        nodes.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"temperature": -1}, InvalidRequestError), ({"prompt": "x" * 3000}, PromptTooLongError)],
)
def test_errors_have_types(client, options, error):
    messages = () if "prompt" in options else "hello"
    with pytest.raises(error) as raised:
        client.ask(messages, **options)
    assert raised.value.code and "\n" not in str(raised.value)


def test_a_node_that_is_not_there_or_not_active(nodes, engine_dir):
    with LLM("/nobody", wait=0.3) as client, pytest.raises(UnavailableError, match="/nobody/generate"):
        client.ask("hello")
    idle = nodes.start(engine_dir)
    with LLM(idle.name, wait=20.0) as client, pytest.raises(NotActiveError):  # the node is starting
        client.ask("hello")


def test_unknown_options_are_refused(client):
    with pytest.raises(TypeError, match="colour"):
        client.stream("hello", colour="red")


def test_a_gap_is_filled_from_the_result():
    text = module.PieceText()
    assert [text.piece(0, "a"), text.piece(1, "b"), text.piece(3, "d"), text.piece(4, "e")] == ["a", "b", "", ""]
    assert text.rest("abcde") == "cde"


def test_a_fast_stream_loses_nothing(nodes, tmp_path):
    """Without a pause between steps, as a small model on a GPU."""
    from fake_backend import write_engine

    fast = nodes.start(write_engine(tmp_path / "engine", script="word " * 300)).bring_up()
    with LLM(fast.name) as client:
        for _ in range(5):
            pieces = list(client.pieces("go", max_new_tokens=1500))
            assert "".join(pieces) == "word " * 300
