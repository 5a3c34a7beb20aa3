"""Every field of every family's configuration class, missing, null and set: the logits of transformers, or refused.

The fields come from the class itself, so that one that a new transformers adds is tried too. By default one base of
each family is tried with the values that matter most; EDGELLM_ALL_CONFIG_FIELDS=1 tries all bases and all values.
"""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.errors import EdgeLLMError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.models.reader import check_tensors, read_spec

ALL = bool(os.environ.get("EDGELLM_ALL_CONFIG_FIELDS"))
PROMPT = np.random.default_rng(3).integers(3, 331, size=45)
MAX_CONTEXT = 64
MISSING = object()
BASES = ("llama3", "mistral-window", "qwen2-window", "qwen3", "gemma2", "gemma3", "phi3")
# Bases of which only the fields that the others lack, or read otherwise, are tried by default.
OWN_FIELDS = {
    "smollm3": ("no_rope_layers", "no_rope_layer_interval"),
    "qwen3-moe": ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step",
                  "mlp_only_layers", "moe_intermediate_size"),
    "olmo2": ("rms_norm_eps", "num_key_value_heads"),
    "granite": ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    "exaone4": ("sliding_window", "sliding_window_pattern", "layer_types"),
    "ministral": ("head_dim", "layer_types", "sliding_window"),
    "ministral3": ("rope_parameters", "rope_scaling"),
    "lfm2": (
        "layer_types", "full_attn_idxs", "conv_bias", "conv_L_cache", "block_multiple_of", "block_ffn_dim_multiplier",
        "block_auto_adjust_ff_dim", "block_ff_dim", "intermediate_size", "norm_eps", "tie_embedding",
        "tie_word_embeddings", "hidden_act", "num_key_value_heads",
    ),
}  # fmt: skip
BASES = tuple(name for name in (*BASES, *OWN_FIELDS) if name in checkpoints.CASES)
BASES = tuple(checkpoints.CASES) if ALL else BASES
# Names that are read beside the class's own fields, or were by an earlier class.
FURTHER = (
    "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "partial_rotary_factor",
    "layer_types",
)  # fmt: skip
FOREIGN = (
    "head_dim", "max_window_layers", "use_sliding_window", "sliding_window", "attention_bias", "mlp_bias", "hidden_act",
    "hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "use_qk_norm",
    "original_max_position_embeddings", "use_bidirectional_attention", "torch_dtype", "is_decoder", "num_experts",
    "attention_multiplier", "logits_scaling", "no_rope_layers", "cache_implementation", "pruned_heads",
    "tie_encoder_decoder", "quantization_config",
)  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
_NESTED = {"full_attention": _LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
# What a field is set to; others get values by the type of their default.
VALUES: dict[str, list] = {
    "rope_parameters": [
        {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 300.0}, {"rope_theta": 300.0}, {}, _LINEAR,
        {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, _NESTED,
        {"full_attention": _LINEAR}, {"sliding_attention": _LINEAR},
        {"full_attention": None, "sliding_attention": _LINEAR},
        {"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": None},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
        {"rope_type": "proportional"}, {"rope_type": None},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.2},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.2},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0},
    ],
    "rope_scaling": [
        None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "default"}, {"type": "dynamic", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}, {"type": "yarn", "factor": 2.0}, {"factor": 2.0},
        {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}, {"type": "mrope", "mrope_section": [2, 1, 1]},
    ],
    "rope_theta": [None, 300.0, 300],
    "rope_local_base_freq": [None, 300.0],
    "sliding_window_pattern": [None, 1, 2, 3],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "head_dim": [8, 16, 32, 48, 0],
    "layer_types": [
        ["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention", "sliding_attention", "full_attention"],
        ["full_attention"] * 2, [], ["linear_attention"] * 3, ["full_attention", "full_attention", "chunked_attention"],
        ["conv", "full_attention"], ["conv", "full_attention", "conv"], ["conv", "sliding_attention", "conv"],
    ],
    "full_attn_idxs": [[], [1], [0, 2], [1, 7], [-1], 1],
    "conv_L_cache": [1, 2, 4, 0],
    "block_multiple_of": [1, 8, 256, 0],
    "block_ffn_dim_multiplier": [1.3, 1, 0],
    "block_ff_dim": [208, 300],
    "intermediate_size": [208, 300],
    "norm_eps": [1e-2, 0, 1],
    "sliding_window": [None, 1, 5, 1000, 0],
    "max_window_layers": [0, 1, 2, 28],
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "relu", "swish"],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", None],
    "query_pre_attn_scalar": [1, 17, 32],
    "final_logit_softcapping": [None, 2.0, 0.0, 5],
    "attn_logit_softcapping": [None, 2.0, 0.0, 5],
    "original_max_position_embeddings": [None, 16, 64, 1024],
    "max_position_embeddings": [32, 64, 512],
    "num_key_value_heads": [1, 2, 3, 6],
    "num_attention_heads": [1, 2, 3, 6],
    "rms_norm_eps": [1e-2, 0, 1],
    "architectures": [["LlamaForCausalLM"], ["LlamaModel"], [], ["Gemma3ForConditionalGeneration"]],
    "model_type": ["llama", "mistral", "x"],
    "eos_token_id": [7, [7, 8], []],
    "dtype": ["float16", "bfloat16"],
    "torch_dtype": ["float16", "bfloat16"],
    "cache_implementation": ["static", "hybrid"],
    "no_rope_layers": [[0, 1, 1], [1, 1, 1], [1, 0], [0, 0, 0, 1], [True, False, True], [1, 0, "x"], 1],
    "pruned_heads": [{}, {"0": [1]}],
    "quantization_config": [None],
    "is_encoder_decoder": [True],
    "num_experts": [4, 6, 0],
    "attention_multiplier": [0.5, 1, 0],
    "logits_scaling": [2.0, 1, 0],
    "use_qk_norm": [True, False],
    "no_rope_layer_interval": [1, 2, 0],
    "num_local_experts": [6, 4, 0],
    "num_experts_per_tok": [1, 6, 7],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [1], [3]],
    "moe_intermediate_size": [48, 96],
    "embedding_multiplier": [1, 7.5, 0],
    "residual_multiplier": [1, 0.5, 0],
    "id2label": [{"0": "x"}],
}  # fmt: skip
# Fields that no answer of a model depends on.
IRRELEVANT = frozenset(
    "transformers_version output_hidden_states return_dict id2label label2id problem_type initializer_range use_cache "
    "bos_token_id pad_token_id eos_token_id _name_or_path output_attentions attention_dropout resid_pdrop embd_pdrop "
    "chunk_size_feed_forward is_encoder_decoder pretraining_tp dtype architectures torch_dtype is_decoder "
    "tie_encoder_decoder cache_implementation".split()
)


