"""The host sampler against published vectors, the processors of transformers, and its own distribution."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.errors import EngineFaultError, InvalidSamplingError
from engine_core.request import SamplingParams
from engine_core.sampling import Sampler, philox4x32, uniform

NUM_DRAWS = 6_000


def sampling(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 7, **changes})


def draws(logits, count=NUM_DRAWS, history=(), vocab_map=None, vocab_size=None, mask=None, **options) -> np.ndarray:
    """How often each id came in ``count`` draws, each from a fresh seed."""
    sampler = Sampler(vocab_size or len(logits), vocab_map)
    counts = np.zeros(vocab_size or len(logits))
    for seed in range(count):
        sampler.begin(sampling(seed=seed, **options), np.array(history, dtype=np.int32))
        counts[sampler.sample(logits, mask)] += 1
    return counts / count


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return weights / weights.sum()


def bits(ids, vocab_size) -> np.ndarray:
    allowed = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.uint8)
    allowed[list(ids)] = 1
    return np.packbits(allowed, bitorder="little").view(np.uint32)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123, kat_vectors: philox4x32 with 10 rounds
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(key, counter, expected):
    assert philox4x32(key, counter) == expected


def test_uniform_is_uniform_and_depends_on_seed_and_step():
    values = np.array([uniform(seed, step) for seed in range(200) for step in range(100)])
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, bins=20, range=(0, 1))[0] / len(values) - 0.05).max() < 0.006
    assert len(np.unique(values)) == len(values)


REFERENCES = [
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(top_p=0.6),
    dict(top_p=0.95, temperature=0.8, top_k=20),
    dict(min_p=0.2),
    dict(min_p=0.05, top_p=0.9, temperature=1.5),
    dict(repetition_penalty=1.5),
    dict(repetition_penalty=0.7, top_k=8, temperature=0.5),
]


@pytest.mark.parametrize("options", REFERENCES, ids=str)
def test_the_distribution_is_that_of_transformers(options):
    """Drawn frequencies against the probabilities that transformers' logits processors leave."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = np.random.default_rng(3).normal(scale=2, size=40).astype(np.float32)
    history = [3, 17, 17, 30]
    steps = []
    if "repetition_penalty" in options:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    steps.append(hf.TemperatureLogitsWarper(float(options.get("temperature", 1.0))))
    if "top_k" in options:
        steps.append(hf.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(hf.MinPLogitsWarper(options["min_p"]))
    scores = torch.tensor(logits)[None]
    for step in steps:
        scores = step(torch.tensor([history]), scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()

    found = draws(logits, history=history, **options)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / NUM_DRAWS)
    assert found[expected > 0.004].all(), "a token that transformers keeps never came"


def test_a_nucleus_larger_than_the_first_guess_is_whole():
    """A flat distribution over 30,000 ids: top-p keeps 90 % of them, far more than are sorted at first."""
    from engine_core.sampling import _nucleus

    weights = np.random.default_rng(0).uniform(0.9, 1.0, size=30_000).astype(np.float32)
    kept = _nucleus(weights, 0.9)
    order = np.argsort(-weights, kind="stable")
    before = np.concatenate(([0.0], np.cumsum(weights[order], dtype=np.float64)[:-1]))
    expected = np.sort(order[before < 0.9 * weights.sum(dtype=np.float64)])
    assert np.array_equal(kept, expected)


def test_greedy_takes_the_peak_and_the_first_of_equal_ones():
    sampler = Sampler(5)
    sampler.begin(sampling(temperature=0.0), np.array([0], dtype=np.int32))
    assert sampler.sample(np.array([0.0, 3.0, 1.0, 3.0, 2.0], dtype=np.float32)) == 1


def test_the_same_seed_gives_the_same_tokens_and_another_one_others():
    logits = np.random.default_rng(1).normal(size=(50, 1000)).astype(np.float32)

    def tokens(seed):
        sampler = Sampler(1000)
        sampler.begin(sampling(seed=seed), np.array([1], dtype=np.int32))
        return [sampler.sample(row) for row in logits]

    assert tokens(11) == tokens(11)
    assert tokens(11) != tokens(12)
    assert len(set(tokens(11))) > 30, "each step has a draw of its own"


def test_sampled_tokens_are_penalized_too():
    sampler = Sampler(3)
    sampler.begin(sampling(temperature=0.0, repetition_penalty=2.0), np.array([2], dtype=np.int32))
    logits = np.array([1.0, 1.5, 1.9], dtype=np.float32)
    assert [sampler.sample(logits) for _ in range(3)] == [1, 0, 2]  # 1.5 (2 was penalized), 1.0, 0.95
    sampler.begin(sampling(temperature=0.0, repetition_penalty=2.0), np.array([], dtype=np.int32))
    assert sampler.sample(logits) == 2, "a new sequence forgets the penalties of the last"


def test_logits_are_left_as_they_are():
    logits = np.arange(10, dtype=np.float32)
    sampler = Sampler(10)
    sampler.begin(sampling(repetition_penalty=3.0, logit_bias=((4, 5.0),)), np.array([9], dtype=np.int32))
    sampler.sample(logits, bits([1, 2], 10))
    assert np.array_equal(logits, np.arange(10, dtype=np.float32))


def test_bias_and_mask_decide():
    logits = np.zeros(70, dtype=np.float32)
    assert draws(logits, 50, logit_bias=((66, 50.0),))[66] == 1.0
    found = draws(logits, 400, mask=bits([3, 65], 70))
    assert set(np.flatnonzero(found)) == {3, 65}


def test_a_vocab_map_gives_full_ids_and_never_another():
    vocab_map = np.array([5, 90, 7, 33], dtype=np.int32)
    logits = np.array([0.0, 0.5, 1.0, 1.5], dtype=np.float32)
    found = draws(logits, 8_000, vocab_map=vocab_map, vocab_size=100)
    assert np.abs(found[vocab_map] - softmax(logits)).max() < 0.03
    assert found.sum() == pytest.approx(found[vocab_map].sum())
    options = dict(temperature=0.0, repetition_penalty=4.0, logit_bias=((33, -9.0), (8, 99.0)))
    found = draws(logits, 1, history=[7, 2], vocab_map=vocab_map, vocab_size=100, mask=bits([90, 7], 100), **options)
    assert found[90] == 1.0, "penalty, bias and mask speak of full-vocabulary ids"


def test_no_token_left_is_the_requests_fault_and_nan_is_the_engines():
    sampler = Sampler(8)
    for temperature in (0.0, 1.0):
        sampler.begin(sampling(temperature=temperature), np.array([0], dtype=np.int32))
        with pytest.raises(InvalidSamplingError):
            sampler.sample(np.zeros(8, dtype=np.float32), np.zeros(1, dtype=np.uint32))
        with pytest.raises(EngineFaultError):
            sampler.sample(np.full(8, np.nan, dtype=np.float32))
