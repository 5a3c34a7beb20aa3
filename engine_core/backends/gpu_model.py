"""The transformer on the device, whatever multiplies its matrices: arrays, embedding, attention, head, sampling.

A decode step is a list of launches, a prefill chunk a method. The residual stream is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from engine_core.backends.cuda.layout import (
    PROMPT_HEADER,
    ArraySpec,
    CudaSpec,
    packed_shapes,
    prefill_rows,
    weight_arrays,
)
from engine_core.cuda.driver import Arena, Device, DeviceArray, Launch, Stream
from engine_core.cuda.kernels import CHUNK_WORDS, Kernels, attention, linear, linear_packed, sampling, source_hash
from engine_core.cuda.kernels.launch_configs import PrefillAttentionProblem, Problem
from engine_core.cuda.kernels.log_probability import LogProbability
from engine_core.cuda.kernels.nvrtc import kernel_cache_dir
from engine_core.cuda.kernels.tuning import ConfigFile, EventTimer, Tuner

# name, array → fills the array. From a file, or random for a benchmark.
WeightSource = Callable[[str, DeviceArray], None]
# The work queued on a stream: a kernel's launch, or a run of a TensorRT context.
Work = Callable[[Stream], None]
_TUNED_LAYERS = 8  # layers whose kernels tuning times
_TUNED_CONTEXT = 1024  # tokens in the KV cache when it does
# A weight as the GEMV kernels take it: 16-bit [rows, cols], or packed.
Matrix = DeviceArray | linear_packed.PackedWeight
Layer = TypeVar("Layer")  # what a subclass prepares for one layer's prefill


class RowScores:
    """The probability of a given token after each row of a chunk: the LM head of a decode step on one after another."""

    def __init__(self, head: list[Work], rows: list[DeviceArray], log_probability: LogProbability) -> None:
        """``head``: work from the first of ``rows`` to the logits that ``log_probability`` reads."""
        self._head = head
        self._rows = rows
        self._log_probability = log_probability

    def __call__(self, stream: Stream, row: int, target: int) -> None:
        """Queue what writes the logarithm for ``target``, a row of the LM head or -1, after row ``row`` to place
        ``row`` of the output. Rows come in ascending order: the first one's place is used for all."""
        for array in self._rows if row else ():
            width = array.nbytes // array.shape[0]
            stream.copy_rows(array.address, width, array.at(row).address, width, width, 1)
        for work in self._head:
            work(stream)
        self._log_probability(stream, target, row)

    @property
    def output(self) -> DeviceArray:
        """float32 [rows of a chunk], of each scored row."""
        return self._log_probability.output


