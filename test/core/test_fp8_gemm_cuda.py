"""Prefill with fp8 activations: which checkpoints say so, what the kernels index and round, and whole chunks."""

from __future__ import annotations

import ctypes
import dataclasses
import json

import numpy as np
import pytest

import fake_kernels
import float_checkpoints
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import CudaOptions, CudaSpec, matrix_shapes, weight_arrays
from engine_core.cuda.driver import Device
from engine_core.cuda.kernels import blas_lt, fp8_layout, reference
from engine_core.formats.manifest import read_manifest, read_options
from engine_core.formats.number_formats import E4M3, to_minifloat
from engine_core.formats.quantized_layouts import has_fp8_activations
from engine_core.formats.weight_formats import weight_format
from engine_core.measure.steps import begin, prefill
from engine_core.models.shapes import spec_of
from engine_core.request import SamplingParams
from fake_gpu import FakeDriver, install
from fake_kernels import array_at
from packed_weights import random_tiles

CONTEXT = 640
MODEL = dict(
    architectures=["LlamaForCausalLM"],
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=96,
    rms_norm_eps=1e-5,
)
PROMPT = np.random.default_rng(3).integers(0, 96, 600).astype(np.int32)


# --- which checkpoints ------------------------------------------------------------------------------------


def _groups(activations: dict | None) -> dict:
    return {"group_0": {"weights": {"num_bits": 8, "type": "float"}, "input_activations": activations}}


@pytest.mark.parametrize(
    "quantization, expected",
    [
        ({"quant_method": "compressed-tensors", "config_groups": _groups({"num_bits": 8, "type": "float"})}, True),
        ({"quant_method": "compressed-tensors", "config_groups": _groups({"num_bits": 8, "type": "int"})}, False),
        ({"quant_method": "compressed-tensors", "config_groups": _groups(None)}, False),  # weights alone
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, True),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, False),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, True),
        ({"quant_method": "fp8", "activation_scheme": "static"}, True),
        ({"quant_method": "fp8"}, False),
        ({}, False),
    ],
)
def test_what_a_checkpoint_says_of_its_activations(quantization, expected):
    assert has_fp8_activations({"quantization_config": quantization}) is expected
    assert has_fp8_activations({"quantization_config": None}) is False


@pytest.mark.parametrize("input_activations", [None, {"num_bits": 8, "type": "float", "dynamic": True}])
def test_an_engine_does_what_its_checkpoint_says(tmp_path, input_activations):
    checkpoint = float_checkpoints.write(tmp_path / "checkpoint", "compressed-tensors")
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": _groups(input_activations)}
    path.write_text(json.dumps(config))
    manifest = build_cuda(checkpoint, tmp_path / "engine", quantization="fp8", max_context=128)
    assert manifest.options["fp8_activations"] is (input_activations is not None)
    assert any("activations" in note for note in manifest.notes) is (input_activations is not None)
    assert read_options(read_manifest(tmp_path / "engine"), CudaOptions) == CudaOptions(**manifest.options)
    # Weights that are rounded to fp8 here meet activations in 16 bits, whatever the checkpoint has.
    other = build_cuda(checkpoint, tmp_path / "int8", quantization="int8", max_context=128)
    assert other.options["fp8_activations"] is False


