"""Questions about a scene and their right answers, by kind: plain sentences, and JSON for what a robot is to do.

A JSON answer is one line: ``{"at":[x,y]}``, ``{"plan":[…]}``, ``{"refuse":"…"}`` or ``{"ask":"…"}``. Positions are whole percent of
the picture's width and height, from the left and from the top.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.demo_vision.scene import HELD_OUT, Scene, Thing, random_scene
from tools.demo_vision.words import (
    COLOURS,
    CONTAINERS,
    KINDS,
    NEW_KINDS,
    NUMBERS,
    SHAPES,
    a,
    listing,
    name,
    plural,
    sentence,
)

TOLERANCE = 4  # percent by which a position may be off
NO_PICTURE = "I see no picture."
SYSTEM_PROMPTS = ("You are a helpful robot.", "You are a robot with one arm and a camera.", "Answer briefly.", "You are a robot. Answer questions about the picture.")  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question with its right answer; ``kind`` is one of QUESTION_KINDS."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Reference:
    """Words for things, and those that they fit: "red cube", "cup", "leftmost ball"."""

    words: str
    things: tuple[Thing, ...]


# Side → whether the first thing is on that side of the second, and by how much, in fractions of the picture.
_SIDES: dict[str, Callable[[Thing, Thing], float]] = {
    "left of": lambda first, second: second.at[0] - first.at[0],
    "right of": lambda first, second: first.at[0] - second.at[0],
    "in front of": lambda first, second: first.base - second.base,
    "behind": lambda first, second: second.base - first.base,
}
_SIDE_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "in front of": ("in front of", "nearer than", "closer than"),
    "behind": ("behind", "farther away than", "further back than"),
}
_EXTREMES = {
    "left of": ("leftmost", "farthest left", "furthest to the left"),
    "right of": ("rightmost", "farthest right", "furthest to the right"),
    "in front of": ("nearest", "closest", "nearest to the camera"),
    "behind": ("farthest", "farthest away", "furthest back"),
}
_CLEAR = 0.035  # how far apart two things must be for a question about their order
_DOMINANT = 1.6  # how much farther apart along one axis than along the other, for "where is X relative to Y"
POLITE = ("", "", "", "Please ", "Robot, ", "Could you ")


def _extreme(side: str, things: tuple[Thing, ...] | list[Thing]) -> Thing | None:
    """The thing that is clearly farthest on ``side``."""
    best = [one for one in things if all(other is one or _SIDES[side](one, other) >= _CLEAR for other in things)]
    return best[0] if best else None


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


class Asker:
    """Draws questions about one scene."""

    def __init__(self, rng: Random, scene: Scene, *, new_kinds: bool = False) -> None:
        self.rng, self.scene, self.things = rng, scene, scene.things
        self._known = KINDS if new_kinds else tuple(kind for kind in KINDS if kind not in NEW_KINDS)
        self._kinds = [thing.kind for thing in scene.things]

    def ask(self, kind: str) -> list[Turn] | None:
        """The turns of a question of ``kind``, the last of which is of that kind; none if the scene has no such question."""
        turns = getattr(self, f"_{kind}")()
        if turns is None or isinstance(turns, list):
            return turns
        question, answer = turns
        if self.rng.random() < 0.06:
            question = question[0].lower() + question[1:]
        if self.rng.random() < 0.06:
            question = question.rstrip("?.")
        return [Turn(kind, question, answer)]

    # ---- words

    def _choice(self, *options: str) -> str:
        return self.rng.choice(options)

    def _order(self, text: str) -> str:
        """A command, politely at times."""
        polite = self.rng.choice(POLITE)
        if not polite:
            return f"{text[0].upper()}{text[1:]}."
        return f"{polite}{text}{'?' if polite == 'Could you ' else '.'}"

    def _reference(self, thing: Thing) -> Reference | None:
        """Words that fit ``thing`` alone."""
        colour, shape = thing.kind
        options = []
        if self._kinds.count(thing.kind) == 1:
            options += [name(thing.kind)] * 3
            if sum(kind[1] == shape for kind in self._kinds) == 1:
                options += [shape] * 2
            if sum(kind[0] == colour for kind in self._kinds) == 1:
                options += [f"{colour} {self._choice('thing', 'object', 'one')}"]
        return Reference(self.rng.choice(options), (thing,)) if options else None

    def _one(self) -> Reference | None:
        """Words for one thing of the scene."""
        return self._reference(self.rng.choice(self.things)) if self.things else None

    def _two(self) -> tuple[Reference, Reference] | None:
        if len(self.things) < 2:
            return None
        first, second = (self._reference(thing) for thing in self.rng.sample(self.things, 2))
        return (first, second) if first and second else None

    def _absent(self) -> str | None:
        """Words for something that is not there, near to what is there half the time."""
        for _ in range(20):
            colour, shape = self.rng.choice(self._known)
            if self._kinds and self.rng.random() < 0.6:
                near = self.rng.choice(self._kinds)
                colour, shape = (near[0], shape) if self.rng.random() < 0.5 else (colour, near[1])
            if (colour, shape) in self._kinds or (colour, shape) not in self._known:
                continue
            if shape not in {kind[1] for kind in self._kinds} and self.rng.random() < 0.4:
                return shape
            return name((colour, shape))
        return None

    def _names(self, things: list[Thing] | tuple[Thing, ...]) -> str:
        return sentence(listing([a(name(thing.kind)) for thing in things])) if things else "Nothing."

    # ---- kinds of questions: (question, answer), or turns

    def _list(self) -> tuple[str, str]:
        question = self._choice(
            "What is on the table?", "What is on the table?", "What's on the table?", "What do you see?", "What can you see?",
            "List the objects.", "List the objects on the table.", "List everything on the table.", "Which objects are there?",
            "Which objects are on the table?", "Describe the table.", "Describe the scene.", "Describe what you see.",
            "What is in the picture?", "What is in front of you?", "Name all the things on the table.", "Tell me what you see.",
        )  # fmt: skip
        return question, self._names(self.things) if self.things else "The table is empty."

    def _colour(self) -> tuple[str, str] | None:
        if self.rng.random() < 0.12:
            shape = self.rng.choice(SHAPES)
            if any(kind[1] == shape for kind in self._kinds):
                return None
            things: list[Thing] = []
        else:
            if not self.things:
                return None
            shape = self.rng.choice(self.things).kind[1]
            things = [thing for thing in self.things if thing.kind[1] == shape]
            if len({thing.kind for thing in things}) < len(things):
                return None
        word = self._choice("colour", "color")
        if len(things) > 1:
            many = plural(shape)
            question = self._choice(
                f"What {word} are the {many}?", f"Which {word}s do the {many} have?", f"Tell me the {word}s of the {many}."
            )
            return question, sentence(f"the {many} are {listing([thing.kind[0] for thing in things])}")
        question = self._choice(
            f"What {word} is the {shape}?", f"What {word} is the {shape}?", f"Which {word} is the {shape}?",
            f"What {word} does the {shape} have?", f"Tell me the {word} of the {shape}.", f"What is the {word} of the {shape}?",
        )  # fmt: skip
        return question, f"The {shape} is {things[0].kind[0]}." if things else f"There is no {shape}."

    def _shape(self) -> tuple[str, str] | None:
        if not self.things:
            return None
        colour = self.rng.choice(self.things).kind[0]
        things = [thing for thing in self.things if thing.kind[0] == colour]
        if len(things) > 1:
            question = self._choice(f"Which {colour} things are there?", f"List the {colour} objects.", f"What is {colour}?")
            return question, self._names(things)
        word = self._choice("thing", "object", "one")
        question = self._choice(
            f"What is the {colour} {word}?",
            f"What is {colour}?",
            f"What kind of thing is the {colour} {word}?",
            f"What {colour} thing is there?",
        )
        return question, self._names(things)

    def _count(self) -> tuple[str, str]:
        draw = self.rng.random()
        if draw < 0.25:
            noun, things = self._choice("thing", "object"), list(self.things)
        elif draw < 0.6:
            shape = self.rng.choice(self._kinds)[1] if self._kinds and self.rng.random() < 0.75 else self.rng.choice(SHAPES)
            noun, things = shape, [thing for thing in self.things if thing.kind[1] == shape]
        elif draw < 0.85:
            colour = self.rng.choice(self._kinds)[0] if self._kinds and self.rng.random() < 0.75 else self.rng.choice(tuple(COLOURS))
            noun, things = f"{colour} {self._choice('thing', 'object')}", [thing for thing in self.things if thing.kind[0] == colour]
        else:
            kind = self.rng.choice(self._kinds) if self._kinds and self.rng.random() < 0.75 else self.rng.choice(self._known)
            noun, things = name(kind), [thing for thing in self.things if thing.kind == kind]
        many = plural(noun)
        question = self._choice(
            f"How many {many} are there?", f"How many {many} are there?", f"How many {many} do you see?", f"How many {many} are on the table?",
            f"Count the {many}.", f"What is the number of {many}?",
        )  # fmt: skip
        answer = f"there {'is' if len(things) == 1 else 'are'} {NUMBERS[len(things)]} {noun if len(things) == 1 else many}"
        return question, sentence(answer)

    def _exists(self) -> tuple[str, str] | None:
        if self.rng.random() < 0.5:
            if not self.things:
                return None
            kind = self.rng.choice(self._kinds)
            noun, answer = self.rng.choice((name(kind), name(kind), kind[1], f"{kind[0]} thing")), "Yes."
        elif self.rng.random() < 0.15:
            colour = self.rng.choice(tuple(COLOURS))
            if any(kind[0] == colour for kind in self._kinds):
                return None
            noun, answer = f"{colour} thing", "No."
        else:
            absent = self._absent()
            if absent is None:
                return None
            noun, answer = absent, "No."
        some = a(noun)
        question = self._choice(
            f"Is there {some}?", f"Is there {some}?", f"Is there {some} on the table?", f"Do you see {some}?", f"Can you see {some}?",
        )  # fmt: skip
        return question, answer

    def _relation(self) -> tuple[str, str] | None:
        two = self._two()
        if two is None:
            return None
        first, second = two
        across = second.things[0].at[0] - first.things[0].at[0]
        along = second.things[0].base - first.things[0].base
        if abs(across) >= _DOMINANT * abs(along) and abs(across) >= 0.07:
            side = "left of" if across > 0 else "right of"
        elif abs(along) >= _DOMINANT * abs(across) and abs(along) >= 0.07:
            side = "behind" if along > 0 else "in front of"
        else:
            return None
        one, other = f"the {first.words}", f"the {second.words}"
        question = self._choice(
            f"Where is {one} relative to {other}?", f"Where is {one} relative to {other}?", f"Where is {one} compared to {other}?",
            f"Where is {one} as seen from {other}?", f"On which side of {other} is {one}?", f"How does {one} stand to {other}?",
        )  # fmt: skip
        return question, sentence(f"{one} is {side} {other}")

    def _compare(self) -> tuple[str, str] | None:
        two = self._two()
        if two is None:
            return None
        first, second = two
        side = self.rng.choice(tuple(_SIDES))
        distance = _SIDES[side](first.things[0], second.things[0])
        if abs(distance) < _CLEAR:
            return None
        words = self.rng.choice(_SIDE_WORDS[side])
        question = self._choice(f"Is the {first.words} {words} the {second.words}?", f"Is the {first.words} {words} the {second.words}?",
                                f"Does the {first.words} stand {words} the {second.words}?")  # fmt: skip
        return question, "Yes." if distance > 0 else "No."

    def _extreme(self) -> tuple[str, str] | None:
        side = self.rng.choice(tuple(_SIDES))
        thing = _extreme(side, self.things)
        if thing is None or len(self.things) < 2:
            return None
        words = self.rng.choice(_EXTREMES[side])
        question = self._choice(f"Which object is {words}?", f"What is {words}?", f"Which thing is {words}?", f"Which one is {words}?")
        if words in ("leftmost", "rightmost", "nearest", "closest", "farthest") and self.rng.random() < 0.5:
            question = self._choice(f"What is the {words} object?", f"Name the {words} thing.", f"Which is the {words} object?")
        return question, self._names([thing])

    def _beside(self) -> tuple[str, str] | None:
        one = self._one()
        if one is None:
            return None
        side = self.rng.choice(tuple(_SIDES))
        others = [thing for thing in self.things if thing is not one.things[0]]
        distances = [_SIDES[side](thing, one.things[0]) for thing in others]
        if any(abs(distance) < _CLEAR for distance in distances):
            return None
        words = self.rng.choice(_SIDE_WORDS[side])
        question = self._choice(f"What is {words} the {one.words}?", f"What is {words} the {one.words}?", f"Which objects are {words} the {one.words}?",
                                f"What do you see {words} the {one.words}?")  # fmt: skip
        return question, self._names([thing for thing, distance in zip(others, distances) if distance > 0])

    def _point(self) -> tuple[str, str] | None:
        one = self._one()
        if one is None:
            return None
        words = f"the {one.words}"
        question = self._choice(f"Where is {words}?", f"Where is {words}?", f"Point at {words}.", f"Show me {words}.", f"Find {words}.",
                                f"Where do you see {words}?", f"What is the position of {words}?")  # fmt: skip
        return question, _json({"at": one.things[0].percent})

    def _target(self) -> Reference | None:
        """Words for one thing to act on: by its name, by its side of another thing, or as the farthest on one side."""
        draw = self.rng.random()
        if draw < 0.5 or len(self.things) < 2:
            return self._one()
        thing = self.rng.choice(self.things)
        words = self.rng.choice((name(thing.kind), thing.kind[1]))
        same = [one for one in self.things if words in (name(one.kind), one.kind[1])]
        side = self.rng.choice(tuple(_SIDES))
        if draw < 0.7:
            if _extreme(side, same) is not thing or len(same) < 2:
                return None
            return Reference(f"{_EXTREMES[side][0]} {words}", (thing,))
        anchor = self._reference(self.rng.choice(self.things))
        if anchor is None or anchor.things[0] in same:
            return None
        distances = [(one, _SIDES[side](one, anchor.things[0])) for one in same]
        if any(abs(distance) < _CLEAR for _, distance in distances) or [one for one, distance in distances if distance > 0] != [thing]:
            return None
        return Reference(
            f"{words} {self._choice(*_SIDE_WORDS[side][: 2 if side.endswith('t of') and side[0] in 'lr' else 1])} the {anchor.words}",
            (thing,),
        )

    @staticmethod
    def _step(do: str, thing: Thing, **more: object) -> dict[str, object]:
        return {"do": do, "object": name(thing.kind), **more, "at": thing.percent}

    def _pick(self) -> tuple[str, str] | None:
        target = self._target()
        if target is None:
            return None
        thing, words = target.things[0], f"the {target.words}"
        plan: list[dict[str, object]] = [self._step("pick", thing)]
        if self.rng.random() < 0.25:
            question = self._choice(f"give me {words}", f"hand me {words}", f"bring me {words}", f"pass me {words}")
            plan.append({"do": "give", "object": name(thing.kind), "to": "user"})
        else:
            question = self._choice(
                f"pick {words}", f"pick up {words}", f"pick {words}", f"take {words}", f"grab {words}", f"grasp {words}"
            )
        return self._order(question), _json({"plan": plan})

    def _place(self) -> tuple[str, str] | None:
        containers = [thing for thing in self.things if thing.kind[1] in CONTAINERS]
        goal = self._reference(self.rng.choice(containers)) if containers else None
        if goal is None:
            return None
        holder = goal.things[0]
        where = "in" if holder.kind[1] == "bowl" else "on"
        onto = f"{self._choice('in', 'into') if where == 'in' else self._choice('on', 'onto')} the {goal.words}"
        if self.rng.random() < 0.3:
            draw, noun = self.rng.random(), ""
            kind = self.rng.choice(self._kinds)
            noun, fits = (
                (kind[1], lambda one: one.kind[1] == kind[1]) if draw < 0.6 else (f"{kind[0]} thing", lambda one: one.kind[0] == kind[0])
            )
            things = [one for one in self.things if fits(one)]
            if len(things) < 2 or len(things) > 3 or holder in things:
                return None
            words = f"{self._choice('all', 'all the', 'the')} {plural(noun)}"
        else:
            target = self._target()
            if target is None or target.things[0] is holder:
                return None
            things, words = list(target.things), f"the {target.words}"
        question = self._choice(f"put {words} {onto}", f"place {words} {onto}", f"put {words} {onto}", f"move {words} {onto}")
        plan = []
        for thing in things:
            plan += [self._step("pick", thing), {"do": "place", "object": name(thing.kind), where: name(holder.kind), "at": holder.percent}]
        return self._order(question), _json({"plan": plan})

    def _task(self, words: str) -> str:
        return self.rng.choice((
            self._order(f"pick the {words}"), self._order(f"pick up the {words}"), self._order(f"take the {words}"), f"Where is the {words}?",
            self._order(f"give me the {words}"), f"Point at the {words}.", self._order(f"grab the {words}"), f"Show me the {words}.",
            self._order(f"put the {words} into the bowl"), self._order(f"put the {words} on the plate"), f"Find the {words}.",
        ))  # fmt: skip

    def _refuse(self) -> tuple[str, str] | None:
        missing = [shape for shape in CONTAINERS if all(kind[1] != shape for kind in self._kinds)]
        if missing and self.rng.random() < 0.25:  # nothing to put it into
            goal, target = self.rng.choice(missing), self._target()
            if target is None:
                return None
            question = self._order(f"{self._choice('put', 'place')} the {target.words} {'into' if goal == 'bowl' else 'on'} the {goal}")
            return question, _json({"refuse": f"There is no {goal}."})
        absent = self._absent()
        if absent is None:
            return None
        question = self._task(absent)
        if question.endswith(("plate.", "bowl.", "plate?", "bowl?")) and absent in ("plate", "bowl"):
            return None
        return question, _json({"refuse": f"There is no {absent}."})

    def _which(self) -> tuple[str, str] | None:
        """Several things of a shape, and the words fit all of them."""
        shapes = [s for s in SHAPES if 2 <= len([k for k in self._kinds if k[1] == s]) == len({k for k in self._kinds if k[1] == s}) <= 3]
        if not shapes:
            return None
        shape = self.rng.choice(shapes)
        question = self._task(shape)
        if question.endswith(("plate.", "bowl.", "plate?", "bowl?")):
            return None
        ones = [f"{a(thing.kind[0])} one" for thing in self.things if thing.kind[1] == shape]
        return question, _json({"ask": f"Which {shape}? I see {listing(ones)}."})

    def _follow_up(self) -> list[Turn] | None:
        """A question about one thing, and another one that says "it"."""
        one = self._one()
        if one is None:
            return None
        thing, words = one.things[0], one.words
        if not words.endswith(("thing", "object", "one")) and self.rng.random() < 0.3 and words == thing.kind[1]:
            first = Turn("colour", f"What colour is the {words}?", f"The {words} is {thing.kind[0]}.")
        elif self.rng.random() < 0.5:
            first = Turn("exists", f"{self._choice('Is there', 'Do you see')} {a(words)}?", "Yes.")
            if words.endswith(("object", "one")):
                return None
        else:
            first = Turn("point", f"Where is the {words}?", _json({"at": thing.percent}))
        pick = self._step("pick", thing)
        answer: dict[str, object] = {"plan": [pick]}
        if self.rng.random() < 0.5:
            question = self._order(self._choice("pick it", "pick it up", "take it", "grab it"))
        elif first.kind == "point" or self.rng.random() < 0.5:
            question = self._order(self._choice("give it to me", "bring it to me", "hand it to me"))
            answer = {"plan": [pick, {"do": "give", "object": name(thing.kind), "to": "user"}]}
        else:
            question, answer = self._choice("Where is it?", "Point at it.", "Show it to me."), {"at": thing.percent}
        return [first, Turn("follow_up", question, _json(answer))]


# Kind → its share of the questions.
SHARES = {"list": 1.2, "colour": 1.0, "shape": 0.8, "count": 1.2, "exists": 0.9, "relation": 2.6, "compare": 2.0, "extreme": 0.8,
          "beside": 1.6, "point": 1.2, "pick": 2.6, "place": 6.0, "refuse": 0.8, "which": 4.0, "follow_up": 1.2}  # fmt: skip
QUESTION_KINDS = tuple(SHARES)


def dialogue(asker: Asker) -> list[Turn]:
    """One to three questions about the scene, with their answers."""
    rng, turns = asker.rng, []
    for _ in range(rng.choices((1, 2, 3), (0.8, 0.13, 0.07))[0]):
        turns += asker.ask(rng.choices(QUESTION_KINDS, tuple(SHARES.values()))[0]) or []
    return turns or dialogue(asker)


@dataclass(frozen=True)
class Example:
    """A held-out scene with a dialogue; the answer to its last question counts."""

    scene: Scene
    turns: tuple[Turn, ...]


HELD_OUT_SEED = 1_000_003  # training seeds are below


def held_out_examples(count: int, seed: int = HELD_OUT_SEED) -> dict[str, list[Example]]:
    """For each entry of HELD_OUT ``count`` examples of every kind of question, each about a scene of its own."""
    examples: dict[str, list[Example]] = {}
    for index, held_out in enumerate(HELD_OUT):
        rng = Random(seed + index)
        waiting, found = list(QUESTION_KINDS) * count, []
        while waiting:
            scene = random_scene(rng, held_out)
            asker = Asker(rng, scene, new_kinds=held_out == "objects")
            for kind in rng.sample(waiting, min(3, len(waiting))):
                turns = asker.ask(kind)
                if turns:
                    waiting.remove(kind)
                    found.append(Example(scene, tuple(turns)))
                    break
        examples[held_out] = found
    return examples


def is_right(expected: str, found: str) -> bool:
    """Return whether the answer is the expected one: the same text, or the same JSON with every position within TOLERANCE."""
    if not expected.startswith("{"):
        return found == expected
    try:
        return _same(json.loads(expected), json.loads(found))
    except ValueError:
        return False


def _same(expected: object, found: object) -> bool:
    if isinstance(expected, dict):
        return isinstance(found, dict) and list(expected) == list(found) and all(_same(expected[key], found[key]) for key in expected)
    if isinstance(expected, list):
        return isinstance(found, list) and len(expected) == len(found) and all(map(_same, expected, found))
    if isinstance(expected, int):
        return isinstance(found, int) and abs(expected - found) <= TOLERANCE
    return expected == found
