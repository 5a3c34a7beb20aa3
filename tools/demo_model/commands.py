"""Commands: one intent or several, with "it", "there" and "him" where the conversation makes them clear."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tools.demo_model import templates
from tools.demo_model.sampler import CHECKS, IntentSampler
from tools.demo_model.wording import Wording, clause
from tools.demo_model.world import DEFAULT_REL, USER, Intent, State, Step, plan_text, refusal_of, refuse, steps_of

Turn = tuple[str, str, str, str]  # role, what is said, the answer, the category
NOTHING: frozenset[str] = frozenset()
_LATER_JOINERS = tuple(joiner for joiner in templates.JOINERS if "{a}" in joiner[:4])


class Commands:
    """``keys`` collects the combinations of the current turn."""

    def __init__(self, rng: Random, wording: Wording, rooms: tuple[str, ...]) -> None:
        self.rng, self.wording, self.rooms = rng, wording, rooms
        self.new = IntentSampler(rng, wording, rooms, lambda obj: obj in self.state.held or obj in self.state.location)
        self.state = State()
        self.before = State()  # the state before the last command
        self.keys: list[str] = []
        self.single: Intent | None = None  # the last command, if it was one intent and was planned
        self.last_steps: list[Step] = []

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
        if intent.kind in CHECKS:
            return "condition"
        return {"wait": "waiting", "tell": "message"}.get(intent.kind, "one task")

    def _command(self) -> Turn:
        intent = self.new.intent()
        return self._said([intent], clause(self.wording, intent, NOTHING, joinable=False), self._category(intent))

    def _delayed(self) -> Turn | None:
        wait, intent = self.new.intent("wait"), self.new.intent()
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
            first, second = self.new.intent(), self.new.intent()
            if first.kind in CHECKS or second.kind in CHECKS:
                return None
            texts = [clause(self.wording, intent, NOTHING, joinable=True) for intent in (first, second)]
            text = self.wording.choose(templates.REVERSED_JOINERS).format(a=texts[0], b=texts[1])
            return self._said([first, second], text, "several tasks")
        saved, state, referred = self.state, self.state.copy(), False
        intents, text = [], ""
        for i in range(count):
            self.state = state
            intent, refs = self._referring(0.5 if i else 0.0)
            if intent.kind in CHECKS and i < count - 1 or (i and intent.kind == "wait" and intents[-1].kind == "wait"):
                intent, refs = self.new.intent("go"), NOTHING
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
            return self.new.intent(), NOTHING
        state, options = self.state, []
        if state.it:
            options += [self._about_object] * 5 if state.it_is_object else [self._about_fixture] * 4
        if state.there is not None and state.there.kind != "new":
            options.append(self._about_place)
        if state.person:
            options.append(self._about_person)
        return self.rng.choice(options)() if options else (self.new.intent(), NOTHING)

    def _about_object(self) -> tuple[Intent, frozenset[str]]:
        rng, state = self.rng, self.state
        obj, also = (*state.it, "")[:2]
        held = [thing for thing in state.it if thing in state.held]
        intent = Intent("", obj=obj, also=also)
        kind = rng.choice(("fetch", "fetch", "put", "put", "put", "pick" if not held else "put", "drop" if held and held == [obj] else "put"))
        refs = {"it"}
        if kind == "fetch":
            person = USER if rng.random() < 0.5 else self.new.person()
            if state.person and rng.random() < 0.3:
                person = state.person
                refs.add("him")
            return replace(intent, kind="fetch", person=person), frozenset(refs)
        if kind == "put":
            dest, rel = self.new.destination()
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
            intent = Intent("put", obj=self.new.new_object(), dest=place, rel=rel)
        else:
            intent = Intent(self.rng.choice(("find", "pick")), obj=self.new.new_object(), source=place, source_rel=rel)
        return intent, frozenset({"there"})

    def _about_person(self) -> tuple[Intent, frozenset[str]]:
        person = self.state.person
        kind = self.rng.choice(("fetch", "fetch", "tell", "follow", "go.p"))
        if kind == "tell":
            return Intent("tell", person=person, text=self.wording.message()), frozenset({"him"})
        if kind == "fetch":
            return replace(self.new.transport("fetch"), person=person), frozenset({"him"})
        return Intent("go" if kind == "go.p" else kind, person=person), frozenset({"him"})
