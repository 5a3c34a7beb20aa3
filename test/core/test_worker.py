"""The worker: order, policies, deadlines, faults; each accepted request gets exactly one answer."""

from __future__ import annotations

import threading
import time

import pytest

from engine_core.errors import ConfigurationError, EmptyPromptError, EngineFaultError, NotActiveError, QueueFullError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams
from engine_core.serving.worker import Worker

WAIT = 10.0


class Client:
    """Collects what a request gets."""

    def __init__(self):
        self.pieces, self.results, self.done, self.first = [], [], threading.Event(), threading.Event()

    def on_piece(self, piece):
        self.pieces.append(piece)
        self.first.set()

    def on_done(self, result):
        self.results.append(result)
        self.done.set()

    @property
    def result(self):
        assert self.done.wait(WAIT), "no answer came"
        assert len(self.results) == 1
        return self.results[0]


def request(request_id="r", *, text="hello", max_new_tokens=10, priority=0, timeout=0.0):
    return GenerationRequest(
        request_id, (ChatMessage("user", text),), priority=priority, timeout=timeout,
        sampling=SamplingParams(max_new_tokens=max_new_tokens),
    )  # fmt: skip


@pytest.fixture
def start(open_engine):
    """Start workers, which have to end with the test."""
    workers = []

    def make(*, backend=None, **options):
        workers.append(Worker(open_engine(**(backend or {})), **options))
        return workers[-1]

    yield make
    for worker in workers:
        assert worker.close(), "the worker hangs"


def submit(worker, *args, **kwargs):
    client = Client()
    client.ticket = worker.submit(request(*args, **kwargs), on_piece=client.on_piece, on_done=client.on_done)
    return client


SLOW = {"step_time": 0.01}
LONG = {"max_new_tokens": 400}


def test_many_clients_get_their_own_answers(start):
    worker = start(queue_depth=64)
    alone = {text: submit(worker, text, text=text).result.text for text in map(str, range(16))}
    clients: dict[str, Client] = {}
    threads = [threading.Thread(target=lambda t=t: clients.update({t: submit(worker, t, text=t)})) for t in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, client in clients.items():
        assert client.result.text == alone[text] == "".join(piece.text for piece in client.pieces)
        assert client.result.request_id == text
    assert (worker.busy, worker.queued) == (False, 0)


def test_the_highest_priority_goes_first_and_equal_ones_in_order(start):
    worker = start(backend=SLOW)
    order = []
    running = submit(worker, **LONG)
    assert running.first.wait(WAIT)
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 9), ("e", 5)):
        worker.submit(request(name, max_new_tokens=1, priority=priority), on_done=lambda r: order.append(r.request_id))
    last = submit(worker, "z", max_new_tokens=1)
    running.ticket.cancel()
    assert last.result.request_id == "z"
    assert order == ["d", "b", "e", "a", "c"]


@pytest.mark.alone
def test_a_full_queue_refuses_at_once(start):
    worker = start(backend=SLOW, queue_depth=1)
    first = submit(worker, **LONG)
    assert first.first.wait(WAIT)
    second = submit(worker, max_new_tokens=1)
    began = time.monotonic()
    with pytest.raises(QueueFullError, match="queue_depth is 1"):
        submit(worker)
    assert time.monotonic() - began < 0.05
    first.ticket.cancel()
    assert second.result.generated_tokens == 1


def test_reject_refuses_while_one_runs(start):
    worker = start(backend=SLOW, busy_policy="reject")
    first = submit(worker, **LONG)
    with pytest.raises(QueueFullError, match="reject"):
        submit(worker)
    first.ticket.cancel()
    assert first.result.finish_reason is FinishReason.CANCELLED
    for _ in range(100):
        if not worker.busy:
            break
        time.sleep(0.01)
    assert submit(worker).result.finish_reason is FinishReason.LENGTH


def test_preempt_ends_what_has_no_higher_priority(start):
    worker = start(backend=SLOW, busy_policy="preempt", queue_depth=4)
    important = submit(worker, "important", priority=5, **LONG)
    assert important.first.wait(WAIT)
    low = submit(worker, "low", priority=1)
    newer = submit(worker, "newer", priority=1, max_new_tokens=2)
    assert low.result.finish_reason is FinishReason.PREEMPTED and not low.pieces
    assert not important.done.is_set()
    equal = submit(worker, "equal", priority=5, max_new_tokens=3)
    assert important.result.finish_reason is FinishReason.PREEMPTED
    assert important.result.text == "".join(piece.text for piece in important.pieces) != ""
    assert equal.result.generated_tokens == 3
    assert newer.result.finish_reason is FinishReason.PREEMPTED


def test_preempt_lower_keeps_equal_priorities(start):
    worker = start(backend={"step_time": 0.01}, busy_policy="preempt_lower")
    first = submit(worker, "first", max_new_tokens=20)
    assert first.first.wait(WAIT)
    equal = submit(worker, "equal", max_new_tokens=2)
    assert first.result.finish_reason is FinishReason.LENGTH and equal.result.finish_reason is FinishReason.LENGTH
    low = submit(worker, "low", max_new_tokens=200)
    assert low.first.wait(WAIT)
    submit(worker, "high", max_new_tokens=2, priority=1)
    assert low.result.finish_reason is FinishReason.PREEMPTED


