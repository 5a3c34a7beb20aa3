"""The sampler on the device against the one on the host, token for token."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.cuda.kernels import sampling
from engine_core.request import SAMPLING_OPTIONS, SamplingParams
from engine_core.sampling import Sampler

pytestmark = pytest.mark.gpu

STEPS = 12


class DeviceSampler:
    """sample.cu with the interface of engine_core.sampling.Sampler."""

    def __init__(self, bench, vocab_size: int, vocab_map: np.ndarray | None = None) -> None:
        self._bench = bench
        self._map = vocab_map
        self._rows = rows = vocab_size if vocab_map is None else len(vocab_map)
        self._vocab_size = vocab_size
        zeros = {"seen": -(-rows // 32), "mask": -(-vocab_size // 32)}
        self._arrays = {name: bench.put(np.zeros(count, dtype=np.uint32), "uint32") for name, count in zeros.items()}
        for name, shape in (("logits", (rows,)), ("scores", sampling.scores_shape(rows)), ("bias", (rows,))):
            self._arrays[name] = bench.put(np.zeros(shape, dtype=np.float32), "fp32")
        for name, dtype in (("params", sampling.PARAMS), ("state", sampling.STATE)):
            self._arrays[name] = bench.put(np.zeros(dtype.itemsize, dtype=np.uint8), "uint8")
        self._tokens = bench.put(np.zeros(sampling.RING, dtype=np.int32), "int32")
        device_map = None if vocab_map is None else bench.put(vocab_map, "int32")
        names = ("logits", "scores", "params", "state", "seen", "bias", "mask")
        self._launches = sampling.sample(
            bench.kernels("fp16"), *(self._arrays[name] for name in names), device_map, self._tokens.address
        )

    def begin(self, options: SamplingParams, history: np.ndarray) -> None:
        """Starts a sequence, as ``Sampler.begin`` does."""
        device, arrays = self._bench.device, self._arrays
        row_of = np.arange(self._vocab_size) if self._map is None else np.full(self._vocab_size, -1)
        if self._map is not None:
            row_of[self._map] = np.arange(self._rows)
        seen = np.zeros(arrays["seen"].shape[0] * 32, dtype=bool)
        rows = row_of[history]
        seen[rows[rows >= 0]] = True
        device.upload(arrays["seen"], np.packbits(seen, bitorder="little"))
        bias = np.zeros(self._rows, dtype=np.float32)
        for token, value in options.logit_bias:
            if row_of[token] >= 0:
                bias[row_of[token]] += np.float32(value)
        device.upload(arrays["bias"], bias)
        device.upload(arrays["state"], np.zeros(sampling.STATE.itemsize, dtype=np.uint8))
        self._values = np.zeros((), dtype=sampling.PARAMS)
        for name in SAMPLING_OPTIONS.keys() & set(sampling.PARAMS.names):
            self._values[name] = getattr(options, name)
        self._values["has_bias"] = bool(options.logit_bias)
        self.step = 0

    def sample(self, logits: np.ndarray, mask: np.ndarray | None = None) -> int:
        """Return what the kernels sample, as ``Sampler.sample`` does."""
        device, arrays = self._bench.device, self._arrays
        self._values["has_mask"] = mask is not None
        device.upload(arrays["params"], np.frombuffer(self._values.tobytes(), dtype=np.uint8))
        device.upload(arrays["logits"], logits)
        if mask is not None:
            device.upload(arrays["mask"], mask)
        device.synchronize()
        for launch in self._launches:
            launch(self._bench.stream)
        token = int(device.download(self._tokens)[self.step % sampling.RING])
        self.step += 1
        return token


def options(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 1, **changes})


CASES = {
    "greedy": {},
    "greedy with all adjustments": dict(repetition_penalty=1.3, logit_bias=((5, 2.5), (7, -np.inf), (5, 1.0))),
    "temperature": dict(temperature=0.8),
    "hot": dict(temperature=5.0, seed=2**64 - 1),
    "cold": dict(temperature=0.01),
    "top-k": dict(temperature=1.0, top_k=5),
    "top-k of one": dict(temperature=1.0, top_k=1),
    "top-k of more than all": dict(temperature=1.0, top_k=10**6),
    "top-p": dict(temperature=1.0, top_p=0.9),
    "small top-p": dict(temperature=1.0, top_p=1e-6),
    "wide top-p": dict(temperature=3.0, top_p=0.999),
    "min-p": dict(temperature=1.5, min_p=0.05),
    "all": dict(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, logit_bias=((3, 4.0),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("vocab_size", [37, 1024, 32000, 151936])
def test_tokens_are_those_of_the_host(bench, vocab_size, name):
    on_device, on_host = DeviceSampler(bench, vocab_size), Sampler(vocab_size)
    for seed in (1, 1 << 40):
        sampled = options(**{"seed": seed, **CASES[name]})
        history = bench.random.integers(0, vocab_size, 20).astype(np.int32)
        on_device.begin(sampled, history)
        on_host.begin(sampled, history)
        for _ in range(STEPS):
            logits = (bench.random.standard_normal(vocab_size) * 3).astype(np.float32)
            assert on_device.sample(logits) == on_host.sample(logits)


def test_ties_go_to_the_first_row(bench):
    on_device = DeviceSampler(bench, 5000)
    on_device.begin(options(), np.empty(0, dtype=np.int32))
    logits = np.zeros(5000, dtype=np.float32)
    logits[[777, 3000]] = 1.0
    assert on_device.sample(logits) == 777
    logits[:] = -0.0
    logits[4000] = 0.0  # equal to -0
    assert on_device.sample(logits) == 0


def test_mask_and_vocabulary_map(bench):
    vocab_size = 3000
    vocab_map = np.sort(bench.random.choice(vocab_size, 500, replace=False)).astype(np.int32)
    on_device, on_host = DeviceSampler(bench, vocab_size, vocab_map), Sampler(vocab_size, vocab_map)
    sampled = options(
        temperature=1.0, top_p=0.9, repetition_penalty=1.2, logit_bias=((int(vocab_map[3]), 3.0), (2999, 1.0))
    )
    history = bench.random.integers(0, vocab_size, 40).astype(np.int32)
    on_device.begin(sampled, history)
    on_host.begin(sampled, history)
    for _ in range(STEPS):
        logits = (bench.random.standard_normal(500) * 3).astype(np.float32)
        mask = bench.random.integers(0, 2**32, -(-vocab_size // 32), dtype=np.uint64).astype(np.uint32)
        token = on_device.sample(logits, mask)
        assert token == on_host.sample(logits, mask)
        assert token in vocab_map and mask[token // 32] >> (token % 32) & 1


def test_the_same_weights_give_the_same_token_every_time(bench):
    """The histogram is filled with atomics: the sums must not depend on their order."""
    on_device = DeviceSampler(bench, 50000)
    logits = np.round(bench.random.standard_normal(50000) * 3, 1).astype(np.float32)  # many ties
    tokens = set()
    for _ in range(8):
        on_device.begin(options(temperature=1.0, top_k=1000, top_p=0.8, seed=77), np.empty(0, dtype=np.int32))
        tokens.add(on_device.sample(logits))
    assert len(tokens) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_nothing_left(bench, temperature):
    on_device = DeviceSampler(bench, 1000)
    on_device.begin(options(temperature=temperature), np.empty(0, dtype=np.int32))
    logits = bench.random.standard_normal(1000).astype(np.float32)
    assert on_device.sample(logits, np.zeros(32, dtype=np.uint32)) == sampling.FAULT_EMPTY
    damaged = logits.copy()
    damaged[500] = np.nan
    assert on_device.sample(damaged) == sampling.FAULT_NAN
    assert on_device.sample(logits) >= 0  # the faults leave nothing behind
