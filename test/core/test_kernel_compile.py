"""Every kernel compiles for every architecture the package names. Needs NVRTC, but no GPU.

Kernels and their variants are compiled for one architecture on each side of the borders at which the sources differ,
and each kernel for another one, so that all architectures have some. EDGELLM_ALL_ARCHITECTURES=1 compiles every variant
for every architecture.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from engine_core.cuda import kernels
from engine_core.cuda.driver import KernelCompileError
from engine_core.cuda.kernels import kernel_source
from engine_core.cuda.kernels.nvrtc import compile_kernel

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")


def _architectures() -> list[str]:
    """Those of ours that this NVRTC knows; none without its library."""
    from cuda.bindings import nvrtc

    try:
        code, known = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError:
        return []
    wanted = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
    return [f"sm_{arch}" for arch in wanted if int(code) == 0 and arch in known]


ARCHITECTURES = _architectures()
BORDERS = {890, 900}  # of __CUDA_ARCH__
BESIDE_BORDERS = [arch for arch in ARCHITECTURES if arch in ("sm_87", "sm_89", "sm_90")]
ALL = bool(os.environ.get("EDGELLM_ALL_ARCHITECTURES"))
if ALL:
    BESIDE_BORDERS = ARCHITECTURES
FURTHER = [arch for arch in ARCHITECTURES if arch not in BESIDE_BORDERS]


def for_each(architectures: list[str]) -> pytest.MarkDecorator:
    """Parametrize a test by ``arch``; skip it without NVRTC."""
    none = [pytest.param("", marks=pytest.mark.skip(reason="needs NVRTC"))]
    return pytest.mark.parametrize("arch", architectures or none)


ATTENTION = dict(HEADS=8, KV_HEADS=2, HEAD_DIM=64, HEAD_SIZE=60, CONTEXT=512, QK_NORM=1, NORM_EPS="1e-5f")
ATTENTION["SCALE_LOG2E"] = "0.18f"
GEMV = dict(ROWS=512, COLS=1024, K_WARPS=4, ROW_WARPS=4, BATCH=4, DEPTH=3, EPILOGUE=2, NORM=1, BIAS=0, NORM_EPS="1e-5f")
LORA = dict(LORA_RANK=16, LORA_PARTS=3, LORA_PAIRS=0, LORA_SPLIT_1=256, LORA_SPLIT_2=384, LORA_CTAS=132)
KERNELS = {
    "gemv": GEMV,
    "gemv_packed": {**GEMV, "BITS": 4, "DEQUANTIZE_WARPS": 8},
    "gemm_packed": dict(
        **dict(ROWS=512, COLS=1024, BITS=4, K_WARPS=2, ROW_WARPS=8, SPLITS=2),
        **dict(STAGE=8, BUFFERS=1, DEPTH=2, TOKENS=32, EPILOGUE=2),
    ),
    "attention_decode": {**ATTENTION, "SPLITS": 4, "MIN_KEYS": 256, "WARPS": 8, "DEPTH": 4},
    "attention_prefill": {**ATTENTION, "WARPS": 4, "BLOCKS": 2, "GROUPS": 2, "TILE_K": 64},
    "rope_append": {**ATTENTION, "THREADS": 128},
    "rms_norm": dict(COLS=1024, NORM_EPS="1e-5f", ADD=1, THREADS=512),
    "layer_norm": dict(COLS=1152, NORM_EPS="1e-6f", THREADS=512, MERGE=3, SIDE=27),
    "patches": dict(COLS=592, VALUES=588, TILE=60, PATCH=14, SIDE=4, THREADS=256),
    "quantize_rows": dict(COLS=1024, THREADS=512, GATED=1),
    "unpack_fp8": dict(ROWS=512, COLS=1024, BITS=8, FLOATS=1, DEQUANTIZE_WARPS=8),
    "qk_norm": dict(ROW_COLS=1536, Q_COLS=1024, K_COLS=256, Q_SIZE=1000, K_SIZE=250, THREADS=512, NORM_EPS="1e-5f"),
    "experts": dict(COLS=1024, EXPERTS=128, EXPERTS_PER_TOKEN=8, NORM_SHARES=1, THREADS=256),
    "short_conv": dict(COLS=1024, TAPS=3, BIAS=0, SLOT_FLOATS=30720, THREADS=64, TILE=8, CONTEXT=512, BATCHED=1),
    "elementwise": dict(COLS=1024, THREADS=256, TOKEN_STRIDE=8),
    "sample": dict(ROWS=1000, RING=8, SCAN_THREADS=256, THREADS=1024),
    "log_probability": dict(ROWS=1003, THREADS=1024),
    "lora": dict(ROWS=512, COLS=1024, THREADS=256, TOKENS=8, FLOAT_OUTPUT=0, **LORA),
    "kv_append": dict(LAYERS=3, KV_HEADS=2, VECTORS=8, CONTEXT=512, FRESH=1024, THREADS=128),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))


def _compile(name: str, arch: str, **defines) -> bytes:
    source, headers = kernel_source(name)
    return compile_kernel(source, name=name, arch=arch, headers=headers, defines={**KERNELS[name], **defines})


def _compile_all(arch: str, names, **defines) -> None:
    """Side by side, as configure does."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for binary in threads.map(lambda name: _compile(name, arch, **defines), names):
            assert binary[:4] == b"\x7fELF"


