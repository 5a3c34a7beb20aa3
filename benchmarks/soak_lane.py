"""One lane of the soak: a node in a ROS domain of its own, its client processes, and what they found.

benchmarks/soak.py starts one process of it for each lane, ``python3 soak_lane.py ARGUMENTS``, and reads the state that
it writes to a file again and again.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

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

NAME = "/soak"
LIMIT = 60.0  # s without an answer after which a request counts as hung
# What a client does → s after which it counts as hung. A client that starts or ends does so beside many others.
STARTS, ASKS, GOES_ON, ENDS = "starts", "waits for an answer", "takes the next request", "ends"
LIMITS = {STARTS: 2 * LIMIT, ASKS: LIMIT, GOES_ON: LIMIT, ENDS: 2 * LIMIT}
BAD_OUTCOMES = ("lost", "doubled", "wrong", "hung")
NODE_LIFE = (1.0, 4.0)  # s between two kills of the node, at least; and for three of four, until it has answered
NODE_WAIT = 30.0  # s that it has to answer
SAVE_INTERVAL = 5.0  # s
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


class Spinner:
    """Spins a node in a thread, until it is closed."""

    def __init__(self, node: rclpy.node.Node) -> None:
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._ended.is_set():
            self._executor.spin_once(timeout_sec=0.5)

    def close(self) -> None:
        """End the thread, then the executor: one that is shut down while it waits raises there."""
        self._ended.set()
        self._executor.wake()
        self._thread.join(5.0)
        self._executor.shutdown()


def serve(seed: float, expected: dict[str, str], tokens: int, quota, pipe: Connection) -> None:
    """Run a client process: take requests from ``quota`` until none is left; tell ``pipe`` "sent" and each outcome."""
    rng = random.Random(seed)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where it hangs, on stderr
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)  # a lane that ends early ends its clients by SIGTERM
    node = rclpy.create_node("soak_client", start_parameter_services=False)
    spinner = Spinner(node)
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
    spinner.close()
    node.destroy_node()
    rclpy.shutdown()


@dataclass
class Client:
    """A client process as its parent sees it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    stage: str = STARTS  # a key of LIMITS
    since: float = field(default_factory=time.monotonic)  # of the stage

    def enter(self, stage: str) -> None:
        self.stage, self.since = stage, time.monotonic()

    @property
    def is_hung(self) -> bool:
        return time.monotonic() - self.since > LIMITS[self.stage]


