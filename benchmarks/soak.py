"""Test a node with many clients that do all sorts of things: nothing lost, doubled, wrong or hung, and nothing grows.

    tools/start run "$PWD/benchmarks/soak.py" ENGINE_DIR [--requests 10000] [--clients 16] [--kills 20]

Starts a node on the engine and client processes beside it. Each client sends requests, one in four through the action
and the others through the service: greedy questions whose answers are known, random cancels (of the action), deadlines,
priorities, JSON schemas, and bad input. ``--kills``
clients are ended by SIGKILL meanwhile and replaced. Then the node itself is killed ``--node-kills`` times under the
same load and started again: each request has to end, with an answer or with the news that the node is gone. Last, a
node is led through ``--transitions`` lifecycle transitions. Prints a table and appends a row to
benchmarks/results/soak.jsonl: date, commit, requests by outcome; lost (a client ended without an answer), doubled (two
answers), wrong (another text than alone, JSON that does not parse, bad input that was answered), hung (no answer within
a minute); KiB, threads and file descriptors of the node grown per 1,000 requests.
Exit status 1 if anything was lost, doubled, wrong or hung, or a transition failed.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor

from edgellm_ros import qos
from edgellm_ros.client import (
    LLM,
    InvalidRequestError,
    LLMError,
    NotActiveError,
    QueueFullError,
    UnavailableError,
    error_of,
    make_goal,
)
from edgellm_ros.msg import ErrorCode, FinishReason, GenerationResult
from edgellm_ros.srv import Generate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import isolation  # noqa: E402  # from tools/: no other node hears this one

RESULTS = ROOT / "benchmarks" / "results" / "soak.jsonl"
NAME = "/soak"
KILL_INTERVAL = 5.0  # s between two client kills: a client needs some of them to start
LIMIT = 60.0  # s without an answer after which a request counts as hung
QUESTIONS = tuple(f"go to the {room}" for room in ("kitchen", "bedroom", "garage", "office", "bathroom", "garden"))
SCHEMAS = (
    '{"type":"boolean"}', '{"enum":["red","green","blue"]}', '{"type":"integer","minimum":0,"maximum":9}',
    '{"type":"object","properties":{"go":{"type":"boolean"}},"required":["go"],"additionalProperties":false}',
)  # fmt: skip
BAD = (
    {"temperature": -1.0}, {"top_p": 7.0}, {"json_schema": "{"}, {"json_schema": '{"$ref":"#"}'}, {"messages": ""},
    {"messages": "x" * 200_000}, {"stop": [""]}, {"deadline": -1.0}, {"json_schema": '{"colour":"red"}'},
)  # fmt: skip


class Service:
    """The node's service, asked like the client's ``ask``. Another thread spins ``node``."""

    def __init__(self, node: rclpy.node.Node) -> None:
        self._node = node
        self._client = node.create_client(Generate, f"{NAME}/generate", qos_profile=qos.SERVICE)

    def ask(self, messages: str, **options) -> GenerationResult:
        """Return the answer; raise LLMError."""
        if not self._client.wait_for_service(30.0):
            raise UnavailableError("No node offers the service.")
        servers = self._servers()
        answered = threading.Event()
        future = self._client.call_async(Generate.Request(request=make_goal(messages, **options).request))
        future.add_done_callback(lambda _future: answered.set())
        while not answered.wait(0.5):
            if not servers & self._servers():
                self._client.remove_pending_request(future)
                raise UnavailableError("The node that offered the service is gone.")
        result = future.result().result
        if result.error_code != ErrorCode.NONE:
            raise error_of(result.error_code, result.error_message)
        return result

    def _servers(self) -> set[bytes]:
        return {bytes(info.endpoint_gid) for info in self._node.get_publishers_info_by_topic(f"{NAME}/stats")}


def ask(llm: LLM, service: Service, expected: dict[str, str], tokens: int, rng: random.Random) -> str:
    """Send one request of a random kind, with at most ``tokens`` tokens for an answer in words; return its outcome.

    An outcome begins with ``wrong`` if it is not as it has to be.
    """
    kind = rng.choices(("plain", "cancel", "deadline", "schema", "bad"), (5, 2, 1, 2, 2))[0]
    question = rng.choice(QUESTIONS)
    road = llm if rng.random() < 0.25 else service
    options = {"temperature": 0.0, "max_new_tokens": tokens, "priority": rng.randrange(4)}
    try:
        if kind == "cancel":
            pieces = llm.pieces(question, **options)
            for _, _piece in zip(range(rng.randrange(1, 4)), pieces):
                pass
            pieces.close()
            return "cancelled"
        if kind == "bad":
            fields = {"messages": question} | rng.choice(BAD)
            try:
                road.ask(fields.pop("messages"), **(options | fields))
            except InvalidRequestError:
                return "refused"
            return "wrong: bad input was answered"
        if kind == "schema":
            answer = road.ask(question, json_schema=rng.choice(SCHEMAS), **(options | {"max_new_tokens": 64}))
            if answer.finish_reason == FinishReason.STOP:
                json.loads(answer.text)
            return "answered"
        if kind == "deadline":
            options["deadline"] = 10.0 ** rng.uniform(-3, 0)
        answer = road.ask(question, **options)
        whole = answer.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if answer.text != expected[question] if whole else not expected[question].startswith(answer.text):
            return f"wrong: {answer.text!r}"
        return "answered" if whole else "cut by its deadline"
    except QueueFullError:
        return "queue full"
    except (UnavailableError, NotActiveError) as error:
        return f"gone: {error}"
    except (LLMError, ValueError) as error:
        return f"wrong: {type(error).__name__} {error}"


def serve(seed: float, expected: dict[str, str], tokens: int, quota, pipe: Connection) -> None:
    """One client process: takes requests from ``quota`` until none is left; tells ``pipe`` "sent" and each outcome."""
    rng = random.Random(seed)
    rclpy.init()
    node = rclpy.create_node("soak_client", start_parameter_services=False)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=executor.spin, daemon=True)
    spinner.start()
    service = Service(node)
    with LLM(NAME, node=node, wait=30.0) as llm:
        while True:
            with quota.get_lock():
                if quota.value <= 0:
                    break
                quota.value -= 1
            pipe.send("sent")
            pipe.send(ask(llm, service, expected, tokens, rng))
    pipe.send("end")
    executor.shutdown()
    spinner.join(5.0)
    rclpy.shutdown()


@dataclass
class Client:
    """A client process as its parent sees it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    sent: float = 0.0  # time.monotonic() of its open request; 0 = none
    has_ended: bool = False  # it said so


