"""The transformer on our own kernels for steps of several rows: tokens of a draft, or several sequences.

A layer takes seven kernels or eight, because a norm of several rows is a kernel of its own. Up to eight rows of packed
weights are multiplied by a GEMV where they fit, others by a GEMM. Either adds up a row's sums in the same order in
every size, so that no text depends on the other rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from engine_core.backends.cuda.model import IN_NORMS, CudaModel
from engine_core.backends.gpu_model import Matrix, WeightSource, Work
from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import (
    CHUNK_WORDS,
    attention,
    linear,
    linear_batch,
    linear_packed,
    lora,
    sampling,
    short_conv,
)
from engine_core.cuda.kernels.launch_configs import Problem

_TOKEN = sampling.STATE.fields["token"][1]
_STATE_INTS = sampling.STATE.itemsize // 4


class RowsModel(CudaModel):
    """A model with steps of several rows. One with ``spec.drafts`` checks drafts.

    Such a step is a short prompt whose every token samples the next one, with the parameters, state and mask of its
    row in ``draft_params``, ``draft_state`` and ``draft_mask``. It reads neither bias nor penalties.
    """

    def fill(self, source: WeightSource, rope: np.ndarray) -> None:
        super().fill(source, rope)
        chunks = np.zeros(self.work["batch_chunks"].shape, dtype=np.int32)
        chunks[:, 1] = self.spec.row_sizes
        self._device.upload(self.work["batch_chunks"], chunks)

    def _prepare(self, host_tokens: int) -> None:
        super()._prepare(host_tokens)
        for size in self.spec.draft_sizes:
            self.draft_launches(size, host_tokens)

    def draft_launches(self, size: int, host_tokens: int, num_layers: int | None = None) -> list[Work]:
        """Return the step of the chunk in ``prompt``, which has at most ``size`` tokens, or its first ``num_layers``.

        The tokens go to ``draft_state`` and to ``host_tokens``, the device address of int32 [the largest size, RING].
        """
        w = self.work
        tokens = DeviceArray(self._tokens.address, (size,), "int32")
        launches: list[Work] = [self._embedding(tokens, self._rows("hidden", size))]
        for i in range(self.spec.num_layers if num_layers is None else num_layers):
            launches += self._layer_of_rows(i, size, self._attend_drafted(i, size), {})
        arrays = {name: self._rows(f"draft_{name}", size) for name in ("logits", "scores", "params", "state", "mask")}
        for name in ("seen", "bias"):  # which are not read
            arrays[name] = DeviceArray(w[name].address, (size, w[name].shape[-1]), w[name].dtype)
        return [*launches, *self._sample_of_rows(size, arrays, host_tokens, self._rows("draft_slots", size))]

    def _attend_drafted(self, i: int, size: int) -> list[Work]:
        """Return layer ``i``'s attention of rows that see the K and V of those before them, as in steps of one."""
        qkv, cache, norms, scales = self._rows("qkv", size), self._cache(i), self._head_norms(i), self._scales(i)
        shape, rope = self.spec.attention_of(i), self._rope(i)
        rows = [self._rows(f"draft_{name}", size) for name in ("state", "counters", "slots")]
        more: dict[str, Any] = {"norms": norms, "scales": scales, "rope_rows": self.work.get("rope_rows")}
        append = attention.rope_append(self._kernels, shape, qkv, cache, rope, self._slot_chunk, kv_only=True, **more)
        attend = attention.attention_decode(
            *(self._kernels, shape, qkv, cache, rope, rows[0], self._partial(size, "draft_partial"), rows[1]),
            self._rows("attended", size),
            slots=rows[2],
            appended=True,
            places=self._places(i, "o"),
            **more,
        )
        return [append, attend]

    def _layer_of_rows(self, i: int, size: int, mix: list[Work], terms: dict[str, lora.LoraTerm]) -> list[Work]:
        """Return layer ``i`` around its attention or convolution, which is ``mix``."""
        multiply = partial(self._multiply_rows, i, size=size, terms=terms)
        first, second, *others = self.matrices_of(i)
        before: list[Work] = [*multiply(first), *self._wide_qk_norm(i, size), *mix, *multiply(second)]
        if self.spec.model.num_experts:
            return [*before, *self._in_norm(i, "post_norm", size), *self._experts(i, size)]
        return [*before, *(work for name in others for work in multiply(name))]

    def _sample_of_rows(
        self, size: int, arrays: dict[str, DeviceArray], host_tokens: int, slots: DeviceArray | None = None
    ) -> list[Work]:
        """Return the LM head of all rows, then the sampler, of those that ``slots`` names."""
        vocab_map = self.work.get("vocab_map")
        sample = sampling.sample(self._kernels, **arrays, vocab_map=vocab_map, host_tokens=host_tokens, slots=slots)
        head = self.matrix("head" if self.spec.has_head else "embed")
        more = {"softcap": self.spec.model.logits_softcap, "logits_scale": self.spec.model.logits_scale}
        product = self._product(head, self._rows("normed", size), arrays["logits"], linear.LOGITS, more)
        return [self._norm(self.weights["norm"], size), product, *sample]

    def _takes_vectors(self, weight: Matrix) -> bool:
        """Return True if the rows of every step are multiplied by the GEMV of ``weight``."""
        if not self.spec.takes_vectors or not isinstance(weight, linear_packed.PackedWeight):
            return False
        return linear_packed.vectors_fit(self._kernels, weight, self.spec.row_sizes[-1])

    def _multiply_rows(self, i: int, name: str, size: int, terms: dict[str, lora.LoraTerm]) -> list[Work]:
        """Return what multiplies rows by a layer's matrix, from the norm before it to the residual stream behind it."""
        source, target, epilogue = self._matrices[name]
        target, term = "activated" if epilogue in linear.GATED else target, terms.get(name)
        vectors, output = self._rows(source, size), self._rows(target, size)
        more = {"bias": self._bias(i, name), "lora": term}
        return [
            *(self._in_norm(i, IN_NORMS[name], size) if name in IN_NORMS else []),
            *([] if term is None else [lora.lora_shrink(self._kernels, term, vectors)]),
            self._product(self.matrix(f"layers.{i}.{name}"), vectors, output, epilogue, more),
            *self._out_norm(i, name, size),
        ]

    def _product(
        self, weight: Matrix, vectors: DeviceArray, output: DeviceArray, epilogue: int, more: dict[str, Any]
    ) -> Launch:
        """Return the product of rows and a matrix, with what follows fused."""
        if self._takes_vectors(weight):
            return self._gemv(weight, vectors, output, epilogue, **more)
        w, size = self.work, vectors.shape[0]
        place = w["batch_chunks"].at(self.spec.row_sizes.index(size)).address
        return linear_batch.gemm_batch(
            *(self._kernels, weight, vectors, output, epilogue),
            *(DeviceArray(place, (CHUNK_WORDS,), "int32"), w["batch_sums"], w["batch_counters"]),
            **more,
        )

    def _partial(self, size: int, name: str = "partial") -> DeviceArray:
        count = self.spec.attention.partial_floats(self._kernels.gpu.num_sms, size)
        return DeviceArray(self.work[name].address, (count,), "fp32")

    def _rows_launches(self, host_tokens: int, num_layers: int) -> list[Work]:
        """Return a step of as many rows as there can be, of ``num_layers`` layers."""
        self._place_chunk(self.spec.draft_sizes[-1])
        state = np.zeros(self.spec.draft_sizes[-1], dtype=sampling.STATE)
        state["position"] = self._device.download(self._chunk)[0] + np.arange(len(state))
        self._device.upload(self.work["draft_state"], state.view(np.uint8).reshape(len(state), -1))
        self._device.upload(self.work["draft_slots"], np.zeros(len(state), dtype=np.int32))
        return self.draft_launches(self.spec.draft_sizes[-1], host_tokens, num_layers)

    def _work_of(self, problem: Problem[Any], host_tokens: int) -> list[Work]:
        of_rows = getattr(problem, "tokens", None) == linear_batch.MAX_SEQUENCES or getattr(problem, "sequences", 1) > 1
        if not of_rows and (found := super()._work_of(problem, host_tokens)):
            return found  # else the GEMV of several rows, whose norm is a kernel of its own
        launches = self._rows_launches(host_tokens, len(self._tuned_layers()))
        return [launch for launch in launches if isinstance(launch, Launch) and launch.problem == problem]


