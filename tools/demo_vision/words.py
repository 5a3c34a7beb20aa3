"""The words of the tabletop world: colours, shapes, and which of their combinations training never sees."""

from __future__ import annotations

import hashlib

# Mean RGB of each colour, 0 to 1; scene.py varies it.
COLOURS = {
    "red": (0.78, 0.10, 0.10),
    "orange": (0.95, 0.47, 0.06),
    "yellow": (0.93, 0.83, 0.12),
    "green": (0.12, 0.58, 0.18),
    "blue": (0.12, 0.28, 0.78),
    "purple": (0.48, 0.16, 0.62),
    "white": (0.92, 0.92, 0.92),
    "black": (0.07, 0.07, 0.08),
}
SHAPES = ("cube", "ball", "cup", "bottle", "bowl", "can", "plate")
CONTAINERS = ("bowl", "plate")  # what other things are put into or onto
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

Kind = tuple[str, str]  # colour and shape
KINDS: tuple[Kind, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
NEW_KINDS = frozenset({("purple", "bottle"), ("orange", "cube"), ("white", "cup"), ("green", "bowl")})


def name(kind: Kind) -> str:
    return f"{kind[0]} {kind[1]}"


def plural(noun: str) -> str:
    return f"{noun}s"


def a(noun: str) -> str:
    """``noun`` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listing(items: list[str]) -> str:
    """The items as English lists them: "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def _held_out_pairs() -> frozenset[frozenset[Kind]]:
    """One in 16 pairs of different kinds, chosen by SHA-256."""
    return frozenset(
        frozenset((first, second))
        for i, first in enumerate(KINDS) for second in KINDS[i + 1 :]
        if hashlib.sha256(f"{name(first)}+{name(second)}".encode()).digest()[0] % 16 == 0
    )  # fmt: skip


NEW_PAIRS = _held_out_pairs()
