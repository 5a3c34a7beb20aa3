"""Every request that was seen ends once on every topic, whichever way it came and whatever ended it."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus

from edgellm_ros.msg import ErrorCode, FinishReason, GenerationStats, Sentence
from edgellm_ros.srv import Cancel
from fake_backend import write_engine
from llm_client import ACTIVATE, CONFIGURE, DEACTIVATE, GREEDY_LONG, STREAM
from test_bad_input import TABLE


@pytest.fixture
def heard(llm):
    with hearing(llm) as heard:
        yield heard


@contextlib.contextmanager
def hearing(llm):
    """(sentences, stats) of the node from now on, and its pieces in llm.pieces."""
    llm.listen()
    sentences, stats = [], []
    subscriptions = [
        llm.node.create_subscription(Sentence, f"/{llm.name}/sentences", sentences.append, STREAM),
        llm.node.create_subscription(GenerationStats, f"/{llm.name}/stats", stats.append, STREAM),
    ]
    for topic in ("sentences", "stats"):
        llm.until(lambda topic=topic: llm.node.count_publishers(f"/{llm.name}/{topic}"))
    llm.spin(0.3)
    yield sentences, stats
    for subscription in subscriptions:
        llm.node.destroy_subscription(subscription)


def endings(llm, heard, request_id):
    """Return the message that ended the request on each topic, once nothing more comes."""
    sentences, stats = heard
    llm.until(lambda: any(message.request_id == request_id for message in stats))
    llm.spin(0.3)
    return (
        [piece for piece in llm.pieces_of(request_id) if piece.done],
        [sentence for sentence in sentences if sentence.request_id == request_id and sentence.done],
        [message for message in stats if message.request_id == request_id],
    )


def test_a_refused_request_ends_on_every_topic(llm, heard):
    answer = llm.generate(request_id="refused", sampling={"temperature": -1.0})
    assert answer.error_code == ErrorCode.INVALID_SAMPLING
    [piece], [sentence], [stats] = endings(llm, heard, "refused")
    assert piece.error_code == stats.error_code == ErrorCode.INVALID_SAMPLING
    assert sentence.text == "" and sentence.finish_reason == FinishReason.ERROR


def num_endings(llm, heard) -> dict[str, tuple[int, int, int]]:
    """Return how often each request that was heard of has ended on ~/tokens, ~/sentences and ~/stats."""
    streams = (
        [piece for piece in llm.pieces if piece.done],
        [sentence for sentence in heard[0] if sentence.done],
        heard[1],
    )
    counts = [Counter(message.request_id for message in messages) for messages in streams]
    return {name: tuple(count[name] for count in counts) for name in set().union(*counts)}


def test_all_kinds_of_bad_input_end_once_on_every_topic(llm, heard):
    """By service and by action, all at once, among requests that are answered."""
    llm.must_set(queue_depth=100)
    futures, goals = {}, {}
    for kind, fields, code, _ in TABLE:
        futures[f"{kind} by service"] = code, llm.generate_async(request_id=f"{kind} by service", **fields)
        futures[f"beside {kind}"] = ErrorCode.NONE, llm.generate_async(request_id=f"beside {kind}")
        goals[f"{kind} by action"] = code, llm.goal(request_id=f"{kind} by action", **fields)
    for code, future in futures.values():
        assert llm.wait(future).error_code == code
    for code, goal in goals.values():
        assert goal.accepted and goal.result()[1].error_code == code
    names = futures.keys() | goals.keys()
    llm.until(lambda: len(num_endings(llm, heard)) == len(names))
    llm.spin(0.5)
    assert num_endings(llm, heard) == {name: (1, 1, 1) for name in names}


def test_what_the_queue_ends_ends_once_on_every_topic(llm, heard):
    """A deadline that passes in the queue, a full queue, a preempted request and the one that takes its place."""
    long = {"max_new_tokens": 1900, "ignore_eos": True}  # 8 s
    llm.must_set(queue_depth=1)
    futures = {"running": llm.generate_async(request_id="running", sampling=long)}
    llm.until(lambda: llm.pieces_of("running"))
    futures["late"] = llm.generate_async(request_id="late", deadline=1.5)
    llm.status(lambda status: status.queued == 1)
    futures["refused"] = llm.generate_async(request_id="refused by the queue")
    assert llm.wait(futures["refused"]).error_code == ErrorCode.QUEUE_FULL
    assert llm.wait(futures["late"]).finish_reason == FinishReason.TIMEOUT
    llm.must_set(busy_policy="preempt")
    futures["next"] = llm.generate_async(request_id="next")
    assert llm.wait(futures["running"]).finish_reason == FinishReason.PREEMPTED
    assert llm.wait(futures["next"]).error_code == ErrorCode.NONE
    names = ("running", "late", "refused by the queue", "next")
    llm.until(lambda: len(num_endings(llm, heard)) == len(names))
    llm.spin(0.5)
    assert num_endings(llm, heard) == {name: (1, 1, 1) for name in names}


def test_requests_to_a_node_that_is_not_active_end_on_every_topic(nodes, engine_dir):
    """By service and as a rejected goal, unconfigured, inactive, and inactive again after it was active."""
    llm = nodes.start(engine_dir)
    with hearing(llm) as heard:
        for when, transitions in (("new", ()), ("configured", (CONFIGURE,)), ("again", (ACTIVATE, DEACTIVATE))):
            assert all(llm.change(transition) for transition in transitions)
            assert llm.generate(request_id=f"{when} service").error_code == ErrorCode.NOT_ACTIVE
            assert not llm.goal(request_id=f"{when} goal").accepted
            for way in ("service", "goal"):
                [piece], [sentence], [stats] = endings(llm, heard, f"{when} {way}")
                assert piece.error_code == stats.error_code == ErrorCode.NOT_ACTIVE
                assert sentence.finish_reason == FinishReason.ERROR


def test_cancel_reaches_a_service_request_and_speaks_no_half_sentence(llm, heard):
    future = llm.generate_async(request_id="service", sampling={"max_new_tokens": GREEDY_LONG, "ignore_eos": True})
    llm.until(lambda: llm.pieces_of("service"))
    assert llm.call(Cancel, "cancel", Cancel.Request(request_id="service")).num_cancelled == 1
    assert llm.wait(future).finish_reason == FinishReason.CANCELLED
    [piece], [sentence], [stats] = endings(llm, heard, "service")
    assert piece.finish_reason == sentence.finish_reason == stats.finish_reason == FinishReason.CANCELLED
    assert sentence.text == ""
    assert llm.call(Cancel, "cancel", Cancel.Request(request_id="service")).num_cancelled == 0


def test_cancel_without_an_id_reaches_all(llm):
    sampling = {"max_new_tokens": GREEDY_LONG, "ignore_eos": True}
    futures = [llm.generate_async(sampling=sampling) for _ in range(3)]
    llm.until(lambda: llm.status().queued == 2)
    assert llm.call(Cancel, "cancel", Cancel.Request()).num_cancelled == 3
    assert {llm.wait(future).finish_reason for future in futures} == {FinishReason.CANCELLED}


def test_a_length_limit_speaks_no_half_sentence(llm, heard):
    llm.generate(request_id="length", sampling={"max_new_tokens": 5, "ignore_eos": True})
    _, [sentence], _ = endings(llm, heard, "length")
    assert sentence.text == "" and sentence.finish_reason == FinishReason.LENGTH


def test_the_id_of_a_running_request_is_refused(llm, heard):
    sampling = {"max_new_tokens": GREEDY_LONG, "ignore_eos": True}
    first = llm.generate_async(request_id="twin", sampling=sampling)
    second = llm.generate(request_id="twin")
    assert second.error_code == ErrorCode.INVALID_REQUEST and "is running" in second.error_message
    llm.call(Cancel, "cancel", Cancel.Request(request_id="twin"))
    assert llm.wait(first).finish_reason == FinishReason.CANCELLED
    llm.until(lambda: len(heard[1]) >= 2)
    [piece], [sentence], stats = endings(llm, heard, "twin")  # the streams are the first one's
    assert piece.finish_reason == sentence.finish_reason == FinishReason.CANCELLED
    assert [message.error_code for message in stats] == [ErrorCode.INVALID_REQUEST, ErrorCode.NONE]


def test_whole_sentences_are_marked_as_such(nodes, tmp_path):
    llm = nodes.start(write_engine(tmp_path / "engine", script="One is done. Two is cut")).bring_up()
    llm.listen()
    heard = []
    llm.node.create_subscription(Sentence, f"/{llm.name}/sentences", heard.append, STREAM)
    llm.until(lambda: llm.node.count_publishers(f"/{llm.name}/sentences"))
    llm.spin(0.3)
    llm.generate(sampling={"max_new_tokens": 18})
    llm.until(lambda: any(sentence.done for sentence in heard))
    assert [(s.text, s.complete, s.done) for s in heard] == [("One is done.", True, False), ("", False, True)]


def test_diagnostics_warn_of_a_long_wait_and_have_percentiles(llm):
    llm.must_set(warn_wait=0.1)
    llm.generate()
    heard = []
    llm.node.create_subscription(DiagnosticArray, "/diagnostics", heard.append, 10)
    sampling = {"max_new_tokens": GREEDY_LONG, "ignore_eos": True}
    futures = [llm.generate_async(sampling=sampling) for _ in range(2)]

    def warned():
        statuses = [status for message in heard for status in message.status if f"/{llm.name}" in status.name]
        return [status for status in statuses if "has been waiting" in status.message]

    llm.until(warned)
    assert warned()[0].level == DiagnosticStatus.WARN
    assert {"time to first token, p50", "time to first token, p95"} <= {value.key for value in warned()[0].values}
    llm.call(Cancel, "cancel", Cancel.Request())
    for future in futures:
        llm.wait(future)
    llm.must_set(warn_wait=5.0)
