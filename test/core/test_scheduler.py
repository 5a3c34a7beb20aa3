"""Several sequences at a time: who holds the slots, what a step does, and that nobody's text depends on the others."""

from __future__ import annotations

import json
import threading

import pytest

import fakes
from engine_core.errors import EngineFaultError, InvalidSamplingError, QueueFullError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams
from engine_core.serving.scheduler import Scheduler
from engine_core.serving.sequence import Sequence
from engine_core.serving.worker import Worker

WAIT = 10.0
SCHEMA = json.dumps({"type": "object", "properties": {"do": {"enum": ["go", "stop"]}}, "required": ["do"],
                     "additionalProperties": False})  # fmt: skip


class Client:
    """A request and what it gets."""

    def __init__(self, engine, text="hello", *, priority=0, json_schema="", stop=(), **sampling):
        sampling = SamplingParams(**{"max_new_tokens": 12, **sampling})
        messages = (ChatMessage("user", text),)
        self.request = GenerationRequest(
            text, messages, sampling=sampling, priority=priority, json_schema=json_schema, stop=stop
        )
        self.pieces, self.results = [], []
        self.sequence = Sequence(
            engine.prepare(self.request), engine.tokenizer, on_piece=self.pieces.append, on_done=self.results.append
        )
        engine.scheduler.add(self.sequence)

    @property
    def text(self) -> str:
        (result,) = self.results
        assert result.error is None and result.text == "".join(piece.text for piece in self.pieces)
        return result.text


def run(engine) -> None:
    while engine.scheduler.has_work:
        engine.step()


VARIED = [
    ("greedy", {}),
    ("seeded", {"temperature": 1.0, "seed": 3}),
    ("hot", {"temperature": 5.0, "seed": 3, "top_p": 0.9, "min_p": 0.01}),
    ("penalty", {"repetition_penalty": 1.5, "max_new_tokens": 20}),
    ("biased", {"logit_bias": ((65, 100.0),)}),
    ("schema", {"json_schema": SCHEMA, "temperature": 1.0, "seed": 1}),
    ("one", {"max_new_tokens": 1}),
    ("stop id", {"stop_token_ids": tuple(range(70, 90)), "temperature": 1.0, "seed": 9}),
]


@pytest.mark.parametrize("num_slots", [2, 3, 8])
def test_a_text_does_not_depend_on_who_else_runs(open_engine, num_slots):
    alone = {}
    for text, options in VARIED:
        engine = open_engine()
        client = Client(engine, text, **options)
        run(engine)
        alone[text] = client.text
    engine = open_engine(num_slots=num_slots)
    clients = [Client(engine, text, **options) for text, options in VARIED]
    run(engine)
    assert {client.request.request_id: client.text for client in clients} == alone
    assert min(num_slots, 4) <= max(map(len, engine._backend.steps)) <= num_slots


def test_sequences_join_and_leave_between_steps(open_engine):
    engine = open_engine(num_slots=2)
    first = Client(engine, "a", max_new_tokens=9)
    engine.step()
    second = Client(engine, "b", max_new_tokens=2)
    third = Client(engine, "c", max_new_tokens=2)
    run(engine)
    assert [len(client.results) for client in (first, second, third)] == [1, 1, 1]
    slots = engine._backend.steps
    assert slots[0] == (0,) and slots[1] == (0, 1), "the second joins the running step"
    assert slots.count((0, 1)) == 4, "two tokens of the second and two of the third ran beside the first"


def test_without_a_schema_the_next_step_is_queued_before_the_last_token_is_read(open_engine):
    engine = open_engine(num_slots=2)
    clients = [Client(engine, text, max_new_tokens=30) for text in "ab"]
    for count in range(1, 6):
        engine.step()
        ahead = [client.sequence._num_queued - client.sequence.num_sampled for client in clients]
        assert ahead == ([1, 0] if count == 1 else [1, 1]), "the second one's prompt comes after the first one's"
        assert clients[0].sequence._num_queued == count
    with_schema = Client(engine, "c", json_schema=SCHEMA, max_new_tokens=99)
    clients[0].sequence.cancel.cancel()
    run(engine)
    assert json.loads(with_schema.text)["do"] in ("go", "stop")


