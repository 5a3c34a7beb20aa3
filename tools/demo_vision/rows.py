"""Rows of tokens to train on: one picture and as many dialogues about it as fit."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from tools.demo_vision.scene import MAX_OBJECTS, Scene
from tools.demo_vision.tokenizer import PAD, pieces, prefix
from tools.demo_vision.words import COLOURS, SHAPES

IGNORED = -100


class Packer:
    """Packs dialogues about a scene into one row."""

    def __init__(self, tokenizer: Tokenizer, length: int, image_tokens: int) -> None:
        self.length, self.image_tokens, self.pad = length, image_tokens, tokenizer.token_to_id(PAD)
        self.encode = lru_cache(200_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))

    def begin(self, system: str, picture: bool) -> None:
        """Start a row. Arrays of it: ids, labels, document (0: prefix, -1: nothing), position."""
        self.row = np.empty((4, self.length), np.int16)
        self.row[0], self.row[1], self.row[2], self.row[3] = self.pad, IGNORED, -1, 0
        before, after = (self.encode(text) for text in prefix(system, picture))
        self.image_at = len(before) if picture else -1
        ids = [*before, *after]
        positions = np.arange(len(ids)) + self.image_tokens * picture * (np.arange(len(ids)) >= len(before))
        self.used, self.documents, self.start = len(ids), 0, int(positions[-1]) + 1
        self.row[0, : self.used], self.row[2, : self.used], self.row[3, : self.used] = ids, 0, positions

    def add(self, turns: list[tuple[str, str]]) -> bool:
        """Add a dialogue; False if it does not fit."""
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in pieces(turns):
            some = self.encode(text)
            ids += some
            labels += some if learned else [IGNORED] * len(some)
        if self.used + len(ids) > self.length:
            return False
        self.documents += 1
        span = slice(self.used, self.used + len(ids))
        self.row[0, span], self.row[1, span], self.row[2, span] = ids, labels, self.documents
        self.row[3, span] = np.arange(self.start, self.start + len(ids))
        self.used += len(ids)
        return True


def labels_of(scene: Scene) -> np.ndarray:
    """Shape and colour of each object, int16 [MAX_OBJECTS, 2]."""
    found = np.zeros((MAX_OBJECTS, 2), np.int16)
    for i, thing in enumerate(scene.things):
        found[i] = SHAPES.index(thing.kind[1]), list(COLOURS).index(thing.kind[0])
    return found
