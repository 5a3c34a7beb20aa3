"""The meaning of a command: intents, the state a conversation leaves behind, and the plan that follows from both.

The answer is one line of compact JSON (models/demo/plan.schema.json): a plan of steps, a refusal or a question.
The rules are few and hold everywhere, so that a plan can be derived from a conversation by reading it:

- A thing whose whereabouts the conversation has not told is searched (``find``) before it is picked.
- ``navigate`` is left out when the robot is already there, except where the command is to go there.
- What has a door is opened before something is put in or taken out, and closed after it, unless it stands open already.
- ``check`` ends the plan early when what it checks is not so.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace

from tools.demo_model import words

Step = dict[str, str | int]
USER = "user"  # the one who speaks
# how a thing lies at a place when only "to" or "from" was said; next to what is not known
DEFAULT_REL = {"room": "in", "container": "in", "closed": "in", "surface": "on", "new": "near"}


@dataclass(frozen=True)
class Place:
    """A room, a piece of furniture (in ``room``, if that was said) or a person holding something."""

    name: str
    kind: str  # room, surface, container, closed (has a door), new (a made-up word), person
    room: str = ""

    @property
    def target(self) -> str:
        """The place that the robot drives to, to reach it."""
        return self.room or self.name


@dataclass(frozen=True)
class Intent:
    """One thing to do. ``kind`` decides which of the fields count."""

    kind: str
    obj: str = ""  # the thing handled: an object, a door, a device
    also: str = ""  # a second object
    source: Place | None = None
    source_rel: str = ""  # on or in: how the object lay at its source
    dest: Place | None = None
    rel: str = ""  # on, in, near, under
    person: str = ""
    text: str = ""
    seconds: int = 0
    value: str = ""  # open, closed, on, off

    @property
    def has_arguments(self) -> bool:
        """False for "stop", "come here", "follow me": one meaning each, which training needs."""
        return self.kind != "stop" and not (self.kind in ("go", "follow") and self.person == USER)

    @property
    def key(self) -> str:
        """The combination: what is done to what and where, whatever the words."""
        fields = (self.kind, self.obj, self.also, self.source, self.dest, self.rel, self.person, self.text, self.value)
        return repr(fields) if self.kind != "wait" else f"wait {self.text}"


@dataclass
class State:
    """The facts that the conversation has told so far."""

    at: str = ""  # where the robot is; "" = not known
    near: str = ""  # the object it has just found
    held: list[str] = field(default_factory=list)
    location: dict[str, tuple[str, Place]] = field(default_factory=dict)  # object → (relation, place)
    origin: dict[str, tuple[str, Place] | None] = field(default_factory=dict)  # where it was picked first
    opened: set[str] = field(default_factory=set)  # doors the robot left open
    it: tuple[str, ...] = ()  # what "it" or "them" means
    it_is_object: bool = True  # False: a door or a device
    there: Place | None = None
    person: str = ""  # what "him" or "her" means
    last: Intent | None = None

    def copy(self) -> State:
        return copy.deepcopy(self)


def to_json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def plan_text(steps: list[Step]) -> str:
    return to_json({"plan": steps})


def refuse(reason: str) -> str:
    return to_json({"refuse": reason})


def ask(question: str) -> str:
    return to_json({"ask": question})


def say(text: str) -> str:
    return plan_text([{"do": "say", "text": text}])


def named(obj: str) -> str:
    """The noun phrase with its article; what belongs to somebody has none."""
    return obj if "'s " in obj else f"the {obj}"


def steps_of(intent: Intent, state: State) -> list[Step]:
    """The steps of one intent; ``state`` moves on as if they had been carried out."""
    steps = _PLANNERS[intent.kind](intent, state)
    state.last = intent
    return steps


def _go(state: State, target: str, *, always: bool = False) -> list[Step]:
    if state.at == target and not always:
        return []
    state.at, state.near = target, ""
    return [{"do": "navigate", "to": target}]


def _inside(state: State, place: Place, step: Step) -> list[Step]:
    """``step`` at ``place``, with the door opened before and closed after where there is one and it is shut."""
    if place.kind != "closed" or place.name in state.opened:
        return [step]
    return [{"do": "open", "object": place.name}, step, {"do": "close", "object": place.name}]


def _find(state: State, obj: str) -> list[Step]:
    state.at, state.near = "", obj
    state.location.pop(obj, None)
    return [{"do": "find", "object": obj}]


def _acquire(state: State, obj: str, source: Place | None = None, rel: str = "") -> list[Step]:
    """The steps after which the robot holds ``obj``."""
    pick: Step = {"do": "pick", "object": obj}
    if obj in state.held:
        return []
    if source is not None:
        steps = _go(state, source.target) + _inside(state, source, pick)
        state.origin[obj] = (rel, source)
    elif obj in state.location:
        place = state.location[obj][1]
        steps = _go(state, place.target) + _inside(state, place, pick)
    else:
        steps = [pick] if state.near == obj else [*_find(state, obj), pick]
        state.origin.setdefault(obj, None)
    state.held.append(obj)
    state.location.pop(obj, None)
    return steps


def _release(state: State, obj: str, rel: str, place: Place | None) -> None:
    state.held.remove(obj)
    if place is not None:
        state.location[obj] = (rel, place)
    else:
        state.near = obj


def _put_one(state: State, obj: str, intent: Intent) -> list[Step]:
    steps = _acquire(state, obj, intent.source, intent.source_rel)
    step: Step = {"do": "place", "object": obj, intent.rel: intent.dest.name}
    steps += _go(state, intent.dest.target)
    steps += _inside(state, intent.dest, step) if intent.rel == "in" else [step]
    _release(state, obj, intent.rel, intent.dest)
    return steps


def _give_one(state: State, obj: str, intent: Intent) -> list[Step]:
    steps = _acquire(state, obj, intent.source, intent.source_rel)
    steps += _go(state, intent.person) + [{"do": "give", "object": obj, "to": intent.person}]
    _release(state, obj, "with", Place(intent.person, "person"))
    return steps


def _each(one):
    """The planner that does ``one`` for the object and then for the second one, if there is one."""

    def planner(intent: Intent, state: State) -> list[Step]:
        steps = []
        for obj in filter(None, (intent.obj, intent.also)):
            steps += one(state, obj, intent)
        state.it, state.it_is_object = tuple(filter(None, (intent.obj, intent.also))), True
        if intent.dest is not None:
            state.there = intent.dest
        elif intent.source is not None and intent.kind == "pick":
            state.there = intent.source
        else:
            state.there = None
        if intent.person and intent.person != USER:
            state.person = intent.person
        return steps

    return planner


def _plan_find(state: State, obj: str, intent: Intent) -> list[Step]:
    steps = _go(state, intent.source.target) if intent.source else []
    return steps + _find(state, obj)


def _plan_pick(state: State, obj: str, intent: Intent) -> list[Step]:
    return _acquire(state, obj, intent.source, intent.source_rel)


def _plan_drop(state: State, obj: str, intent: Intent) -> list[Step]:
    steps = [*_acquire(state, obj), {"do": "place", "object": obj}]
    _release(state, obj, "", Place(state.at, "spot") if state.at else None)
    return steps


def _plan_go(intent: Intent, state: State) -> list[Step]:
    if intent.person:
        state.person = intent.person if intent.person != USER else state.person
        state.there = None
        return _go(state, intent.person, always=True)
    state.there = intent.dest
    return _go(state, intent.dest.target, always=True)


def _plan_fixture(intent: Intent, state: State) -> list[Step]:
    """open, close, turn_on, turn_off, clean: at the thing, or in the room that was said."""
    steps = _go(state, intent.dest.target if intent.dest else intent.obj)
    if intent.kind == "open":
        state.opened.add(intent.obj)
    elif intent.kind == "close":
        state.opened.discard(intent.obj)
    state.it, state.it_is_object, state.there = (intent.obj,), False, intent.dest
    return [*steps, {"do": intent.kind, "object": intent.obj}]


def _plan_check(intent: Intent, state: State) -> list[Step]:
    """check, and what follows if it is so: close, turn_off, open, turn_on, or telling somebody."""
    steps = _go(state, intent.dest.target if intent.dest else intent.obj)
    steps.append({"do": "check", "object": intent.obj, "is": intent.value})
    state.it, state.it_is_object, state.there = (intent.obj,), False, intent.dest
    if intent.kind == "check_tell":
        fact = Intent("tell", person=intent.person, text=f"{named(intent.obj)} is {intent.value}")
        return steps + _plan_tell(fact, state)
    if intent.kind == "check_do":
        opposite = {"open": "close", "closed": "open", "on": "turn_off", "off": "turn_on"}[intent.value]
        return steps + _plan_fixture(replace(intent, kind=opposite), state)
    return steps


def _plan_tell(intent: Intent, state: State) -> list[Step]:
    steps = _go(state, intent.person) if intent.person else []
    if intent.person and intent.person != USER:
        state.person = intent.person
    return [*steps, {"do": "say", "text": intent.text}]


def _plan_follow(intent: Intent, state: State) -> list[Step]:
    state.at, state.near, state.there = "", "", None
    if intent.person != USER:
        state.person = intent.person
    return [{"do": "follow", "person": intent.person}]


_PLANNERS = {
    "go": _plan_go,
    "find": _each(_plan_find),
    "pick": _each(_plan_pick),
    "fetch": _each(_give_one),
    "put": _each(_put_one),
    "drop": _each(_plan_drop),
    "open": _plan_fixture,
    "close": _plan_fixture,
    "turn_on": _plan_fixture,
    "turn_off": _plan_fixture,
    "clean": _plan_fixture,
    "check": _plan_check,
    "check_do": _plan_check,
    "check_tell": _plan_check,
    "tell": _plan_tell,
    "follow": _plan_follow,
    "wait": lambda intent, state: [{"do": "wait", "seconds": intent.seconds}],
    "stop": lambda intent, state: [{"do": "stop"}],
}


def refusal_of(intent: Intent, rooms: tuple[str, ...]) -> str:
    """The reason an otherwise well-formed intent is refused, or "".

    ``rooms``: the rooms of this house as the system prompt told them; empty if it did not.
    """
    if rooms:
        for place in (intent.source, intent.dest):
            room = place and (place.room or (place.name if place.kind == "room" else ""))
            if room and room not in rooms:
                return f"There is no {room} here."
    if intent.kind in ("fetch", "pick", "put"):
        for obj in filter(None, (intent.obj, intent.also)):
            if obj in words.HEAVY:
                return f"The {obj} is too heavy for me."
            if obj in words.LIVING:
                hurts = intent.rel == "in" and intent.dest.name in words.HURTING
                return f"That would hurt the {obj}." if hurts else "I do not carry living things."
    return ""
