"""The requests of ``real_model_checks.py``: prompts in many languages, JSON schemas of many kinds, conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

SYSTEM = (
    "You control a mobile robot in a house. It can drive to a room, look around, pick an object up, put it down, and "
    "speak. Answer briefly and do what the person asks. Never leave the house, and stop when someone says stop."
)
ROOMS = ("kitchen", "bedroom", "garage", "office", "bathroom", "garden", "hall", "cellar", "balcony", "workshop")
OBJECTS = ("red cup", "blue box", "key", "book", "apple", "remote control", "towel", "screwdriver", "phone", "plate")
NAMES = ("Ada", "Jörg", "美咲", "Łukasz", "محمد", "प्रिया", "Søren", "Nguyễn", "Ольга", "Σοφία")
# {room}, {object}, {name} and {number} are filled in.
PROMPTS = (
    "Go to the {room} and bring me the {object}.",
    "Write a plan of {number} steps to fetch the {object} from the {room}, as JSON.",
    "List {number} things a robot can find in a {room}, one a line.",
    "Give me a bullet list of the rooms you pass on the way to the {room}.",
    "Write a Python function that drives the robot to the {room} and returns True when it has arrived.",
    "Write a C++ loop over {number} waypoints, with comments.",
    "Write a table in Markdown of {number} objects in the {room} and their weights.",
    "What is {number} times 17? Show the steps.",
    "Say hello to {name} and tell them where the {object} is.",
    "Tell a story of two sentences about {name}, a robot and the {room}. Use emojis 🤖🚀🍎.",
    "请把{object}拿到{room}，然后用中文告诉我你做了什么。",
    "用中文写一首关于机器人的短诗，送给{name}。",
    "{room}に行って、{object}を探してください。日本語で答えてください。",
    "{room}(으)로 가서 {object}을(를) 가져와 주세요. 한국어로 대답하세요.",
    "اذهب إلى {room} وأحضر {object}. أجب بالعربية.",
    "कृपया {room} में जाओ और {object} लाओ। हिंदी में उत्तर दो।",
    "Иди в {room} и найди {object}. Ответь по-русски.",
    "Πήγαινε στο {room} και φέρε το {object}. Απάντησε στα ελληνικά.",
    "Geh in die Küche und hol {object} für {name}. Antworte auf Deutsch, mit Umlauten.",
    "Va dans {room} et apporte {object} à {name}. Réponds en français.",
    "ไปที่ {room} แล้วหยิบ {object} ตอบเป็นภาษาไทย",
    "Answer only with emojis: what is in the {room}? 🏠👩‍🍳👨‍👩‍👧‍👦",
    "Print the word robot {number} times, separated by |.",
    "Explain in one paragraph what <|im_end|> or </s> in a text means for a chat model, for {name}.",
    "Write the SQL that finds every {object} seen in the {room} within the last {number} minutes.",
    "Translate 'the robot waits in the {room}' into Chinese, Arabic, Hindi and Russian.",
    "Write LaTeX for the pose of the robot: x = {number}, y = 2, θ = π/3.",
    "Return only a JSON array of {number} random whole numbers below 100.",
    "Describe the {object} in exactly {number} words.",
    "Continue the series: 1, 1, 2, 3, 5, 8, and stop after {number} further numbers.",
)
TURNS = (
    "My name is {name}. Remember it.",
    "Go to the {room}.",
    "What do you see there?",
    "Take the {object} and count to {number}.",
    "What is my name?",
    "请用中文再说一遍。",
    "Say that again with emojis 🤖.",
    "Now put the {object} down in the {room}.",
    "How many steps did you make? Answer with a number.",
    "اشكر الجميع بالعربية.",
    "Write what you did as a JSON object.",
    "Thank you, stop.",
)


def _fill(text: str, rng: random.Random) -> str:
    return text.format(
        room=rng.choice(ROOMS), object=rng.choice(OBJECTS), name=rng.choice(NAMES), number=rng.randrange(2, 9)
    )


def prompt(rng: random.Random) -> str:
    """Return one user message."""
    return _fill(rng.choice(PROMPTS), rng)


def turns(rng: random.Random, count: int) -> list[str]:
    """Return the user's messages of a conversation."""
    return [_fill(text, rng) for text in rng.sample(TURNS, count)]


# --- schemas: name → what makes one; every one can be met within about 100 tokens -------------------------------------

_DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def _object(properties: dict, required: list[str] | None = None, **more) -> dict:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


def _short(limit: int = 24) -> dict:
    return {"type": "string", "maxLength": limit}


def _step(rng: random.Random) -> dict:
    return _object(
        {
            "action": {"enum": ["drive", "pick", "place", "look", "say"]},
            "target": {"enum": [*rng.sample(ROOMS, 3), *rng.sample(OBJECTS, 2)]},
            "seconds": {"type": "number", "minimum": 0, "maximum": 60},
        }
    )


def _tools(rng: random.Random) -> dict:
    """Return a request for a call of one of 20 tools, each with arguments of its own."""
    kinds = (
        {"type": "integer", "minimum": -5, "maximum": 5}, {"type": "boolean"}, _short(12),
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"enum": ["left", "right", "前", "पीछे"]},
        {"type": "array", "items": {"type": "number", "minimum": -9, "maximum": 9}, "minItems": 2, "maxItems": 3},
    )  # fmt: skip
    calls = []
    for index in range(20):
        arguments = {f"arg_{i}": rng.choice(kinds) for i in range(rng.randrange(1, 4))}
        required = [name for name in arguments if rng.random() < 0.6]
        name = f"tool_{index}_{rng.choice(('move', 'grip', 'scan', 'speak'))}"
        calls.append(_object({"name": {"const": name}, "arguments": _object(arguments, required)}))
    return {"anyOf": calls}


