"""Perplexity on the CUDA backend without a GPU: its own logic on a driver in host memory, held against transformers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
import vocab_checkpoints
from device_steps import GREEDY, TOLERANCE, generate
from engine_core import cli
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import reference
from engine_core.errors import EngineFaultError
from engine_core.formats.manifest import read_manifest
from engine_core.formats.vocab_map import write_vocab_map

IDS = np.random.default_rng(3).integers(3, 331, size=101).astype(np.int32)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(checkpoint directory, logits float64 [n, vocabulary] of IDS by transformers)."""
    directory = checkpoints.write(tmp_path_factory.mktemp("scored"), "llama3")
    for kind in ("fp16", "int8"):
        build_cuda(directory, directory / kind, quantization=kind, max_context=128)
    return directory, checkpoints.reference_logits(checkpoints.reference(directory), IDS).astype(np.float64)


def load(engine_dir, **config) -> CudaBackend:
    return CudaBackend.load(engine_dir, read_manifest(engine_dir), EngineConfig(engine_dir, **config))


def expected(logits: np.ndarray) -> np.ndarray:
    """float64 [n - 1]: of IDS[1:]."""
    return np.array([reference.log_probability(row, target) for row, target in zip(logits, IDS[1:], strict=False)])


def test_the_reference_is_a_logarithm_of_softmax():
    logits = np.random.default_rng(1).normal(size=50) * 5
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert [reference.log_probability(logits, row) for row in range(50)] == pytest.approx(np.log(softmax).tolist())
    assert reference.log_probability(logits, -1) == -np.inf


@pytest.mark.parametrize("config", [{}, {"prefill_chunk": 64}, {"max_batch": 3}, {"speculation": "on"}])
def test_log_probabilities_are_those_of_transformers(built, driver, config):
    """With a chunk of the whole text and with two; the first token that is scored is in either, or the last of all."""
    directory, logits = built
    backend, wanted = load(directory / "fp16", **config), expected(logits)
    tokens = generate(backend, IDS[:40], 4)
    allocations, used = backend._device.allocations, driver.used
    for first in (1, 64, 65, 100):
        found = backend.log_probabilities(IDS, first)
        assert found.shape == (len(IDS) - first,)
        assert np.abs(found - wanted[first - 1 :]).max() < TOLERANCE * logits.std()
    assert (backend._device.allocations, driver.used) == (allocations, used)
    assert generate(backend, IDS[:40], 4) == tokens
    backend.close()


def test_packed_weights_are_scored_as_they_decode(built, driver):
    """The last token's logits are those from which a step would sample it."""
    backend = load(built[0] / "int8", prefill_chunk=64)
    found = backend.log_probabilities(IDS, len(IDS) - 1)
    backend.begin(0, GREEDY, IDS)
    generate(backend, IDS[:-1], 0)
    logits = backend._device.download(backend._work["logits"]).astype(np.float64)
    assert found.tolist() == [pytest.approx(reference.log_probability(logits, IDS[-1]), abs=1e-5)]
    backend.close()


def test_tokens_that_the_head_lacks_have_no_probability(built, driver, tmp_path):
    directory, logits = built
    eos = read_manifest(directory / "fp16").eos_token_ids
    kept = np.unique([*eos, *IDS[::2]]).astype(np.int32)
    write_vocab_map(tmp_path / "map.safetensors", kept, {})
    backend = load(directory / "fp16", vocab_map=str(tmp_path / "map.safetensors"))
    found, inside = backend.log_probabilities(IDS, 1), np.isin(IDS[1:], kept)
    assert (np.isneginf(found) == ~inside).all() and 0 < inside.sum() < len(inside)
    rows = np.searchsorted(kept, IDS[1:])
    wanted = [reference.log_probability(logits[i, kept], int(rows[i])) for i in np.flatnonzero(inside)]
    assert np.abs(found[inside] - wanted).max() < TOLERANCE * logits.std()
    backend.close()


def test_a_damaged_model_is_a_fault(built, driver):
    backend = load(built[0] / "fp16")
    norm = backend._model.weights["norm"]
    backend._device.upload(norm, np.full(norm.shape, np.nan, dtype=np.float16))
    with pytest.raises(EngineFaultError):
        backend.log_probabilities(IDS, 1)
    backend.close()


def test_the_command_measures_an_engine_on_the_gpu(driver, tmp_path, capsys):
    directory = vocab_checkpoints.write_checkpoint(tmp_path / "checkpoint", "byte_level")
    build_cuda(directory, tmp_path / "engine", max_context=128)
    text = tmp_path / "text.txt"
    text.write_text(vocab_checkpoints.TEXT)
    assert cli.main(["evaluate", str(tmp_path / "engine"), "--texts", str(text), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["backend"], row["kv_cache_type"], row["lost_tokens"]) == ("cuda", "fp16", 0)
    assert row["scored_tokens"] > 100 and math.isfinite(row["perplexity"]) and row["perplexity"] > 1