class Clients:
    """Client processes that take their requests from one quota of ``count``; ``tell`` gets each outcome.

    ``node_dies``: the node is killed meanwhile, so that requests may end with it.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        expected: dict[str, str],
        count: int,
        rng: random.Random,
        tell: Callable[[list[str]], None],
        *,
        node_dies: bool,
    ) -> None:
        self.heard = 0  # outcomes
        self._spawn = multiprocessing.get_context("spawn")
        self._quota = self._spawn.Value("i", count)
        self._arguments = expected, options.max_new_tokens, self._quota
        self._rng, self._tell, self._node_dies = rng, tell, node_dies
        self._clients: list[Client] = []
        for _ in range(options.clients):
            self._start()

    @property
    def are_left(self) -> bool:
        return bool(self._clients)

    def hear(self) -> None:
        """Take in what clients say within the next 0.2 s."""
        for pipe in wait([client.pipe for client in self._clients], timeout=0.2):
            self._hear(next(client for client in self._clients if client.pipe is pipe))

    def end_hung(self) -> None:
        """Kill the clients that hang, after they have written where their threads are."""
        for client in [client for client in self._clients if client.is_hung]:
            self._tell(["hung"])
            print(f"a client {client.stage} for {LIMITS[client.stage]:.0f} s already:", file=sys.stderr, flush=True)
            os.kill(client.process.pid, signal.SIGUSR1)
            client.process.join(1.0)
            self._kill(client)

    def replace_one(self) -> None:
        """Kill one client and start another."""
        self._kill(self._rng.choice(self._clients))
        self._start()

    def send_no_more(self) -> None:
        self._quota.value = 0

    def _start(self) -> None:
        pipe, theirs = self._spawn.Pipe(duplex=False)
        arguments = (self._rng.random(), *self._arguments, theirs)
        process = self._spawn.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._clients.append(Client(process, pipe))

    def _hear(self, client: Client) -> None:
        try:
            outcome = client.pipe.recv()
        except EOFError:
            self._clients.remove(client)
            if client.stage != ENDS:
                self._tell(["lost"])
                print(f"a client ended by itself, exit status {client.process.exitcode}", file=sys.stderr)
            return
        if outcome == "end":
            client.enter(ENDS)
        elif outcome == "sent":
            client.enter(ASKS)
        else:
            kind = outcome.partition(":")[0] if client.stage == ASKS else "doubled"
            if kind == "gone" and not self._node_dies:
                kind = "wrong"
            client.enter(GOES_ON)
            self.heard += 1
            self._tell([kind])
            if kind in ("wrong", "doubled"):
                print(outcome[:300], file=sys.stderr)

    def _kill(self, client: Client) -> None:
        with self._quota.get_lock():  # one that had the lock would leave it locked for all
            client.process.kill()
            client.process.join()
        self._clients.remove(client)


@dataclass
class NodeLife:
    """The time until the node is killed again."""

    seconds: float = NODE_LIFE[1]
    answers: int = 1  # that each client gets first, unless that takes longer than NODE_WAIT
    heard: int = 0  # outcomes before
    begin: float = field(default_factory=time.monotonic)

    @classmethod
    def drawn(cls, rng: random.Random, heard: int) -> NodeLife:
        return cls(rng.uniform(*NODE_LIFE), rng.choice((0, 1, 2, 3)), heard)

    def is_over(self, heard: int, clients: int) -> bool:
        lived = time.monotonic() - self.begin
        has_answered = heard - self.heard >= self.answers * clients or lived > NODE_WAIT
        return lived > self.seconds and has_answered


class Node:
    """The node's process and what it holds."""

    def __init__(self, engine: Path, threads: int, log: Path) -> None:
        self._engine, self._threads, self._log = engine, threads, log
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        executable = ROOT / "install" / "edgellm_ros" / "lib" / "edgellm_ros" / "llm_node"
        options = {
            "engine_dir": self._engine, "autostart": "true", "queue_depth": 256, "num_threads": self._threads,
        }  # fmt: skip
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


@dataclass
class State:
    """The counts of a lane so far; it is written as JSON."""

    phase: str = "start"
    outcomes: collections.Counter = field(default_factory=collections.Counter)
    kills: int = 0
    node_kills: int = 0
    transitions: int = 0
    transitions_failed: int = 0
    seconds: float = 0.0  # of the requests whose growth is measured
    growth: dict[str, int] = field(default_factory=dict)  # of the node meanwhile
    measured: int = 0  # requests meanwhile
    exit_status: int | None = None  # of the node, at the end


