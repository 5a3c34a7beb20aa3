"""Short convolutions on the GPU: the kernels against their reference, then LFM2 with packed weights and in a batch."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error
from test_cuda_models import CONVOLUTIONS, check_greedy, load, random_model

from device_steps import GREEDY, generate
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.build import build_cuda
from engine_core.cuda.kernels import reference, sampling, short_conv
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.measure.steps import begin, decode, extend, prefill

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")

CONTEXT = 300
TOLERANCE = {"fp16": 1e-3, "bf16": 6e-3}
SHAPES = [(3, 64), (3, 520), (3, 2048), (1, 96), (5, 1032), (8, 512)]  # tokens that an output sees, channels


class _Case:
    """Rings of three slots, whose channels before ``position`` are known and all others NaN."""

    def __init__(self, bench, taps: int, cols: int, dtype: str, has_bias: bool) -> None:
        self.bench, self.kernels, self.dtype, self.taps, self.cols = bench, bench.kernels(dtype), dtype, taps, cols
        self.weights, self.w = bench.normal((taps, cols), dtype)
        self.bias, self.b = bench.normal((cols,), dtype) if has_bias else (None, np.zeros(cols))
        self.rings = np.full((3, short_conv.ring_rows(taps), cols), np.nan, dtype=np.float32)
        self.floats = self.rings[0].size

    def earlier(self, slot: int, position: int) -> np.ndarray:
        """Return random inputs of the tokens before, which are in the ring of ``slot``, or zeros before the start."""
        found = np.zeros((self.taps - 1, self.cols))
        for index in range(self.taps - 1):
            place = position - self.taps + 1 + index
            if place >= 0:
                values = self.bench.random.standard_normal(self.cols, dtype=np.float32)
                self.rings[slot, place % self.taps], found[index] = values, values
        return found

    def put_rings(self):
        """Return (all rings on the device, the first one's array; None without)."""
        if not self.floats:
            return None, None
        rings = self.bench.put(self.rings, "fp32")
        return rings, rings.at(0)

    def expect_ring(self, slot: int, position: int, inputs: np.ndarray) -> None:
        for token in range(max(0, len(inputs) - self.taps), len(inputs)):
            if self.floats:
                self.rings[slot, (position + token) % self.taps] = inputs[token]

    def check_rings(self, rings) -> None:
        if rings is not None:
            found = self.bench.get(rings)
            assert (np.isnan(found) == np.isnan(self.rings)).all()
            assert np.allclose(found, self.rings, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("taps, cols", SHAPES)
def test_steps(bench, taps, cols, dtype):
    """One sequence, then rows of a batch: one does nothing, one is past the end."""
    for position in (0, 1, 2, 7, CONTEXT - 1):
        case = _Case(bench, taps, cols, dtype, has_bias=position == 7)
        before, (gates, values) = case.earlier(0, position), bench.normal((3 * cols,), dtype)
        rings, ring = case.put_rings()
        state = np.zeros((), dtype=sampling.STATE)
        state["position"] = position
        held = bench.put(np.frombuffer(state.tobytes(), dtype=np.uint8), "uint8")
        output = bench.poisoned((cols,), dtype)
        arrays = (case.kernels, gates, case.weights, case.bias, ring, held, output, CONTEXT)
        short_conv.short_conv_step(*arrays)(bench.stream)
        expected, inputs = reference.short_convolution(values[None], before, case.w, case.b)
        case.expect_ring(0, position, inputs)
        assert error(bench.get(output), expected[0]) < TOLERANCE[dtype]
        case.check_rings(rings)

    case = _Case(bench, taps, cols, dtype, has_bias=True)
    slots, positions = np.array([2, -1, 0, 1], dtype=np.int32), [5, 9, CONTEXT, 0]
    gates, values = bench.normal((4, 3 * cols), dtype)
    before = {row: case.earlier(slots[row], positions[row]) for row in (0, 2, 3)}
    rings, ring = case.put_rings()
    states = np.zeros(4, dtype=sampling.STATE)
    states["position"] = positions
    held = bench.put(states.view(np.uint8).reshape(4, -1), "uint8")
    output = bench.poisoned((4, cols), dtype)
    arrays = (case.kernels, gates, case.weights, case.bias, ring, held, output, CONTEXT)
    short_conv.short_conv_step(*arrays, bench.put(slots, "int32"), case.floats)(bench.stream)
    found = bench.get(output)
    for row in range(4):
        if row in (1, 2):
            assert np.isnan(found[row]).all()
            continue
        expected, inputs = reference.short_convolution(values[row : row + 1], before[row], case.w, case.b)
        case.expect_ring(slots[row], positions[row], inputs)
        assert error(found[row], expected[0]) < TOLERANCE[dtype]
    case.check_rings(rings)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("taps, cols", SHAPES)
def test_chunks(bench, taps, cols, dtype):
    for start, count in ((0, 1), (0, 2), (0, 9), (1, 1), (2, 8), (4, 3), (5, 64), (30, 131), (0, 200)):
        case, slot = _Case(bench, taps, cols, dtype, has_bias=count == 9), 2 if count % 2 else 0
        slotted = case.floats if slot else 0
        before, rows = case.earlier(slot if slotted else 0, start), count + 5
        gates, values = bench.normal((rows, 3 * cols), dtype)
        rings, ring = case.put_rings()
        words = [start, count, slot] if slotted else [start, count]
        chunk = bench.put(np.array(words, dtype=np.int32), "int32")
        output = bench.poisoned((rows, cols), dtype)
        arrays = (case.kernels, gates, case.weights, case.bias, ring, chunk, output)
        short_conv.short_conv_chunk(*arrays, slotted)(bench.stream)
        expected, inputs = reference.short_convolution(values[:count], before, case.w, case.b)
        case.expect_ring(slot if slotted else 0, start, inputs)
        found = bench.get(output)
        assert error(found[:count], expected) < TOLERANCE[dtype] and np.isnan(found[count:]).all()
        case.check_rings(rings)


def use_weights_of(engine_dir, model, kind: str) -> None:
    """Give LFM2 in transformers what the engine's packed weights stand for."""
    stored, config = SafetensorsFile(engine_dir / "weights.safetensors"), model.config
    dtype, hidden = read_manifest(engine_dir).options["dtype"], config.hidden_size
    inner, kv = model.model.layers[0].feed_forward.w1.weight.shape[0], config.num_key_value_heads
    widths = [count * (hidden // config.num_attention_heads) for count in (config.num_attention_heads, kv, kv)]

    def restored(name: str, rows: int, columns: int) -> torch.Tensor:
        return torch.tensor(reference.packed_weight(stored.raw(name), kind, (rows, columns), dtype)).float()

    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(restored("head", config.vocab_size, hidden))
        for i, layer in enumerate(model.model.layers):
            gate_up = restored(f"layers.{i}.gate_up", 2 * inner, hidden)
            layer.feed_forward.w1.weight.copy_(gate_up[0::2])
            layer.feed_forward.w3.weight.copy_(gate_up[1::2])
            layer.feed_forward.w2.weight.copy_(restored(f"layers.{i}.down", hidden, inner))
            if hasattr(layer, "conv"):
                layer.conv.in_proj.weight.copy_(restored(f"layers.{i}.conv_in", 3 * hidden, hidden))
                layer.conv.out_proj.weight.copy_(restored(f"layers.{i}.conv_out", hidden, hidden))
                continue
            attention = layer.self_attn
            parts = restored(f"layers.{i}.qkv", sum(widths), hidden).split(widths)
            for linear, values in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True):
                linear.weight.copy_(values)
            attention.out_proj.weight.copy_(restored(f"layers.{i}.o", hidden, hidden))


@pytest.mark.parametrize("quantization, dtype", [("int4", "fp16"), ("int8", "bf16"), ("fp8", "fp16")])
def test_quantized_logits(tmp_path, quantization, dtype):
    torch.manual_seed(8)
    model = random_model(*CONVOLUTIONS["lfm2"], intermediate_size=384, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "checkpoint")
    build_cuda(tmp_path / "checkpoint", tmp_path / "engine", quantization=quantization, max_context=256, dtype=dtype)
    use_weights_of(tmp_path / "engine", model, quantization)
    check_greedy(tmp_path / "engine", model)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    torch.manual_seed(7)
    directory = tmp_path_factory.mktemp("lfm2")
    random_model(*CONVOLUTIONS["lfm2"]).save_pretrained(directory / "checkpoint")
    build_cuda(directory / "checkpoint", directory / "engine", max_context=256)
    return directory / "engine"


@pytest.mark.parametrize("session_memory", [0, 4])
@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_states_are_kept_and_gone_on_from(engine_dir, use_cuda_graph, session_memory):
    """In the slots of a batch: from a mark, from the pool of the device and of the host, and a token back."""
    config = dict(max_batch=3, use_cuda_graph=use_cuda_graph, session_memory=session_memory, prompt_cache_entries=2)
    backend, ids = load(engine_dir, **config), np.random.default_rng(3).integers(0, 1003, 90).astype(np.int32)

    def go_on(slot: int, text: np.ndarray, position: int, count: int = 10) -> list[int]:
        backend.begin(slot, GREEDY, text)
        tokens = [backend.step([SequenceStep(slot, text[position:], position)])[0].result()]
        return tokens + [backend.step([SequenceStep(slot)])[0].result() for _ in range(count - 1)]

    try:
        allocations, expected = backend._device.allocations, go_on(0, ids, 0)
        assert go_on(2, ids, 0) == expected
        backend.begin(1, GREEDY, ids)
        for start, stop in ((0, 33), (33, 64)):
            backend.step([SequenceStep(1, ids[start:stop], start, samples=False, marks=True)])[0].result()
        assert backend.state_positions(1, marked=True) == [33, 64]
        backend.save_kv(1, 0, 16, 33)
        backend.save_state(1, 33, 1)
        go_on(1, ids, 64)
        assert go_on(1, ids, 33) == expected
        go_on(2, ids[::-1].copy(), 0)
        backend.load_kv(2, 0, 16, 33)
        backend.load_state(2, 33, 1)
        assert go_on(2, ids, 33) == expected
        tokens = go_on(0, ids, 0, 3)  # the last two of which were fed
        text = np.concatenate([ids, tokens[:1], ids[:20]]).astype(np.int32)
        wanted = go_on(1, text, 0)
        assert go_on(0, text, len(ids) + 1) == wanted
        assert backend._device.allocations == allocations
    finally:
        backend.close()


def test_tokens_do_not_depend_on_how_a_prompt_is_fed(engine_dir):
    """Its last token in a step of its own, of the prompt's kernels or of a decode step's."""
    backend, ids = load(engine_dir), np.random.default_rng(5).integers(0, 1003, 120).astype(np.int32)
    try:
        expected = generate(backend, ids, 12)
        for size in (1, 2, 3, 50, 119):
            for start in range(0, 119, size):
                extend(backend, ids[start : min(start + size, 119)], start)
            begin(backend, GREEDY, ids)
            tokens = [prefill(backend, ids[119:], 119).result()]
            assert tokens + [decode(backend).result() for _ in range(11)] == expected
    finally:
        backend.close()
