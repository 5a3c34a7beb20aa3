"""Count right answers in JSON, with white space as the model likes it and with ``compact_json``: what the latter costs.

    python3 benchmarks/compact_json.py ENGINE_DIR [--threads 2] [--commands 60] [--speculation on]

The 60 spoken commands of tool_calls.py, each asked for as a plan of one step that is held to a JSON schema, greedily,
without ROS; with and without ``compact_json`` in turn. An answer is judged as there: the right tool, the right
arguments. Prints each command whose two answers mean something else, and appends a row for each spelling to
benchmarks/results/tools.jsonl. Exit status 1 if an answer that ended is no JSON of the schema. Needs the package
``jsonschema``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jsonschema

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import result_rows  # noqa: E402
from benchmarks.tool_calls import COMMANDS, DESCRIPTIONS, MAX_TOKENS, PARAMETERS, RESULTS, comparable  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import (  # noqa: E402
    ChatMessage,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
)
from engine_core.serving.engine import CancelToken, Engine  # noqa: E402

STEPS = {
    name: {
        "type": "object",
        "properties": {"do": {"const": name}, "with": parameters},
        "required": ["do", "with"],
        "additionalProperties": False,
    }
    for name, parameters in PARAMETERS.items()
}
SCHEMA = {
    "type": "object",
    "properties": {"plan": {"type": "array", "items": {"anyOf": list(STEPS.values())}, "minItems": 1, "maxItems": 1}},
    "required": ["plan"],
    "additionalProperties": False,
}
SYSTEM = (
    'You plan for a robot at home. Answer with a JSON object whose "plan" has the one step that does what the user '
    'asks for: "do" is what the robot does, "with" has its arguments.\n'
    + "\n".join(f"{name}: {DESCRIPTIONS[name]} with: {json.dumps(PARAMETERS[name])}" for name in PARAMETERS)
)


def main() -> int:
    options = parse()
    head, load = result_rows.run_head(), round(os.getloadavg()[0])  # of the code that is imported
    config = EngineConfig(options.engine, num_threads=options.threads, speculation=options.speculation)
    engine = Engine.open(config, report=lambda _: None)
    fields = ("answers", "finished", "tools", "arguments", "malformed", "tokens", "seconds")
    counts = {compact: dict.fromkeys(fields, 0) for compact in (False, True)}
    for command in COMMANDS[:: max(1, len(COMMANDS) // options.commands)][: options.commands]:
        answers = {}
        for compact, count in counts.items():
            start = time.monotonic()
            result = ask(engine, command.text, compact)
            is_whole = result.finish_reason is FinishReason.STOP
            step = step_of(result.text) if is_whole else None
            answers[compact] = step or {"text": result.text}
            is_tool = step is not None and step["do"] == command.tool
            count["answers"] += 1
            count["finished"] += is_whole
            count["malformed"] += is_whole and step is None
            count["tools"] += is_tool
            count["arguments"] += is_tool and comparable(step["with"]) == comparable(command.arguments)
            count["tokens"] += result.generated_tokens
            count["seconds"] += time.monotonic() - start
        if comparable(answers[False]) != comparable(answers[True]):
            print(f"{command.text!r}: {answers[False]}, compact {answers[True]}", flush=True)
    name = f"{engine.manifest.model_name} {engine.manifest.quantization}, speculation {options.speculation}"
    engine.close()
    for compact, count in counts.items():
        count["seconds"] = round(count["seconds"], 1)
        row = head | {"engine": name, "form": "json_schema", "compact_json": compact} | count | {"load": load}
        print(json.dumps(row))
        if not options.no_record:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return int(any(count["malformed"] for count in counts.values()))


def ask(engine: Engine, text: str, compact: bool) -> GenerationResult:
    request = GenerationRequest(
        "0",
        messages=(ChatMessage("system", SYSTEM), ChatMessage("user", text)),
        json_schema=json.dumps(SCHEMA),
        compact_json=compact,
        sampling=SamplingParams(max_new_tokens=MAX_TOKENS),
    )
    pieces = engine.generate(engine.prepare(request), CancelToken())
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


def step_of(text: str) -> dict | None:
    """Return the step of an answer; None if it is no JSON of the schema."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value["plan"][0] if jsonschema.Draft202012Validator(SCHEMA).is_valid(value) else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count right answers in JSON, with and without compact_json.")
    parser.add_argument("engine", type=Path, help="engine directory")
    parser.add_argument("--commands", type=int, default=len(COMMANDS), help="how many of the commands")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = the backend's choice")
    parser.add_argument("--speculation", default="on", help="of the engine: auto, on, off")
    parser.add_argument("--no-record", action="store_true", help="write nothing to the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