def test_every_source_is_compiled_and_described():
    sources = {path.stem for path in Path(kernels.__file__).parent.glob("*.cu")}
    assert sources == KERNELS.keys()
    page = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert {name for name in sources if f"`{name}.cu`" not in page} == set()


def test_the_sources_differ_at_these_borders_only():
    sources = [*Path(kernels.__file__).parent.glob("*.cu"), *Path(kernels.__file__).parent.glob("*.cuh")]
    found = [set(map(int, re.findall(r"__CUDA_ARCH__\D+(\d+)", path.read_text()))) for path in sources]
    assert set().union(*found) == BORDERS


@for_each(ARCHITECTURES)
def test_every_kernel_compiles(arch):
    names = list(KERNELS) if arch in BESIDE_BORDERS else list(KERNELS)[FURTHER.index(arch) :: len(FURTHER)]
    _compile_all(arch, names, BF16=int(arch != "sm_80"))


@for_each(BESIDE_BORDERS)
@pytest.mark.parametrize("fp8", [0, 1])
def test_the_kernels_of_an_8_bit_cache_compile(arch, fp8):
    head_dim = (16, 96, 256)[ARCHITECTURES.index(arch) % 3]  # what they have in common decides what compiles
    names = ("attention_decode", "attention_prefill", "rope_append")
    sizes = dict(HEAD_DIM=head_dim, CONTEXT=1003, BLOCKS=1)
    for bf16 in (0, 1) if fp8 else (int(arch == "sm_87"),):
        _compile_all(arch, names, BF16=bf16, KV_INT8=1, KV_FP8=fp8, **sizes)


def _types(arch: str, number: int = 0) -> tuple[int, ...]:
    """Return the values of BF16 that a variant is compiled with: either by turns, or both."""
    return (0, 1) if ALL else ((BESIDE_BORDERS.index(arch) + number) % 2,)


@for_each(BESIDE_BORDERS)
def test_8_bit_gemms_compile(arch):
    for bf16 in _types(arch):
        _compile_all(arch, ("gemv_packed", "gemm_packed"), BITS=8, BF16=bf16)
        _compile_all(arch, ("gemv_packed",), BITS=8, BF16=bf16, NORM=0, TOKENS=5)


@for_each(BESIDE_BORDERS)
@pytest.mark.parametrize("group_size, zeros", [(32, 0), (64, 1), (128, 1)])
def test_gemms_of_integers_in_groups_compile(arch, group_size, zeros):
    for bf16 in _types(arch, zeros):
        groups = dict(GROUP_SIZE=group_size, ZEROS=zeros, BF16=bf16, BITS=8 if group_size == 64 else 4)
        _compile_all(arch, ("gemv_packed", "gemm_packed"), **groups)
        _compile_all(arch, ("gemv_packed",), **groups, NORM=0, TOKENS=5)
        _compile_all(arch, ("gemm_packed",), **{**groups, "TOKENS": 8, "EPILOGUE": 1})
        if bf16:
            _compile_all(arch, ("gemv_packed", "gemm_packed"), **groups, HALF_SCALES=1)


@for_each(BESIDE_BORDERS[-1:])
def test_kernels_that_put_columns_in_order_compile(arch):
    _compile_all(arch, ("rms_norm",), ORDERED=1, ADD=0, BF16=1)
    _compile_all(arch, ("gemv_packed",), ORDERED=1, GROUP_SIZE=32, ZEROS=1, BF16=0)
    _compile_all(arch, ("gemv_packed",), ORDERED=1, **LORA)
    _compile_all(arch, ("attention_decode", "attention_prefill"), ORDERED=1, KV_INT8=1, BLOCKS=1, BATCHED=1)
    _compile_all(arch, ("attention_decode", "attention_prefill"), ORDERED=1, BF16=1)


