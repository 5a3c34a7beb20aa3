"""Gather the inputs of each linear: one layer after the other runs over the calibration texts, in transformers.

Only the layer that runs is in memory, in float32, beside the hidden states of all texts. The model's own ``forward``
drives it: its layers are replaced by stand-ins, so that masks and rotary embeddings are whatever the architecture makes
of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.models.spec import LayerSpec, LinearSpec, ModelSpec
from engine_core.quantize.calibration_texts import read_sequences

_KEPT_TOKENS = 1024  # of which the inputs are kept for the search; the magnitudes are of all
_CHUNK_TOKENS = 1024  # that go through a layer at once


@dataclass(frozen=True)
class Tokens:
    """``ids``: int64 [samples, length], padded at the end; ``lengths``: tokens of each sample."""

    ids: np.ndarray
    lengths: np.ndarray


@dataclass
class Activations:
    """Inputs of a linear: float32 ``mean`` and ``peak`` magnitude [in], and ``kept`` [tokens, in] for the search."""

    mean: np.ndarray
    peak: np.ndarray
    kept: np.ndarray


def read_tokens(path: Path, checkpoint: Checkpoint, spec: ModelSpec, num_samples: int, sequence_length: int) -> Tokens:
    """Return ``num_samples`` pieces of up to ``sequence_length`` tokens, from all parts of the texts. Raises
    BuildError."""
    if num_samples < 1 or sequence_length < 1:
        raise BuildError("The number of samples and their length have to be 1 or more.")
    samples = read_sequences(path, checkpoint, min(sequence_length, spec.max_position), spec.vocab_size)
    samples = samples[:: max(1, len(samples) // num_samples)][:num_samples]
    lengths = np.array([len(sample) for sample in samples])
    ids = np.zeros((len(samples), lengths.max()), dtype=np.int64)
    for row, sample in zip(ids, samples):
        row[: len(sample)] = sample
    return Tokens(ids, lengths)


def linears_of(layer: LayerSpec) -> tuple[LinearSpec, ...]:
    return layer.qkv, layer.output, layer.gate_up, layer.down


def run_layers(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tokens: Tokens,
    on_layer: Callable[[int, dict[str, Activations]], None],
) -> None:
    """Calls ``on_layer(index, activations)`` for each layer in order; keys are the linears' first parts.

    The activations are those of the model as it is: what is quantized before does not change them. Raises BuildError if
    torch or transformers is missing.
    """
    if spec.num_experts:
        raise BuildError(
            f"{spec.architecture} has experts, of which texts reach some too seldom to calibrate; build int8 or int4 "
            "of the checkpoint as it is, which rounds to nearest."
        )
    if any(layer.conv_kernel for layer in spec.layers):
        raise BuildError(
            f"{spec.architecture} has short convolutions, whose inputs are not gathered from texts; build int8 or int4 "
            "of the checkpoint as it is, which rounds to nearest."
        )
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BuildError(f"Calibrating needs {error.name}: pip install torch transformers.") from error
    config = transformers.AutoConfig.from_pretrained(str(checkpoint.directory))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config.get_text_config(), attn_implementation="eager")
    model = model.model.eval()
    used, ids = np.unique(tokens.ids, return_inverse=True)  # rows of the embedding; the rest of it is not read
    ids = torch.from_numpy(ids.reshape(tokens.ids.shape).astype(np.int64))
    _fill_outside_layers(torch, checkpoint, spec, model, used)
    run = _Run(torch, checkpoint, spec, tokens, on_layer)
    for index, layer in enumerate(model.layers):
        model.layers[index] = run.stand_in(index, layer)
    with torch.no_grad():
        for row in ids:
            with contextlib.suppress(_Embedded):
                model(input_ids=row[None], use_cache=False)
        run.begin()
        model(input_ids=ids[:1], use_cache=False)


class _Embedded(Exception):
    """A text's embeddings have arrived at the first layer."""


