"""Every array that the CUDA backend keeps in device memory: its shape and its purpose.

The memory plan adds these up and ``load`` takes exactly these, so that the plan cannot be wrong about itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.cuda.encoder_layout import Arrays, EncoderLayout
from engine_core.backends.cuda.padding import padded_head, padded_rope, padded_size
from engine_core.backends.kv_pool import NUM_MARKS, pool_tokens, state_places
from engine_core.config import EngineConfig
from engine_core.cuda.driver import ITEM_BYTES, Device, aligned
from engine_core.cuda.kernels.attention import AttentionShape
from engine_core.cuda.kernels.integer_layout import GROUP_SIZES
from engine_core.cuda.kernels.launch_configs import MAX_VECTORS, PACKED_ROWS, PackedRowsProblem
from engine_core.cuda.kernels.linear_batch import batch_scratch
from engine_core.cuda.kernels.linear_packed import INTEGER_LAYOUTS, LAYOUTS, layout_of, packed_scratch, stored_group
from engine_core.cuda.kernels.lora import MAX_RANK, RANK_GRAIN
from engine_core.cuda.kernels.sampling import PARAMS, STATE, scores_shape
from engine_core.cuda.kernels.short_conv import ring_rows
from engine_core.errors import ConfigurationError, EngineDirectoryError
from engine_core.formats.lora import LoraAdapter, read_adapters
from engine_core.formats.manifest import Manifest, read_options
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.models.padding import round_up
from engine_core.models.spec import ModelSpec
from engine_core.models.vision import SIGLIP
from engine_core.vision.limits import ImageLimits, image_limits

BLAS_WORKSPACE = 32 << 20  # bytes; what its documentation recommends for Hopper, more than for others
PREFILL_CHUNK = 512  # tokens per prefill step unless configured; an interrupt takes effect after at most two
# The same of one sequence on a GPU of at least so many SMs, which takes no longer for them: weights are dequantized
# once a step, and a GEMM of more rows leaves fewer SMs idle.
LARGE_CHUNK, LARGE_CHUNK_SMS = 2048, 48
# Modules, graphs and cuBLAS's own code, as measured (test/gpu/test_memory_plan.py); the context itself is taken before
# the plan is made.
RUNTIME_BYTES = 76 << 20
_ENCODER_RUNTIME_BYTES = 4 << 20  # the same of an encoder's modules and graphs
ROW_GRAIN = 64  # see round_rows
PROMPT_HEADER = 4  # int32 before the tokens of a chunk: position, tokens, KV slot, and the adapter's number or -1
BATCH_SIZES = (1, 2, 4, 8, 16)  # sequences of a decode step for which there is a CUDA graph
DRAFT_SIZES = (4, 8, 16)  # tokens of a step that checks a draft, for which there is one
# Matrices of layers with a short convolution → what ``ModelSpec.matrices_of`` calls them.
CONV_MATRICES = {"conv_in": "qkv", "conv_out": "o"}
_ROW = 16  # int32 of a row of ``batch_chunks`` and ``prompt_slots``


@dataclass(frozen=True)
class ArraySpec:
    """One array in device memory."""

    purpose: str  # the memory plan's item
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return aligned(math.prod(self.shape) * ITEM_BYTES[self.dtype])


@dataclass(frozen=True)
class CudaOptions:
    """The builder's entries in the manifest's ``options``, for this backend's kernels."""

    dtype: str  # fp16 or bf16: of the weights that are not quantized, and of scales
    requantized: int = 0  # quantized matrices that were dequantized and rounded anew
    rounding_errors: dict[str, float] = field(default_factory=dict)  # of each of them, relative
    zero_points: bool = False  # whether groups of integers have zero points
    half_scales: bool = False  # whether scales of integers are fp16 though ``dtype`` is bf16
    ordered: tuple[str, ...] = ()  # matrices of a layer whose columns are in the order of their groups: see ``orders``
    fp8_activations: bool = False  # whether the checkpoint says that its fp8 weights meet activations in fp8
    rope_switch: int = 0  # rows of the stored RoPE table before those of longer sequences than that; 0: there are none

    def __post_init__(self) -> None:
        if self.dtype not in ("fp16", "bf16"):
            raise ValueError(f"dtype is {self.dtype!r:.60}, not fp16 or bf16")
        if self.rope_switch < 0:
            raise ValueError(f"rope_switch is {self.rope_switch}")