class Node:
    """The node's process and what it holds."""

    def __init__(self, engine: Path, log: Path) -> None:
        self._engine, self._log = engine, log
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        executable = ROOT / "install" / "edgellm_ros" / "lib" / "edgellm_ros" / "llm_node"
        options = {"engine_dir": self._engine, "autostart": "true", "queue_depth": 256}
        command = [sys.executable, str(executable), "--ros-args", "-r", f"__node:={NAME[1:]}", "--log-level", "error"]
        for name, value in options.items():
            command += ["-p", f"{name}:={value}"]
        with open(self._log, "wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def restart(self) -> None:
        """Kill it and start another."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def holds(self) -> dict[str, int]:
        """Resident KiB, threads and open file descriptors."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return {
            "kib": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
            "threads": len(list((proc / "task").iterdir())),
            "fds": len(list((proc / "fd").iterdir())),
        }

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


def requests(
    options: argparse.Namespace, node: Node, expected: dict[str, str], count: int, kills: int = 0, node_kills: int = 0
) -> collections.Counter:
    """Run client processes until ``count`` requests were sent; return how often each outcome came.

    ``kills`` clients are killed and replaced; ``node`` is killed and started again ``node_kills`` times. Tells stderr
    after every 5,000 requests what the node holds.
    """
    spawn = multiprocessing.get_context("spawn")
    quota = spawn.Value("i", count)
    rng = random.Random(options.seed)
    counts: collections.Counter = collections.Counter()
    clients: list[Client] = []
    kills_node = node_kills > 0
    started = time.monotonic()
    next_kill = next_node_kill = started + 2.0

    def start() -> None:
        pipe, theirs = spawn.Pipe(duplex=False)
        arguments = (rng.random(), expected, options.max_new_tokens, quota, theirs)
        process = spawn.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        clients.append(Client(process, pipe))

    def hear(client: Client) -> None:
        try:
            outcome = client.pipe.recv()
        except EOFError:
            clients.remove(client)
            if not client.has_ended:
                counts["lost"] += 1
                print(f"a client ended by itself, exit status {client.process.exitcode}", file=sys.stderr)
            return
        if outcome == "end":
            client.has_ended = True
        elif outcome == "sent":
            client.sent = time.monotonic()
        else:
            kind = outcome.partition(":")[0] if client.sent else "doubled"
            if kind == "gone" and not kills_node:
                kind = "wrong"
            client.sent = 0.0
            counts[kind] += 1
            if counts.total() % 5000 == 0:
                print(f"{time.monotonic() - started:.0f} s, {counts.total()} requests: {node.holds()}", file=sys.stderr)
            if kind in ("wrong", "doubled"):
                print(outcome[:300], file=sys.stderr)

    def kill(client: Client) -> None:
        client.process.kill()
        client.process.join()
        clients.remove(client)

    for _ in range(options.clients):
        start()
    while clients:
        for pipe in wait([client.pipe for client in clients], timeout=0.2):
            hear(next(client for client in clients if client.pipe is pipe))
        now = time.monotonic()
        for client in [client for client in clients if client.sent and now - client.sent > LIMIT]:
            counts["hung"] += 1
            print(f"a client waits for {LIMIT:.0f} s already", file=sys.stderr)
            kill(client)
        if kills and now > next_kill and clients:
            kill(rng.choice(clients))
            counts["client killed"] += 1
            start()
            kills, next_kill = kills - 1, now + KILL_INTERVAL
        if node_kills and now > next_node_kill:
            node.restart()
            node_kills, next_node_kill = node_kills - 1, time.monotonic() + 2.0
            if not node_kills:
                quota.value = 0
    return counts


