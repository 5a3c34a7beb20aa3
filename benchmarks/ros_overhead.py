"""Measure what ROS and HTTP add: the same request in process and through each front, from another process.

    tools/start run benchmarks/ros_overhead.py ENGINE_DIR [--tokens 200] [--rounds 15] [--starts 1] [--out FILE]

The paths take turns within each round, so that a slow moment of the machine meets all of them; figures are medians over
the rounds, what is added is the median over the rounds of what each adds to the baseline of its own round. All paths
use one engine (where a process happens to have its memory makes some per cent of difference for all its life) and find
the same prefix cached, which is checked. The rounds can be spread over several ``--starts`` of the node. The client's
times run from before it sends the request to when its callback has the first piece:

- in process: from Worker.submit to on_piece, in the node's process;
- service: nothing streams, so the first token is the node's figure plus what the client waited longer than the node
  worked. Nobody listens to the topics then;
- action: feedback;
- topic: ~/tokens, of a request made through the service;
- http: the server-sent events of /v1/chat/completions, over a connection that is kept open. It is also compared with
  each way of ROS, again within each round.

The decode step is what the node's results say. A client in Python takes the better part of a millisecond of a core for
each message, as much as the model for a token; with two cores it would starve the node it measures. So after the
first piece the client rests until the answer is there, then reads the rest from its queue (every piece is sent and
arrives all the same, which is checked). ``--eager`` has it read at once instead. The latency of a piece, from its stamp
in the node to the callback of a client that reads at once, is measured with requests of their own.

A table first, then one JSON line for each path.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import platform
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from edgellm_ros.action import Generate as GenerateAction
from edgellm_ros.msg import ChatMessage, GenerationRequest, SamplingOptions, TokenPiece
from edgellm_ros.node import LlmNode
from edgellm_ros.process import run_node
from edgellm_ros.srv import Generate, GetInfo
from engine_core import __version__
from engine_core import request as core

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import isolation  # noqa: E402

NAME = "llm_overhead"
PATHS = ("in process", "service", "action", "topic", "http")
PROMPT = "please bring me the red cup from the kitchen and put it on the table in the living room"
LIMIT = 60.0  # s
DISCOVERY = 0.3  # s


class Row(NamedTuple):
    """One request as its client saw it."""

    first: float  # s, the first token at the client
    step: float  # s
    cached: int  # tokens of the prompt


def make_row(first: float, metrics) -> Row:
    """``metrics``: what has tokens_per_second and cached_tokens, a message or the core's result."""
    return Row(first, 1.0 / metrics.tokens_per_second, metrics.cached_tokens)


@dataclass
class Times:
    """The times of one request, in seconds since it was sent: when each token came, a piece of several as often."""

    start: float = field(default_factory=time.perf_counter)
    tokens: list[float] = field(default_factory=list)

    def piece(self, num_tokens: int) -> None:
        self.tokens += [time.perf_counter() - self.start] * num_tokens

    @property
    def first(self) -> float:
        return self.tokens[0]


