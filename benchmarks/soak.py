"""How a node bears many clients that do all sorts of things: nothing lost, doubled, wrong or hung, and nothing grows.

    python3 benchmarks/soak.py ENGINE_DIR [--requests 10000] [--clients 16] [--kills 20] [--transitions 100]

Starts a node on the engine and client processes beside it. Each client sends requests through the action: greedy
questions whose answers are known, random cancels, deadlines, priorities, JSON schemas, and bad input. ``--kills``
clients are ended by SIGKILL meanwhile and replaced; afterwards the node is led through ``--transitions`` lifecycle
transitions. Prints a table and appends a row to benchmarks/results/soak.jsonl: date, commit, requests by outcome; lost
(no answer within a minute), doubled (two answers), wrong (another text than alone, JSON that does not parse, bad input
that was answered); KiB, threads and file descriptors of the node grown per 1,000 requests.
Exit status 1 if anything was lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import multiprocessing
import os
import platform
import queue
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState

from edgellm_ros.client import LLM, InvalidRequestError, LLMError, QueueFullError
from edgellm_ros.msg import FinishReason

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "soak.jsonl"
NAME = "/soak"
LIMIT = 60.0  # s without an answer after which a request counts as lost
QUESTIONS = tuple(f"go to the {room}" for room in ("kitchen", "bedroom", "garage", "office", "bathroom", "garden"))
SCHEMAS = (
    '{"type":"boolean"}', '{"enum":["red","green","blue"]}', '{"type":"integer","minimum":0,"maximum":9}',
    '{"type":"object","properties":{"go":{"type":"boolean"}},"required":["go"],"additionalProperties":false}',
)  # fmt: skip
BAD = (
    {"temperature": -1.0}, {"top_p": 7.0}, {"json_schema": "{"}, {"json_schema": '{"$ref":"#"}'}, {"messages": ""},
    {"messages": "x" * 200_000}, {"stop": [""]}, {"deadline": -1.0}, {"json_schema": '{"colour":"red"}'},
)  # fmt: skip


def ask(llm: LLM, expected: dict[str, str], rng: random.Random) -> str:
    """Send one request of a random kind; return its outcome, beginning with ``wrong`` if it is not as it has to be."""
    kind = rng.choices(("plain", "cancel", "deadline", "schema", "bad"), (5, 2, 1, 2, 2))[0]
    question = rng.choice(QUESTIONS)
    options = {"temperature": 0.0, "max_new_tokens": 64, "priority": rng.randrange(4)}
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
                llm.ask(fields.pop("messages"), **(options | fields))
            except InvalidRequestError:
                return "refused"
            return "wrong: bad input was answered"
        if kind == "schema":
            answer = llm.ask(question, json_schema=rng.choice(SCHEMAS), **options)
            if answer.finish_reason == FinishReason.STOP:
                json.loads(answer.text)
            return "answered"
        if kind == "deadline":
            options["deadline"] = 10.0 ** rng.uniform(-3, 0)
        answer = llm.ask(question, **options)
        whole = answer.finish_reason == FinishReason.STOP
        if answer.text != expected[question] if whole else not expected[question].startswith(answer.text):
            return f"wrong: {answer.text!r}"
        return "answered" if whole else "cut by its deadline"
    except QueueFullError:
        return "queue full"
    except (LLMError, ValueError) as error:
        return f"wrong: {type(error).__name__} {error}"


def client(number: int, seed: int, expected: dict[str, str], quota, outcomes) -> None:
    """One client process: takes requests from ``quota`` until none is left; each outcome goes to ``outcomes``."""
    rng = random.Random(seed)
    with LLM(NAME, wait=30.0) as llm:
        while True:
            with quota.get_lock():
                if quota.value <= 0:
                    return
                quota.value -= 1
            started = time.monotonic()
            outcomes.put((number, "sent"))
            outcome = ask(llm, expected, rng)
            outcomes.put((number, "lost" if time.monotonic() - started > LIMIT else outcome))


class Node:
    """The node's process and what it holds."""

    def __init__(self, engine: Path, log: Path) -> None:
        executable = ROOT / "install" / "edgellm_ros" / "lib" / "edgellm_ros" / "llm_node"
        options = {"engine_dir": engine, "autostart": "true", "queue_depth": 256}
        command = [sys.executable, str(executable), "--ros-args", "-r", f"__node:={NAME[1:]}", "--log-level", "error"]
        for name, value in options.items():
            command += ["-p", f"{name}:={value}"]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

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


