"""The judge of real models' answers finds what is wrong with one, and passes what is right."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonschema")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import real_model_checks, real_model_requests  # noqa: E402
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, Piece, SamplingParams  # noqa: E402
from engine_core.serving.worker import Worker  # noqa: E402


@pytest.fixture
def client(open_engine):
    engine = open_engine(max_context=2048)
    worker = Worker(engine, queue_depth=32)
    yield real_model_checks.Client(engine, worker)
    assert worker.close()


@pytest.mark.parametrize("case", real_model_checks.CASES)
def test_a_sound_engine_passes(client, case):
    judged = real_model_checks.CASES[case].run(client, 0.8, 3)
    assert judged.answers >= 4 and not judged.wrong


def test_wrong_answers_are_found(client):
    request = GenerationRequest("r", (ChatMessage("user", "a"),), sampling=SamplingParams(max_new_tokens=3))
    ((result, faults),) = client.ask(request)
    assert not faults and result.finish_reason is FinishReason.LENGTH
    whole = [Piece(0, result.text, result.token_ids)]

    def faults_of(pieces=whole, **changes):
        return " ".join(client._faults(request, pieces, dataclasses.replace(result, **changes)))

    assert "stream" in faults_of([]) and "gap" in faults_of([dataclasses.replace(whole[0], sequence=1)])
    assert "ids are not" in faults_of([dataclasses.replace(whole[0], token_ids=(1,))])
    assert "half a character" in faults_of(text=result.text + "\ufffd")
    assert "is not the ids'" in faults_of(text="?")
    assert "ended by length" in faults_of(generated_tokens=2)
    assert "ended by error" in faults_of(finish_reason=FinishReason.ERROR)


@pytest.mark.parametrize(("text", "fits"), [
    ('{"a":1}', True), ('{"a":1,"a":1}', False), ('{"a":2}', False), ('{"a":1', False), ("NaN", False),
    ('{"b":1}', False),
])  # fmt: skip
def test_a_value_that_misses_its_schema_is_found(text, fits):
    schema = '{"type":"object","properties":{"a":{"const":1}},"required":["a"],"additionalProperties":false}'
    assert (not real_model_checks.misfits(text, schema)) == fits


def test_every_kind_of_schema_compiles_for_any_seed(open_engine):
    import random

    engine = open_engine()
    for index in range(3 * len(real_model_requests.SCHEMAS)):
        kind, schema = real_model_requests.schema(random.Random(index), index)
        engine.prepare(GenerationRequest("r", prompt=kind, json_schema=schema))