# --- kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(16, 128), (48, 384), (26, 592), (1002, 144)])
def test_unpacking_finds_every_code_and_scale(rows, cols):
    """The indices of unpack_fp8.cu, as they stand there."""
    tiles = random_tiles(np.random.default_rng(1), "fp8", rows, cols, "fp16")
    num_tiles, groups = -(-rows // 16), -(-cols // 128)
    strip_bytes = groups * 2048 + 128
    source = tiles.reshape(-1)
    codes, scales = np.zeros((num_tiles * 16, groups * 128), np.uint8), np.zeros(num_tiles * 16, np.float32)
    lane, lines = np.arange(32), codes.reshape(num_tiles * 16, groups * 8, 16)
    for strip in range(num_tiles):
        for group in range(groups):
            start = (strip * strip_bytes + group * 2048) // 16
            for i in range(4):
                row, unit = (32 * i + lane) // 8, lane % 8
                place = start + (row // 8 * 2 + unit % 2) * 32 + row % 8 * 4 + unit // 2
                lines[strip * 16 + row, group * 8 + unit] = source.reshape(-1, 16)[place]
        ends = source[(strip + 1) * strip_bytes - 128 : (strip + 1) * strip_bytes].view(np.float32)
        for each in range(16):
            scales[strip * 16 + each] = ends[each % 8 * 2 + each // 8]
    expected = fp8_layout.ROWS.unpack(tiles, (rows, cols))
    assert (codes[:rows, :cols] == expected[0]).all() and (scales[:rows] == expected[1][:, 0]).all()


def test_e4m3_without_its_instruction_is_rounded_as_with_it():
    """What fp8_rows.cuh computes before sm_89, in numpy."""
    values = np.concatenate([E4M3, (E4M3[:-2] + E4M3[1:-1]) / 2, np.float32([500, 1e30, 1e-9, 0.0156, -0.0156])])
    values = values[~np.isnan(values)].astype(np.float32)
    values = np.concatenate(
        [values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))]
    )
    bits = values.view(np.uint32)
    f = np.minimum(np.abs(values), np.float32(448))
    rounded = f.view(np.uint32) + np.uint32(0x7FFFF) + (f.view(np.uint32) >> 20 & 1)
    code = np.where(f < 0.015625, np.rint(f * np.float32(512)).astype(np.int64), (rounded >> 20).astype(np.int64) - 960)
    found = (code | (bits >> 31).astype(np.int64) << 7).astype(np.uint8)
    assert (E4M3[found] == E4M3[to_minifloat(values, E4M3)]).all()


def test_rows_of_activations_use_the_whole_range():
    rows = np.random.default_rng(2).standard_normal((5, 300)) * np.array([[1e-6], [1.0], [3e4], [0.0], [1e-40]])
    codes, scales = reference.quantize_rows(rows)
    assert (np.abs(E4M3[codes]).max(axis=1) == [448, 448, 448, 0, 0]).all() and np.isfinite(scales).all()
    close = E4M3[codes[:3]] * scales[:3, None]
    assert np.linalg.norm(close - rows[:3]) < 0.03 * np.linalg.norm(rows[:3])


# --- whole chunks -----------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver = FakeDriver(memory=1 << 28)
    install(monkeypatch, driver)
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    return driver


def _spec(**changes) -> CudaSpec:
    spec = CudaSpec(
        model=spec_of(MODEL),
        head_rows=96,
        dtype="fp16",
        kv_int8=False,
        max_context=CONTEXT,
        weight_format=weight_format("fp8"),
        chunk=CONTEXT,
        pool_tokens=0,
        fp8_activations=True,
    )
    return dataclasses.replace(spec, **changes)


def _open(spec: CudaSpec) -> CudaBackend:
    random, arrays = np.random.default_rng(4), {}
    shapes = {**matrix_shapes(spec), "head": (spec.head_rows, spec.hidden)}
    for name, array in weight_arrays(spec).items():
        if array.dtype == "uint8":
            codes = to_minifloat((random.standard_normal(shapes[name.split(".")[-1]]) * 60).astype(np.float32), E4M3)
            scales = np.full((len(codes), 1), 7e-4, np.float32) * random.uniform(0.5, 2, (len(codes), 1))
            arrays[name] = fp8_layout.ROWS.pack(codes, scales.astype(np.float32))
        else:
            arrays[name] = (random.standard_normal(array.shape) * 0.3).astype(np.float16)
            if name.endswith("norm"):
                arrays[name] += np.float16(1)
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(8) / 8)
    rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    device = Device()
    return CudaBackend(device, spec, lambda name, array: device.upload(array, arrays[name]), rope)


def _last_hidden(spec: CudaSpec, prompt: np.ndarray) -> tuple[np.ndarray, CudaBackend]:
    backend = _open(spec)
    begin(backend, SamplingParams(seed=1), prompt)
    assert prefill(backend, prompt).result() is not None
    logits = backend._device.download(backend._work["logits"]).astype(np.float64)
    return logits, backend


def test_a_chunk_in_fp8_is_one_in_16_bits_with_rounded_activations(driver, monkeypatch):
    """The other way to it: cuBLAS in 16 bits, of activations that are rounded to fp8 and back."""
    calls = []
    for entry in ("quantize_rows", "unpack_fp8", "dequantize_packed"):
        run = driver.kernels[entry]
        driver.kernels[entry] = lambda defines, args, entry=entry, run=run: (calls.append(entry), run(defines, args))
    found = {}
    for fp8_activations in (False, True):
        found[fp8_activations], backend = _last_hidden(_spec(fp8_activations=fp8_activations), PROMPT)
        calls.clear()
        prefill(backend, PROMPT).result()
        used = set(calls)
        assert used == ({"quantize_rows", "unpack_fp8"} if fp8_activations else {"dequantize_packed"})
        if fp8_activations:
            assert calls.count("unpack_fp8") == 4 * 3 and calls.count("quantize_rows") == 2 * 3  # two are norms
        backend.close()
    matmul = fake_kernels.FakeBlas.matmul

    def rounded(self, rows, weight, output, count: int, accumulate: bool = False) -> None:
        def work() -> None:
            values = array_at(rows.address, (count, rows.shape[1]), np.float16)
            codes, scales = reference.quantize_rows(values.astype(np.float64))
            values[:] = E4M3[codes] * scales[:, None]

        self._device._driver.run(work)
        matmul(self, rows, weight, output, count, accumulate)

    monkeypatch.setattr(fake_kernels.FakeBlas, "matmul", rounded)
    found["rounded"], backend = _last_hidden(_spec(fp8_activations=False), PROMPT)
    backend.close()
    size = np.linalg.norm(found[False])
    assert np.linalg.norm(found[True] - found["rounded"]) < 0.006 * size
    assert 0.01 * size < np.linalg.norm(found[True] - found[False]) < 0.1 * size


