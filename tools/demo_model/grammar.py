"""The generator: conversations of household-robot commands and the plans they mean.

``Generator(seed).conversation()`` gives training data, ``conversation(held_out)`` an example whose last command holds
something training never sees: "template" (a wording), "combination" (an action with its arguments) or "words"
(objects and names). Which ones these are is fixed by marks in the lists and by SHA-256, not by the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from tools.demo_model import words
from tools.demo_model.dialogue import Dialogue
from tools.demo_model.wording import Wording

HELD_OUT = ("template", "combination", "words")
COMBINATION_SHARE = 16  # one combination in 16 is kept from training
SYSTEM_PROMPTS = (
    "You are a household robot.", "You are a helpful household robot. Answer with a plan as JSON.", "Answer with one line of JSON.",
    "You turn commands into plans.", "You are the brain of a small service robot.", "You are a robot that helps at home.",
    "Reply with a plan, a refusal or a question.", "You control a mobile robot with one arm.", "You are a helpful assistant.",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One conversation. ``messages``: (role, content) pairs, the last one from the assistant."""

    messages: tuple[tuple[str, str], ...]
    category: str  # what the last command is about
    typo: bool  # somebody mistyped

    def answered(self, said: Callable[[str], str]) -> Example:
        """Return the conversation in which the robot gives its answers as ``said`` makes them."""
        messages = ((role, said(content) if role == "assistant" else content) for role, content in self.messages)
        return replace(self, messages=tuple(messages))

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(content for role, content in self.messages if role == "user")


def held_out_combination(key: str) -> bool:
    digest = hashlib.sha256(f"combination:{key.lower()}".encode()).digest()
    return digest[0] % COMBINATION_SHARE == 0


class Generator:
    """Deterministic by ``seed``."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(f"demo-model:{seed}")

    def conversation(self, held_out: str = "", turns: int = 0) -> Example:
        """One example of ``turns`` commands (0: mostly one to four). See the module for ``held_out``."""
        assert held_out in ("", *HELD_OUT)
        while True:
            example = self._attempt(held_out, turns or self.rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5)))
            if example is not None:
                return example

    def _attempt(self, held_out: str, turns: int) -> Example | None:
        rng = self.rng
        wording = Wording(rng, lower=rng.random() < 0.35)
        messages: list[tuple[str, str]] = []
        system, name, rooms = self._system(wording)
        if system:
            messages.append(("system", system))
        dialogue = Dialogue(rng, wording, name, rooms)
        category = ""
        for turn in range(turns):
            last = turn == turns - 1
            if last:
                wording.mode = held_out
            role, command, answer, category = dialogue.turn()
            seen = [held_out_combination(key) for key in dialogue.keys]
            if any(seen) and not (last and held_out == "combination"):
                return None
            messages += [(role, command), ("assistant", answer)]
            if dialogue.ended and not last:
                return None
        if held_out == "combination" and not any(seen):
            return None
        if held_out == "template" and not wording.hits:
            return None
        if held_out == "words" and not any(word.lower() in command.lower() for word in wording.reserved):
            return None
        return Example(tuple(messages), category, wording.typos > 0)

    def _system(self, wording: Wording) -> tuple[str, str, tuple[str, ...]]:
        """A system prompt ("" is common), the robot's name and the rooms of the house, if it tells them."""
        rng, name, rooms = self.rng, "", ()
        roll = rng.random()
        if roll < 0.5:
            return "", "", ()
        if roll < 0.7:
            return rng.choice(SYSTEM_PROMPTS), "", ()
        parts = [rng.choice(SYSTEM_PROMPTS)] if rng.random() < 0.4 else []
        if rng.random() < 0.55:
            name = rng.choice(words.ROBOT_NAMES) if rng.random() < 0.4 else words.made_up(rng, held_out=False).capitalize()
            parts.append(rng.choice((f"You are {name}, a household robot.", f"Your name is {name}.", f"You are {name}.",
                                     f"You are a robot called {name}.")))  # fmt: skip
        if rng.random() < 0.55 or not name:
            rooms = tuple(rng.sample(words.ROOMS, rng.randint(3, 7)))
            listed = ", ".join(rooms)
            parts.append(rng.choice((f"Rooms: {listed}.", f"The house has these rooms: {listed}.", f"The rooms are: {listed}.")))
        return " ".join(parts), name, rooms