def test_the_highest_priorities_hold_the_slots(open_engine):
    engine = open_engine(num_slots=2)
    order = []
    for text, priority in (("a", 0), ("b", 5), ("c", 1), ("d", 9)):
        Client(engine, text, priority=priority, max_new_tokens=3)
    for _ in range(40):
        engine.step()
        order += [s.request_id for s in engine.scheduler.running if s.request_id not in order]
    assert order == ["d", "b", "c", "a"] and not engine.scheduler.has_work


def test_what_one_request_is_at_fault_for_ends_its_sequence_alone(open_engine):
    everything = tuple((token_id, float("-inf")) for token_id in range(fakes.VOCAB_SIZE))
    engine = open_engine(num_slots=3)
    good, bad, panicking = Client(engine, "a"), Client(engine, "b", logit_bias=everything), Client(engine, "c")

    class Panic(BaseException):
        pass

    def panic(token):
        raise Panic("unwrap on None")

    panicking.sequence._reader.feed = panic
    run(engine)
    assert isinstance(bad.results[0].error, InvalidSamplingError)
    assert "unwrap on None" in str(panicking.results[0].error)
    assert good.text and good.results[0].finish_reason is FinishReason.LENGTH
    again = Client(engine, "a")
    run(engine)
    assert again.text == good.text


def test_a_cancel_ends_one_sequence_alone(open_engine):
    alone = open_engine()
    expected = Client(alone, "stays", max_new_tokens=40)
    run(alone)
    engine = open_engine(num_slots=2, step_time=0.001)
    stays, goes = Client(engine, "stays", max_new_tokens=40), Client(engine, "goes", max_new_tokens=400)
    for _ in range(5):
        engine.step()
    goes.sequence.cancel.cancel(FinishReason.TIMEOUT)
    run(engine)
    assert goes.results[0].finish_reason is FinishReason.TIMEOUT and 3 <= goes.results[0].generated_tokens <= 6
    assert stays.text == expected.text


def test_a_long_prompt_is_computed_in_parts_between_the_steps_of_the_others(open_engine):
    alone = open_engine()
    expected = [Client(alone, text, max_new_tokens=30) for text in ("short", "long " * 40)]
    run(alone)
    engine = open_engine(num_slots=3, prefill_chunk=16)
    first = Client(engine, "short", max_new_tokens=30)
    while not first.pieces:
        engine.step()
    before, long, other = len(first.pieces), Client(engine, "long " * 40, max_new_tokens=30), Client(engine, "b " * 20)
    num_steps = 0
    while not long.pieces:
        engine.step()
        num_steps += 1
        assert len(first.pieces) == before + num_steps or first.results, "it gets a token in every step"
    assert num_steps >= len(long.sequence.prepared.token_ids) // 16
    run(engine)
    assert [first.text, long.text] == [client.text for client in expected] and other.text
    parts = [call for call in engine._backend.calls if call[0] in ("prefill", "extend")]
    assert max(length for _, length, _ in parts) == 16 and sum(length for _, length, _ in parts) >= 240
    prompts = [sum(1 for step in steps if step is not None) for steps in engine._backend.prompts]
    assert max(prompts) == 1, "one part of one prompt in a step"


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_cancel_in_the_middle_of_a_prompt_keeps_what_is_there(open_engine, num_steps):
    engine = open_engine(num_slots=2, prefill_chunk=16)
    first, second = Client(engine, "x" * 150, max_new_tokens=3), Client(engine, "y" * 150, max_new_tokens=3)
    for _ in range(num_steps):
        engine.step()
    for client in (first, second):  # one in the middle of its prompt, the other before the first part
        client.sequence.cancel.cancel()
    run(engine)
    assert [client.results[0].finish_reason for client in (first, second)] == [FinishReason.CANCELLED] * 2
    again = Client(engine, "x" * 150, max_new_tokens=3)
    run(engine)
    fresh = open_engine()
    expected = Client(fresh, "x" * 150, max_new_tokens=3)
    run(fresh)
    assert again.text == expected.text
    assert again.results[0].cached_tokens >= 16 * (num_steps - 2)


def test_a_failing_device_is_a_fault_of_the_engine(open_engine):
    engine = open_engine(num_slots=2, fail_at=4)
    Client(engine, "a"), Client(engine, "b")
    with pytest.raises(EngineFaultError, match="fell off"):
        run(engine)


