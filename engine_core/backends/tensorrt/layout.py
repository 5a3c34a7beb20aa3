"""The inputs and outputs of our TensorRT engines: names, shapes, and every array that is bound to them.

The builder makes its optimization profiles from here, the memory plan adds the arrays up, ``load`` takes exactly them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine_core.backends.cuda.layout import ArraySpec
from engine_core.backends.kv_pool import pool_tokens
from engine_core.backends.tensorrt.capabilities import CAPABILITIES
from engine_core.config import EngineConfig
from engine_core.cuda.driver import ITEM_BYTES, Device
from engine_core.cuda.kernels.sampling import PARAMS, STATE, scores_shape
from engine_core.errors import ConfigurationError
from engine_core.formats.manifest import Manifest, read_options
from engine_core.models.spec import ModelSpec

EXPORTERS = ("gemm", "plain", "native")
PLAN_NAME = "model.plan"
DEFAULT_MAX_PREFILL = 512  # tokens of a prefill step the engine is built for
PREFILL, DECODE = 0, 1  # optimization profiles
# Positions of the shortest past. A prompt's first chunk sees none of them and is handed this many.
MIN_PAST = 64
ADDRESS_STEP = 256
# Input → its least, typical and largest shape in an optimization profile.
Profile = dict[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class TrtOptions:
    """The options that the builder writes into the manifest's ``options``."""

    dtype: str  # fp16 or fp32: of the weights
    exporter: str  # one of EXPORTERS
    max_prefill: int  # tokens of the longest prefill step
    scratch_bytes: int = 0  # what the plan that needs most works in

    def __post_init__(self) -> None:
        if self.dtype not in CAPABILITIES.weight_formats or self.exporter not in EXPORTERS or self.max_prefill < 1:
            raise ValueError(f"dtype, exporter, max_prefill are {self.dtype}, {self.exporter}, {self.max_prefill}")


