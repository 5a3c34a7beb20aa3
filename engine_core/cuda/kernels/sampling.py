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

# Arrays of ``sample``, by name.
ARRAYS = ("logits", "scores", "params", "state", "seen", "bias", "mask")

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
    slots: DeviceArray | None = None,
) -> tuple[Launch, Launch]:
    """Return the two kernels that turn logits into the next token of each sequence.

    One sequence: ``logits`` float32 [rows]; ``scores``: float32 ``scores_shape(rows)``, scratch; ``params``: uint8
    [PARAMS.itemsize]; ``state``: uint8 [STATE.itemsize]; ``seen``: uint32 [ceil(rows / 32)], rows already produced;
    ``bias``: float32 [rows]; ``mask``: uint32 [ceil(vocab / 32)]; ``vocab_map``: int32 [rows] or None; ``host_tokens``:
    device address of int32 [RING] in pinned memory. Several: ``slots``, int32 [n], has a negative number for a sequence
    that is left alone, and every array but ``vocab_map`` has n in front. Raises KernelArgumentError.
    """
    lead, rows = logits.shape[:-1], logits.shape[-1]
    sequences = lead[0] if lead else 1
    check("logits", logits, (*lead, rows), "fp32")
    check("scores", scores, (*lead, *scores_shape(rows)), "fp32")
    check("bias", bias, (*lead, rows), "fp32")
    check("seen", seen, (*lead, -(-rows // 32)), "uint32")
    check("mask", mask, (*lead, mask.shape[-1]), "uint32")
    check("params", params, (*lead, PARAMS.itemsize), "uint8")
    check("state", state, (*lead, STATE.itemsize), "uint8")
    if vocab_map is not None:
        check("vocab_map", vocab_map, (rows,), "int32")
    if slots is not None:
        check("slots", slots, lead, "int32")
    defines: dict[str, int | str] = {
        "ROWS": rows,
        "RING": RING,
        "BATCHED": len(lead),
        "MASK_WORDS": mask.shape[-1],
        "SCAN_THREADS": SAMPLE_SCAN_THREADS,
        "THREADS": SAMPLE_PICK_THREADS,
    }
    device = kernels.device
    blocks = -(-kernels.gpu.num_sms // sequences)  # a warp takes a run; some may have none, see attention_decode
    scan = kernels.function("sample", "sample_scan", defines)
    pick = kernels.function("sample", "sample_pick", defines)
    scanned = [logits, seen, bias, mask, vocab_map or 0, params, state, scores, slots or 0]
    picked = [scores, params, state, seen, vocab_map or 0, host_tokens, slots or 0]
    return (
        Launch(device, scan, (blocks, sequences), SAMPLE_SCAN_THREADS, scanned),
        Launch(device, pick, (sequences,), SAMPLE_PICK_THREADS, picked),
    )
