"""KV caches in fp16 and int8 against the fp32 one: numerics, places, choices, bytes; and the reference of fp8."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

import checkpoints
import fakes
from engine_core.backends.onnxruntime import kv_scales
from engine_core.backends.onnxruntime import session as ort_session
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, BuildError, ConfigurationError
from engine_core.measure.steps import extend

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
MAX_CONTEXT = 64
PROMPT = np.random.default_rng(3).integers(33, 127, size=45)  # longer than every window
# Largest difference of a logit to the fp32 cache's, in standard deviations of those: docs/cpu_backend.md. Random
# weights are the worst case: their attention is flat, so that the errors of all positions meet in every output.
BOUNDS = {"fp16": 0.008, "int8": 0.2}
INT8 = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 27), reason="this ONNX Runtime has no int8 KV cache"
)
TYPES = ["fp16", pytest.param("int8", marks=INT8)]


def write_calibration(directory: Path) -> None:
    """A tokenizer of bytes, and text in it whose ids are as PROMPT's: any below 256."""
    fakes.write_tokenizer(directory)
    ids = np.random.default_rng(4).integers(33, 127, size=(12, 60))
    lines = [json.dumps({"text": bytes(row.tolist()).decode()}) for row in ids]
    (directory / "calibration.jsonl").write_text("\n".join(lines) + "\n")


def open_session(engine_dir: Path, manifest, kind: str) -> OrtSession:
    rows = manifest.model.vocab_size
    return OrtSession(engine_dir, manifest.model, rows, manifest.max_context, manifest.max_context, 1, kind)


