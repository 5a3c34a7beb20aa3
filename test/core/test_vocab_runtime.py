"""Engines with a reduced vocabulary: cut at build or at load, they sample what the full head would among those ids.

The oracle is the full head under a mask of the kept ids, which the backend protocol takes at every step.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import vocab_checkpoints
from engine_core.backends.onnxruntime import head as ort_head
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError, InvalidSamplingError, InvalidSchemaError
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.formats.vocab_map import TENSOR_NAME
from engine_core.measure.steps import begin, decode, prefill
from engine_core.reduce_vocab.reduce import reduce_vocab
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams
from engine_core.sampling import Sampler
from engine_core.serving.engine import Engine
from test_demo_model import MODEL, SCHEMA, conforms
from tools.demo_model.grammar import Generator

GREEDY = SamplingParams(seed=0)
SAMPLINGS = {
    "greedy": GREEDY,
    "options": dataclasses.replace(
        GREEDY, temperature=1.3, top_p=0.95, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=11
    ),
    "bias": dataclasses.replace(
        GREEDY, temperature=0.8, seed=3, logit_bias=tuple((i, 4.0 if i % 3 else -4.0) for i in range(0, 400, 7))
    ),
}
PROMPT = np.random.default_rng(5).integers(0, 400, size=40).astype(np.int32)
FRACTIONS = (0.5, 0.25)


# --- against the full head, on a small random model -----------------------------------------------------


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return vocab_checkpoints.write_checkpoint(directory, "byte_level", tied=request.param == "tied")


@pytest.fixture(scope="module")
def random_map(checkpoint):
    """(path, ids): a third of the ids, the ends among them."""
    ends = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    ids = np.union1d(np.random.default_rng(8).permutation(430)[:144], ends).astype(np.int32)
    write_safetensors(checkpoint / "map.safetensors", {TENSOR_NAME: ids})
    return checkpoint / "map.safetensors", ids


def load(variant, manifest, **config):
    return OnnxRuntimeBackend.load(variant, manifest, EngineConfig(variant, num_threads=1, **config))


def tokens(backend, sampling, mask=None, count=40) -> list[int]:
    begin(backend, sampling, PROMPT)
    found = [prefill(backend, PROMPT, 0, mask).result()]
    while len(found) < count:
        found.append(decode(backend, mask).result())
    return found


@pytest.mark.parametrize("quantization, head_bits", [("fp32", 0), ("int8", 0), ("int4", 0), ("int4", 4)])
def test_a_pruned_head_samples_what_the_full_one_does_among_the_kept_ids(
    checkpoint, random_map, tmp_path, quantization, head_bits
):
    path, ids = random_map
    options = {"quantization": quantization, "head_bits": head_bits}
    full = build_engine(checkpoint, tmp_path / "full", **options)
    built = build_engine(checkpoint, tmp_path / "built", vocab_map=path, **options)
    allowed = np.zeros(-(-full.model.vocab_size // 32) * 32, dtype=bool)
    allowed[ids] = True
    mask = np.packbits(allowed, bitorder="little").view(np.uint32)
    oracle = load(tmp_path / "full", full)
    expected = {name: tokens(oracle, sampling, mask) for name, sampling in SAMPLINGS.items()}
    assert expected["greedy"] != tokens(oracle, GREEDY), "the map loses nothing this prompt needs: no test"
    oracle.close()
    for variant, manifest, config in (
        (tmp_path / "built", built, {}),
        (tmp_path / "full", full, {"vocab_map": str(path)}),
    ):
        backend = load(variant, manifest, **config)
        assert backend.reduced_vocab_size == len(ids) and backend._session.logits.shape == (1, len(ids))
        assert {name: tokens(backend, sampling) for name, sampling in SAMPLINGS.items()} == expected
        backend.close()


def test_the_engine_directory_may_be_read_only_and_relative(checkpoint, random_map, tmp_path, monkeypatch):
    manifest = build_engine(checkpoint, tmp_path / "full", quantization="int8")
    before = {path: path.read_bytes() for path in (tmp_path / "full").iterdir()}
    (tmp_path / "full").chmod(0o555)
    monkeypatch.chdir(tmp_path)
    backend = load(Path("full"), manifest, vocab_map=str(random_map[0]))
    assert set(tokens(backend, GREEDY)) <= set(random_map[1].tolist())
    backend.close()
    (tmp_path / "full").chmod(0o755)
    assert {path: path.read_bytes() for path in (tmp_path / "full").iterdir()} == before


def test_a_graph_without_a_head_to_cut_is_refused(checkpoint, random_map, tmp_path, monkeypatch):
    manifest = build_engine(checkpoint, tmp_path / "full")
    monkeypatch.setattr(ort_head, "_NODES", ("another",))
    with pytest.raises(ConfigurationError, match="cannot be pruned at load; build it with --vocab-map"):
        load(tmp_path / "full", manifest, vocab_map=str(random_map[0]))


def test_a_map_without_an_end_is_refused(checkpoint, tmp_path):
    manifest = build_engine(checkpoint, tmp_path / "full")
    kept = np.setdiff1d(np.arange(400, dtype=np.int32), manifest.eos_token_ids).astype(np.int32)
    write_safetensors(tmp_path / "map.safetensors", {TENSOR_NAME: kept})
    with pytest.raises(ConfigurationError, match="lacks the end-of-sequence token"):
        OnnxRuntimeBackend.plan(
            tmp_path / "full", manifest, EngineConfig(tmp_path / "full", vocab_map=str(tmp_path / "map.safetensors"))
        )


def test_a_sampler_without_a_token_left_names_the_reduced_vocabulary():
    sampler = Sampler(64, np.array([1, 5, 9], dtype=np.int32))
    sampler.begin(GREEDY, PROMPT[:0])
    with pytest.raises(InvalidSamplingError, match="reduced to 3 of 64 tokens"):
        sampler.sample(np.ones(3, dtype=np.float32), np.array([1 << 4, 0], dtype=np.uint32))


# --- the demo model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The int8 engine with the full head, and the maps of its own conversations: fraction → ReducedVocab."""
    directory = tmp_path_factory.mktemp("demo")
    build_engine(MODEL, directory / "engine", quantization="int8")
    generator = Generator(2)
    chats = [generator.conversation().messages for _ in range(600)]
    texts = vocab_checkpoints.write_chats(directory / "chats.jsonl", chats)
    maps = {
        fraction: reduce_vocab(MODEL, directory / str(fraction), method="frequency", texts=[texts], fraction=fraction)
        for fraction in FRACTIONS
    }
    return directory, maps


