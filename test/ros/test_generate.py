"""Requests by service, action and topic: answers, streams, cancels, policies."""

from __future__ import annotations

import math
import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from std_msgs.msg import String

from edgellm_ros.conversions import to_result, to_stats
from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason, GenerationStats, Sentence, SpeculationCounts
from engine_core.request import GenerationResult
from llm_client import ABORTED, CANCELED, GREEDY_LONG, STREAM, SUCCEEDED, LlmClient

LONG = {"sampling": {"max_new_tokens": GREEDY_LONG}}


def test_service_answers_with_text_ids_and_figures(llm):
    answer = llm.generate("hi", request_id="mine", sampling={"max_new_tokens": 12})
    assert (answer.request_id, answer.error_code, answer.finish_reason) == ("mine", 0, FinishReason.LENGTH)
    assert answer.text == bytes(list(answer.token_ids)).decode() and len(answer.token_ids) == 12
    prompt = llm.tokenize(messages=[ChatMessage(role="user", content="hi")])
    metrics = answer.metrics
    assert (metrics.generated_tokens, metrics.prompt_tokens) == (12, len(prompt.token_ids))
    assert 0 < metrics.time_to_first_token < metrics.total_time and metrics.tokens_per_second > 0
    assert llm.generate("hi", sampling={"max_new_tokens": 12}).text == answer.text


def test_a_request_names_one_of_the_nodes_adapters(nodes, engine_dir):
    llm = nodes.start(engine_dir, lora_adapters=["sea:/somewhere", "hill:/elsewhere"]).bring_up()
    assert list(llm.info().adapters) == ["sea", "hill"]
    texts = [llm.generate("hi", adapter=name, sampling={"max_new_tokens": 12}).text for name in ("", "sea", "hill", "")]
    assert len(set(texts[:3])) == 3 and texts[3] == texts[0]
    answer = llm.generate("hi", adapter="lake", sampling={"max_new_tokens": 12})
    assert answer.error_code == ErrorCode.INVALID_REQUEST
    assert answer.error_message == "The adapter 'lake' is not loaded in this engine; it has sea, hill."


def test_action_streams_what_it_answers(llm):
    goal = llm.goal("hi", sampling={"max_new_tokens": 12})
    status, result = goal.result()
    assert status == SUCCEEDED and len(result.token_ids) == 12
    assert len(goal.text) >= 8 and result.text.startswith(goal.text)
    ids = [i for piece in goal.feedback for i in piece.token_ids]
    assert ids == list(result.token_ids)[: len(ids)]


def test_every_request_ends_with_one_done_and_no_gap(llm):
    llm.listen()
    answers = [llm.generate_async(str(i), request_id=f"r{i}") for i in range(5)]
    for i, answer in enumerate(answers):
        text = llm.wait(answer).text
        llm.until(lambda i=i: any(piece.done for piece in llm.pieces_of(f"r{i}")))
        pieces = llm.pieces_of(f"r{i}")
        assert [piece.sequence for piece in pieces] == list(range(len(pieces)))
        assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert "".join(piece.text for piece in pieces) == text and pieces[-1].finish_reason == FinishReason.LENGTH


def test_prompt_topic_is_answered_on_response(llm):
    heard = []
    llm.node.create_subscription(String, f"/{llm.name}/response", heard.append, 10)
    prompt = llm.node.create_publisher(String, f"/{llm.name}/prompt", 10)
    llm.until(lambda: prompt.get_subscription_count() and llm.node.count_publishers(f"/{llm.name}/response"))
    llm.spin(0.3)
    llm.must_set(max_new_tokens=9)
    prompt.publish(String(data="hello"))
    llm.until(lambda: heard)
    assert heard[0].data == llm.generate("hello", sampling={"max_new_tokens": 9}).text
    prompt.publish(String(data=" "))
    llm.until(lambda: len(heard) == 2)
    assert heard[1].data.startswith("Error: ")


def test_a_prompt_right_after_a_parameter_is_set_is_answered_with_it(llm):
    """rclpy takes what came on topics before the guard condition that had the node read its parameters."""
    heard = []
    llm.node.create_subscription(String, f"/{llm.name}/response", heard.append, 10)
    prompt = llm.node.create_publisher(String, f"/{llm.name}/prompt", 10)
    llm.until(lambda: prompt.get_subscription_count() and llm.node.count_publishers(f"/{llm.name}/response"))
    llm.spin(0.3)
    expected = {count: llm.generate("hello", sampling={"max_new_tokens": count}).text for count in (2, 5)}
    for number, count in enumerate((2, 5) * 25, start=1):
        llm.must_set(max_new_tokens=count)
        prompt.publish(String(data="hello"))
        llm.until(lambda: len(heard) == number)  # noqa: B023, called before the next turn
        assert heard[-1].data == expected[count]


