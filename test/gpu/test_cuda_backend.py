"""The backend protocol on the GPU: stopping, interrupting, prefixes, faults; nothing is allocated after load."""

from __future__ import annotations

import numpy as np
import pytest

from device_steps import generate
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.layout import CudaSpec, weight_arrays
from engine_core.cuda.driver import Device, DeviceMemoryError
from engine_core.errors import EngineFaultError, InvalidSamplingError
from engine_core.formats.weight_formats import weight_format
from engine_core.measure.steps import begin, decode, prefill
from engine_core.models.shapes import spec_of
from engine_core.request import SamplingParams

pytestmark = pytest.mark.gpu

VOCAB, CONTEXT = 500, 301  # no multiple of the eight tokens whose scales an int8 cache copies at once
MODEL = dict(
    architectures=["LlamaForCausalLM"],
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCAB,
    rms_norm_eps=1e-5,
)


def options(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 1, **changes})


def make_backend(fill=None, *, vocab_map=None, kv_int8=False, **changes) -> CudaBackend:
    """A random model of two layers. ``fill``: changes a weight (name, values) in place."""
    values = dict(
        model=spec_of(MODEL),
        kv_int8=kv_int8,
        max_context=CONTEXT,
        head_rows=VOCAB if vocab_map is None else len(vocab_map),
        dtype="fp16",
        weight_format=weight_format("fp16"),
        chunk=64,
        pool_tokens=208,
    )
    spec = CudaSpec(**{**values, **changes})
    random = np.random.default_rng(9)
    weights = {
        name: (random.standard_normal(a.shape) * 0.2).astype(np.float16) for name, a in weight_arrays(spec).items()
    }
    if fill is not None:
        for item in weights.items():
            fill(*item)
    device = Device()
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(8) / 8)
    rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    return CudaBackend(device, spec, lambda name, a: device.upload(a, weights[name]), rope, vocab_map=vocab_map)


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=["16-bit KV", "int8 KV", "pool on the host"])
def backend(request):
    backend = make_backend(kv_int8=request.param[0], pool_on_host=request.param[1])
    yield backend
    backend.close()
    backend.close()  # twice is fine


PROMPT = np.random.default_rng(2).integers(0, VOCAB, 90).astype(np.int32)


def test_nothing_is_allocated_after_load(backend):
    kinds = [
        options(),
        options(temperature=1.0, top_p=0.9, top_k=20),
        options(repetition_penalty=1.3, logit_bias=((3, 1.0),)),
    ]
    generate(backend, PROMPT, 5, kinds[1])
    allocations, (free, _) = backend._device.allocations, backend._device.memory_info()
    for i in range(300):
        generate(backend, PROMPT[: 1 + i % 90], 4, kinds[i % 3])
        backend.save_kv(0, 0, i % 2 * 96, 1 + i % 90)
        backend.load_kv(0, 0, i % 2 * 96, 1 + i % 90)
    assert backend._device.allocations == allocations
    assert backend._device.memory_info()[0] == free


def test_close_gives_all_memory_back():
    make_backend().close()  # the driver keeps some of its own the first time
    outer = Device()  # keeps the context, so that its memory is not counted
    before = outer.memory_info()[0]
    for _ in range(3):
        backend = make_backend()
        assert outer.memory_info()[0] < before
        backend.close()
    assert abs(outer.memory_info()[0] - before) <= 4 << 20
    outer.close()


def test_what_does_not_fit_leaves_nothing_behind():
    outer = Device()
    before = outer.memory_info()[0]
    with pytest.raises(DeviceMemoryError, match="cuMemAlloc"):
        make_backend(pool_tokens=1 << 32)
    assert abs(outer.memory_info()[0] - before) <= 4 << 20
    outer.close()


def test_a_stop_id_ends_the_sequence(backend):
    tokens = generate(backend, PROMPT, 20, options(temperature=1.0, seed=3))
    stop = tokens[7]
    first = tokens.index(stop)
    stopped = generate(backend, PROMPT, 20, options(temperature=1.0, seed=3, stop_token_ids=frozenset({stop})))
    assert stopped == tokens[: first + 1] + [None] * (19 - first)
    assert generate(backend, PROMPT, 20, options(temperature=1.0, seed=3)) == tokens


def test_interrupt_ends_what_is_queued_until_begin(backend):
    expected = generate(backend, PROMPT, 5, options())
    begin(backend, options(), PROMPT)
    pending = prefill(backend, PROMPT, 0)
    assert pending.result() == expected[0]
    ahead = decode(backend)
    backend.interrupt(0)
    assert ahead.result() is None
    assert decode(backend).result() is None
    assert prefill(backend, PROMPT, 0).result() is None
    assert generate(backend, PROMPT, 5, options()) == expected


def test_the_context_can_be_filled_to_its_end_and_not_beyond(backend):
    prompt = np.random.default_rng(5).integers(0, VOCAB, CONTEXT - 3).astype(np.int32)
    tokens = generate(backend, prompt, 8, options())
    assert None not in tokens[:4] and tokens[4:] == [None] * 4


def test_prefixes_bring_the_same_tokens(backend):
    expected = generate(backend, PROMPT, 10, options())
    other = PROMPT[::-1].copy()
    begin(backend, options(), PROMPT)
    prefill(backend, PROMPT, 0).result()
    backend.save_kv(0, 0, 100, 60)
    generate(backend, other, 10, options())
    backend.save_kv(0, 0, 0, 60)
    backend.load_kv(0, 0, 100, 60)
    assert generate(backend, PROMPT, 10, options(), start=60) == expected


def test_a_mask_holds_for_its_step(backend):
    allowed = [17, 300]
    mask = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    begin(backend, options(temperature=5.0), PROMPT)
    tokens = [prefill(backend, PROMPT, 0, mask).result()]
    for _ in range(12):
        tokens.append(decode(backend, mask).result())
    assert set(tokens) == set(allowed)
    free = [decode(backend).result() for _ in range(12)]
    assert not set(free) <= set(allowed)
    with pytest.raises(InvalidSamplingError):
        decode(backend, np.zeros_like(mask)).result()
    assert decode(backend).result() is None


def test_reduced_vocabulary_gives_full_ids():
    vocab_map = np.sort(np.random.default_rng(1).choice(VOCAB, 50, replace=False)).astype(np.int32)
    backend = make_backend(vocab_map=vocab_map)
    tokens = generate(
        backend, PROMPT, 30, options(temperature=2.0, repetition_penalty=1.5, logit_bias=((int(vocab_map[2]), 1.0),))
    )
    backend.close()
    assert set(tokens) <= set(vocab_map.tolist()) and len(set(tokens)) > 5
    assert backend.reduced_vocab_size == 50 and backend.vocab_size == VOCAB


@pytest.mark.parametrize("kv_int8", [False, True])
def test_nan_is_a_fault_of_the_engine(kv_int8):
    def damage(name: str, values: np.ndarray) -> None:
        if name == "layers.1.o":
            values[3, 5] = np.nan

    backend = make_backend(damage, kv_int8=kv_int8)
    begin(backend, options(), PROMPT)
    pending = prefill(backend, PROMPT, 0)
    ahead = decode(backend)
    with pytest.raises(EngineFaultError, match="NaN"):
        pending.result()
    assert ahead.result() is None
    backend.close()


def test_seeds_decide_the_tokens(backend):
    hot = [generate(backend, PROMPT, 20, options(temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
