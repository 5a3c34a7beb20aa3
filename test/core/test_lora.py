"""LoRA adapters as peft writes them: read, refused, and on the CPU backend what transformers computes with them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import checkpoints
from batch_steps import Requests
from engine_core.backends import SequenceStep
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import AdapterError, ConfigurationError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.lora import LoraAdapter, adapter_paths
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.measure.random_checkpoint import write_random_adapter, write_random_checkpoint
from engine_core.models.reader import read_spec
from engine_core.request import SamplingParams
from ort_backends import opening
from small_llama import CONFIG, VOCAB

CONTEXT = 96
PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, 7 + 11 * i).astype(np.int32) for i in range(4)]
REQUESTS = [(SamplingParams(seed=i, temperature=0.7 * (i % 2)), None) for i in range(4)]
COUNT = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint", CONFIG, scale=0.15)


@pytest.fixture(scope="module")
def spec(checkpoint):
    return read_spec(Checkpoint(checkpoint))


@pytest.fixture(scope="module")
def write(spec, tmp_path_factory):
    """Write an adapter of the checkpoint; see ``write_random_adapter``."""
    directory = lambda: tmp_path_factory.mktemp("adapter")  # noqa: E731
    return lambda *modules, **options: write_random_adapter(directory(), spec, *modules, **options)


# --- reading ----------------------------------------------------------------------------------------------


def test_targets_may_be_ends_of_names_a_pattern_or_all(write, spec):
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for modules, targets in (
        (("q_proj", "v_proj"), ["self_attn.q_proj", "v_proj"]),
        (("q_proj", "k_proj"), r".*\.self_attn\.[qk]_proj"),
        (everything, "all-linear"),
    ):
        adapter = LoraAdapter("x", write(*modules, target_modules=targets), spec, 8)
        assert adapter.rank == 3
        changed = {"qkv"} if "o_proj" not in modules else {"qkv", "o", "gate_up", "down"}
        assert adapter.targets == changed
    only = LoraAdapter("x", write("q_proj", layers_to_transform=[1], tensors={
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight": None for half in "AB"
    }), spec, 8)  # fmt: skip
    assert [only.rank_of(layer, "qkv", range(8)) for layer in (0, 1)] == [0, 3]


def test_scales_are_those_of_the_module(write, spec):
    directory = write("q_proj", "down_proj", rank=4, lora_alpha=8, alpha_pattern={"layers.1.mlp.down_proj": 2})
    file = SafetensorsFile(directory / "adapter_model.safetensors")
    for use_rslora, of_q, of_down in ((False, 2.0, 0.5), (True, 4.0, 1.0)):
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": use_rslora}))
        adapter = LoraAdapter("x", directory, spec, 8)
        for module, scale in (("layers.0.self_attn.q_proj", of_q), ("layers.1.mlp.down_proj", of_down)):
            stored = file.read(f"base_model.model.model.{module}.lora_B.weight")
            np.testing.assert_allclose(adapter.low_rank(f"model.{module}").b, scale * stored, rtol=1e-6)


def test_stacked_linears_keep_ranks_of_their_own(write, spec):
    ranks = {"k_proj": 2, "up_proj": 1}
    sizes = {name: shape for name, shape in spec.shapes().items() if len(shape) == 2}
    tensors = {}
    for name, (rows, columns) in sizes.items():
        if (module := name.split(".")[-2]) in ranks:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = np.ones((ranks[module], columns), np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.ones((rows, ranks[module]), np.float32)
    directory = write("q_proj", "k_proj", "up_proj", rank=3, tensors=tensors, rank_pattern=ranks)
    adapter = LoraAdapter("x", directory, spec, 3)
    rows, columns = spec.layer_matrices["qkv"]
    low = adapter.dense(0, "qkv", range(rows))
    assert low.a.shape == (5, columns) and low.b.shape == (rows, 5)
    q_rows = spec.num_heads * spec.head_dim
    expected = np.zeros((rows, columns), np.float32)
    for first, part in adapter.stacked(0, "qkv"):
        expected[first : first + len(part.b)] = part.b @ part.a
    np.testing.assert_allclose(low.b @ low.a, expected, rtol=1e-5, atol=1e-6)
    assert not low.b[:q_rows, 3:].any() and not low.b[q_rows:, :3].any()
    gate, up = range(spec.intermediate_size), range(spec.intermediate_size, 2 * spec.intermediate_size)
    assert (adapter.rank_of(0, "gate_up", gate), adapter.rank_of(0, "gate_up", up)) == (0, 1)


LAYER = "base_model.model.model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"


@pytest.mark.parametrize(
    "config, tensors, words",
    [
        ({"use_dora": True}, {}, "is a DoRA"),
        ({"bias": "lora_only"}, {}, "has biases of its own"),
        ({"modules_to_save": ["lm_head"]}, {}, "replaces whole modules"),
        ({"peft_type": "IA3"}, {}, "is no LoRA"),
        ({"r": 9}, {}, "has matrices of rank 3 .* configuration says 9"),
        ({"r": None}, {}, "configuration says None"),
        ({"lora_alpha": "x"}, {}, "has a lora_alpha of 'x'"),
        ({"target_modules": "(["}, {}, "targets in its configuration that cannot be read"),
        ({"target_modules": 3}, {}, "targets in its configuration that cannot be read"),
        ({"target_modules": ["q_proj", "k_proj"]}, {}, "has no matrices for model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["v_proj"]}, {}, "target_modules"),
        ({}, {f"{Q}.lora_B.weight": None}, "only one of the two matrices of model.layers.0.self_attn.q_proj"),
        ({}, {f"{Q}.lora_A.weight": np.zeros((3, 65), np.float32)}, r"\[3, 65\] and \[64, 3\] .* \[64, 64\]: it was"),
        ({}, {f"{Q}.lora_B.weight": np.zeros((32, 3), np.float32)}, "trained on another model"),
        ({}, {f"{Q}.lora_A.weight": np.zeros((0, 64), np.float32)}, "trained on another model"),
        ({}, {f"{Q}.lora_A.weight": np.zeros((3, 64), np.int8)}, "expected a matrix"),
        ({}, {f"{Q}.lora_A.weight": np.zeros(3, np.float32)}, "expected a matrix"),
        ({}, {f"{Q}.lora_magnitude_vector": np.zeros(3, np.float32)}, "belongs to no linear"),
        ({}, {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 64), np.float32)}, "'lm_head', which is no"),
        ({}, {f"{LAYER[:-1]}5.mlp.up_proj.lora_A.weight": np.zeros((3, 64), np.float32)}, "layer 5, but .* has 2"),
    ],
)  # fmt: skip
def test_what_is_not_an_adapter_of_this_model_is_refused_in_one_sentence(write, spec, config, tensors, words):
    with pytest.raises(AdapterError, match=words) as error:
        LoraAdapter("mine", write("q_proj", tensors=tensors, **config), spec, 8)
    text = str(error.value)
    assert text.startswith("The adapter 'mine' of ") and text.endswith(".") and "\n" not in text


def test_damaged_and_missing_directories_are_refused(write, spec, tmp_path):
    with pytest.raises(AdapterError, match="has no adapter_config.json"):
        LoraAdapter("x", tmp_path / "nowhere", spec, 8)
    directory = write("q_proj")
    shutil.copytree(directory, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(AdapterError, match="cannot be read"):
        LoraAdapter("x", tmp_path / "a", spec, 8)
    shutil.copytree(directory, tmp_path / "b")
    path = tmp_path / "b" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="cannot be read"):
        LoraAdapter("x", tmp_path / "b", spec, 8)
    with pytest.raises(AdapterError, match="has rank 3, but lora_max_rank is 2"):
        LoraAdapter("x", directory, spec, 2)
    nan = write("q_proj", tensors={f"{Q}.lora_A.weight": np.full((3, 64), np.nan, np.float32)})
    with pytest.raises(AdapterError, match="not finite"):
        LoraAdapter("x", nan, spec, 8).low_rank("model.layers.0.self_attn.q_proj")


def test_entries_are_a_name_and_a_directory():
    assert {name: str(path) for name, path in adapter_paths(["a:/x", "b-1:rel/a:b"]).items()} == {
        "a": "/x", "b-1": "rel/a:b",
    }  # fmt: skip
    for entry in ("a", "a:", ":x", "a b:x", "-a:x", "é:x"):
        with pytest.raises(ConfigurationError, match="expected NAME:DIRECTORY"):
            adapter_paths([entry])
    with pytest.raises(ConfigurationError, match="two adapters named 'a'"):
        adapter_paths(["a:x", "a:y"])
    assert EngineConfig("x", lora_adapters=["", "a:x"]).lora_adapters == ("a:x",)
    for wrong in ("a:x", [1], 3):
        with pytest.raises(ConfigurationError, match="expected a list of texts"):
            EngineConfig("x", lora_adapters=wrong)


# --- on the CPU -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def variant(request, checkpoint):
    directory = checkpoint.parent / request.param
    return directory, build_engine(checkpoint, directory, quantization=request.param, max_context=CONTEXT)


@pytest.fixture(params=[True, False], ids=["own graph", "one graph"])
def load(variant, request, monkeypatch):
    """Open backends, with a graph of their own for adapters or one for all sequences."""
    if not request.param:
        monkeypatch.setattr("engine_core.backends.onnxruntime.plan._OWN_GRAPH_BYTES", 0)

    with opening(variant, max_batch=4) as make:
        yield lambda *adapters, **config: make(lora_adapters=adapters, **config)


def test_each_row_has_its_own_adapter_and_the_tokens_it_has_alone(load, write):
    first = f"first:{write('q_proj', 'v_proj', 'down_proj', rank=2)}"
    second = f"second:{write('k_proj', 'o_proj', 'gate_proj', 'up_proj', rank=5, seed=1)}"
    adapters = ["", "first", "second", ""]
    requests = Requests(PROMPTS, REQUESTS, COUNT, adapters)
    plain = Requests(PROMPTS, REQUESTS, COUNT)
    bare = load(max_batch=1)
    without = [plain.alone(bare, index) for index in range(4)]
    alone = [requests.alone(load(first, second, max_batch=1), index) for index in range(4)]
    assert [alone[index] == without[index] for index in range(4)] == [True, False, False, True]
    backend = load(first, second)
    found = requests.together(backend, {0: 0, 1: 1, 2: 2, 3: 3})
    assert [found[index] for index in range(4)] == alone
    found = requests.together(backend, {3: 1, 2: 0, 1: 3})  # slots that had other adapters before
    assert [found[index] for index in (1, 2, 3)] == alone[1:]
    backend.begin(0, REQUESTS[0][0], PROMPTS[0], "first")
    score = backend.log_probabilities(PROMPTS[3], 4)
    np.testing.assert_array_equal(score, bare.log_probabilities(PROMPTS[3], 4))


def test_adapters_are_in_the_plan_and_other_sequences_pay_nothing(variant, write):
    config = EngineConfig(variant[0], num_threads=1)
    entry = f"a:{write('q_proj', 'gate_proj', rank=2)}"
    without = OnnxRuntimeBackend.plan(*variant, config)
    plan = OnnxRuntimeBackend.plan(*variant, dataclasses.replace(config, lora_adapters=(entry,)))
    assert without.item("adapters") == 0
    matrices = 2 * 4 * 2 * (64 + 128 + 64 + 160)  # layers, bytes, rank, columns and rows of qkv and of gate
    assert plan.item("adapters") >= matrices + without.item("weights")
    backend = OnnxRuntimeBackend.load(*variant, dataclasses.replace(config, lora_adapters=(entry,)))
    try:
        session = backend._session
        inputs = {each.name for each in session._plain[0].session.get_inputs()}
        assert not any(name.startswith("lora.") for name in inputs), "the graph of the others has no branches"
        assert {name for name in session._matrices["a"] if name.endswith(".a")} == {
            f"lora.{layer}.{site}.a" for layer in (0, 1) for site in ("qkv", "gate")
        }, "only what an adapter changes has branches"
    finally:
        backend.close()


def test_a_bad_adapter_ends_configure_with_nothing_left(variant, write):
    config = EngineConfig(variant[0], lora_adapters=[f"a:{write('q_proj', rank=9)}"], lora_max_rank=8)
    for call in (OnnxRuntimeBackend.plan, OnnxRuntimeBackend.load):
        with pytest.raises(AdapterError, match="has rank 9, but lora_max_rank is 8; raise it"):
            call(*variant, config)


FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SINGLE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "name, config",
    [
        *(("qwen2", {"target_modules": [target], "r": 3}) for target in SINGLE),
        *(("phi3", {"target_modules": [target], "r": 3}) for target in FUSED),
        ("qwen2", {"use_rslora": True, "r": 8, "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 5}}),
        ("llama3", {"alpha_pattern": {"down_proj": 31}, "exclude_modules": ["o_proj"]}),
        ("phi3", {"r": 16}),
        ("gemma2", {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "gate_proj", "down_proj"]}),
        ("llama-odd", {"target_modules": r".*\.(k|up)_proj"}),
    ],
)
def test_logits_are_those_of_peft_and_transformers(name, config, tmp_path):
    expected, found = _logits_of(tmp_path, name, config, "fp32")
    assert np.abs(found - expected).max() < 2e-4 < np.abs(expected[0] - expected[1]).max() / 50


@pytest.mark.parametrize("quantization, least", [("int8", 0.99), ("int4", 0.93)])
@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_an_adapter_changes_a_quantized_model_as_it_changes_the_model(name, quantization, least, tmp_path):
    expected, found = _logits_of(tmp_path, name, {"r": 6}, quantization)
    changes = [(logits[0] - logits[1]).ravel() for logits in (expected, found)]
    assert np.corrcoef(*changes)[0, 1] > least


def _logits_of(tmp_path, name, config, quantization) -> tuple[np.ndarray, np.ndarray]:
    """Return (what peft computes, what the engine does): float32 [with the adapter and without, places, vocab]."""
    pytest.importorskip("peft")
    import adapters

    source = checkpoints.write(tmp_path / "checkpoint", name)
    directory = adapters.write(tmp_path / "adapter", source, **config)
    tokens = np.random.default_rng(0).integers(3, 300, 40)
    models = [adapters.reference(source, path) for path in (directory, None)]
    expected = np.stack([checkpoints.reference_logits(model, tokens)[_PLACES] for model in models])
    engine = tmp_path / "engine"
    manifest = build_engine(source, engine, quantization=quantization, max_context=64)
    config = EngineConfig(engine, lora_adapters=[f"a:{directory}"], num_threads=1, prefill_chunk=16)
    backend = OnnxRuntimeBackend.load(engine, manifest, config)
    try:
        return expected, np.stack([_logits(backend, tokens, adapter) for adapter in ("a", "")])
    finally:
        backend.close()


_PLACES = [15, 24, 39]  # the ends of a chunk, of a part of one, and of decode steps


def _logits(backend, tokens, adapter):
    session, found = backend._session, []
    session.use_adapter(0, adapter)
    session.prefill(tokens[:16], 0)
    found.append(session.logits[0].copy())
    session.prefill(tokens[16:25], 16)
    found.append(session.logits[0].copy())
    for position in range(25, 40):
        session.decode(int(tokens[position]), position)
    return np.stack([*found, session.logits[0].copy()])


def test_another_models_manifest_refuses_the_adapter(write, tmp_path):
    source = write_random_checkpoint(tmp_path / "other", CONFIG | {"hidden_size": 48, "num_hidden_layers": 1})
    build_engine(source, tmp_path / "engine", quantization="fp32", max_context=64)
    config = EngineConfig(tmp_path / "engine", lora_adapters=[f"a:{write('q_proj')}"])
    with pytest.raises(AdapterError, match="trained on another model"):
        OnnxRuntimeBackend.plan(tmp_path / "engine", read_manifest(tmp_path / "engine"), config)


def test_a_step_names_no_adapter(load, write):
    """The adapter is a matter of ``begin``: a prompt in parts, a prefix and decode steps all have it."""
    backend = load(f"a:{write('v_proj', 'up_proj')}", prompt_cache_tokens=16)
    sampling = SamplingParams(seed=0)
    backend.begin(2, sampling, PROMPTS[3], "a")
    whole = backend.step([SequenceStep(2, PROMPTS[3], 0)])[0].result()
    backend.save_kv(2, 0, 0, 16)
    backend.begin(1, sampling, PROMPTS[3], "a")
    backend.load_kv(1, 0, 0, 16)
    assert backend.step([SequenceStep(1, PROMPTS[3][16:], 16)])[0].result() == whole