@dataclass(frozen=True)
class CudaSpec:
    """One model as this backend runs it."""

    model: ModelSpec
    head_rows: int  # rows of the LM head: model.vocab_size, or fewer with a vocabulary map
    dtype: str  # fp16 or bf16: weights, activations, and the KV cache unless it is int8 or fp8
    weight_format: WeightFormat  # of the layers' matrices and the head: fp16, or one in LAYOUTS
    kv_int8: bool
    max_context: int
    chunk: int  # tokens of a prefill step
    pool_tokens: int  # places of the KV pool
    max_batch: int = 1  # sequences decoded at the same time, a KV slot for each
    pool_on_host: bool = False  # the KV pool is in pinned memory, unless the GPU's memory is the host's: see ``on``
    adapters: tuple[LoraAdapter, ...] = ()  # by their numbers on the device
    drafts: bool = False  # whether there are steps that check drafts
    kv_fp8: bool = False  # an E4M3 cache; not with ``kv_int8``
    fp8_activations: bool = False  # whether prefill may round activations to fp8; see ``fp8_gemms``
    chooses_chunk: bool = False  # whether ``chunk`` is this backend's choice, by the GPU: see ``with_sms``
    ordered: tuple[str, ...] = ()  # see ``CudaOptions``
    images: ImageLimits | None = None  # None: no encoder is loaded
    frame_bytes: int = 0  # for frames of topics, which the node keeps in the host's memory
    rope_switch: int = 0  # tokens of a sequence beyond which it has another RoPE; 0: none has
    state_places: int = 0  # of the pool of states, for a model whose layers keep such

    @cached_property
    def encoder(self) -> EncoderLayout | None:
        """The arrays of the vision encoder, if there is one that runs."""
        if self.images is None or self.images.spec.kind != SIGLIP:
            return None
        return EncoderLayout(self.images.spec, self.images.max_images, self.hidden)

    @property
    def encoder_layers(self) -> int:
        """The layers of the encoder that a piece of its work computes: no more multiplications than a chunk has."""
        assert self.encoder is not None
        matrices = sum(math.prod(shape) for shape in matrix_shapes(self).values())
        chunk = self.chunk * self.num_layers * matrices
        return max(1, min(chunk // self.encoder.multiplications, self.encoder.spec.num_layers))

    @property
    def kv_dtype(self) -> str:
        """The type of the KV cache's values."""
        return "fp8" if self.kv_fp8 else "int8" if self.kv_int8 else self.dtype

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences of a decode step, of which there are a few sizes up to ``max_batch``."""
        return [*(size for size in BATCH_SIZES if size < self.max_batch), self.max_batch]

    @property
    def draft_sizes(self) -> list[int]:
        """Tokens of a step that checks a draft, of which there are a few sizes."""
        most = MAX_VECTORS if self.takes_vectors else DRAFT_SIZES[-1]
        return [size for size in DRAFT_SIZES if size <= most] if self.drafts else []

    @property
    def takes_vectors(self) -> bool:
        """True if steps of several rows multiply by the GEMVs of a step of one where the rows fit, else by GEMMs.

        All steps of an engine take the same one for a matrix, so that a sequence's sums are those it has alone.
        """
        return self.is_packed and not self.adapters and self.max_batch <= MAX_VECTORS

    @property
    def fp8_gemms(self) -> bool:
        """True if prefill multiplies codes of fp8 by codes of fp8, where the GPU's cuBLASLt does."""
        plain = not self.adapters and not self.model.num_experts and not self.conv_layers
        return self.fp8_activations and self.weight_format.kind == "fp8" and plain

    @property
    def row_sizes(self) -> list[int]:
        """Numbers of rows of the steps of several rows."""
        return sorted({*(self.batch_sizes if self.max_batch > 1 else []), *self.draft_sizes})

    @cached_property
    def lora_rank(self) -> int:
        """The rank that the kernels compute with for every adapter; 0 = there are none."""
        return round_up(max((adapter.rank for adapter in self.adapters), default=0), RANK_GRAIN)

    def has_lora(self, layer: int, matrix: str) -> bool:
        """Return whether some adapter changes the matrix."""
        if matrix not in self.matrices_of(layer):
            return False
        rows = range(model_matrices(self.model)[matrix][0])
        return any(adapter.rank_of(layer, CONV_MATRICES.get(matrix, matrix), rows) for adapter in self.adapters)

    def matrices_of(self, layer: int) -> tuple[str, str, str, str]:
        """Return the matrices of a layer, as ``matrix_shapes`` names them."""
        first, second = CONV_MATRICES if self.model.layers[layer].conv_kernel else ("qkv", "o")
        return first, second, "gate_up", "down"

    # --- of the model -------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    @property
    def num_kv_layers(self) -> int:
        """Return the layers that the KV cache has room for: those with attention, or one where there are none."""
        return max(1, len(self.model.kv_layers))

    @cached_property
    def conv_layers(self) -> tuple[int, ...]:
        """Return the layers with a short convolution."""
        return tuple(layer.index for layer in self.model.layers if layer.conv_kernel)

    @property
    def num_kinds_layers(self) -> int:
        """Return how many of the first layers have one of each kind among them, and with them every GEMM."""
        return 1 + max(layers[0] for layers in (self.model.kv_layers, self.conv_layers) if layers)

    @property
    def conv_taps(self) -> int:
        """Return the tokens that an output of a short convolution sees; 0 = there are none."""
        return max(layer.conv_kernel for layer in self.model.layers)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Return the shape of the rings of a sequence, float32: [layers of a convolution, rows, hidden]; () = none."""
        rows = ring_rows(self.conv_taps)
        return (len(self.conv_layers), rows, self.hidden) if rows else ()

    @property
    def state_bytes(self) -> int:
        """Return the bytes of the rings of a sequence."""
        return 4 * math.prod(self.state_shape) if self.state_shape else 0

    @property
    def hidden(self) -> int:
        """Return the hidden size that the kernels compute with; see ``padding``."""
        return padded_size(self.model.hidden_size)

    @property
    def intermediate(self) -> int:
        """Return the intermediate size that the kernels compute with; see ``padding``."""
        return padded_size(self.model.intermediate_size)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def norm_eps(self) -> float:
        return self.model.norm_eps

    def biases_of(self, layer: int) -> list[str]:
        """Return the matrices of a layer that have a bias."""
        each = self.model.layers[layer]
        linears = zip(self.matrices_of(layer), (each.qkv, each.output, each.gate_up, each.down), strict=True)
        return [name for name, linear in linears if linear.biases]

    @property
    def pre_norms(self) -> bool:
        """True if the inputs of attention and MLP are normed; else they are rounded copies of the residual stream."""
        return self.model.layers[0].pre_norms

    @property
    def wide_qk_norm(self) -> bool:
        """True if Q and K are normed over all their heads, in a kernel of its own."""
        return self.model.layers[0].wide_qk_norm

    @property
    def outer_norms(self) -> bool:
        """True if the outputs of attention and MLP are normed before they are added; they go to ``branch`` first."""
        return self.model.layers[0].outer_norms

    @property
    def tied(self) -> bool:
        """True if the LM head is the embedding."""
        return self.model.tied

    @cached_property
    def attention(self) -> AttentionShape:
        """The sizes that the attention kernels are compiled for, equal in all layers but for the window."""
        model = self.model
        return AttentionShape(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=padded_head(model),
            head_size=model.head_dim,
            max_context=self.max_context,
            norm_eps=model.norm_eps,
            qk_norm=any(layer.q_norm for layer in model.layers) and not self.wide_qk_norm,
            kv_int8=self.kv_int8,
            kv_fp8=self.kv_fp8,
            slot_layers=self.num_kv_layers if self.max_batch > 1 else 0,
            rotated=padded_rope(model),
            scale=model.attention_scale,
            softcap=model.attention_softcap,
            norm_offset=model.norm_offset,
            rope_switch=self.rope_switch,
        )

    def attention_of(self, layer: int) -> AttentionShape:
        """Return ``attention`` with the window of a layer."""
        window = self.model.layers[layer].window
        return dataclasses.replace(self.attention, window=window if window < self.max_context else 0)

    @property
    def rope_shape(self) -> tuple[int, ...]:
        """The shape of the RoPE tables: [rope_length, rotated / 2, 2], with one more in front if there are several."""
        count = len(self.model.ropes)
        return (*((count,) if count > 1 else ()), self.attention.rope_length, self.attention.rope_width, 2)

    def columns_of(self, matrix: str) -> int:
        """Return the columns of a layer's matrix, such as layers.3.qkv."""
        return matrix_shapes(self)[matrix.split(".")[-1]][1]

    @property
    def is_packed(self) -> bool:
        """True if the layers' matrices and the head are in packed tiles of LAYOUTS."""
        return self.weight_format.kind in LAYOUTS

    @property
    def has_head(self) -> bool:
        """True if the LM head has an array of its own."""
        return self.is_packed or not self.tied or self.head_rows != self.vocab_size

    @classmethod
    def create(cls, manifest: Manifest, config: EngineConfig) -> CudaSpec:
        """Return the spec of an engine as it was built; ``weights.resolve`` adds a vocabulary map given at load.

        Raises ConfigurationError, AdapterError or EngineDirectoryError.
        """
        able = capabilities_of(manifest.backend)
        if (reason := able.options_refusal(config.max_batch, config.lora_adapters, config.speculation)) is not None:
            raise ConfigurationError(reason)
        if (reason := able.draft_refusal(manifest.model, config.speculation)) is not None:
            raise ConfigurationError(reason)
        options = read_options(manifest, CudaOptions)
        adapters = read_adapters(config.lora_adapters, manifest.model, config.lora_max_rank)
        for adapter in adapters:
            if adapter.rank > MAX_RANK:
                raise ConfigurationError(
                    f"The adapter {adapter.name!r} has rank {adapter.rank}; the {manifest.backend} backend runs up to "
                    f"{MAX_RANK}."
                )
        max_context = config.max_context or manifest.max_context
        chunk = min(config.prefill_chunk or PREFILL_CHUNK, max_context)
        images = image_limits(manifest.model, config, max_context)
        spec = cls(
            model=manifest.model,
            head_rows=manifest.reduced_vocab_size or manifest.model.vocab_size,
            dtype=options.dtype,
            ordered=options.ordered,
            fp8_activations=options.fp8_activations,
            weight_format=_weight_format(manifest),
            kv_int8=(kv_cache_type := _kv_cache_type(manifest, config)) == "int8",
            kv_fp8=kv_cache_type == "fp8",
            max_context=max_context,
            chunk=round_rows(chunk),
            pool_tokens=0,
            max_batch=config.max_batch,
            pool_on_host=config.session_memory > 0,
            adapters=adapters,
            drafts=able.drafts and config.speculation == "on" and max_context > DRAFT_SIZES[-1],
            chooses_chunk=not config.prefill_chunk,
            images=images,
            frame_bytes=0 if images is None else config.image_frames_memory << 20,
            rope_switch=options.rope_switch if options.rope_switch < max_context else 0,
        )
        token_bytes = sum(math.prod(shape) * ITEM_BYTES[dtype] for shape, dtype in _pool_shapes(spec, 1).values())
        tokens = pool_tokens(config, max_context, token_bytes, spec.state_bytes)
        places = state_places(config, max_context, tokens) if spec.state_shape else 0
        return dataclasses.replace(spec, pool_tokens=tokens, state_places=places)

    def on(self, device: Device) -> CudaSpec:
        """Return the same as it runs on ``device``."""
        chosen = self.with_sms(device.num_sms)
        return dataclasses.replace(chosen, pool_on_host=self.pool_on_host and not device.is_integrated)

    def with_sms(self, num_sms: int) -> CudaSpec:
        """Return the same with the chunk for a GPU of ``num_sms`` SMs, where no parameter says another one.

        Several sequences keep short chunks, for which the others wait. Experts gain nothing by long ones.
        """
        if not self.chooses_chunk or num_sms < LARGE_CHUNK_SMS or self.max_batch > 1 or self.model.num_experts:
            return self
        return dataclasses.replace(self, chunk=round_rows(min(LARGE_CHUNK, self.max_context)))


def round_rows(tokens: int) -> int:
    """Rows a prefill step computes for so many tokens: a few sizes, each with its graph and its cuBLAS kernels."""
    grain = ROW_GRAIN if tokens > 2 * ROW_GRAIN else ROW_GRAIN // 2
    return -(-tokens // grain) * grain


def rows_of_chunk(tokens: int, chunk: int) -> int:
    """Return the rows that a prefill step of so many tokens computes, at most ``chunk``."""
    return min(chunk, round_rows(tokens))


def prefill_rows(chunk: int) -> list[int]:
    """Return every number of rows a prefill step of at most ``chunk`` tokens can have."""
    return sorted({rows_of_chunk(tokens, chunk) for tokens in range(1, chunk + 1)})


def packed_rows_problem(spec: CudaSpec) -> PackedRowsProblem:
    """Its launch configuration says up to how many rows prefill multiplies 4- and 8-bit weights as they are."""
    return PackedRowsProblem(spec.hidden, spec.intermediate, spec.attention.qkv_width, spec.weight_format.bits)


def weight_arrays(spec: CudaSpec) -> dict[str, ArraySpec]:
    """Name in ``weights.safetensors`` → array. Of gate_up the rows are (gate, up) in turn; of qkv q, k, v in a row."""
    attention, dtype = spec.attention, spec.dtype
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab_size, spec.hidden), "norm": (spec.hidden,)}
    if spec.has_head:
        shapes["head"] = (spec.head_rows, spec.hidden)
    matrices = matrix_shapes(spec)
    for i in range(spec.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            **({"input_norm": (spec.hidden,)} if spec.pre_norms else {}),
            **{name: matrices[name] for name in spec.matrices_of(i)[:2]},
            **({"post_norm": (spec.hidden,)} if spec.pre_norms else {}),
            **({"router": (spec.model.num_experts, spec.hidden)} if spec.model.num_experts else {}),
            "gate_up": matrices["gate_up"],
            "down": matrices["down"],
        }
        layer |= {f"{name}_bias": matrices[name][:1] for name in spec.biases_of(i)}
        if i in spec.conv_layers:
            layer["conv"] = (spec.conv_taps, spec.hidden)
            layer |= {"conv_bias": (spec.hidden,)} if spec.model.layers[i].conv_bias_name else {}
        elif attention.qk_norm:
            layer["q_norm"] = layer["k_norm"] = (attention.head_dim,)
        if spec.wide_qk_norm and i not in spec.conv_layers:
            layer["q_norm"] = (attention.num_heads * attention.head_dim,)
            layer["k_norm"] = (attention.num_kv_heads * attention.head_dim,)
        if spec.outer_norms:
            layer["attention_out_norm"] = layer["mlp_out_norm"] = (spec.hidden,)
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    packed = packed_shapes(spec)
    encoder = {} if spec.encoder is None else spec.encoder.weights()
    places = {
        f"layers.{i}.{name}_places": ArraySpec("weights", matrices[name][1:], "int32")
        for i in range(spec.num_layers)
        for name in spec.ordered
    }
    return (
        {
            name: ArraySpec("weights", layout_of(spec.weight_format).tiles_shape(*shape), "uint8")
            if name.split(".")[-1] in packed
            else ArraySpec("weights", shape, dtype)
            for name, shape in shapes.items()
        }
        | places
        | _image_arrays(encoder)
    )


def _image_arrays(arrays: Arrays) -> dict[str, ArraySpec]:
    return {name: ArraySpec("images", *array) for name, array in arrays.items()}


def packed_shapes(spec: CudaSpec) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of the matrices in packed tiles, by the last part of their names."""
    return {**matrix_shapes(spec), "head": (spec.head_rows, spec.hidden)} if spec.is_packed else {}


def matrix_shapes(spec: CudaSpec) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of the matrices of a layer."""
    attention, experts = spec.attention, max(1, spec.model.num_experts)
    convolutions = {"conv_in": (3 * spec.hidden, spec.hidden), "conv_out": (spec.hidden, spec.hidden)}
    return (convolutions if spec.conv_layers else {}) | {
        "qkv": (attention.qkv_width, spec.hidden),
        "o": (spec.hidden, attention.num_heads * attention.head_dim),
        "gate_up": (experts * 2 * spec.intermediate, spec.hidden),
        "down": (experts * spec.hidden, spec.intermediate),
    }


def gemm_shapes(spec: CudaSpec) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of the matrices of a layer that every token is multiplied by: not those of experts."""
    of_experts = ("gate_up", "down") if spec.model.num_experts else ()
    return {name: shape for name, shape in matrix_shapes(spec).items() if name not in of_experts}


def model_matrices(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return (rows, columns), as the model has them, of every matrix that ``matrix_shapes`` has."""
    found = dict(model.layer_matrices)
    for layer in model.layers:
        if layer.conv_kernel:
            found |= {name: model.matrices_of(layer)[of_model] for name, of_model in CONV_MATRICES.items()}
    return found


def stacked_rows(model: ModelSpec) -> dict[str, tuple[range, ...]]:
    """Return the rows of q, k and v, of o, of gate and up, and of down in the matrices of ``model_matrices``; those
    around a convolution have one part each."""
    sizes = {
        "qkv": [count * model.head_dim for count in (model.num_heads, model.num_kv_heads, model.num_kv_heads)],
        "gate_up": 2 * [model.intermediate_size],
    }
    found = {}
    for matrix, (rows, _) in model_matrices(model).items():
        ends = np.cumsum(sizes.get(matrix, [rows])).tolist()
        found[matrix] = tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))
    return found


