"""From words and intents to what somebody would type: noun phrases, durations, messages, templates, typing errors."""

from __future__ import annotations

import functools
import re
from random import Random

from tools.demo_model import templates, words
from tools.demo_model.world import DEFAULT_REL, USER, Intent, Place

_PREPOSITIONS = {
    "on": ("on", "on", "on", "onto", "on top of"),
    "in": ("in", "in", "in", "into", "inside"),
    "near": ("next to", "beside", "near", "by"),
    "under": ("under", "under", "below", "underneath", "beneath"),
}
_WAYS_IN = ("{0} in the {1}", "{0} of the {1}")
_NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen").split()
_TENS = "0 10 twenty thirty forty fifty sixty".split()
_FEMALE = frozenset(name.lower() for name in words.FEMALE + words.FEMALE_KIN)
_MALE = frozenset(name.lower() for name in words.MALE + words.MALE_KIN)
_FACTS = ("{o} is ready", "{o} is broken", "dinner is ready", "lunch is ready", "breakfast is on the table", "the taxi is here",
          "the doctor is here", "it is time to go", "it is late", "the meeting starts at {h}", "dinner is at {h}", "we leave at {h}",
          "the guests are coming", "someone is at the door", "{o} is empty", "{o} is on the {l}", "the {l} is clean", "the bath is ready",
          "the movie starts in {k} minutes", "the package has arrived", "there are {k} guests in the {l}", "the water is boiling",
          "everything is fine", "I will be late", "I am in the {l}", "I need help", "I love you", "it is {p}'s birthday",
          "{p} is waiting in the {l}", "{p} called", "{p} has {o}", "the {l} is too cold", "happy birthday", "welcome home",
          "good morning", "good night", "hello", "hello {p}", "see you tomorrow", "{o} was found", "no one is home", "the shop closes at {h}",
          "we are out of milk", "the dog needs a walk", "the cake is in the {l}", "{p} is here", "where are you", "how are you",
          "what do you want for dinner?", "do you need {o}?", "watch out!", "come quickly!", "the train leaves at {h}", "I forgot {o}")
_REQUESTS = ("come here", "come to the {l}", "bring {o}", "clean the {l}", "wait", "hurry up", "wake up", "go to bed", "call {p}", "be quiet",
             "open the door", "wash your hands", "help me", "come down", "set the table", "take {o}", "feed the cat", "walk the dog",
             "turn the music down", "get ready", "look for {o}", "meet me in the {l}", "wait in the {l}", "give me {o}", "call me")
_QUESTIONS = (("wants {o}", "do you want {o}"), ("needs {o}", "do you need {o}"), ("is hungry", "are you hungry"), ("is ready", "are you ready"),
              ("likes {o}", "do you like {o}"), ("is coming", "are you coming"), ("has {o}", "do you have {o}"), ("is ok", "are you ok"),
              ("needs help", "do you need help"), ("wants to eat", "do you want to eat"), ("is in the {l}", "are you in the {l}"),
              ("is thirsty", "are you thirsty"), ("wants to go for a walk", "do you want to go for a walk"))


_AGREEMENT = (("{o} is", "{o} are"), ("{o} belongs", "{o} belong"), ("{o} goes", "{o} go"), ("so it is", "so they are"),
              (" it {", " them {"), ("bring it to", "bring them to"), ("look for it", "look for them"), ("find it", "find them"),
              ("need it", "need them"), ("clean it", "clean them"), ("{c} it", "{c} them"), ("if it is", "if they are"),
              ("in case it is", "in case they are"), ("where it was", "where they were"), ("its place", "their place"))  # fmt: skip


@functools.lru_cache(maxsize=64)
def _with_pronoun(options: tuple[str, ...]) -> tuple[str, ...]:
    """The templates that take "it" as their object: not "pick up it", "give her it"."""
    return tuple(t for t in options if not re.search(r"(?:\b(?:up|down|on|off|over|me|pull open)|\{p\}) \{o\}", t))


