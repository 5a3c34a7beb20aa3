"""One conversation, turn by turn: what the speaker may say next, given what was said and done before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from tools.demo_model import talk, templates, words
from tools.demo_model.wording import Wording, clause, duration, is_plural
from tools.demo_model.world import (
    DEFAULT_REL,
    USER,
    Intent,
    Place,
    State,
    Step,
    ask,
    named,
    plan_text,
    refusal_of,
    refuse,
    say,
    steps_of,
    to_json,
)  # fmt: skip

Turn = tuple[str, str, str, str]  # role, what is said, the answer, the category
_KINDS = {
    "fetch": 17, "put": 14, "go": 9, "go.p": 3, "find": 5, "pick": 5, "open": 4, "close": 4, "turn_on": 4, "turn_off": 4, "clean": 4,
    "check": 3, "check_do": 4, "check_tell": 2, "tell": 8, "wait": 6, "follow": 3,
}  # fmt: skip
_CHECKS = ("check", "check_do", "check_tell")
_FIXTURES = {"open": words.OPENABLE, "close": words.OPENABLE, "turn_on": words.DEVICES, "turn_off": words.DEVICES, "clean": words.CLEANABLE}
_RELATION = {"on": "on", "in": "in", "near": "next to", "under": "under"}
_LATER_JOINERS = tuple(joiner for joiner in templates.JOINERS if "{a}" in joiner[:4])
NOTHING: frozenset[str] = frozenset()


class Dialogue:
    """``keys`` collects the combinations of the current turn; ``ended`` is set when nothing sensible can follow."""

    def __init__(self, rng: Random, wording: Wording, robot_name: str, rooms: tuple[str, ...]) -> None:
        self.rng, self.wording = rng, wording
        self.robot_name, self.rooms = robot_name, rooms
        self.state = State()
        self.before = State()  # the state before the last command
        self.keys: list[str] = []
        self.people: set[str] = set()
        self.single: Intent | None = None  # the last command, if it was one intent and was planned
        self.last_steps: list[Step] = []
        self.pending: tuple[Intent, str] | None = None  # what was asked back: the intent and its missing field
        self.turns = 0
        self.ended = False

    def turn(self) -> Turn:
        self.turns += 1
        if self.pending is not None and self.rng.random() < 0.85:
            return self._answer_question()
        self.pending = None
        if self.turns == 1:
            return self._weighted(
                {self._command: 50, self._several: 28, self._delayed: 4, self._talk: 8, self._refusal: 12, self._open_question: 9}
            )
        options: dict[Callable[[], Turn | None], int] = {
            self._command: 14, self._reference: 40, self._several: 12, self._talk: 6, self._refusal: 5, self._ask_state: 9,
            self._put_back: 10, self._same: 7, self._correct: 8, self._again: 4, self._stop: 3, self._failure: 3,
        }  # fmt: skip
        return self._weighted(options)

    def _weighted(self, options: dict[Callable[[], Turn | None], int]) -> Turn:
        while True:
            self.keys.clear()
            self.wording.hits = 0
            self.wording.reserved.clear()
            chosen = self.rng.choices(list(options), weights=list(options.values()))[0]
            turn = chosen()
            if turn is not None:
                return turn

    # -- intents -----------------------------------------------------------------------------------------------------

    def _room(self) -> str:
        if self.rooms and self.rng.random() < 0.8:
            return self.rng.choice(self.rooms)
        return self.wording.invented() if not self.rooms and self.rng.random() < 0.06 else self.rng.choice(words.ROOMS)

    def _any_place(self) -> Place:
        return self.wording.place(("room", "room", "room", "surface", "surface", "container", "closed", "new"), self._room())

    def _source(self) -> tuple[Place, str]:
        place = self.wording.place(("room", "room", "surface", "surface", "closed", "container", "new"), self._room())
        return place, self._relation(place)

    def _relation(self, place: Place) -> str:
        return self.rng.choice(("on", "in")) if place.kind == "new" else DEFAULT_REL[place.kind]

    def _destination(self) -> tuple[Place, str]:
        place = self.wording.place(("surface", "surface", "surface", "closed", "closed", "container", "room", "new"), self._room())
        rel = self._relation(place)
        if place.kind != "room" and self.rng.random() < 0.15:
            rel = self.rng.choice(("near", "under"))
        return place, rel

    def _person(self) -> str:
        person = self.wording.person()
        self.people.add(person)
        return person

    def _new_object(self) -> str:
        while True:
            obj = self.wording.object()
            if obj not in self.state.held and obj not in self.state.location:
                return obj

    def _intent(self, kind: str = "") -> Intent:
        """A new intent with new arguments."""
        rng = self.rng
        kind = kind or rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
        if kind in ("fetch", "put", "pick", "find"):
            return self._transport(kind)
        if kind in _FIXTURES:
            return Intent(kind, obj=self._fixture(_FIXTURES[kind]), dest=self._fixture_room())
        if kind in _CHECKS:
            doors = rng.random() < 0.5
            intent = Intent(kind, obj=self._fixture(words.OPENABLE if doors else words.DEVICES), dest=self._fixture_room(),
                            value=rng.choice(("open", "closed") if doors else ("on", "off")))  # fmt: skip
            person = USER if rng.random() < 0.4 else self._person()
            return replace(intent, person=person) if kind == "check_tell" else intent
        if kind == "go":
            return Intent("go", dest=self._any_place())
        if kind == "go.p":
            return Intent("go", person=USER if rng.random() < 0.3 else self._person())
        if kind == "follow":
            return Intent("follow", person=USER if rng.random() < 0.35 else self._person())
        if kind == "wait":
            text, seconds = duration(rng)
            return Intent("wait", text=text, seconds=seconds)
        if kind == "stop":
            return Intent("stop")
        return self._message()

    def _transport(self, kind: str) -> Intent:
        rng = self.rng
        if kind != "find" and rng.random() < 0.05:
            obj = rng.choice(words.HEAVY + words.LIVING)
            also = ""
        else:
            obj = self._new_object()
            also = self._new_object() if rng.random() < 0.1 else ""
            also = "" if also == obj else also
        intent = Intent(kind, obj=obj, also=also)
        if rng.random() < (0.4 if kind != "put" else 0.25):
            source, rel = self._source()
            intent = replace(intent, source=source, source_rel=rel)
        if kind == "put":
            dest, rel = self._destination()
            dest = replace(dest, room="") if intent.source else dest  # "from the box in the hall in the bag" is enough
            if obj in words.LIVING and rng.random() < 0.5:
                dest, rel = Place(rng.choice(words.HURTING), "closed"), "in"
            return replace(intent, dest=dest, rel=rel)
        if kind == "fetch":
            return replace(intent, person=USER if rng.random() < 0.6 else self._person())
        return intent

    def _fixture(self, options: tuple[str, ...]) -> str:
        rng, roll = self.rng, self.rng.random()
        name = self.wording.invented() if roll < 0.12 else rng.choice(options)
        return f"{rng.choice(words.ADJECTIVES)} {name}" if rng.random() < 0.08 else name

    def _fixture_room(self) -> Place | None:
        return Place(self._room(), "room") if self.rng.random() < 0.3 else None

    def _message(self) -> Intent:
        roll, wording = self.rng.random(), self.wording
        if roll < 0.35:
            return Intent("tell", text=wording.message())
        person = self._person()
        if roll < 0.5:
            return Intent("tell", person=person, text=f"please {wording.request()}", value="to")
        if roll < 0.6:
            told, asked = wording.question()
            return Intent("tell", person=person, text=asked, value=told)
        return Intent("tell", person=person, text=wording.message())

    # -- commands ----------------------------------------------------------------------------------------------------

    def _plan(self, intents: list[Intent]) -> tuple[str, bool]:
        """The answer and whether it is a plan; a refused command changes nothing."""
        self.keys += [intent.key for intent in intents if intent.has_arguments]
        self.before, state = self.state, self.state.copy()
        steps: list[Step] = []
        for intent in intents:
            reason = refusal_of(intent, self.rooms)
            if reason:
                self.single = None
                return refuse(reason), False
            steps += steps_of(intent, state)
        self.state = state
        self.single = intents[0] if len(intents) == 1 else None
        self.last_steps = steps
        return plan_text(steps), True

    def _wrap(self, text: str) -> str:
        """Politeness around one or more clauses; a whole sentence stays as it is."""
        if text.startswith(">"):
            text = text[1:]
            question = text.startswith(("is ", "did ", "may ", "can ", "could ", "would ", "have ", "where "))
            return self.wording.finish(text, question=question and "? " not in text)
        wrapper = self.wording.choose(templates.WRAPPERS) if self.rng.random() < 0.6 else "{c}"
        wrapper = self.wording.typo(wrapper, 0.03)
        question = any(word in wrapper for word in ("could you", "can you", "would you", "would it", "good if"))
        return self.wording.finish(wrapper.format(c=text), question=question)

    def _said(self, intents: list[Intent], text: str, category: str) -> Turn:
        answer, planned = self._plan(intents)
        return "user", self._wrap(text), answer, category if planned else "refusal"

    def _category(self, intent: Intent) -> str:
        if self.rooms:
            return "known rooms"
        if intent.kind in _CHECKS:
            return "condition"
        return {"wait": "waiting", "tell": "message"}.get(intent.kind, "one task")

    def _command(self) -> Turn:
        intent = self._intent()
        return self._said([intent], clause(self.wording, intent, NOTHING, joinable=False), self._category(intent))

    def _delayed(self) -> Turn | None:
        wait, intent = self._intent("wait"), self._intent()
        if intent.kind == "wait":
            return None
        text = clause(self.wording, intent, NOTHING, joinable=True)
        template = self.wording.choose(templates.DELAYS)
        return self._said([wait, intent], template.format(n=wait.text, c=text), "waiting")

    def _several(self) -> Turn | None:
        """Two to four intents in one command, later ones with "it", "there", "him" where that is clear."""
        rng = self.rng
        count = rng.choice((2, 2, 2, 3, 3, 4))
        if count == 2 and rng.random() < 0.2:
            first, second = self._intent(), self._intent()
            if first.kind in _CHECKS or second.kind in _CHECKS:
                return None
            texts = [clause(self.wording, intent, NOTHING, joinable=True) for intent in (first, second)]
            text = self.wording.choose(templates.REVERSED_JOINERS).format(a=texts[0], b=texts[1])
            return self._said([first, second], text, "several tasks")
        saved, state, referred = self.state, self.state.copy(), False
        intents, text = [], ""
        for i in range(count):
            self.state = state
            intent, refs = self._referring(0.5 if i else 0.0)
            if intent.kind in _CHECKS and i < count - 1 or (i and intent.kind == "wait" and intents[-1].kind == "wait"):
                intent, refs = self._intent("go"), NOTHING
            said = clause(self.wording, intent, refs, joinable=True)
            referred = referred or bool(refs)
            if refusal_of(intent, self.rooms) == "":
                steps_of(intent, state)
            joiners = templates.JOINERS if i == 1 else _LATER_JOINERS
            text = said if not text else self.wording.choose(joiners).format(a=text, b=said)
            intents.append(intent)
            if intent.kind in ("fetch", "put", "drop"):  # "bring the cup and put it on the table" is one task
                state.it = ()
        self.state = saved
        return self._said(intents, text, "several tasks, it and there" if referred else "several tasks")

    def _reference(self) -> Turn | None:
        """A command that needs what was said in an earlier turn."""
        intent, refs = self._referring(1.0)
        if not refs:
            return None
        return self._said([intent], clause(self.wording, intent, refs, joinable=False), "refers to an earlier turn")

    def _referring(self, probability: float) -> tuple[Intent, frozenset[str]]:
        """An intent and the references it is said with; a new intent where none is possible."""
        if self.rng.random() >= probability:
            return self._intent(), NOTHING
        state, options = self.state, []
        if state.it:
            options += [self._about_object] * 5 if state.it_is_object else [self._about_fixture] * 4
        if state.there is not None and state.there.kind != "new":
            options.append(self._about_place)
        if state.person:
            options.append(self._about_person)
        return self.rng.choice(options)() if options else (self._intent(), NOTHING)

    def _about_object(self) -> tuple[Intent, frozenset[str]]:
        rng, state = self.rng, self.state
        obj, also = (*state.it, "")[:2]
        held = [thing for thing in state.it if thing in state.held]
        intent = Intent("", obj=obj, also=also)
        kind = rng.choice(("fetch", "fetch", "put", "put", "put", "pick" if not held else "put", "drop" if held and held == [obj] else "put"))
        refs = {"it"}
        if kind == "fetch":
            person = USER if rng.random() < 0.5 else self._person()
            if state.person and rng.random() < 0.3:
                person = state.person
                refs.add("him")
            return replace(intent, kind="fetch", person=person), frozenset(refs)
        if kind == "put":
            dest, rel = self._destination()
            if state.there is not None and state.there.kind != "new" and rng.random() < 0.25:
                dest, rel = state.there, DEFAULT_REL[state.there.kind]
                refs.add("there")
            return replace(intent, kind="put", dest=dest, rel=rel), frozenset(refs)
        return replace(intent, kind=kind), frozenset(refs)

    def _about_fixture(self) -> tuple[Intent, frozenset[str]]:
        obj, last = self.state.it[0], self.state.last
        opposite = {"open": "close", "close": "open", "turn_on": "turn_off", "turn_off": "turn_on"}
        kind = opposite.get(last.kind, "clean") if last and last.obj == obj else "clean"
        return Intent(self.rng.choice((kind, kind, "clean")), obj=obj), frozenset({"it"})

    def _about_place(self) -> tuple[Intent, frozenset[str]]:
        place = self.state.there
        if self.rng.random() < 0.3:
            return Intent("go", dest=place), frozenset({"there"})
        rel = DEFAULT_REL[place.kind]
        if self.rng.random() < 0.5:
            intent = Intent("put", obj=self._new_object(), dest=place, rel=rel)
        else:
            intent = Intent(self.rng.choice(("find", "pick")), obj=self._new_object(), source=place, source_rel=rel)
        return intent, frozenset({"there"})

    def _about_person(self) -> tuple[Intent, frozenset[str]]:
        person = self.state.person
        kind = self.rng.choice(("fetch", "fetch", "tell", "follow", "go.p"))
        if kind == "tell":
            return Intent("tell", person=person, text=self.wording.message()), frozenset({"him"})
        if kind == "fetch":
            return replace(self._transport("fetch"), person=person), frozenset({"him"})
        return Intent("go" if kind == "go.p" else kind, person=person), frozenset({"him"})

    # -- turns that lean on the one before ---------------------------------------------------------------------------

    def _put_back(self) -> Turn | None:
        state = self.state
        if len(state.it) != 1 or not state.it_is_object or state.it[0] not in state.origin:
            return None
        obj = state.it[0]
        refs = frozenset({"it"}) if self.rng.random() < 0.7 else NOTHING
        said = "it" if refs and not is_plural(obj) else "them" if refs else self.wording.noun_phrase(obj)
        text = self.wording.choose(templates.CLAUSES["put.back"]).format(o=said)
        if state.origin[obj] is None:
            self.pending, self.single = (Intent("put", obj=obj), "dest"), None
            return "user", self._wrap(text), ask(f"Where should I put {named(obj)}?"), "asks back"
        rel, place = state.origin[obj]
        if place.kind == "new":
            return None
        return self._said([Intent("put", obj=obj, dest=place, rel=rel)], text, "puts back")

    def _same(self) -> Turn | None:
        last = self.single
        if last is None or not last.obj or last.kind in ("drop", *_CHECKS, "clean"):
            return None
        if last.kind in _FIXTURES:
            intent = replace(last, obj=self._fixture(_FIXTURES[last.kind]), dest=None)
        else:
            intent = replace(last, obj=self._new_object(), also="")
        text = self.wording.choose(templates.SAME).format(o=self.wording.noun_phrase(intent.obj))
        answer, planned = self._plan([intent])
        return "user", self.wording.finish(text), answer, "same again" if planned else "refusal"

    def _correct(self) -> Turn | None:
        last = self.single
        if last is None or last.also or last.kind not in ("fetch", "pick", "put", "find", "go", "open", "close", "turn_on", "turn_off"):
            return None
        if last.kind == "go":
            if last.person:
                return None
            intent = replace(last, dest=self._any_place())
            said = self.wording.where(intent.dest)
        else:
            first, _, rest = last.obj.partition(" ")
            if first in words.ADJECTIVES and rest and self.rng.random() < 0.7:
                other = self.rng.choice([word for word in words.ADJECTIVES if word != first])
                intent = replace(last, obj=f"{other} {rest}")
                said = f"the {other} {'ones' if is_plural(rest) else 'one'}"
            else:
                obj = self._fixture(_FIXTURES[last.kind]) if last.kind in _FIXTURES else self._new_object()
                intent = replace(last, obj=obj)
                said = self.wording.noun_phrase(obj)
        text = self.wording.choose(templates.CORRECTION).format(o=said)
        self.state = self.before
        answer, planned = self._plan([intent])
        return "user", self.wording.finish(text), answer, "correction" if planned else "refusal"

    def _again(self) -> Turn | None:
        if self.single is None or self.single.kind not in ("tell", "wait", "clean"):
            return None
        text = self.wording.choose(templates.AGAIN)
        return "user", self._wrap(text), plan_text(self.last_steps), "same again"

    def _stop(self) -> Turn:
        intent = self._intent("stop")
        answer, _ = self._plan([intent])
        return "user", self.wording.finish(self.wording.choose(templates.CLAUSES["stop"])), answer, "one task"

    def _failure(self) -> Turn | None:
        """A tool message: a step of the last plan failed; the robot says so."""
        said = {"find": "find", "pick": "pick up", "open": "open", "close": "close", "turn_on": "turn on", "turn_off": "turn off"}
        steps = [step for step in self.last_steps if step["do"] in said]
        if not steps or self.single is None:
            return None
        step, self.ended = self.rng.choice(steps), True
        answer = say(f"I could not {said[step['do']]} {named(step['object'])}.")
        return "tool", to_json({"failed": step}), answer, "failed step"

    def _ask_state(self) -> Turn | None:
        """Where are you, what are you holding, where is the cup."""
        state, choose = self.state, self.wording.choose
        kind = self.rng.choice(("where", "hold", "thing", "thing"))
        self.single = None
        if kind == "where":
            if state.at:
                at = "you" if state.at == USER else state.at if state.at in self.people else f"the {state.at}"
                answer = f"I am {'with' if state.at == USER or state.at in self.people else 'at'} {at}."
            elif state.near:
                answer = f"I am near {named(state.near)}."
            else:
                return None
            text = choose(talk.WHERE_QUESTIONS)
        elif kind == "hold":
            answer = f"I am holding {' and '.join(map(named, state.held))}." if state.held else "I am not holding anything."
            text = choose(talk.HOLD_QUESTIONS)
        else:
            things = [*state.held, *(thing for thing, (rel, _) in state.location.items() if rel)]
            if not things:
                return None
            obj = self.rng.choice(things)
            phrase = f"the {obj}" if "'s " not in obj else obj
            text = choose(talk.THING_QUESTIONS).format(o="it" if state.it == (obj,) and not is_plural(obj) else phrase)
            answer = self._whereabouts(obj)
        return "user", self.wording.finish(text, question=True), say(answer), "state question"

    def _whereabouts(self, obj: str) -> str:
        if obj in self.state.held:
            return f"I am holding {named(obj)}."
        rel, place = self.state.location[obj]
        if place.kind == "person":
            return f"I gave {named(obj)} to {'you' if place.name == USER else place.name}."
        verb = "are" if is_plural(obj) else "is"
        thing = named(obj)
        thing = thing[0].upper() + thing[1:] if thing.startswith("the ") else thing
        return f"{thing} {verb} {_RELATION[rel]} the {place.name}."

    # -- talk, refusals, questions -----------------------------------------------------------------------------------

    def _talk(self) -> Turn:
        self.single = None
        if self.rng.random() < 0.2:
            answer = f"I am {self.robot_name}." if self.robot_name else talk.NO_NAME
            return "user", self._sentence(talk.NAME_QUESTIONS), say(answer), "talk"
        sentences, answer = self.rng.choice(talk.TALK)
        return "user", self._sentence(sentences), say(answer), "talk"

    def _sentence(self, sentences: tuple[str, ...]) -> str:
        text = self.wording.typo(self.wording.choose(sentences), 0.04)
        question = text.startswith(("what", "who", "how", "are", "can", "do ", "will", "where", "when", "which"))
        return self.wording.finish(text, question=question)

    def _refusal(self) -> Turn:
        self.single = None
        sentences, options, reason = self.rng.choice(talk.REFUSALS)
        text = self.wording.typo(self.wording.choose(sentences), 0.03)
        if "{x}" in text:
            text = text.format(x=self._refusal_word(self.rng.choice(options), reason))
        if text.startswith(("what", "who", "when", "how", "will", "why", "do ", "is ")):
            return "user", self.wording.finish(text, question=True), refuse(reason), "refusal"
        if self.rng.random() < 0.15:
            intent = self._intent()
            if intent.kind not in _CHECKS:
                self.keys.append(intent.key)
                parts = [clause(self.wording, intent, NOTHING, joinable=True), text.removeprefix("I want you to ")]
                self.rng.shuffle(parts)
                text = self.wording.choose(templates.JOINERS).format(a=parts[0], b=parts[1])
        return "user", self._wrap(text if not text.startswith("I want") else f">{text}"), refuse(reason), "refusal"

    def _refusal_word(self, word: str, reason: str) -> str:
        if word == "<person>":
            word = self.wording.person_phrase(self.wording.person())
        elif word == "<object>":
            word = self.wording.noun_phrase(self.wording.object())
        elif word == "<thing>":
            word = self.wording.noun_phrase(self.wording.object()).replace("the ", "some ", 1)
        self.keys.append(f"refuse {reason} {word}")
        return word

    def _open_question(self) -> Turn:
        """A command that leaves something open: the robot asks."""
        if self.rng.random() < 0.2:
            if self.rng.random() < 0.5:
                text = " ".join(self.wording.invented() for _ in range(self.rng.randint(1, 5)))
            else:
                text = self.wording.choose(talk.VAGUE)
            return "user", self.wording.finish(text), ask(talk.DO_NOT_UNDERSTAND), "asks back"
        sentences, question, (kind, missing) = self.rng.choice(talk.OPEN_QUESTIONS)
        intent = Intent(kind, person=USER if kind == "fetch" and missing != "person" else "")
        text = self.wording.choose(sentences)
        if "{o}" in text:
            intent = replace(intent, obj=self._new_object())
            self.keys.append(f"ask {kind} {intent.obj}")
            text = text.format(o=self.wording.noun_phrase(intent.obj))
            question = question.format(o=named(intent.obj))
        self.pending = (intent, missing)
        return "user", self._wrap(text), ask(question), "asks back"

    def _answer_question(self) -> Turn:
        """The speaker fills in what the robot asked for."""
        (intent, missing), self.pending = self.pending, None
        wording = self.wording
        if missing == "obj":
            obj = self._fixture(_FIXTURES[intent.kind]) if intent.kind in _FIXTURES else self._new_object()
            intent = replace(intent, obj=obj)
            text = wording.choose(templates.ANSWER_OBJECT).format(o=wording.noun_phrase(obj))
        elif missing == "dest":
            place, rel = self._destination() if intent.kind == "put" else (self._any_place(), "")
            intent = replace(intent, dest=place, rel=rel)
            said = wording.toward(rel, place) if rel else f"to {wording.where(place)}"
            text = wording.choose(templates.ANSWER_PLACE if rel else ("{d}", "{d}, please", "~{d} please")).format(d=said)
        elif missing == "seconds":
            said, seconds = duration(self.rng)
            intent = replace(intent, text=said, seconds=seconds)
            text = wording.choose(templates.ANSWER_DURATION).format(n=said)
        else:
            intent = replace(intent, person=self._person())
            text = wording.choose(templates.ANSWER_PERSON).format(p=wording.person_phrase(intent.person))
        answer, planned = self._plan([intent])
        return "user", wording.finish(text), answer, "answers a question" if planned else "refusal"