def fields_of(name: str) -> list[str]:
    """Return the fields of the configuration class of a case that are tried."""
    import transformers

    cls = getattr(transformers, checkpoints.CASES[name][1])
    if not ALL and name in OWN_FIELDS:
        return list(OWN_FIELDS[name])
    own = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    assert "hidden_size" in own, "transformers changed how its configuration classes list their fields"
    names = dict.fromkeys([*own, *FURTHER, *(("architectures", "model_type", *FOREIGN) if ALL else ())])
    return [name for name in names if ALL or name not in IRRELEVANT]


def values_of(field: str, base: dict) -> list:
    """Return what ``field`` is set to beside missing and null."""
    if field in VALUES:
        return VALUES[field]
    value = base.get(field)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value * 2]
    return [True, 1]


class Base:
    """One random checkpoint, whose configuration changes; logits are kept by what they come from."""

    def __init__(self, directory, name: str) -> None:
        import transformers

        self._library = transformers
        self.directory = checkpoints.write(directory / "checkpoint", name)
        self._engine = directory / "engine"
        self._path = self.directory / "config.json"
        self.config = json.loads(self._path.read_text())
        self._ours: dict = {}
        self._theirs: dict[str, np.ndarray | Exception] = {}

    def set(self, field: str, value: object) -> None:
        changed = {name: kept for name, kept in self.config.items() if name != field}
        self._path.write_text(json.dumps(changed if value is MISSING else changed | {field: value}))

    def ours(self) -> np.ndarray | EdgeLLMError:
        """Return the logits after PROMPT on the CPU backend, or the refusal; the same model is built once."""
        try:
            checkpoint = Checkpoint(self.directory)
            spec = read_spec(checkpoint)
            check_tensors(spec, checkpoint)
            key = repr(spec)  # with the RoPE's parameters
            if key not in self._ours:
                context = min(MAX_CONTEXT, spec.max_position)
                manifest = build_engine(self.directory, self._engine, max_context=context)
                session = OrtSession(self._engine, manifest.model, manifest.model.vocab_size, context, context, 1)
                session.prefill(PROMPT[: context - 1], 0)
                self._ours[key] = session.logits.copy()
            return self._ours[key]
        except EdgeLLMError as error:
            assert "\n" not in str(error)
            return error

    def theirs(self) -> np.ndarray | Exception:
        """Return the logits of transformers after PROMPT, or what it raises."""
        try:
            config = self._library.AutoConfig.from_pretrained(self.directory)
            key = repr(sorted((k, repr(v)) for k, v in config.to_dict().items() if k not in IRRELEVANT))
            length = min(MAX_CONTEXT, config.max_position_embeddings) - 1
            if key not in self._theirs:
                model = checkpoints.reference(self.directory)
                self._theirs[key] = checkpoints.reference_logits(model, PROMPT[:length])[-1]
            return self._theirs[key]
        except Exception as error:  # the library raises whatever its parts raise
            return error


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function from the name of a case to its Base, made once."""
    made: dict[str, Base] = {}

    def base(name: str) -> Base:
        if name not in made:
            made[name] = Base(tmp_path_factory.mktemp(name), name)
        return made[name]

    return base


@pytest.mark.parametrize("name", BASES)
def test_every_field_is_as_in_transformers_or_refused(bases, name):
    base, differing, num_same, num_refused = bases(name), [], 0, 0
    for field in fields_of(name):
        values = values_of(field, base.config)
        for value in [MISSING, None, *(values if ALL or name in OWN_FIELDS else values[:3])]:
            base.set(field, value)
            ours = base.ours()
            if isinstance(ours, EdgeLLMError):
                num_refused += 1
                continue
            theirs = base.theirs()
            shown = f"{field}={'missing' if value is MISSING else json.dumps(value)}"
            if isinstance(theirs, Exception):
                # A wrong type that has one meaning (0 for 0.0), or architectures without a model_type: ours says more.
                strict = "expected" in str(theirs) or "doesn't match any type" in str(theirs)
                if not strict and field != "model_type":
                    differing.append(f"{shown}: transformers refuses it: {str(theirs)[:150]!r}")
            elif np.isnan(theirs).any():
                differing.append(f"{shown}: NaN in transformers")
            elif (difference := np.abs(ours - theirs).max()) > 1e-4:
                differing.append(f"{shown}: logits differ by {difference:.3g}")
            else:
                num_same += 1
    assert not differing, "\n" + "\n".join(differing)
    assert num_refused > 0 and num_same > (0 if name in OWN_FIELDS else num_refused / 2)
