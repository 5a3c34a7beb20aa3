"""Sessions: the history that the engine keeps, what is left out of it, and its files."""

from __future__ import annotations

import json
import os
import resource
import threading

import numpy as np
import pytest

from engine_core.errors import InvalidRequestError, InvalidSessionError, PromptTooLongError, SessionBusyError
from engine_core.request import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
    ToolCall,
)
from engine_core.serving.engine import CancelToken
from engine_core.serving.sequence import Sequence
from engine_core.serving.session_files import SavedSession, load_session, save_session
from engine_core.serving.sessions import Sessions, fit_turns, without_oldest
from engine_core.serving.worker import Worker
from engine_core.vision.images import Image
from fakes import END, text_ids

SYSTEM = ChatMessage("system", "Be kind.")


def ask(text, session="anna", *, system="", max_new_tokens=8, **fields) -> GenerationRequest:
    messages = (*((ChatMessage("system", system),) if system else ()), ChatMessage("user", text))
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return GenerationRequest("r", messages, sampling=sampling, session=session, **fields)


def run(engine, request, cancel=None):
    return engine.answer(request, cancel=cancel)


def turns(*texts: str) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))


def test_a_session_answers_as_the_whole_conversation_would(open_engine):
    engine, other = open_engine(), open_engine()
    history = (SYSTEM,)
    for number, text in enumerate(("hello", "and now?", "thanks"), start=1):
        result = run(engine, ask(text, default_system=SYSTEM.content))
        history = (*history, ChatMessage("user", text))
        whole = run(other, GenerationRequest("r", history, sampling=SamplingParams(max_new_tokens=8)))
        assert (result.text, result.prompt_tokens) == (whole.text, whole.prompt_tokens)
        assert (result.session_turns, whole.session_turns) == (number, 0)
        history = (*history, ChatMessage("assistant", result.text))
        assert engine.sessions.info("anna").messages == history
    assert result.cached_tokens > 60  # of what came before


def test_sessions_are_apart_and_take_new_system_messages_and_whole_conversations(open_engine):
    engine = open_engine([*text_ids("yes"), END])
    run(engine, ask("one", system="A"))
    run(engine, ask("two", "ben"))
    run(engine, ask("three", system="B", default_system="C"))
    anna = engine.sessions.info("anna")
    assert anna.messages == (ChatMessage("system", "B"), *turns("one", "yes", "three", "yes"))
    assert engine.sessions.info("ben").messages == turns("two", "yes")
    whole = (*turns("one", "yes", "three", "yes"), ChatMessage("user", "four"))
    run(engine, GenerationRequest("r", whole, session="anna"))
    assert engine.sessions.info("anna").messages == (anna.messages[0], *whole, ChatMessage("assistant", "yes"))


def test_a_busy_session_refuses_and_one_that_was_reset_gets_no_answer(open_engine):
    engine = open_engine([*text_ids("yes"), END])
    first = engine.prepare(ask("one"))
    with pytest.raises(SessionBusyError, match="'anna' is answering"):
        engine.prepare(ask("two"))
    assert run(engine, ask("two", "ben")).session_turns == 1
    list(engine.generate(first, CancelToken()))
    second = engine.prepare(ask("two"))
    assert engine.sessions.info("anna").is_answering
    engine.reset_session("anna")
    list(engine.generate(second, CancelToken()))
    assert [info.name for info in engine.sessions.list()] == ["ben"] and engine.pool.kept_tokens("anna") == 0
    begun = engine.prepare(ask("three"))
    assert {info.name: info.num_turns for info in engine.sessions.list()} == {"ben": 1, "anna": 0}
    with pytest.raises(InvalidSessionError, match="no answer yet"):
        engine.sessions.fork("anna", "eve")
    assert {info.name for info in engine.reset_sessions()} == {"ben", "anna"}  # its first answer comes too late
    list(engine.generate(begun, CancelToken()))
    assert run(engine, ask("four")).session_turns == 1