@functools.lru_cache(maxsize=512)
def _parts(options: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (
        tuple(option for option in options if not option.startswith("~")),
        tuple(option[1:] for option in options if option.startswith("~")),
    )


def number(value: int, rng: Random) -> str:
    """``value`` (0 to 69) in digits or words."""
    if rng.random() < 0.5:
        return str(value)
    if value < 20:
        return _NUMBERS[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens] + (f"-{_NUMBERS[ones]}" if ones else "")


def duration(rng: Random) -> tuple[str, int]:
    """A span of time and its seconds."""
    roll = rng.random()
    if roll < 0.12:
        return rng.choice((
            ("half a minute", 30), ("a minute", 60), ("one minute", 60), ("a second", 1), ("half an hour", 1800), ("an hour", 3600),
            ("a quarter of an hour", 900), ("a minute and a half", 90), ("an hour and a half", 5400), ("one and a half minutes", 90),
            ("two and a half minutes", 150), ("three quarters of an hour", 2700), ("two and a half hours", 9000),
        ))  # fmt: skip
    if roll < 0.24:
        minutes, seconds = rng.randint(1, 10), rng.choice((5, 10, 15, 20, 30, 40, 45, 50))
        joint = rng.choice((" and ", " "))
        minute = "minute" if minutes == 1 else "minutes"
        return f"{number(minutes, rng)} {minute}{joint}{number(seconds, rng)} seconds", 60 * minutes + seconds
    unit, scale, most = rng.choice((("second", 1, 60), ("second", 1, 60), ("minute", 60, 60), ("minute", 60, 60), ("hour", 3600, 12)))
    count = rng.randint(1, most) if rng.random() < 0.6 else rng.choice((1, 2, 3, 5, 10))
    if rng.random() < 0.12 and scale < 3600:
        return f"{count} {unit[:3]}", count * scale
    if rng.random() < 0.06 and scale < 3600:
        return f"{count}{unit[0]}" if scale == 1 else f"{count}min", count * scale
    return f"{number(count, rng)} {unit}{'' if count == 1 else 's'}", count * scale


class Wording:
    """Words for one conversation. ``lower``: all of it is typed in lower case.

    While ``mode`` is "template" or "words", held-out templates or words are chosen often; ``hits`` counts the
    templates and ``reserved`` lists the words.
    """

    def __init__(self, rng: Random, lower: bool) -> None:
        self.rng = rng
        self.lower = lower
        self.mode = ""
        self.hits = 0
        self.reserved: list[str] = []  # the reserved words chosen
        self.typos = 0

    def choose(self, options: tuple[str, ...], *, joinable: bool = False) -> str:
        """One template; held-out ones only in mode "template"."""
        known, held_out = _parts(options)
        if joinable:
            known, held_out = (tuple(t for t in part if not t.startswith(">")) for part in (known, held_out))
        if held_out and self.mode == "template" and self.rng.random() < 0.6:
            self.hits += 1
            return self.rng.choice(held_out)
        return self.rng.choice(known)

    def word(self, options: tuple[str, ...]) -> str:
        """One word of an open class; a reserved one only in mode "words"."""
        held_out = self.mode == "words" and self.rng.random() < 0.6
        word = words.pick(self.rng, options, held_out=held_out)
        if held_out:
            self.reserved.append(word)
        return self._case(word)

    def invented(self, *, name: bool = False) -> str:
        held_out = self.mode == "words" and self.rng.random() < 0.6
        word = words.made_up(self.rng, held_out=held_out)
        if held_out:
            self.reserved.append(word)
        return self._case(word.capitalize() if name else word)

    def _case(self, text: str) -> str:
        return text.lower() if self.lower else text

    def object(self) -> str:
        """An object as the plan names it: no article."""
        rng, roll = self.rng, self.rng.random()
        if roll < 0.66:
            noun = self.word(words.OBJECTS)
        elif roll < 0.92:
            noun = self.invented()
        else:
            noun = f"{self.invented()} {self.word(words.OBJECTS)}"
        roll = rng.random()
        if roll < 0.30:
            return f"{rng.choice(words.ADJECTIVES)} {noun}"
        if roll < 0.35:
            return f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.COLOURS)} {noun}"
        if roll < 0.41:
            return f"{self.name()}'s {noun}"
        return noun

    def name(self) -> str:
        if self.rng.random() < 0.3:
            return self.invented(name=True)
        return self.word(words.FEMALE + words.MALE)

    def person(self) -> str:
        roll = self.rng.random()
        if roll < 0.72:
            return self.name()
        return self.rng.choice(words.FEMALE_KIN + words.MALE_KIN if roll < 0.92 else words.ROLES)

    def place(self, kinds: tuple[str, ...], room: str, *, in_room: float = 0.2) -> Place:
        """A place of one of ``kinds``; furniture is in ``room`` with probability ``in_room``."""
        rng = self.rng
        kind = rng.choice(kinds)
        if kind == "room":
            return Place(room, "room")
        options = {"surface": words.SURFACES, "container": words.CONTAINERS, "closed": words.CLOSED}
        name = self.invented() if kind == "new" else rng.choice(options[kind])
        if kind in ("surface", "new") and rng.random() < 0.1:
            name = f"{rng.choice(words.ADJECTIVES)} {name}"
        return Place(name, kind, room if rng.random() < in_room else "")

    def noun_phrase(self, obj: str) -> str:
        if "'s " in obj:
            return obj
        roll = self.rng.random()
        if roll < 0.78 or obj in words.HEAVY:
            return f"the {obj}"
        if roll < 0.94 or obj in words.PLURALS or obj.split()[-1] in words.PLURALS:
            return f"{self.rng.choice(('my', 'that', 'the', 'our') if not is_plural(obj) else ('my', 'those', 'our'))} {obj}"
        return f"{'an' if obj[0] in 'aeiou' else 'a'} {obj}"

    def where(self, place: Place) -> str:
        """A place as a noun phrase: "the table in the kitchen"."""
        name = place.name if place.kind == "new" else self.typo(place.name, 0.015)
        if place.room:
            return f"the {name} in the {place.room}"
        return f"the {name}"

    def toward(self, rel: str, place: Place) -> str:
        return f"{self.rng.choice(_PREPOSITIONS[rel])} {self.where(place)}"

    def out_of(self, rel: str, place: Place) -> str:
        ways = ["from", "from", "from"]
        if rel == "on":
            ways.append("off")
        elif rel == "in" and place.kind != "room":
            ways.append("out of")
        return f"{self.rng.choice(ways)} {self.where(place)}"

    def person_phrase(self, person: str) -> str:
        if person == USER:
            return "me"
        if person in words.ROLES:
            return f"the {person}"
        if person in words.FEMALE_KIN + words.MALE_KIN and (person not in ("mom", "dad", "grandma", "grandpa") or self.rng.random() < 0.3):
            return f"{self.rng.choice(('my', 'my', 'our'))} {person}"
        return person

    def message(self) -> str:
        """Return what somebody should be told; it is copied into the plan as it is typed."""
        rng = self.rng
        if rng.random() < 0.25:
            source = [*words.OBJECTS, *words.ROOMS, *words.ADJECTIVES, *_NUMBERS, *_REQUESTS[:16:3]]
            some = [self.invented() if rng.random() < 0.3 else rng.choice(source) for _ in range(rng.randint(1, 6))]
            return self._case(self._fill(" ".join(some)) + rng.choice(("", "", "", "!", "?")))
        return self._case(self._fill(rng.choice(_FACTS)))

    def request(self) -> str:
        return self._case(self._fill(self.rng.choice(_REQUESTS)))

    def question(self) -> tuple[str, str]:
        """("wants the cup", "do you want the cup")."""
        told, asked = self.rng.choice(_QUESTIONS)
        values = self._values()
        return self._case(told.format(**values)), self._case(asked.format(**values))

    def _values(self) -> dict[str, str]:
        hour = f"{self.rng.randint(1, 12)}" + self.rng.choice((" o'clock", ":30", " pm", ":15", ""))
        place = self.rng.choice(words.ROOMS)
        return {"o": f"the {self.word(words.OBJECTS)}", "l": place, "h": hour, "p": self.name(), "k": number(self.rng.randint(2, 40), self.rng)}

    def _fill(self, text: str) -> str:
        return text.format(**self._values()) if "{" in text else text

    def typo(self, text: str, probability: float) -> str:
        """``text``, with one typing error in one of its longer words."""
        if self.rng.random() >= probability:
            return text
        spans = [m.span() for m in re.finditer(r"(?<![{\w'])[A-Za-z]{4,}(?![}\w'])", text)]
        if not spans:
            return text
        start, end = self.rng.choice(spans)
        word, i = text[start:end], self.rng.randrange(1, end - start - 1)
        roll = self.rng.random()
        if roll < 0.4:
            word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        elif roll < 0.7:
            word = word[:i] + word[i + 1 :]
        elif roll < 0.85:
            word = word[:i] + word[i] + word[i:]
        else:
            word = word[:i] + self.rng.choice("abcdefghijklmnopqrstuvwxyz") + word[i + 1 :]
        self.typos += 1
        return text[:start] + word + text[end:]

    def finish(self, text: str, *, question: bool = False) -> str:
        """Capital letter and full stop, or the lack of them."""
        rng = self.rng
        if self.lower:
            return text.lower() + ("" if rng.random() < 0.85 else rng.choice((".", "?" if question else "!")))
        if rng.random() < 0.9:
            text = text[0].upper() + text[1:]
            text = re.sub(r"([.?] )(then|after|next|when|afterwards|bring|come|i\b)", lambda m: m[1] + m[2].capitalize(), text)
        if text[-1] in "?!.\"'":
            return text
        roll = rng.random()
        if question:
            return text + ("?" if roll < 0.8 else "")
        return text + ("." if roll < 0.55 else "!" if roll < 0.62 else "")


