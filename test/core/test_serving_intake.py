"""The intake of all fronts: each request gets one answer, whatever becomes of it before it reaches the worker."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from engine_core.errors import EngineFaultError, NotActiveError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, RequestDefaults, SamplingParams
from engine_core.serving.intake import DuplicateRequestError, Intake
from engine_core.serving.worker import Worker

WAIT = 10.0
SCHEMA = '{"type": "integer"}'


class Panic(BaseException):
    """As a native library raises it."""


def request(request_id="r", **fields):
    sampling = SamplingParams(max_new_tokens=fields.pop("max_new_tokens", 5))
    return GenerationRequest(request_id, (ChatMessage("user", "hello"),), sampling=sampling, **fields)


class Answers:
    def __init__(self):
        self.results, self.done = [], threading.Event()

    def __call__(self, result):
        self.results.append(result)
        self.done.set()

    @property
    def result(self):
        assert self.done.wait(WAIT)
        assert len(self.results) == 1
        return self.results[0]


@pytest.fixture
def intake(open_engine):
    engine = open_engine(step_time=0.005)
    state = SimpleNamespace(settings=RequestDefaults(), engine=engine, worker=Worker(engine))
    heard: list = []
    listener = SimpleNamespace(piece=heard.append, done=heard.append)
    intake = Intake(state, listen=lambda request: listener, on_refused=lambda result, error: heard.append(error))
    intake.heard = heard
    yield intake
    if state.worker is not None:
        assert state.worker.close()
    intake.close()


def take(intake, *arguments, **fields):
    answers = Answers()
    answers.opened = intake.take(request(*arguments, **fields), on_done=answers)
    return answers


def test_listeners_hear_every_piece_and_the_result(intake):
    counted = []
    intake.watch = counted.append
    result = take(intake).result
    assert "".join(piece.text for piece in intake.heard[:-1]) == result.text
    assert intake.heard[-1] is result and counted == [result]
    assert intake.num_open == 0 and intake.num_refused == 0


def test_an_id_is_used_by_one_request_at_a_time(intake):
    first = take(intake, "a", max_new_tokens=200)
    second = take(intake, "a")
    assert isinstance(second.result.error, DuplicateRequestError) and second.opened.begun.is_set()
    assert intake.cancel("a") == 1 and intake.num_refused == 1
    assert first.result.finish_reason is FinishReason.CANCELLED
    assert take(intake, "a").result.finish_reason is FinishReason.LENGTH


def test_a_request_is_cancelled_while_it_is_prepared(intake, monkeypatch):
    engine, go_on = intake.state.engine, threading.Event()
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda request: (go_on.wait(WAIT), prepare(request))[1])
    answers = take(intake, json_schema=SCHEMA, max_new_tokens=300)
    assert intake.cancel("r") == 1 and not answers.results
    go_on.set()
    assert answers.result.finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize("fields", [{}, {"json_schema": SCHEMA}])
def test_a_panic_is_that_requests_answer(intake, monkeypatch, fields):
    def panic(request):
        raise Panic("index out of bounds")

    with monkeypatch.context() as patched:
        patched.setattr(intake.state.engine, "prepare", panic)
        result = take(intake, **fields).result
    assert isinstance(result.error, EngineFaultError) and "index out of bounds" in str(result.error)
    assert take(intake, **fields).result.error is None


def test_nothing_is_taken_without_a_worker(intake):
    worker, intake.state.worker = intake.state.worker, None
    assert isinstance(take(intake).result.error, NotActiveError)
    assert worker.close()