def test_what_was_spoken_is_kept_and_what_failed_leaves_no_turn(open_engine):
    engine = open_engine(max_context=128)
    cancel = CancelToken()
    generator = engine.generate(engine.prepare(ask("one", max_new_tokens=40)), cancel)
    next(generator)
    cancel.cancel()
    with pytest.raises(StopIteration) as stop:
        while True:
            next(generator)
    result = stop.value.value
    assert result.finish_reason is FinishReason.CANCELLED and result.session_turns == 1
    assert engine.sessions.info("anna").messages == turns("one", result.text)
    cancel = CancelToken()
    cancel.cancel()
    assert run(engine, ask("two"), cancel).session_turns == 0  # nothing was spoken
    with pytest.raises(InvalidRequestError):
        engine.prepare(ask("two", adapter="lake"))
    with pytest.raises(PromptTooLongError):
        engine.prepare(ask("x" * 200))
    engine.generate(engine.prepare(ask("two", "ben")), CancelToken()).close()
    assert engine.sessions.info("anna").messages == turns("one", result.text)
    assert not engine.sessions.info("anna").is_answering


def test_a_request_that_the_worker_refuses_leaves_its_session_free(open_engine):
    engine, done = open_engine(), threading.Event()
    worker = Worker(engine)
    worker.close()
    with pytest.raises(Exception, match="not active"):
        worker.submit(ask("one"), on_done=lambda result: done.set())
    engine.prepare(ask("one")).turn.leave()
    assert not done.is_set() and engine.sessions.list() == []


def test_a_prepared_request_that_is_dropped_leaves_its_session_free(open_engine):
    engine = open_engine()
    prepared = engine.prepare(ask("one"))
    with pytest.raises(SessionBusyError):
        engine.prepare(ask("one"))
    del prepared
    assert engine.sessions.list() == []
    engine.generate(engine.prepare(ask("one")), CancelToken())  # never begun
    assert run(engine, ask("one")).session_turns == 1


def test_a_session_goes_on_with_another_adapter_whose_kv_is_its_own(open_engine):
    config = {"session_memory": 1, "lora_adapters": ("lake:/nowhere",)}
    engine, fresh = open_engine(config=config), open_engine(config=config)
    history, cached = (), []
    for text, adapter in (("one", ""), ("two", "lake"), ("three", ""), ("four", "lake")):
        result = run(engine, ask(text, adapter=adapter))
        history = (*history, ChatMessage("user", text))
        sampling = SamplingParams(max_new_tokens=8)
        fresh.pool.place_fresh([0])
        whole = run(fresh, GenerationRequest("r", history, sampling=sampling, adapter=adapter))
        assert result.text == whole.text
        history = (*history, ChatMessage("assistant", result.text))
        cached.append(result.cached_tokens)
    assert engine.sessions.info("anna").messages == history
    first, second = (len(engine.tokenizer.encode_messages(history[:count])) for count in (1, 3))
    assert cached[:2] == [0, 0] and first < cached[2] < second < cached[3]


def test_sessions_beside_each_other_with_schemas_and_speculation_answer_as_alone(open_engine):
    names = ("anna", "ben", "eve", "")
    schema = json.dumps({"enum": ["bring", "wait", "wonder"]})

    def request(name, number):
        text = f"{number} {name} says {number}"
        return ask(text, name, max_new_tokens=20, json_schema=schema if name == "ben" else "").replace(request_id=name)

    alone, found = open_engine(memory=3), {}
    expected = {(name, number): run(alone, request(name, number)).text for number in range(3) for name in names}
    engine = open_engine(memory=3, num_slots=2, max_draft=5, prefill_chunk=8, config={"session_memory": 1})
    worker = Worker(engine, queue_depth=8)
    try:
        for number in range(3):
            done = threading.Semaphore(0)

            def note(result, number=number, done=done):
                found[result.request_id, number] = result.text
                done.release()

            for name in names:
                worker.submit(request(name, number), on_done=note)
            assert all([done.acquire(timeout=20) for _ in names])
    finally:
        worker.close()
    assert found == expected
    assert [engine.sessions.info(name).num_turns for name in names[:3]] == [3, 3, 3]


def test_a_late_or_cancelled_request_frees_its_session(open_engine):
    engine, results = open_engine(step_time=0.005), {}
    worker = Worker(engine)
    done = threading.Semaphore(0)

    def submit(name, **fields):
        def note(result):
            results[name] = result
            done.release()

        return worker.submit(ask("hello", name, max_new_tokens=400, **fields), on_done=note)

    try:
        submit("spoken", timeout=0.3)
        submit("waiting", timeout=0.1)
        waiting = submit("cancelled")
        waiting.cancel()
        assert all([done.acquire(timeout=20) for _ in range(3)])
    finally:
        worker.close()
    assert {name: (each.finish_reason.name, each.session_turns) for name, each in results.items()} == {
        "spoken": ("TIMEOUT", 1), "waiting": ("TIMEOUT", 0), "cancelled": ("CANCELLED", 0)
    }  # fmt: skip
    (info,) = engine.sessions.list()
    assert info.messages == turns("hello", results["spoken"].text) and not info.is_answering


