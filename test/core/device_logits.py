"""A GPU backend's logits against transformers, step by step, whatever driver it runs on."""

from __future__ import annotations

import numpy as np

import checkpoints
from engine_core.backends import TokenSampling
from engine_core.device import DeviceArray
from engine_core.kernels.sampling import STATE

TOLERANCE = 0.02  # of the logits' spread, for a model in 16 bits
GREEDY = TokenSampling(0.0, 1.0, 0, 0.0, 1.0, 1, (), frozenset())


def compare_logits(backend, model, prompt: np.ndarray, following: np.ndarray) -> None:
    """Prompts of 1, 64 and all tokens, each anew, then ``following`` one by one. Closes the backend."""
    fed = np.concatenate([prompt, following])
    expected = checkpoints.reference_logits(model, fed)
    backend.begin(GREEDY, fed)
    for count in (1, 64, len(prompt)):
        backend.prefill(fed[:count], 0).result()
        _compare(backend, expected[count - 1])
    for position in range(len(prompt), len(fed)):
        address = backend._work["state"].address + STATE.fields["token"][1]
        backend._device.upload(DeviceArray(address, (1,), "int32"), fed[position : position + 1])
        backend.decode().result()
        _compare(backend, expected[position])
    backend.close()


def _compare(backend, expected: np.ndarray) -> None:
    found = backend._device.download(backend._work["logits"])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
