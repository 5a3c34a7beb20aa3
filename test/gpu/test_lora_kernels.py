"""LoRA adapters on the GPU: the kernels against their references, then a whole model."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error
from sanitizer_model import MODULES, VOCAB, make_adapters, make_backend
from test_batch_kernels import EPS, TOLERANCE, make_weight

from batch_steps import Requests
from engine_core.backends import SequenceStep
from engine_core.cuda.kernels import KernelArgumentError, linear, linear_batch, linear_packed, lora, reference
from engine_core.formats.lora import LoraAdapter
from engine_core.measure.random_checkpoint import write_random_adapter
from engine_core.request import SamplingParams
from packed_weights import KINDS

pytestmark = pytest.mark.gpu

COUNT = 3  # adapters
SHAPES = [(48, 384), (1280, 256), (1008, 2048), (6144, 4096), (4096, 14336), (50, 72), (26, 2568)]
# Weights, rows, columns, rank, dtype: every format, then every shape and other ranks.
MATRICES = [
    (kind, rows, cols, 16, "fp16") for kind in ("fp16", *KINDS) for rows, cols in ((48, 384), (50, 72), (1008, 2048))
]
MATRICES += [(kind, *shape, rank, "bf16") for kind in ("fp16", "int4") for shape in SHAPES for rank in (8, 64)]
MATRICES += [(kind, 1008, 2048, 256, "fp16") for kind in ("fp16", "int4")]  # more sums than CTAs that make them


class Adapters:
    """Random adapters of a matrix [rows, cols]; ``kind``: one, three (q, k and v) or two parts in turn."""

    def __init__(self, bench, rows: int, cols: int, rank: int, kind: str, dtype: str) -> None:
        self.bench, self.kernels, self.dtype, self.rows, self.cols = bench, bench.kernels(dtype), dtype, rows, cols
        splits = (rows // 2, rows // 2 + rows // 4) if kind == "three" else ()
        num_parts = {"one": 1, "three": 3, "pairs": 2}[kind]
        a, self.a = bench.normal((COUNT, num_parts * rank, cols), dtype, cols**-0.5)
        b, self.b = bench.normal((COUNT, rows, rank), dtype, 0.3)
        self.matrix = lora.LoraMatrix(a, b, splits, pairs=kind == "pairs")
        every = np.arange(rows)
        self.parts = every % 2 if kind == "pairs" else sum((every >= split).astype(int) for split in (rows, *splits))

    def term(self, numbers: list[int]) -> lora.LoraTerm:
        sums = self.bench.poisoned((len(numbers), self.matrix.num_sums), "fp32")
        return lora.LoraTerm(self.matrix, sums, self.bench.put(np.array(numbers, dtype=np.int32), "int32"))

    def expected(self, x: np.ndarray, numbers: list[int]) -> np.ndarray:
        """float64 [n, rows] of x [n, cols]; zeros without an adapter."""
        added = np.zeros((len(x), self.rows))
        for i, number in enumerate(numbers):
            if number >= 0:
                sums = (self.a[number] @ x[i]).reshape(1, self.matrix.parts, -1)
                added[i] = reference.lora_expand(sums, self.b[number], self.parts)[0]
        return added


@pytest.mark.parametrize("weights, rows, cols, rank, dtype", MATRICES)
def test_gemv_with_an_adapter(bench, weights, rows, cols, rank, dtype):
    kernels = bench.kernels(dtype)
    weight, w = make_weight(bench, rows, cols, weights, dtype)
    gemv = linear.gemv if weights == "fp16" else linear_packed.gemv_packed
    vector, x = bench.normal((cols,), dtype, 3.0)
    stream, s = bench.normal((cols,), "fp32", 3.0)
    norm, g = bench.normal((cols,), dtype)
    bias, b = bench.normal((rows,), dtype)
    normed = reference.rms_norm(s, g, EPS)
    for number in (-1, 2):
        cases = [
            ("three", linear.STORE, (rows,), dtype, {"bias": bias}, stream, normed),
            ("one", linear.RESIDUAL, (rows,), "fp32", {}, vector, x),
            ("pairs", linear.SILU, (rows // 2,), dtype, {}, stream, normed),
        ]
        for kind, epilogue, shape, out, more, source, values in cases:
            adapters = Adapters(bench, rows, cols, rank, kind, dtype)
            term, with_norm = adapters.term([number]), source is stream
            options = {"norm_weight": norm, "norm_eps": EPS} if with_norm else {}
            sums = w @ values + adapters.expected(values[None], [number])[0]
            output, before = (
                bench.normal(shape, "fp32") if epilogue == linear.RESIDUAL else (bench.poisoned(shape, out), 0)
            )
            if epilogue == linear.STORE:
                expected = sums + b
            else:
                expected = reference.silu_multiply(sums) if epilogue == linear.SILU else before + sums
            gemv(kernels, weight, source, output, epilogue, lora=term, **options, **more)(bench.stream)
            # As test_gemv_packed_with_every_epilogue_and_dequantize says of a packed GEMV.
            allowed = max(TOLERANCE[out], TOLERANCE[dtype] * with_norm, 0.0 if weights == "fp16" else 5e-5)
            assert error(bench.get(output), expected) < allowed, (kind, number)


@pytest.mark.parametrize("rank", [16, 256])
@pytest.mark.parametrize("weights", ["fp16", *KINDS])
def test_gemvs_that_overlap_wait_for_their_own_sums(bench, weights, rank):
    """Some hundred times the same, each time one after the other without a pause: the bits stay the same."""
    rows, cols, count = 2048, 2048, 8
    weight, _ = make_weight(bench, rows, cols, weights, "fp16")
    gemv = linear.gemv if weights == "fp16" else linear_packed.gemv_packed
    adapters, (vector, _) = Adapters(bench, rows, cols, rank, "one", "fp16"), bench.normal((cols,), "fp16")
    sums = bench.poisoned((count, rank), "fp32")
    number = bench.put(np.array([1], dtype=np.int32), "int32")
    outputs = bench.poisoned((count, rows), "fp16")
    launches = [
        gemv(
            *(bench.kernels("fp16"), weight, vector, outputs.at(i), linear.STORE),
            lora=lora.LoraTerm(adapters.matrix, sums.at(i).reshape(1, rank), number),
        )
        for i in range(count)
    ]
    first = None
    for _ in range(30):
        bench.stream.fill(sums, lora.NOT_YET)
        for launch in launches:
            launch(bench.stream)
        found = bench.get(outputs)
        first = found[0] if first is None else first
        assert np.isfinite(found).all() and (found == first).all()


@pytest.mark.parametrize("weights, rows, cols, rank, dtype", MATRICES)
@pytest.mark.parametrize("numbers", [[2], [-1, 0], [1, -1, 2, 0, 0, 2, -1], [0, 1, 2, -1] * 4])
def test_gemm_batch_with_an_adapter_for_each_row(bench, numbers, weights, rows, cols, rank, dtype):
    kernels, n = bench.kernels(dtype), len(numbers)
    weight, w = make_weight(bench, rows, cols, weights, dtype)
    vectors, x = bench.normal((n, cols), dtype, 3.0)
    bias, b = bench.normal((rows,), dtype)
    num_sums, num_counters = linear_batch.batch_scratch([(rows, cols)], n, bench.device.num_sms)
    counters = bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")
    scratch = (bench.chunk(0, n), bench.poisoned((num_sums,), "fp32"), counters)
    for kind, epilogue in (("three", linear.STORE), ("one", linear.RESIDUAL), ("pairs", linear.SILU)):
        adapters = Adapters(bench, rows, cols, rank, kind, dtype)
        term = adapters.term(numbers)
        sums = x @ w.T + adapters.expected(x, numbers)
        if epilogue == linear.STORE:
            output, more, expected = bench.poisoned((n, rows), dtype), {"bias": bias}, sums + b
        elif epilogue == linear.SILU:
            output, more, expected = bench.poisoned((n, rows // 2), dtype), {}, reference.silu_multiply(sums)
        else:
            output, before = bench.normal((n, rows), "fp32")
            more, expected = {}, before + sums
        lora.lora_shrink(kernels, term, vectors)(bench.stream)
        launch = linear_batch.gemm_batch(kernels, weight, vectors, output, epilogue, *scratch, lora=term, **more)
        launch(bench.stream)
        least = 0.0 if weights == "fp16" else 2e-4  # see test_gemm_batch_with_every_epilogue
        assert error(bench.get(output), expected) < max(TOLERANCE[output.dtype], least), kind


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rank", [8, 24, 256])
@pytest.mark.parametrize("rows, cols", [(48, 384), (1008, 2048), (50, 72), (26, 2568)])
@pytest.mark.parametrize("kind", ["one", "three", "pairs"])
@pytest.mark.parametrize("count", [1, 7, 70])
def test_a_chunk_with_an_adapter(bench, count, kind, rows, cols, rank, dtype):
    kernels, most = bench.kernels(dtype), 96
    vectors, x = bench.normal((most, cols), dtype)
    adapters = Adapters(bench, rows, cols, rank, kind, dtype)
    for out in ("fp32", dtype):
        for number in (1, -1):
            output, before = bench.normal((most, rows), out)
            chunk = bench.put(np.array([5, count, 0, number], dtype=np.int32), "int32")
            sums = bench.poisoned((most, adapters.matrix.num_sums), "fp32")
            lora.lora_chunk(kernels, adapters.matrix, vectors, output, chunk, sums)(bench.stream, most)
            found, expected = bench.get(output), before[:count] + adapters.expected(x[:count], count * [number])
            assert error(found[:count], expected) < TOLERANCE[out]
            assert (found[count:] == before[count:]).all()


def test_what_the_kernels_cannot_read_is_refused(bench):
    vectors, _ = bench.normal((1, 64), "fp16")
    for rank in (12, 264):
        term = Adapters(bench, 32, 64, rank, "one", "fp16").term([0])
        with pytest.raises(KernelArgumentError, match="rank"):
            lora.lora_shrink(bench.kernels("fp16"), term, vectors)


# --- a model ----------------------------------------------------------------------------------------------

PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, 1 + 47 * i).astype(np.int32) for i in range(6)]
REQUESTS = [(SamplingParams(seed=i + 1, temperature=0.03 * (i % 2)), None) for i in range(6)]
NAMES = ["", "first", "second", "first", "", "second"]
requests, plain = Requests(PROMPTS, REQUESTS, 24, NAMES), Requests(PROMPTS, REQUESTS, 24)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters: of all linears, and of some of them with another rank."""
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("use_cuda_graph", [True, False])
@pytest.mark.parametrize("weights", ["fp16", *KINDS])
def test_a_sequence_has_the_tokens_it_has_alone(adapters, weights, use_cuda_graph):
    bare = make_backend(weights, "int8", use_cuda_graph, max_batch=16)
    without = [plain.alone(bare, index) for index in range(6)]
    bare.close()
    backend = make_backend(weights, "int8", use_cuda_graph, max_batch=16, adapters=adapters)
    alone = [requests.alone(backend, index) for index in range(6)]
    assert all(None not in tokens for tokens in alone)
    assert [alone[index] == without[index] for index in range(6)] == [not name for name in NAMES]
    allocations = backend._device.allocations
    for slots in ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (15, 3, 8, 0, 7, 1)):
        found = requests.together(backend, dict(enumerate(slots)))
        assert [found[index] for index in range(6)] == alone, slots
    assert backend._device.allocations == allocations
    backend.close()


