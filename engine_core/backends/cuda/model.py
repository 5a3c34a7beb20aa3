"""The transformer on our own kernels alone.

Decode takes five kernels a layer, each of which may start while the one before it ends: norm + QKV GEMV, attention
(with RoPE and the append to the KV cache), output GEMV + residual, norm + gate-up GEMV + SiLU, down GEMV + residual.
Two more norm the outputs of attention and MLP in models that do so before they add them; in models without norms
before attention and MLP these round the sum for the GEMV that follows. One more norms Q and K over all heads where a
model does.
A layer with a short convolution has its kernel in the place of attention's, and other names of the GEMMs around it.
Prefill calls cuBLAS, for which 4- and 8-bit weights are dequantized; a GEMM of a few tokens reads them as they are.
Where the checkpoint says so and cuBLASLt can, activations are rounded to fp8 and multiplied by fp8 weights instead: a
token's activations have one scale, computed as they are rounded.

Sequences with LoRA adapters have launches of their own: the GEMVs of matrices that some adapter changes compute both
halves of what it adds; in prefill two kernels follow the GEMM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from engine_core.backends.cuda.adapters import adapter_matrices
from engine_core.backends.cuda.layout import (
    CudaSpec,
    matrix_shapes,
    packed_rows_problem,
    stacked_rows,
    work_arrays,
)
from engine_core.backends.cuda.padding import padded_head
from engine_core.backends.gpu_model import DeviceModel, WeightSource, Work
from engine_core.cuda.driver import Arena, Device, DeviceArray, Launch, Stream, aligned
from engine_core.cuda.kernels import CHUNK_WORDS, Kernels, experts, fp8_rows, linear, linear_packed, lora, short_conv
from engine_core.cuda.kernels.attention import AttentionPrefill
from engine_core.cuda.kernels.blas import Blas
from engine_core.cuda.kernels.blas_lt import BlasLt, Fp8Gemm
from engine_core.cuda.kernels.launch_configs import (
    GEMM_TOKENS,
    PACKED_ROWS,
    PackedGemmConfig,
    PackedGemmProblem,
    PackedRowsProblem,
    Problem,
)


@dataclass
class _Gemm:
    """A 16-bit matrix for cuBLAS and, where it is kept in 4 or 8 bits, what makes it and what does without."""

    weight: DeviceArray
    dequantize: Launch | None = None
    packed: linear_packed.PackedGemm | None = None
    bias: Launch | None = None  # for what cuBLAS leaves; ``packed`` adds it itself
    lora: lora.LoraChunk | None = None  # what an adapter adds afterwards


@dataclass
class _Fp8Operands:
    """What makes the operands of a GEMM in fp8: the codes of activations, and those of weights row by row."""

    quantize: Launch
    unpack: Launch


@dataclass
class _Layer:
    """The launches and the matrices of one layer's prefill."""

    input_norm: Launch | None
    qk_norm: Launch | None  # over all heads
    attention: tuple[Launch, AttentionPrefill] | None  # what appends to the cache, and what reads it
    convolve: Launch | None  # in its place
    post_norm: Launch | None
    out_norms: dict[str, Launch]  # after the GEMM of that name, where there are any
    gemms: dict[str, _Gemm]  # the first two are those around attention or convolution
    experts: list[Launch]  # in the place of the GEMMs of the MLP
    fp8: dict[str, _Fp8Operands]  # by GEMM; empty where none is in fp8


