"""Test nodes with many clients that do all sorts of things: nothing lost, doubled, wrong or hung, and nothing grows.

    tools/start run "$PWD/benchmarks/soak.py" ENGINE_DIR [--requests 10000] [--kills 20] [--node-kills 5] [--limit 560]

Runs lanes side by side, each a node in a ROS domain of its own with ``--clients`` client processes (soak_lane.py); the
default is one lane for four cores. Requests, kills and transitions are meant in all and are divided among the lanes.

Each client sends requests, one in four through the action and the others through the service: greedy questions whose
answers are known, random cancels (of the action), deadlines, priorities, JSON schemas, and bad input. ``--kills``
clients are ended by SIGKILL meanwhile and replaced. Then the nodes themselves are killed ``--node-kills`` times under
the same load and started again: each request has to end, with an answer or with the news that the node is gone. Last,
the nodes are led through ``--transitions`` lifecycle transitions.

The run has one row in ``--results``. It is written anew every half a minute, so that a run that is interrupted leaves
one that says how far it came: ``complete`` is false then, and ``phases`` says where the lanes were. After ``--limit``
seconds each lane ends in good order with what it has done. The row: date, commit, requests by outcome; lost (a client
ended without an answer), doubled (two answers), wrong (another text than alone, JSON that does not parse, bad input
that was answered), hung (no answer within a minute, or a client that neither starts nor ends in two); KiB, threads
and file descriptors of a node grown per 1,000 requests, those of the lane where most grew. Exit status 1 if anything
was lost, doubled, wrong or hung, a transition failed, a node's exit status was not 0, or the run is not complete.

100,000 requests with 200 kills, on 16 cores or more, about 8 minutes:

    tools/start run "$PWD/benchmarks/soak.py" ENGINE_DIR --requests 100000 --kills 150 --node-kills 50 \
        --transitions 400 --max-new-tokens 16 --limit 900
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.result_rows import run_head, write_run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "soak.jsonl"
SHARED = ("requests", "kills", "node_kills", "transitions")  # divided among the lanes
BAD = ("lost", "doubled", "wrong", "hung")
ROW_INTERVAL = 30.0  # s
GRACE = 180.0  # s after the limit in which the lanes have to end: a hung request, a node that starts


def share(total: int, lane: int, lanes: int) -> int:
    """Return the part of ``total`` that ``lane`` does; the parts of all lanes add up to it."""
    return total * (lane + 1) // lanes - total * lane // lanes


def start_lane(options: argparse.Namespace, lane: int, state: Path) -> subprocess.Popen:
    """Return the process of a lane, the leader of a process group."""
    command = [sys.executable, str(ROOT / "benchmarks" / "soak_lane.py"), str(options.engine_dir), str(state)]
    values = {name: share(getattr(options, name), lane, options.lanes) for name in SHARED}
    values |= {"clients": options.clients, "max_new_tokens": options.max_new_tokens, "threads": options.threads}
    for name, value in (values | {"seed": options.seed + lane, "limit": options.limit}).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    env = {name: value for name, value in os.environ.items() if name != "EDGELLM_TEST_DOMAIN"}
    return subprocess.Popen(command, env=env, start_new_session=True)


def summed(states: list[dict]) -> dict:
    """Return the fields of a row that come from the lanes' states."""
    outcomes = collections.Counter()
    for state in states:
        outcomes.update(state["outcomes"])
    grown = [
        {key: round(value * 1000 / state["measured"], 2) for key, value in state["growth"].items()}
        for state in states
        if state["growth"] and state["measured"]
    ]
    return {
        "seconds": max((state["seconds"] for state in states), default=0.0),
        "done": outcomes.total() - sum(outcomes[name] for name in ("lost", "doubled", "hung")),
        "outcomes": dict(sorted(outcomes.items())),
        **{name: outcomes[name] for name in BAD},
        "killed": sum(state["kills"] for state in states),
        "node_killed": sum(state["node_kills"] for state in states),
        "transitions_done": sum(state["transitions"] for state in states),
        "transitions_failed": sum(state["transitions_failed"] for state in states),
        "exit_statuses": [state["exit_status"] for state in states],
        "grown_per_1000": {key: max(each[key] for each in grown) for key in (grown[0] if grown else ())},
        "phases": [state["phase"] for state in states],
    }


def main() -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--requests", type=int, default=10000, help="in all (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=max(1, cores // 4), help="nodes side by side (default: cores / 4)")
    parser.add_argument("--clients", type=int, default=16, help="processes of a lane (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="clients ended by SIGKILL (default: %(default)s)")
    parser.add_argument("--node-kills", type=int, default=0, help="times a node is killed (default: %(default)s)")
    parser.add_argument("--transitions", type=int, default=100, help="lifecycle transitions (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of an engine (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.0, help="s until the lanes end; 0 = none (default)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the row (default: %(default)s)")
    options = parser.parse_args()
    settings = (*SHARED, "lanes", "clients", "max_new_tokens", "threads")
    head = run_head() | {name: getattr(options, name) for name in settings}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"lane{number}.json" for number in range(options.lanes)]
        lanes = [start_lane(options, number, file) for number, file in enumerate(files)]
        started = next_row = time.monotonic()

        def row(complete: bool) -> dict:
            states = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
            result = {**head, "complete": complete, "wall_seconds": round(time.monotonic() - started, 1)}
            return result | summed(states)

        try:
            while any(lane.poll() is None for lane in lanes):
                time.sleep(0.5)
                elapsed = time.monotonic() - started
                if options.limit and elapsed > options.limit + GRACE:
                    print("lanes do not end", file=sys.stderr)
                    break
                if time.monotonic() > next_row:
                    next_row = time.monotonic() + ROW_INTERVAL
                    found = row(False)
                    write_run(options.results, [found])
                    bad = {name: found[name] for name in BAD}
                    print(f"{elapsed:.0f} s: {found['done']} requests, {found['killed']} clients and "
                          f"{found['node_killed']} nodes killed, {bad}, {found['phases']}", flush=True)  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        finally:
            for lane in lanes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(lane.pid, signal.SIGKILL)
                lane.wait()
            found = row(False)
            ended = found["phases"] == ["end"] * options.lanes
            found["complete"] = ended and not any(lane.returncode for lane in lanes)
            write_run(options.results, [found])
    for name, value in found.items():
        print(f"{name:20} {value}")
    failed = any(found[name] for name in (*BAD, "transitions_failed")) or any(found["exit_statuses"])
    return 1 if failed or not found["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