def transitions(count: int) -> int:
    """Lead the node ``count`` times through deactivate, cleanup, configure or activate; return how many failed.

    Tells stderr of each of the first ten that failed, and after every 1,000.
    """
    node = rclpy.create_node("soak_manager", start_parameter_services=False)
    change = node.create_client(ChangeState, f"{NAME}/change_state")
    assert change.wait_for_service(10.0)
    # Not rclpy.spin_until_future_complete: what it leaves in its executor grows with every call.
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=executor.spin, daemon=True)
    spinner.start()
    ids = (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP)
    ids += (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE)
    failed = 0
    for index in range(count // 4 * 4):  # whole rounds: it ends active
        answered = threading.Event()
        future = change.call_async(ChangeState.Request(transition=Transition(id=ids[index % 4])))
        future.add_done_callback(lambda _future, answered=answered: answered.set())
        if not (answered.wait(LIMIT) and future.result().success):
            failed += 1
            if failed <= 10:
                how = "was refused" if future.done() else f"gave no answer within {LIMIT:.0f} s"
                print(f"transition {index} (id {ids[index % 4]}) {how}", file=sys.stderr)
        if (index + 1) % 1000 == 0:
            print(f"{index + 1} transitions, {failed} failed", file=sys.stderr)
    executor.shutdown()
    spinner.join(5.0)
    node.destroy_node()
    return failed


def learn_answers(log: Path, tokens: int) -> dict[str, str]:
    """Return the node's answer to each question, asked alone, once it is active."""
    end = time.monotonic() + 2 * LIMIT
    with LLM(NAME, wait=LIMIT) as llm:
        while True:
            try:
                return {text: llm.ask(text, temperature=0.0, max_new_tokens=tokens).text for text in QUESTIONS}
            except LLMError:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--requests", type=int, default=10000, help="in all (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="processes (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="clients ended by SIGKILL (default: %(default)s)")
    parser.add_argument("--node-kills", type=int, default=0, help="times the node is killed (default: %(default)s)")
    parser.add_argument("--transitions", type=int, default=100, help="lifecycle transitions (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to (default: %(default)s)")
    options = parser.parse_args()
    isolation.isolate()
    rclpy.init()
    counts: collections.Counter = collections.Counter()
    growth, seconds = {}, 0.0
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "node.log"
        node = Node(options.engine_dir, log)
        try:
            expected = learn_answers(log, options.max_new_tokens)
            if options.requests:
                requests(options, node, expected, max(200, options.requests // 50))
                before, started = node.holds(), time.monotonic()
                counts += requests(options, node, expected, options.requests, options.kills)
                seconds, after = time.monotonic() - started, node.holds()
                growth = {key: round((after[key] - before[key]) * 1000 / options.requests, 2) for key in before}
            if options.node_kills:
                many = 2**31 - 1
                counts += requests(options, node, expected, many, node_kills=options.node_kills)
                learn_answers(log, options.max_new_tokens)
            failed = transitions(options.transitions) if options.transitions else 0
            status = node.stop()
            if failed or status:
                print(log.read_text()[-4000:], file=sys.stderr)
        finally:
            node.process.kill()
    rclpy.try_shutdown()
    row = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "requests": options.requests,
        "clients": options.clients,
        "max_new_tokens": options.max_new_tokens,
        "kills": options.kills,
        "node_kills": options.node_kills,
        "seconds": round(seconds, 1),
        "outcomes": {name: count for name, count in sorted(counts.items()) if count},
        **{name: counts[name] for name in ("lost", "doubled", "wrong", "hung")},
        "transitions": options.transitions // 4 * 4,
        "transitions_failed": failed,
        "exit_status": status,
        "grown_per_1000": growth,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with open(options.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name, value in row.items():
        print(f"{name:20} {value}")
    return 1 if any(row[name] for name in ("lost", "doubled", "wrong", "hung")) or failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