class CudaModel(DeviceModel[_Layer]):
    """See the module."""

    def __init__(self, device: Device, stream: Stream, arena: Arena, kernels: Kernels, spec: CudaSpec) -> None:
        super().__init__(device, stream, arena, kernels, spec, work_arrays(spec, device.num_sms))
        self.blas = Blas(stream, self.work["blas"])
        self._matrices = matrices_of(spec)
        self._lt = BlasLt.open(stream, self.work["blas"]) if spec.fp8_gemms else None
        self._fp8 = {} if self._lt is None else self._fp8_gemms(self._lt)
        # A size of a chunk has all its GEMMs in fp8 or none: between two of them activations are not made in 16 bits.
        plans = [{rows for rows in self._row_counts if gemm.plan(rows)} for gemm in self._fp8.values()]
        self._fp8_rows = set.intersection(*plans) if plans else set()

    def fill(self, source: WeightSource, rope: np.ndarray) -> None:
        super().fill(source, rope)
        for layer in range(self.spec.num_layers):
            for name in self._matrices:
                if self.spec.has_lora(layer, name):
                    orders = self._order_of(layer, name), self._order_of(layer, "down") if name == "gate_up" else None
                    for half, values in zip("ab", adapter_matrices(self.spec, layer, name, *orders), strict=True):
                        self._device.upload(self.work[f"layers.{layer}.{name}.lora_{half}"], values)
        if self.spec.adapters:
            self._device.upload(self.work["slot_adapters"], np.full(self.spec.max_batch, -1, dtype=np.int32))

    def _order_of(self, i: int, name: str) -> np.ndarray | None:
        """Return int64 [columns], the column at each place of a layer's matrix; None: columns are as they are."""
        places = self._places(i, name)
        return None if places is None else np.argsort(self._device.download(places))

    def _prepare(self, host_tokens: int) -> None:
        super()._prepare(host_tokens)
        if self.spec.adapters:
            self.decode_launches(host_tokens, adapted=True)

    def decode_launches(self, host_tokens: int, num_layers: int | None = None, *, adapted: bool = False) -> list[Work]:
        launches = super().decode_launches(host_tokens, num_layers, adapted=adapted)
        if not adapted:
            return launches
        sums = self.work["lora_step_sums"]
        return [lambda stream: stream.fill(sums, lora.NOT_YET), *launches]

    def _decode_layer(self, i: int) -> list[Work]:
        return self._decode_of(i, {})

    def _adapted_decode_layer(self, i: int) -> list[Work]:
        sums = self.work["lora_step_sums"].at(i)
        return self._decode_of(i, self._lora_terms(i, 1, [sums.at(j).address for j in range(len(self._matrices))]))

    def _decode_of(self, i: int, terms: dict[str, lora.LoraTerm]) -> list[Work]:
        """Return one layer's launches; ``terms``: what adapters add, by matrix."""
        spec, w = self.spec, self.work
        first, second, *others = self.matrices_of(i)
        matrices = {name: self.matrix(f"layers.{i}.{name}") for name in (first, second, *others)}

        def multiply(name: str) -> Launch:
            source, target, epilogue = self._matrices[name]
            more: dict[str, Any] = {"lora": terms.get(name), "bias": self._bias(i, name)}
            if is_normed := name in IN_NORMS and spec.pre_norms:
                more |= {"norm_weight": self.weights[f"layers.{i}.{IN_NORMS[name]}"], "norm_eps": spec.norm_eps}
                more |= {"norm_size": spec.model.hidden_size, "norm_offset": spec.model.norm_offset}
                if (places := self._places(i, name)) is not None:
                    more["places"] = places
            vector = w["hidden" if is_normed else source].at(0)
            output = w["activated" if epilogue in linear.GATED else target].at(0)
            return self._gemv(matrices[name], vector, output, epilogue, **more)

        return [
            multiply(first),
            *self._wide_qk_norm(i, 1),
            self._convolve_one(i) if i in spec.conv_layers else self._attend_one(i),
            multiply(second),
            *self._out_norm(i, second, 1),
            *(multiply(name) for name in others),
            *(self._in_norm(i, "post_norm", 1) if spec.model.num_experts else []),
            *self._experts(i, 1),
            *self._out_norm(i, "down", 1),
        ]

    def matrices_of(self, i: int) -> list[str]:
        """Return the GEMMs of a layer, in order: not those of experts."""
        return [name for name in self.spec.matrices_of(i) if name in self._matrices]

    def _convolve_one(self, i: int) -> Launch:
        """Return layer ``i``'s short convolution of a decode step of one sequence."""
        w, (taps, bias, ring) = self.work, self._convolution(i)
        arrays = (w["conv_in"].at(0), taps, bias, ring, w["state"], w["convolved"].at(0))
        return short_conv.short_conv_step(self._kernels, *arrays, self.spec.max_context)

    def _convolution(self, i: int) -> tuple[DeviceArray, DeviceArray | None, DeviceArray | None]:
        """Return the weights of a layer's convolution, and its bias and ring of the first slot if there are such."""
        taps, bias = self.weights[f"layers.{i}.conv"], self.weights.get(f"layers.{i}.conv_bias")
        rings = self.work.get("states")
        return taps, bias, None if rings is None else rings.at(0, self.spec.conv_layers.index(i))

    @property
    def _slot_floats(self) -> int:
        """Return the float32 values from a slot's rings to the next one's; 0 = there is one slot."""
        return math.prod(self.spec.state_shape) if self.spec.max_batch > 1 and self.spec.state_shape else 0

    def _experts(self, i: int, size: int) -> list[Launch]:
        """Return what gives ``size`` rows of ``normed`` to experts and adds their sums to ``hidden``; [] = none."""
        model, kernels = self.spec.model, self._kernels
        if not model.num_experts:
            return []
        normed, picked, shares, activated, made = (
            self._rows(name, size) for name in ("normed", "picked", "shares", "activated", "made")
        )
        router, gate_up, down = (self.matrix(f"layers.{i}.{name}") for name in ("router", "gate_up", "down"))
        assert isinstance(router, DeviceArray)
        epilogue = linear.SILU if model.activation == "silu" else linear.GELU
        return [
            experts.route(kernels, normed, router, picked, shares, norm_shares=model.norm_expert_weights),
            experts.gemv_experts(kernels, gate_up, model.num_experts, picked, normed, activated, epilogue),
            experts.gemv_experts(kernels, down, model.num_experts, picked, activated, made, linear.LOGITS),
            experts.combine(kernels, made, shares, self._rows("hidden", size)),
        ]

    def _bias(self, i: int, name: str) -> DeviceArray | None:
        return self.weights.get(f"layers.{i}.{name}_bias")

    def _out_norm(self, i: int, name: str, size: int) -> list[Launch]:
        """Return what norms ``size`` rows of a GEMM's output and adds them to the residual stream, if anything."""
        weight = self.weights.get(f"layers.{i}.{_OUT_NORMS[name]}") if name in _OUT_NORMS else None
        if weight is None:
            return []
        rounded = None if self.spec.pre_norms else self._rows("normed", size)
        return [self._norm(weight, size, "branch", "hidden", rounded)]

    def _in_norm(self, i: int, name: str, size: int) -> list[Launch]:
        """Return what norms ``size`` rows of the residual stream for attention or MLP, if anything."""
        weight = self.weights.get(f"layers.{i}.{name}")
        reader = next(matrix for matrix, norm in IN_NORMS.items() if norm == name)
        return [] if weight is None else [self._norm(weight, size, places=self._places(i, reader))]

    def _norm(
        self,
        weight: DeviceArray,
        size: int,
        source: str = "hidden",
        target: str = "normed",
        rounded: DeviceArray | None = None,
        places: DeviceArray | None = None,
        codes: DeviceArray | None = None,
        scales: DeviceArray | None = None,
    ) -> Launch:
        """``codes`` and ``scales``: where the result goes in fp8, instead of to ``target``."""
        model, output = self.spec.model, codes or self._rows(target, size)
        return linear.rms_norm(
            *(self._kernels, self._rows(source, size), weight, output, model.norm_eps),
            norm_size=model.hidden_size,
            norm_offset=model.norm_offset,
            rounded=rounded,
            places=places,
            scales=scales,
        )

    def _wide_qk_norm(self, i: int, size: int) -> list[Launch]:
        """Return what norms Q and K of ``size`` rows over all their heads, if the model does."""
        if not self.spec.wide_qk_norm or i in self.spec.conv_layers:
            return []
        spec, qkv = self.spec, self._rows("qkv", size)
        q_norm, k_norm = (self.weights[f"layers.{i}.{name}"] for name in ("q_norm", "k_norm"))
        return [linear.qk_norm(self._kernels, qkv, q_norm, k_norm, spec.norm_eps, spec.model.head_norm_sizes)]

    def _rows(self, name: str, size: int) -> DeviceArray:
        """The first ``size`` rows of an array."""
        array = self.work[name]
        return DeviceArray(array.address, (size, *array.shape[1:]), array.dtype)

    # --- LoRA adapters --------------------------------------------------------------------------------

    def _lora_matrix(self, i: int, name: str) -> lora.LoraMatrix | None:
        """Return what adapters have for a layer's matrix, or None where none changes it."""
        if not self.spec.has_lora(i, name):
            return None
        model = self.spec.model
        starts = [rows.start // model.head_dim * padded_head(model) for rows in stacked_rows(model)["qkv"]]
        a, b = (self.work[f"layers.{i}.{name}.lora_{half}"] for half in "ab")
        return lora.LoraMatrix(a, b, tuple(starts[1:]) if name == "qkv" else (), pairs=name == "gate_up")

    def _lora_terms(self, i: int, sequences: int, places: list[int]) -> dict[str, lora.LoraTerm]:
        """Return what adapters add in a decode step, by the matrices of a layer that some adapter changes.

        ``places``: the addresses of A x of each of them.
        """
        adapters, terms = DeviceArray(self.work["slot_adapters"].address, (sequences,), "int32"), {}
        for name, place in zip(self._matrices, places, strict=True):
            if (matrix := self._lora_matrix(i, name)) is not None:
                sums = DeviceArray(place, (sequences, matrix.num_sums), "fp32")
                terms[name] = lora.LoraTerm(matrix, sums, adapters)
        return terms

    def _adapt_layer(self, i: int, layer: _Layer) -> _Layer:
        return replace(layer, gemms={name: self._adapt_gemm(i, name, gemm) for name, gemm in layer.gemms.items()})

    def _adapt_gemm(self, i: int, name: str, gemm: _Gemm) -> _Gemm:
        matrix, w, (source, target, epilogue) = self._lora_matrix(i, name), self.work, self._matrices[name]
        if matrix is None:
            return gemm
        chunk = DeviceArray(w["prompt"].address, (lora.ADAPTED_CHUNK_WORDS,), "int32")
        sums = DeviceArray(w["lora_sums"].address, (self.spec.chunk, matrix.num_sums), "fp32")
        added = lora.lora_chunk(self._kernels, matrix, w[source], w[target], chunk, sums)
        packed = gemm.packed
        if packed is not None and epilogue in linear.GATED:  # the activation has to wait for what is added
            packed = self._packed_gemm(i, name, target, linear.STORE, self._kernels.config(packed.problem))
        return replace(gemm, packed=packed, lora=added)

    # --- prefill --------------------------------------------------------------------------------------

    def prepare_prefill(self) -> None:
        if not self.spec.model.num_experts:
            self._activate = self._gate_multiply()
        self._max_packed = 0
        if self.spec.is_packed:
            self._max_packed = self._kernels.config(packed_rows_problem(self.spec)).rows
        super().prepare_prefill()

    def _gate_multiply(self) -> Launch:
        epilogue = self._matrices["gate_up"][2]
        return linear.gate_multiply(self._kernels, self.work["gate_up"], self.work["activated"], epilogue)

    def _work_of(self, problem: Problem[Any], host_tokens: int) -> list[Work]:
        if isinstance(problem, PackedRowsProblem):
            self._place_chunk(PACKED_ROWS[-1])
            if not self.spec.model.num_experts:
                self._activate = self._gate_multiply()
            gemms, limit = self._prefill_layer(0).gemms, self._kernels.config(problem).rows
            sizes = [rows for rows in PACKED_ROWS if rows <= self.spec.chunk]
            return [partial(self._multiply, gemms, name, rows, limit) for rows in sizes for name in gemms]
        if isinstance(problem, PackedGemmProblem):
            self._place_chunk(GEMM_TOKENS)
            rows = min(GEMM_TOKENS, self.spec.chunk)
            layers = [self._prefill_layer(i).gemms.values() for i in self._tuned_layers()]
            packed = [gemm.packed for gemms in layers for gemm in gemms]
            return [partial(each, rows=rows) for each in packed if each is not None and each.problem == problem]
        return super()._work_of(problem, host_tokens)

    def _prefill_layer(self, i: int) -> _Layer:
        rows, names = self.spec.chunk, self.matrices_of(i)
        has_attention = i not in self.spec.conv_layers
        return _Layer(
            input_norm=next(iter(self._in_norm(i, "input_norm", rows)), None),
            qk_norm=next(iter(self._wide_qk_norm(i, rows)), None),
            attention=(self._rope_append(i), self._attend(i)) if has_attention else None,
            convolve=None if has_attention else self._convolve_chunk(i),
            post_norm=next(iter(self._in_norm(i, "post_norm", rows)), None),
            out_norms={name: launch for name in names for launch in self._out_norm(i, name, rows)},
            gemms={name: self._prefill_gemm(i, name) for name in names},
            experts=self._experts(i, rows),
            fp8={name: self._fp8_operands(i, name) for name in self._fp8},
        )

    def _convolve_chunk(self, i: int) -> Launch:
        w, (taps, bias, ring) = self.work, self._convolution(i)
        chunk = DeviceArray(w["prompt"].address, (CHUNK_WORDS + (self._slot_floats > 0),), "int32")
        arrays = (w["conv_in"], taps, bias, ring, chunk, w["convolved"])
        return short_conv.short_conv_chunk(self._kernels, *arrays, self._slot_floats)

    def _prefill_gemm(self, i: int, name: str) -> _Gemm:
        kernels, w, weight, bias = self._kernels, self.work, self.matrix(f"layers.{i}.{name}"), self._bias(i, name)
        _, target, epilogue = self._matrices[name]
        add_bias = None if bias is None else linear.add_bias(kernels, w[target], bias)
        if not isinstance(weight, linear_packed.PackedWeight):
            return _Gemm(weight, bias=add_bias)
        whole = DeviceArray(w["dequantized"].address, matrix_shapes(self.spec)[name], self.spec.dtype)
        return _Gemm(
            whole,
            linear_packed.dequantize_packed(kernels, weight, whole),
            self._packed_gemm(i, name, "activated" if epilogue in linear.GATED else target, epilogue),
            add_bias,
        )

    def _packed_gemm(
        self, i: int, name: str, target: str, epilogue: int, config: PackedGemmConfig | None = None
    ) -> linear_packed.PackedGemm:
        weight, w = self.matrix(f"layers.{i}.{name}"), self.work
        assert isinstance(weight, linear_packed.PackedWeight)
        either = w["dequantized"]  # the dequantized matrix or, with few tokens, the partial sums
        sums = DeviceArray(either.address, (either.nbytes // 4,), "fp32")
        arrays = (w[self._matrices[name][0]], w[target], epilogue, self._chunk, sums, w["packed_counters"])
        return linear_packed.PackedGemm(self._kernels, weight, *arrays, config, self._bias(i, name))

    def _multiply(self, gemms: dict[str, _Gemm], name: str, rows: int, max_packed: int, stream: Stream) -> None:
        """Queues the GEMM ``name`` of ``rows`` rows; up to ``max_packed`` a packed matrix is multiplied as it is."""
        w, gemm, (source, target, epilogue) = self.work, gemms[name], self._matrices[name]
        if gemm.packed is not None and rows <= max_packed:
            gemm.packed(stream, rows)
            if gemm.lora is None:
                return
        else:
            if gemm.dequantize is not None:
                gemm.dequantize(stream)
            self.blas.matmul(w[source], gemm.weight, w[target], rows, epilogue == linear.RESIDUAL)
            if gemm.bias is not None:
                gemm.bias.set_grid(rows)
                gemm.bias(stream)
        if gemm.lora is not None:
            gemm.lora(stream, rows)
        if epilogue in linear.GATED:
            self._activate.set_grid(rows)
            self._activate(stream)

    def _codes(self, name: str) -> tuple[DeviceArray, DeviceArray]:
        """Return where the codes of a GEMM's activations and their scales lie: in ``activated``, unused in fp8."""
        chunk, columns = self.spec.chunk, [cols for _, cols in matrix_shapes(self.spec).values()]
        start = self.work["activated"].address
        scales = DeviceArray(start + aligned(chunk * max(columns)), (chunk,), "fp32")
        return DeviceArray(start, (chunk, matrix_shapes(self.spec)[name][1]), "uint8"), scales

    def _weight_codes(self, name: str) -> tuple[DeviceArray, DeviceArray]:
        """Return where the codes of a matrix and the scales of its rows lie: where it would be dequantized."""
        (rows, cols), start = matrix_shapes(self.spec)[name], self.work["dequantized"].address
        return DeviceArray(start, (rows, cols), "uint8"), DeviceArray(start + aligned(rows * cols), (rows,), "fp32")

    def _fp8_gemms(self, lt: BlasLt) -> dict[str, Fp8Gemm]:
        """Return the GEMMs of every layer, in the same arrays; {} if the scratch has no room for the codes."""
        activated, (_, scales) = self.work["activated"], self._codes("qkv")
        if scales.address + scales.nbytes > activated.address + activated.nbytes:
            return {}
        found = {}
        for name, (_, target, epilogue) in self._matrices.items():
            arrays = (*self._codes(name), *self._weight_codes(name), self.work[target])
            found[name] = Fp8Gemm(lt, *arrays, accumulate=epilogue == linear.RESIDUAL)
        return found

    def _fp8_operands(self, i: int, name: str) -> _Fp8Operands:
        weight, (codes, scales) = self.matrix(f"layers.{i}.{name}"), self._codes(name)
        assert isinstance(weight, linear_packed.PackedWeight)
        norm = self.weights.get(f"layers.{i}.{IN_NORMS[name]}") if name in IN_NORMS else None
        if norm is not None:
            quantize = self._norm(norm, self.spec.chunk, codes=codes, scales=scales)
        elif name == "down":
            quantize = fp8_rows.quantize_rows(
                self._kernels, self.work["gate_up"], codes, scales, self._matrices["gate_up"][2]
            )
        else:
            quantize = fp8_rows.quantize_rows(self._kernels, self.work[self._matrices[name][0]], codes, scales)
        return _Fp8Operands(quantize, fp8_rows.unpack_fp8(self._kernels, weight, *self._weight_codes(name)))

    def _run_fp8_layer(self, layer: _Layer, rows: int) -> None:
        """Queue a layer whose GEMMs are all in fp8."""
        stream = self._stream

        def run(launch: Launch | None) -> None:
            if launch is not None:
                launch.set_grid(rows)
                launch(stream)

        def multiply(name: str) -> None:
            run(layer.fp8[name].quantize)
            layer.fp8[name].unpack(stream)
            self._fp8[name](rows)
            run(layer.gemms[name].bias)
            run(layer.out_norms.get(name))

        multiply("qkv")
        run(layer.qk_norm)
        assert layer.attention is not None
        self._run_attention(*layer.attention, rows)
        multiply("o")
        multiply("gate_up")
        multiply("down")

    def _run_layer(self, layer: _Layer, rows: int) -> None:
        if layer.fp8 and rows > self._max_packed and rows in self._fp8_rows:
            self._run_fp8_layer(layer, rows)
            return
        stream = self._stream

        def multiply(name: str) -> None:
            self._multiply(layer.gemms, name, rows, self._max_packed, stream)
            norm(layer.out_norms.get(name))

        def norm(launch: Launch | None) -> None:
            if launch is not None:
                launch.set_grid(rows)
                launch(stream)

        first, second, *others = layer.gemms
        norm(layer.input_norm)
        multiply(first)
        norm(layer.qk_norm)
        if layer.attention is not None:
            self._run_attention(*layer.attention, rows)
        if layer.convolve is not None:
            layer.convolve.set_grid(short_conv.short_conv_blocks(rows))
            layer.convolve(stream)
        multiply(second)
        norm(layer.post_norm)
        for name in others:
            multiply(name)
        for launch in layer.experts:
            norm(launch)

    def close(self) -> None:
        self.blas.close()
        if self._lt is not None:
            self._lt.close()


IN_NORMS = {"qkv": "input_norm", "conv_in": "input_norm", "gate_up": "post_norm"}
_OUT_NORMS = {"o": "attention_out_norm", "conv_out": "attention_out_norm", "down": "mlp_out_norm"}


def matrices_of(spec: CudaSpec) -> dict[str, tuple[str, str, int]]:
    """Return GEMM → what it reads and writes, and its epilogue.

    A gated activation's result goes from "gate_up" to "activated". An output that is normed before it is added goes to
    "branch".
    """
    target, epilogue = ("branch", linear.LOGITS) if spec.outer_norms else ("hidden", linear.RESIDUAL)
    first = {"qkv": ("normed", "qkv", linear.STORE), "o": ("attended", target, epilogue)}
    if spec.conv_layers:
        first |= {"conv_in": ("normed", "conv_in", linear.STORE), "conv_out": ("convolved", target, epilogue)}
    if spec.model.num_experts:  # whose matrices a token has some of
        return first
    return first | {
        "gate_up": ("normed", "gate_up", linear.SILU if spec.model.activation == "silu" else linear.GELU),
        "down": ("activated", target, epilogue),
    }
