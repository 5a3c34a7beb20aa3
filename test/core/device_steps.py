"""Drive a GPU backend step by step, whatever driver it runs on, and check what must hold then."""

from __future__ import annotations

import numpy as np

from engine_core.cuda.driver import DeviceArray
from engine_core.cuda.kernels.sampling import STATE
from engine_core.measure.steps import begin, decode, extend, prefill
from engine_core.request import SamplingParams

TOLERANCE = 0.02  # of the logits' spread, for a model in 16 bits
GREEDY = SamplingParams(seed=1)


def generate(backend, prompt, count, sampling=GREEDY, start=0) -> list:
    """``count`` tokens after ``prompt``, one step queued ahead, which is waited for at the end; of the prompt, what is
    before ``start`` is there."""
    begin(backend, sampling, prompt)
    pending, tokens = prefill(backend, prompt[start:], start), []
    for _ in range(count):
        ahead = decode(backend)
        tokens.append(pending.result())
        pending = ahead
    pending.result()
    return tokens


def check_tokens_after_a_prefix(backend, prompt: np.ndarray) -> None:
    """A saved prefix of 50 tokens brings the tokens of the whole prompt. Closes the backend."""
    expected = generate(backend, prompt, 8)
    assert None not in expected
    extend(backend, prompt[:50], 0)
    backend.save_kv(0, 0, 64, 50)
    generate(backend, prompt[::-1].copy(), 8)
    backend.load_kv(0, 0, 64, 50)
    assert generate(backend, prompt, 8, start=50) == expected
    backend.close()


def compare_logits(backend, model, prompt: np.ndarray, following: np.ndarray) -> None:
    """Prompts of 1, 64 and all tokens, each anew, then ``following`` one by one. Closes the backend."""
    import checkpoints  # needs torch, which the rest does without

    fed = np.concatenate([prompt, following])
    begin(backend, GREEDY, fed)
    for count in (1, 64, len(prompt)):
        prefill(backend, fed[:count], 0).result()
        _compare(backend, checkpoints.reference_logits(model, fed[:count])[-1])
    expected = checkpoints.reference_logits(model, fed)
    for position in range(len(prompt), len(fed)):
        address = backend._work["state"].address + STATE.fields["token"][1]
        backend._device.upload(DeviceArray(address, (1,), "int32"), fed[position : position + 1])
        decode(backend).result()
        _compare(backend, expected[position])
    backend.close()


def _compare(backend, expected: np.ndarray) -> None:
    found = backend._device.download(backend._work["logits"])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