def pair_rows(gate_up: np.ndarray) -> np.ndarray:
    """Return rows of gate and up in turn: one CTA computes both rows of a pair, and so the activation."""
    return gate_up.reshape(2, -1, gate_up.shape[1]).swapaxes(0, 1).reshape(gate_up.shape)


def lora_arrays(spec: CudaSpec) -> dict[str, ArraySpec]:
    """Return what LoRA adapters take: layers.N.MATRIX.lora_a and lora_b of those they change; see ``LoraMatrix``."""
    if not spec.adapters:
        return {}
    shapes, parts = matrix_shapes(spec), {name: len(rows) for name, rows in stacked_rows(spec.model).items()}
    count, rank = len(spec.adapters), spec.lora_rank
    arrays = {}
    for layer in range(spec.num_layers):
        for matrix, (rows, columns) in shapes.items():
            if spec.has_lora(layer, matrix):
                stem, sums = f"layers.{layer}.{matrix}", parts[matrix] * rank
                arrays[f"{stem}.lora_a"] = ArraySpec("adapters", (count, sums, columns), spec.dtype)
                arrays[f"{stem}.lora_b"] = ArraySpec("adapters", (count, rows, rank), spec.dtype)
    sums = max(parts.values()) * rank
    arrays["lora_sums"] = ArraySpec("adapters", (spec.chunk, sums), "fp32")
    if spec.max_batch == 1:  # those of a decode step, by layer and matrix
        arrays["lora_step_sums"] = ArraySpec("adapters", (spec.num_layers, len(shapes), sums), "fp32")
    arrays["slot_adapters"] = ArraySpec("adapters", (spec.max_batch,), "int32")  # the number of each slot's, -1 = none
    return arrays


