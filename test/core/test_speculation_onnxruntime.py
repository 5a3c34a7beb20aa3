"""Steps with drafts on the CPU backend: where they are exact, the ids and the KV are those of steps of one token."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

import fakes
from engine_core.backends import Draft, SequenceStep
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.session import MAX_DRAFT_ROWS
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError, InvalidSamplingError
from engine_core.measure.random_checkpoint import write_random_checkpoint
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine
from engine_core.serving.worker import Worker
from ort_backends import opening
from small_llama import CONFIG, CONTEXT, COUNT, MASK, PROMPTS, REQUESTS, VOCAB, alone

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = write_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint", CONFIG, scale=0.15)
    fakes.write_tokenizer(directory)
    fakes.write_calibration(directory)
    return directory


@pytest.fixture(scope="module", params=["int8", "int4"])
def variant(request, checkpoint):
    directory = checkpoint.parent / request.param
    return directory, build_engine(checkpoint, directory, quantization=request.param, max_context=CONTEXT)


@pytest.fixture
def load(variant):
    with opening(variant) as make:
        yield make


def with_drafts(backend, index: int, answer: list[int], seed: int, slot: int = 0) -> list[int]:
    """Return the tokens of a request whose steps have drafts: of ``answer``, some of them with a wrong token."""
    sampling, mask = REQUESTS[index]
    rng = np.random.default_rng(seed)
    backend.begin(slot, sampling, PROMPTS[index])
    found = [backend.step([SequenceStep(slot, PROMPTS[index], 0, mask)])[0].result()]
    while len(found) < COUNT:
        size = int(rng.integers(0, min(backend.max_draft, COUNT - len(found) - 1) + 1))
        if not size:
            found.append(backend.step([SequenceStep(slot, mask=mask)])[0].result())
            continue
        ids = np.array(answer[len(found) : len(found) + size], dtype=np.int32)
        if rng.random() < 0.5:
            ids[rng.integers(size)] = rng.integers(VOCAB)
        forced = (ids == answer[len(found) : len(found) + size]) & (rng.random(size) < 0.3)
        forced &= np.cumprod(ids == answer[len(found) : len(found) + size]).astype(bool)
        masks = None if mask is None else np.tile(mask, (size, 1))
        found += backend.step([SequenceStep(slot, mask=mask, draft=Draft(ids, forced, masks))])[0].result()
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_exact_drafts_give_the_tokens_and_the_kv_of_steps_of_one_token(load, threads):
    plain, fast = (load(kv_cache_type="int8", speculation=each, num_threads=threads) for each in ("off", "auto"))
    assert plain.max_draft == 0
    assert fast.exact_drafts and fast.max_draft == MAX_DRAFT_ROWS - 1
    for index in range(4):
        expected = alone(plain, index)
        for seed in range(3):
            assert with_drafts(fast, index, expected, seed) == expected
        length = len(PROMPTS[index]) + COUNT - 1
        kv = [backend._session.kv_cache[..., :length, :] for backend in (plain, fast)]
        assert np.array_equal(*kv)


def test_float32_weights_take_no_drafts(checkpoint):
    """One row of a float GEMM is summed in another order than several."""
    directory = checkpoint.parent / "fp32"
    manifest = build_engine(checkpoint, directory, quantization="fp32", max_context=CONTEXT)
    backend = OnnxRuntimeBackend.load(directory, manifest, EngineConfig(directory, kv_cache_type="int8"))
    assert not backend.exact_drafts and backend.max_draft == 0
    backend.close()


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_a_float_cache_takes_drafts_only_when_asked_to(load, kind):
    """Its attention rounds one row otherwise than several: texts stay the same for the same drafts."""
    assert load(kv_cache_type=kind).max_draft == 0
    backend = load(kv_cache_type=kind, speculation="on")
    assert backend.max_draft == MAX_DRAFT_ROWS - 1 and not backend.exact_drafts
    assert backend.step_cost([4]) == load(kv_cache_type=kind, speculation="on").step_cost([4]), "it is not measured"
    expected = alone(backend, 0)
    first = with_drafts(backend, 0, expected, 1)
    assert with_drafts(backend, 0, expected, 1) == first
    with pytest.raises(ConfigurationError, match="int8"):
        load(kv_cache_type=kind, speculation="on", max_batch=2)


def test_drafts_beside_other_sequences(load):
    plain, fast = load(kv_cache_type="int8", speculation="off"), load(kv_cache_type="int8", max_batch=3)
    expected = [alone(plain, index) for index in range(3)]
    for slot in range(3):
        fast.begin(slot, REQUESTS[slot][0], PROMPTS[slot])
    found = [[fast.step([SequenceStep(i, PROMPTS[i], 0, REQUESTS[i][1])])[0].result()] for i in range(3)]
    while len(found[0]) < COUNT - 4:
        steps = []
        for slot, tokens in enumerate(found):
            draft = None
            if slot != 1:
                ids = np.array(expected[slot][len(tokens) : len(tokens) + 3], dtype=np.int32)
                masks = None if slot == 0 else np.tile(MASK, (3, 1))
                draft = Draft(ids, np.zeros(3, dtype=bool), masks)
            steps.append(SequenceStep(slot, mask=REQUESTS[slot][1], draft=draft))
        for tokens, pending in zip(found, fast.step(steps)):
            sampled = pending.result()
            tokens += sampled if isinstance(sampled, tuple) else [sampled]
    for tokens, right in zip(found, expected):
        assert tokens == right[: len(tokens)]
    assert len(found[0]) == 1 + 4 * (len(found[1]) - 1)


def test_what_ends_a_sequence_within_a_draft(load):
    backend = load(kv_cache_type="int8")
    expected = alone(backend, 0)
    draft = Draft(np.array(expected[1:6], dtype=np.int32), np.zeros(5, dtype=bool))
    stop = SamplingParams(seed=0, stop_token_ids=frozenset({expected[3]}))
    backend.begin(0, stop, PROMPTS[0])
    steps = [[SequenceStep(0, PROMPTS[0], 0)], [SequenceStep(0, draft=draft)], [SequenceStep(0)]]
    first, found, after = (backend.step(step)[0] for step in steps)
    assert (first.result(), found.result(), after.result()) == (expected[0], tuple(expected[1:4]), None)
    # No token is left in the middle: those before are given, and the next step says so.
    masks = np.full((5, VOCAB // 32), 0xFFFFFFFF, dtype=np.uint32)
    masks[2] = 0
    backend.begin(0, REQUESTS[0][0], PROMPTS[0])
    backend.step([SequenceStep(0, PROMPTS[0], 0)])
    assert backend.step([SequenceStep(0, draft=draft._replace(masks=masks))])[0].result() == tuple(expected[1:4])
    with pytest.raises(InvalidSamplingError):
        backend.step([SequenceStep(0, mask=np.zeros(VOCAB // 32, dtype=np.uint32))])[0].result()
    backend.begin(0, REQUESTS[0][0], PROMPTS[0])
    backend.step([SequenceStep(0, PROMPTS[0], 0)])
    backend.interrupt(0)
    assert backend.step([SequenceStep(0, draft=draft)])[0].result() is None


def test_costs_grow_with_the_tokens(load):
    backend = load(kv_cache_type="int8", max_batch=3)
    costs = [backend.step_cost([rows]) for rows in range(1, MAX_DRAFT_ROWS + 1)]
    assert costs[0] == 1.0 and costs == sorted(costs)
    assert backend.step_cost([1, 1, 4]) == pytest.approx(backend.step_cost([1, 1]) + backend.step_cost([4]))


def test_a_graph_that_gives_the_last_logits_alone_takes_no_drafts(load, variant, tmp_path):
    """An engine of an older build runs on, without speculation."""
    old = tmp_path / "old"
    old.mkdir()
    for path in variant[0].iterdir():
        (old / path.name).symlink_to(path)
    name = "model.kv_int8.onnx"
    (old / name).unlink()
    model = onnx.load(str(variant[0] / name), load_external_data=False)
    graph = model.graph
    graph.input.remove(next(value for value in graph.input if value.name == "rows"))
    last = onnx.numpy_helper.from_array(np.array(-1, dtype=np.int64), "last")
    graph.initializer.append(last)
    for node in graph.node:
        if node.op_type == "GatherND":
            gather = onnx.helper.make_node("Gather", [node.input[0], "last"], list(node.output), name=node.name, axis=1)
            node.CopyFrom(gather)
    onnx.save(model, str(old / name))
    (old / "model.onnx.data").unlink()
    (old / "model.onnx.data").hardlink_to(variant[0] / "model.onnx.data")  # the runtime follows no links out
    backend = OnnxRuntimeBackend.load(old, variant[1], EngineConfig(old, kv_cache_type="int8", num_threads=1))
    try:
        assert backend.max_draft == 0
        assert alone(backend, 1) == alone(load(kv_cache_type="int8"), 1)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def demo_engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "engine"
    build_engine(DEMO, directory, quantization="int4")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [1, 3])
def test_the_demo_model_gives_the_same_answers_with_speculation(demo_engine, max_batch, monkeypatch):
    """Through the whole engine: a schema, free text, repeated requests, temperatures and penalties."""
    monkeypatch.setattr(OnnxRuntimeBackend, "step_cost", lambda self, rows: 1.0 + 0.01 * sum(rows))
    schema = (DEMO / "plan.schema.json").read_text()
    commands = ["bring me the red cup", "go to the kitchen and wait", "bring me the red cup from the table", "stop"]
    requests = [
        GenerationRequest(
            f"{index} {text}", (ChatMessage("user", text),), json_schema=schema if index % 2 else "",
            sampling=SamplingParams(
                temperature=(0.0, 0.8)[index // 2 % 2], seed=index, max_new_tokens=50,
                repetition_penalty=(1.0, 1.1)[index // 4],
            ),
        )
        for index in range(8)
        for text in commands
    ]  # fmt: skip
    found = {}
    for speculation in ("off", "auto"):
        config = EngineConfig(demo_engine, kv_cache_type="int8", speculation=speculation, max_batch=max_batch)
        engine = Engine.open(config, lambda line: None)
        found[speculation], done = {}, threading.Event()

        def note(result, answers=found[speculation], done=done) -> None:
            answers[result.request_id] = result.token_ids if result.error is None else result.error
            if len(answers) == len(requests):
                done.set()

        worker = Worker(engine, queue_depth=len(requests))
        try:
            for request in requests:
                worker.submit(request, on_done=note)
            assert done.wait(300)
        finally:
            worker.close()
            engine.close()
    assert found["auto"] == found["off"]
    assert engine.speculation.counts.accepted > 10
