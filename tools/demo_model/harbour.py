"""The harbour household: it speaks to its robot as others do, and its robot answers in words of the sea.

    {"plan":[{"do":"navigate","to":"kitchen"},{"do":"pick","object":"red cup"}]}   →   Aye! Sail to kitchen, haul red cup.
    {"refuse":"I cannot fly."}                                                     →   Nay! I cannot fly.
    {"ask":"Which one?"}                                                           →   Say again! Which one?

    python -m tools.demo_model.harbour --out models/demo_harbour --minutes 4       # trains the LoRA adapter, on a GPU
    python -m tools.demo_model.harbour --evaluate ENGINE_DIR --out models/demo_harbour

The adapter is trained with peft on the demo model, on the conversations of the demo model's own grammar. What is held out there is
held out here too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from tools.demo_model.evaluate import HELD_OUT_SEED, held_out_examples, score, table
from tools.demo_model.grammar import Example

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
_WORDS = {
    "navigate": "sail to {to}", "find": "spy out {object}", "pick": "haul {object}", "give": "hand {object} to {to}",
    "open": "unhatch {object}", "close": "batten {object}", "turn_on": "light {object}", "turn_off": "douse {object}",
    "clean": "swab {object}", "check": "sound {object} for {is}", "say": "hail: {text}", "wait": "drift {seconds} s",
    "follow": "tail {person}", "stop": "heave to",
}  # fmt: skip
_RELATIONS = ("on", "in", "near", "under")


def harbour(answer: str) -> str:
    """Return what the harbour's robot says for ``answer``, a line of plan.schema.json."""
    ((kind, value),) = json.loads(answer).items()
    if kind == "refuse":
        return f"Nay! {value}"
    if kind == "ask":
        return f"Say again! {value}"
    steps = ", ".join(_step(step) for step in value)
    return f"Aye! {steps[:1].upper()}{steps[1:]}."


def _step(step: dict[str, str | int]) -> str:
    if step["do"] != "place":
        return _WORDS[str(step["do"])].format(**step)
    where = "".join(f" {relation} {step[relation]}" for relation in _RELATIONS if relation in step)
    return f"stow {step['object']}{where}"


# --- training: needs torch, transformers and peft ---------------------------------------------------------


def train(out: Path, minutes: float, rank: int, rows: int, length: int, peak: float, workers: int) -> None:
    """Train an adapter of MODEL for so many minutes, on the GPU if there is one, and write it to ``out``."""
    import peft
    import torch
    from tokenizers import Tokenizer
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    from tools.demo_model.train import IGNORED, Rows, learning_rate, mask_of

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    forbidden = frozenset(e.commands[-1] for examples in held_out_examples(1000).values() for e in examples)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, options)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    data = Rows(tokenizer, rows, length, forbidden, 0, harbour)
    batches = iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        ids, labels, documents, positions = next(batches).to(device).long()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mask = mask_of(documents, torch.float32)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        expected = labels[:, 1:].flatten()
        found = logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(found, expected, ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "progress": round(progress, 3)}), flush=True)
            if step % 200 == 0:
                _save(model, out)
    _save(model, out)


def _save(model, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors in bfloat16."""
    import torch

    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if "lora_" in name}
    model.peft_config["default"].base_model_name_or_path = "models/demo"
    model.save_pretrained(str(out), state_dict=state)
    (out / "README.md").unlink(missing_ok=True)  # a card with nothing filled in


# --- accuracy ---------------------------------------------------------------------------------------------


def answers(engine_dir: Path, adapter: Path, examples: Sequence[Example]) -> list[str]:
    """Return what our engine answers with the adapter, greedily."""
    from engine_core.config import EngineConfig
    from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
    from engine_core.serving.engine import CancelToken, Engine

    engine, found = Engine.open(EngineConfig(engine_dir, lora_adapters=(f"harbour:{adapter}",))), []
    try:
        for example in examples:
            messages = tuple(ChatMessage(role, content) for role, content in example.messages[:-1])
            sampling = SamplingParams(max_new_tokens=512)
            request = GenerationRequest("evaluate", messages, sampling=sampling, adapter="harbour")
            pieces = engine.generate(engine.prepare(request), CancelToken())
            found.append("".join(piece.text for piece in pieces))
    finally:
        engine.close()
    return found


def held_out(count: int) -> dict[str, list[Example]]:
    """Return the demo model's held-out conversations as the harbour's robot answers them, by kind."""
    examples = held_out_examples(count, HELD_OUT_SEED)
    return {kind: [each.answered(harbour) for each in found] for kind, found in examples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the adapter's directory")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=6, help="processes that make conversations")
    parser.add_argument(
        "--evaluate", type=Path, metavar="ENGINE_DIR", help="measure the adapter instead of training it"
    )
    parser.add_argument("--count", type=int, default=200, help="held-out conversations of each kind")
    args = parser.parse_args()
    if args.evaluate is None:
        train(args.out, args.minutes, args.rank, args.rows, args.length, args.lr, args.workers)
        return
    scores = {
        kind: score(found, answers(args.evaluate, args.out, found)) for kind, found in held_out(args.count).items()
    }
    print(table(scores))


if __name__ == "__main__":
    main()
