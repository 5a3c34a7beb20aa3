"""Whole small random models against transformers: the logits of prefill and of every decode step, and greedy tokens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from gpu_bench import error

from device_steps import GREEDY, generate
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import reference
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.vocab_map import write_vocab_map
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.measure.steps import begin, decode, extend, prefill, prompt_step
from engine_core.request import SamplingParams

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

# How far from transformers in float32 the logits may be, as a multiple of what transformers itself loses in the same
# 16-bit type. Ours keep the residual stream in float32, so they are nearer as a rule; the sums' order differs.
TOLERANCE = 1.2

SMALL = dict(
    vocab_size=1003,
    eos_token_id=2,  # that of most families is beyond so small a vocabulary
    hidden_size=96,
    intermediate_size=200,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=10000.0,
)
LLAMA_ROPE = dict(rope_type="default", rope_theta=10000.0)
FACTORS = [1.0 + 0.2 * i for i in range(16)]
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=64)
LONGROPE |= dict(short_factor=FACTORS, long_factor=[2 * x for x in FACTORS], partial_rotary_factor=0.5)
GEMMA3_ROPES = {
    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
}
# What a family has that Llama has not.
FAMILIES = {
    "gemma2": ("Gemma2", dict(
        num_attention_heads=4, head_dim=32, sliding_window=24, query_pre_attn_scalar=40, attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    )),
    "gemma3": ("Gemma3Text", dict(
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=20, query_pre_attn_scalar=200,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters=GEMMA3_ROPES,
    )),
    "phi3, longrope": ("Phi3", dict(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, rope_parameters=LONGROPE,
        original_max_position_embeddings=64,
    )),
    "phi3, heads of 96": ("Phi3", dict(
        hidden_size=192, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, sliding_window=40,
        original_max_position_embeddings=512,
    )),
    "mistral, window, heads of 80": ("Mistral", dict(num_attention_heads=4, head_dim=80, sliding_window=33)),
    "qwen2, window": ("Qwen2", dict(
        hidden_size=128, num_attention_heads=8, use_sliding_window=True, sliding_window=17, max_window_layers=1,
    )),
    "llama, biases, heads of 112": ("Llama", dict(
        num_attention_heads=2, num_key_value_heads=1, head_dim=112, attention_bias=True, mlp_bias=True,
    )),
    "llama, heads of 120": ("Llama", dict(num_attention_heads=4, head_dim=120)),
    "smollm3, layers without RoPE": ("SmolLM3", dict(
        pad_token_id=0, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=30, attention_bias=True,
    )),
    "olmo2": ("Olmo2", dict(num_attention_heads=4, head_dim=32)),
    "olmo2, heads of 120": ("Olmo2", dict(num_attention_heads=4, head_dim=120)),
    "olmo2, wide": ("Olmo2", dict(
        hidden_size=1152, intermediate_size=768, num_attention_heads=40, num_key_value_heads=40, head_dim=128,
    )),
    "granite": ("Granite", dict(
        embedding_multiplier=12.0, attention_multiplier=0.2, residual_multiplier=0.22, logits_scaling=8.0,
        attention_bias=True,
    )),
    "exaone4": ("Exaone4", dict(
        num_attention_heads=4, head_dim=64, num_key_value_heads=1, sliding_window=28, sliding_window_pattern=2,
    )),
    "ministral": ("Ministral", dict(
        num_attention_heads=4, head_dim=48, sliding_window=21,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )),
    "ministral3": ("Ministral3", dict(head_dim=32, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e6, factor=2.0, original_max_position_embeddings=256, mscale=1.0,
        mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
    ))),
    "qwen3 moe, all experts": ("Qwen3Moe", dict(  # so that none is picked in one type and not in the other
        head_dim=32, num_experts=3, num_experts_per_tok=3, moe_intermediate_size=64, norm_topk_prob=True,
    )),
    "llama, 16 query heads a KV head": ("Llama", dict(num_attention_heads=16, num_key_value_heads=1, head_dim=64)),
    "mistral, 12 query heads a KV head": ("Mistral", dict(
        num_attention_heads=24, num_key_value_heads=2, head_dim=32, sliding_window=50,
    )),
}  # fmt: skip
# Not every layer has attention.
CONVOLUTIONS = {
    "lfm2": ("Lfm2", dict(
        layer_types=["conv", "full_attention", "conv"], block_multiple_of=8, rope_parameters=dict(LLAMA_ROPE),
    )),
    "lfm2, odd": ("Lfm2", dict(
        hidden_size=90, intermediate_size=150, num_attention_heads=3, num_key_value_heads=1, block_multiple_of=7,
        layer_types=["conv", "conv", "full_attention"], conv_L_cache=5, conv_bias=True, tie_word_embeddings=False,
        rope_parameters=dict(LLAMA_ROPE),
    )),
}  # fmt: skip
MODELS = {
    **FAMILIES,
    **CONVOLUTIONS,
    "llama": ("Llama", dict(head_dim=16, tie_word_embeddings=False)),
    "llama3 tied, scaled RoPE": ("Llama", dict(head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    "mistral": ("Mistral", dict(head_dim=64, sliding_window=None)),
    "qwen2": ("Qwen2", dict(hidden_size=128, num_attention_heads=8, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=64, tie_word_embeddings=False)),
    "llama, wide": ("Llama", dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8, head_dim=64)),
    "smollm2": ("Llama", dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)),
    # Sizes that the kernels do not read, so that weights are filled up.
    "llama, odd": ("Llama", dict(hidden_size=90, intermediate_size=150, head_dim=20)),
    "qwen3, odd": ("Qwen3", dict(hidden_size=84, intermediate_size=172, head_dim=8, tie_word_embeddings=True)),
    "qwen2, odd": ("Qwen2", dict(hidden_size=120, num_attention_heads=6)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """A random model in float32 whose weights are exact in bf16, and so in both types up to fp16's range."""
    torch.manual_seed(7)
    return random_model(*MODELS[request.param])