@pytest.mark.alone
def test_cancel_returns_the_partial_text_and_keeps_the_kv(llm):
    goal = llm.goal("tell me", **LONG)
    llm.until(lambda: len(goal.feedback) >= 20)
    start = time.monotonic()
    assert goal.cancel().goals_canceling
    status, result = goal.result()
    assert time.monotonic() - start < 0.1  # some tokens of 4 ms, and the way there and back
    assert (status, result.finish_reason, result.error_code) == (CANCELED, FinishReason.CANCELLED, 0)
    assert 20 <= len(result.token_ids) < 200
    assert goal.text and result.text.startswith(goal.text)
    follow_up = [
        ChatMessage(role="user", content="tell me"),
        ChatMessage(role="assistant", content=result.text),
        ChatMessage(role="user", content="go on"),
    ]
    answer = llm.generate(messages=follow_up)
    assert answer.metrics.cached_tokens >= result.metrics.prompt_tokens + len(result.token_ids) - 2


def test_cancel_of_a_waiting_goal(llm):
    running, waiting = llm.goal("a", **LONG), llm.goal("b", **LONG)
    llm.status(lambda status: status.busy and status.queued == 1)
    waiting.cancel()
    status, result = waiting.result()
    assert (status, result.text, result.finish_reason) == (CANCELED, "", FinishReason.CANCELLED)
    assert not running.done
    running.cancel()
    running.result()


def test_policies(llm):
    llm.must_set(busy_policy="reject")
    goal = llm.goal("a", **LONG)
    llm.until(lambda: goal.feedback)
    assert llm.generate("b").error_code == ErrorCode.QUEUE_FULL
    refused = llm.goal("b")
    assert refused.result()[0] == ABORTED and refused.result()[1].error_code == ErrorCode.QUEUE_FULL
    llm.must_set(busy_policy="preempt")
    answer = llm.generate("b")
    status, result = goal.result()
    assert (status, result.finish_reason) == (ABORTED, FinishReason.PREEMPTED)
    assert answer.finish_reason == FinishReason.LENGTH
    assert result.text and result.error_code == 0
    llm.must_set(busy_policy="queue", queue_depth=1)
    goal = llm.goal("a", **LONG)
    llm.until(lambda: goal.feedback)
    waiting = llm.generate_async("b", request_id="b")
    llm.status(lambda status: status.busy and status.queued == 1)
    full = llm.generate("c")
    assert full.error_code == ErrorCode.QUEUE_FULL and "queue_depth is 1" in full.error_message
    goal.cancel()
    assert llm.wait(waiting).error_code == 0


def test_the_highest_priority_goes_first(llm):
    llm.listen()
    goal = llm.goal("a", **LONG)
    llm.until(lambda: goal.feedback)
    answers = [llm.generate_async("x", request_id=f"p{p}", priority=p) for p in (0, 5, 9)]
    llm.status(lambda status: status.queued == 3)
    goal.cancel()
    for answer in answers:
        llm.wait(answer)
    done = lambda: [p.request_id for p in llm.pieces if p.done and p.request_id in ("p0", "p5", "p9")]  # noqa: E731
    llm.until(lambda: len(done()) == 3)
    assert done() == ["p9", "p5", "p0"]


@pytest.mark.alone
@pytest.mark.parametrize("waiting", [False, True])
def test_deadline_counts_from_arrival(llm, waiting):
    goal = llm.goal("a", **LONG) if waiting else None
    answer = llm.generate("b", deadline=0.3, **LONG)
    assert answer.finish_reason == FinishReason.TIMEOUT and answer.error_code == 0
    assert 0.28 < answer.metrics.total_time < 0.5
    assert bool(answer.text) != waiting
    if goal is not None:
        goal.cancel()
        goal.result()


def test_request_timeout_is_the_default_deadline(llm):
    llm.must_set(request_timeout=0.2)
    assert llm.generate("b", **LONG).finish_reason == FinishReason.TIMEOUT


def test_sixteen_clients_get_what_they_would_get_alone(llm):
    alone = {str(i): llm.generate(f"question {i}").text for i in range(16)}
    assert len(set(alone.values())) == 16
    clients = [LlmClient(llm.name, llm.node_process) for _ in alone]
    try:
        futures = [client.generate_async(f"question {i}") for i, client in enumerate(clients)]
        for i, (client, future) in enumerate(zip(clients, futures)):
            assert client.wait(future).text == alone[str(i)]
    finally:
        for client in clients:
            client.close()


def test_seeded_sampling_is_reproducible(llm):
    def sample(seed):
        return llm.generate("s", sampling={"temperature": 1.0, "seed": seed, "max_new_tokens": 30}).text

    assert sample(7) == sample(7) != sample(8)
    llm.must_set(temperature=1.0, seed=7, max_new_tokens=30)
    unset = llm.generate("s", sampling={"ignore_eos": False})
    assert unset.text == sample(7)
    llm.must_set(seed=-1)
    fresh = {llm.generate("s", sampling={"ignore_eos": False}).text for _ in range(3)}
    assert len(fresh) == 3


def test_system_prompt_is_put_first_and_its_kv_is_reused(llm):
    llm.must_set(system_prompt="You are a robot with a long list of rules to follow.")
    explicit = [
        ChatMessage(role="system", content="You are a robot with a long list of rules to follow."),
        ChatMessage(role="user", content="hi"),
    ]
    first = llm.generate("hi")
    assert first.metrics.cached_tokens > 50  # computed when it was set
    assert first.text == llm.generate(messages=explicit).text
    own = [ChatMessage(role="system", content="Mine."), ChatMessage(role="user", content="hi")]
    assert llm.generate(messages=own).text != first.text


