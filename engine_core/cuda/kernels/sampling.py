"""The sampler on the device: wrappers of sample.cu and the layout of what it reads."""

from __future__ import annotations

import numpy as np

from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import Kernels, check
from engine_core.cuda.kernels.launch_configs import SAMPLE_PICK_THREADS, SAMPLE_SCAN_THREADS

RING = 8  # steps whose tokens pinned memory holds
FAULT_NAN, FAULT_EMPTY = -1, -2  # tokens that are none

# struct State of common.cuh and struct Params of sample.cu. Fields of ``Params`` that are named as
# options of ``SamplingParams`` are set from them.
STATE = np.dtype(
    [("token", "i4"), ("position", "i4"), ("step", "u8"), ("best", "u8"), ("nan_seen", "u4"), ("unused", "u4")]
)
PARAMS = np.dtype(
    [
        ("top_p", "f8"),
        ("seed", "u8"),
        ("temperature", "f4"),
        ("min_p", "f4"),
        ("repetition_penalty", "f4"),
        ("top_k", "i4"),
        ("has_bias", "u4"),
        ("has_mask", "u4"),
    ]
)

_RUNS = SAMPLE_PICK_THREADS  # of rows, whose largest scores are kept


def scores_shape(rows: int) -> tuple[int]:
    """Return the shape of the sampler's scratch, float32, for ``rows`` logits."""
    return (rows + _RUNS,)


def sample(
    kernels: Kernels,
    logits: DeviceArray,
    scores: DeviceArray,
    params: DeviceArray,
    state: DeviceArray,
    seen: DeviceArray,
    bias: DeviceArray,
    mask: DeviceArray,
    vocab_map: DeviceArray | None,
    host_tokens: int,
) -> tuple[Launch, Launch]:
    """The two kernels that turn logits (float32 [rows]) into the next token.

    ``scores``: float32 ``scores_shape(rows)``, scratch; ``seen``: uint32 [ceil(rows / 32)], rows already produced;
    ``bias``: float32 [rows]; ``mask``: uint32 [ceil(vocab / 32)]; ``vocab_map``: int32 [rows] or None; ``host_tokens``:
    device address of int32 [RING] in pinned memory. Raises KernelArgumentError.
    """
    (rows,) = logits.shape
    check("logits", logits, (rows,), "fp32")
    check("scores", scores, scores_shape(rows), "fp32")
    check("bias", bias, (rows,), "fp32")
    check("seen", seen, (-(-rows // 32),), "uint32")
    check("params", params, (PARAMS.itemsize,), "uint8")
    check("state", state, (STATE.itemsize,), "uint8")
    if vocab_map is not None:
        check("vocab_map", vocab_map, (rows,), "int32")
    defines = {"ROWS": rows, "RING": RING, "SCAN_THREADS": SAMPLE_SCAN_THREADS, "THREADS": SAMPLE_PICK_THREADS}
    device = kernels.device
    blocks = kernels.gpu.num_sms  # a warp takes a run; some may have none, see attention_decode
    scan = kernels.function("sample", "sample_scan", defines)
    pick = kernels.function("sample", "sample_pick", defines)
    scanned = [logits, seen, bias, mask, vocab_map or 0, params, state, scores]
    picked = [scores, params, state, seen, vocab_map or 0, host_tokens]
    return (
        Launch(device, scan, (blocks,), SAMPLE_SCAN_THREADS, scanned),
        Launch(device, pick, (1,), SAMPLE_PICK_THREADS, picked),
    )
