"""Perplexity by teacher forcing through the CPU backend, held against transformers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
import vocab_checkpoints
from engine_core import cli
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError
from engine_core.formats.vocab_map import write_vocab_map
from engine_core.measure.evaluation import Sequence, measure_perplexity, sequences_of
from engine_core.request import GenerationRequest, SamplingParams
from engine_core.serving.engine import CancelToken, Engine

CHATS = [
    [("user", "where is Anna?"), ("assistant", "in the kitchen"), ("user", "sure?"), ("assistant", "yes")],
    [("user", "bring the red cup"), ("assistant", '{"plan": [{"do": "pick", "object": "red cup"}]}')],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(checkpoint, engine directory) of a small random Llama with a tokenizer."""
    directory = vocab_checkpoints.write_checkpoint(tmp_path_factory.mktemp("evaluated"), "byte_level")
    build_engine(directory, directory / "engine", quantization="fp32")
    return directory, directory / "engine"


@pytest.fixture
def engine(model):
    engine = Engine.open(EngineConfig(model[1]), lambda line: None)
    yield engine
    engine.close()


def expected_log_probabilities(directory, ids: np.ndarray) -> np.ndarray:
    """float64 [n - 1]: of ids[1:], from transformers' logits of the whole sequence in one pass."""
    logits = checkpoints.reference_logits(checkpoints.reference(directory), ids).astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    logs = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    return logs[np.arange(len(ids) - 1), ids[1:]]


def test_log_probabilities_are_those_of_transformers(model, engine):
    """A prompt longer than a prefill chunk, and the least possible one."""
    ids = np.random.default_rng(5).integers(7, 400, size=190).astype(np.int32)
    expected = expected_log_probabilities(model[0], ids)
    for first in (1, 150):
        found = engine.log_probabilities(ids, first)
        np.testing.assert_allclose(found, expected[first - 1 :], atol=2e-4)


def test_perplexity_of_answers_is_that_of_transformers(model, engine, tmp_path):
    path = vocab_checkpoints.write_chats(tmp_path / "chats.jsonl", CHATS)
    sequences = list(sequences_of(path, engine.tokenizer))
    assert len(sequences) == 3
    expected = np.concatenate([expected_log_probabilities(model[0], s.token_ids)[s.first - 1 :] for s in sequences])
    fed = []
    found = measure_perplexity(engine, sequences, fed.append)
    assert math.isclose(found.perplexity, math.exp(-expected.mean()), rel_tol=1e-4)
    assert (found.scored_tokens, found.lost_tokens, found.cut_tokens) == (len(expected), 0, 0)
    assert fed == np.cumsum([len(s.token_ids) for s in sequences]).tolist()


def test_lost_tokens_are_counted_apart_and_the_rest_is_normalized_over_the_kept_rows(model, engine, tmp_path):
    directory, engine_dir = model
    ids = np.random.default_rng(6).integers(7, 400, size=60).astype(np.int32)
    eos = engine.manifest.eos_token_ids
    kept = np.unique([*eos, *ids[::2]]).astype(np.int32)
    write_vocab_map(tmp_path / "map.safetensors", kept, {})
    logits = checkpoints.reference_logits(checkpoints.reference(directory), ids).astype(np.float64)[:-1, kept]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    inside = np.isin(ids[1:], kept)
    expected = logs[np.flatnonzero(inside), np.searchsorted(kept, ids[1:][inside])]
    config = EngineConfig(engine_dir, vocab_map=str(tmp_path / "map.safetensors"))
    reduced = Engine.open(config, lambda line: None)
    try:
        found = measure_perplexity(reduced, [Sequence(ids, 1)])
    finally:
        reduced.close()
    assert 0 < found.lost_tokens == int((~inside).sum()) and found.scored_tokens == len(expected)
    assert math.isclose(found.perplexity, math.exp(-expected.mean()), rel_tol=1e-4)


def test_what_is_beyond_max_context_is_cut_and_counted(model):
    engine = Engine.open(EngineConfig(model[1], max_context=32), lambda line: None)
    try:
        ids = np.arange(7, 57, dtype=np.int32)
        assert measure_perplexity(engine, [Sequence(ids, 10)]).scored_tokens == 22
        found = measure_perplexity(engine, [Sequence(ids, 10), Sequence(ids, 40)])
        assert (found.scored_tokens, found.cut_tokens) == (22, 18 + 10)
    finally:
        engine.close()


def test_an_answer_after_a_measurement_is_the_one_before_it(model, engine):
    """The KV cache holds other tokens then: the prompt's must not be taken for what is there."""
    request = GenerationRequest(
        "1", prompt="where is Anna?", sampling=SamplingParams(max_new_tokens=8, ignore_eos=True)
    )

    def answer() -> str:
        return "".join(piece.text for piece in engine.generate(engine.prepare(request), CancelToken()))

    before = answer()
    engine.log_probabilities(np.arange(7, 60, dtype=np.int32), 1)
    assert answer() == before


def test_a_backend_without_logits_is_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "backend_name", "tensorrt")
    with pytest.raises(BackendUnavailableError, match="tensorrt backend keeps on its device; .* cuda or onnxruntime"):
        measure_perplexity(engine, [Sequence(np.arange(7, 20, dtype=np.int32), 1)])


def test_the_command_compares_the_variants(model, tmp_path, capsys):
    directory, _ = model
    for kind in ("fp32", "int8"):
        build_engine(directory, tmp_path / "engine" / kind, quantization=kind)
    path = vocab_checkpoints.write_chats(tmp_path / "chats.jsonl", CHATS)
    text = tmp_path / "text.txt"
    text.write_text(vocab_checkpoints.TEXT)
    assert cli.main(["evaluate", str(tmp_path / "engine"), "--texts", str(path), str(text), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["variant"] for row in rows] == ["fp32", "int8"]
    assert rows[0]["scored_tokens"] == rows[1]["scored_tokens"] > 100
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    assert math.isclose(rows[0]["perplexity"], rows[1]["perplexity"], rel_tol=0.05)
    assert cli.main(["evaluate", str(tmp_path / "engine"), "--quantization", "int8", "--texts", str(path)]) == 0
    out = capsys.readouterr().out
    assert "+0.00 %" in out and "fp32" not in out.splitlines()[1][:4]
    (tmp_path / "none.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    assert cli.main(["evaluate", str(tmp_path / "engine"), "--texts", str(tmp_path / "none.jsonl")]) == 1
    assert "no token to score" in capsys.readouterr().err


def test_two_backends_with_the_same_quantization_are_measured_or_named(model, tmp_path, capsys):
    """A variant that cannot run here costs the others nothing."""
    directory, _ = model
    build_engine(directory, tmp_path / "engine" / "a", quantization="fp32")
    shutil.copytree(tmp_path / "engine" / "a", tmp_path / "engine" / "b")
    path = tmp_path / "engine" / "b" / "engine.json"
    path.write_text(path.read_text().replace('"backend": "onnxruntime"', '"backend": "tensorrt"'))
    texts = tmp_path / "texts.txt"
    texts.write_text("bring the red cup to the kitchen")
    assert cli.main(["evaluate", str(tmp_path / "engine"), "--texts", str(texts), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["backend"] for row in found["results"]] == ["onnxruntime"]
    assert len(found["not_measured"]) == 1 and "tensorrt" in found["not_measured"][0]