class BatchModel(RowsModel):
    """A model of several sequences, each in its slot of the KV cache: ``spec.max_batch`` is above 1.

    Row i of a decode step is the sequence in slot i. A step has one of a few sizes; a row without a sequence changes
    nothing.
    """

    def fill(self, source: WeightSource, rope: np.ndarray) -> None:
        super().fill(source, rope)
        w, device = self.work, self._device
        alone = np.full(w["prompt_slots"].shape, -1, dtype=np.int32)
        for slot in range(self.spec.max_batch):
            alone[slot, slot] = slot
        device.upload(w["prompt_slots"], alone)
        device.upload(w["slots"], np.full(self.spec.max_batch, -1, dtype=np.int32))

    def tune(self, host_tokens: int) -> None:
        slots = self.work["slots"]
        self._device.upload(slots, np.arange(self.spec.max_batch, dtype=np.int32))
        super().tune(host_tokens)
        self._device.upload(slots, np.full(self.spec.max_batch, -1, dtype=np.int32))

    def _prepare(self, host_tokens: int) -> None:
        super()._prepare(host_tokens)
        for size in self.spec.batch_sizes:
            self.batch_launches(size, host_tokens)
            if self.spec.adapters:
                self.batch_launches(size, host_tokens, adapted=True)

    def decode_launches(self, host_tokens: int, num_layers: int | None = None, *, adapted: bool = False) -> list[Work]:
        return self.batch_launches(self.spec.max_batch, host_tokens, num_layers, adapted=adapted)

    def _rows_launches(self, host_tokens: int, num_layers: int) -> list[Work]:
        return self.decode_launches(host_tokens, num_layers)

    def size_for(self, slot: int) -> int:
        """Return the size of the smallest step that has a row for ``slot``."""
        return next(size for size in self.spec.batch_sizes if slot < size)

    def batch_launches(
        self, size: int, host_tokens: int, num_layers: int | None = None, *, adapted: bool = False
    ) -> list[Work]:
        """Return one step of the slots below ``size`` that ``slots`` names, or its first ``num_layers``.

        It reads the token and position of each one's state and writes both; the token also goes to ``host_tokens``,
        the device address of int32 [max_batch, RING]. ``adapted``: some may have LoRA adapters.
        """
        tokens = DeviceArray(self.work["state"].address + _TOKEN, (size,), "int32")
        launches: list[Work] = [self._embedding(tokens, self._rows("hidden", size), _STATE_INTS)]
        for i in range(self.spec.num_layers if num_layers is None else num_layers):
            terms = self._lora_terms(i, size, len(self._matrices) * [self.work["lora_sums"].address]) if adapted else {}
            launches += self._batch_layer(i, size, terms)
        slots = DeviceArray(self.work["slots"].address, (size,), "int32")
        return launches + self._sample_rows(size, slots, host_tokens)

    def prompt_launches(self, slot: int, host_tokens: int) -> list[Work]:
        """Return what samples the first token of the prompt whose last chunk was queued for ``slot``."""
        w, size = self.work, self.size_for(slot)
        row_bytes = w["hidden"].nbytes // w["hidden"].shape[0]
        source, target = w["hidden"].address, w["hidden"].at(slot).address
        move = lambda stream: stream.copy_rows(target, row_bytes, source, row_bytes, row_bytes, 1)  # noqa: E731
        slots = DeviceArray(w["prompt_slots"].at(slot).address, (size,), "int32")
        return [*([move] if slot else []), *self._sample_rows(size, slots, host_tokens)]

    def _batch_layer(self, i: int, size: int, terms: dict[str, lora.LoraTerm]) -> list[Work]:
        kernels, w = self._kernels, self.work
        slots = DeviceArray(w["slots"].address, (size,), "int32")
        if i in self.spec.conv_layers:
            return self._layer_of_rows(i, size, [self._convolve_rows(i, size, slots)], terms)
        arrays = (self._rows("state", size), self._partial(size), self._rows("counters", size))
        attend = attention.attention_decode(
            kernels,
            *(self.spec.attention_of(i), self._rows("qkv", size), self._cache(i), self._rope(i), *arrays),
            self._rows("attended", size),
            norms=self._head_norms(i),
            scales=self._scales(i),
            slots=slots,
            places=self._places(i, "o"),
            rope_rows=w.get("rope_rows"),
        )
        return self._layer_of_rows(i, size, [attend], terms)

    def _convolve_rows(self, i: int, size: int, slots: DeviceArray) -> Launch:
        """Return layer ``i``'s short convolution of a step of ``size`` slots."""
        taps, bias, ring = self._convolution(i)
        rows, output = self._rows("conv_in", size), self._rows("convolved", size)
        arrays = (rows, taps, bias, ring, self._rows("state", size), output)
        options = (self.spec.max_context, slots, self._slot_floats)
        return short_conv.short_conv_step(self._kernels, *arrays, *options)

    def _sample_rows(self, size: int, slots: DeviceArray, host_tokens: int) -> list[Work]:
        """Return the LM head of all rows, then the sampler of those that ``slots`` names."""
        arrays = {name: self._rows(name, size) for name in sampling.ARRAYS}
        return self._sample_of_rows(size, arrays, host_tokens, slots)