@pytest.fixture(scope="module", params=[*FRACTIONS, 1.0])
def engine(request, demo):
    """(engine, its ReducedVocab or None), the half cut at build and the quarter at load."""
    directory, maps = demo
    reduced, path, config = maps.get(request.param), directory / "engine", {}
    if request.param == 0.5:
        path = directory / "built"
        build_engine(MODEL, path, quantization="int8", vocab_map=reduced.map_path)
    elif reduced is not None:
        config = {"vocab_map": str(reduced.map_path)}
    opened = Engine.open(EngineConfig(path, **config))
    yield opened, reduced
    opened.close()


@pytest.fixture(scope="module")
def quarter(demo):
    directory, maps = demo
    reduced = maps[0.25]
    opened = Engine.open(EngineConfig(directory / "engine", vocab_map=str(reduced.map_path)))
    yield opened, np.setdiff1d(np.arange(2048), reduced.ids), reduced.ids
    opened.close()


COMMANDS = ["bring me the red cup from the kitchen", "Can you fly to the moon?", "wait two minutes, then open the door"]


def answer(engine, text, *, schema="", prompt="", **sampling):
    content = {"prompt": prompt} if prompt else {"messages": (ChatMessage("user", text),)}
    request = GenerationRequest(
        "test", sampling=SamplingParams(**{"max_new_tokens": 300, **sampling}), json_schema=schema, **content
    )
    return engine.answer(request)