def work_arrays(spec: CudaSpec, num_sms: int) -> dict[str, ArraySpec]:
    """Return name → purpose, shape and dtype of every array that is no weight: KV cache, RoPE table, scratch, sampler.

    Decode uses the first rows of what prefill uses. ``num_sms``: streaming multiprocessors of the GPU.
    """
    attention, dtype, chunk, rows = spec.attention, spec.dtype, spec.chunk, spec.head_rows
    kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    slots = (spec.max_batch,) if spec.max_batch > 1 else ()  # one sequence has no such dimension
    words = -(-spec.vocab_size // 32)
    arrays: dict[str, tuple[str, tuple[int, ...], str]] = {
        "kv_cache": ("kv_cache", (*slots, spec.num_kv_layers, 2, kv_heads, spec.max_context, head_dim), spec.kv_dtype),
        "rope": ("rope", spec.rope_shape, "fp32"),
        **_prefill_scratch(spec),
        **_encoder_scratch(spec),
        "partial": ("scratch", (attention.partial_floats(num_sms, *slots),), "fp32"),
        "counters": ("scratch", (*slots, attention.bundles), "uint32"),
        "blas": ("scratch", (BLAS_WORKSPACE,), "uint8"),
        "scores": ("scratch", (*slots, *scores_shape(rows)), "fp32"),
        "logits": ("io", (*slots, rows), "fp32"),
        "prompt": ("io", (PROMPT_HEADER + chunk,), "int32"),
        "state": ("io", (*slots, STATE.itemsize), "uint8"),
        "params": ("io", (*slots, PARAMS.itemsize), "uint8"),
        "seen": ("io", (*slots, -(-rows // 32)), "uint32"),
        "bias": ("io", (*slots, rows), "fp32"),
        "mask": ("io", (*slots, words), "uint32"),
    }
    if spec.outer_norms:
        arrays["branch"] = ("scratch", (chunk, spec.hidden), "fp32")
    if attention.kv_scaled:
        arrays["kv_scales"] = ("kv_cache", (*slots, spec.num_kv_layers, 2, kv_heads, attention.scale_pitch), "fp16")
    if sizes := spec.row_sizes:
        matrices = [*gemm_shapes(spec).values(), (rows, spec.hidden)]
        sums, counters = batch_scratch(matrices, sizes[-1], num_sms)
        arrays["batch_sums"] = ("scratch", (sums,), "fp32")
        arrays["batch_counters"] = ("scratch", (counters,), "uint32")
        arrays["batch_chunks"] = ("io", (len(sizes), _ROW), "int32")  # 0 and the rows of each size
    if spec.conv_layers:
        arrays["conv_in"] = ("scratch", (chunk, 3 * spec.hidden), dtype)
        arrays["convolved"] = ("scratch", (chunk, spec.hidden), dtype)
    if spec.state_shape:
        arrays["states"] = ("states", (spec.max_batch, *spec.state_shape), "fp32")
        arrays["state_marks"] = ("states", (spec.max_batch, NUM_MARKS, *spec.state_shape), "fp32")
    if spec.rope_switch:
        arrays["rope_rows"] = ("io", (spec.max_batch,), "int32")  # of ``rope``, of position 0 of each slot's sequence
    if slots:
        arrays["slots"] = ("io", slots, "int32")  # of the rows of a decode step; -1 = the row does nothing
        arrays["prompt_slots"] = ("io", (*slots, _ROW), "int32")  # the same for a prompt's first token, by its slot
    if spec.drafts:
        count = spec.draft_sizes[-1]
        arrays["draft_logits"] = ("io", (count, rows), "fp32")
        arrays["draft_scores"] = ("scratch", (count, *scores_shape(rows)), "fp32")
        arrays["draft_partial"] = ("scratch", (attention.partial_floats(num_sms, count),), "fp32")
        arrays["draft_counters"] = ("scratch", (count, attention.bundles), "uint32")
        arrays["draft_slots"] = ("io", (count,), "int32")  # of the rows of a step; -1 = the row does nothing
        arrays["draft_state"] = ("io", (count, STATE.itemsize), "uint8")
        arrays["draft_params"] = ("io", (count, PARAMS.itemsize), "uint8")
        arrays["draft_mask"] = ("io", (count, words), "uint32")
    if rows != spec.vocab_size:
        arrays["vocab_map"] = ("io", (rows,), "int32")
    if spec.is_packed:  # for prefill: one matrix at a time in 16 bits, or partial sums of a GEMM of few tokens
        shapes = gemm_shapes(spec).values()
        sums, counters = packed_scratch(shapes, min(chunk, PACKED_ROWS[-1]), num_sms)
        arrays["dequantized"] = ("scratch", (max(2 * sums, *map(math.prod, shapes)),), dtype)
        arrays["packed_counters"] = ("scratch", (counters,), "uint32")
    pool = {} if spec.pool_on_host else pool_arrays(spec)
    images = {} if spec.encoder is None else _image_arrays(spec.encoder.work())
    return {name: ArraySpec(*values) for name, values in arrays.items()} | pool | lora_arrays(spec) | images


def _prefill_scratch(spec: CudaSpec) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return the scratch of a chunk that nothing is kept in between two chunks; it lies side by side."""
    attention, chunk = spec.attention, spec.chunk
    return {
        "hidden": ("scratch", (chunk, spec.hidden), "fp32"),
        "normed": ("scratch", (chunk, spec.hidden), spec.dtype),
        "qkv": ("scratch", (chunk, attention.qkv_width), spec.dtype),
        "attended": ("scratch", (chunk, attention.num_heads * attention.head_dim), spec.dtype),
        **_mlp_arrays(spec),
    }


def _encoder_scratch(spec: CudaSpec) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return what an encoder needs behind the scratch of a chunk, which it shares, beside it."""
    if spec.encoder is None:
        return {}
    more = spec.encoder.scratch_bytes - shared_scratch_bytes(spec)
    return {"vision_scratch": ("images", (max(more, 0),), "uint8")}


def shared_scratch_bytes(spec: CudaSpec) -> int:
    """Return the bytes of the scratch of a chunk, from "hidden" on, that an encoder shares."""
    return sum(ArraySpec(*values).nbytes for values in _prefill_scratch(spec).values())


def _mlp_arrays(spec: CudaSpec) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return the scratch between a layer's second norm and its output."""
    chunk, inner, picked = spec.chunk, spec.intermediate, spec.model.experts_per_token
    if not picked:
        return {
            "gate_up": ("scratch", (chunk, 2 * inner), spec.dtype),
            "activated": ("scratch", (chunk, inner), spec.dtype),
        }
    return {
        "picked": ("scratch", (chunk, picked), "int32"),
        "shares": ("scratch", (chunk, picked), "fp32"),
        "activated": ("scratch", (chunk, picked, inner), spec.dtype),
        "made": ("scratch", (chunk, picked, spec.hidden), "fp32"),
    }


def pool_arrays(spec: CudaSpec) -> dict[str, ArraySpec]:
    """Return the arrays of the KV pool: a row for each layer, K and V and head, as the cache has them; and states."""
    shapes = _pool_shapes(spec, spec.pool_tokens) if spec.pool_tokens else {}
    arrays = {name: ArraySpec("prefix_cache", *values) for name, values in shapes.items()}
    if spec.state_places:
        arrays["state_pool"] = ArraySpec("states", (spec.state_places, *spec.state_shape), "fp32")
    return arrays


def _pool_shapes(spec: CudaSpec, tokens: int) -> dict[str, tuple[tuple[int, ...], str]]:
    attention = spec.attention
    rows = spec.num_kv_layers * 2 * attention.num_kv_heads
    arrays: dict[str, tuple[tuple[int, ...], str]] = {"pool": ((rows, tokens, attention.head_dim), spec.kv_dtype)}
    if attention.kv_scaled:
        arrays["pool_scales"] = ((rows, tokens), "fp16")
    return arrays


def _kv_cache_type(manifest: Manifest, config: EngineConfig) -> str:
    """Return the KV cache type that the parameter asks for, else the one of the build. Raises ConfigurationError."""
    kind = manifest.kv_cache_type if config.kv_cache_type == "auto" else config.kv_cache_type
    reason = capabilities_of(manifest.backend).kv_cache_refusal(manifest.model, manifest.quantization, kind)
    if reason is not None:
        raise ConfigurationError(reason)
    return kind


def _weight_format(manifest: Manifest) -> WeightFormat:
    """Raises EngineDirectoryError."""
    known = capabilities_of(manifest.backend).weight_formats
    if manifest.quantization in known:
        options = read_options(manifest, CudaOptions)
        own = (options.zero_points, options.half_scales)
        found = weight_format(manifest.quantization).in_groups(manifest.group_size, *own)
        is_read = found.kind not in INTEGER_LAYOUTS or manifest.group_size in GROUP_SIZES
        if is_read and manifest.group_size == stored_group(found):
            return found
    raise EngineDirectoryError(
        f"The variant is {manifest.quantization} with groups of {manifest.group_size}, which the {manifest.backend} "
        f"backend does not read; it reads {', '.join(known)}. Build the engine again."
    )


def planned_bytes(spec: CudaSpec, num_sms: int) -> dict[str, int]:
    """Everything ``load`` takes of the GPU's memory, by purpose, where it has so many SMs."""
    spec = spec.with_sms(num_sms)
    totals = bytes_by_purpose(weight_arrays(spec), work_arrays(spec, num_sms))
    totals["runtime"] = RUNTIME_BYTES + (0 if spec.encoder is None else _ENCODER_RUNTIME_BYTES)
    return totals


def host_bytes(spec: CudaSpec) -> dict[str, int]:
    """Return what ``load`` takes of the host's memory for the KV pool, images and frames, by purpose."""
    totals = bytes_by_purpose(pool_arrays(spec)) if spec.pool_on_host else {}
    if spec.encoder is not None:
        totals["images"] = spec.encoder.host_bytes
    return totals | ({"frames": spec.frame_bytes} if spec.frame_bytes else {})


def bytes_by_purpose(*groups: dict[str, ArraySpec]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for group in groups:
        for array in group.values():
            totals[array.purpose] = totals.get(array.purpose, 0) + array.nbytes
    return totals
