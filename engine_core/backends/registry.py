"""The backends that there are. Imports none of them."""

from __future__ import annotations

from engine_core.errors import BackendUnavailableError

# name → (module, class); imported only when asked for. The fastest first, by tokens a second at batch 1: on one H200
# the CUDA kernels decode at 56 to 90 % of the memory limit (benchmarks/results/kernels.md), a TensorRT 8.6 plan from
# ONNX at 24 %; a CPU has a tenth of a GPU's bandwidth.
BACKENDS = {
    "cuda": ("engine_core.backends.cuda.backend", "CudaBackend"),
    "tensorrt": ("engine_core.backends.tensorrt.backend", "TensorRTBackend"),
    "onnxruntime": ("engine_core.backends.onnxruntime.backend", "OnnxRuntimeBackend"),
}


def backend_names() -> tuple[str, ...]:
    """Return the backends of this version, installed or not, the fastest first."""
    return tuple(BACKENDS)


def check_name(name: str) -> None:
    """Raises BackendUnavailableError unless ``name`` is a backend of this version."""
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"The backend {name!r} is not part of this version; available: {', '.join(sorted(BACKENDS))}."
        )