class _Run:
    """Holds the hidden states of all texts and takes them through one layer after the other."""

    def __init__(self, torch, checkpoint: Checkpoint, spec: ModelSpec, tokens: Tokens, on_layer: Callable) -> None:
        self._torch, self._checkpoint, self._spec = torch, checkpoint, spec
        self._tokens, self._on_layer = tokens, on_layer
        self._embedded: list = []
        self._hidden: Any = None  # torch float32 [samples, length, hidden]

    def begin(self) -> None:
        """Take note that all texts' embeddings are there."""
        self._hidden = self._torch.cat(self._embedded)
        self._embedded.clear()

    def stand_in(self, index: int, layer):
        """Return a module in the place of the decoder layer ``index``."""
        from torch import nn

        class StandIn(nn.Module):
            def forward(_, states, *args, **kwargs):  # noqa: N805
                if self._hidden is None:
                    self._embedded.append(states.float().clone())
                    raise _Embedded
                is_tuple = self._layer(index, layer, args, kwargs)
                return (states,) if is_tuple else states

        module = StandIn()
        for name in ("attention_type", "is_sliding", "layer_type"):  # what a model's forward asks its layers for
            if hasattr(layer, name):
                setattr(module, name, getattr(layer, name))
        return module

    def _layer(self, index: int, layer, args: tuple, kwargs: dict) -> bool:
        """True if the layer returns a tuple, as those of older versions do."""
        prefix = f"model.layers.{index}."
        _materialize(self._torch, self._checkpoint, layer, prefix)
        collector = _Collector(self._tokens.lengths, self._tokens.ids.shape[1])
        collector.listen(layer, self._spec.layers[index], prefix)
        step = max(1, _CHUNK_TOKENS // self._tokens.ids.shape[1])
        for first in range(0, len(self._hidden), step):
            collector.first = first
            result = layer(self._hidden[first : first + step], *args, **kwargs)
            self._hidden[first : first + step] = result[0] if isinstance(result, tuple) else result
        layer.to("meta")
        self._on_layer(index, collector.activations())
        return isinstance(result, tuple)


class _Collector:
    """Gathers the inputs of a layer's linears, padding left out."""

    def __init__(self, lengths: np.ndarray, longest: int) -> None:
        self._lengths, self._longest = lengths, longest
        self._every = max(1, int(lengths.sum()) // _KEPT_TOKENS)
        self._sums: dict[str, np.ndarray] = {}
        self._peaks: dict[str, np.ndarray] = {}
        self._kept: dict[str, list[np.ndarray]] = {}
        self.first = 0  # sample that the chunk begins with

    def listen(self, layer, spec: LayerSpec, prefix: str) -> None:
        for linear in linears_of(spec):
            name = linear.parts[0]
            module = layer.get_submodule(name[len(prefix) : -len(".weight")])
            module.register_forward_pre_hook(lambda _, inputs, name=name: self._take(name, inputs[0]))

    def _take(self, name: str, inputs) -> None:
        lengths = self._lengths[self.first : self.first + len(inputs)]
        valid = np.arange(self._longest) < lengths[:, None]
        values = inputs.numpy()[valid]
        magnitude = np.abs(values)
        if name not in self._sums:
            self._sums[name] = np.zeros(values.shape[1])
            self._peaks[name] = np.zeros(values.shape[1], dtype=np.float32)
            self._kept[name] = []
        self._sums[name] += magnitude.sum(axis=0, dtype=np.float64)
        np.maximum(self._peaks[name], magnitude.max(axis=0), out=self._peaks[name])
        self._kept[name].append(values[self.first % self._every :: self._every].copy())

    def activations(self) -> dict[str, Activations]:
        count = self._lengths.sum()
        return {
            name: Activations((total / count).astype(np.float32), self._peaks[name], np.concatenate(self._kept[name]))
            for name, total in self._sums.items()
        }


def _fill_outside_layers(torch, checkpoint: Checkpoint, spec: ModelSpec, model, used: np.ndarray) -> None:
    """Gives everything but the layers its values: embedding rows ``used``, last norm, the rotary frequencies."""
    embedding = model.embed_tokens
    embedding.weight = torch.nn.Parameter(torch.from_numpy(checkpoint.read(spec.embedding, used)), requires_grad=False)
    embedding.num_embeddings, embedding.padding_idx = len(used), None
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = torch.tensor(spec.embedding_scale)
    norm = torch.from_numpy(checkpoint.read(spec.final_norm))
    model.norm.weight = torch.nn.Parameter(norm, requires_grad=False)
    for name, module in list(model.named_children()):
        if name.startswith("rotary_emb"):
            setattr(model, name, type(module)(config=module.config))


def _materialize(torch, checkpoint: Checkpoint, layer, prefix: str) -> None:
    for path, parameter in list(layer.named_parameters()):
        owner, _, name = path.rpartition(".")
        values = torch.from_numpy(checkpoint.read(prefix + path))
        assert values.shape == parameter.shape, path
        setattr(layer.get_submodule(owner), name, torch.nn.Parameter(values, requires_grad=False))
