"""How soon does a conversation go on when others come between? Two that alternate, and the same alone, in turns.

    python benchmarks/sessions.py --engine DIR [--backend onnxruntime|cuda] [--max-context N] [--session-memory MiB]
        [--threads N] [--turns N] [--tokens N] [--output benchmarks/results/sessions.jsonl]

One engine serves the sessions Anna and Ben in turns, with a yes/no question outside of sessions after each answer; a
second one of the same directory serves Anna alone. Each turn of both engines is measured before the next one. Prints a
table; with ``--output`` a line for each turn is appended, and one for the whole with the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import ChatMessage, GenerationRequest, GenerationResult, SamplingParams  # noqa: E402
from engine_core.serving.engine import Engine  # noqa: E402

SYSTEM = "You are a robot in a house with a kitchen, a hall, a garage and two bedrooms. Answer with short sentences."
PLACES = ("kitchen", "hall", "garage", "bedroom", "bathroom", "garden", "cellar")
THINGS = {"Anna": ("cup", "book"), "Ben": ("key", "lamp")}


def question(name: str, turn: int) -> str:
    things = THINGS[name]
    return f"bring me the {things[turn % 2]} from the {PLACES[turn % len(PLACES)]} and then come back to the hall"


def ask(engine: Engine, text: str, session: str, tokens: int) -> GenerationResult:
    sampling = SamplingParams(max_new_tokens=tokens)
    request = GenerationRequest(
        "bench", (ChatMessage("user", text),), sampling=sampling, session=session, default_system=SYSTEM
    )
    return engine.answer(request)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--max-context", type=int, default=0)
    parser.add_argument("--session-memory", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--turns", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer, at most")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    config = EngineConfig(
        options.engine, backend=options.backend, max_context=options.max_context, num_threads=options.threads,
        session_memory=options.session_memory, verify_files=False,
    )  # fmt: skip
    engines = [Engine.open(config, lambda line: None) for _ in range(2)]
    both, alone = engines
    facts = {
        "date": datetime.date.today().isoformat(), "device": both.device, "backend": both.backend_name,
        "model": both.manifest.model_name, "weights": both.manifest.quantization, "conversations": 2,
    }  # fmt: skip
    rows, known = [], dict.fromkeys(THINGS, 0)
    try:
        print("turn  session  prompt  cached  known  first token, ms  alone, ms  ratio")
        for turn in range(options.turns):
            lone = ask(alone, question("Anna", turn), "Anna", options.tokens)
            for name in THINGS:
                result = ask(both, question(name, turn), name, options.tokens)
                ask(both, f"Answer yes or no: is this a question? {question(name, turn)}", "", 1)
                row = {
                    "turn": turn + 1, "session": name, "prompt_tokens": result.prompt_tokens,
                    "cached_tokens": result.cached_tokens, "known_tokens": known[name],
                    "ttft_ms": round(result.time_to_first_token * 1e3, 2),
                    "alone_ms": round(lone.time_to_first_token * 1e3, 2),
                }  # fmt: skip
                known[name] = result.prompt_tokens + len(result.token_ids) - 1
                rows.append(row)
                ratio = row["ttft_ms"] / row["alone_ms"]
                print(
                    f"{turn + 1:4}  {name:7}  {result.prompt_tokens:6}  {result.cached_tokens:6}"
                    f"  {row['known_tokens']:5}  {row['ttft_ms']:15.2f}  {row['alone_ms']:9.2f}  {ratio:5.2f}"
                )
    finally:
        for engine in engines:
            engine.close()
    later = rows[len(THINGS) :]  # the first turn of a conversation has no KV to come back
    ratio = statistics.median(row["ttft_ms"] / row["alone_ms"] for row in later)
    missed = max(row["known_tokens"] - row["cached_tokens"] for row in later)
    summary = {"turns": options.turns, "ratio_to_alone": round(ratio, 3), "most_missed_tokens": missed}
    print(f"median ratio to alone from the second turn on: {ratio:.3f}; at most {missed} known tokens computed again")
    if options.output:
        with open(options.output, "a", encoding="utf-8") as file:
            for row in [*rows, summary]:
                file.write(json.dumps({**facts, **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
