"""The costs and gains of a reduced vocabulary: coverage of held-out text, bytes of a step, the tokens lost most."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine_core.models.spec import ModelSpec

# Bytes of a weight as 'edgellm build' stores it: int8 and int4 in groups of 32 with a float32 scale.
WEIGHT_BYTES = {"fp16": 2.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}
_NUM_LOST = 20


@dataclass
class HeldOut:
    """The answers that had no part in the choice."""

    answers: list[np.ndarray] = field(default_factory=list)  # int32 [n] each
    documents: int = 0


def covered(held_out: HeldOut, kept: np.ndarray, vocab_size: int) -> dict:
    """Return the shares of tokens and of whole answers that ``kept``, int32 [rows], holds; None without text."""
    is_kept = np.zeros(vocab_size, dtype=bool)
    is_kept[kept] = True
    answers = [is_kept[answer[answer < vocab_size]] for answer in held_out.answers if len(answer)]
    tokens = sum(len(answer) for answer in answers)
    num_covered = sum(int(answer.sum()) for answer in answers)
    whole = sum(bool(answer.all()) for answer in answers)
    return {
        "documents": held_out.documents,
        "answers": len(answers),
        "tokens": tokens,
        "token_coverage": num_covered / tokens if tokens else None,
        "whole_answers": whole / len(answers) if answers else None,
    }


def lost_tokens(held_out: HeldOut, kept: np.ndarray, vocab_size: int, text_of: dict[int, str]) -> list[dict]:
    """Return the tokens of held-out answers that are not kept, the most frequent first: id, text, count."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for answer in held_out.answers:
        np.add.at(counts, answer[answer < vocab_size], 1)
    counts[kept] = 0
    order = np.argsort(-counts, kind="stable")[: min(_NUM_LOST, int(np.count_nonzero(counts)))]
    return [{"id": int(i), "text": text_of.get(int(i), ""), "count": int(counts[i])} for i in order]


def step_bytes(spec: ModelSpec, rows: int) -> list[dict]:
    """Return the bytes of weights that one decode step reads, before and after, by type of the head and of the rest.

    A step reads every weight of the layers and the head once, of experts only those of one token; of the embedding it
    reads one row, and the KV cache depends on the context: neither is counted, nor is an encoder, which only images
    need. ``share`` is what the head's lost rows are of the whole step.
    """
    unread = {spec.embedding, spec.head, *(spec.vision.shapes() if spec.vision is not None else ())}
    for layer in spec.layers:
        for index in range(spec.idle_experts):
            unread.update(name for linear in layer.expert(index) for name in linear.parts)
    layers = sum(int(np.prod(shape, dtype=np.int64)) for name, shape in spec.shapes().items() if name not in unread)
    full, reduced = spec.vocab_size * spec.hidden_size, rows * spec.hidden_size
    table = []
    for head, head_bytes in WEIGHT_BYTES.items():
        for body, body_bytes in WEIGHT_BYTES.items():
            if head_bytes < body_bytes:  # nobody keeps the head smaller than the layers
                continue
            whole = layers * body_bytes + full * head_bytes
            saved = (full - reduced) * head_bytes
            table.append(
                {
                    "head": head,
                    "layers": body,
                    "head_bytes": int(full * head_bytes),
                    "step_bytes": int(whole),
                    "saved_bytes": int(saved),
                    "share": saved / whole,
                }
            )
    return table


def summary(report: dict) -> str:
    """Return one line for a log."""
    held_out = report["held_out"]
    share = "no held-out text"
    if held_out["token_coverage"] is not None:
        share = f"{held_out['token_coverage']:.3%} of {held_out['tokens']} held-out tokens covered"
    return f"{report['size']} of {report['vocab_size']} tokens kept ({report['fraction']:.1%}), {share}"