def test_only_kept_tokens_are_sampled_and_answers_end(engine):
    opened, reduced = engine
    assert opened.reduced_vocab_size == (2048 if reduced is None else len(reduced.ids))
    for command in COMMANDS:
        result = answer(opened, command)
        assert result.finish_reason is FinishReason.STOP and result.text
        if reduced is not None:
            assert set(result.token_ids) <= set(reduced.ids.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_json_schema_holds_with_any_vocabulary(engine, temperature):
    pytest.importorskip("llguidance")
    opened, _ = engine
    for seed, command in enumerate(COMMANDS):
        result = answer(opened, command, schema=SCHEMA, temperature=temperature, seed=seed, max_new_tokens=1500)
        assert result.finish_reason is FinishReason.STOP
        assert conforms(json.loads(result.text), json.loads(SCHEMA)), result.text


def test_a_bias_on_a_lost_token_changes_nothing(quarter):
    opened, lost, kept = quarter
    for sampling in ({}, {"temperature": 1.0, "seed": 5}):
        plain = answer(opened, COMMANDS[0], **sampling)
        biased = answer(opened, COMMANDS[0], logit_bias=tuple((int(i), 90.0) for i in lost[:1000]), **sampling)
        assert biased.token_ids == plain.token_ids
    wanted = int(kept[300])
    assert set(answer(opened, "go", logit_bias=((wanted, 1e4),), max_new_tokens=5).token_ids) == {wanted}


def test_a_lost_stop_id_is_harmless_and_a_kept_one_stops(quarter):
    opened, lost, _ = quarter
    plain = answer(opened, COMMANDS[0])
    assert answer(opened, COMMANDS[0], stop_token_ids=tuple(lost[:50].tolist())).token_ids == plain.token_ids
    stopped = answer(opened, COMMANDS[0], stop_token_ids=(plain.token_ids[3],))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(plain.token_ids[3])]


def test_a_repetition_penalty_with_lost_tokens_in_the_prompt(quarter):
    """Lost tokens are still read: only writing them is gone."""
    opened, lost, kept = quarter
    prompt = "tomato bench bucket nightstand toothbrush"
    assert set(opened.tokenize(prompt)) & set(lost.tolist())
    result = answer(opened, "", prompt=prompt, repetition_penalty=1.8, max_new_tokens=40, ignore_eos=True)
    assert len(result.token_ids) == 40 and set(result.token_ids) <= set(kept.tolist())


def test_a_constraint_that_needs_a_lost_token_is_an_error_and_the_next_request_is_answered(demo, tmp_path):
    """A map of another tool, which lost what closes an object."""
    pytest.importorskip("llguidance")
    directory, _ = demo
    opened = Engine.open(EngineConfig(directory / "engine"))
    closing = [index for index, text in enumerate(opened.token_texts(range(2048))) if "}" in text]
    opened.close()
    kept = np.setdiff1d(np.arange(2048, dtype=np.int32), closing).astype(np.int32)
    write_safetensors(tmp_path / "map.safetensors", {TENSOR_NAME: kept})
    opened = Engine.open(EngineConfig(directory / "engine", vocab_map=str(tmp_path / "map.safetensors")))
    try:
        for _ in range(2):
            with pytest.raises(InvalidSchemaError, match="no token of this model goes on with the answer"):
                answer(opened, "stop", schema='{"type": "object", "additionalProperties": false}')
            result = answer(opened, "hello", schema='{"type": "string", "maxLength": 20}')
            assert isinstance(json.loads(result.text), str)
    finally:
        opened.close()


def test_none_takes_the_full_head(demo):
    directory, maps = demo
    with pytest.raises(ConfigurationError, match="lacks|no tensor|cannot be read"):
        Engine.open(EngineConfig(directory / "engine", vocab_map=str(directory / "nowhere.safetensors")))
    opened = Engine.open(EngineConfig(directory / "engine", vocab_map="none"))
    assert opened.reduced_vocab_size == 2048
    opened.close()
