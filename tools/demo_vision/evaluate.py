"""Share of held-out questions that are answered rightly, greedily, by kind of question and of held-out.

    python -m tools.demo_vision.evaluate models/demo_vision                # transformers on torch
    python -m tools.demo_vision.evaluate ENGINE_DIR --engine               # our engine, as the node runs it

Each question is about a picture of its own, 240 pixels high, that the model's own preprocessing scales. The answer to the last question
of a dialogue counts; the earlier answers are given. An answer is right if it is the expected text, byte for byte, or the expected JSON
with every position within 4 percent of the picture's width and height.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.demo_vision.questions import QUESTION_KINDS, Example, held_out_examples, is_right
from tools.demo_vision.render import picture_of
from tools.demo_vision.tokenizer import IMAGE, prefix

Answer = Callable[[Example], str]


def transformers_answers(directory: Path) -> Answer:
    """Answers of transformers; the tokens of the picture are placed here, since its processor wants more packages than it needs."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, SmolVLMForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory)
    model = SmolVLMForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    count = json.loads((directory / "processor_config.json").read_text())["image_seq_len"]
    before, after = prefix("", True)
    expanded = before.rpartition(":")[2] + IMAGE * count + after

    @torch.inference_mode()
    def answer(example: Example) -> str:
        *earlier, last = example.turns
        messages = [
            {"role": role, "content": text} for turn in earlier for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        messages.append({"role": "user", "content": last.question})
        messages[0]["content"] = IMAGE + messages[0]["content"]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).replace(IMAGE, expanded)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        pixels = processor(picture_of(example.scene), return_tensors="pt")["pixel_values"]
        ids = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pixel_values=pixels, max_new_tokens=256)
        return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return answer


def engine_answers(directory: Path) -> Answer:
    """Answers of our engine."""
    from engine_core.config import EngineConfig
    from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
    from engine_core.serving.engine import Engine
    from engine_core.vision.images import Image

    engine = Engine.open(EngineConfig(directory))

    def answer(example: Example) -> str:
        *earlier, last = example.turns
        turns = [(role, text) for turn in earlier for role, text in (("user", turn.question), ("assistant", turn.answer))]
        messages = [ChatMessage(role, text) for role, text in (*turns, ("user", last.question))]
        messages[0] = ChatMessage("user", messages[0].content, images=(0,))
        images = (Image(np.asarray(picture_of(example.scene))),)
        request = GenerationRequest("evaluate", tuple(messages), images=images, sampling=SamplingParams(max_new_tokens=256))
        return engine.answer(request).text

    return answer


def table(scores: dict[str, dict[str, list[bool]]]) -> str:
    """Markdown: kinds of questions down, kinds of held-out across."""
    lines = ["| question | " + " | ".join(f"new {held_out}" for held_out in scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for kind in (*QUESTION_KINDS, "all"):
        cells = [rows[kind] for rows in scores.values()]
        lines.append(
            f"| {kind.replace('_', ' ')} | " + " | ".join(f"{100 * sum(c) / len(c):.1f} % of {len(c)}" if c else "–" for c in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the checkpoint, or with --engine the engine directory")
    parser.add_argument("--count", type=int, default=100, help="examples of each kind of question and of held-out")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="print that many wrong answers of each kind of held-out")
    args = parser.parse_args()
    answer: Callable[[Example], str] = (engine_answers if args.engine else transformers_answers)(args.directory)
    scores: dict[str, dict[str, list[bool]]] = {}
    for held_out, examples in held_out_examples(args.count).items():
        scores[held_out] = defaultdict(list)
        wrong = 0
        for example in examples:
            last, found = example.turns[-1], answer(example)
            right = is_right(last.answer, found)
            scores[held_out][last.kind].append(right)
            scores[held_out]["all"].append(right)
            wrong += not right
            if not right and wrong <= args.show:
                print(f"-- new {held_out}, {last.kind}: {last.question}\n   expected {last.answer}\n   found    {found}")
    print(table(scores))


if __name__ == "__main__":
    main()
