"""Several sequences at a time on the CPU backend: the same tokens as alone, whoever else is there."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from engine_core.backends import SequenceStep
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import EngineFaultError, InvalidSamplingError
from engine_core.measure.random_checkpoint import write_random_checkpoint
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine
from engine_core.serving.worker import Worker
from ort_backends import opening
from small_llama import CONFIG, CONTEXT, COUNT, MASK, PROMPTS, REQUESTS, alone, together


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint", CONFIG, scale=0.15)


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def variant(request, checkpoint):
    directory = checkpoint.parent / request.param
    return directory, build_engine(checkpoint, directory, quantization=request.param, max_context=CONTEXT)


@pytest.fixture
def load(variant):
    with opening(variant, max_batch=4) as make:
        yield make


@pytest.mark.parametrize("kv_cache_type", ["fp32", "fp16"])
def test_a_sequence_has_the_tokens_it_has_alone(load, kv_cache_type):
    backend = load(max_batch=1, kv_cache_type=kv_cache_type)
    expected = [alone(backend, index) for index in range(4)]
    batched = load(kv_cache_type=kv_cache_type)
    found = together(batched, {0: 0, 1: 1, 2: 2, 3: 3})
    assert [found[index] for index in range(4)] == expected
    # Others, other slots, with a hole between them; some come later and some leave earlier.
    found = together(batched, {3: 0, 1: 1, 0: 3}, {1: 5, 0: 9}, {3: 12})
    assert found[3] == expected[3][:12] and (found[1], found[0]) == (expected[1], expected[0])


def test_quantized_weights_are_run_for_all_at_once_and_float32_for_each(load, variant):
    backend = load()
    assert [backend._session.can_batch(count) for count in (2, 3, 4)] == [variant[1].quantization != "fp32"] * 3
    runs = []
    decode_batch = backend._session.decode_batch
    backend._session.decode_batch = lambda ids, *rest: (runs.append(len(ids)), decode_batch(ids, *rest))[1]
    together(backend, {0: 0, 1: 1, 2: 3})
    assert set(runs) == ({1} if variant[1].quantization == "fp32" else {1, 2}), "slots 0 and 1 lie side by side"


def test_a_runtime_whose_rows_depend_on_each_other_is_used_for_one_at_a_time(load, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeBackend, "_rows_are_independent", lambda self: False)
    backend = load()
    assert not backend._session.can_batch(2)
    assert together(backend, {0: 2, 1: 1})[0] == alone(load(max_batch=1), 0)


def test_an_engine_without_a_batch_in_its_graph_runs_one_at_a_time(load, variant, monkeypatch, tmp_path):
    """Its sequences decode one after another, with the same tokens."""
    old = tmp_path / "old"
    old.mkdir()
    for path in variant[0].iterdir():
        (old / path.name).symlink_to(path)
    (old / "model.onnx").unlink()
    model = onnx.load(str(variant[0] / "model.onnx"), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":
                dim.dim_value = 1
    onnx.save(model, str(old / "model.onnx"))
    (old / "model.onnx.data").unlink()
    (old / "model.onnx.data").hardlink_to(variant[0] / "model.onnx.data")  # the runtime follows no links out
    backend = OnnxRuntimeBackend.load(old, variant[1], EngineConfig(old, max_batch=4, num_threads=1))
    try:
        assert not backend._session.can_batch(2)
        assert together(backend, {1: 0, 2: 1})[2] == alone(load(max_batch=1), 2)
    finally:
        backend.close()


def test_what_ends_one_sequence_leaves_the_others(load):
    """A mask that leaves nothing, an interrupt, a stop id and a full cache, while one goes on."""
    backend, single = load(max_context=64), load(max_batch=1, max_context=64)
    expected = alone(single, 0)
    stop = alone(single, 1)[2]
    for slot, index in enumerate((0, 1, 2, 3)):
        sampling, _ = REQUESTS[index]
        if index == 1:
            sampling = SamplingParams(**{**vars(sampling), "stop_token_ids": frozenset({stop})})
        backend.begin(slot, sampling, PROMPTS[index])
    tokens = [backend.step([SequenceStep(i, PROMPTS[i], 0) for i in range(4)])]
    nothing = np.zeros_like(MASK)
    for number in range(COUNT - 1):
        if number == 4:
            backend.interrupt(3)
        steps = [SequenceStep(0), SequenceStep(1), SequenceStep(2, mask=nothing if number == 6 else None)]
        tokens.append(backend.step([*steps, SequenceStep(3)]))
    assert [step[0].result() for step in tokens] == expected
    with pytest.raises(InvalidSamplingError):
        tokens[7][2].result()
    assert tokens[8][2].result() is None
    seconds = [step[1].result() for step in tokens]
    assert stop in seconds and seconds[seconds.index(stop) + 1 :] == [None] * (COUNT - 1 - seconds.index(stop))
    assert tokens[-1][3].result() is None
    full = [SequenceStep(0)] * (64 - len(PROMPTS[0]) - COUNT + 2)
    results = [backend.step([step])[0] for step in full]
    with pytest.raises(EngineFaultError, match="65 positions"):
        results[-1].result()


def test_prefixes_are_saved_from_one_slot_and_loaded_into_another(load):
    backend = load(prompt_cache_entries=1, prompt_cache_tokens=32)
    expected = alone(load(max_batch=1), 3)
    sampling, _ = REQUESTS[3]
    backend.begin(1, sampling, PROMPTS[3])
    backend.step([SequenceStep(1, PROMPTS[3], 0)])[0].result()
    backend.save_kv(1, 0, 0, 32)
    backend.load_kv(3, 0, 0, 32)
    backend.begin(3, sampling, PROMPTS[3])
    tokens = [backend.step([SequenceStep(3, PROMPTS[3][32:], 32)])[0].result()]
    tokens += [backend.step([SequenceStep(3)])[0].result() for _ in range(COUNT - 1)]
    # Another chunk than alone, so only what float32 computes is the same for sure.
    assert tokens[:4] == expected[:4]


def test_the_plan_counts_every_slot(variant):
    configs = [EngineConfig(variant[0], max_batch=count, speculation="off") for count in (1, 4)]
    one, four = (OnnxRuntimeBackend.plan(*variant, config) for config in configs)
    assert four.item("kv_cache") == 4 * one.item("kv_cache")
    assert four.item("io") > 3 * one.item("io") - 4 * 8 * 128 and four.item("prefix_cache") == one.item("prefix_cache")


@pytest.mark.slow
def test_the_demo_model_answers_three_people_as_it_answers_each(tmp_path):
    """Through the whole engine, with a schema, a seed and system prompts among them."""
    demo = Path(__file__).resolve().parents[2] / "models" / "demo"
    build_engine(demo, tmp_path / "engine", quantization="int8")
    schema = (demo / "plan.schema.json").read_text()
    commands = ["bring me the red cup", "go to the kitchen", "where is Anna?", "wait two minutes", "stop"]
    requests = [
        GenerationRequest(
            text, (ChatMessage("system", "You are a robot."), ChatMessage("user", text)),
            json_schema=schema if index % 2 else "",
            sampling=SamplingParams(temperature=0.8, seed=index, max_new_tokens=60),
        )
        for index, text in enumerate(commands)
    ]  # fmt: skip

    def answers(max_batch: int) -> dict[str, tuple[int, ...]]:
        config = EngineConfig(tmp_path / "engine", max_batch=max_batch, max_context=512, prefill_chunk=16)
        engine = Engine.open(config, lambda line: None)
        found: dict[str, tuple[int, ...]] = {}
        done = threading.Event()

        def note(result) -> None:
            assert result.error is None
            found[result.request_id] = result.token_ids
            if len(found) == len(requests):
                done.set()

        worker = Worker(engine)
        try:
            for request in requests:
                worker.submit(request, on_done=note)
            assert done.wait(120)
        finally:
            worker.close()
            engine.close()
        return found

    assert answers(3) == answers(1)
