"""New intents with new arguments, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from tools.demo_model import words
from tools.demo_model.wording import Wording, duration
from tools.demo_model.world import DEFAULT_REL, USER, Intent, Place

KINDS = {
    "fetch": 17, "put": 14, "go": 9, "go.p": 3, "find": 5, "pick": 5, "open": 4, "close": 4, "turn_on": 4, "turn_off": 4, "clean": 4,
    "check": 3, "check_do": 4, "check_tell": 2, "tell": 8, "wait": 6, "follow": 3,
}  # fmt: skip
CHECKS = ("check", "check_do", "check_tell")
FIXTURES = {"open": words.OPENABLE, "close": words.OPENABLE, "turn_on": words.DEVICES, "turn_off": words.DEVICES, "clean": words.CLEANABLE}


class IntentSampler:
    """``rooms``: the rooms of this house, if the system prompt tells them.

    ``known``: whether the conversation has told where an object is. ``people`` collects who was drawn so far.
    """

    def __init__(self, rng: Random, wording: Wording, rooms: tuple[str, ...], known: Callable[[str], bool]) -> None:
        self.rng, self.wording, self.rooms, self.known = rng, wording, rooms, known
        self.people: set[str] = set()

    def room(self) -> str:
        if self.rooms and self.rng.random() < 0.8:
            return self.rng.choice(self.rooms)
        return self.wording.invented() if not self.rooms and self.rng.random() < 0.06 else self.rng.choice(words.ROOMS)

    def any_place(self) -> Place:
        return self.wording.place(("room", "room", "room", "surface", "surface", "container", "closed", "new"), self.room())

    def source(self) -> tuple[Place, str]:
        place = self.wording.place(("room", "room", "surface", "surface", "closed", "container", "new"), self.room())
        return place, self.relation(place)

    def relation(self, place: Place) -> str:
        return self.rng.choice(("on", "in")) if place.kind == "new" else DEFAULT_REL[place.kind]

    def destination(self) -> tuple[Place, str]:
        place = self.wording.place(("surface", "surface", "surface", "closed", "closed", "container", "room", "new"), self.room())
        rel = self.relation(place)
        if place.kind != "room" and self.rng.random() < 0.15:
            rel = self.rng.choice(("near", "under"))
        return place, rel

    def person(self) -> str:
        person = self.wording.person()
        self.people.add(person)
        return person

    def new_object(self) -> str:
        """An object whose whereabouts the conversation has not told."""
        while True:
            obj = self.wording.object()
            if not self.known(obj):
                return obj

    def intent(self, kind: str = "") -> Intent:
        """A new intent with new arguments."""
        rng = self.rng
        kind = kind or rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        if kind in ("fetch", "put", "pick", "find"):
            return self.transport(kind)
        if kind in FIXTURES:
            return Intent(kind, obj=self.fixture(FIXTURES[kind]), dest=self.fixture_room())
        if kind in CHECKS:
            doors = rng.random() < 0.5
            intent = Intent(kind, obj=self.fixture(words.OPENABLE if doors else words.DEVICES), dest=self.fixture_room(),
                            value=rng.choice(("open", "closed") if doors else ("on", "off")))  # fmt: skip
            person = USER if rng.random() < 0.4 else self.person()
            return replace(intent, person=person) if kind == "check_tell" else intent
        if kind == "go":
            return Intent("go", dest=self.any_place())
        if kind == "go.p":
            return Intent("go", person=USER if rng.random() < 0.3 else self.person())
        if kind == "follow":
            return Intent("follow", person=USER if rng.random() < 0.35 else self.person())
        if kind == "wait":
            text, seconds = duration(rng)
            return Intent("wait", text=text, seconds=seconds)
        if kind == "stop":
            return Intent("stop")
        return self.message()

    def transport(self, kind: str) -> Intent:
        rng = self.rng
        if kind != "find" and rng.random() < 0.05:
            obj = rng.choice(words.HEAVY + words.LIVING)
            also = ""
        else:
            obj = self.new_object()
            also = self.new_object() if rng.random() < 0.1 else ""
            also = "" if also == obj else also
        intent = Intent(kind, obj=obj, also=also)
        if rng.random() < (0.4 if kind != "put" else 0.25):
            source, rel = self.source()
            intent = replace(intent, source=source, source_rel=rel)
        if kind == "put":
            dest, rel = self.destination()
            dest = replace(dest, room="") if intent.source else dest  # "from the box in the hall in the bag" is enough
            if obj in words.LIVING and rng.random() < 0.5:
                dest, rel = Place(rng.choice(words.HURTING), "closed"), "in"
            return replace(intent, dest=dest, rel=rel)
        if kind == "fetch":
            return replace(intent, person=USER if rng.random() < 0.6 else self.person())
        return intent

    def fixture(self, options: tuple[str, ...]) -> str:
        rng, roll = self.rng, self.rng.random()
        name = self.wording.invented() if roll < 0.12 else rng.choice(options)
        return f"{rng.choice(words.ADJECTIVES)} {name}" if rng.random() < 0.08 else name

    def fixture_room(self) -> Place | None:
        return Place(self.room(), "room") if self.rng.random() < 0.3 else None

    def message(self) -> Intent:
        roll, wording = self.rng.random(), self.wording
        if roll < 0.35:
            return Intent("tell", text=wording.message())
        person = self.person()
        if roll < 0.5:
            return Intent("tell", person=person, text=f"please {wording.request()}", value="to")
        if roll < 0.6:
            told, asked = wording.question()
            return Intent("tell", person=person, text=asked, value=told)
        return Intent("tell", person=person, text=wording.message())