@pytest.mark.parametrize("hidden_size", [256, 252])  # 252 is filled up to 256
@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("name", ["first", "second"])
def test_logits_are_those_of_a_model_with_the_adapter_merged(tmp_path, name, max_batch, hidden_size):
    """Prompts in one and in several chunks, and the step after them."""
    bare = make_backend("fp16", "fp16", True, hidden_size=hidden_size)
    model, options = bare._spec.model, {"rank": 16} if name == "first" else {"rank": 5, "seed": 1}
    modules = MODULES if name == "first" else ("v_proj", "gate_proj", "o_proj")
    write_random_adapter(tmp_path / name, model, *modules, scale=0.1, **options)
    adapter = LoraAdapter(name, tmp_path / name, model, 64)
    merged = make_backend("fp16", "fp16", True, hidden_size=hidden_size, merged=adapter)
    adapted = make_backend("fp16", "fp16", True, hidden_size=hidden_size, max_batch=max_batch, adapters=(adapter,))
    slot = max_batch - 1
    for prompt in PROMPTS:
        for forced in (None, 11):
            logits = []
            for backend, own, chosen in ((merged, 0, ""), (adapted, slot, name), (bare, 0, "")):
                bias = () if forced is None else ((forced, 1e6),)
                backend.begin(own, SamplingParams(seed=1, logit_bias=bias), prompt, chosen)
                backend.step([SequenceStep(own, prompt)])[0].result()
                if forced is not None:  # the same token is fed to all
                    backend.step([SequenceStep(own)])[0].result()
                logits.append(backend._device.download(backend._of("logits", own)))
            assert error(logits[1], logits[0]) < 1e-2, (len(prompt), forced)
            assert error(logits[2], logits[0]) > 0.1, "the adapter changes nothing"
    for backend in (bare, merged, adapted):
        backend.close()


def test_sequences_of_one_slot_take_turns(adapters):
    backend = make_backend("int4", "fp16", True, adapters=adapters)
    alone = [requests.alone(backend, index) for index in range(6)]
    assert [requests.alone(backend, index) for index in (3, 0, 5, 1)] == [alone[index] for index in (3, 0, 5, 1)]
    backend.close()