def test_preempt_works_without_a_queue(start):
    worker = start(backend=SLOW, busy_policy="preempt", queue_depth=0)
    first = submit(worker, **LONG)
    assert first.first.wait(WAIT)
    assert submit(worker, max_new_tokens=2).result.generated_tokens == 2
    assert first.result.finish_reason is FinishReason.PREEMPTED


def test_deadlines_end_running_and_waiting_requests(start):
    worker = start(backend=SLOW)
    running = submit(worker, timeout=0.3, **LONG)
    waiting = submit(worker, timeout=0.1)
    assert waiting.result.finish_reason is FinishReason.TIMEOUT and not waiting.result.text
    assert 0.1 <= waiting.result.total_time < 0.3
    assert running.result.finish_reason is FinishReason.TIMEOUT
    assert 0.3 <= running.result.total_time < 0.45
    assert running.result.text == "".join(piece.text for piece in running.pieces) != ""


def test_a_finished_request_leaves_no_timer(start):
    worker = start()
    submit(worker, timeout=3600.0).result  # noqa: B018
    time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_cancelling_a_waiting_request_answers_it_at_once(start):
    worker = start(backend=SLOW)
    running = submit(worker, **LONG)
    assert running.first.wait(WAIT)
    waiting = submit(worker)
    waiting.ticket.cancel()
    assert waiting.result.finish_reason is FinishReason.CANCELLED
    assert not running.done.is_set() and worker.queued == 0
    waiting.ticket.cancel()
    running.ticket.cancel()
    running.ticket.cancel()
    assert running.result.finish_reason is FinishReason.CANCELLED


def test_a_bad_request_costs_nobody_else_anything(start):
    worker = start(backend=SLOW)
    running = submit(worker, max_new_tokens=20)
    with pytest.raises(EmptyPromptError):
        submit(worker, text="")
    assert running.result.generated_tokens == 20


def test_a_client_whose_callback_raises_harms_nobody(start):
    worker = start()

    def broken(value):
        raise RuntimeError("client is broken")

    worker.submit(request(), on_piece=broken, on_done=broken)
    assert submit(worker).result.finish_reason is FinishReason.LENGTH


def test_a_fault_answers_everybody_and_is_told_once(start):
    faults = []
    told = threading.Event()
    worker = start(backend={"fail_at": 30, "step_time": 0.01}, on_fault=lambda e: (faults.append(e), told.set()))
    running, waiting = submit(worker, **LONG), submit(worker)
    for client in (running, waiting):
        assert client.result.finish_reason is FinishReason.ERROR
        assert isinstance(client.result.error, EngineFaultError)
    assert told.wait(WAIT) and len(faults) == 1
    with pytest.raises(NotActiveError, match="fell off the bus"):
        submit(worker)


def test_close_cancels_and_drain_lets_finish(start):
    worker = start(backend=SLOW)
    running, waiting = submit(worker, max_new_tokens=50), submit(worker)
    assert running.first.wait(WAIT)
    assert worker.close(drain=True)
    assert running.result.generated_tokens == 50
    assert waiting.result.finish_reason is FinishReason.CANCELLED
    with pytest.raises(NotActiveError):
        submit(worker)

    worker = start(backend=SLOW)
    running = submit(worker, **LONG)
    assert running.first.wait(WAIT)
    began = time.monotonic()
    assert worker.close() and worker.close()
    assert time.monotonic() - began < 0.5
    assert running.result.finish_reason is FinishReason.CANCELLED


def test_draining_ends_at_its_timeout(start):
    worker = start(backend=SLOW)
    running = submit(worker, **LONG)
    assert running.first.wait(WAIT)
    began = time.monotonic()
    assert worker.close(drain=True, timeout=1.2)
    assert time.monotonic() - began < 2.0
    assert running.result.finish_reason is FinishReason.CANCELLED


def test_warming_comes_before_the_next_request(start):
    worker = start()
    worker.warm_system_prompt("You are a robot in a small house.")
    client = Client()
    messages = (ChatMessage("system", "You are a robot in a small house."), ChatMessage("user", "go"))
    worker.submit(request().replace(messages=messages), on_done=client.on_done)
    assert client.result.cached_tokens > 20


def test_settings_change_while_it_runs_and_bad_ones_are_refused(start):
    worker = start(backend=SLOW, queue_depth=0)
    running = submit(worker, **LONG)
    with pytest.raises(QueueFullError):
        submit(worker)
    worker.update(queue_depth=1)
    waiting = submit(worker, max_new_tokens=1)
    with pytest.raises(ConfigurationError, match="'sometimes'"):
        worker.update(busy_policy="sometimes")
    with pytest.raises(ConfigurationError, match="-1"):
        worker.update(queue_depth=-1)
    running.ticket.cancel()
    assert waiting.result.generated_tokens == 1


def test_a_thousand_requests_leave_memory_and_threads_where_they_were(start):
    import resource

    worker = start()
    for _ in range(50):
        submit(worker, max_new_tokens=4).result  # noqa: B018
    threads, memory = threading.active_count(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        submit(worker, max_new_tokens=4, timeout=60.0).result  # noqa: B018
    time.sleep(0.05)
    assert threading.active_count() <= threads + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 4096, "KiB"
