"""Measure each setting of edgellm_ros/latency.py: the node with and without it, in turn, in one process.

    python3 benchmarks/ros_tuning.py ENGINE_DIR [--rounds 40] [--tokens 100] [--threads 1] [--out FILE]

In each round every setting is switched off and on (and the other way round in the next), all others being on, and a
request goes through the service and the action. A figure is the median over the rounds of what switching it off adds,
with the share of the rounds in which it added something: 50 % is chance. For the garbage collector there is also the
time of a full collection in the node, which no thread of Python survives without waiting.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import rclpy
import ros_overhead
from ros_overhead import DISCOVERY, OverRos

from edgellm_ros import latency

SETTINGS = ("head start", "freeze")
PATHS = ("service", "action")


def switch(name: str, on: bool) -> float:
    """Switch a setting in this process, the node's; return the seconds that a full collection takes then."""
    if name == "head start":
        latency.HEAD_START = 0.005 if on else 0.0
    elif on:
        latency.freeze()
    else:
        gc.unfreeze()
    start = time.perf_counter()
    gc.collect()
    return time.perf_counter() - start


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        raise SystemExit(ros_overhead.serve(int(sys.argv[2]), sys.argv[3:], switch))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--tokens", type=int, default=100, help="generated tokens of each request")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; 0 = the backend's choice")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    options = parser.parse_args()
    ros_overhead.isolation.isolate()
    rclpy.init()
    # (setting, path) → what switching it off added to the first token, ms, and to the decode step, %.
    added: dict[tuple[str, str], list[tuple[float, float]]] = {(s, p): [] for s in SETTINGS for p in PATHS}
    collection: dict[bool, list[float]] = {True: [], False: []}
    node = OverRos(options.engine_dir, options.tokens, options.threads, script=__file__)
    try:
        node.bring_up()
        paths = {"service": node.service, "action": node.action}
        for path in (*paths.values(), *paths.values()):  # warm: discovery, caches, the prompt's KV
            node.rest = 1.5 * path().step * options.tokens
        for number in range(options.rounds):
            for setting in SETTINGS:
                rows = {}
                for on in (False, True) if number % 2 else (True, False):
                    seconds = node.switch(setting, on)
                    if setting == "freeze":
                        collection[on].append(seconds)
                    for path, measure in paths.items():
                        time.sleep(DISCOVERY)
                        rows[path, on] = measure()
                node.switch(setting, True)
                for path in paths:
                    with_it, without = rows[path, True], rows[path, False]
                    first, step = (without.first - with_it.first) * 1e3, (without.step / with_it.step - 1.0) * 1e2
                    added[setting, path].append((first, step))
    finally:
        node.close()
        rclpy.shutdown()
    common = {
        "date": datetime.date.today().isoformat(), "python": platform.python_version(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1), "rounds": options.rounds, "tokens": options.tokens,
        "threads": options.threads,
    }  # fmt: skip
    lines = []
    print(f"{options.rounds} rounds, {os.cpu_count()} cores; switching it off adds (share of rounds in which it does)")
    for (setting, path), pairs in added.items():
        firsts, steps = zip(*pairs)
        first, step = statistics.median(firsts), statistics.median(steps)
        share_first, share_step = (100 * sum(value > 0 for value in values) / len(values) for values in (firsts, steps))
        print(
            f"{setting:<16}{path:<8} first token {first:+.2f} ms ({share_first:.0f} %), "
            f"decode step {step:+.1f} % ({share_step:.0f} %)"
        )
        lines.append({
            **common, "setting": setting, "path": path,
            "off_adds_ttft_ms": round(first, 3), "rounds_ttft_percent": round(share_first),
            "off_adds_step_percent": round(step, 2), "rounds_step_percent": round(share_step),
        })  # fmt: skip
    frozen, thawed = (statistics.median(collection[on]) * 1e3 for on in (True, False))
    print(f"a full collection takes {frozen:.1f} ms with freeze, {thawed:.1f} ms without")
    lines.append(
        {**common, "setting": "freeze", "on_collection_ms": round(frozen, 3), "off_collection_ms": round(thawed, 1)}
    )
    print("\n".join(json.dumps(line) for line in lines))
    if options.out is not None:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
