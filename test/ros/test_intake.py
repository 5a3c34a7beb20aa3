"""The head start of a first token: how long the executor leaves Python to the worker."""

from __future__ import annotations

import threading
import time

import pytest

from edgellm_ros import latency
from edgellm_ros.msg import ChatMessage, GenerationRequest
from edgellm_ros.node import LlmNode
from edgellm_ros.threads import Started
from engine_core.request import GenerationResult, Piece
from engine_core.serving.scheduler import Scheduler

HEAD_START = 1.5


class Worker:
    """``after_submit`` gets the request's callbacks."""

    def __init__(self, after_submit) -> None:
        self._after_submit = after_submit
        self.scheduler = Scheduler(1)

    def submit(self, request, *, on_piece, on_done, arrival, check) -> object:
        threading.Timer(0.05, self._after_submit, (on_piece, on_done)).start()
        return object()


@pytest.fixture
def take(monkeypatch):
    """Takes a request on this thread, as the executor's would; returns the seconds it was kept."""
    monkeypatch.setattr(latency, "HEAD_START", HEAD_START)
    node = LlmNode()

    def take(after_submit=lambda on_piece, on_done: None) -> float:
        node._state.worker = Worker(after_submit)
        request = GenerationRequest(messages=[ChatMessage(role="user", content="go to the kitchen")])
        start = time.perf_counter()
        kept.append(Started(node._intake.answer(request)))
        return time.perf_counter() - start

    kept: list[Started] = []
    yield take
    node.destroy_node()


@pytest.mark.alone
def test_it_ends_with_the_first_piece(take):
    assert 0.04 < take(lambda on_piece, on_done: on_piece(Piece(0, "go", (5,)))) < HEAD_START


@pytest.mark.alone
def test_it_ends_with_an_answer_without_pieces(take):
    assert 0.04 < take(lambda on_piece, on_done: on_done(GenerationResult("id"))) < HEAD_START


@pytest.mark.alone
def test_it_is_limited_and_not_for_a_second_request(take):
    assert HEAD_START <= take() < HEAD_START + 10.0
    assert take() < HEAD_START
