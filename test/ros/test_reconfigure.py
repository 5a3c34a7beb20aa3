"""Another variant, vocabulary and context through parameters, over the services that ros2 param set and rqt use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter

from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.formats.vocab_map import TENSOR_NAME
from llm_client import ACTIVATE, CLEANUP, CONFIGURE, DEACTIVATE, UNCONFIGURED, Nodes

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
COMMAND = [ChatMessage(role="user", content="go to the kitchen")]
PLAN = {"plan": [{"do": "navigate", "to": "kitchen"}]}
FIXED = "is fixed while the node is configured; clean up, set it and configure again."
DEFAULTS = {"quantization": "int8", "vocab_map": "auto", "max_context": 0, "kv_cache_type": "auto"}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    """The demo model as int8 and as int4, side by side."""
    directory = tmp_path_factory.mktemp("demo") / "engine"
    for quantization in ("int8", "int4"):
        build_engine(MODEL, directory / quantization, quantization=quantization)
    return directory


@pytest.fixture(scope="module")
def node(tmp_path_factory, engine_dir):
    nodes = Nodes(tmp_path_factory.mktemp("reconfigure"))
    yield nodes.start(engine_dir)
    nodes.close()


@pytest.fixture
def llm(node):
    """The node, active with the int8 variant as it was built."""
    configure(node, **DEFAULTS)
    return node


def configure(llm, **parameters):
    """Set parameters as an operator does, back in unconfigured, and bring the node up; return ~/get_info."""
    if llm.state() != UNCONFIGURED:
        assert llm.change(DEACTIVATE) and llm.change(CLEANUP)
    llm.must_set(**parameters)
    assert llm.change(CONFIGURE), llm.status(lambda status: status.error_message).error_message
    assert llm.change(ACTIVATE)
    return llm.info()


def ask(llm):
    answer = llm.generate(messages=COMMAND, sampling={"max_new_tokens": 64, "ignore_eos": False})
    assert answer.error_code == 0, answer.error_message
    return answer


def write_map(path: Path, ids) -> str:
    write_safetensors(path, {TENSOR_NAME: np.array(sorted(ids), dtype=np.int32)})
    return str(path)


def special_ids() -> set[int]:
    """Every token that is not text; the end of an answer is among them."""
    return {token["id"] for token in json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"]}


def weights(info) -> int:
    """Bytes."""
    return next(item.bytes for item in info.memory.items if item.name == "weights")


def test_another_variant_vocabulary_and_context_are_taken_at_the_next_configure(llm, tmp_path):
    before = llm.info()
    whole = ask(llm)
    assert json.loads(whole.text) == PLAN
    assert (before.quantization, before.reduced_vocab_size) == ("int8", before.vocab_size)

    other = configure(llm, quantization="int4")
    answer = ask(llm)
    assert other.quantization == "int4" and weights(other) < 0.8 * weights(before)
    assert json.loads(answer.text) == PLAN

    kept = special_ids() | set(answer.token_ids) | set(range(300, 500))
    path = write_map(tmp_path / "vocab_map.safetensors", kept)
    reduced = configure(llm, vocab_map=path, max_context=128, kv_cache_type="fp32")
    assert (reduced.quantization, reduced.reduced_vocab_size) == ("int4", len(kept))
    assert (reduced.vocab_size, reduced.max_context, reduced.kv_cache_type) == (before.vocab_size, 128, "fp32")
    assert reduced.memory.total < other.memory.total
    # The likeliest of all tokens is the likeliest of those that were kept, if it is one of them.
    again = ask(llm)
    assert (again.text, list(again.token_ids)) == (answer.text, list(answer.token_ids))
    assert again.finish_reason == FinishReason.STOP
    assert "max_context is 128" in llm.generate("word " * 300).error_message
    status = llm.status(lambda status: status.max_context == 128)
    assert (status.quantization, status.memory_total) == ("int4", reduced.memory.total)

    back = configure(llm, **DEFAULTS)
    assert (back.quantization, back.reduced_vocab_size, back.max_context) == (
        "int8", before.vocab_size, before.max_context
    )  # fmt: skip
    assert list(ask(llm).token_ids) == list(whole.token_ids)


def test_a_token_outside_the_map_is_never_sampled(llm, tmp_path):
    whole = ask(llm)
    missing = whole.token_ids[len(whole.token_ids) // 2]
    kept = set(range(llm.info().vocab_size)) - {missing}
    info = configure(llm, vocab_map=write_map(tmp_path / "map.safetensors", kept))
    assert info.reduced_vocab_size == info.vocab_size - 1
    answer = ask(llm)
    assert answer.token_ids and missing not in answer.token_ids and answer.text != whole.text


def test_a_change_while_configured_is_refused_with_the_reason_and_changes_nothing(llm, tmp_path):
    path = write_map(tmp_path / "map.safetensors", special_ids())
    wanted = {"quantization": "int4", "vocab_map": path, "max_context": 128, "kv_cache_type": "fp32"}
    before, values, answer = llm.info(), llm.get(*wanted), ask(llm)
    for transition in (None, DEACTIVATE):  # while active, then while inactive
        assert transition is None or llm.change(transition)
        assert llm.set(**wanted) == [(False, f"{name} {FIXED}") for name in wanted]
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in wanted.items()]
        request = SetParametersAtomically.Request(parameters=[*parameters])
        result = llm.call(SetParametersAtomically, "set_parameters_atomically", request).result
        assert not result.successful and result.reason.endswith(FIXED)
        assert llm.get(*wanted) == values
    assert llm.change(ACTIVATE)
    after = llm.info()
    assert (after.quantization, after.max_context, after.reduced_vocab_size) == (
        before.quantization, before.max_context, before.reduced_vocab_size
    )  # fmt: skip
    assert list(ask(llm).token_ids) == list(answer.token_ids)


@pytest.mark.parametrize(
    "parameters, code, words",
    [({"quantization": "fp16"}, ErrorCode.ENGINE_DIRECTORY, ("'fp16'", "int4, int8")),
     ({"max_context": 1 << 20}, ErrorCode.CONFIGURATION, (str(1 << 20), "max_context")),
     ({"vocab_map": "/no/such/map.safetensors"}, ErrorCode.CONFIGURATION, ("/no/such/map.safetensors",))],
    ids=["variant", "context", "map"],
)  # fmt: skip
def test_what_the_engine_does_not_have_is_refused_at_configure(llm, parameters, code, words):
    assert llm.change(DEACTIVATE) and llm.change(CLEANUP)
    llm.must_set(**parameters)
    assert not llm.change(CONFIGURE) and llm.state() == UNCONFIGURED
    status = llm.status(lambda status: all(word in status.error_message for word in words))
    assert status.error_code == code
    configure(llm, **DEFAULTS)
    assert json.loads(ask(llm).text) == PLAN
