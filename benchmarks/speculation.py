"""Measure what speculation brings. The same requests with it and without, in turns, in one process.

    python benchmarks/speculation.py --engine DIR [--demo] [--backend onnxruntime|cuda] [--kv-cache-type int8]
        [--threads N] [--max-batch N] [--rounds N] [--tokens N] [--workloads plan chat …]
        [--output benchmarks/results/speculation.jsonl]

``--demo`` asks what the demo model knows: commands with its schema and without. Other engines get JSON plans, long JSON
with repeated names, code that repeats its prompt, summaries and chat. Times are of decoding alone, after the first
token. Answers have to be the same ids where the backend says that drafts are exact. Prints a table; with ``--output``
each workload's line is appended.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import (  # noqa: E402
    ChatMessage,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
    SpeculationCounts,
)
from engine_core.serving.cancellation import CancelToken  # noqa: E402
from engine_core.serving.engine import Engine  # noqa: E402

DEMO = ROOT / "models" / "demo"
COMMANDS = (
    "bring me the red cup from the kitchen", "go to the kitchen and turn off the lamp", "find my keys",
    "clean the table, then wait 20 seconds", "take the book and put it on the shelf in the bedroom",
    "turn on the light in the hall and open the door", "follow Anna", "give the blue bottle to Tom",
    "check whether the window is closed, then come back", "close the door and say good night",
    "put the red cup on the table and the blue cup on the shelf", "go to the garage and bring me the hammer",
)  # fmt: skip


def _object(**properties: dict) -> dict:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


_TEXT = {"type": "string", "minLength": 1, "maxLength": 40}
PLAN = _object(
    goal=_TEXT,
    steps={
        "type": "array", "minItems": 3, "maxItems": 6,
        "items": _object(
            action={"enum": ["navigate_to", "pick_up", "place_on", "open_door", "wait_for"]},
            target_object=_TEXT, expected_duration_seconds={"type": "integer", "minimum": 1, "maximum": 600},
        ),
    },
)  # fmt: skip
INVENTORY = {
    "type": "array", "minItems": 8, "maxItems": 8,
    "items": _object(
        item_name=_TEXT, storage_location=_TEXT, quantity_available={"type": "integer", "minimum": 0, "maximum": 99},
        requires_refrigeration={"type": "boolean"},
    ),
}  # fmt: skip
CODE = """\
class BatteryMonitor:
    def __init__(self, capacity_mah, warning_level, critical_level):
        self.capacity_mah = capacity_mah
        self.warning_level = warning_level
        self.critical_level = critical_level
        self.remaining_mah = capacity_mah

    def consume(self, current_ma, seconds):
        used_mah = current_ma * seconds / 3600.0
        self.remaining_mah = max(0.0, self.remaining_mah - used_mah)
        return self.remaining_mah

    def state(self):
        share = self.remaining_mah / self.capacity_mah
        if share < self.critical_level:
            return "critical"
        if share < self.warning_level:
            return "warning"
        return "good"
