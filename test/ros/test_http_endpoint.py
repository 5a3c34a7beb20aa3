"""The HTTP endpoint of the node: the same requests, queue and streams as ROS's, while the node is active."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("uvicorn")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402

from edgellm_ros.msg import FinishReason, Sentence  # noqa: E402
from edgellm_ros.srv import Cancel  # noqa: E402
from llm_client import ACTIVATE, ACTIVE, DEACTIVATE, GREEDY_LONG, LIMIT, STREAM, Nodes  # noqa: E402


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Asked(threading.Thread):
    """A request over HTTP, in a thread: the client of ROS spins meanwhile."""

    def __init__(self, port: int, text="hello", **body) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8} | body
        self.status, self.body = 0, b""
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LIMIT)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(self._body), headers)
        response = connection.getresponse()
        self.body = response.read()
        self.status = response.status
        connection.close()

    def answer(self, llm) -> tuple[int, dict]:
        llm.until(lambda: not self.is_alive())
        return self.status, json.loads(self.body)


@pytest.fixture(scope="module")
def served(tmp_path_factory, engine_dir):
    """A port and the active node that serves it."""
    nodes, port = Nodes(tmp_path_factory.mktemp("served")), free_port()
    llm = nodes.start(engine_dir, http_port=port, queue_depth=32).bring_up()
    llm.listen()
    yield port, llm
    nodes.close()


def test_both_fronts_give_the_same_answer_and_http_is_on_the_topics(served):
    port, llm = served
    sentences: list[Sentence] = []
    llm.node.create_subscription(Sentence, f"/{llm.name}/sentences", sentences.append, STREAM)
    llm.spin(0.3)
    status, body = Asked(port, "same").answer(llm)
    text = body["choices"][0]["message"]["content"]
    assert (status, text) == (200, llm.generate("same").text)
    llm.until(lambda: any(piece.done for piece in llm.pieces_of(body["id"])))
    assert "".join(piece.text for piece in llm.pieces_of(body["id"])) == text
    llm.until(lambda: any(each.done and each.request_id == body["id"] for each in sentences))


def test_one_queue_priorities_and_cancel_by_ros(served):
    port, llm = served
    goal = llm.goal("long", request_id="long", sampling={"max_new_tokens": GREEDY_LONG, "ignore_eos": True})
    # By its name: the last status may still be that of the test before.
    llm.status(lambda status: any(request.running and request.request_id == "long" for request in status.requests))
    # It is long itself, so that the cancel finds it however late it comes.
    low, high = Asked(port, "low", max_tokens=GREEDY_LONG, ignore_eos=True), Asked(port, "high", priority=9)
    status = llm.status(lambda status: status.queued == 2)
    assert [request.priority for request in status.requests] == [0, 9, 0]
    waiting = status.requests[2].request_id
    assert llm.call(Cancel, "cancel", Cancel.Request(request_id=waiting)).num_cancelled == 1
    code, body = low.answer(llm)
    assert (code, body["error"]["code"]) == (503, "cancelled")
    goal.cancel()
    assert high.answer(llm)[0] == 200
    assert llm.pieces_of(waiting)[-1].finish_reason == FinishReason.CANCELLED


def test_a_refused_request_ends_on_the_topics(served):
    port, llm = served
    llm.pieces.clear()
    code, _ = Asked(port, "x" * 5000).answer(llm)
    assert code == 400
    llm.until(lambda: any(piece.done and piece.request_id.startswith("chatcmpl-") for piece in llm.pieces))


def test_it_closes_with_deactivate_and_a_new_port_is_taken_at_activate(served):
    port, llm = served
    other = free_port()
    llm.must_set(http_port=other)
    assert Asked(port).answer(llm)[0] == 200
    assert llm.change(DEACTIVATE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert llm.change(ACTIVATE)
    assert Asked(other).answer(llm)[0] == 200
    llm.must_set(http_port=port)
    assert llm.change(DEACTIVATE) and llm.change(ACTIVATE)
    assert Asked(port).answer(llm)[0] == 200


def test_a_port_in_use_leaves_the_node_active_and_is_said(nodes, engine_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        llm = nodes.start(engine_dir, http_port=port).bring_up()
        diagnostics: list[DiagnosticArray] = []
        llm.node.create_subscription(DiagnosticArray, "/diagnostics", diagnostics.append, 10)
        assert llm.state() == ACTIVE and llm.generate().error_code == 0

        def warned() -> bool:
            mine = [status for message in diagnostics for status in message.status if llm.name in status.name]
            return bool(mine) and mine[-1].level == DiagnosticStatus.WARN and f"port {port}" in mine[-1].message

        llm.until(warned)
    assert "The node is active without it." in llm.node_process.log.read_text()


@pytest.mark.alone
def test_64_slow_clients_do_not_slow_ros(served):
    port, llm = served

    def rate() -> float:
        return llm.generate("rate", sampling={"max_new_tokens": 200}).metrics.tokens_per_second

    llm.generate("rate")
    before = max(rate() for _ in range(2))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.02):
            for sock in slow:
                sock.send(b" ")

    for sock in slow:
        sock.sendall(head)
    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        as_fast = any(rate() > 0.8 * before for _ in range(6))  # something else may slow a few of them
    finally:
        stop.set()
        thread.join()
        for sock in slow:
            sock.close()
    assert as_fast


def test_nothing_of_it_is_imported_without_a_port(tmp_path):
    program = (
        "import sys, edgellm_ros.node\n"
        "from edgellm_ros.http_endpoint import HttpEndpoint\n"
        "from types import SimpleNamespace\n"
        "HttpEndpoint(None, None).open(SimpleNamespace(http_port=0))\n"
        "print(sorted({'starlette', 'uvicorn', 'h11', 'prometheus_client'} & sys.modules.keys()))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