def random_model(family: str, changes: dict, **sizes):
    """See ``model``."""
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes, **sizes})
    config._attn_implementation = "eager"  # others leave soft capping out
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, and Gemma's norms as zeros, too
                is_zero = name.endswith("bias") or family.startswith("Gemma")
                torch.nn.init.normal_(parameter, mean=0.0 if is_zero else 1.0, std=0.2)
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return model


@pytest.fixture(params=["fp16", "bf16"])
def engine_dir(model, request, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    build_cuda(tmp_path / "checkpoint", tmp_path / "engine", max_context=256, dtype=request.param)
    return tmp_path / "engine"


def load(engine_dir, **changes) -> CudaBackend:
    config = EngineConfig(engine_dir=engine_dir, **{"max_context": 256, "prompt_cache_tokens": 64, **changes})
    return CudaBackend.load(engine_dir, read_manifest(engine_dir), config)


def logits_of(backend: CudaBackend) -> np.ndarray:
    return backend._device.download(backend._model.work["logits"]).astype(np.float64)


@torch.no_grad()
def expected_logits(model, ids: list[int], dtype: str) -> tuple[np.ndarray, float]:
    """(logits of every position in float32, the largest error transformers makes in ``dtype``)."""
    tokens = torch.tensor([ids])
    exact = model(tokens).logits[0].double().numpy()
    rounded = copy.deepcopy(model).to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    rounded.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # float32, as in a checkpoint that is loaded
    return exact, max(map(error, rounded(tokens).logits[0].double().numpy(), exact))


def test_logits_and_greedy_tokens(model, engine_dir):
    dtype = read_manifest(engine_dir).options["dtype"]
    prompt = np.random.default_rng(3).integers(0, 1003, 70).astype(np.int32)
    backend = load(engine_dir)
    try:
        begin(backend, GREEDY, prompt)
        ids, rows = prompt.tolist(), []
        pending = prefill(backend, prompt, 0)
        for _ in range(40):
            token = pending.result()
            rows.append(logits_of(backend))
            assert token == int(rows[-1].argmax())
            ids.append(token)
            pending = decode(backend)
    finally:
        backend.close()
    expected, allowed = expected_logits(model, ids, dtype)
    expected = expected[len(prompt) - 1 : -1]
    assert max(map(error, rows, expected)) < TOLERANCE * allowed
    # A greedy token may differ from transformers' only where its logit is within the error of the best.
    for row, want in zip(rows, expected, strict=True):
        assert want.max() - want[row.argmax()] <= 2 * np.abs(row - want).max()


class _SmallCache(transformers.DynamicCache):
    """transformers' KV cache, with every vector of K and V rounded as our cache of 8 bits rounds it."""

    kind = "int8"

    def update(self, keys, values, *args, **kwargs):
        rounded = []
        for vectors in (keys, values):
            quantized, scales = reference.quantize_vectors(vectors.double().numpy(), self.kind)
            rounded.append(torch.tensor(quantized * scales[..., None], dtype=vectors.dtype))
        return super().update(*rounded, *args, **kwargs)


@pytest.mark.parametrize("kind, most", [("int8", 0.1), ("fp8", 0.4)])  # whose steps are four times as wide
def test_logits_with_a_kv_cache_of_8_bits(model, engine_dir, kind, most):
    """An engine built for a 16-bit cache opens with a smaller one by the parameter alone.

    Off float32 by what the 16-bit type loses and by no more than half as much again as the rounding of K and V alone
    does in transformers: noise of the type rounds values to neighbours.
    """
    manifest = read_manifest(engine_dir)
    assert manifest.kv_cache_type == "fp16"
    prompt = np.random.default_rng(3).integers(0, 1003, 70).astype(np.int32)
    backend = load(engine_dir, kv_cache_type=kind)
    try:
        assert backend._work["kv_cache"].dtype == kind
        begin(backend, GREEDY, prompt)
        ids, rows = prompt.tolist(), []
        pending = prefill(backend, prompt, 0)
        for _ in range(40):
            ids.append(pending.result())
            rows.append(logits_of(backend))
            pending = decode(backend)
    finally:
        backend.close()
    expected, allowed = expected_logits(model, ids, manifest.options["dtype"])
    with torch.no_grad():
        cache = _SmallCache(config=model.config)
        cache.kind = kind
        rounded = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0].double().numpy()
    first = len(prompt) - 1
    effect = max(map(error, rounded, expected))
    assert 0 < effect < most
    assert max(map(error, rows, expected[first:-1])) < TOLERANCE * allowed + 1.5 * effect


