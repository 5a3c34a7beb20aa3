"""The model that sees: its pictures show what its questions say, and training sees what the engine will be asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image as PillowImage

from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.request import ChatMessage, GenerationRequest
from engine_core.serving.engine import Engine
from engine_core.vision.images import Image

torch = pytest.importorskip("torch", reason="torch is not installed; 'make test' provides it")
jinja2 = pytest.importorskip("jinja2")

from tools.demo_vision import questions, tokenizer, words  # noqa: E402
from tools.demo_vision.conversation import LISTED, PICTURE, QUESTIONS  # noqa: E402
from tools.demo_vision.evaluate import held_out_examples  # noqa: E402
from tools.demo_vision.questions import QUESTION_KINDS, Asker, dialogue, is_right  # noqa: E402
from tools.demo_vision.render import picture_of, render_rows  # noqa: E402
from tools.demo_vision.rows import Packer  # noqa: E402
from tools.demo_vision.scene import HELD_OUT, random_scene, row_of  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo_vision"


@pytest.fixture(scope="module")
def training():
    rng = Random(1)
    scenes = [random_scene(rng) for _ in range(200)]
    return [(scene, [turn for _ in range(8) for turn in dialogue(Asker(rng, scene))]) for scene in scenes]


def kinds_of(scene) -> set:
    return {thing.kind for thing in scene.things}


def has_new_pair(scene) -> bool:
    kinds = kinds_of(scene)
    return any(pair <= kinds for pair in words.NEW_PAIRS)


def test_every_object_is_seen_where_the_scene_says():
    rng = Random(2)
    scenes = [random_scene(rng) for _ in range(6)]
    _, owners = render_rows(torch.from_numpy(np.stack([row_of(scene) for scene in scenes])), 64, 64)
    places = (np.arange(64) + 0.5) / 64
    assert sum(len(scene.things) for scene in scenes) >= 15
    for scene, owner in zip(scenes, owners.numpy()):
        for index, thing in enumerate(scene.things):
            rows, columns = np.nonzero(owner == index)
            assert len(rows) >= 20, thing
            assert abs(places[columns].mean() - thing.at[0]) < 0.06
            assert abs(places[rows].mean() - thing.at[1]) < 0.09
            left, top, right, bottom = thing.box
            assert left - 0.02 < places[columns].min() <= places[columns].max() < right + 0.02
            assert top - 0.03 < places[rows].min() <= places[rows].max() < bottom + 0.03


def test_a_picture_has_the_proportions_of_its_camera():
    scene = random_scene(Random(3))
    picture = picture_of(scene, 30, finer=1)
    assert picture.height == 30
    assert picture.width / 30 == pytest.approx(scene.camera.tan_x / scene.camera.tan_y, abs=0.05)


def test_training_never_sees_what_is_held_out(training):
    for scene, turns in training:
        assert not kinds_of(scene) & words.NEW_KINDS and not has_new_pair(scene)
        text = " ".join(turn.question + turn.answer for turn in turns)
        assert not any(words.name(kind) in text for kind in words.NEW_KINDS)


def test_held_out_examples_show_it_in_every_kind_of_question():
    examples = held_out_examples(3)
    assert tuple(examples) == HELD_OUT
    for some in examples.values():
        assert Counter(example.turns[-1].kind for example in some) == dict.fromkeys(QUESTION_KINDS, 3)
    assert all(has_new_pair(example.scene) for example in examples["pairs"])
    assert all(kinds_of(example.scene) & words.NEW_KINDS for example in examples["objects"])


def test_answers_agree_with_each_other(training):
    """What one kind of question says of a scene, another one says, too."""
    seen: Counter = Counter()
    for scene, turns in training:
        names = Counter(words.name(thing.kind) for thing in scene.things)
        order = [words.name(thing.kind) for thing in scene.things]
        for turn in turns:
            seen[turn.kind] += 1
            if turn.kind == "list" and order:
                assert turn.answer == words.sentence(words.listing([words.a(name) for name in order]))
            if turn.answer.startswith('{"plan"'):
                for step in json.loads(turn.answer)["plan"]:
                    assert names[step["object"]]
                    if "at" in step:
                        target = step.get("in") or step.get("on") or step["object"]
                        assert step["at"] in [
                            thing.percent for thing in scene.things if words.name(thing.kind) == target
                        ]
            if turn.answer.startswith('{"refuse"'):
                noun = json.loads(turn.answer)["refuse"].removeprefix("There is no ").rstrip(".")
                assert not any(name == noun or name.endswith(f" {noun}") for name in names)
    assert set(seen) == set(QUESTION_KINDS)


def test_where_two_things_are_is_not_ambiguous(training):
    for scene, turns in training:
        for turn in turns:
            if turn.kind == "relation":
                mirrored = {
                    "left of": "right of",
                    "right of": "left of",
                    "behind": "in front of",
                    "in front of": "behind",
                }
                side = next(side for side in mirrored if f" is {side} the " in turn.answer)
                first, second = turn.answer.removeprefix("The ").rstrip(".").split(f" is {side} the ")
                one, other = (
                    next(t for t in scene.things if all(w in (*t.kind, "thing", "object", "one") for w in text.split()))
                    for text in (first, second)
                )
                assert questions._SIDES[side](one, other) >= 0.07
                assert questions._SIDES[mirrored[side]](one, other) <= -0.07


@pytest.mark.parametrize(
    ("expected", "found", "right"),
    [
        ("Yes.", "Yes.", True),
        ("Yes.", "yes", False),
        ('{"at":[10,20]}', '{"at":[14,16]}', True),
        ('{"at":[10,20]}', '{"at":[15,20]}', False),
        ('{"at":[10,20]}', '{"at":[10]}', False),
        ('{"at":[10,20]}', '{"at":[10,20', False),
        ('{"plan":[{"object":"red cup","at":[1,2]}]}', '{"plan":[{"object":"red can","at":[1,2]}]}', False),
        ('{"plan":[{"object":"red cup","at":[1,2]}]}', '{"plan":[{"object":"red cup","at":[2,3]}]}', True),
    ],
)  # fmt: skip
def test_a_position_may_be_a_little_off_and_nothing_else(expected, found, right):
    assert is_right(expected, found) is right


@pytest.mark.parametrize("system", ["", "Answer briefly."])
@pytest.mark.parametrize("picture", [True, False])
def test_training_rows_are_what_the_chat_template_renders(training, system, picture):
    made = tokenizer.train_tokenizer(
        (text for _, turns in training for t in turns for text in (t.question, t.answer)), 700
    )
    turns = [("What is red?", "A red cube."), ("Pick it.", '{"plan":[{"do":"pick","object":"red cube","at":[5,42]}]}')]
    packer = Packer(made, 128, 4)
    packer.begin(system, picture)
    assert packer.add([("Is there a cup?", "No.")]) and packer.add(turns)
    assert not packer.add([("cup " * 90, "No.")])
    ids, labels, documents, positions = packer.row.astype(int)
    mine = np.isin(documents, (0, 2))  # the prefix and the second dialogue, as if it were the only one
    packed = dict(zip(positions[mine], ids[mine]))
    if picture:
        packed |= {packer.image_at + i: made.token_to_id(tokenizer.IMAGE) for i in range(4)}

    content = [{"type": "image"}] * picture + [{"type": "text", "text": turns[0][0]}]
    messages = [{"role": "system", "content": system}] * bool(system)
    messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turns[0][1]}]
    messages += [{"role": "user", "content": turns[1][0]}, {"role": "assistant", "content": turns[1][1]}]
    text = (
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(tokenizer.CHAT_TEMPLATE)
        .render(messages=messages)
    )
    around, image = tokenizer.AROUND, tokenizer.IMAGE
    text = text.replace(image, f"{around}{tokenizer.GLOBAL}{image * 4}{around}")
    expected = made.encode(text.removesuffix("\n"), add_special_tokens=False).ids
    assert [packed[i] for i in range(len(packed))] == expected
    learned = made.decode(labels[mine & (labels >= 0)].tolist(), skip_special_tokens=False)
    assert learned == "".join(answer + tokenizer.END for _, answer in turns)


class TestTheModel:
    """What the shipped model answers on the backend of the CPU."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, tmp_path_factory):
        directory = tmp_path_factory.mktemp("demo_vision") / "engine"
        build_engine(MODEL, directory)
        opened = Engine.open(EngineConfig(directory))
        yield opened
        opened.close()

    def ask(self, engine: Engine, question: str, picture) -> str:
        images = () if picture is None else (Image(np.asarray(picture)),)
        messages = (ChatMessage("user", question),)
        return engine.answer(GenerationRequest("test", messages, images=images)).text

    @pytest.mark.parametrize("held_out", ["scenes", "pairs"])
    def test_held_out_questions_of_every_kind(self, engine, held_out):
        examples = [example for example in held_out_examples(1)[held_out] if len(example.turns) == 1]
        right = [
            is_right(turn.answer, self.ask(engine, turn.question, picture_of(example.scene, 120)))
            for example in examples for turn in example.turns
        ]  # fmt: skip
        assert sum(right) >= len(right) - 2

    def test_the_first_question_of_the_demo(self, engine):
        with PillowImage.open(MODEL / PICTURE) as picture:
            assert self.ask(engine, QUESTIONS[0], picture) == LISTED

    def test_without_a_picture_it_says_so(self, engine):
        assert self.ask(engine, "What is on the table?", None) == questions.NO_PICTURE