@for_each(BESIDE_BORDERS)
@pytest.mark.parametrize("bits, group_scales", [(8, 0), (8, 1), (4, 0)])
def test_gemms_of_small_floats_compile(arch, bits, group_scales):
    """With the type's own instructions from sm_89 on, without them before."""
    for bf16 in _types(arch, group_scales):
        _compile_all(
            arch, ("gemv_packed", "gemm_packed"), BITS=bits, FLOATS=1, GROUP_SCALES=group_scales, BF16=bf16, EPILOGUE=1
        )


@for_each(BESIDE_BORDERS)
def test_the_kernels_around_fp8_gemms_compile(arch):
    for bf16 in _types(arch):
        _compile_all(arch, ["rms_norm"], ADD=0, QUANTIZED=1, COLS=2568, BF16=bf16)
        _compile_all(arch, ["quantize_rows"], GATED=0, COLS=14336, BF16=bf16)
        _compile_all(arch, ["quantize_rows"], GELU=1, COLS=72, BF16=bf16)
    _compile_all(arch, ["unpack_fp8"], ROWS=1002, COLS=592)


@for_each(BESIDE_BORDERS)
def test_the_kernels_of_several_sequences_compile(arch):
    tokens = 8 * (1 + ARCHITECTURES.index(arch) % 2)
    _compile_all(arch, ["gemm_packed"], BITS=16, TOKENS=tokens, EPILOGUE=3, BUFFERS=2, STAGE=2)
    strides = {"SLOT_STRIDE": 1 << 33, "SCALE_SLOT_STRIDE": 4096}
    _compile_all(arch, ["attention_decode"], BATCHED=1, KV_INT8=int(tokens == 8), **strides)
    _compile_all(arch, ["attention_decode"], BATCHED=1, APPENDED=1, KV_INT8=int(tokens == 8), **strides)
    _compile_all(arch, ["rope_append"], KV_INT8=1, KV_ONLY=int(tokens == 8), **strides)


@for_each(BESIDE_BORDERS)
def test_gemms_with_adapters_compile(arch):
    names = ("gemv", "gemv_packed", "gemm_packed")
    _compile_all(arch, names, BF16=0, **{**LORA, "LORA_PARTS": 2, "LORA_PAIRS": 1})
    _compile_all(arch, names, BF16=1, **{**LORA, "EPILOGUE": 0, "BIAS": 1, "BITS": 8})
    _compile_all(arch, ["lora"], BF16=1, FLOAT_OUTPUT=1, COLS=1000, LORA_PARTS=1)


@for_each(BESIDE_BORDERS[-1:])
def test_what_single_families_need_compiles(arch):
    """Gemma's norms, activation and caps, windows, heads that are rotated partly, biases, 16 query heads a KV head."""
    scores = dict(WINDOW=100, SOFTCAP="50.f", NORM_OFFSET="1.f", ROTATED=32, HEADS=16, KV_HEADS=1, BUNDLES=2)
    _compile_all(arch, ("attention_decode", "attention_prefill", "rope_append"), BF16=1, **scores)
    _compile_all(arch, ("attention_decode", "attention_prefill"), KV_INT8=1, BLOCKS=1, BATCHED=1, **scores)
    _compile_all(arch, ("attention_decode", "rope_append"), ROTATED=0)
    _compile_all(arch, ("attention_decode", "rope_append", "attention_prefill"), LONG_ROPE=1)
    strides = dict(BATCHED=1, APPENDED=1, SLOT_STRIDE=1 << 20, SCALE_SLOT_STRIDE=4096)
    _compile_all(arch, ("attention_decode", "rope_append"), LONG_ROPE=1, **strides)
    _compile_all(arch, ("gemv", "gemv_packed", "gemm_packed"), EPILOGUE=4, BIAS=1, NORM_OFFSET="1.f", BF16=1)
    _compile_all(arch, ("gemv", "gemv_packed", "gemm_packed"), EPILOGUE=1, BIAS=1)
    _compile_all(arch, ("gemv", "gemm_packed"), EPILOGUE=3, BIAS=1, LOGITS_SOFTCAP="30.f", NORM=0)
    picked = dict(NORM=0, EXPERTS_PER_TOKEN=8)
    _compile_all(arch, ("gemv", "gemv_packed"), EPILOGUE=2, EXPERT_VECTORS=0, **picked)
    _compile_all(arch, ("gemv", "gemv_packed"), EPILOGUE=3, EXPERT_VECTORS=1, **picked)
    _compile_all(arch, ("gemv", "gemv_packed", "gemm_packed"), EPILOGUE=3, LOGITS_SCALE="0.125f", NORM=0)
    _compile_all(arch, ("rms_norm", "elementwise"), ADD=0, RESIDUAL=1, ROUNDED=1)
    _compile_all(arch, ["short_conv"], TAPS=1, BIAS=1, SLOT_FLOATS=0, BATCHED=0, BF16=1)
    _compile_all(arch, ["short_conv"], TAPS=8, BIAS=1)
    _compile_all(arch, ("rms_norm", "elementwise"), ADD=0, RESIDUAL=1, NORM_OFFSET="1.f", GELU=1, FLOAT_VALUES=1)


