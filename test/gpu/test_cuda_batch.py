"""Several sequences at a time on the GPU: each one's text does not depend on the others."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error
from sanitizer_model import VOCAB, make_backend

from batch_steps import Requests
from engine_core.backends import SequenceStep
from engine_core.request import SamplingParams
from packed_weights import KINDS

pytestmark = pytest.mark.gpu

COUNT = 24
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, 1 + 47 * i).astype(np.int32) for i in range(6)]
MASK = np.full(-(-VOCAB // 32), 0x55555555, dtype=np.uint32)
REQUESTS = [  # the model's logits have a standard deviation of 0.04
    (SamplingParams(seed=1), None),
    (SamplingParams(seed=2, temperature=0.02, top_p=0.9), None),
    (SamplingParams(seed=3, temperature=0.03, top_k=50), MASK),
    (SamplingParams(seed=4, repetition_penalty=1.3, logit_bias=((7, 0.08), (9, -0.05))), None),
    (SamplingParams(seed=5, temperature=0.015, min_p=0.05, repetition_penalty=1.1), MASK),
    (SamplingParams(seed=6, temperature=0.04), None),
]
_ALL = Requests(PROMPTS, REQUESTS, COUNT)
together = _ALL.together


@pytest.mark.parametrize("use_cuda_graph", [True, False])
@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
@pytest.mark.parametrize("weights", ["fp16", *KINDS])
def test_a_sequence_has_the_tokens_it_has_alone(weights, kv_cache_type, use_cuda_graph):
    backend = make_backend(weights, kv_cache_type, use_cuda_graph, max_batch=16)
    alone = [_ALL.alone(backend, index) for index in range(6)]
    assert all(None not in tokens for tokens in alone), alone
    # A greedy answer of random weights may repeat itself.
    assert sum(len(set(tokens)) > 1 for tokens in alone) >= 5, alone
    assert all(token % 2 == 0 for index in (2, 4) for token in alone[index]), alone
    allocations = backend._device.allocations
    for slots in ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (15, 3, 8, 0, 7, 1)):
        found = together(backend, dict(enumerate(slots)))
        assert [found[index] for index in range(6)] == alone, slots
    found = together(backend, {3: 0, 1: 9, 0: 4, 5: 2}, {1: 5, 0: 11, 5: 3}, {3: 14})
    assert found[3] == alone[3][:14] and [found[i] for i in (0, 1, 5)] == [alone[i] for i in (0, 1, 5)]
    assert backend._device.allocations == allocations
    backend.close()


@pytest.mark.parametrize("hidden_size", [256, 252])  # 252 is filled up to 256
@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
@pytest.mark.parametrize("weights", ["fp16", *KINDS])
def test_logits_are_those_of_an_engine_for_one(weights, kv_cache_type, hidden_size):
    """A prompt and the step after it, in the last slot of three."""
    one = make_backend(weights, kv_cache_type, True, hidden_size=hidden_size)
    three = make_backend(weights, kv_cache_type, True, max_batch=3, hidden_size=hidden_size)
    for prompt in PROMPTS:
        for forced in (None, 11):
            logits = []
            for backend, slot in ((one, 0), (three, 2)):
                bias = () if forced is None else ((forced, 1e6),)
                backend.begin(slot, SamplingParams(seed=1, logit_bias=bias), prompt)
                backend.step([SequenceStep(slot, prompt)])[0].result()
                if forced is not None:  # the same token is fed to both
                    backend.step([SequenceStep(slot)])[0].result()
                found = backend._device.download(backend._work["logits"])
                logits.append(found if slot == 0 else found[slot])
            assert error(logits[1], logits[0]) < 5e-3, (len(prompt), forced)
    one.close()
    three.close()


def test_a_prefix_of_one_slot_is_loaded_into_another():
    backend = make_backend("int4", "int8", True, max_batch=4)
    sampling, _ = REQUESTS[5]
    expected = _ALL.alone(backend, 5, 3)
    backend.save_kv(3, 0, 100, 90)
    together(backend, {0: 0, 1: 1, 2: 2, 3: 3})
    backend.load_kv(1, 0, 100, 90)
    backend.begin(1, sampling, PROMPTS[5])
    position = 64  # as the prompt was divided into chunks: the sums of the rest are added as before
    tokens = [backend.step([SequenceStep(1, PROMPTS[5][position:], position)])[0].result()]
    while len(tokens) < COUNT:
        tokens.append(backend.step([SequenceStep(1)])[0].result())
    assert tokens == expected
    backend.close()


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_a_model_measures_what_a_batch_launches(monkeypatch, tmp_path, weights):
    from engine_core.cuda.driver import Device

    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    opened = Device.__init__

    def open_as_small(device: Device, ordinal: int = 0) -> None:
        opened(device, ordinal)
        device.name, device.capability, device.num_sms = "small", 87, 8

    monkeypatch.setattr(Device, "__init__", open_as_small)
    texts = []
    for _ in range(2):
        backend = make_backend(weights, "fp16", True, tune_kernels=True, max_batch=5)
        texts.append(together(backend, {index: index for index in range(5)}))
        alone = _ALL.alone(backend, 3, 1)
        backend.close()
        assert alone == texts[-1][3]
    assert texts[0] == texts[1]
    (path,) = tmp_path.glob("launch-configs-*.json")
    text = path.read_text()
    assert "sequences=2" in text
    assert ("tokens=16" in text) == (weights == "fp16")  # rows of packed weights take the GEMV of one row