def use_weights_of(engine_dir, model, kind: str | WeightFormat) -> None:
    """Gives the model in transformers what the engine's packed weights stand for; ``kind``: see ``packed_weight``."""
    stored = SafetensorsFile(engine_dir / "weights.safetensors")
    config, dtype = model.config, read_manifest(engine_dir).options["dtype"]

    def restored(name: str) -> torch.Tensor:
        found = reference.packed_weight(stored.raw(name), kind, shapes[name.split(".")[-1]], dtype)
        if f"{name}_places" in stored.names():  # of columns in the order of their groups
            found = found[:, stored.raw(f"{name}_places")]
        below = f"{name.removesuffix('gate_up')}down_places"
        if name.endswith(".gate_up") and below in stored.names():
            found = found.reshape(-1, 2, found.shape[1])[stored.raw(below)].reshape(found.shape)
        return torch.tensor(found)

    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads[0]
    shapes = {
        "head": (config.vocab_size, hidden),
        "qkv": (sum(heads) * head_dim, hidden),
        "o": (hidden, heads[0] * head_dim),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(restored("head").float())  # no longer the embedding
        for i, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv, gate_up = restored(f"layers.{i}.qkv"), restored(f"layers.{i}.gate_up")
            gate, up = gate_up[0::2], gate_up[1::2]
            attention.o_proj.weight.copy_(restored(f"layers.{i}.o"))
            mlp.down_proj.weight.copy_(restored(f"layers.{i}.down"))
            if hasattr(attention, "qkv_proj"):
                attention.qkv_proj.weight.copy_(qkv)
                mlp.gate_up_proj.weight.copy_(torch.cat([gate, up]))
                continue
            stacked = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
            parts = (*qkv.split([count * head_dim for count in heads]), gate, up)
            for linear, values in zip(stacked, parts, strict=True):
                linear.weight.copy_(values)


def check_greedy(engine_dir, model, count: int = 20) -> None:
    """The engine's logits against the model's, over a prompt and ``count`` greedy tokens."""
    prompt = np.random.default_rng(6).integers(0, model.config.vocab_size, 70).astype(np.int32)
    backend = load(engine_dir)
    try:
        begin(backend, GREEDY, prompt)
        ids, rows = prompt.tolist(), []
        pending = prefill(backend, prompt, 0)
        for _ in range(count):
            ids.append(pending.result())
            rows.append(logits_of(backend))
            pending = decode(backend)
    finally:
        backend.close()
    expected, allowed = expected_logits(model, ids, read_manifest(engine_dir).options["dtype"])
    assert max(map(error, rows, expected[len(prompt) - 1 : -1])) < TOLERANCE * allowed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4", "fp8", "nvfp4"])
def test_a_vocab_map_given_at_load_gives_the_tokens_of_one_built_in(tmp_path, quantization, tied):
    torch.manual_seed(9)
    sizes = dict(hidden_size=264, intermediate_size=640, num_attention_heads=8, head_dim=32)
    config = transformers.LlamaConfig(**{**SMALL, **sizes, "tie_word_embeddings": tied})
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "checkpoint")
    others = 3 + np.random.default_rng(5).choice(1000, 400, replace=False)
    kept = np.sort(np.append(others, config.eos_token_id)).astype(np.int32)
    write_vocab_map(tmp_path / "map.safetensors", kept, {})
    common = dict(quantization=quantization, max_context=128)
    build_cuda(tmp_path / "checkpoint", tmp_path / "whole", **common)
    build_cuda(tmp_path / "checkpoint", tmp_path / "cut", vocab_map=tmp_path / "map.safetensors", **common)
    prompt, found = np.random.default_rng(6).integers(0, 1003, 40).astype(np.int32), {}
    for name, vocab_map in (("whole", str(tmp_path / "map.safetensors")), ("cut", "auto")):
        backend = load(tmp_path / name, vocab_map=vocab_map, max_context=128)
        try:
            begin(backend, GREEDY, prompt)
            pending, found[name] = prefill(backend, prompt, 0), []
            for _ in range(20):
                found[name].append((pending.result(), logits_of(backend).tolist()))
                pending = decode(backend)
            pending.result()
        finally:
            backend.close()
    assert found["whole"] == found["cut"] and {token for token, _ in found["cut"]} <= set(kept.tolist())


