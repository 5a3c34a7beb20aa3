"""How much faster are answers with speculation? The same requests with it and without, in turns, in one process.

    python benchmarks/speculation.py --engine DIR [--demo] [--backend onnxruntime|cuda] [--kv-cache-type int8]
        [--threads N] [--max-batch N] [--rounds N] [--tokens N] [--workloads plan chat …]
        [--output benchmarks/results/speculation.jsonl]

``--demo`` asks what the demo model knows: held-out commands with its schema and without. Other engines get JSON plans,
long JSON with repeated names, code that repeats its prompt, summaries and chat. No request comes twice, so that no
answer stands in what is remembered of earlier ones; the first round warms. Times are of decoding alone, after the first
token; a round's speed-up is the quotient of its two times, and ``cpu_time_ratio`` that of the process's CPU times,
which other processes on the machine disturb less. Answers have to be the same ids where the backend says that drafts
are exact. Prints a table; with ``--output`` each workload's line is appended.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import (  # noqa: E402
    ChatMessage,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
    SpeculationCounts,
)
from engine_core.serving.engine import Engine  # noqa: E402
from tools.demo_model.evaluate import held_out_examples  # noqa: E402

DEMO = ROOT / "models" / "demo"
DEMO_A_ROUND = 12  # requests
COMMANDS = (
    "bring me the red cup from the kitchen", "take the book and put it on the shelf in the bedroom",
    "give the blue bottle to Tom", "check whether the window is closed, then come back",
    "clean the table, then wait 20 seconds", "go to the garage and look for the hammer",
    "water the plants on the balcony", "carry the laundry basket to the bathroom",
    "find my keys and bring them to the door", "follow Anna to the meeting room and wait there",
)  # fmt: skip
PLACES = ("a kitchen", "a garage", "a school bag", "a hospital room", "a camping van")
QUESTIONS = (
    "What is the capital of France, and why is it famous?", "Tell me a short story about a lighthouse.",
    "Explain how a heat pump works.", "Which exercises help against back pain?", "Why is the sky blue?",
    "How do I bake bread without yeast?", "What should I see in Lisbon in two days?",
    "Write a letter of thanks to my neighbour, who fed my cat.", "How do bees find their way home?",
    "Is it better to rent or to buy a flat?",
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
CODE = ("serving/drafts.py", "memory.py", "sampling.py", "request.py", "serving/scheduler.py", "text/sentences.py")
PAGES = ("ros.md", "memory.md", "vocabulary.md", "cpu_backend.md", "quantization.md", "cuda.md")


def code_pieces(count: int) -> list[str]:
    """Return ``count`` functions of this package's own source, of 12 to 25 lines, none twice."""
    found = []
    for name in CODE:
        source = (ROOT / "engine_core" / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 12 <= node.end_lineno - node.lineno < 25:
                found.append(textwrap.dedent(ast.get_source_segment(source, node, padded=True)))
    return found[:count]


def prose(count: int) -> list[str]:
    """Return ``count`` sections of the documentation, of 500 to 1,500 characters without tables, none twice."""
    found = []
    for name in PAGES:
        for section in (ROOT / "docs" / name).read_text(encoding="utf-8").split("\n## ")[1:]:
            text = " ".join(line.strip() for line in section.splitlines()[1:] if not line.startswith(("|", "```")))
            if len(text) >= 500:
                found.append(text[:1500])
    return found[:count]


def _ask(messages: str | Iterable[tuple[str, str]], schema: object = None, *, tokens: int) -> GenerationRequest:
    messages = (("user", messages),) if isinstance(messages, str) else messages
    json_schema = "" if schema is None else schema if isinstance(schema, str) else json.dumps(schema)
    sampling = SamplingParams(max_new_tokens=tokens)
    return GenerationRequest(
        "bench", tuple(ChatMessage(*each) for each in messages), sampling=sampling, json_schema=json_schema
    )


def demo_workloads(rounds: int, tokens: int) -> dict[str, Workload]:
    examples = [each for kind in held_out_examples(rounds * DEMO_A_ROUND).values() for each in kind]
    random.Random(1).shuffle(examples)
    asked = [example.messages[:-1] for example in examples[: rounds * DEMO_A_ROUND]]
    schema = (DEMO / "plan.schema.json").read_text(encoding="utf-8")
    return {
        "demo plans": Workload("lookup", [_ask(each, tokens=tokens) for each in asked]),
        "planner schema": Workload("schema + lookup", [_ask(each, schema, tokens=tokens) for each in asked]),
    }


def workloads(rounds: int, tokens: int) -> dict[str, Workload]:
    ask = partial(_ask, tokens=tokens)
    return {
        "plan": Workload("schema + lookup", [ask(f"Plan as JSON: {text}.", PLAN) for text in COMMANDS]),
        "long json": Workload(
            "schema + lookup", [ask(f"List as JSON what is in {place}.", INVENTORY) for place in PLACES]
        ),
        "code": Workload(
            "lookup",
            [ask(f"Comment this code and print all of it:\n{code}") for code in code_pieces(2 * rounds)],
        ),
        "summary": Workload("lookup", [ask(f"Summarize this text:\n{text}") for text in prose(2 * rounds)]),
        "chat": Workload("lookup", [ask(text) for text in QUESTIONS]),
    }


@dataclass(frozen=True)
class Workload:
    """``kind``: where its drafts come from. ``requests``: of all rounds; no two are the same."""

    kind: str
    requests: list[GenerationRequest]

    def of_round(self, number: int, rounds: int) -> list[GenerationRequest]:
        size = len(self.requests) // rounds
        if not size:
            raise SystemExit(f"There are {len(self.requests)} requests, too few for {rounds} rounds; lower --rounds.")
        return self.requests[number * size : (number + 1) * size]


@dataclass
class Times:
    """Each round's seconds of time and of CPU time for one workload, without speculation and with it; tokens and counts
    with it."""

    plain: list[np.ndarray]
    fast: list[np.ndarray]
    tokens: int = 0
    counts: SpeculationCounts = SpeculationCounts()


def answer(engine: Engine, request: GenerationRequest) -> tuple[GenerationResult, np.ndarray]:
    """Return the result, and the seconds from its first token to its last: of time and of the process's CPU time."""
    used: list[float] = []  # CPU time at each piece, then at the end
    result = engine.answer(request, lambda piece: used.append(time.process_time()))
    used.append(time.process_time())
    rate = result.tokens_per_second
    return result, np.array([(result.generated_tokens - 1) / rate if rate else 0.0, used[-1] - used[0]])


def measure(
    open_engine: Callable[[str], Engine], asked: dict[str, Workload], options: argparse.Namespace
) -> Iterator[dict]:
    """Yield a row for each workload, as soon as it is measured."""
    plain, fast = open_engine("off"), open_engine(options.speculation)
    try:
        if not fast.speculation.enabled:
            raise SystemExit("This engine takes no drafts as it is configured: a float KV cache on the CPU, or one "
                             "sequence on cuda, needs --speculation on.")  # fmt: skip
        exact = fast._backend.exact_drafts
        for name, workload in asked.items():
            times = Times([], [])
            for number in range(options.rounds + 1):  # the first round warms
                seconds = [np.zeros(2), np.zeros(2)]
                for request in workload.of_round(number, options.rounds + 1):
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
            yield row(name, workload.kind, times, exact)
    finally:
        plain.close()
        fast.close()


def row(name: str, kind: str, times: Times, exact: bool) -> dict:
    counts = times.counts
    steps = times.tokens - counts.accepted - counts.forced
    ratios, cpu_ratios = np.array([plain / fast for plain, fast in zip(times.plain, times.fast)]).T
    return {
        "workload": name,
        "kind": kind,
        "exact": exact,
        "tokens": times.tokens,
        "tokens_per_step": round(times.tokens / max(1, steps), 2),
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "forced": counts.forced,
        "speed_up": round(float(np.median(ratios)), 2),
        "cpu_time_ratio": round(float(np.median(cpu_ratios)), 2),
        "speed_ups": [round(float(ratio), 2) for ratio in ratios],
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

    asked = (demo_workloads if options.demo else workloads)(options.rounds + 1, options.tokens)
    if options.workloads:
        asked = {name: asked[name] for name in options.workloads}
    about = {
        "date": datetime.date.today().isoformat(),
        "model": options.model or options.engine.name,
        "backend": options.backend,
        "kv_cache_type": options.kv_cache_type,
        "max_batch": options.max_batch,
    }
    print(f"{'workload':16} {'tokens/step':>11} {'speed-up':>8} {'CPU time':>8}  drafted accepted forced  of tokens")
    for each in measure(open_engine, asked, options):
        print(
            f"{each['workload']:16} {each['tokens_per_step']:11.2f} {each['speed_up']:8.2f} "
            f"{each['cpu_time_ratio']:8.2f}  {each['drafted']:7} {each['accepted']:8} {each['forced']:6}  "
            f"of {each['tokens']}  {each['speed_ups']}",
            flush=True,
        )
        if options.output:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**about, **each}) + "\n")


if __name__ == "__main__":
    main()
