"""Every architecture against transformers: prefill and token by token, in fp32, on small random checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

import checkpoints
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.files import graph_name
from engine_core.backends.onnxruntime.loaded_graph import LoadedGraph
from engine_core.backends.onnxruntime.session import OrtSession

MAX_ERROR = 1e-4
PROMPT = np.random.default_rng(3).integers(3, 331, size=45)  # longer than every window, shorter than longrope's switch
MAX_CONTEXT = 64


@pytest.fixture(scope="module", params=sorted(checkpoints.CASES))
def case(request, tmp_path_factory):
    """(session on the fp32 engine, the same checkpoint in transformers)."""
    directory = checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)
    engine_dir = directory / "engine"
    manifest = build_engine(directory, engine_dir, max_context=MAX_CONTEXT)
    session = OrtSession(engine_dir, manifest.model, manifest.model.vocab_size, MAX_CONTEXT, MAX_CONTEXT, 1)
    return session, checkpoints.reference(directory)


def test_prefill_has_the_logits_of_transformers(case):
    session, model = case
    expected = checkpoints.reference_logits(model, PROMPT)
    for length in (1, 2, 17, len(PROMPT)):
        session.prefill(PROMPT[:length], 0)
        assert np.abs(session.logits - expected[length - 1]).max() < MAX_ERROR, length


def test_token_by_token_has_the_logits_of_transformers(case):
    session, model = case
    expected = checkpoints.reference_logits(model, PROMPT)
    session.kv_cache.fill(np.nan)  # a position that is read before it is written would show
    for position, token_id in enumerate(PROMPT):
        session.decode(int(token_id), position)
        assert np.abs(session.logits - expected[position]).max() < MAX_ERROR, position


def test_chunks_have_the_logits_of_transformers(case):
    session, model = case
    expected = checkpoints.reference_logits(model, PROMPT)
    for start in range(0, len(PROMPT), 7):
        chunk = PROMPT[start : start + 7]
        session.prefill(chunk, start)
        assert np.abs(session.logits - expected[start + len(chunk) - 1]).max() < MAX_ERROR, start


def test_greedy_tokens_are_those_of_transformers(case):
    session, model = case
    expected = checkpoints.reference_greedy(model, PROMPT[:30], 25)
    session.prefill(PROMPT[:30], 0)
    tokens = [int(session.logits.argmax())]
    while len(tokens) < 25:
        session.decode(tokens[-1], 30 + len(tokens) - 1)
        tokens.append(int(session.logits.argmax()))
    assert tokens == expected


@pytest.mark.skipif("qwen3-moe" not in checkpoints.CASES, reason="this transformers has no such model")
def test_weights_of_experts_stay_where_a_graph_is_edited(tmp_path):
    """They are read in the branches of conditions."""
    build_engine(checkpoints.write(tmp_path, "qwen3-moe"), tmp_path / "engine", max_context=MAX_CONTEXT)
    loaded = LoadedGraph(tmp_path / "engine" / graph_name("fp32"), "This test")
    before = {tensor.name for tensor in loaded.graph.initializer}
    loaded.serialized(ort.SessionOptions())
    assert {tensor.name for tensor in loaded.graph.initializer} == before
    assert sum("/experts/" in name for name in before) == 3 * 6 * 2
