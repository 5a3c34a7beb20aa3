"""The intake of all fronts: each request gets one answer, whatever becomes of it before it reaches the worker."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest

from engine_core.errors import EngineFaultError, InvalidImageError, NotActiveError, QueueFullError
from engine_core.request import LIMITS, ChatMessage, FinishReason, GenerationRequest, RequestDefaults, SamplingParams
from engine_core.serving.intake import DuplicateRequestError, Intake
from engine_core.serving.worker import Worker

WAIT = 10.0
SCHEMA = '{"type": "integer"}'


class Panic(BaseException):
    """As a native library raises it."""


def request(request_id="r", **fields):
    sampling = SamplingParams(max_new_tokens=fields.pop("max_new_tokens", 5))
    return GenerationRequest(request_id, (ChatMessage("user", "hello"),), sampling=sampling, **fields)


class Images:
    """As a front gives them to the intake."""

    def __init__(self, read_images, count=1, num_bytes=1):
        self.read_images, self.count, self.num_bytes = read_images, count, num_bytes


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


def take(intake, *arguments, images=None, **fields):
    answers = Answers()
    answers.opened = intake.take(request(*arguments, **fields), on_done=answers, images=images)
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
    engine, begun, go_on = intake.state.engine, threading.Event(), threading.Event()
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda request: (begun.set(), go_on.wait(WAIT), prepare(request))[2])
    answers = take(intake, json_schema=SCHEMA, max_new_tokens=300)
    assert begun.wait(WAIT) and intake.cancel("r") == 1 and not answers.results
    go_on.set()
    assert answers.result.finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize("reason", [FinishReason.TIMEOUT, FinishReason.CANCELLED])
def test_a_request_ends_while_it_waits_for_a_thread(intake, monkeypatch, reason):
    intake.state.worker.update(queue_depth=16)
    engine, go_on = intake.state.engine, threading.Event()
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda request: (go_on.wait(WAIT), prepare(request))[1])
    others = [take(intake, f"busy {number}", json_schema=SCHEMA) for number in range(8)]  # all threads
    waiting = take(intake, json_schema=SCHEMA, timeout=0.05 if reason is FinishReason.TIMEOUT else 0.0)
    if reason is FinishReason.CANCELLED:
        assert intake.cancel("r") == 1
    result = waiting.result
    assert result.finish_reason is reason and result.error is None and not any(other.results for other in others)
    assert intake.heard == [result] and intake.cancel("r") == 0
    go_on.set()
    assert all(other.result.error is None for other in others)
    assert waiting.result is result  # once


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


@pytest.fixture
def seeing(intake):
    """The intake with an engine that takes images, as far as it is asked here."""
    intake.state.engine.images = SimpleNamespace(max_images=4)
    return intake


def test_images_are_read_by_another_thread(seeing):
    intake, threads = seeing, []

    def read_images(request, go_on):
        threads.append(threading.current_thread().name)
        return request.replace(messages=(ChatMessage("user", "other"),))

    answers, plain = Answers(), Answers()
    intake.take(request(), on_done=answers, images=Images(read_images))
    intake.take(request("s").replace(messages=(ChatMessage("user", "other"),)), on_done=plain)
    assert answers.result.text == plain.result.text and answers.result.error is None
    assert threads[0].startswith("edgellm-images")


def test_texts_do_not_wait_for_the_images_of_many_requests(seeing):
    go_on, num_reading, count = threading.Event(), threading.Semaphore(0), 12
    seeing.state.worker.update(queue_depth=count)

    def read_images(request, _):
        num_reading.release()
        assert go_on.wait(WAIT)
        return request

    seen = [Answers() for _ in range(count)]
    for index, answers in enumerate(seen):
        seeing.take(request(f"i{index}"), on_done=answers, images=Images(read_images))
    assert num_reading.acquire(timeout=WAIT) and num_reading.acquire(timeout=WAIT)
    assert take(seeing, "t", session="s").result.error is None
    assert not num_reading.acquire(blocking=False)
    go_on.set()
    assert all(answers.result for answers in seen)


@pytest.mark.parametrize("error", [InvalidImageError("No JPEG."), Panic("broken")])
def test_images_that_cannot_be_read_refuse_the_request(seeing, error):
    intake = seeing

    def read_images(request, go_on):
        raise error

    answers = Answers()
    intake.take(request(), on_done=answers, images=Images(read_images))
    assert answers.result.finish_reason is FinishReason.ERROR
    assert intake.num_open == 0 and len(intake.heard) == 1


def test_no_images_are_read_while_the_queue_is_full(seeing):
    intake = seeing
    intake.state.worker.update(busy_policy="reject")
    running = take(intake, "running", max_new_tokens=1000)
    answers = Answers()
    intake.take(request(), on_done=answers, images=Images(lambda *_: pytest.fail("they were read")))
    assert isinstance(answers.result.error, QueueFullError)
    running.opened.cancel()
    assert running.result.finish_reason is FinishReason.CANCELLED


def test_no_images_are_read_for_a_model_that_does_not_see(intake):
    answers = Answers()
    intake.take(request(), on_done=answers, images=Images(lambda *_: pytest.fail("they were read")))
    assert isinstance(answers.result.error, InvalidImageError)


class Held:
    """Images that are read when ``go_on`` is set."""

    def __init__(self):
        self.go_on, self.num_read = threading.Event(), 0

    def images(self, num_bytes=1):
        return Images(self._read, 1, num_bytes)

    def _read(self, request, check):
        self.num_read += 1
        assert self.go_on.wait(WAIT)
        check()
        return request


@pytest.fixture
def held(seeing):
    """Two requests whose images are being read, on an engine of one slot."""
    held = Held()
    held.first = [take(seeing, f"first {number}", images=held.images()) for number in range(2)]
    for _ in range(1000):
        if held.num_read == 2:
            break
        threading.Event().wait(0.005)
    assert held.num_read == 2
    yield held
    held.go_on.set()


def test_what_waits_to_be_prepared_counts_against_queue_depth(seeing, held):
    seeing.state.worker.update(queue_depth=4)
    taken = [take(seeing, str(number), images=held.images()) for number in range(6)]
    refused = [answers for answers in taken if answers.results]
    assert len(refused) == 3  # of the eight, five: one for the slot and four that wait
    assert all(isinstance(answers.result.error, QueueFullError) for answers in refused)
    assert "queue_depth 4" in str(refused[0].result.error) and seeing.num_refused == 3
    assert take(seeing, "plain").result.error is None  # what needs no thread waits for none
    held.go_on.set()
    assert all(answers.result.error is None for answers in (*held.first, *taken[:3]))
    assert not any(map(len, seeing._lines))


def test_bytes_that_wait_to_be_prepared_are_bounded(seeing, held):
    large = take(seeing, "large", images=held.images(2 * LIMITS.image_bytes))  # alone: it is judged by its own limits
    assert isinstance(take(seeing, "more", images=held.images()).result.error, QueueFullError)
    large.opened.cancel()
    assert large.result.finish_reason is FinishReason.CANCELLED
    more = take(seeing, "more", images=held.images())
    held.go_on.set()
    assert more.result.error is None


def test_the_highest_priority_is_prepared_first(seeing, held):
    order = []

    def images(name):
        return Images(lambda request, _: (order.append(name), request)[1])

    waiting = [take(seeing, name, images=images(name), priority=priority)
               for name, priority in (("a", 0), ("b", 3), ("c", 3), ("d", 9))]  # fmt: skip
    held.go_on.set()
    assert all(answers.result.error is None for answers in waiting)
    assert sorted(order[:2]) in (["b", "d"], ["c", "d"]) and "a" in order[2:]


def test_preempt_makes_room_in_the_line_and_ends_what_is_older(seeing, held):
    seeing.state.worker.update(queue_depth=1, busy_policy="preempt")
    high = take(seeing, "high", images=held.images(), priority=5)
    low = take(seeing, "low", images=held.images(), priority=1)
    newer = take(seeing, "newer", images=held.images(), priority=1)
    assert low.result.finish_reason is FinishReason.PREEMPTED and not high.results
    running = take(seeing, "plain", max_new_tokens=300, priority=2)  # takes the slot, and needs no thread
    assert newer.result.finish_reason is FinishReason.PREEMPTED and not high.results
    held.go_on.set()
    assert all(answers.result.finish_reason is FinishReason.PREEMPTED for answers in held.first)
    assert high.result.finish_reason is FinishReason.LENGTH
    assert running.result.finish_reason is FinishReason.PREEMPTED


def test_reject_refuses_while_another_is_prepared(seeing, held):
    seeing.state.worker.update(busy_policy="reject")
    assert isinstance(take(seeing, "r", images=held.images()).result.error, QueueFullError)


def test_images_stop_being_read_when_the_request_has_ended(seeing, held):
    cancelled, late = held.first
    cancelled.opened.cancel()
    held.go_on.set()
    assert cancelled.result.finish_reason is FinishReason.CANCELLED and late.result.error is None
    assert seeing.heard.count(cancelled.result) == 1


def test_images_are_counted_before_they_are_read(seeing):
    images = Images(lambda *_: pytest.fail("they were read"), count=5)
    assert "5 images" in str(take(seeing, images=images).result.error)
    bad = take(seeing, images=Images(images.read_images), timeout=-1.0)
    assert "deadline is -1.0" in str(bad.result.error)


@pytest.mark.parametrize("ended_by", ["a newer one", "its client"])
def test_what_has_ended_while_it_was_prepared_preempts_nothing(intake, monkeypatch, ended_by):
    intake.state.worker.update(busy_policy="preempt")
    engine, begun, go_on = intake.state.engine, threading.Event(), threading.Event()
    prepare = engine.prepare

    def held(request):
        if request.request_id == "old":
            begun.set()
            assert go_on.wait(WAIT)
        return prepare(request)

    monkeypatch.setattr(engine, "prepare", held)
    if ended_by == "its client":
        running = take(intake, "running", max_new_tokens=60)
    old = take(intake, "old", session="s")
    assert begun.wait(WAIT)
    if ended_by == "its client":
        old.opened.cancel()
    else:
        running = take(intake, "running", max_new_tokens=60)
    go_on.set()
    expected = FinishReason.CANCELLED if ended_by == "its client" else FinishReason.PREEMPTED
    assert old.result.finish_reason is expected and intake.heard.count(old.result) == 1
    assert running.result.finish_reason is FinishReason.LENGTH
    assert take(intake, "next", session="s").result.error is None  # the session is not busy


@pytest.mark.parametrize("end", ["answered", "cancelled", "late", "preempted", "refused", "unreadable"])
def test_nothing_is_kept_of_a_request_that_has_ended(seeing, held, end):
    """Also where no garbage is collected: what is kept may be hundreds of MiB."""
    read = held.images().read_images
    if end == "unreadable":

        def read(request, go_on):
            raise InvalidImageError("no")

    said, images = ChatMessage("user", "hello"), Images(read)
    kept = [weakref.ref(said), weakref.ref(images)]
    depth = 0 if end == "refused" else 1
    seeing.state.worker.update(queue_depth=depth, busy_policy="preempt" if end == "preempted" else "queue")
    answers = Answers()
    asked = GenerationRequest("r", (said,), sampling=SamplingParams(max_new_tokens=3), timeout=0.05 * (end == "late"))
    gc.collect()
    gc.disable()
    try:
        if end in ("answered", "unreadable", "cancelled", "late"):
            seeing.state.worker.update(queue_depth=4)
        opened = seeing.take(asked, on_done=answers, images=images)
        if end == "cancelled":
            opened.cancel()
        elif end == "preempted":
            newer = [take(seeing, str(number), images=held.images()) for number in range(2)]
        elif end in ("answered", "unreadable"):
            held.go_on.set()
        assert (answers.result.error is None) == (end not in ("refused", "unreadable"))
        del asked, said, images, read, opened
        wait_for(lambda: not any(each() for each in kept))
    finally:
        gc.enable()
    held.go_on.set()
    if end == "preempted":
        assert newer[-1].result.error is None


def wait_for(condition):
    for _ in range(400):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come")