class DeviceModel(Generic[Layer]):
    """Weights, KV cache and scratch of one model in one arena, and what runs on them.

    A subclass has ``_decode_layer``, ``_prefill_layer``, ``_run_layer`` and ``close``.
    """

    captures_prefill = True  # whether a CUDA graph may hold a prefill step
    _kept: tuple[str, ...] = ("hidden",)  # arrays whose first row is the last token's after a prefill step

    def __init__(
        self,
        device: Device,
        stream: Stream,
        arena: Arena,
        kernels: Kernels,
        spec: CudaSpec,
        work: Mapping[str, ArraySpec],
    ) -> None:
        """``work``: everything that is not a weight."""
        self.spec = spec
        self._device = device
        self._stream = stream
        self._kernels = kernels
        self.weights = {name: arena.take(a.shape, a.dtype) for name, a in weight_arrays(spec).items()}
        self.work = {name: arena.take(a.shape, a.dtype) for name, a in work.items()}
        prompt = self.work["prompt"]
        self._chunk = DeviceArray(prompt.address, (CHUNK_WORDS,), "int32")
        self._slot_chunk = DeviceArray(prompt.address, (spec.attention.chunk_words,), "int32")
        self._tokens = DeviceArray(prompt.address + 4 * PROMPT_HEADER, (spec.chunk,), "int32")
        self._row_counts = prefill_rows(spec.chunk)

    def fill(self, source: WeightSource, rope: np.ndarray) -> None:
        """Loads every weight and the RoPE tables: float32, CudaSpec.rope_shape, cos and sin."""
        for name, array in self.weights.items():
            source(name, array)
        assert rope.dtype == np.float32 and rope.shape == self.work["rope"].shape
        self._device.upload(self.work["rope"], rope)
        counters = ("counters", "packed_counters", "batch_counters", "draft_counters")
        others = ("prompt", "seen", "bias", "state", "rope_rows", "picked")  # tuning reads the last as it is
        for name in (*counters, *others):
            if name in self.work:
                self._stream.zero(self.work[name])
        self._device.synchronize()

    def compile_ahead(self, host_tokens: int) -> None:
        """Compiles the kernels of decode_launches and prepare_prefill. Raises KernelCompileError or DeviceError."""

        self._kernels.compile_ahead(lambda: self._prepare(host_tokens))

    def _prepare(self, host_tokens: int) -> None:
        self.decode_launches(host_tokens)
        self.prepare_prefill()

    def tune(self, host_tokens: int) -> None:
        """Chooses the launch configurations of a GPU that the table does not list; see ``tuning``.

        Call it after ``fill`` and before ``compile_ahead``. It leaves anything in the KV cache and the scratch arrays.
        Raises DeviceError.
        """
        kernels, state = self._kernels, np.zeros((), dtype=sampling.STATE)
        if kernels.configs.in_table:
            return
        state["position"] = min(_TUNED_CONTEXT, self.spec.max_context) - 1
        states = np.broadcast_to(np.frombuffer(state.tobytes(), dtype=np.uint8), self.work["state"].shape)
        self._device.upload(self.work["state"], states)
        problems = kernels.problems(lambda: self._prepare(host_tokens))
        Tuner(
            kernels.configs,
            ConfigFile(kernel_cache_dir(), kernels.gpu, kernels.dtype, source_hash()),
            lambda problem: self._work_of(problem, host_tokens),
            kernels.compile_ahead,
            EventTimer(self._stream),
        ).choose(problems)
        self._stream.zero(self.work["state"])
        self._stream.wait()
        kernels.close()  # the code of candidates that were not chosen

    def _tuned_layers(self) -> range:
        """A few layers, of which one has attention: as in a step, a kernel's weights are not in the L2 cache when it
        starts."""
        return range(min(max(_TUNED_LAYERS, 1 + min(self.spec.model.kv_layers, default=0)), self.spec.num_layers))

    def _place_chunk(self, rows: int) -> None:
        """Makes the chunk in ``prompt`` one of at most ``rows`` tokens after ``_TUNED_CONTEXT`` others."""
        count = min(rows, self.spec.chunk, self.spec.max_context)
        start = min(_TUNED_CONTEXT, self.spec.max_context - count)
        self._device.upload(self._chunk, np.array([start, count], dtype=np.int32))

    def _work_of(self, problem: Problem[Any], host_tokens: int) -> list[Work]:
        """Return the launches that a step queues for ``problem``, of a few layers."""
        if isinstance(problem, PrefillAttentionProblem):
            rows = min(problem.rows, self.spec.chunk)
            self._place_chunk(rows)
            attending = [i for i in self._tuned_layers() if i not in self.spec.conv_layers]
            return [partial(self._attend(i), rows=rows) for i in attending]
        launches = self.decode_launches(host_tokens, len(self._tuned_layers()))
        return [launch for launch in launches if isinstance(launch, Launch) and launch.problem == problem]

    # --- decode ---------------------------------------------------------------------------------------

    def sampling_launches(self, host_tokens: int) -> list[Work]:
        """Return the LM head on the first row of ``hidden`` and the sampler; its token also goes to ``host_tokens``."""
        w = self.work
        arrays = {name: w[name] for name in sampling.ARRAYS}
        sample = sampling.sample(self._kernels, **arrays, vocab_map=w.get("vocab_map"), host_tokens=host_tokens)
        return [*self._head(), *sample]

    @property
    def _logits(self) -> DeviceArray:
        """The logits of the first slot."""
        return DeviceArray(self.work["logits"].address, (self.spec.head_rows,), "fp32")

    def _head(self) -> list[Work]:
        w, weights = self.work, self.weights
        head = self.matrix("head" if self.spec.has_head else "embed")
        return [
            self._gemv(
                *(head, w["hidden"].at(0), self._logits, linear.LOGITS),
                norm_weight=weights["norm"],
                norm_eps=self.spec.norm_eps,
                norm_size=self.spec.model.hidden_size,
                norm_offset=self.spec.model.norm_offset,
                softcap=self.spec.model.logits_softcap,
                logits_scale=self.spec.model.logits_scale,
            )
        ]

    def decode_launches(self, host_tokens: int, num_layers: int | None = None, *, adapted: bool = False) -> list[Work]:
        """Return a step's work, or its first ``num_layers``: it reads and writes token and position of ``state``.

        ``adapted``: for sequences that may have LoRA adapters.
        """
        w = self.work
        token = DeviceArray(w["state"].address + sampling.STATE.fields["token"][1], (1,), "int32")
        hidden = DeviceArray(w["hidden"].address, (1, self.spec.hidden), "fp32")
        launches: list[Work] = [self._embedding(token, hidden)]
        for i in range(self.spec.num_layers if num_layers is None else num_layers):
            launches += self._adapted_decode_layer(i) if adapted else self._decode_layer(i)
        return launches + self.sampling_launches(host_tokens)

    def _embedding(
        self, tokens: DeviceArray, output: DeviceArray, token_stride: int = 1, features: DeviceArray | None = None
    ) -> Launch:
        scale, rounded = self.spec.model.embedding_scale, None
        if not self.spec.pre_norms:  # the first layer reads it as it is
            normed = self.work["normed"]
            rounded = DeviceArray(normed.address, (*tokens.shape, self.spec.hidden), normed.dtype)
        arrays = (self.weights["embed"], tokens, output)
        return linear.embed(self._kernels, *arrays, token_stride, scale, rounded, features)

    def _decode_layer(self, i: int) -> list[Work]:
        raise NotImplementedError

    def _adapted_decode_layer(self, i: int) -> list[Work]:
        """Return ``_decode_layer`` for sequences with LoRA adapters; only a model with adapters needs it."""
        raise NotImplementedError

    def matrix(self, name: str) -> Matrix:
        """Return the weight ``name`` of ``weight_arrays``, with what the kernels have to know of a packed one."""
        array = self.weights[name]
        shape = packed_shapes(self.spec).get(name.split(".")[-1])
        if shape is None:
            return array
        return linear_packed.PackedWeight(array, self.spec.weight_format, *shape)

    def _gemv(self, weight: Matrix, *args: Any, **kwargs: Any) -> Launch:
        if isinstance(weight, linear_packed.PackedWeight):
            return linear_packed.gemv_packed(self._kernels, weight, *args, **kwargs)
        return linear.gemv(self._kernels, weight, *args, **kwargs)

    def _attend_one(self, i: int) -> Launch:
        """Layer ``i``'s attention of a decode step: from the first row of ``qkv`` to the first of ``attended``."""
        w = self.work
        return attention.attention_decode(
            self._kernels,
            self.spec.attention_of(i),
            w["qkv"].at(0),
            self._cache(i),
            self._rope(i),
            w["state"],
            w["partial"],
            w["counters"],
            w["attended"].at(0),
            norms=self._head_norms(i),
            scales=self._scales(i),
            places=self._places(i, "o"),
            rope_rows=self.work.get("rope_rows"),
        )

    def _places(self, i: int, name: str) -> DeviceArray | None:
        """Return where a layer's matrix has each column of its input; None: as they are."""
        return self.weights.get(f"layers.{i}.{name}_places")

    def _head_norms(self, i: int) -> tuple[DeviceArray, DeviceArray] | None:
        if not self.spec.attention.qk_norm:
            return None
        return self.weights[f"layers.{i}.q_norm"], self.weights[f"layers.{i}.k_norm"]

    def _cache(self, i: int) -> DeviceArray:
        """Layer ``i``'s KV cache, of the first slot."""
        return self.work["kv_cache"].at(*self._layer(i))

    def _rope(self, i: int) -> DeviceArray:
        """Layer ``i``'s RoPE table."""
        tables = self.work["rope"]
        return tables if len(self.spec.model.ropes) == 1 else tables.at(self.spec.model.layers[i].rope)

    def _scales(self, i: int) -> DeviceArray | None:
        return self.work["kv_scales"].at(*self._layer(i)) if self.spec.attention.kv_scaled else None

    def _layer(self, i: int) -> tuple[int, ...]:
        of_kv = self.spec.model.kv_layers.index(i)
        return (0, of_kv) if self.spec.max_batch > 1 else (of_kv,)

    # --- prefill --------------------------------------------------------------------------------------

    def prepare_prefill(self) -> None:
        """Makes the launches of a prefill chunk. Raises KernelCompileError or DeviceError."""
        self._embed = self._embedding(self._tokens, self.work["hidden"], features=self.work.get("features"))
        self._keep = [linear.keep_last_row(self._kernels, self.work[name], self._chunk) for name in self._kept]
        self._layers = [self._prefill_layer(i) for i in range(self.spec.num_layers)]
        has_adapters = bool(self.spec.adapters)
        self._adapted_layers = [self._adapt_layer(i, each) for i, each in enumerate(self._layers) if has_adapters]

    def _prefill_layer(self, i: int) -> Layer:
        raise NotImplementedError

    def _adapt_layer(self, i: int, layer: Layer) -> Layer:
        """Return ``layer`` for a sequence with a LoRA adapter; only a model with adapters needs it."""
        raise NotImplementedError

    def prefill_chunk(
        self, rows: int, *, adapted: bool = False, keep: bool = True, num_layers: int | None = None
    ) -> None:
        """Queues the forward pass of the chunk in ``prompt``, which has at most ``rows`` tokens, or its first layers.

        Nothing else of the chunk is in the launches, so that a graph can hold them. Leaves the last token's state in
        the first row of ``hidden``, where the head reads it. Rows that are no tokens are computed, too, and never read.
        ``adapted``: for a sequence with a LoRA adapter. ``keep``: False leaves every token's state in its own row.
        """
        assert 1 <= rows <= self.spec.chunk
        self._begin_chunk(rows)
        self._embed.set_grid(rows)
        self._embed(self._stream)
        for layer in (self._adapted_layers if adapted else self._layers)[:num_layers]:
            self._run_layer(layer, rows)
        for launch in self._keep if keep else ():
            launch(self._stream)

    def scores(self) -> RowScores:
        """Return what scores the rows that ``prefill_chunk`` leaves with ``keep`` False. Compiles its kernels."""
        qkv = self.work["qkv"]  # which is not read after a chunk
        return RowScores(
            self._head(),
            [self.work[name] for name in self._kept],
            LogProbability(self._kernels, self._logits, DeviceArray(qkv.address, (self.spec.chunk,), "fp32")),
        )

    def _begin_chunk(self, rows: int) -> None:
        """Sets what the launches of all layers have to know of a chunk."""

    def _run_layer(self, layer: Layer, rows: int) -> None:
        """Queues one layer."""
        raise NotImplementedError

    def _rope_append(self, i: int) -> Launch:
        w = self.work
        return attention.rope_append(
            self._kernels,
            *(self.spec.attention_of(i), w["qkv"], self._cache(i), self._rope(i), self._slot_chunk),
            norms=self._head_norms(i),
            scales=self._scales(i),
            rope_rows=self.work.get("rope_rows"),
        )

    def _attend(self, i: int) -> attention.AttentionPrefill:
        w = self.work
        arrays = (w["qkv"], self._cache(i), w["attended"], self._slot_chunk)
        more: dict[str, Any] = {"scales": self._scales(i), "places": self._places(i, "o")}
        return attention.attention_prefill(self._kernels, self.spec.attention_of(i), *arrays, self._row_counts, **more)

    def _run_attention(self, rope_append: Launch, attend: attention.AttentionPrefill, rows: int) -> None:
        rope_append.set_grid(attention.rope_append_blocks(self.spec.attention, rows))
        rope_append(self._stream)
        attend(self._stream, rows)

    def close(self) -> None:
        raise NotImplementedError