def test_a_conversation_goes_on_in_its_slot_and_another_keeps_its_own(open_engine):
    engine = open_engine(num_slots=2)
    turns = {name: [ChatMessage("user", f"I am {name}, and this is my story.")] for name in ("Anna", "Bert")}
    known = dict.fromkeys(turns, 0)
    for name in ("Anna", "Bert", "Anna", "Bert", "Bert", "Anna"):
        request = GenerationRequest(name, tuple(turns[name]), sampling=SamplingParams(max_new_tokens=6))
        results = []
        prepared = engine.prepare(request)
        engine.scheduler.add(Sequence(prepared, engine.tokenizer, on_piece=None, on_done=results.append))
        run(engine)
        assert results[0].cached_tokens >= known[name]
        known[name] = results[0].prompt_tokens
        turns[name] += [ChatMessage("assistant", results[0].text), ChatMessage("user", "go on")]


# --- admission ----------------------------------------------------------------------------------------------


def make_scheduler(engine, num_slots, running, waiting, **options) -> Scheduler:
    """With sequences of these priorities."""
    engine.scheduler = Scheduler(num_slots, **options)
    for priority in running:
        Client(engine, f"running {priority}", priority=priority)
        engine.scheduler.start_next().slot = len(engine.scheduler.running) - 1
    for priority in waiting:
        Client(engine, f"waiting {priority}", priority=priority)
    return engine.scheduler


@pytest.mark.parametrize(
    ("policy", "num_slots", "running", "waiting", "priority", "preempted"),
    [
        ("preempt", 1, [3], [1, 5], 3, ["waiting 1", "running 3"]),
        ("preempt_lower", 1, [3], [1, 5], 3, ["waiting 1"]),
        ("preempt", 2, [3], [], 9, []),  # a slot is free
        ("preempt", 2, [3, 1], [], 9, ["running 1"]),  # one is enough, the lowest
        ("preempt", 3, [3, 1, 2], [0], 2, ["waiting 0", "running 1"]),
        ("preempt_lower", 2, [3, 3], [], 3, []),
        ("preempt_lower", 2, [3, 1], [2], 3, ["waiting 2", "running 1"]),
        ("queue", 2, [1, 1], [1], 9, []),
    ],
)
def test_a_newcomer_ends_no_more_than_is_in_its_way(
    open_engine, policy, num_slots, running, waiting, priority, preempted
):
    scheduler = make_scheduler(open_engine(), num_slots, running, waiting, busy_policy=policy)
    assert sorted(s.request_id for s in scheduler.admit(priority)) == sorted(preempted)


def test_the_queue_is_bounded_beyond_the_slots(open_engine):
    scheduler = make_scheduler(open_engine(), 2, [0, 0], [0], queue_depth=1)
    with pytest.raises(QueueFullError, match="1 requests are waiting and queue_depth is 1"):
        scheduler.admit(0)
    scheduler = make_scheduler(open_engine(), 2, [0], [], queue_depth=0)
    assert scheduler.admit(0) == []
    scheduler = make_scheduler(open_engine(), 2, [0, 0], [], busy_policy="reject")
    with pytest.raises(QueueFullError, match="reject"):
        scheduler.admit(9)


def test_a_sequence_that_was_preempted_already_is_in_nobodys_way(open_engine):
    scheduler = make_scheduler(open_engine(), 1, [1], [], busy_policy="preempt", queue_depth=0)
    scheduler.running[0].cancel.cancel(FinishReason.PREEMPTED)
    assert scheduler.admit(0) == []


def test_a_worker_serves_as_many_as_there_are_slots(open_engine):
    engine = open_engine(num_slots=3, step_time=0.005)
    worker = Worker(engine, queue_depth=8)
    done, results = threading.Event(), {}

    def note(result):
        results[result.request_id] = result
        if len(results) == 6:
            done.set()

    def ask(index):
        messages = (ChatMessage("user", f"question {index}"),)
        return GenerationRequest(str(index), messages, sampling=SamplingParams(max_new_tokens=10))

    for index in range(6):
        worker.submit(ask(index), on_done=note)
    assert done.wait(WAIT)
    assert worker.close()
    assert max(map(len, engine._backend.steps)) == 3
    for index in range(6):
        alone = open_engine()
        client = Client(alone, f"question {index}", max_new_tokens=10)
        run(alone)
        assert results[str(index)].text == client.text