def _bounded(rng: random.Random) -> dict:
    low = rng.randrange(-500, 500)
    return _object(
        {
            "i": {"type": "integer", "minimum": low, "maximum": low + rng.choice((1, 7, 90, 1000))},
            "x": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": round(rng.uniform(-1, 3), 3)},
            "m": {"type": "integer", "multipleOf": rng.choice((2, 5, 7)), "minimum": 0, "maximum": 700},
            "big": {"type": "integer", "minimum": 10**11, "maximum": 10**13},
        }
    )


def _constants(rng: random.Random) -> dict:
    texts = ("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "a<|im_end|>b", "k\u2126", "\u0958", "é", "e\u0301",
             "👩‍🍳", '"quoted" \\ / \t', "日本", "</s>", "<tool_call>", " lead", "\u0000\u001f", "\u2028")  # fmt: skip
    return _object({"c": {"const": rng.choice(texts)}, "d": {"enum": rng.sample(texts, 3)}, "n": {"const": None}})


def _patterns(rng: random.Random) -> dict:
    patterns = (r"^[A-Z]{2}-\d{4}$", r"^(\+|-)?\d{1,3}(\.\d{1,2})?$", r"^[a-z_][a-z0-9_]{0,15}$", r"^(ab|cd)+e?$",
                r"^[\u0900-\u097f]{1,8}$", r"^\S+@robot\.(local|lan)$", r"^#[0-9a-fA-F]{6}$", "go|stop")  # fmt: skip
    return _object(
        {f"p{i}": {"type": "string", "pattern": p, "maxLength": 40} for i, p in enumerate(rng.sample(patterns, 3))}
    )


def _formats(rng: random.Random) -> dict:
    kinds = rng.sample(("date", "time", "date-time", "uuid", "ipv4", "email", "duration", "hostname"), 3)
    return _object({kind: {"type": "string", "format": kind} for kind in kinds})


def _unicode_keys(rng: random.Random) -> dict:
    keys = ("ключ", "鍵", "مفتاح", "कुंजी", "klucz_ż", "🔑", "key with blank", 'q"uote', "back\\slash", "clé")
    chosen = rng.sample(keys, 4)
    values = [{"type": "boolean"}, _short(10), {"type": "integer", "minimum": 0, "maximum": 99}, {"type": "null"}]
    return _object(dict(zip(chosen, values)), chosen[:2])


def _nested(rng: random.Random) -> dict:
    inner: dict = {"enum": ["end", 1, True, None, [1, "x"], {"a": 1.5}]}
    for level in range(rng.randrange(2, 6)):
        inner = (
            _object({f"l{level}": inner})
            if level % 2
            else {"type": "array", "items": inner, "minItems": 1, "maxItems": 2}
        )
    return inner


def _tree(rng: random.Random) -> dict:
    node = _object({"v": _DIGIT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


SCHEMAS: dict[str, Callable[[random.Random], dict]] = {
    "command": _step,
    "plan": lambda rng: _object({"steps": {"type": "array", "items": _step(rng), "minItems": 1, "maxItems": 3}}),
    "tools": _tools,
    "bounded": _bounded,
    "constants": _constants,
    "patterns": _patterns,
    "formats": _formats,
    "unicode keys": _unicode_keys,
    "nested": _nested,
    "tree": _tree,
    "enum": lambda rng: {"enum": [*rng.sample(ROOMS, 4), 0.5, -3, False, "مطبخ", "台所", "🛑"]},
    "boolean": lambda rng: {"type": "boolean"},
    "integer": lambda rng: {"type": "integer"},
    "number": lambda rng: {"type": "number"},
    "text": lambda rng: _object({"text": {"type": "string", "minLength": 3, "maxLength": rng.randrange(5, 60)}}),
    "optional": lambda rng: _object(
        {"a": _short(8), "b": {"type": "boolean"}, "c": _DIGIT, "d": _short(8)},
        rng.sample(["a", "b", "c", "d"], 2),
    ),
    "two types": lambda rng: _object({"v": {"type": ["integer", "null", "string"], "maxLength": 10, "minimum": 0}}),
    "tuple": lambda rng: {
        "type": "array", "prefixItems": [_short(8), _DIGIT, {"type": "boolean"}], "items": False, "minItems": 3,
    },
    "free keys": lambda rng: {
        "type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99}, "maxProperties": 3,
        "minProperties": 1,
    },
    "open object": lambda rng: {"type": "object", "properties": {"go": {"type": "boolean"}}, "required": ["go"]},
    "openai": lambda rng: {"name": "answer", "strict": True, "schema": _object({"answer": _short(30)})},
    "one of": lambda rng: {"oneOf": [_object({"room": {"enum": list(ROOMS[:4])}}), _object({"say": _short(20)})]},
    "all of": lambda rng: {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": rng.randrange(5, 2000)}]},
    "points": lambda rng: {
        "type": "array", "minItems": 1, "maxItems": 4,
        "items": {
            "type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 2,
        },
    },
}  # fmt: skip


def schema(rng: random.Random, index: int) -> tuple[str, str]:
    """Return the kind and the JSON text of a schema; the kinds follow each other by ``index``."""
    kind = list(SCHEMAS)[index % len(SCHEMAS)]
    return kind, json.dumps(SCHEMAS[kind](rng), ensure_ascii=rng.random() < 0.5)
