"""The demo model: its data keeps its word, its tokenizer loses nothing, its accuracy is what the card claims."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine
from engine_core.text.tokenizer import Tokenizer
from tools.demo_model import evaluate, harbour, talk, templates, words
from tools.demo_model.conversations import CONVERSATIONS
from tools.demo_model.grammar import HELD_OUT, Generator

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
SCHEMA = (MODEL / "plan.schema.json").read_text()
ACCURACY = 0.95  # the card's table is above this for each kind of held-out; the sample here has some spread


@pytest.fixture(scope="module")
def training():
    generator = Generator(1)
    return [generator.conversation() for _ in range(4000)]


@pytest.fixture(scope="module")
def held_out():
    return evaluate.held_out_examples(70)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "engine"
    build_engine(MODEL, directory, quantization="int8")
    opened = Engine.open(EngineConfig(directory, lora_adapters=(f"harbour:{MODEL.parent / 'demo_harbour'}",)))
    yield opened
    opened.close()


def answer(engine: Engine, messages, schema: str = "", adapter: str = "") -> str:
    chat = tuple(ChatMessage(role, content) for role, content in messages)
    sampling = SamplingParams(max_new_tokens=512)
    request = GenerationRequest("test", chat, sampling=sampling, json_schema=schema, adapter=adapter)
    result = engine.answer(request)
    assert result.finish_reason is FinishReason.STOP
    return result.text


def conforms(value: object, schema: dict) -> bool:
    """JSON Schema, as far as plan.schema.json uses it."""
    if "anyOf" in schema:
        return any(conforms(value, option) for option in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) >= schema.get("minLength", 0)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "array":
        long_enough = isinstance(value, list) and len(value) >= schema["minItems"]
        return long_enough and all(conforms(item, schema["items"]) for item in value)
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    if not isinstance(value, dict) or not set(schema["required"]) <= set(value) <= set(schema["properties"]):
        return False
    return all(conforms(v, schema["properties"][k]) for k, v in value.items())


def test_a_seed_fixes_the_data():
    def draw(seed):
        generator = Generator(seed)
        return [generator.conversation() for _ in range(50)] + [generator.conversation(kind) for kind in HELD_OUT]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_every_answer_is_compact_json_of_the_schema(training, held_out):
    schema = json.loads(SCHEMA)
    for example in training + [e for examples in held_out.values() for e in examples]:
        for role, content in example.messages:
            if role == "assistant":
                value = json.loads(content)
                assert conforms(value, schema), content
                assert content == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize(
    "wrong",
    [
        '{"plan":[]}',
        '{"plan":[{"do":"fly","to":"moon"}]}',
        '{"plan":[{"do":"wait","seconds":"2"}]}',
        '{"plan":[{"do":"stop"}],"ask":"?"}',
        '{"plan":[{"do":"pick"}]}',
        '{"refuse":""}',
    ],
)
def test_the_schema_refuses(wrong):
    assert not conforms(json.loads(wrong), json.loads(SCHEMA))


def test_held_out_commands_do_not_occur_in_training(training, held_out):
    """Those that stand alone; "put it there" is new by what "it" is, and train.py drops it by its words besides."""
    trained = {command.lower() for example in training for command in example.commands}
    for kind, examples in held_out.items():
        alone = [example.commands[-1].lower() for example in examples if len(example.commands) == 1]
        assert len(alone) > 10
        assert trained.isdisjoint(alone), kind


def test_training_has_no_reserved_word(training):
    reserved = {word.lower() for word in words.OBJECTS + words.FEMALE + words.MALE if words.reserved(word)}
    assert len(reserved) > 20
    places = {*words.ROOMS, *words.SURFACES, *words.CONTAINERS, *words.CLOSED}
    open_class = reserved - places - {*words.DEVICES, *words.CLEANABLE, *words.OPENABLE}  # a few are also furniture
    for example in training:
        for step in json.loads(example.messages[-1][1]).get("plan", ()):
            assert str(step.get("object", "")).lower() not in open_class
            assert str(step.get("to", "")).lower() not in open_class


def test_held_out_wordings_use_words_of_training():
    said = [*talk.TALK, *talk.REFUSALS, *talk.OPEN_QUESTIONS]
    tables = [*templates.CLAUSES.values(), templates.WRAPPERS, templates.JOINERS, templates.REVERSED_JOINERS]
    tables += [templates.DELAYS, templates.AGAIN, templates.SAME, templates.CORRECTION, *(lines for lines, *_ in said)]

    def words_of(lines):
        return {word for line in lines for word in re.findall(r"[a-z']+", re.sub(r"\{.\}", "", line).lower())}

    everything = [line for table in tables for line in table]
    slots = [word for _, options, _ in talk.REFUSALS for word in options]
    known = words_of([line for line in everything if not line.startswith("~")] + slots)
    held_out = words_of(line for line in everything if line.startswith("~"))
    assert held_out and held_out <= known, sorted(held_out - known)


def test_the_tokenizer_gives_back_any_text():
    tokenizer = Tokenizer(MODEL)
    random_text = random.Random(3)
    texts = ['{"plan":[{"do":"say","text":"é\u0301 👩‍👩‍👧 \\" \\n"}]}']
    texts += ["  two  spaces\n\ttab ", "\x00\x7f", "Straße 東京 हिन्दी"]
    for plane in range(17):
        codes = [plane * 0x10000 + random_text.randrange(0x10000) for _ in range(200)]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_has_the_same_tokens_in_command_and_plan():
    """Copying relies on it: a space is a token of its own."""
    tokenizer = Tokenizer(MODEL)
    for word in ("cup", "kitchen", "zorbalux", "Müller", "flashlight"):
        alone = list(tokenizer.encode(word))
        for text in (f"the {word} now", f'{{"plan":[{{"do":"pick","object":"{word}"}}]}}'):
            ids = list(tokenizer.encode(text))
            assert any(ids[i : i + len(alone)] == alone for i in range(len(ids))), (word, text)


def test_a_step_of_a_plan_is_few_tokens():
    tokenizer = Tokenizer(MODEL)
    plan = '{"plan":[{"do":"navigate","to":"kitchen"},{"do":"pick","object":"cup"},{"do":"navigate","to":"user"}]}'
    assert len(tokenizer.encode(plan)) == 7


def test_it_is_as_small_as_the_card_says():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16_000_000
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["max_position_embeddings"] >= 1024


def test_held_out_answers_are_right(engine, held_out):
    right = {}
    for kind, examples in held_out.items():
        found = [answer(engine, example.messages[:-1]) for example in examples]
        right[kind] = evaluate.score(examples, found)["all"]
    correct, count = (sum(column) for column in zip(*right.values()))
    assert correct / count >= ACCURACY, right


def test_the_schema_holds_the_answers(engine, held_out):
    """With plan.schema.json the engine gives the same right answers, and nothing but the schema for nonsense."""
    pytest.importorskip("llguidance")
    examples = held_out["template"][:12]
    free = [answer(engine, example.messages[:-1]) for example in examples]
    assert [answer(engine, example.messages[:-1], SCHEMA) for example in examples] == free
    for nonsense in ("}}}{{{", "42", "SELECT * FROM plans;", "«»–…"):
        assert conforms(json.loads(answer(engine, [("user", nonsense)], SCHEMA)), json.loads(SCHEMA))


def test_the_demo_conversations_are_answered_with_plans(engine):
    for commands in CONVERSATIONS:
        messages = []
        for command in commands:
            messages.append(("user", command))
            messages.append(("assistant", answer(engine, messages)))
            assert conforms(json.loads(messages[-1][1]), json.loads(SCHEMA))
    plan = json.loads(answer(engine, [("user", CONVERSATIONS[1][0])]))
    assert [step["do"] for step in plan["plan"]] == ["navigate", "pick", "navigate", "give"]


def test_an_adapter_answers_in_the_dialect_of_another_household(engine):
    examples = [example for found in harbour.held_out(8).values() for example in found]
    asked = [(example.messages[:-1], example.messages[-1][1]) for example in examples]
    right = sum(answer(engine, messages, adapter="harbour") == expected for messages, expected in asked)
    assert right >= 0.8 * len(asked)
    messages, expected = asked[0]
    assert answer(engine, messages) != expected and json.loads(answer(engine, messages))
