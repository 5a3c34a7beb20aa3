"""benchmarks/text_quality.py on small models: its rows are what the backends and transformers give."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import vocab_checkpoints
from benchmarks import public_texts, text_quality
from engine_core.text.tokenizer import Tokenizer
from tools.result_rows import read_rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return vocab_checkpoints.write_checkpoint(tmp_path_factory.mktemp("model"), "byte_level")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.json"
    path.write_text(json.dumps([vocab_checkpoints.TEXT, "bring the red cup to the kitchen, then stop. " * 20]))
    return path


def measure(checkpoint, texts, tmp_path, *arguments) -> list[dict]:
    common = ["--texts", str(texts), "--window", "32", "--windows", "4", "--results", str(tmp_path / "rows.jsonl")]
    return text_quality.main([str(checkpoint), "--work", str(tmp_path), *common, *arguments])


@pytest.mark.parametrize("backend, kv_cache_types", [("cuda", ["fp16"]), ("onnxruntime", ["fp32", "int8"])])
def test_rows_of_two_backends_compare(checkpoint, texts, tmp_path, driver, backend, kv_cache_types):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    formats = [{"cuda": "fp16", "onnxruntime": "fp32"}[backend], "int8"]
    options = ("--backend", backend, "--formats", *formats, "--kv-cache-types", *kv_cache_types, "--workers", "1")
    rows = measure(checkpoint, texts, tmp_path, *options)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    exact, rounded, *ours = rows
    assert [row["variant"] for row in (exact, rounded)] == ["float32", "bfloat16"] and exact["ratio"] == 1.0
    expected = [(backend, name, kind) for name in formats for kind in kv_cache_types]
    assert [(row["backend"], row["variant"], row["kv_cache_type"]) for row in ours] == expected
    assert {row["scored_tokens"] for row in rows} == {4 * 31} and len({row["texts"] for row in rows}) == 1
    assert all(math.isclose(row["ratio"], row["perplexity"] / exact["perplexity"], rel_tol=1e-4) for row in rows)
    assert ours[0]["ratio"] == pytest.approx(1.0, abs=2e-3)  # of weights in the checkpoint's own type
    assert {"date", "commit", "machine", "model"} <= ours[0].keys() and ("gpu" in ours[0]) == (backend == "cuda")


def test_windows_come_from_every_text_in_turn(checkpoint):
    tokenizer = Tokenizer(checkpoint)
    texts = ["a b c d " * 40, "x y z " * 9]
    found = text_quality.windows(tokenizer, texts, 16, 3)
    first, second = (tokenizer.encode(text) for text in texts)
    assert [ids.tolist() for ids in found] == [first[:16].tolist(), second[:16].tolist(), first[16:32].tolist()]
    with pytest.raises(SystemExit, match="windows of 16"):
        text_quality.windows(tokenizer, texts, 16, 1000)


def test_tokens_that_are_lost_are_counted_apart():
    found = text_quality.scores([np.log([0.5, 0.25]), np.array([-np.inf])])
    assert (found["scored_tokens"], found["lost_tokens"]) == (2, 1)
    assert found["perplexity"] == pytest.approx(math.sqrt(8), abs=1e-4)


def test_texts_for_calibration_are_others():
    assert not set(public_texts.other_texts()) & set(public_texts.texts())
    assert len(public_texts.texts()) == 14 and sum(map(len, public_texts.other_texts())) > 50_000


def test_a_file_of_texts_stays_as_it_is(tmp_path):
    path = tmp_path / "below" / "texts.json"
    assert public_texts.kept_texts(path) == public_texts.texts()
    path.write_text('["one"]')
    assert public_texts.kept_texts(path) == ["one"]
