"""Steps that check a draft on the GPU: they sample what steps of one token would."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error
from sanitizer_model import VOCAB, make_backend

from draft_steps import alternating, answer, guess, with_drafts
from engine_core.backends import Draft, SequenceStep
from engine_core.request import SamplingParams
from packed_weights import KINDS

pytestmark = pytest.mark.gpu

COUNT = 24
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, 1 + 47 * i).astype(np.int32) for i in range(6)]
SAMPLINGS = [  # the model's logits have a standard deviation of 0.04
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.02, top_p=0.9),
    SamplingParams(seed=3, temperature=0.03, top_k=50),
    SamplingParams(seed=5, temperature=0.015, min_p=0.05),
    SamplingParams(seed=6, temperature=0.04),
    SamplingParams(seed=7, temperature=0.03, top_k=VOCAB, top_p=0.7),
]


@pytest.mark.parametrize("use_cuda_graph", [True, False])
@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
@pytest.mark.parametrize("weights", ["fp16", *KINDS])
def test_answers_are_those_without_drafts(weights, kv_cache_type, max_batch, use_cuda_graph):
    """But for one whose logits are so close that rounding decides."""
    backend = make_backend(weights, kv_cache_type, use_cuda_graph, max_batch=max_batch, drafts=True)
    slot, same = max_batch - 1, 0
    allocations = backend._device.allocations
    for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
        expected = answer(backend, prompt, COUNT, slot, sampling)
        assert None not in expected
        same += with_drafts(backend, prompt, expected, slot, sampling) == expected
        assert answer(backend, prompt, COUNT, slot, sampling) == expected
    assert same >= (6 if max_batch > 1 else 4)  # with several slots all steps have the same kernels
    assert backend._device.allocations == allocations
    backend.close()


@pytest.mark.parametrize("hidden_size", [256, 252])  # 252 is filled up to 256
@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
@pytest.mark.parametrize("weights", ["fp16", *KINDS])
def test_logits_are_those_of_steps_of_one_token(weights, kv_cache_type, hidden_size):
    one = make_backend(weights, kv_cache_type, True, hidden_size=hidden_size)
    backend = make_backend(weights, kv_cache_type, True, hidden_size=hidden_size, drafts=True)
    for prompt in PROMPTS[::2]:
        tokens, logits = [], []
        one.begin(0, SamplingParams(seed=1), prompt)
        tokens.append(one.step([SequenceStep(0, prompt)])[0].result())
        for _ in range(backend.max_draft + 1):
            tokens.append(one.step([SequenceStep(0)])[0].result())
            logits.append(one._device.download(one._work["logits"]))
        for size in (1, 3, 6, backend.max_draft):
            backend.begin(0, SamplingParams(seed=1), prompt)
            backend.step([SequenceStep(0, prompt)])[0].result()
            draft = Draft(np.array(tokens[1 : 1 + size], dtype=np.int32), np.ones(size, dtype=bool))
            backend.step([SequenceStep(0, draft=draft)])[0].result()
            found = backend._device.download(backend._work["draft_logits"])
            for row in range(size + 1):
                assert error(found[row], logits[row]) < 5e-3, (len(prompt), size, row)
    one.close()
    backend.close()


def test_a_row_has_its_own_mask():
    backend = make_backend("int4", "fp16", True, drafts=True)
    masks = np.zeros((5, -(-VOCAB // 32)), dtype=np.uint32)
    masks[np.arange(5), np.arange(5)] = 1 << 9  # ids 9, 41, 73, 105, 137
    draft = Draft(np.array([3, 9, 41, 73, 105], dtype=np.int32), np.array([True] + 4 * [False]), masks)
    for sampling in SAMPLINGS:
        backend.begin(0, sampling, PROMPTS[2])
        backend.step([SequenceStep(0, PROMPTS[2])])[0].result()
        assert backend.step([SequenceStep(0, draft=draft)])[0].result() == (3, 9, 41, 73, 105, 137)
    backend.close()


def test_sequences_with_and_without_a_draft_share_a_step():
    backend = make_backend("int8", "int8", True, max_batch=4, drafts=True)
    expected = [answer(backend, prompt, COUNT) for prompt in PROMPTS[:3]]
    found = alternating(backend, PROMPTS[:3], expected)
    assert found == expected
    backend.close()


def test_an_answer_can_end_at_the_last_place_of_the_cache():
    backend = make_backend("fp16", "fp16", True, drafts=True)
    prompt = np.random.default_rng(3).integers(0, VOCAB, backend.max_context - 8).astype(np.int32)
    expected = answer(backend, prompt, 9)
    backend.begin(0, SamplingParams(seed=1), prompt)
    backend.step([SequenceStep(0, prompt)])[0].result()
    draft = guess(expected, 1, 7, 7)._replace(forced=np.ones(7, dtype=bool))
    assert backend.step([SequenceStep(0, draft=draft)])[0].result()[:7] == tuple(expected[1:8])
    assert backend.step([SequenceStep(0)])[0].result() is None
    backend.close()


def test_what_a_step_costs_is_measured():
    backend = make_backend("int4", "fp16", True, max_batch=3, drafts=True)
    assert backend.step_cost([1]) == 1.0 and backend.step_cost([2]) > 0.5
    assert backend.step_cost([2, 1]) > backend.step_cost([2])
    backend.close()
