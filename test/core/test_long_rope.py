"""LongRoPE: every sequence has the factors of its own length, as in transformers, whatever is cached."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

import checkpoints
import fakes
from device_steps import TOLERANCE
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.engine import CancelToken, Engine
from engine_core.serving.worker import Worker

SWITCH = 64


def request(text: str, count: int, **fields) -> GenerationRequest:
    """A greedy request whose answer has ``count`` tokens."""
    sampling = SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True)
    return GenerationRequest(fields.pop("request_id", "r"), prompt=text, sampling=sampling, **fields)


def together(engine, requests) -> dict[str, tuple[int, ...]]:
    """Return the tokens of requests that are answered at the same time, by their ids."""
    found, done = {}, threading.Semaphore(0)

    def note(result):
        found[result.request_id] = result.token_ids
        done.release()

    worker = Worker(engine, queue_depth=len(requests))
    try:
        for each in requests:
            worker.submit(each, on_done=note)
        assert all([done.acquire(timeout=60) for _ in requests])
    finally:
        worker.close()
    return found


def token_by_token(engine, ids: np.ndarray, count: int) -> tuple[int, ...]:
    """Return the tokens after ``ids``, each computed by a prompt of its own of which nothing is cached."""
    found: list[int] = []
    for _ in range(count):
        prompt = np.concatenate([ids, np.array(found, dtype=np.int32)])
        prepared = dataclasses.replace(engine.prepare(request("x", 1)), token_ids=prompt)
        engine.pool.place_fresh([0])
        for piece in engine.generate(prepared, CancelToken()):
            found += piece.token_ids
    return tuple(found)


# --- on the CPU: Phi-3 with 64 original positions and an engine for 128 ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from engine_core.backends.onnxruntime.build import build_engine

    directory = tmp_path_factory.mktemp("phi3")
    checkpoints.write(directory, "phi3-longrope")
    fakes.write_tokenizer(directory)
    fakes.write_calibration(directory)
    build_engine(directory, directory / "fp32", max_context=128)
    return directory


@pytest.fixture
def open_phi3(checkpoint):
    engines = []

    def make(variant="fp32", **config):
        config = {"num_threads": 1, **config}
        engines.append(Engine.open(EngineConfig(checkpoint / variant, **config), report=lambda line: None))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Return a function from token ids to the ids that transformers goes on with."""
    import torch

    model = checkpoints.reference(checkpoint)

    def go_on(ids, count: int) -> tuple[int, ...]:
        given = torch.tensor([ids])
        with torch.no_grad():
            found = model.generate(given, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        return tuple(found[0, len(ids) :].tolist())

    return go_on


def test_prompts_and_answers_below_at_and_across_the_border_are_those_of_transformers(open_phi3, expected):
    alone, batch = open_phi3(), open_phi3(max_batch=3, prefill_chunk=16)
    counts = {20: 8, 50: 30, 63: 6, 64: 6, 65: 6, 90: 8}
    requests = [request(chr(97 + n % 26) * n, count, request_id=str(n)) for n, count in counts.items()]
    prompts = [alone.prepare(each).token_ids for each in requests]
    wanted = {
        each.request_id: expected(ids.tolist(), each.sampling.max_new_tokens) for each, ids in zip(requests, prompts)
    }
    assert [len(ids) for ids in prompts] == list(counts)
    assert {each.request_id: alone.answer(each).token_ids for each in requests} == wanted
    assert together(batch, requests) == wanted
    assert together(batch, requests[::-1]) == wanted  # with what is cached now


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_smaller_caches_and_drafts_across_the_border(checkpoint, open_phi3, kind):
    from engine_core.backends.onnxruntime.build import build_engine

    if kind == "int8":
        from engine_core.backends.onnxruntime.session import check_runtime

        try:
            check_runtime(kind)
        except BackendUnavailableError as error:
            pytest.skip(str(error))
        build_engine(checkpoint, checkpoint / "int8", quantization="int8", max_context=128, kv_cache_type="int8")
    options = dict(kv_cache_type=kind, variant="int8" if kind == "int8" else "fp32")
    plain, drafting = open_phi3(speculation="off", **options), open_phi3(**options)
    assert bool(drafting.speculation.max_draft) == (kind == "int8")
    asked = request("ab" * 29, 30)
    wanted = token_by_token(plain, plain.prepare(asked).token_ids, 30)
    assert plain.answer(asked).token_ids == wanted
    result = drafting.answer(asked)
    assert result.token_ids == wanted and bool(result.speculation.steps) == (kind == "int8")


def test_log_probabilities_are_those_of_the_whole_length(checkpoint, open_phi3):
    import torch

    ids = np.random.default_rng(4).integers(3, 331, size=70).astype(np.int32)
    logits = torch.tensor(checkpoints.reference_logits(checkpoints.reference(checkpoint), ids))
    wanted = torch.log_softmax(logits.double(), -1)[np.arange(4, 69), ids[5:]].numpy()
    assert np.allclose(open_phi3().log_probabilities(ids, 5), wanted, atol=1e-4)


# --- the kernels' references on a driver in host memory, the same model ---


@pytest.fixture(scope="module")
def cuda_dir(checkpoint):
    from engine_core.backends.cuda.build import build_cuda

    build_cuda(checkpoint, checkpoint / "cuda", max_context=128)
    return checkpoint / "cuda"


@pytest.fixture
def open_cuda(cuda_dir, driver):
    engines = []

    def make(**config):
        config = dict(backend="cuda", tune_kernels=False, **config)
        engines.append(Engine.open(EngineConfig(cuda_dir, **config), report=lambda line: None))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_prompts_and_answers_on_the_gpu_are_those_of_transformers(open_cuda, expected, use_cuda_graph):
    alone = open_cuda(use_cuda_graph=use_cuda_graph)
    batch = open_cuda(use_cuda_graph=use_cuda_graph, max_batch=3, prefill_chunk=32)
    counts = {20: 8, 58: 10, 64: 4, 65: 4, 90: 6}
    requests = [request(chr(97 + n % 26) * n, count, request_id=str(n)) for n, count in counts.items()]
    prompts = [alone.prepare(each).token_ids for each in requests]
    wanted = {
        each.request_id: expected(ids.tolist(), each.sampling.max_new_tokens) for each, ids in zip(requests, prompts)
    }
    assert {each.request_id: alone.answer(each).token_ids for each in requests} == wanted
    assert together(batch, requests) == wanted
    assert together(batch, requests[::-1]) == wanted  # with what is cached now


@pytest.mark.parametrize("max_batch", [1, 2])
def test_drafts_and_sessions_on_the_gpu_cross_the_border(open_cuda, max_batch):
    plain = open_cuda(prompt_cache_entries=0)
    drafting = open_cuda(speculation="on", max_batch=max_batch, session_memory=1, prompt_cache_entries=1)
    drafting._backend.step_cost = lambda rows: 1.0  # the stand-in's times say nothing of a GPU's
    asked = request("ab" * 29, 16)
    wanted = plain.answer(asked).token_ids
    result = drafting.answer(asked)
    assert result.token_ids == wanted and result.speculation.steps
    for text in ("abab" * 15, "ab" * 40, "ab" * 10):
        assert drafting.answer(request(text, 6)).token_ids == plain.answer(request(text, 6)).token_ids


@pytest.mark.parametrize("kind", ["fp16", "int8", "fp8"])
def test_log_probabilities_on_the_gpu_are_those_of_the_whole_length(checkpoint, open_cuda, monkeypatch, kind):
    """Of texts on both sides of the border, by turns, and after answers in the slot."""
    import torch

    model, engine = checkpoints.reference(checkpoint), open_cuda(kv_cache_type=kind, prefill_chunk=32)
    ids = np.random.default_rng(4).integers(3, 331, size=80).astype(np.int32)
    choose = engine._backend._choose_rope
    for count, text in ((70, "x" * 20), (40, "x" * 90), (65, ""), (64, ""), (80, "")):
        if text:
            engine.answer(request(text, 4))
        logits = torch.tensor(checkpoints.reference_logits(model, ids[:count]))
        wanted = torch.log_softmax(logits.double(), -1)[np.arange(4, count - 1), ids[5:count]].numpy()
        error = np.abs(engine.log_probabilities(ids[:count], 5) - wanted)
        if kind == "fp16":
            assert error.max() < TOLERANCE * logits.numpy().std(), count
        with monkeypatch.context() as others:
            others.setattr(engine._backend, "_choose_rope", lambda slot, is_long: choose(slot, not is_long))
            wrong = np.abs(engine.log_probabilities(ids[:count], 5) - wanted)
        assert error.mean() < wrong.mean() / 4, "the factors of the other lengths"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_smaller_cache_on_the_gpu_crosses_the_border(open_cuda, kind):
    """An answer goes on as a prompt of the same tokens does, whose KV is computed with the factors of its length."""
    engine = open_cuda(kv_cache_type=kind, max_batch=2)
    asked = request("ab" * 29, 16)
    wanted = token_by_token(engine, engine.prepare(asked).token_ids, 16)
    assert engine.answer(asked).token_ids == wanted
    both = [request("ab" * 29, 16, request_id="a"), request("x" * 20, 8, request_id="b")]
    assert together(engine, both) == {each.request_id: engine.answer(each).token_ids for each in both}


def test_a_context_within_the_border_has_one_table(cuda_dir, driver, open_cuda):
    from engine_core.backends.cuda.backend import CudaBackend
    from engine_core.formats.manifest import read_manifest

    manifest = read_manifest(cuda_dir)
    configs = [EngineConfig(cuda_dir, max_context=context) for context in (64, 128)]
    sizes = [CudaBackend.plan(cuda_dir, manifest, config).item("rope") for config in configs]
    row = 8 * 16  # (cos, sin) of 16 frequencies
    assert sizes == [64 * row, (64 + 128) * row] and manifest.options["rope_switch"] == 64
    small, large = open_cuda(max_context=64), open_cuda()
    assert (small._backend.rope_switch, large._backend.rope_switch) == (0, 64)
    assert small.answer(request("x" * 40, 6)).token_ids == large.answer(request("x" * 40, 6)).token_ids


def test_an_engine_of_before_has_the_factors_that_its_table_has(cuda_dir, tmp_path, driver):
    """Its manifest names no switch, and its RoPE table has one row for each position."""
    from engine_core.backends.cuda.backend import CudaBackend
    from engine_core.backends.cuda.weights import ROPE_NAME, WEIGHTS_NAME
    from engine_core.errors import EngineDirectoryError
    from engine_core.formats.manifest import read_manifest
    from engine_core.formats.safetensors_file import SafetensorsFile, SafetensorsWriter

    manifest, whole = read_manifest(cuda_dir), SafetensorsFile(cuda_dir / WEIGHTS_NAME)
    arrays = {name: np.array(whole.raw(name)) for name in whole.names()}
    arrays[ROPE_NAME] = arrays[ROPE_NAME][SWITCH:].copy()
    described = {name: (whole.dtype(name), array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(tmp_path / WEIGHTS_NAME, described) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    with pytest.raises(EngineDirectoryError, match="covers 64 positions, but max_context is 128"):
        CudaBackend.load(tmp_path, manifest, EngineConfig(tmp_path))
    before = dataclasses.replace(manifest, options={"dtype": manifest.options["dtype"]})
    backend = CudaBackend.load(tmp_path, before, EngineConfig(tmp_path, tune_kernels=False))
    assert backend.rope_switch == 0 and "rope_rows" not in backend._work
    backend.close()


# --- the engine, over a backend that tells when a step reads KV of the other kind ---


@pytest.mark.parametrize("options", [{}, {"max_draft": 5, "num_slots": 3, "prefill_chunk": 8}])
def test_no_step_reads_the_kv_of_another_length(open_engine, options):
    engine = open_engine(
        memory=4, rope_switch=SWITCH, config={"session_memory": 1, "prompt_cache_tokens": 99}, **options
    )
    plain = open_engine(memory=4, rope_switch=SWITCH, config={"prompt_cache_entries": 0})
    system, texts = "Be kind to everyone. ", ("a", "ab" * 20, "abc" * 14, "x" * 63, "y" * 64, "z" * 90)
    requests = [request(system + text, 25, request_id=str(number)) for number, text in enumerate(texts)]
    requests += [request(text, 25, request_id=f"{number} alone") for number, text in enumerate(texts)]
    wanted = {each.request_id: token_by_token(plain, plain.prepare(each).token_ids, 25) for each in requests}
    for order in (requests, requests[::-1]):
        assert together(engine, order) == wanted


def test_a_conversation_reuses_the_kv_of_its_own_length(open_engine):
    engine = open_engine(rope_switch=SWITCH, num_slots=2, config={"session_memory": 1})
    plain, history, cached, lengths = open_engine(rope_switch=SWITCH), (), [], []
    for text in ("hi", "yo", "go on, please", "once more", "thanks"):
        sampling = SamplingParams(temperature=0.0, max_new_tokens=8)
        asked = GenerationRequest("r", (ChatMessage("user", text),), sampling=sampling, session="anna")
        result = engine.answer(asked)
        history = (*history, ChatMessage("user", text))
        plain.pool.place_fresh([0])
        assert result.token_ids == plain.answer(GenerationRequest("r", history, sampling=sampling)).token_ids
        history = (*history, ChatMessage("assistant", result.text))
        cached.append(result.cached_tokens)
        lengths.append(result.prompt_tokens)
    assert lengths[1] + 8 <= SWITCH < lengths[2] and [bool(count) for count in cached] == [
        False,
        True,
        False,
        True,
        True,
    ]