QUANTIZED = {
    "whole tiles": dict(vocab_size=1008, hidden_size=256, intermediate_size=640, num_attention_heads=8, head_dim=32),
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3),
    "smollm2-360m": dict(hidden_size=960, intermediate_size=2560, num_attention_heads=15, num_key_value_heads=5),
    "odd": dict(hidden_size=90, intermediate_size=150, head_dim=32),
}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8", "nvfp4"])
def test_quantized_logits(tmp_path, quantization, dtype, tied, sizes):
    """transformers computes with the weights that the 4 or 8 bits stand for."""
    torch.manual_seed(8)
    config = transformers.LlamaConfig(**{**SMALL, **sizes, "initializer_range": 0.06, "tie_word_embeddings": tied})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    model.save_pretrained(tmp_path / "checkpoint")
    build_cuda(tmp_path / "checkpoint", tmp_path / "engine", quantization=quantization, max_context=256, dtype=dtype)
    use_weights_of(tmp_path / "engine", model, quantization)
    check_greedy(tmp_path / "engine", model)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not {"120", "experts"} & set(name.split())])
@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_quantized_logits_of_other_families(tmp_path, quantization, name, dtype):
    torch.manual_seed(8)
    model = random_model(*FAMILIES[name], intermediate_size=256, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "checkpoint")
    build_cuda(tmp_path / "checkpoint", tmp_path / "engine", quantization=quantization, max_context=256, dtype=dtype)
    use_weights_of(tmp_path / "engine", model, quantization)
    check_greedy(tmp_path / "engine", model)


def test_rows_of_a_batch(model, engine_dir):
    """Three prompts of different lengths, one with a slot of its own between empty ones."""
    dtype, slots = read_manifest(engine_dir).options["dtype"], (0, 1, 3)
    backend, rows = load(engine_dir, max_batch=4), {slot: [] for slot in slots}
    ids = {slot: np.random.default_rng(slot).integers(0, 1003, 70 + 9 * slot).astype(np.int32) for slot in slots}
    lengths = {slot: len(prompt) for slot, prompt in ids.items()}
    try:
        for slot, prompt in ids.items():
            backend.begin(slot, GREEDY, prompt)
            token = backend.step([prompt_step(backend, prompt, slot=slot)])[0].result()
            ids[slot] = np.append(prompt, token)
        for _ in range(12):
            tokens = [each.result() for each in backend.step([SequenceStep(slot) for slot in slots])]
            for slot, row, token in zip(slots, logits_of(backend)[list(slots)], tokens, strict=True):
                rows[slot].append(row)
                ids[slot] = np.append(ids[slot], token)
    finally:
        backend.close()
    for slot in slots:
        expected, allowed = expected_logits(model, ids[slot].tolist(), dtype)
        assert max(map(error, rows[slot], expected[lengths[slot] : -1])) < TOLERANCE * allowed


@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
def test_graph_and_eager_give_the_same_tokens(engine_dir, kv_cache_type):
    prompt = np.arange(3, 40, dtype=np.int32)
    sampled = SamplingParams(
        temperature=0.9, top_p=0.95, top_k=40, repetition_penalty=1.2, seed=5, logit_bias=((11, 1.0),)
    )
    found = []
    for use_cuda_graph in (True, False):
        backend = load(engine_dir, use_cuda_graph=use_cuda_graph, kv_cache_type=kv_cache_type)
        found.append([generate(backend, prompt, 60, options) for options in (GREEDY, sampled)])
        backend.close()
    assert found[0] == found[1]
    assert len(set(found[0][1])) > 10


@pytest.mark.parametrize("chunk", [64, 128])
def test_a_prompt_in_chunks_and_in_parts_gives_the_same_logits(model, engine_dir, chunk):
    dtype = read_manifest(engine_dir).options["dtype"]
    prompt = np.random.default_rng(4).integers(0, 1003, 200).astype(np.int32)
    expected, allowed = expected_logits(model, prompt.tolist(), dtype)
    backend = load(engine_dir, prefill_chunk=chunk)
    try:
        begin(backend, GREEDY, prompt)
        for cut in (0, 1, 77, 199):
            if cut:
                extend(backend, prompt[:cut], 0, length=len(prompt))
            begin(backend, GREEDY, prompt)
            prefill(backend, prompt[cut:], cut).result()
            assert error(logits_of(backend), expected[-1]) < TOLERANCE * allowed
    finally:
        backend.close()
