"""A small model on the cuda backend, for compute-sanitizer: prefill in chunks, decode, sampling, saved prefixes, LoRA.

Arguments: the weights (fp16, int8, int4) and the KV cache (fp16, int8).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "core")]

import numpy as np  # noqa: E402

from device_steps import generate  # noqa: E402
from engine_core.backends import Draft, SequenceStep  # noqa: E402
from engine_core.backends.cuda.adapters import adapter_matrices  # noqa: E402
from engine_core.backends.cuda.backend import CudaBackend  # noqa: E402
from engine_core.backends.cuda.layout import CudaSpec, packed_shapes, weight_arrays  # noqa: E402
from engine_core.cuda.driver import Device  # noqa: E402
from engine_core.formats.lora import LoraAdapter  # noqa: E402
from engine_core.measure.random_checkpoint import write_random_adapter  # noqa: E402
from engine_core.models.shapes import spec_of  # noqa: E402
from engine_core.request import SamplingParams  # noqa: E402
from packed_weights import format_of, random_tiles  # noqa: E402

VOCAB, CONTEXT, HEAD_DIM = 1008, 309, 32  # the last chunk of 290 tokens has rows beyond the context
MODEL = dict(
    architectures=["Qwen3ForCausalLM"],  # has norms of Q and K; the biases of QKV are added
    num_hidden_layers=2,
    intermediate_size=384,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    vocab_size=VOCAB,
    rms_norm_eps=1e-5,
)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_backend(
    weights: str,
    kv_cache_type: str,
    use_cuda_graph: bool,
    tune_kernels: bool = False,
    max_batch: int = 1,
    hidden_size: int = 256,
    adapters: tuple[LoraAdapter, ...] = (),
    merged: LoraAdapter | None = None,
    drafts: bool = False,
) -> CudaBackend:
    """``adapters``: LoRA adapters that sequences may have; ``merged``: one that is added to the 16-bit weights."""
    model = spec_of(MODEL | {"hidden_size": hidden_size})
    spec = CudaSpec(
        model=dataclasses.replace(model, layers=tuple(dataclasses.replace(x, qkv_bias=True) for x in model.layers)),
        kv_int8=kv_cache_type == "int8",
        kv_fp8=kv_cache_type == "fp8",
        max_context=CONTEXT,
        head_rows=VOCAB,
        dtype="fp16",
        weight_format=format_of(weights),
        chunk=64,
        pool_tokens=208,
        max_batch=max_batch,
        adapters=adapters,
        drafts=drafts,
    )
    random = np.random.default_rng(9)
    arrays, packed = {}, packed_shapes(spec)
    for name, array in weight_arrays(spec).items():
        if array.dtype == "fp16":
            arrays[name] = (random.standard_normal(array.shape) * 0.05).astype(np.float16)
        else:
            arrays[name] = random_tiles(random, weights, *packed[name.split(".")[-1]], "fp16")
    if merged is not None:
        own = dataclasses.replace(spec, adapters=(merged,))
        for layer, matrix in itertools.product(range(spec.num_layers), spec.model.layer_matrices):
            if own.has_lora(layer, matrix):
                weight = arrays[f"layers.{layer}.{matrix}"]
                weight[:] = weight + added_by(own, layer, matrix)
    device = Device()
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    source = lambda name, array: device.upload(array, arrays[name])  # noqa: E731
    return CudaBackend(device, spec, source, rope, use_cuda_graph=use_cuda_graph, tune_kernels=tune_kernels)


def make_adapters(directory: Path) -> tuple[LoraAdapter, ...]:
    """Write two adapters: "first" of all linears, "second" of some of them with another rank."""
    model = spec_of(MODEL | {"hidden_size": 256})
    write_random_adapter(directory / "first", model, *MODULES, rank=16, scale=0.05)
    write_random_adapter(directory / "second", model, "v_proj", "gate_proj", "o_proj", rank=5, scale=0.1, seed=1)
    return tuple(LoraAdapter(name, directory / name, model, 64) for name in ("first", "second"))


def added_by(spec: CudaSpec, layer: int, matrix: str) -> np.ndarray:
    """Return float32 [rows, columns]: B A of the only adapter of ``spec``, as the kernels have it."""
    (a,), (b,) = (half.astype(np.float32) for half in adapter_matrices(spec, layer, matrix))
    a, every = a.reshape(-1, spec.lora_rank, a.shape[1]), np.arange(len(b))
    ends = [spec.attention.num_heads * HEAD_DIM, (spec.attention.num_heads + spec.attention.num_kv_heads) * HEAD_DIM]
    parts = {"qkv": np.searchsorted(ends, every, side="right"), "gate_up": every % 2}.get(matrix, 0 * every)
    return np.stack([b[row] @ a[part] for row, part in enumerate(parts)])


def main() -> None:
    weights, kv_cache_type = sys.argv[1:]
    prompt = np.random.default_rng(1).integers(0, VOCAB, 290).astype(np.int32)
    sampled = SamplingParams(
        temperature=0.9, top_p=0.95, top_k=40, min_p=0.05, repetition_penalty=1.2, seed=5, logit_bias=((11, 1.0),)
    )
    for use_cuda_graph in (True, False):
        backend = make_backend(weights, kv_cache_type, use_cuda_graph)
        first = generate(backend, prompt[:77], 6)
        backend.save_kv(0, 0, 100, 60)
        generate(backend, prompt, 6, sampled)  # over 256 keys: attention in more than one share
        backend.load_kv(0, 0, 100, 60)
        again = generate(backend, prompt[:77], 6, start=60)
        backend.close()
        assert None not in first and len(set(first)) > 1, first
        print(weights, kv_cache_type, "graph" if use_cuda_graph else "eager", first, again)
    backend = make_backend(weights, kv_cache_type, False, max_batch=3)
    for slot, length in ((2, 77), (0, 290)):  # slot 1 stays empty
        backend.begin(slot, sampled, prompt[:length])
        backend.step([SequenceStep(slot, prompt[:length])])[0].result()
    tokens = [each.result() for _ in range(6) for each in backend.step([SequenceStep(2), SequenceStep(0)])]
    backend.close()
    assert None not in tokens, tokens
    print(weights, kv_cache_type, "two of three slots", tokens)
    with tempfile.TemporaryDirectory() as directory:
        adapters = make_adapters(Path(directory))
        for max_batch in (1, 3):
            backend = make_backend(weights, kv_cache_type, True, max_batch=max_batch, adapters=adapters)
            slots = range(max_batch)
            for slot in slots:  # each with another adapter, slot 2 with none
                backend.begin(slot, sampled, prompt[:77], ("first", "second", "")[slot])
                backend.step([SequenceStep(slot, prompt[:77])])[0].result()
            tokens = [each.result() for _ in range(6) for each in backend.step([SequenceStep(slot) for slot in slots])]
            backend.close()
            assert None not in tokens, tokens
            print(weights, kv_cache_type, "adapters", tokens)
    backend = make_backend(weights, kv_cache_type, False, max_batch=2, drafts=True)
    for size in (3, backend.max_draft):
        backend.begin(1, sampled, prompt[:77])
        backend.step([SequenceStep(1, prompt[:77])])[0].result()
        draft = Draft(prompt[:size], np.arange(size) % 2 == 0)
        checked = backend.step([SequenceStep(1, draft=draft)])[0].result()
        assert checked[0] == prompt[0] and backend.step([SequenceStep(1)])[0].result() is not None
    backend.close()
    print(weights, kv_cache_type, "drafts", checked)


if __name__ == "__main__":
    main()
