"""LongRoPE on the GPU: every sequence has the factors of its own length, beside others and across the border."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error
from test_cuda_models import FAMILIES, TOLERANCE, expected_logits, load, logits_of, random_model

import fakes
from device_steps import GREEDY
from draft_steps import answer, with_drafts
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.build import build_cuda
from engine_core.config import EngineConfig
from engine_core.measure.steps import prompt_step
from engine_core.request import GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")

SWITCH = 64  # of the model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return random_model(*FAMILIES["phi3, longrope"])


@pytest.fixture(scope="module")
def engine_dir(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("longrope")
    model.save_pretrained(directory / "checkpoint")
    fakes.write_tokenizer(directory / "checkpoint")
    build_cuda(directory / "checkpoint", directory / "engine", max_context=256)
    return directory / "engine"


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_short_and_long_rows_share_a_step(model, engine_dir, use_cuda_graph, kind):
    """Rows of 40, 64 and 90 tokens, then a long sequence in the slot of a short one and the other way round."""
    backend = load(engine_dir, max_batch=3, use_cuda_graph=use_cuda_graph, kv_cache_type=kind)
    assert backend.rope_switch == SWITCH
    try:
        for lengths in ((40, 64, 90), (90, 50, 30)):
            ids, rows = {}, {}
            for slot, length in enumerate(lengths):
                ids[slot] = np.random.default_rng(length + slot).integers(0, 1003, length).astype(np.int32)
                backend.begin(slot, GREEDY, ids[slot])
                token = backend.step([prompt_step(backend, ids[slot], slot=slot)])[0].result()
                rows[slot] = [logits_of(backend)[slot]]
                ids[slot] = np.append(ids[slot], token)
            going = [slot for slot, length in enumerate(lengths) if length != SWITCH]
            for _ in range(10):
                found = [each.result() for each in backend.step([SequenceStep(slot) for slot in going])]
                for slot, token in zip(going, found, strict=True):
                    rows[slot].append(logits_of(backend)[slot])
                    ids[slot] = np.append(ids[slot], token)
            for slot, length in enumerate(lengths):
                expected, allowed = expected_logits(model, ids[slot][:-1].tolist(), "fp16")
                # An int8 cache loses more; the factors of the other length are off by far more than this.
                most = TOLERANCE * allowed + (0.1 if kind == "int8" else 0)
                assert max(map(error, rows[slot], expected[length - 1 :])) < most
    finally:
        backend.close()


def test_the_rows_of_a_draft_have_the_factors_of_their_sequence(engine_dir):
    plain, backend = load(engine_dir, max_batch=2), load(engine_dir, max_batch=2, speculation="on")
    try:
        for length in (40, 90):
            prompt = np.random.default_rng(length).integers(0, 1003, length).astype(np.int32)
            expected = answer(plain, prompt, 20, 1)
            assert with_drafts(backend, prompt, expected, 1) == expected
    finally:
        plain.close()
        backend.close()


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_answers_across_the_border_do_not_depend_on_drafts_graphs_or_what_is_cached(engine_dir, use_cuda_graph):
    def answers(**config) -> list[tuple[int, ...]]:
        found = []
        with_all = EngineConfig(engine_dir, backend="cuda", max_batch=2, use_cuda_graph=use_cuda_graph, **config)
        engine = Engine.open(with_all, report=lambda line: None)
        try:
            for text, count in (("ab" * 29, 20), ("abab" * 15, 12), ("ab" * 40, 8), ("ab" * 10, 8), ("ab" * 31, 8)):
                sampling = SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True)
                found.append(engine.answer(GenerationRequest("r", prompt=text, sampling=sampling)).token_ids)
        finally:
            engine.close()
        return found

    fresh = answers(prompt_cache_entries=0)
    assert answers(session_memory=4) == fresh
    assert answers(session_memory=4, speculation="on") == fresh
