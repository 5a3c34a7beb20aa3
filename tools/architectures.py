"""Compiles the CUDA kernels for GPUs that are not here, and checks what they take against each GPU's limits.

    python3 tools/architectures.py                    # all; half an hour on two cores; writes the results' file
    python3 tools/architectures.py --gpus "AGX Orin" --engines int4 --output -     # a part, as a table

The CUDA backend is opened for each GPU of ``GPUS`` with a driver that only notes what is launched: the same code as
on a robot chooses the launch configurations, and no arithmetic is done. NVRTC then compiles each kernel for the GPU's
architecture. A row of benchmarks/results/architectures.jsonl has, of one kernel of one engine on one GPU, the launch
configuration, the registers, shared memory and stack that the compiled kernel takes, the CTAs that fit an SM, and what
limits them. docs/architectures.md is made of these rows (tools/docs_tables.py).

Models have one layer of a published shape: further layers launch the same kernels. cuBLAS and TensorRT are not asked.
Exit status 1 if a kernel does not compile or does not fit.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_decode import SHAPES, make_spec  # noqa: E402
from cubin import Resources, read_resources  # noqa: E402
from engine_core.backends.cuda.backend import CudaBackend  # noqa: E402
from engine_core.backends.cuda.layout import CudaSpec  # noqa: E402
from engine_core.cuda.driver import Device, DeviceArray  # noqa: E402
from engine_core.cuda.kernels import Kernels, kernel_source  # noqa: E402
from engine_core.cuda.kernels.kv_append import AppendShape, NextStep, kv_append  # noqa: E402
from engine_core.cuda.kernels.nvrtc import compile_kernel  # noqa: E402
from engine_core.errors import EngineFaultError  # noqa: E402
from engine_core.formats.checkpoint import Checkpoint  # noqa: E402
from engine_core.formats.lora import LowRank  # noqa: E402
from engine_core.models.reader import read_spec  # noqa: E402
from engine_core.models.shapes import spec_of  # noqa: E402
from engine_core.vision.limits import ImageLimits  # noqa: E402
from gpu_tests import commit  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "architectures.jsonl"
ENGINES_SHOWN = ("fp16", "int8", "int4")  # in the page's table of launch configurations
CONTEXT, CHUNK = 4096, 512
_REGISTERS, _MAX_THREADS = 64 * 1024, 1024  # of an SM; of a CTA
_SCHEDULERS = 4  # of an SM, each with a quarter of its registers
_REGISTER_GRAIN, _SHARED_GRAIN = 256, 128  # registers of a warp, bytes of a CTA
_SYSTEM_SHARED = 1024  # bytes of an SM's shared memory that each CTA takes besides its own


@dataclass(frozen=True)
class Limits:
    """Limits of an SM by compute capability: the CUDA programming guide and CCCL's ``cuda::arch_traits``."""

    threads: int
    ctas: int
    shared: int  # bytes


