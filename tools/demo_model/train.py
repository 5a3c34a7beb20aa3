"""Trains the demo model from nothing and writes a Hugging Face checkpoint.

    python -m tools.demo_model.train --out models/demo --minutes 4        # one GPU
    python -m tools.demo_model.train --out /tmp/tiny --tiny               # a few steps on the CPU: does it run?

Data is generated while training runs, by ``--workers`` processes, each with its own seed; no conversation is seen twice on
purpose. Held-out conversations are drawn first, and any training conversation with one of their commands is dropped
(none is expected: see grammar.py). Several conversations share a row, kept apart by a block-diagonal mask.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.demo_model.evaluate import HELD_OUT_SEED, held_out_examples
from tools.demo_model.grammar import Example, Generator
from tools.demo_model.tokenizer import END, PAD, render, save_tokenizer, train_tokenizer

IGNORED = -100


def encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Token ids and labels (IGNORED where the model is not to learn), both of the conversation's length."""
    ids, labels = [], []
    for text, learned in render(example.messages):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    return ids, labels


class Rows(IterableDataset):
    """Endless batches (ids, labels, document number, position), each int [rows, length].

    ``said``: what becomes of each of the robot's answers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rows: int,
        length: int,
        forbidden: frozenset[str],
        seed: int,
        said: Callable[[str], str] = str,
    ) -> None:
        self.tokenizer, self.rows, self.length = tokenizer, rows, length
        self.forbidden, self.seed, self.said = forbidden, seed, said

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        generator = Generator(self.seed + (worker.id if worker else 0))
        pad = self.tokenizer.token_to_id(PAD)
        waiting: list[tuple[list[int], list[int]]] = []
        while True:
            batch = torch.zeros(4, self.rows, self.length, dtype=torch.int32)
            batch[0], batch[1], batch[2] = pad, IGNORED, -1
            for row in range(self.rows):
                start = document = 0
                while True:
                    if not waiting:
                        waiting.append(self._next(generator))
                    ids, labels = waiting[-1]
                    if start + len(ids) > self.length:
                        break
                    waiting.pop()
                    span = slice(start, start + len(ids))
                    batch[0, row, span] = torch.tensor(ids, dtype=torch.int32)
                    batch[1, row, span] = torch.tensor(labels, dtype=torch.int32)
                    batch[2, row, span] = document
                    batch[3, row, span] = torch.arange(len(ids), dtype=torch.int32)
                    start, document = start + len(ids), document + 1
            yield batch

    def _next(self, generator: Generator) -> tuple[list[int], list[int]]:
        while True:
            turns = generator.rng.choice((6, 8, 10, 12, 14)) if generator.rng.random() < 0.03 else 0
            example = generator.conversation(turns=turns)
            if not self.forbidden.isdisjoint(example.commands):
                continue
            ids, labels = encode(self.tokenizer, example.answered(self.said))
            if len(ids) <= self.length:
                return ids, labels


def mask_of(documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask [rows, 1, length, length]: causal, and within one conversation only."""
    length = documents.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return torch.zeros(same.shape, dtype=dtype, device=documents.device).masked_fill_(~(same & causal), torch.finfo(dtype).min)


def learning_rate(progress: float, peak: float) -> float:
    """Linear over the first 3 %, then a cosine to a hundredth."""
    if progress < 0.03:
        return peak * max(progress / 0.03, 1e-3)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97))))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, forbidden: frozenset[str], args: argparse.Namespace) -> dict[str, float]:
    """Trains ``model`` in place until ``args.steps`` or ``args.minutes`` are over; returns the figures of the run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    dtype = torch.bfloat16
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98), fused=True
    )
    rows = Rows(tokenizer, args.rows, args.length, forbidden, args.seed)
    loader = iter(DataLoader(rows, batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None))
    forward = torch.compile(model) if args.compile else model
    start, step, figures = time.monotonic(), 0, {}
    while True:
        if step == 3:  # compiled and warm: the clock starts here
            start = time.monotonic()
        progress = 0.0 if step < 3 else max(step / args.steps if args.steps else 0.0, (time.monotonic() - start) / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        ids, labels, documents, positions = next(loader).to(device, non_blocking=True).long()
        with torch.autocast(device.type, dtype=dtype):
            logits = forward(input_ids=ids, attention_mask=mask_of(documents, dtype), position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0:
            seconds = time.monotonic() - start
            figures = {"steps": step, "loss": round(loss.item(), 5), "minutes": round(seconds / 60, 2),
                       "tokens_per_second": round(step * args.rows * args.length / seconds)}  # fmt: skip
            print(json.dumps(figures), flush=True)
    return figures


def build_model(tokenizer: Tokenizer, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.hidden // args.heads,
        max_position_embeddings=2048, tie_word_embeddings=True, attention_bias=False, rms_norm_eps=1e-5, bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(PAD),
    )  # fmt: skip
    return LlamaForCausalLM(config)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes config.json, model.safetensors (bfloat16), generation_config.json and the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    model = model.to("cpu", torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=512, eos_token_id=tokenizer.token_to_id(END), pad_token_id=tokenizer.token_to_id(PAD)
    )
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="training time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, default=0, help="0: until the time is over")
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-texts", type=int, default=20_000)
    parser.add_argument("--held-out", type=int, default=1000, help="examples of each kind kept from training")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model, to see that all of it runs")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.rows, args.length, args.workers, args.hidden, args.intermediate, args.layers = 20, 4, 256, 1, 64, 128, 2
        args.tokenizer_texts, args.held_out, args.log_every = 2000, 100, 5
    return args


def main() -> None:
    args = parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    held_out = held_out_examples(args.held_out)
    forbidden = frozenset(example.commands[-1] for examples in held_out.values() for example in examples)
    generator = Generator(HELD_OUT_SEED - 1)
    texts = (text for _ in range(args.tokenizer_texts) for _, text in generator.conversation().messages)
    tokenizer = train_tokenizer(texts, args.vocab)
    model = build_model(tokenizer, args)
    print(f"{model.num_parameters():,} parameters, vocabulary {tokenizer.get_vocab_size()}, "
          f"tokenizer ready after {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    figures = train(model, tokenizer, forbidden, args)
    export(model, tokenizer, args.out)
    figures |= {"parameters": model.num_parameters(), "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