def test_a_short_prompt_is_multiplied_in_16_bits(driver):
    calls = []
    driver.kernels["quantize_rows"] = lambda defines, args: calls.append("quantize_rows")
    (one, first), (two, second) = (_last_hidden(_spec(fp8_activations=on), PROMPT[:30]) for on in (False, True))
    calls_of_warm_up = len(calls)
    prefill(second, PROMPT[:30]).result()
    assert (one == two).all() and len(calls) == calls_of_warm_up
    first.close()
    second.close()


def test_where_cublas_has_no_such_gemm_16_bits_are_multiplied(monkeypatch, tmp_path):
    driver = FakeDriver(memory=1 << 28, capability=89)
    install(monkeypatch, driver)
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    (one, first), (two, second) = (_last_hidden(_spec(fp8_activations=on), PROMPT[:200]) for on in (False, True))
    assert (one == two).all()
    first.close()
    second.close()


def test_which_engines_multiply_in_fp8():
    assert _spec().fp8_gemms and not _spec(fp8_activations=False).fp8_gemms
    assert not _spec(weight_format=weight_format("int8")).fp8_gemms
    assert not _spec(weight_format=weight_format("fp8").in_groups(128)).fp8_gemms  # blocks stay in 16 bits


# --- cuBLASLt's calls -------------------------------------------------------------------------------------


class _Library:
    """libcublasLt as far as its calls are: notes them, makes objects, finds an algorithm or none."""

    def __init__(self, version: int = 130000, has_algorithm: bool = True) -> None:
        self.version, self.has_algorithm, self.alive, self.calls = version, has_algorithm, set(), []

    def __getattr__(self, name: str):
        def call(*args):
            self.calls.append((name, args))
            if name.endswith("Create"):
                args[0]._obj.value = number = 16 * len(self.calls)
                self.alive.add(number)
            elif name.endswith("Destroy"):
                self.alive.remove(args[0].value)
            elif name == "cublasLtMatmulAlgoGetHeuristic":
                args[9]._obj.value = int(self.has_algorithm)
                args[8]._obj.workspace_size = 4096
            return self.version if name == "cublasLtGetVersion" else 0

        call.restype = None
        setattr(self, name, call)
        return call


@pytest.fixture
def lt_arrays(driver):
    from engine_core.cuda.driver import Arena, Stream

    device = Device()
    arena = Arena(device, 1 << 20)
    stream = Stream(device)
    shapes = [((64, 128), "uint8"), ((64,), "fp32"), ((48, 128), "uint8"), ((48,), "fp32"), ((64, 48), "fp32")]
    yield stream, arena.take((4096,), "uint8"), [arena.take(*each) for each in shapes]
    arena.close()
    device.close()


def test_what_cublas_lt_is_asked(lt_arrays, monkeypatch):
    library, (stream, workspace, arrays) = _Library(), lt_arrays
    monkeypatch.setattr(blas_lt, "load_library", lambda name: library)
    lt = blas_lt.BlasLt.open(stream, workspace)
    gemm = blas_lt.Fp8Gemm(lt, *arrays, accumulate=True)
    assert gemm.plan(48) and not gemm.plan(40)  # no multiple of 16
    library.calls.clear()
    assert gemm.plan(48) and not library.calls
    gemm(48)
    ((name, args),) = library.calls
    assert name == "cublasLtMatmul" and ctypes.sizeof(blas_lt._Heuristic) == 96
    rows, _, weight, _, output = arrays
    assert [args[i].value for i in (3, 5, 8, 10, 13)] == [
        *(weight.address, rows.address, output.address, output.address, workspace.address)
    ]
    assert args[2]._obj.value == args[7]._obj.value == 1.0 and args[14].value == 4096
    lt.close()
    lt.close()
    assert not library.alive


def test_no_algorithm_an_old_library_or_another_gpu(lt_arrays, monkeypatch):
    stream, workspace, arrays = lt_arrays
    library = _Library(has_algorithm=False)
    monkeypatch.setattr(blas_lt, "load_library", lambda name: library)
    lt = blas_lt.BlasLt.open(stream, workspace)
    assert not blas_lt.Fp8Gemm(lt, *arrays).plan(64)
    lt.close()
    library = _Library(version=120800)
    assert blas_lt.BlasLt.open(stream, workspace) is None and not library.alive
    stream.device.capability = 120
    library.version = 130000
    assert blas_lt.BlasLt.open(stream, workspace) is None
