"""Exact match of whole answers on held-out commands, greedy, by kind of held-out and by category.

    python -m tools.demo_model.evaluate models/demo                       # transformers on torch
    python -m tools.demo_model.evaluate ENGINE_DIR --engine               # our engine, as the node runs it

A conversation counts if the answer to its last command is the expected line, byte for byte; the earlier answers are given.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.demo_model.grammar import HELD_OUT, Example, Generator

HELD_OUT_SEED = 1_000_003  # training seeds are below
Answer = Callable[[Sequence[Example]], list[str]]


def held_out_examples(count: int, seed: int = HELD_OUT_SEED) -> dict[str, list[Example]]:
    """``count`` examples of each kind of held-out, without repeats."""
    examples: dict[str, list[Example]] = {}
    for index, kind in enumerate(HELD_OUT):
        generator, unique = Generator(seed + index), {}
        while len(unique) < count:
            example = generator.conversation(kind)
            unique.setdefault(example.messages[:-1], example)
        examples[kind] = list(unique.values())
    return examples


def chat(example: Example) -> list[dict[str, str]]:
    """The conversation up to the answer that is asked for."""
    return [{"role": role, "content": content} for role, content in example.messages[:-1]]


def transformers_answers(directory: Path, batch: int = 128) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def answers(examples: Sequence[Example]) -> list[str]:
        order = sorted(range(len(examples)), key=lambda i: len(str(examples[i].messages)))
        found = [""] * len(examples)
        for start in range(0, len(order), batch):
            chunk = order[start : start + batch]
            texts = [tokenizer.apply_chat_template(chat(examples[i]), tokenize=False, add_generation_prompt=True) for i in chunk]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
            inputs.pop("token_type_ids", None)
            out = model.generate(**inputs, max_new_tokens=512, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(chunk, tokenizer.batch_decode(out, skip_special_tokens=True)):
                found[i] = text
        return found

    return answers


def engine_answers(directory: Path, schema: str = "") -> Answer:
    """Through our engine; with ``schema``, its answers are held to that JSON schema."""
    from engine_core.config import EngineConfig
    from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
    from engine_core.serving.cancellation import CancelToken
    from engine_core.serving.engine import Engine

    engine = Engine.open(EngineConfig(directory))

    def one(example: Example) -> str:
        messages = tuple(ChatMessage(role, content) for role, content in example.messages[:-1])
        request = GenerationRequest("evaluate", messages, sampling=SamplingParams(max_new_tokens=512), json_schema=schema)
        pieces = engine.generate(engine.prepare(request), CancelToken())
        return "".join(piece.text for piece in pieces)

    return lambda examples: [one(example) for example in examples]


def score(examples: Sequence[Example], found: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Row → (right, all): one row per category, "mistyped" and "all"."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for example, text in zip(examples, found):
        right = text == example.messages[-1][1]
        for row in (example.category, "all", *(["mistyped"] if example.typo else [])):
            rows[row][0] += right
            rows[row][1] += 1
    return {row: (right, count) for row, (right, count) in rows.items()}


def table(scores: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Markdown: categories down, kinds of held-out across."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for rows in scores.values():
        for row, (right, count) in rows.items():
            totals[row][0] += right
            totals[row][1] += count
    last = ("mistyped", "all")
    names = sorted((row for row in totals if row not in last), key=lambda row: -totals[row][1]) + [r for r in last if r in totals]
    lines = ["| last command | " + " | ".join(f"new {kind}" for kind in scores) + " | together |", "|---" * (len(scores) + 2) + "|"]
    for name in names:
        cells = [rows.get(name) for rows in scores.values()] + [tuple(totals[name])]
        lines.append(f"| {name} | " + " | ".join(f"{100 * c[0] / c[1]:.1f} % of {c[1]}" if c else "–" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the checkpoint, or with --engine the engine directory")
    parser.add_argument("--count", type=int, default=1000, help="examples of each kind of held-out")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--schema", type=Path, help="with --engine: hold the answers to this JSON schema")
    parser.add_argument("--show", type=int, default=0, help="print that many wrong answers of each kind")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    schema = args.schema.read_text() if args.schema else ""
    answers = engine_answers(args.directory, schema) if args.engine else transformers_answers(args.directory)
    scores = {}
    for kind, examples in held_out_examples(args.count).items():
        found = answers(examples)
        scores[kind] = score(examples, found)
        wrong = [(e, text) for e, text in zip(examples, found) if text != e.messages[-1][1]]
        for example, text in wrong[: args.show]:
            print(f"-- new {kind}, {example.category}")
            for role, content in example.messages[:-1]:
                print(f"   {role}: {content}")
            print(f"   expected {example.messages[-1][1]}\n   found    {text}")
    print(table(scores))
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
