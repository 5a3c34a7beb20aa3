"""The user's texts as the model reads and writes them; one reader for all that learns from them."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("transformers")

import vocab_checkpoints
from engine_core.errors import BuildError
from engine_core.text.documents import read_documents, text_start, token_sequences
from engine_core.text.tokenizer import Tokenizer

CHAT = [("system", "Be short."), ("user", "where is Anna?"), ("assistant", "in the kitchen")]
CHAT += [("user", "sure?"), ("assistant", "yes")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return vocab_checkpoints.write_checkpoint(tmp_path_factory.mktemp("texts"), "byte_level")


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


def with_bos(directory, tmp_path) -> Tokenizer:
    """Return a tokenizer that puts <s> before every text and the template's stop token's line break behind it."""
    values = json.loads((directory / "tokenizer.json").read_text())
    bos = next(token["id"] for token in values["added_tokens"] if token["content"] == "<s>")
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = vocab_checkpoints.TEMPLATE.replace(
        "{{ m['content'] }}<|end|>", "{{ m['content'] }}<|end|>\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


def test_turns_are_the_prompts_the_engine_makes_and_the_answers_that_follow(tokenizer, tmp_path):
    (document,) = read_documents(vocab_checkpoints.write_chats(tmp_path / "c.jsonl", [CHAT]))
    found = list(document.turns(tokenizer))
    assert len(found) == 2
    for (prompt, answer), count, text in zip(found, (2, 4), ("in the kitchen", "yes")):
        messages = [{"role": role, "content": content} for role, content in CHAT[:count]]
        expected = tokenizer.encode(tokenizer.apply_template(messages), add_special_tokens=False)
        assert prompt.tolist() == expected.tolist()
        assert answer.tolist() == [*tokenizer.encode(text), tokenizer.fast.token_to_id("<|end|>")]
    assert np.concatenate(found[-1]).tolist() == document.token_ids(tokenizer).tolist()


def test_what_a_template_puts_behind_the_stop_token_is_no_part_of_an_answer(directory, tmp_path):
    tokenizer = with_bos(directory, tmp_path)
    (document,) = read_documents(vocab_checkpoints.write_chats(tmp_path / "c.jsonl", [CHAT[:3]]))
    ((_, answer),) = document.turns(tokenizer)
    assert document.token_ids(tokenizer)[-1] != answer[-1] == tokenizer.fast.token_to_id("<|end|>")


def test_pieces_of_a_plain_text_hold_all_of_it_and_begin_as_every_text_does(directory, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("The robot takes the red cup.\n\nIt waits.\n\n" * 9)
    tokenizer = with_bos(directory, tmp_path)
    (bos,) = text_start(tokenizer).tolist()
    pieces = list(token_sequences(path, tokenizer, 20))
    assert [len(ids) for ids in pieces[:-1]] == [20] * (len(pieces) - 1) and 1 < len(pieces[-1]) <= 20
    assert all(ids[0] == bos and bos not in ids[1:] for ids in pieces)
    assert tokenizer.decode(np.concatenate(pieces)) == path.read_text()


def test_lines_of_jsonl_stay_apart(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "The robot"}\n{"prompt": "sure?", "response": "yes"}\n')
    assert not len(text_start(tokenizer))
    first, second = token_sequences(path, tokenizer, 50)
    assert tokenizer.decode(first) == "The robot"
    assert second.tolist() == next(d for d in read_documents(path) if d.messages).token_ids(tokenizer).tolist()
    assert [len(ids) for ids in token_sequences(path, tokenizer, 2)][-1] in (1, 2)


def test_without_a_template_messages_follow_one_another(tmp_path):
    directory = vocab_checkpoints.write_checkpoint(tmp_path / "plain", "byte_level")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = Tokenizer(directory)
    (document,) = read_documents(vocab_checkpoints.write_chats(tmp_path / "c.jsonl", [CHAT[:3]]))
    ((prompt, answer),) = document.turns(tokenizer)
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("Be short.where is Anna?", "in the kitchen")


def test_a_chat_the_template_refuses_is_named(directory, tmp_path):
    tokenizer = Tokenizer(directory)
    tokenizer._hf.chat_template = "{{ raise_exception('roles have to alternate') }}"
    (document,) = read_documents(vocab_checkpoints.write_chats(tmp_path / "c.jsonl", [CHAT]))
    with pytest.raises(BuildError, match=r"c.jsonl:1: .*roles have to alternate"):
        document.token_ids(tokenizer)