class Baseline:
    """The request without ROS: straight to the worker of the node, in the node's process, asked for through a pipe.

    The same engine at the same place in memory: two loads of one engine differ by some per cent for all their lives.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def measure(self) -> Row:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Row(*json.loads(self._process.stdout.readline()))


def serve(num_tokens: int, arguments: list[str], switch: Callable[[str, bool], float] = lambda name, on: 0.0) -> int:
    """Run the node as ``llm_node`` does, and a thread that answers each line of the standard input.

    An empty line with the Row of a request; the name of a setting and true or false, as JSON, with what ``switch``
    returns.
    """

    def measure(node: LlmNode) -> Row:
        request = core.GenerationRequest(
            "bench", (core.ChatMessage("user", PROMPT),),
            sampling=core.SamplingParams(max_new_tokens=num_tokens, ignore_eos=True),
        )  # fmt: skip
        times, results = Times(), queue.SimpleQueue()
        node.worker.submit(request, on_piece=lambda piece: times.piece(len(piece.token_ids)), on_done=results.put)
        result = results.get(timeout=LIMIT)
        return make_row(times.first, result)

    def answer(node: LlmNode) -> None:
        for line in sys.stdin:
            print(json.dumps(switch(*json.loads(line)) if line.strip() else measure(node)), flush=True)

    def make_node() -> LlmNode:
        node = LlmNode()
        threading.Thread(target=answer, args=(node,), daemon=True).start()
        return node

    return run_node(make_node, arguments)


class OverRos:
    """A client of the node, which is a process of its own."""

    def __init__(self, engine_dir: Path, num_tokens: int, num_threads: int, script: str = __file__) -> None:
        """``script``: what serves the node when it is run with ``--serve``."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        arguments = ["-r", f"__node:={NAME}", "-p", f"engine_dir:={engine_dir}", "-p", f"num_threads:={num_threads}"]
        arguments += ["-p", f"http_port:={port}"]
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve", str(num_tokens), "--ros-args", *arguments, "--log-level", "warn"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.rest = 0.0  # s
        self._node: Node = rclpy.create_node("ros_overhead")
        self._executor = SingleThreadedExecutor()  # kept, as a planner's is: spin_once(node) would set one up each time
        self._executor.add_node(self._node)
        self._change = self._node.create_client(ChangeState, f"{NAME}/change_state")
        self._state = self._node.create_client(GetState, f"{NAME}/get_state")
        self._service = self._node.create_client(Generate, f"{NAME}/generate")
        self._action = ActionClient(self._node, GenerateAction, f"{NAME}/generate")
        self._num_tokens = num_tokens
        self._request = GenerationRequest(
            messages=[ChatMessage(role="user", content=PROMPT)],
            sampling=SamplingOptions(max_new_tokens=[num_tokens], ignore_eos=True),
        )

    def switch(self, setting: str, on: bool) -> float:
        """Switch a setting in the node's process; return what it says."""
        self.process.stdin.write(json.dumps([setting, on]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def bring_up(self) -> None:
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            assert self._change.wait_for_service(LIMIT), "the node did not start"
            self._spin(0.5)  # rmw_fastrtps drops an answer to a client that the node has not found yet
            request = ChangeState.Request(transition=Transition(id=transition))
            assert self._wait(self._change.call_async(request)).success, "the node refused a transition"
        assert self._service.wait_for_service(LIMIT) and self._action.wait_for_server(LIMIT)

    def _wait(self, future):
        self._executor.spin_until_future_complete(future, timeout_sec=LIMIT)
        assert future.done(), "the node did not answer"
        return future.result()

    def model(self) -> str:
        """Its name and quantization."""
        client = self._node.create_client(GetInfo, f"{NAME}/get_info")
        assert client.wait_for_service(LIMIT), "the node did not start"
        info = self._wait(client.call_async(GetInfo.Request()))
        self._node.destroy_client(client)
        return f"{info.model_name} {info.quantization}"

    def service(self) -> Row:
        start = time.perf_counter()
        metrics = self._wait(self._service.call_async(Generate.Request(request=self._request))).result.metrics
        transport = time.perf_counter() - start - metrics.total_time
        return make_row(metrics.time_to_first_token + transport, metrics)

    def empty(self) -> float:
        """s from a client's call to the answer where nothing is asked: what rclpy and the middleware take."""
        start = time.perf_counter()
        self._wait(self._state.call_async(GetState.Request()))
        return time.perf_counter() - start

    def action(self) -> Row:
        times = Times()
        sent = self._action.send_goal_async(
            GenerateAction.Goal(request=self._request),
            feedback_callback=lambda m: times.piece(len(m.feedback.token_ids)),
        )
        answer = self._wait(sent).get_result_async()
        self._rest_after_first(times)
        return make_row(times.first, self._wait(answer).result.result.metrics)

    def topic(self, latencies: list[float] | None = None) -> Row:
        """With a subscription for this request only, so that the other paths have none.

        ``latencies``: gets, in seconds, how old each piece is when it is read; the client reads at once then.
        """
        times, done = Times(), []

        def on_piece(piece: TokenPiece) -> None:
            times.piece(len(piece.token_ids))
            if latencies is not None:
                latencies.append(time.time() - piece.header.stamp.sec - piece.header.stamp.nanosec * 1e-9)
            if piece.done:
                done.append(True)

        qos = QoSProfile(depth=4096, reliability=ReliabilityPolicy.RELIABLE)
        subscription = self._node.create_subscription(TokenPiece, f"{NAME}/tokens", on_piece, qos)
        self._spin(DISCOVERY)  # until both sides have found each other
        times.start = time.perf_counter()
        answer = self._service.call_async(Generate.Request(request=self._request))
        if latencies is None:
            self._rest_after_first(times)
        end = time.monotonic() + LIMIT
        while not (done and answer.done()):
            assert time.monotonic() < end, "the stream did not end"
            self._executor.spin_once(timeout_sec=0.1)
        self._node.destroy_subscription(subscription)
        self._spin(0.1)
        metrics = answer.result().result.metrics
        assert len(times.tokens) == metrics.generated_tokens, "pieces were lost"
        return make_row(times.first, metrics)

    def http(self) -> Row:
        body = {
            "messages": [{"role": "user", "content": PROMPT}], "max_tokens": self._num_tokens, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        self._connect()
        start = time.perf_counter()
        headers = {"content-type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = self._connection.getresponse()
        first = b""
        while b'"content"' not in first:
            first = response.readline()
        began = time.perf_counter() - start
        time.sleep(self.rest)
        events = [json.loads(line[6:]) for line in response.read().splitlines() if line.startswith(b"data: {")]
        usage, figures = events[-1]["usage"], events[-2]["edgellm"]
        assert usage["completion_tokens"] == self._num_tokens, "tokens were lost"
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return make_row(began, SimpleNamespace(tokens_per_second=figures["tokens_per_second"], cached_tokens=cached))

    def _connect(self) -> None:
        """Make sure that the connection is open: the server closes one that was idle for seconds."""
        for _ in range(2):
            try:
                self._connection.request("GET", "/health")
                self._connection.getresponse().read()
                return
            except (OSError, http.client.HTTPException):
                self._connection.close()
        raise RuntimeError("the node's HTTP endpoint does not answer")

    def _rest_after_first(self, times: Times) -> None:
        end = time.monotonic() + LIMIT
        while not times.tokens:
            assert time.monotonic() < end, "no piece came"
            self._executor.spin_once(timeout_sec=0.1)
        time.sleep(self.rest)

    def _spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)
        self._connection.close()
        self._action.destroy()
        self._node.destroy_node()


@dataclass
class Found:
    """The measured values, by path."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {path: [] for path in PATHS})
    latencies: list[float] = field(default_factory=list)  # s
    empty: list[float] = field(default_factory=list)  # s
    model: str = ""

    def medians(self, path: str) -> tuple[float, float]:
        """ms: first token, decode step."""
        firsts, steps, _ = zip(*self.rows[path])
        return statistics.median(firsts) * 1e3, statistics.median(steps) * 1e3

    def added(self, path: str, to: str = PATHS[0]) -> tuple[float, float]:
        """ms to the first token and per cent to the decode step: medians over the rounds, each against its own."""
        pairs = list(zip(self.rows[path], self.rows[to]))
        return (
            statistics.median(row.first - base.first for row, base in pairs) * 1e3,
            statistics.median(row.step / base.step - 1.0 for row, base in pairs) * 1e2,
        )


def measure(arguments: argparse.Namespace, rounds: int, found: Found) -> None:
    options = (arguments.engine_dir, arguments.tokens, arguments.threads)
    over_ros = OverRos(*options)
    baseline = Baseline(over_ros.process)
    paths = dict(zip(PATHS, (baseline.measure, over_ros.service, over_ros.action, over_ros.topic, over_ros.http)))
    try:
        over_ros.bring_up()
        found.model = over_ros.model()
        over_ros.empty()
        for path in (*paths.values(), baseline.measure):  # warm: discovery, caches, the prompt's KV
            step = path().step
        over_ros.rest = 0.0 if arguments.eager else 1.5 * step * arguments.tokens
        turns = list(paths.items())
        for number in range(rounds):
            start = number % len(turns)  # each path follows each other one
            for path, run in turns[start:] + turns[:start]:
                if path != "topic":
                    time.sleep(DISCOVERY)  # what comes after a rest is slower, so all have it
                found.rows[path].append(run())
            time.sleep(DISCOVERY)
            found.empty.append(over_ros.empty())
        over_ros.topic(found.latencies)
    finally:
        over_ros.close()
    cached = {row.cached for rows in found.rows.values() for row in rows}
    assert len(cached) == 1, f"the paths found different prefixes cached: {cached} tokens"


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        raise SystemExit(serve(int(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--tokens", type=int, default=200, help="generated tokens of each request")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--starts", type=int, default=1, help="how often the node is started anew")
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0 = the backend's choice")
    parser.add_argument("--eager", action="store_true", help="the client reads each piece at once, on the node's cores")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    arguments = parser.parse_args()
    found, load = Found(), os.getloadavg()[0]
    isolation.isolate()
    rclpy.init()
    try:
        for _ in range(arguments.starts):
            measure(arguments, arguments.rounds // arguments.starts, found)
    finally:
        rclpy.shutdown()  # with the context open, the process would not end
    rounds = len(found.rows["service"])
    medians = {path: found.medians(path) for path in PATHS}
    base_first, base_step = medians["in process"]
    latencies = sorted(1e3 * latency for latency in found.latencies)
    latency = {
        "piece_latency_ms": round(latencies[len(latencies) // 2], 3),
        "piece_latency_95_ms": round(latencies[len(latencies) * 95 // 100], 3),
    }
    print(f"{found.model}, {arguments.tokens} tokens, {rounds} rounds, {os.cpu_count()} cores")
    print(f"{'path':<11}{'first token':>13}{'added':>12}{'decode step':>14}{'added':>9}")
    for path, (first, step) in medians.items():
        added_first, added_step = found.added(path)
        print(f"{path:<11}{first:>10.2f} ms{added_first:>+9.2f} ms{step:>11.3f} ms{added_step:>+8.1f}%")
    over = {}  # path of ROS → ms to the first token and per cent to the decode step that HTTP adds to it
    for path in PATHS[1:-1]:
        over[path] = [round(value, 3) for value in found.added("http", path)]
        print("http over {:<7}: first token {:+.2f} ms, decode step {:+.1f} %".format(path, *over[path]))
    median, most = latency.values()
    empty = statistics.median(found.empty) * 1e3
    print(f"an empty service call (get_state) takes {empty:.2f} ms")
    print(f"a piece reaches a client that reads at once in {median:.2f} ms (median), {most:.2f} ms (95 %)")
    versions = {
        "edgellm_ros": __version__, "python": platform.python_version(),
        "rmw": rclpy.get_rmw_implementation_identifier(),
    }  # fmt: skip
    lines = [
        json.dumps({
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "versions": versions,
            "model": found.model, "cores": os.cpu_count(), "tokens": arguments.tokens, "rounds": rounds,
            "starts": arguments.starts, "threads": arguments.threads, "path": path,
            "ttft_ms": round(first, 3), "ms_per_token": round(step, 4),
            "added_ttft_ms": round(found.added(path)[0], 3), "added_percent": round(found.added(path)[1], 2),
            "eager_client": arguments.eager, "empty_call_ms": round(empty, 3),
            **(latency if path == "topic" else {}),
            **({"over_ros": over} if path == "http" else {}),
            "load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2),
            "in_process_ttft_ms": round(base_first, 3), "in_process_ms_per_token": round(base_step, 4),
        })
        for path, (first, step) in medians.items()
    ]  # fmt: skip
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