def test_a_whole_conversation_is_no_new_one_where_its_oldest_turns_were_left_out(open_engine):
    engine = open_engine([*text_ids("yes"), END], max_context=160)
    whole, dropped = (SYSTEM,), 0
    for number in range(12):
        whole = (*whole, ChatMessage("user", f"question {number}"))
        fields = {"sampling": SamplingParams(max_new_tokens=8), "context_policy": "drop_oldest"}
        result = run(engine, GenerationRequest("r", whole, session="anna", **fields))
        whole = (*whole, ChatMessage("assistant", result.text))
        dropped += result.dropped_turns
        messages = engine.sessions.info("anna").messages
        assert len(messages) == 2 * (number + 1 - dropped) + 1
        assert messages == (SYSTEM, *whole[-len(messages) + 1 :])
    assert dropped


def test_there_are_max_sessions_at_most(open_engine):
    engine = open_engine(config={"max_sessions": 2})
    run(engine, ask("one", "a"))
    begun = engine.prepare(ask("one", "b"))
    with pytest.raises(InvalidSessionError, match="2 sessions already"):
        engine.prepare(ask("one", "c"))
    with pytest.raises(InvalidSessionError, match="2 sessions already"):
        engine.sessions.fork("a", "c")
    begun.turn.leave()
    engine.sessions.fork("a", "c")
    assert run(engine, ask("two", "a")).session_turns == run(engine, ask("three", "c")).session_turns == 2
    for source, target in (("x", "d"), ("a", "c"), ("a", "a/b")):
        with pytest.raises(InvalidSessionError):
            engine.sessions.fork(source, target)


def test_the_oldest_turns_are_left_out_and_the_system_message_stays(open_engine):
    engine = open_engine(max_context=256)
    dropped = []
    for number in range(12):
        result = run(engine, ask(f"question {number}", default_system=SYSTEM.content, context_policy="drop_oldest"))
        dropped.append(result.dropped_turns)
        assert result.finish_reason is FinishReason.LENGTH and result.generated_tokens == 8
        messages = engine.sessions.info("anna").messages
        assert messages[0] == SYSTEM and messages[1].role == "user" and result.prompt_tokens <= 248
        assert messages[-2].content == f"question {number}"
        assert sum(dropped) == number + 1 - len(messages) // 2
    assert max(dropped) > 1 and dropped.count(0) > 8  # several at once, so that it does not happen in every turn
    with pytest.raises(PromptTooLongError):
        for number in range(12):
            run(engine, ask(f"question {number}"))
    before = engine.sessions.info("anna").messages
    for fields in ({"text": "x" * 300}, {"text": "hello", "system": "x" * 300}):
        with pytest.raises(PromptTooLongError):
            engine.prepare(ask(**fields, context_policy="drop_oldest"))
    assert engine.sessions.info("anna").messages == before


def test_a_conversation_larger_than_the_kv_pool_is_computed_again(open_engine):
    config = {"session_memory": 1, "max_sessions": 2, "prompt_cache_entries": 0}
    engine, roomy = (open_engine(memory=3, pool_tokens=size, config=config) for size in (64, 4096))
    for number in range(3):
        for name in ("anna", "ben"):
            small, large = (run(each, ask(f"question {number} of {name}", name)) for each in (engine, roomy))
            assert small.text == large.text and small.cached_tokens <= large.cached_tokens
    assert small.cached_tokens < large.cached_tokens and engine.pool.kept_tokens("ben") <= 64


def test_who_resets_a_session_at_its_answer_leaves_no_kv_of_it(open_engine):
    engine = open_engine(memory=3, pool_tokens=4096, config={"session_memory": 1, "prompt_cache_entries": 0})
    for is_reset in (False, True):
        prepared = engine.prepare(ask("a question of anna"))
        on_done = (lambda result: engine.reset_session("anna")) if is_reset else (lambda result: None)
        engine.scheduler.add(Sequence(prepared, engine.tokenizer, on_piece=None, on_done=on_done))
        while engine.scheduler.has_work:
            engine.step()
        run(engine, ask("a question of ben", "ben"))
        assert (engine.pool.kept_tokens("anna") == 0) is is_reset