LIMITS = {
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    87: Limits(1536, 16, 164 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    110: Limits(1536, 24, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
    121: Limits(1536, 24, 100 << 10),
}


@dataclass(frozen=True)
class PaperGpu:
    """A GPU by its data sheet."""

    name: str
    capability: int
    num_sms: int

    @property
    def limits(self) -> Limits:
        return LIMITS[self.capability]

    @property
    def max_shared(self) -> int:
        """Bytes of shared memory that a CTA may have."""
        return self.limits.shared - _SYSTEM_SHARED


GPUS = (
    PaperGpu("A100", 80, 108),
    PaperGpu("RTX 3090", 86, 82),
    PaperGpu("Orin Nano 8 GB, Orin NX", 87, 8),
    PaperGpu("AGX Orin 64 GB", 87, 16),
    PaperGpu("L4", 89, 58),
    PaperGpu("H100 SXM", 90, 132),
    PaperGpu("B200", 100, 148),
    PaperGpu("AGX Thor", 110, 20),
    PaperGpu("RTX 5090", 120, 170),
    PaperGpu("GB10 (DGX Spark)", 121, 48),
)


@dataclass(frozen=True)
class PaperAdapter:
    """A LoRA adapter of every matrix, as far as the kernels depend on it; its own matrices are empty."""

    name: str = "adapter"
    rank: int = 16

    def rank_of(self, layer: int, matrix: str, rows: range) -> int:
        return self.rank

    def dense(self, layer: int, matrix: str, rows: range) -> LowRank:
        return LowRank(np.zeros((0, 1), np.float32), np.zeros((len(rows), 0), np.float32))


def engines() -> dict[str, CudaSpec]:
    """Return the engines whose kernels are compiled, by name: shapes of Llama-3.2-1B; Gemma 2; OLMo 2; Qwen3 MoE."""

    def llama(weights: str, kv_cache_type: str = "fp16", **options: Any) -> CudaSpec:
        shape = replace(SHAPES["llama-3.2-1b"], layers=1)
        return replace(make_spec(shape, CONTEXT, CHUNK, weights, kv_cache_type), **options)

    gemma = spec_of(
        dict(
            architectures=["Gemma2ForCausalLM"], num_hidden_layers=1, hidden_size=2304, intermediate_size=9216,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=256000, rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    experts = spec_of(
        dict(
            architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=1, hidden_size=2048, intermediate_size=6144,
            moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    olmo = spec_of(
        dict(
            architectures=["Olmo2ForCausalLM"], num_hidden_layers=1, hidden_size=2048, intermediate_size=8192,
            num_attention_heads=16, num_key_value_heads=16, vocab_size=100352, rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    lfm = spec_of(
        dict(
            architectures=["Lfm2ForCausalLM"], num_hidden_layers=2, hidden_size=2048, block_ff_dim=12288,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=65536, full_attn_idxs=[1],
        )
    )  # fmt: skip
    return {
        "fp16": llama("fp16"),
        "int8": llama("int8"),
        "int4": llama("int4"),
        "fp8": llama("fp8"),
        "fp8, activations in fp8": llama("fp8", fp8_activations=True),
        "nvfp4": llama("nvfp4"),
        "fp16, int8 KV": llama("fp16", "int8"),
        "int4, 8 requests": llama("int4", max_batch=8),
        "fp16, 8 requests, int8 KV": llama("fp16", "int8", max_batch=8),
        "int4, LoRA of rank 16": llama("int4", adapters=(PaperAdapter(),)),
        "Qwen3 MoE, int4": replace(llama("int4"), model=experts, head_rows=experts.vocab_size),
        "OLMo 2, fp16": replace(llama("fp16"), model=olmo, head_rows=olmo.vocab_size),
        "LFM2, fp16": replace(llama("fp16"), model=lfm, head_rows=lfm.vocab_size),
        "Gemma 2, fp16": replace(llama("fp16"), model=gemma, head_rows=gemma.vocab_size),
        "fp16, with the demo's encoder of images": llama("fp16", images=demo_images()),
    }


def demo_images() -> ImageLimits:
    """Return the encoder of the demo model that sees."""
    vision = read_spec(Checkpoint(ROOT / "models" / "demo_vision")).vision
    assert vision is not None
    return ImageLimits(vision, max_images=1)


# --- what is launched -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its source, its entry and the macros it is compiled with."""

    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Noted:
    """A launch: the largest grid of a kernel, threads of a CTA, bytes of its dynamic shared memory."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared: int


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


class PaperDriver:
    """Stands for cuda.bindings.driver: device memory is addresses alone, and launches are noted in ``launches``."""

    def __init__(self, gpu: PaperGpu) -> None:
        self._gpu = gpu
        self._host: list[Any] = []
        self._next_address = 1 << 40
        self.launches: list[Noted] = []
        self.CUdevice_attribute = self.CUmemorytype = self.CUfunction_attribute = _Names()
        self.CUstreamCaptureMode = self.CUlaunchAttributeID = _Names()
        self.CUDA_MEMCPY2D = self.CUlaunchConfig = SimpleNamespace
        self.CUlaunchAttribute = lambda: SimpleNamespace(value=SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *_: (0, 1)  # what has no effect on what is launched

    def cuDeviceGetName(self, _length: int, _device: Any) -> tuple[int, bytes]:
        return 0, self._gpu.name.encode() + b"\0"

    def cuDeviceGetAttribute(self, which: str, _device: Any) -> tuple[int, int]:
        gpu = self._gpu
        values = {"MAJOR": gpu.capability // 10, "MINOR": gpu.capability % 10, "COUNT": gpu.num_sms}
        return 0, (values | {"OPTIN": gpu.max_shared}).get(which.rpartition("_")[2], 0)

    def cuMemAlloc(self, num_bytes: int) -> tuple[int, int]:
        address, self._next_address = self._next_address, self._next_address + -(-num_bytes // 512) * 512
        return 0, address

    def cuMemHostAlloc(self, num_bytes: int, _flags: int) -> tuple[int, int]:
        self._host.append((ctypes.c_uint8 * num_bytes)())
        return 0, ctypes.addressof(self._host[-1])

    def cuMemHostGetDevicePointer(self, pointer: int, _flags: int) -> tuple[int, int]:
        return 0, pointer

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 1 << 40, 1 << 40

    def cuModuleLoadData(self, binary: Any) -> tuple[int, Any]:
        return 0, binary

    def cuModuleGetFunction(self, module: tuple[str, tuple], name: bytes) -> tuple[int, Kernel]:
        source, defines = module
        return 0, Kernel(source, name.decode(), defines)

    def cuLaunchKernelEx(self, config: Any, function: Kernel, _params: Any, _extra: Any) -> tuple[int]:
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        self.launches.append(Noted(function, grid, config.blockDimX, config.sharedMemBytes))
        return (0,)


class _NoBlas:
    """Stands for cuBLAS and cuBLASLt, which have kernels of their own."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def open(cls, *_: Any) -> _NoBlas:
        return cls()

    def matmul(self, *_: Any, **__: Any) -> None: ...

    def close(self) -> None: ...


class _NoGemm(_NoBlas):
    """Stands for a GEMM of cuBLASLt."""

    def plan(self, _count: int) -> bool:
        return True

    def __call__(self, _count: int) -> None: ...


def note_launches(gpu: PaperGpu, spec: CudaSpec) -> list[Noted]:
    """Return what opening an engine of ``spec`` on ``gpu`` launches, each kernel once, with its largest grid."""
    driver = PaperDriver(gpu)

    def noted_key(_source: str, *, name: str, defines: dict[str, int | str], **_: Any) -> tuple:
        return name, tuple(sorted(defines.items()))

    with ExitStack() as patches:
        for target, value in (
            ("engine_core.cuda.driver.bindings", lambda: (driver, None)),
            ("engine_core.cuda.kernels.compile_kernel", noted_key),
            ("engine_core.backends.cuda.model.Blas", _NoBlas),
            ("engine_core.backends.cuda.model.BlasLt", _NoBlas),
            ("engine_core.backends.cuda.model.Fp8Gemm", _NoGemm),
        ):
            patches.enter_context(mock.patch(target, value))
        rope = np.broadcast_to(np.float32(0), spec.rope_shape)
        with mock.patch.object(Device, "upload", lambda *_: None):
            backend = CudaBackend(Device(), spec, lambda _name, _array: None, rope, use_cuda_graph=True)
            with suppress(EngineFaultError):  # what is read back is whatever stood there, perhaps NaN
                backend.log_probabilities(np.zeros(2, np.int32), 1)
            backend.close()
            _append_kv(driver, spec)
    largest: dict[tuple[Kernel, int, int], Noted] = {}
    for each in driver.launches:
        key = each.kernel, each.threads, each.shared
        if key not in largest or np.prod(each.grid) > np.prod(largest[key].grid):
            largest[key] = each
    return list(largest.values())


def _append_kv(driver: PaperDriver, spec: CudaSpec) -> None:
    """Launch the kernel that only TensorRT engines have."""
    device, attention = Device(), spec.attention
    kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    shape = AppendShape(spec.num_layers, kv_heads, head_dim, CONTEXT, CHUNK * kv_heads * head_dim)
    cache = DeviceArray(1 << 20, (spec.num_layers, 2, kv_heads, CONTEXT, head_dim), "fp16")
    fresh = DeviceArray(1 << 20, (2 * spec.num_layers, shape.fresh_stride), "fp16")
    number = DeviceArray(1 << 20, (1,), "int32")
    following = NextStep(number, number, None)
    arrays = (fresh, cache, number, ctypes.c_int(CHUNK), None, following)
    kv_append(Kernels(device, "fp16"), shape, *arrays)(SimpleNamespace(handle=0))  # type: ignore[arg-type]


# --- what it takes ----------------------------------------------------------------------------------------


def resident_ctas(limits: Limits, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """Return how many CTAs an SM holds at the same time, and what keeps a further one out.

    ``registers``: of a thread; ``shared``: bytes of a CTA, its own and its dynamic ones.
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // _REGISTER_GRAIN) * _REGISTER_GRAIN
    warps_of_scheduler = _REGISTERS // _SCHEDULERS // of_warp
    of_cta = -(-(shared + _SYSTEM_SHARED) // _SHARED_GRAIN) * _SHARED_GRAIN
    found = {
        "threads": limits.threads // (32 * warps),
        "registers": _SCHEDULERS * warps_of_scheduler // warps,
        "shared memory": limits.shared // of_cta,
        "CTAs": limits.ctas,
    }
    limit = min(found, key=lambda name: found[name])
    return found[limit], limit


def problems(gpu: PaperGpu, launch: Noted, taken: Resources, ctas: int, limit: str) -> list[str]:
    """Return what is wrong with ``launch`` on ``gpu``; nothing is if it runs as its configuration says."""
    found = []
    shared = launch.shared + taken.shared
    if launch.threads > _MAX_THREADS:
        found.append(f"{launch.threads} threads, a CTA has {_MAX_THREADS} at most")
    if shared > gpu.max_shared:
        found.append(f"{shared} bytes of shared memory, a CTA has {gpu.max_shared} at most")
    if ctas < 1:
        found.append(f"no CTA fits an SM: {limit}")
    if launch.grid[1] > 65535 or launch.grid[2] > 65535:
        found.append(f"a grid of {launch.grid}")
    return found


@cache
def resources_of(kernel: Kernel, arch: str) -> Resources:
    """Compile ``kernel``, which several engines may have, and return what it takes. Raises as ``binary_of``."""
    return read_resources(binary_of(kernel, arch), kernel.entry)


def binary_of(kernel: Kernel, arch: str) -> bytes:
    """Compile ``kernel``. Raises KernelCompileError, or DeviceUnavailableError without NVRTC."""
    text, headers = kernel_source(kernel.source)
    from cuda.bindings import nvrtc

    with mock.patch("engine_core.cuda.kernels.nvrtc.bindings", lambda: (None, nvrtc)):
        return compile_kernel(text, name=kernel.source, arch=arch, headers=headers, defines=dict(kernel.defines))


def rows_of(gpu: PaperGpu, engine: str, launches: Sequence[Noted], threads: int) -> Iterator[dict]:
    """Yield the row of each launch. Raises KernelCompileError."""
    with ThreadPoolExecutor(threads) as pool:
        resources = pool.map(lambda each: resources_of(each.kernel, f"sm_{gpu.capability}"), launches)
        for launch, taken in zip(launches, resources, strict=True):
            shared = launch.shared + taken.shared
            ctas, limit = resident_ctas(gpu.limits, launch.threads, taken.registers, shared)
            yield {
                "gpu": gpu.name,
                "engine": engine,
                "kernel": launch.kernel.entry,
                "macros": shape_of(launch.kernel),
                "grid": list(launch.grid),
                "threads": launch.threads,
                "dynamic_shared": launch.shared,
                **asdict(taken),
                "ctas_per_sm": ctas,
                "limit": limit,
                "problems": problems(gpu, launch, taken, ctas, limit),
            }


_SHAPE_MACROS = (
    "ROWS COLS BITS FLOATS EPILOGUE TOKENS SPLITS STAGE BUFFERS K_WARPS ROW_WARPS BATCH DEPTH HEADS KV_HEADS HEAD_DIM "
    "KV_INT8 MIN_KEYS WARPS BLOCKS GROUPS TILE_K LORA_RANK"
).split()


def merged(rows: Sequence[dict]) -> list[dict]:
    """Return the rows with ``engines`` in place of ``engine``: a kernel that several engines have stands there once."""
    found: dict[str, dict] = {}
    for row in rows:
        rest = {name: value for name, value in row.items() if name != "engine"}
        found.setdefault(json.dumps(rest), rest | {"engines": []})["engines"].append(row["engine"])
    return list(found.values())


def shape_of(kernel: Kernel) -> dict[str, int | str]:
    """Return the macros that say what is computed and how it is divided."""
    return {name: value for name, value in kernel.defines if name in _SHAPE_MACROS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = list(engines())
    parser.add_argument("--gpus", nargs="+", default=[""], help="parts of names (default: all)")
    parser.add_argument("--engines", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compile (default: %(default)s)")
    parser.add_argument("--output", default=str(RESULTS), help="file to write, - for a table alone")
    options = parser.parse_args()
    head = {"date": datetime.date.today().isoformat(), "commit": commit(), "nvrtc": nvrtc_version()}
    rows: list[dict] = []
    for gpu in (gpu for gpu in GPUS if any(part in gpu.name for part in options.gpus)):
        for name in options.engines:
            new = list(rows_of(gpu, name, note_launches(gpu, engines()[name]), options.threads))
            rows += new
            print(f"{gpu.name}, sm_{gpu.capability}, {name}: {len(new)} kernels", flush=True)
            for row in new if options.output == "-" else [row for row in new if row["problems"]]:
                print("  ", describe(row), *row["problems"], flush=True)
    if options.output != "-":
        lines = [json.dumps(head), *(json.dumps(row) for row in merged(rows))]
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    wrong = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} kernels, {wrong} with problems")
    return 1 if wrong else 0


def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def describe(row: dict) -> str:
    """Return a line about a row, for people."""
    grid = "×".join(map(str, row["grid"]))
    return (
        f"{row['kernel']:<20} grid {grid:<12} {row['threads']:>5} threads {row['registers']:>4} registers "
        f"{(row['dynamic_shared'] + row['shared']) / 1024:>6.1f} KiB  {row['ctas_per_sm']} CTAs an SM ({row['limit']})"
    )


if __name__ == "__main__":
    sys.exit(main())