"""
REPORT = (
    "The delivery robot left the loading dock at nine in the morning with twelve parcels for the third floor. The "
    "elevator near the east entrance was out of order, so the robot waited four minutes and took the elevator near "
    "the west entrance. On the third floor it delivered ten parcels. Two parcels for the meeting room could not be "
    "delivered because the door of the meeting room was locked. The robot brought these two parcels back to the "
    "loading dock and reported that the elevator near the east entrance needs to be repaired."
)


def _ask(text: str, schema: object = None, *, tokens: int) -> GenerationRequest:
    json_schema = "" if schema is None else schema if isinstance(schema, str) else json.dumps(schema)
    sampling = SamplingParams(max_new_tokens=tokens)
    return GenerationRequest("bench", (ChatMessage("user", text),), sampling=sampling, json_schema=json_schema)


def demo_workloads(tokens: int) -> dict[str, tuple[str, list[GenerationRequest]]]:
    schema = (DEMO / "plan.schema.json").read_text(encoding="utf-8")
    return {
        "demo plans": ("lookup", [_ask(text, tokens=tokens) for text in COMMANDS]),
        "planner schema": ("schema + lookup", [_ask(text, schema, tokens=tokens) for text in COMMANDS]),
    }


def workloads(tokens: int) -> dict[str, tuple[str, list[GenerationRequest]]]:
    chat = ("What is the capital of France, and why is it famous?", "Tell me a short story about a lighthouse.",
            "Explain how a heat pump works.", "Which exercises help against back pain?")  # fmt: skip
    ask = lambda text, schema=None: _ask(text, schema, tokens=tokens)  # noqa: E731
    return {
        "plan": ("schema + lookup", [ask(f"Plan as JSON: {text}.", PLAN) for text in COMMANDS[:4]]),
        "long json": ("schema + lookup", [ask(f"List as JSON what is in {place}.", INVENTORY)
                                          for place in ("a kitchen", "a garage")]),
        "code": ("lookup", [ask(f"Add type annotations to this code and print all of it:\n{CODE}"),
                            ask(f"Add a method named recharge to this class and print all of it:\n{CODE}")]),
        "summary": ("lookup", [ask(f"Summarize this report:\n{REPORT}"),
                               ask(f"List the events of this report, one a line, in its own words:\n{REPORT}")]),
        "chat": ("lookup", [ask(text) for text in chat]),
    }  # fmt: skip


@dataclass
class Times:
    """The figures of one workload: decode seconds of each round without speculation and with it, tokens and counts of
    the latter."""

    plain: list[float]
    fast: list[float]
    tokens: int = 0
    counts: SpeculationCounts = SpeculationCounts()


def answer(engine: Engine, request: GenerationRequest) -> tuple[GenerationResult, float]:
    """Return the result, and the seconds from its first token to its last."""
    generator = engine.generate(engine.prepare(request), CancelToken())
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            result = stop.value
            rate = result.tokens_per_second
            return result, (result.generated_tokens - 1) / rate if rate else 0.0


def measure(open_engine: Callable[[str], Engine], asked: dict, options: argparse.Namespace) -> list[dict]:
    plain, fast = open_engine("off"), open_engine(options.speculation)
    rows = []
    try:
        if not fast.speculation.enabled:
            raise SystemExit("This engine takes no drafts as it is configured: a float KV cache on the CPU, or one "
                             "sequence on cuda, needs --speculation on.")  # fmt: skip
        exact = fast._backend.exact_drafts
        for name, (kind, requests) in asked.items():
            times = Times([], [])
            for number in range(options.rounds + 1):  # the first round warms
                seconds = [0.0, 0.0]
                for request in requests:
                    results = []
                    order = (0, 1) if number % 2 else (1, 0)
                    for which in order:
                        result, spent = answer((plain, fast)[which], request)
                        seconds[which] += spent
                        results.append((which, result))
                    (_, one), (_, other) = sorted(results, key=lambda pair: pair[0])
                    if exact and one.token_ids != other.token_ids:
                        raise SystemExit(f"{name}: another answer with speculation:\n{one.text}\n{other.text}")
                    if number:
                        times.tokens += other.generated_tokens - 1
                        times.counts += other.speculation
                if number:
                    times.plain.append(seconds[0])
                    times.fast.append(seconds[1])
            rows.append(row(name, kind, times, exact))
    finally:
        plain.close()
        fast.close()
    return rows


def row(name: str, kind: str, times: Times, exact: bool) -> dict:
    counts = times.counts
    steps = times.tokens - counts.accepted - counts.forced
    ratios = [plain / fast for plain, fast in zip(times.plain, times.fast)]
    return {
        "workload": name,
        "kind": kind,
        "exact": exact,
        "tokens": times.tokens,
        "tokens_per_step": round(times.tokens / max(1, steps), 2),
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "forced": counts.forced,
        "speed_up": round(statistics.median(ratios), 2),
        "speed_ups": [round(ratio, 2) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--demo", action="store_true", help="The engine is one of the demo model.")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--kv-cache-type", default="int8")
    parser.add_argument("--speculation", default="auto", choices=("auto", "on"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--workloads", nargs="*")
    parser.add_argument("--model", default="", help="What the line says about the model.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    def open_engine(speculation: str) -> Engine:
        return Engine.open(
            EngineConfig(
                options.engine,
                backend=options.backend,
                kv_cache_type=options.kv_cache_type,
                max_context=options.max_context,
                max_batch=options.max_batch,
                num_threads=options.threads,
                speculation=speculation,
            ),
            lambda line: None,
        )

    asked = demo_workloads(options.tokens) if options.demo else workloads(options.tokens)
    if options.workloads:
        asked = {name: asked[name] for name in options.workloads}
    rows = measure(open_engine, asked, options)
    print(f"{'workload':16} {'tokens/step':>11} {'speed-up':>8}  drafted accepted forced  of {'tokens'}")
    for each in rows:
        print(
            f"{each['workload']:16} {each['tokens_per_step']:11.2f} {each['speed_up']:8.2f}  {each['drafted']:7} "
            f"{each['accepted']:8} {each['forced']:6}  of {each['tokens']}  {each['speed_ups']}"
        )
    if options.output:
        about = {
            "date": datetime.date.today().isoformat(),
            "model": options.model or options.engine.name,
            "backend": options.backend,
            "kv_cache_type": options.kv_cache_type,
            "max_batch": options.max_batch,
        }
        with options.output.open("a", encoding="utf-8") as file:
            for each in rows:
                file.write(json.dumps({**about, **each}) + "\n")


if __name__ == "__main__":
    main()