def test_the_energy_of_a_request_is_in_its_result_and_in_stats():
    for joules in (2.5, math.nan):  # NaN: the machine has no reading
        result = GenerationResult("1", energy_joules=joules)
        for message in (to_result(result), to_stats(result)):
            assert message.metrics.energy_joules == pytest.approx(joules, nan_ok=True)


def test_sentences_and_stats(nodes, tmp_path):
    from fake_backend import write_engine

    text = "I am coming. Dr. Who asked for 3.5 litres! Anything else"
    llm = nodes.start(write_engine(tmp_path / "e", script=text)).bring_up()
    sentences, stats = [], []
    llm.node.create_subscription(Sentence, f"/{llm.name}/sentences", sentences.append, STREAM)
    llm.node.create_subscription(GenerationStats, f"/{llm.name}/stats", stats.append, 10)
    llm.until(lambda: llm.node.count_publishers(f"/{llm.name}/sentences"))
    llm.spin(0.5)
    answer = llm.generate("hi", sampling={"max_new_tokens": 200})
    llm.until(lambda: sentences and sentences[-1].done and stats)
    assert answer.text == text and answer.finish_reason == FinishReason.STOP
    assert [s.text for s in sentences] == ["I am coming.", "Dr. Who asked for 3.5 litres!", "Anything else"]
    assert [s.sequence for s in sentences] == [0, 1, 2]
    assert stats[0].metrics.generated_tokens == answer.metrics.generated_tokens == stats[0].tokens_total
    assert stats[0].requests_total == 1


@pytest.mark.parametrize(("speculation", "max_draft"), [("auto", 7), ("off", 0)])
def test_speculation_is_counted_and_can_be_switched_off(nodes, tmp_path, speculation, max_draft):
    from fake_backend import write_engine

    text = "the red cup and the blue cup, the red cup and the blue cup, the red cup and the blue cup"
    engine = write_engine(tmp_path / "e", script=text, max_draft=7, step_time=0.004)
    llm = nodes.start(engine, speculation=speculation).bring_up()
    assert llm.info().max_draft == max_draft
    stats, health = [], []
    llm.node.create_subscription(GenerationStats, f"/{llm.name}/stats", stats.append, 10)
    llm.node.create_subscription(DiagnosticArray, "/diagnostics", health.append, 10)
    llm.until(lambda: llm.node.count_publishers(f"/{llm.name}/stats"))
    llm.spin(0.5)
    answers = [llm.generate("hi", sampling={"max_new_tokens": 200}) for _ in range(2)]
    assert [answer.text for answer in answers] == [text] * 2
    llm.until(lambda: len(stats) == 2)
    counts, total = [answer.metrics.speculation for answer in answers], stats[1].speculation_total
    assert [each.metrics.speculation for each in stats] == counts and stats[0].speculation_total == counts[0]
    for name in ("steps", "drafted", "accepted", "forced"):
        assert getattr(total, name) == sum(getattr(each, name) for each in counts)
    if max_draft:
        assert counts[0].drafted >= counts[0].accepted > 10 and 0 < counts[0].steps < counts[0].accepted
    else:
        assert total == SpeculationCounts()

    def reported():
        statuses = [status for message in health for status in message.status if f"/{llm.name}" in status.name]
        return {value.key: value.value for value in statuses[-1].values} if statuses else {}

    llm.until(lambda: reported().get("requests") == "2")
    expected = {"speculation, accepted": str(total.accepted), "speculation, steps": str(total.steps)}
    assert {key: reported().get(key) for key in expected} == (expected if max_draft else dict.fromkeys(expected))


def test_no_split_characters_and_no_leaked_stop_strings(nodes, tmp_path):
    from fake_backend import write_engine

    text = "Grüße aus 東京 🤖🏠 — STOP and more"
    llm = nodes.start(write_engine(tmp_path / "e", script=text)).bring_up()
    llm.listen()
    whole = llm.generate("hi", request_id="whole", sampling={"max_new_tokens": 200})
    cut = llm.generate("hi", request_id="cut", stop=["STOP"], sampling={"max_new_tokens": 200})
    llm.until(lambda: sum(piece.done for piece in llm.pieces) == 2)
    assert whole.text == text and cut.text == text[: text.index("STOP")]
    for answer in (whole, cut):
        pieces = [piece.text for piece in llm.pieces_of(answer.request_id)]
        assert "".join(pieces) == answer.text and "\ufffd" not in "".join(pieces)
    assert "S" not in "".join(piece.text for piece in llm.pieces_of("cut"))


def test_stream_interval_coalesces_pieces(llm):
    llm.must_set(stream_interval=100.0)
    goal = llm.goal("hi", sampling={"max_new_tokens": 100})  # 0.4 s
    _, result = goal.result()
    assert result.text.startswith(goal.text) and 2 <= len(goal.feedback) < 15
