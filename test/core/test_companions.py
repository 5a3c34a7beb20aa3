"""What a build tries of the files beside the weights: the ends of answers, the tokenizer, the chat template."""

from __future__ import annotations

import json

import pytest

import fake_hub
from engine_core.errors import CheckpointError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import check_companions, model_sampling
from engine_core.quantize.calibration_texts import read_sequences
from fakes import VOCAB_SIZE


@pytest.fixture
def checkpoint(tmp_path):
    return fake_hub.write_checkpoint(tmp_path / "checkpoint")


def change(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def check(directory):
    check_companions(Checkpoint(directory), VOCAB_SIZE)


def test_a_whole_checkpoint_is_taken(checkpoint):
    check(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()  # a base model
    check(checkpoint)


def test_other_templates_of_a_checkpoint_are_not_read(checkpoint):
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "default.jinja").write_text("{{ raise_exception('other') }}")
    check(checkpoint)
    (checkpoint / "calibration.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    opened = Checkpoint(checkpoint)
    assert read_sequences(checkpoint / "calibration.jsonl", opened, 64, VOCAB_SIZE)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ raise_exception('robots only') }}", "refuses this conversation: robots only"),
        ("{% for x in messages %}", "refuses this conversation: Unexpected end of template"),
        ("{{ messages[0].nothing.more }}", "refuses this conversation"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "too many steps"),
    ],
)
def test_a_template_that_would_refuse_every_request_is_refused(checkpoint, source, reason):
    (checkpoint / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match=f"{checkpoint} cannot answer requests: .*{reason}") as refused:
        check(checkpoint)
    assert "\n" not in str(refused.value) and "edgellm-tokenizer" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["{}", '{"model": {"type": "Robot"}}', '{"model": {"type": "BPE", "vocab": [], "merges": 5}}']
)
def test_a_tokenizer_that_no_engine_could_load_is_refused(checkpoint, text):
    (checkpoint / "tokenizer.json").write_text(text)
    words = "cannot answer requests: The tokenizer in .* cannot be loaded"
    with pytest.raises(CheckpointError, match=words) as refused:
        check(checkpoint)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-1, VOCAB_SIZE, 10**6, 2**31, True, 1.5, "2", [2, -1], [VOCAB_SIZE]])
def test_an_end_that_no_answer_can_have_is_refused(checkpoint, file, value):
    change(checkpoint / file, eos_token_id=value)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        check(checkpoint)


@pytest.mark.parametrize("found", [5, [], [{"name": "robot", "template": "a"}], [{"name": "default", "template": 5}]])
def test_chat_templates_of_another_form_are_refused(checkpoint, found):
    """The library fails on some when they are used, with errors of its own."""
    (checkpoint / "chat_template.jinja").unlink()
    change(checkpoint / "tokenizer_config.json", chat_template=found)
    if not found:  # none
        return check(checkpoint)
    with pytest.raises(CheckpointError, match="cannot answer requests: The chat template in .* one named 'default'"):
        check(checkpoint)


@pytest.mark.parametrize("value", ["hot", [0.5], -1, True, float("inf")])
def test_sampling_that_is_left_out_is_told(checkpoint, caplog, value):
    change(checkpoint / "generation_config.json", do_sample=True, temperature=value, top_k=50.0, top_p=None)
    check(checkpoint)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "temperature" in caplog.text and "from 0.0 to 100.0; it is left out" in caplog.text
    assert model_sampling(checkpoint) == {"top_k": 50}


def test_a_tokenizer_without_most_of_the_tokens_is_told(checkpoint, caplog):
    check(checkpoint)
    assert not caplog.records
    check_companions(Checkpoint(checkpoint), 3 * VOCAB_SIZE)
    assert f"of the model's {3 * VOCAB_SIZE} ids: answers lack the text of all others" in caplog.text
