"""One conversation, turn by turn: what the speaker may say next, given what was said and done before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from tools.demo_model import talk, templates, words
from tools.demo_model.commands import NOTHING, Commands, Turn
from tools.demo_model.sampler import CHECKS, FIXTURES
from tools.demo_model.wording import Wording, clause, duration, is_plural
from tools.demo_model.world import USER, Intent, ask, named, plan_text, refuse, say, to_json

_RELATION = {"on": "on", "in": "in", "near": "next to", "under": "under"}


class Dialogue(Commands):
    """A conversation. ``ended`` is set when nothing sensible can follow."""

    def __init__(self, rng: Random, wording: Wording, robot_name: str, rooms: tuple[str, ...]) -> None:
        super().__init__(rng, wording, rooms)
        self.robot_name = robot_name
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
        if last is None or not last.obj or last.kind in ("drop", *CHECKS, "clean"):
            return None
        if last.kind in FIXTURES:
            intent = replace(last, obj=self.new.fixture(FIXTURES[last.kind]), dest=None)
        else:
            intent = replace(last, obj=self.new.new_object(), also="")
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
            intent = replace(last, dest=self.new.any_place())
            said = self.wording.where(intent.dest)
        else:
            first, _, rest = last.obj.partition(" ")
            if first in words.ADJECTIVES and rest and self.rng.random() < 0.7:
                other = self.rng.choice([word for word in words.ADJECTIVES if word != first])
                intent = replace(last, obj=f"{other} {rest}")
                said = f"the {other} {'ones' if is_plural(rest) else 'one'}"
            else:
                obj = self.new.fixture(FIXTURES[last.kind]) if last.kind in FIXTURES else self.new.new_object()
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
        intent = self.new.intent("stop")
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
        """Return a turn that asks for the state: where are you, what are you holding, where is the cup."""
        state, choose = self.state, self.wording.choose
        kind = self.rng.choice(("where", "hold", "thing", "thing"))
        self.single = None
        if kind == "where":
            if state.at:
                at = "you" if state.at == USER else state.at if state.at in self.new.people else f"the {state.at}"
                answer = f"I am {'with' if state.at == USER or state.at in self.new.people else 'at'} {at}."
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
            intent = self.new.intent()
            if intent.kind not in CHECKS:
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
            intent = replace(intent, obj=self.new.new_object())
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
            obj = self.new.fixture(FIXTURES[intent.kind]) if intent.kind in FIXTURES else self.new.new_object()
            intent = replace(intent, obj=obj)
            text = wording.choose(templates.ANSWER_OBJECT).format(o=wording.noun_phrase(obj))
        elif missing == "dest":
            place, rel = self.new.destination() if intent.kind == "put" else (self.new.any_place(), "")
            intent = replace(intent, dest=place, rel=rel)
            said = wording.toward(rel, place) if rel else f"to {wording.where(place)}"
            text = wording.choose(templates.ANSWER_PLACE if rel else ("{d}", "{d}, please", "~{d} please")).format(d=said)
        elif missing == "seconds":
            said, seconds = duration(self.rng)
            intent = replace(intent, text=said, seconds=seconds)
            text = wording.choose(templates.ANSWER_DURATION).format(n=said)
        else:
            intent = replace(intent, person=self.new.person())
            text = wording.choose(templates.ANSWER_PERSON).format(p=wording.person_phrase(intent.person))
        answer, planned = self._plan([intent])
        return "user", wording.finish(text), answer, "answers a question" if planned else "refusal"