@pytest.fixture(scope="module", params=checkpoints.DISTINCT)
def case(request, tmp_path_factory):
    """(engine directory, manifest) of every architecture."""
    directory = checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)
    write_calibration(directory)
    return directory / "engine", build_engine(directory, directory / "engine", max_context=MAX_CONTEXT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(checkpoint, engine directory, manifest)."""
    directory = checkpoints.write(tmp_path_factory.mktemp("llama3"), "llama3")
    write_calibration(directory)
    return directory, directory / "engine", build_engine(directory, directory / "engine")


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_the_fp32_cache_within_the_bound(case, kind):
    """A prefill in two chunks, then token by token; positions that are read before they are written would show."""
    expected, session = open_session(*case, "fp32"), open_session(*case, kind)
    session.kv_cache.view(np.uint8).fill(0x7E)  # fp16: NaN; int8: 126
    spread = []
    for start, end in ((0, 20), (20, 30)):
        for each in (expected, session):
            each.prefill(PROMPT[start:end], start)
        spread.append(np.abs(session.logits - expected.logits).max() / expected.logits.std())
    for position in range(30, len(PROMPT)):
        for each in (expected, session):
            each.decode(int(PROMPT[position]), position)
        spread.append(np.abs(session.logits - expected.logits).max() / expected.logits.std())
    assert 0 < max(spread) < BOUNDS[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_a_step_writes_its_own_position_and_no_other(llama, kind):
    _, engine_dir, manifest = llama
    session = open_session(engine_dir, manifest, kind)
    session.prefill(PROMPT[:40], 0)
    address, before = session.kv_cache.ctypes.data, session.kv_cache.copy()
    session.decode(int(PROMPT[40]), 40)
    changed = np.unique(np.argwhere(session.kv_cache != before)[:, 4])
    assert changed.tolist() == [40] and session.kv_cache.ctypes.data == address


@INT8
def test_the_int8_cache_holds_what_the_reference_makes_of_the_fp32_one(llama):
    """In the first layer, whose inputs are the same: a value on the edge between two steps may fall to either."""
    checkpoint, engine_dir, manifest = llama
    expected, session = open_session(engine_dir, manifest, "fp32"), open_session(engine_dir, manifest, "int8")
    for each in (expected, session):
        each.prefill(PROMPT, 0)
    sequences = [line for line in (checkpoint / "calibration.jsonl").read_text().splitlines()]
    ids = [np.frombuffer(json.loads(line)["text"].encode(), np.uint8).astype(np.int32) for line in sequences]
    scales = kv_scales.int8_scales(kv_scales.measure_peaks(engine_dir, manifest.model, manifest.model.vocab_size, ids))
    wanted = kv_scales.quantize_int8(expected.kv_cache[0, :, 0, :, :45], scales[0][:, :, None, :])
    difference = np.abs(session.kv_cache[0, :, 0, :, :45].astype(int) - wanted)
    assert difference.max() <= 1 and difference.mean() < 1e-3 and np.abs(wanted).max() > 100


@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_prefix_is_of_the_caches_own_type(llama, kind):
    _, engine_dir, manifest = llama
    config = EngineConfig(engine_dir, kv_cache_type=kind, prompt_cache_entries=2, prompt_cache_tokens=24)
    backend = OnnxRuntimeBackend.load(engine_dir, manifest, config)
    try:
        extend(backend, PROMPT[:24], 0)
        expected = backend._session.kv_cache[..., :24, :].copy()
        backend.save_kv(0, 0, 32, 24)
        extend(backend, PROMPT[::-1].copy(), 0)
        assert (backend._session.kv_cache[..., :24, :] != expected).any()
        backend.load_kv(0, 0, 32, 24)
        backend._call(int)  # the copy is queued
        assert (backend._session.kv_cache[..., :24, :] == expected).all() and expected.any()
        plan = OnnxRuntimeBackend.plan(engine_dir, manifest, config)
        assert backend._pool.dtype == expected.dtype and backend._pool.nbytes == plan.item("prefix_cache")
    finally:
        backend.close()


@pytest.mark.parametrize("kind, value_bytes, scales", [("fp32", 4, 0), ("fp16", 2, 0), ("int8", 1, 3 * 2 * 2 * 32 * 4)])
def test_the_plan_counts_the_bytes_of_the_type(llama, kind, value_bytes, scales):
    _, engine_dir, manifest = llama
    config = EngineConfig(engine_dir, kv_cache_type=kind, max_context=100, prompt_cache_tokens=50)
    plan = OnnxRuntimeBackend.plan(engine_dir, manifest, config)
    values = 3 * 2 * 2 * 100 * 32 * value_bytes
    assert plan.item("kv_cache") == values + scales and plan.item("prefix_cache") == values * 128 // 100
    assert plan.item("rope") == manifest.max_context * 32 * (2 if kind == "fp16" else 4)


def test_what_the_engine_opens_with_and_what_it_refuses(llama, tmp_path):
    checkpoint, engine_dir, manifest = llama
    assert manifest.kv_cache_type == "fp32"
    with pytest.raises(ConfigurationError, match="no 'fp8' KV cache; it has fp32, fp16 and int8"):
        OnnxRuntimeBackend.plan(engine_dir, manifest, EngineConfig(engine_dir, kv_cache_type="fp8"))
    only = build_engine(checkpoint, tmp_path / "only", kv_cache_type="fp32")
    with pytest.raises(ConfigurationError, match="built for fp32, fp16; .* --kv-cache-type int8"):
        OnnxRuntimeBackend.plan(tmp_path / "only", only, EngineConfig(tmp_path, kv_cache_type="int8"))
    small = build_engine(checkpoint, tmp_path / "small", kv_cache_type="int8")
    plan = OnnxRuntimeBackend.plan(tmp_path / "small", small, EngineConfig(tmp_path, max_context=100))
    assert small.kv_cache_type == "int8" and plan.item("kv_cache") < 100 * 3 * 2 * 2 * 32 * 2


def test_a_runtime_without_int8_caches_is_told(llama, monkeypatch):
    _, engine_dir, manifest = llama
    monkeypatch.setattr(ort_session, "_version", lambda: (1, 23))
    with pytest.raises(BackendUnavailableError, match="no int8 KV cache .* 1.27 is the first"):
        OnnxRuntimeBackend.load(engine_dir, manifest, EngineConfig(engine_dir, kv_cache_type="int8"))


@pytest.mark.parametrize(
    "name, text, message",
    [
        (None, "", "calibrated on text, but"),
        ("missing.txt", None, "does not exist"),
        ("short.txt", "Bring me the cup.", "has 17 tokens, expected at least 64"),
        ("bad.jsonl", '{"messages": 3}\n', "bad.jsonl:1 is no chat"),
        ("broken.jsonl", "{", "broken.jsonl:1 is not JSON"),
    ],
)
def test_calibration_text_that_will_not_do_is_refused(tmp_path, name, text, message):
    checkpoint = checkpoints.write(tmp_path / "checkpoint", "llama3")
    fakes.write_tokenizer(checkpoint)
    if name and text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BuildError, match=message):
        build_engine(
            checkpoint, tmp_path / "engine", kv_cache_type="int8", calibration=tmp_path / name if name else None
        )
    assert not (tmp_path / "engine").exists()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "engine"
    return directory, build_engine(DEMO, directory, quantization="int8", max_context=512)


@pytest.mark.parametrize("kind", TYPES)
def test_the_demo_model_says_the_same(demo, kind):
    """Teacher-forced, so that one other token does not change all that follow."""
    from engine_core.request import ChatMessage
    from engine_core.text.tokenizer import Tokenizer
    from tools.demo_model.grammar import Generator

    tokenizer, generator = Tokenizer(DEMO), Generator(1_000_003)
    expected, session = open_session(*demo, "fp32"), open_session(*demo, kind)
    same = total = 0
    for _ in range(12):
        messages = [ChatMessage(role, text) for role, text in generator.conversation("words").messages]
        ids = tokenizer.encode_messages(messages)[:400]
        for position, token_id in enumerate(ids):
            for each in (expected, session):
                each.decode(int(token_id), position)
            same += int(session.logits.argmax() == expected.logits.argmax())
            total += 1
    assert same / total > 0.98, f"{same} of {total}"