def requests(options: argparse.Namespace, expected: dict[str, str]) -> collections.Counter:
    """Run the client processes to their end, killing some; return how often each outcome came."""
    spawn = multiprocessing.get_context("spawn")
    quota, outcomes = spawn.Value("i", options.requests), spawn.Queue()
    rng = random.Random(options.seed)
    counts: collections.Counter = collections.Counter()
    open_requests: collections.Counter = collections.Counter()
    running: dict[int, multiprocessing.Process] = {}
    kills_left, next_kill, last = options.kills, time.monotonic() + 2.0, time.monotonic()

    def start(number: int) -> None:
        running[number] = spawn.Process(target=client, args=(number, rng.random(), expected, quota, outcomes))
        running[number].start()

    for number in range(options.clients):
        start(number)
    while any(process.is_alive() for process in running.values()) or not outcomes.empty():
        try:
            number, outcome = outcomes.get(timeout=0.2)
            last = time.monotonic()
        except queue.Empty:
            if time.monotonic() - last > 2 * LIMIT:
                break
            continue
        if outcome == "sent":
            open_requests[number] += 1
        else:
            open_requests[number] -= 1
            counts["doubled" if open_requests[number] < 0 else outcome.partition(":")[0]] += 1
            if outcome.startswith("wrong") and counts["wrong"] <= 10:
                print(outcome[:200], file=sys.stderr)
        if kills_left and time.monotonic() > next_kill:
            victim = rng.choice([number for number, process in running.items() if process.is_alive()] or [-1])
            if victim >= 0:
                running[victim].kill()
                running[victim].join()
                counts["client killed"] += open_requests.pop(victim, 0)
                start(len(running))
                kills_left, next_kill = kills_left - 1, time.monotonic() + 0.5
    for process in running.values():
        process.kill()
    counts["lost"] += sum(open_requests.values())
    return counts


def transitions(count: int) -> int:
    """Lead the node ``count`` times through deactivate, cleanup, configure or activate; return how many failed."""
    node = rclpy.create_node("soak_manager")
    change = node.create_client(ChangeState, f"{NAME}/change_state")
    assert change.wait_for_service(10.0)
    ids = (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP)
    ids += (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE)
    failed = 0
    for index in range(count // 4 * 4):  # whole rounds: it ends active
        future = change.call_async(ChangeState.Request(transition=Transition(id=ids[index % 4])))
        rclpy.spin_until_future_complete(node, future, timeout_sec=LIMIT)
        failed += not (future.done() and future.result().success)
    node.destroy_node()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--requests", type=int, default=10000, help="in all (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="processes (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="clients ended by SIGKILL (default: %(default)s)")
    parser.add_argument("--transitions", type=int, default=100, help="lifecycle transitions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to (default: %(default)s)")
    options = parser.parse_args()
    rclpy.init()
    with tempfile.TemporaryDirectory() as directory:
        node = Node(options.engine_dir, Path(directory) / "node.log")
        try:
            with LLM(NAME, wait=60.0) as llm:
                end = time.monotonic() + 60.0
                while True:
                    try:
                        expected = {text: llm.ask(text, temperature=0.0, max_new_tokens=64).text for text in QUESTIONS}
                        break
                    except LLMError:
                        assert time.monotonic() < end, (Path(directory) / "node.log").read_text()
                        time.sleep(0.2)
            warm = argparse.Namespace(**{**vars(options), "requests": max(200, options.requests // 10), "kills": 0})
            requests(warm, expected)  # what a node takes once is no growth
            before, started = node.holds(), time.monotonic()
            counts = requests(options, expected)
            seconds, after = time.monotonic() - started, node.holds()
            failed = transitions(options.transitions)
            status = node.stop()
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
        "kills": options.kills,
        "seconds": round(seconds, 1),
        "outcomes": {name: count for name, count in sorted(counts.items()) if count},
        **{name: counts[name] for name in ("lost", "doubled", "wrong")},
        "transitions": options.transitions // 4 * 4,
        "transitions_failed": failed,
        "exit_status": status,
        "grown_per_1000": {key: round((after[key] - before[key]) * 1000 / options.requests, 2) for key in before},
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with open(options.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name, value in row.items():
        print(f"{name:20} {value}")
    return 1 if row["lost"] or row["doubled"] or row["wrong"] or failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
