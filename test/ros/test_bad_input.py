"""What cannot be served is answered with its code and one sentence, and costs the next request nothing."""

from __future__ import annotations

import math

import pytest

from edgellm_ros.msg import ChatMessage, ErrorCode, GenerationRequest
from fake_backend import MAX_CONTEXT
from llm_client import ABORTED, CONFIGURE, make_request

USER = ChatMessage(role="user", content="hello")
BROKEN = "\udcff"  # stands for a byte that is not UTF-8; see send_bytes

TABLE = [
    ("empty", {"messages": []}, ErrorCode.EMPTY_PROMPT, "nothing to answer"),
    ("blank prompt", {"prompt": " \n"}, ErrorCode.EMPTY_PROMPT, "nothing to answer"),
    ("blank messages", {"messages": [ChatMessage(role="user", content="")]}, ErrorCode.EMPTY_PROMPT, "empty"),
    ("both", {"prompt": "a", "messages": [USER]}, ErrorCode.INVALID_REQUEST, "both"),
    ("role", {"messages": [ChatMessage(role="robot", content="a")]}, ErrorCode.INVALID_REQUEST, "'robot'"),
    ("template", {"messages": [ChatMessage(role="tool", content="a")]}, ErrorCode.INVALID_REQUEST, "no tools here"),
    ("negative deadline", {"deadline": -1.0}, ErrorCode.INVALID_REQUEST, "-1.0"),
    ("NaN deadline", {"deadline": math.nan}, ErrorCode.INVALID_REQUEST, "nan"),
    ("too long", {"prompt": "x" * 3000}, ErrorCode.PROMPT_TOO_LONG, f"{MAX_CONTEXT}"),
    ("far too long", {"prompt": "x" * 3_000_000}, ErrorCode.PROMPT_TOO_LONG, "at most 1048576"),
    ("negative temperature", {"sampling": {"temperature": -0.5}}, ErrorCode.INVALID_SAMPLING, "-0.5"),
    ("NaN top_p", {"sampling": {"top_p": math.nan}}, ErrorCode.INVALID_SAMPLING, "nan"),
    ("infinite penalty", {"sampling": {"repetition_penalty": math.inf}}, ErrorCode.INVALID_SAMPLING, "inf"),
    ("top_p 0", {"sampling": {"top_p": 0.0}}, ErrorCode.INVALID_SAMPLING, "top_p"),
    ("top_p above 1", {"sampling": {"top_p": 1.5}}, ErrorCode.INVALID_SAMPLING, "1.5"),
    ("negative top_k", {"sampling": {"top_k": -1}}, ErrorCode.INVALID_SAMPLING, "top_k"),
    ("min_p 1", {"sampling": {"min_p": 1.0}}, ErrorCode.INVALID_SAMPLING, "min_p"),
    ("no new tokens", {"sampling": {"max_new_tokens": 0}}, ErrorCode.INVALID_SAMPLING, "max_new_tokens"),
    ("stop id", {"sampling": {"stop_token_ids": [99999]}}, ErrorCode.INVALID_SAMPLING, "99999"),
    ("bias id", {"sampling": {"logit_bias_token_ids": [-1], "logit_bias_values": [1.0]}},
     ErrorCode.INVALID_SAMPLING, "-1"),
    ("bias lengths", {"sampling": {"logit_bias_token_ids": [1, 2], "logit_bias_values": [1.0]}},
     ErrorCode.INVALID_SAMPLING, "2 entries"),
    ("NaN bias", {"sampling": {"logit_bias_token_ids": [1], "logit_bias_values": [math.nan]}},
     ErrorCode.INVALID_SAMPLING, "nan"),
    ("empty stop", {"stop": [""]}, ErrorCode.INVALID_SAMPLING, "stop string"),
    ("mark of broken UTF-8", {"prompt": "a\ufffdb"}, ErrorCode.INVALID_TEXT, "UTF-8"),
    ("broken schema", {"json_schema": "{not json"}, ErrorCode.INVALID_SCHEMA, "schema"),
]  # fmt: skip


@pytest.mark.parametrize("fields, code, words", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_refused_with_a_reason(llm, fields, code, words):
    answer = llm.generate(**fields)
    assert (answer.error_code, answer.text, answer.metrics.generated_tokens) == (code, "", 0), answer.error_message
    assert words in answer.error_message and "\n" not in answer.error_message


def test_the_action_aborts_with_the_same_codes(llm):
    status, result = llm.goal(sampling={"temperature": -1.0}).result()
    assert (status, result.error_code) == (ABORTED, ErrorCode.INVALID_SAMPLING)


def test_bad_requests_cost_the_others_nothing(llm):
    llm.must_set(queue_depth=100)
    good = llm.generate("fine").text
    futures = []
    for _, fields, _, _ in TABLE:
        futures.append(llm.generate_async("fine"))
        futures.append(llm.generate_async(**fields))
    for i, future in enumerate(futures):
        answer = llm.wait(future)
        assert bool(answer.error_code) == bool(i % 2) and (i % 2 or answer.text == good)


def test_invalid_utf8_bytes(llm):
    """Bytes that are not UTF-8 reach the node as U+FFFD, by rclpy's conversion."""
    from rclpy.serialization import deserialize_message, serialize_message

    data = serialize_message(make_request(prompt="ab"))
    position = data.index(b"ab")
    broken = deserialize_message(data[:position] + b"a\xff" + data[position + 2 :], GenerationRequest)
    assert llm.generate(prompt=broken.prompt).error_code == ErrorCode.INVALID_TEXT


def test_tokenize(llm):
    answer = llm.tokenize("hé")
    assert list(answer.token_ids) == list("hé".encode()) and answer.tokens == ["h", "\ufffd", "\ufffd"]
    assert llm.tokenize("").error_code == ErrorCode.EMPTY_PROMPT


def test_requests_are_refused_at_once_unless_active(nodes, engine_dir):
    llm = nodes.start(engine_dir)
    for what in ("unconfigured", "inactive"):
        answer = llm.generate()
        assert answer.error_code == ErrorCode.NOT_ACTIVE and what in answer.error_message
        assert not llm.goal().accepted
        assert llm.tokenize("a").error_code == (ErrorCode.NOT_ACTIVE if what == "unconfigured" else 0)
        assert llm.info().error_code == (ErrorCode.NOT_ACTIVE if what == "unconfigured" else 0)
        assert llm.info().versions
        if what == "unconfigured":
            assert llm.change(CONFIGURE)