@for_each(BESIDE_BORDERS[-1:])
def test_what_encoders_need_compiles(arch):
    shape = dict(HEADS=16, KV_HEADS=16, HEAD_DIM=80, HEAD_SIZE=72, ROTATED=0, QK_NORM=0, CONTEXT=729)
    _compile_all(arch, ("attention_prefill", "rope_append"), **shape, CAUSAL=0, BIAS=1)
    _compile_all(arch, ("elementwise", "layer_norm", "patches"), FEATURES=1000, ERF=1, ROUNDED=1, MERGE=0, TILE=0)


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("floats", [0, 1])
@pytest.mark.parametrize("rows, cols, epilogue", [(50257, 576, 3), (1000, 72, 2), (24, 2560, 1)])
def test_gemms_with_tiles_that_are_not_full_compile(bits, floats, rows, cols, epilogue):
    sizes = dict(ROWS=rows, COLS=cols, EPILOGUE=epilogue, BITS=bits, FLOATS=floats, BF16=0, K_WARPS=1)
    _compile_all("sm_87", ("gemv_packed",), **sizes)
    if epilogue < 3:  # the LM head has one vector
        _compile_all("sm_87", ("gemm_packed",), **{**sizes, "SPLITS": 1, "STAGE": 1, "BUFFERS": 2})


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
@pytest.mark.parametrize("rows, cols, epilogue", [(50257, 576, 3), (1000, 72, 2), (24, 2560, 1)])
def test_gemm_of_16_bit_tiles_that_are_not_full_compiles(rows, cols, epilogue):
    sizes = dict(
        ROWS=rows, COLS=cols, EPILOGUE=epilogue, BITS=16, BF16=0, K_WARPS=1, TOKENS=8, SPLITS=1, STAGE=1, BUFFERS=2
    )
    _compile_all("sm_87", ("gemm_packed",), **sizes)


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
def test_kv_append_compiles_without_layers():
    assert _compile("kv_append", ARCHITECTURES[0], LAYERS=0)[:4] == b"\x7fELF"


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
def test_the_cache_is_keyed_by_all_that_matters(tmp_path):
    first = _compile("rms_norm", "sm_80")
    (cached,) = tmp_path.iterdir()
    cached.write_bytes(sha256(b"from the cache").digest() + b"from the cache")
    assert _compile("rms_norm", "sm_80") == b"from the cache"
    assert _compile("rms_norm", "sm_80", COLS=2048) != b"from the cache"
    assert _compile("rms_norm", "sm_86") != b"from the cache"
    assert len(list(tmp_path.iterdir())) == 3
    assert first[:4] == b"\x7fELF"


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
@pytest.mark.parametrize("content", [b"", b"short", sha256(b"one").digest() + b"another", b"\x7fELF" + bytes(64)])
def test_a_damaged_file_of_the_cache_is_compiled_anew(tmp_path, content):
    _compile("rms_norm", "sm_80")
    (cached,) = tmp_path.iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(content)
    assert _compile("rms_norm", "sm_80") == whole[32:]
    assert cached.read_bytes() == whole


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
def test_what_others_can_write_is_not_run(tmp_path, monkeypatch):
    directory = tmp_path / "own"
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(directory))
    first = _compile("rms_norm", "sm_80")
    (cached,) = directory.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700 and not cached.stat().st_mode & 0o022
    forged = sha256(b"forged").digest() + b"forged"
    for path, mode in ((cached, 0o666), (directory, 0o777)):
        cached.write_bytes(forged)
        path.chmod(mode)
        assert _compile("rms_norm", "sm_80") == first
        path.chmod(0o700)
    target = tmp_path / "elsewhere"
    target.write_bytes(forged)
    cached.unlink()
    cached.symlink_to(target)
    assert _compile("rms_norm", "sm_80") == first


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
def test_an_unwritable_cache_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    assert _compile("rms_norm", "sm_80")[:4] == b"\x7fELF"


@pytest.mark.skipif(not ARCHITECTURES, reason="needs NVRTC")
def test_a_compile_error_carries_the_log():
    with pytest.raises(KernelCompileError, match="unknown_type"):
        compile_kernel("unknown_type x;", name="broken", arch="sm_80", headers={}, defines={})