class Lane:
    """A node, its clients, and the state that is saved every few seconds."""

    def __init__(self, options: argparse.Namespace, node: Node, log: Path) -> None:
        self.state = State()
        self._options, self._node, self._log = options, node, log
        self._end = time.monotonic() + options.limit if options.limit else float("inf")
        self._next_save = 0.0
        self._parent = os.getppid()

    @property
    def is_late(self) -> bool:
        """The time is up, or whoever started the lane is gone: what is left is not done."""
        return time.monotonic() > self._end or os.getppid() != self._parent

    def save(self, now: bool = True) -> None:
        """Write the state beside its file and rename it there; with ``now`` false only if it is time to."""
        if now or time.monotonic() > self._next_save:
            self._next_save = time.monotonic() + SAVE_INTERVAL
            part = self._options.state.with_suffix(".part")
            part.write_text(json.dumps(vars(self.state)), encoding="utf-8")
            os.replace(part, self._options.state)

    def run(self) -> None:
        """Run all phases, or those that there is time for."""
        options, state = self._options, self.state
        expected = self._learn_answers()
        if options.requests:
            self._phase("warm-up")
            self._requests(expected, max(200, options.requests // 50), self._count_bad)
            self._measured_requests(expected)
        if options.node_kills and not self.is_late:
            self._phase("node kills")
            self._requests(expected, 2**31 - 1, state.outcomes.update, node_kills=options.node_kills)
            self._learn_answers()
        if options.transitions and not self.is_late:
            self._phase("transitions")
            self._transitions(options.transitions)
        state.exit_status = self._node.stop()
        state.phase = "cut by the limit" if self.is_late else "end"
        self.save()
        if state.transitions_failed or state.exit_status:
            print(self._log.read_text()[-4000:], file=sys.stderr)

    def _count_bad(self, outcome: list[str]) -> None:
        self.state.outcomes.update(kind for kind in outcome if kind in BAD_OUTCOMES)

    def _phase(self, name: str) -> None:
        self.state.phase = name
        self.save()

    def _measured_requests(self, expected: dict[str, str]) -> None:
        state, options = self.state, self._options
        before, started = self._node.holds(), time.monotonic()
        self._phase("requests")

        def count(outcome: list[str]) -> None:
            state.outcomes.update(outcome)
            state.seconds = round(time.monotonic() - started, 1)
            state.measured += 1
            if time.monotonic() > self._next_save:
                measure()

        def measure() -> None:
            after = self._node.holds()
            state.growth = {key: after[key] - before[key] for key in before}

        self._requests(expected, options.requests, count, kills=options.kills)
        measure()

    def _requests(
        self,
        expected: dict[str, str],
        count: int,
        tell: Callable[[list[str]], None],
        *,
        kills: int = 0,
        node_kills: int = 0,
    ) -> None:
        """Run client processes until ``count`` requests were sent; ``tell`` gets each outcome.

        ``kills`` clients are killed and replaced, spread over the requests; the node is killed and started again
        ``node_kills`` times, and then no more requests are sent.
        """
        rng = random.Random(self._options.seed)
        clients = Clients(self._options, expected, count, rng, tell, node_dies=node_kills > 0)
        kill_every = max(1, count // (kills + 1))
        next_kill, node_life = kill_every, NodeLife()
        while clients.are_left:
            clients.hear()
            clients.end_hung()
            if kills and clients.heard >= next_kill and clients.are_left:
                clients.replace_one()
                self.state.kills += 1
                kills, next_kill = kills - 1, clients.heard + kill_every
            if node_kills and node_life.is_over(clients.heard, self._options.clients):
                self._node.restart()
                self.state.node_kills += 1
                node_kills, node_life = node_kills - 1, NodeLife.drawn(rng, clients.heard)
                if not node_kills:
                    clients.send_no_more()
            if self.is_late:
                node_kills = kills = 0
                clients.send_no_more()
            self.save(now=False)

    def _transitions(self, count: int) -> None:
        """Lead the node ``count`` times through deactivate, cleanup, configure or activate.

        Tells stderr of each of the first ten that failed.
        """
        state = self.state
        node = rclpy.create_node("soak_manager", start_parameter_services=False)
        change = node.create_client(ChangeState, f"{NAME}/change_state")
        assert change.wait_for_service(10.0)
        # Not rclpy.spin_until_future_complete: what it leaves in its executor grows with every call.
        spinner = Spinner(node)
        ids = (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP)
        ids += (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE)
        for index in range(count // 4 * 4):  # whole rounds: it ends active
            if index % 4 == 0 and self.is_late:
                break
            answered = threading.Event()
            future = change.call_async(ChangeState.Request(transition=Transition(id=ids[index % 4])))
            future.add_done_callback(lambda _future, answered=answered: answered.set())
            state.transitions += 1
            if not (answered.wait(LIMIT) and future.result().success):
                state.transitions_failed += 1
                if state.transitions_failed <= 10:
                    how = "was refused" if future.done() else f"gave no answer within {LIMIT:.0f} s"
                    print(f"transition {index} (id {ids[index % 4]}) {how}", file=sys.stderr)
            self.save(now=False)
        spinner.close()
        node.destroy_node()

    def _learn_answers(self) -> dict[str, str]:
        """Return the node's answer to each question, asked alone, once it is active."""
        end = time.monotonic() + 2 * LIMIT
        tokens = self._options.max_new_tokens
        with LLM(NAME, wait=LIMIT) as llm:
            while True:
                try:
                    return {text: llm.ask(text, temperature=0.0, max_new_tokens=tokens).text for text in QUESTIONS}
                except LLMError:
                    assert time.monotonic() < end, self._log.read_text()
                    time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("state", type=Path, help="file that the state is written to")
    for name in ("requests", "clients", "kills", "node-kills", "transitions", "max-new-tokens", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--limit", type=float, required=True, help="s; 0 = none")
    options = parser.parse_args()
    isolation.isolate()
    rclpy.init()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "node.log"
        node = Node(options.engine_dir, options.threads, log)
        try:
            Lane(options, node, log).run()
        finally:
            node.process.kill()
    rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