def is_plural(obj: str) -> bool:
    return obj in words.PLURALS or obj.split()[-1] in words.PLURALS


def pronoun_of(person: str, rng: Random) -> str:
    """him or her; either, where the name does not tell."""
    if person.lower() in _FEMALE:
        return "her"
    return "him" if person.lower() in _MALE else rng.choice(("him", "her"))


def clause(wording: Wording, intent: Intent, refs: frozenset[str], *, joinable: bool) -> str:
    """``intent`` in words. ``refs``: which of it, there, him are said instead of the thing, place or person.

    A result that starts with ``>`` is a whole sentence.
    """
    name = _template_name(intent, refs)
    if name == "put" and "there" not in refs and intent.rel == DEFAULT_REL[intent.dest.kind] and wording.rng.random() < 0.2:
        name = "put.to"
    plural = bool(intent.also) or bool(intent.obj) and is_plural(intent.obj)
    options = templates.CLAUSES[name]
    template = wording.choose(_with_pronoun(options) if "it" in refs else options, joinable=joinable)
    if plural:
        for singular, many in _AGREEMENT:
            template = template.replace(singular, many)
    slots: dict[str, str] = {"w": "", "v": intent.value, "t": intent.text, "n": intent.text}
    if intent.obj:
        if "it" in refs:
            slots["o"] = "them" if plural else "it"
        else:
            slots["o"] = wording.noun_phrase(intent.obj)
            if intent.also:
                slots["o"] += f" and {wording.noun_phrase(intent.also)}"
    if intent.source:
        slots["s"] = slots["f"] = "there" if "there" in refs else wording.toward(intent.source_rel, intent.source)
        if "there" not in refs:
            slots["s"] = re.sub("^(onto|into) ", lambda m: m[1][:2] + " ", slots["s"])
            slots["f"] = wording.out_of(intent.source_rel, intent.source)
        else:
            slots["f"] = "from there"
    if intent.dest:
        slots["d"] = "there" if "there" in refs else wording.toward(intent.rel or "in", intent.dest)
        slots["l"] = wording.where(intent.dest)
        slots["w"] = f" in the {intent.dest.name}"
    if intent.person:
        slots["p"] = pronoun_of(intent.person, wording.rng) if "him" in refs else wording.person_phrase(intent.person)
    if intent.kind == "check_do":
        slots["c"] = {"open": "close", "closed": "open", "on": "turn off", "off": "turn on"}[intent.value]
    if name == "tell.if":
        slots["x"] = {"her": "she", "him": "he"}[pronoun_of(intent.person, wording.rng)]
        slots["t"] = intent.value
    elif name == "tell.to":
        slots["t"] = intent.text.removeprefix("please ")
    elif intent.kind == "tell" and (joinable or intent.text[-1] in "?!" or wording.rng.random() < 0.35):
        # quoted where more may follow, and where the mark at the end belongs to the message
        slots["t"] = f"'{intent.text}'" if "'" not in intent.text and wording.rng.random() < 0.4 else f'"{intent.text}"'
    return wording.typo(template, 0.05).format(**slots)


def _template_name(intent: Intent, refs: frozenset[str]) -> str:
    kind = intent.kind
    if kind == "go":
        if intent.person:
            return "go.me" if intent.person == USER else "go.p"
        return "go.there" if "there" in refs else "go"
    if kind == "follow":
        return "follow.me" if intent.person == USER else "follow"
    if kind == "fetch":
        name = "fetch" if intent.person == USER else "fetch.p"
        return name + (("s" if "." in name else ".s") if intent.source else "")
    if kind == "tell":
        return "say" if not intent.person else "tell" if not intent.value else "tell.to" if intent.value == "to" else "tell.if"
    if kind in ("find", "pick", "put") and intent.source:
        return f"{kind}.s"
    return kind