def test_no_more_turns_are_left_out_than_needed():
    messages = (SYSTEM, *turns(*(str(index) for index in range(21))))
    for count in range(11):
        kept, num_dropped = fit_turns(messages, len, 21, 21 - 2 * count)
        assert kept == without_oldest(messages, num_dropped) and num_dropped == min(count + 1, 10)
    assert fit_turns(messages, len, 22, 10) == (messages, 0)
    assert fit_turns(messages, lambda _: None, 1, 1)[0] == (SYSTEM, messages[-1])


@pytest.mark.parametrize("name", ["../b", "a/b", "a b", "x" * 65, "ä", "a\n", "a\0"])
def test_names_cannot_leave_the_directory(open_engine, tmp_path, name):
    with pytest.raises(InvalidSessionError, match="letters, digits"):
        open_engine().prepare(ask("hello", name))
    with pytest.raises(InvalidSessionError, match="letters, digits"):
        save_session(tmp_path / "in", name, SavedSession(turns("a", "b"), 1, 2), "hash")
    with pytest.raises(InvalidSessionError, match="letters, digits"):
        load_session(tmp_path, name, "hash")
    assert list(tmp_path.iterdir()) == []


def test_a_request_with_a_raw_prompt_or_an_unknown_policy_is_refused():
    for fields in ({"session": "a", "prompt": "x"}, {"context_policy": "drop_oldest", "prompt": "x"}):
        with pytest.raises(InvalidRequestError, match="raw prompt"):
            GenerationRequest("r", **fields).validate()
    with pytest.raises(InvalidRequestError, match="one of refuse, drop_oldest"):
        GenerationRequest("r", turns("a"), context_policy="forget").validate()


def test_a_saved_session_comes_back_and_that_of_another_engine_does_not(tmp_path):
    calling = ChatMessage("assistant", "", tool_calls=(ToolCall("1", "go", '{"n": 3}'),), reasoning="Hm.")
    called = (calling, ChatMessage("tool", "done", tool_call_id="1", name="go"))
    saved = SavedSession((SYSTEM, *turns("Grüße\n", '"yes"'), *called), 1, 30)
    save_session(tmp_path / "new", "..", saved, "a" * 64)
    assert load_session(tmp_path / "new", "..", "a" * 64) == saved
    with pytest.raises(InvalidSessionError, match="another engine"):
        load_session(tmp_path / "new", "..", "b" * 64)
    with pytest.raises(InvalidSessionError, match="No session 'b' has been saved"):
        load_session(tmp_path / "new", "b", "a" * 64)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSessionError, match="could not be saved"):
        save_session(tmp_path / "file", "b", saved, "a" * 64)


def test_a_full_disk_leaves_the_older_file(tmp_path):
    older = SavedSession(turns("a", "b"), 1, 2)
    save_session(tmp_path, "anna", older, "hash")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InvalidSessionError, match="could not be saved"):
            save_session(tmp_path, "anna", SavedSession(turns("a", "b" * 5000), 1, 2), "hash")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_session(tmp_path, "anna", "hash") == older and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"num_turns": -1}, {"num_tokens": "3"}, {"messages": []}, {"messages": 3}, {"messages": ["x"]},
        {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": [{"role": "user"}]},
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_one_sentence(tmp_path, change):
    save_session(tmp_path, "a", SavedSession(turns("x", "y"), 1, 2), "hash")
    content = {**json.loads((tmp_path / "a.json").read_text()), **change}
    for text in (json.dumps(content), "[" * 100000, "[]", json.dumps(content)[:-9]):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InvalidSessionError, match="is not a saved session"):
            load_session(tmp_path, "a", "hash")


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(InvalidSessionError):
        load_session(tmp_path, "a", "hash")


def test_the_images_of_all_sessions_are_limited_also_equal_ones_and_those_of_open_turns(monkeypatch):
    def see(name):
        image = Image(np.zeros((2, 2, 3), np.uint8))
        return sessions.begin(name, (ChatMessage("user", "cup?", images=(0,)),), images=(image,))

    monkeypatch.setattr("engine_core.serving.sessions._MOST_IMAGE_BYTES", 3 * 12)
    sessions = Sessions(8)
    anna = see("anna")
    anna.end(GenerationResult("r", text="red"))
    sessions.fork("anna", "ben")
    ben, carl = see("ben"), see("carl")
    with pytest.raises(InvalidSessionError, match="The images of all sessions take more"):
        see("dora")
    carl.leave()
    assert see("dora").images and ben.images[0] is anna.images[0]