@dataclass(frozen=True)
class TrtSpec:
    """One model as this backend runs it."""

    model: ModelSpec
    head_rows: int  # rows of the LM head: model.vocab_size, or fewer with a vocabulary map
    dtype: str  # fp16 or fp32: weights and KV cache
    native: bool  # the engine writes its cache itself (TensorRT 10.15 and later)
    max_context: int
    chunk: int  # tokens of a prefill step
    pool_tokens: int  # places of the KV pool
    pool_on_host: bool = False  # see CudaSpec

    @classmethod
    def create(cls, manifest: Manifest, config: EngineConfig) -> TrtSpec:
        """Raises ConfigurationError or EngineDirectoryError."""
        options = read_options(manifest, TrtOptions)
        _check_config(manifest, config, options)
        max_context = config.max_context or manifest.max_context
        native = options.exporter == "native"
        if native and max_context != manifest.max_context:
            raise ConfigurationError(
                f"max_context is {max_context}, but this engine has a fixed cache of {manifest.max_context} positions; "
                "leave it at 0, or build the engine for what you want."
            )
        model = manifest.model
        token_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * ITEM_BYTES[options.dtype]
        return cls(
            model=model,
            head_rows=manifest.reduced_vocab_size or model.vocab_size,
            dtype=options.dtype,
            native=native,
            max_context=max_context,
            chunk=min(config.prefill_chunk or options.max_prefill, max_context),
            pool_tokens=pool_tokens(config, max_context, token_bytes),
            pool_on_host=config.session_memory > 0,
        )

    def on(self, device: Device) -> TrtSpec:
        """Return the same as it runs on ``device``."""
        return dataclasses.replace(self, pool_on_host=self.pool_on_host and not device.is_integrated)

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    @property
    def num_kv_layers(self) -> int:
        """Return the layers that the KV cache has room for: all of them, since no layer has anything but attention."""
        return self.num_layers

    @property
    def num_kv_heads(self) -> int:
        return self.model.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.model.head_dim

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def fresh_stride(self) -> int:
        """Elements from one layer's new keys to its new values, and on to the next layer's keys."""
        step = ADDRESS_STEP // ITEM_BYTES[self.dtype]
        return -(-self.chunk * self.num_kv_heads * self.head_dim // step) * step


def check_chunk(config: EngineConfig, max_prefill: int) -> None:
    """Check prefill_chunk. ``max_prefill``: tokens of the longest prefill step the engine was built for. Raises
    ConfigurationError."""
    if config.prefill_chunk > max_prefill:
        raise ConfigurationError(
            f"prefill_chunk is {config.prefill_chunk}, but this engine was built for at most {max_prefill} tokens a "
            "step; lower it, or build with a larger --max-prefill."
        )


def _check_config(manifest: Manifest, config: EngineConfig, options: TrtOptions) -> None:
    """Raises ConfigurationError on what this backend does not do."""
    if (
        refused := CAPABILITIES.options_refusal(config.max_batch, config.lora_adapters, config.speculation)
    ) is not None:
        raise ConfigurationError(refused)
    if config.kv_cache_type not in ("auto", options.dtype):
        built = (
            f"kv_cache_type is {config.kv_cache_type!r}, but this engine was built for {options.dtype!r}; set it to "
        )
        reason = CAPABILITIES.kv_cache_refusal(manifest.model, manifest.quantization, config.kv_cache_type)
        raise ConfigurationError(reason or f"{built}that or auto.")
    if config.vocab_map not in ("auto", "none") or (config.vocab_map == "none" and manifest.reduced_vocab_size):
        raise ConfigurationError(
            f"vocab_map is {config.vocab_map!r}, but a TensorRT engine's LM head is fixed when it is built; "
            "use 'edgellm build --backend tensorrt' with or without --vocab-map, and choose auto."
        )
    check_chunk(config, options.max_prefill)
    if config.max_context > manifest.max_context:
        raise ConfigurationError(
            f"max_context is {config.max_context}, but this engine was built for {manifest.max_context} tokens; "
            "lower it, or build the engine again."
        )
    if (reason := CAPABILITIES.context_step_refusal(config.max_context)) is not None:
        raise ConfigurationError(reason)


# --- what the engine reads and writes ---------------------------------------------------------------------


def cache_names(index: int) -> tuple[str, str]:
    """Return the inputs that are layer ``index``'s K and V."""
    return f"past_key.{index}", f"past_value.{index}"


def cache_output_names(spec: TrtSpec, index: int) -> tuple[str, str]:
    """Return the outputs for them: the new rows, or (native) the cache itself at the same address."""
    stem = "present" if spec.native else "new"
    return f"{stem}_key.{index}", f"{stem}_value.{index}"


def input_shapes(spec: TrtSpec, tokens: int, past: int) -> dict[str, tuple[int, ...]]:
    """Return the inputs whose shape is dynamic, for a call with ``tokens`` tokens that is handed ``past`` positions."""
    shapes: dict[str, tuple[int, ...]] = {"token_ids": (tokens,), "positions": (tokens,)}
    if spec.native:
        return shapes
    shapes["past_index"] = (past,)
    for i in range(spec.num_layers):
        shapes |= dict.fromkeys(cache_names(i), (spec.num_kv_heads, past, spec.head_dim))
    return shapes


def profile_shapes(spec: TrtSpec, profile: int) -> Profile:
    """Return the optimization profile PREFILL or DECODE of an engine of ``spec``'s own limits."""
    if profile == PREFILL:
        # A prompt that fits one chunk is the common case: tactics are chosen for it.
        sizes = ((1, MIN_PAST), (spec.chunk, MIN_PAST), (spec.chunk, spec.max_context))
    else:
        sizes = ((1, MIN_PAST), (1, spec.max_context), (1, spec.max_context))
    least, typical, largest = (input_shapes(spec, tokens, past) for tokens, past in sizes)
    return {name: (least[name], typical[name], largest[name]) for name in least}


def past_for(spec: TrtSpec, position: int) -> int:
    """Positions of the cache to hand to a chunk that starts at ``position``.

    A view of fewer than all positions of every head is not contiguous in this cache, so it is all or, where nothing of
    it is seen, any memory of the least size.
    """
    return MIN_PAST if position == 0 else spec.max_context


def work_arrays(spec: TrtSpec, scratch_bytes: int) -> dict[str, ArraySpec]:
    """Everything on the device beside the engine's own weights."""
    rows, dtype, chunk = spec.head_rows, spec.dtype, spec.chunk
    kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    arrays: dict[str, tuple[str, tuple[int, ...], str]] = {
        "kv_cache": ("kv_cache", (spec.num_layers, 2, kv_heads, spec.max_context, head_dim), dtype),
        "engine": ("scratch", (max(1, scratch_bytes),), "uint8"),
        "scores": ("scratch", scores_shape(rows), "fp32"),
        "logits": ("io", (rows,), "fp32"),
        "token_ids": ("io", (chunk,), "int32"),
        "positions": ("io", (chunk,), "int32"),
        "last_token": ("io", (1,), "int32"),
        # The decode step's own, which the device itself fills; its last_token stays 0.
        "step_token": ("io", (1,), "int32"),
        "step_position": ("io", (1,), "int32"),
        "step_last_token": ("io", (1,), "int32"),
        "state": ("io", (STATE.itemsize,), "uint8"),
        "params": ("io", (PARAMS.itemsize,), "uint8"),
        "seen": ("io", (-(-rows // 32),), "uint32"),
        "bias": ("io", (rows,), "fp32"),
        "mask": ("io", (-(-spec.vocab_size // 32),), "uint32"),
    }
    if spec.native:
        arrays["write_index"] = arrays["step_write_index"] = ("io", (1,), "uint64")
    else:
        arrays["past_index"] = ("io", (spec.max_context,), "int32")
        arrays["fresh"] = ("io", (2 * spec.num_layers, spec.fresh_stride), dtype)
    if rows != spec.vocab_size:
        arrays["vocab_map"] = ("io", (rows,), "int32")
    pool = {} if spec.pool_on_host else pool_arrays(spec)
    return {name: ArraySpec(*values) for name, values in arrays.items()} | pool


def pool_arrays(spec: TrtSpec) -> dict[str, ArraySpec]:
    """Return the array of the KV pool."""
    if not spec.pool_tokens:
        return {}
    shape = (spec.num_layers * 2 * spec.num_kv_heads, spec.pool_tokens, spec.head_dim)
    return {"pool": ArraySpec("prefix_cache", shape, spec.dtype)}
