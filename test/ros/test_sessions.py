"""Sessions over ROS: the node keeps histories, lists, resets, forks, saves and loads them, and says who is asking."""

from __future__ import annotations

import asyncio
import importlib.util
from functools import partial
from pathlib import Path

import pytest

from edgellm_ros.client import (
    LLM,
    InvalidRequestError,
    InvalidSessionError,
    NotActiveError,
    SessionBusyError,
    UnavailableError,
)
from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason
from edgellm_ros.srv import Sessions
from fake_backend import write_engine
from llm_client import ACTIVATE, CLEANUP, CONFIGURE, DEACTIVATE, GREEDY_LONG

SHORT = {"max_new_tokens": 12}
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "two_people.py"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, engine_dir):
    from llm_client import Nodes

    nodes = Nodes(tmp_path_factory.mktemp("shared"))
    directory = tmp_path_factory.mktemp("sessions") / "kept"
    yield nodes.start(engine_dir, session_memory=1, max_sessions=4, sessions_dir=directory).bring_up()
    nodes.close()


@pytest.fixture(autouse=True)
def no_sessions(llm):
    command(llm, Sessions.Request.RESET)


def command(llm, number, session="", new_session="") -> Sessions.Response:
    return llm.call(Sessions, "sessions", Sessions.Request(command=number, session=session, new_session=new_session))


def names(llm) -> list[str]:
    return sorted(info.name for info in command(llm, Sessions.Request.LIST).sessions)


def test_the_node_keeps_the_history(llm):
    llm.must_set(system_prompt="Be kind.")
    first = llm.generate("hello", session="anna", sampling=SHORT)
    second = llm.goal("and now?", session="anna", sampling=SHORT).result()[1]
    whole = [("user", "hello"), ("assistant", first.text), ("user", "and now?")]
    expected = llm.generate(messages=[ChatMessage(role=role, content=text) for role, text in whole], sampling=SHORT)
    assert second.text == expected.text and (first.session_turns, second.session_turns) == (1, 2)
    assert second.metrics.prompt_tokens == expected.metrics.prompt_tokens and expected.session_turns == 0
    (info,) = command(llm, Sessions.Request.LIST, "anna").sessions
    assert [(m.role, m.content) for m in info.messages] == [
        ("system", "Be kind."), *whole, ("assistant", second.text)
    ]  # fmt: skip
    assert info.num_turns == 2 and info.num_tokens == second.metrics.prompt_tokens + 12 and not info.answering
    assert info.kept_tokens >= info.num_tokens - 1
    (listed,) = command(llm, Sessions.Request.LIST).sessions
    assert listed.name == "anna" and listed.messages == []


def test_reset_and_fork(llm):
    llm.generate("hello", session="anna", sampling=SHORT)
    (fork,) = command(llm, Sessions.Request.FORK, "anna", "ben").sessions
    assert fork.name == "ben" and fork.num_turns == 1 and names(llm) == ["anna", "ben"]
    texts = [llm.generate("and now?", session=name, sampling=SHORT).text for name in ("anna", "ben")]
    assert texts[0] == texts[1]
    assert [info.name for info in command(llm, Sessions.Request.RESET, "anna").sessions] == ["anna"]
    assert names(llm) == ["ben"]
    for number, session, new in ((Sessions.Request.RESET, "anna", ""), (Sessions.Request.FORK, "ben", "ben")):
        answer = command(llm, number, session, new)
        assert answer.error_code == ErrorCode.INVALID_SESSION and repr(session) in answer.error_message
    assert command(llm, 77).error_code == ErrorCode.INVALID_REQUEST


def test_saved_sessions_outlive_the_configuration(llm):
    before = llm.generate("hello", session="anna", sampling=SHORT)
    assert command(llm, Sessions.Request.SAVE, "anna").sessions[0].num_turns == 1
    expected = llm.generate("and now?", session="anna", sampling=SHORT)
    assert llm.change(DEACTIVATE) and names(llm) == ["anna"]
    assert llm.change(CLEANUP)
    assert command(llm, Sessions.Request.LIST).error_code == ErrorCode.NOT_ACTIVE
    assert llm.change(CONFIGURE) and names(llm) == []
    assert llm.change(ACTIVATE)
    (info,) = command(llm, Sessions.Request.LOAD, "anna").sessions
    assert [m.content for m in info.messages] == ["hello", before.text]
    assert llm.generate("and now?", session="anna", sampling=SHORT).text == expected.text
    for name in ("ben", "../anna", "/etc/passwd", ""):
        answer = command(llm, Sessions.Request.LOAD, name)
        assert answer.error_code == ErrorCode.INVALID_SESSION and answer.sessions == []
    assert command(llm, Sessions.Request.LOAD, "anna").error_code == ErrorCode.INVALID_SESSION  # it is there already


def test_the_oldest_turns_are_left_out_only_if_asked_for(llm):
    for number in range(2):
        llm.generate(f"{number}" * 900, session="anna", sampling=SHORT)
    refused = llm.generate("2" * 900, session="anna", sampling=SHORT)
    assert refused.error_code == ErrorCode.PROMPT_TOO_LONG and refused.session_turns == 0
    answer = llm.generate("2" * 900, session="anna", context_policy="drop_oldest", sampling=SHORT)
    assert (answer.error_code, answer.dropped_turns, answer.session_turns) == (ErrorCode.NONE, 2, 3)
    (info,) = command(llm, Sessions.Request.LIST, "anna").sessions
    assert [m.content for m in info.messages] == ["2" * 900, answer.text]
    assert llm.generate("x", context_policy="forget").error_code == ErrorCode.INVALID_REQUEST


def test_status_says_who_is_asking_and_a_busy_session_refuses(llm):
    long = llm.goal("hello", request_id="long", session="anna", priority=3, sampling={"max_new_tokens": GREEDY_LONG})
    llm.until(lambda: long.feedback)
    waiting = llm.generate_async("hi", request_id="next", session="ben", sampling=SHORT)
    status = llm.status(
        lambda status: len(status.requests) == 2 and status.requests[0].generated_tokens > 100  # sent while it runs
    )
    running, next_one = status.requests
    assert (running.request_id, running.session, running.priority, running.running) == ("long", "anna", 3, True)
    assert (next_one.request_id, next_one.session, next_one.running) == ("next", "ben", False)
    assert next_one.wait > running.wait >= 0 and next_one.generated_tokens == 0 < next_one.prompt_tokens
    assert status.kv_tokens >= running.prompt_tokens + running.generated_tokens - 1
    assert 0 <= status.pool_tokens_used <= status.pool_tokens and status.pool_tokens > 0
    busy = llm.generate("and?", session="anna", sampling=SHORT)
    assert busy.error_code == ErrorCode.SESSION_BUSY
    long.cancel()
    spoken = long.result()[1]
    assert spoken.finish_reason == FinishReason.CANCELLED and spoken.session_turns == 1
    (info,) = command(llm, Sessions.Request.LIST, "anna").sessions
    assert [m.content for m in info.messages] == ["hello", spoken.text]
    assert llm.wait(waiting).session_turns == 1
    assert llm.status(lambda status: not status.requests).kv_tokens == 0


def test_the_client_names_sessions(llm):
    with LLM(f"/{llm.name}") as client:
        first = client.ask("hello", session="anna", max_new_tokens=12)
        assert client.ask("and now?", session="anna", max_new_tokens=12).session_turns == 2
        pieces = client.pieces("a story", session="anna", max_new_tokens=GREEDY_LONG)
        next(pieces)
        with pytest.raises(SessionBusyError):
            client.ask("and?", session="anna")
        pieces.close()
        with pytest.raises(InvalidRequestError, match="letters, digits"):
            client.ask("hello", session="an na")
    assert first.session_turns == 1


def test_the_client_manages_sessions(llm):
    with LLM(f"/{llm.name}") as client:
        client.ask("hello", session="anna", max_new_tokens=12)
        assert client.sessions.fork("anna", "ben").name == "ben"
        assert client.sessions.save("anna").num_turns == client.sessions.reset("anna").num_turns == 1
        assert [info.name for info in client.sessions.list()] == ["ben"]
        assert client.sessions.load("anna").messages == client.sessions.get("ben").messages
        refused = [
            partial(client.sessions.load, "anna"), partial(client.sessions.fork, "anna", "ben"),
            partial(client.sessions.save, "Zoë"), partial(client.sessions.load, "/etc/passwd"),
            partial(client.sessions.fork, "anna", "x" * 100_000), partial(client.sessions.get, "nobody"),
            partial(client.sessions.reset, ""), partial(client.sessions.reset, "anna\0x"),
            partial(client.sessions.get, "\ud800"),
        ]  # fmt: skip
        for call in refused:
            with pytest.raises(InvalidSessionError):
                call()
        with pytest.raises(InvalidRequestError):
            client.ask("\ud800")
        assert client.ask("and now?", session="anna", max_new_tokens=12).session_turns == 2

        async def run():
            sessions = client.async_sessions
            with pytest.raises(InvalidSessionError):
                await sessions.save("nobody")
            await asyncio.gather(sessions.reset("ben"), sessions.fork("anna", "eve"), sessions.save("anna"))
            assert (await sessions.get("eve")).num_turns == 2
            await sessions.reset_all()
            assert (await sessions.load("anna")).num_turns == 2
            return await sessions.list()

        assert [info.name for info in asyncio.run(run())] == ["anna"]
    with pytest.raises(UnavailableError, match="closed"):
        client.sessions.list()
    with LLM("/nobody", wait=0.2) as client, pytest.raises(UnavailableError, match="/nobody/sessions"):
        client.sessions.list()


def test_fork_save_reset_and_deactivate_while_an_answer_runs(llm):
    with LLM(f"/{llm.name}") as client:
        first = client.ask("hello", session="anna", max_new_tokens=12)
        running = client.pieces("a story", session="anna", max_new_tokens=GREEDY_LONG)
        next(running)
        assert client.sessions.get("anna").answering
        forked, saved = client.sessions.fork("anna", "ben"), client.sessions.save("anna")
        assert [m.content for m in forked.messages] == [m.content for m in saved.messages] == ["hello", first.text]
        assert client.sessions.reset("anna").answering
        running.cancel()
        for _ in running:
            pass
        assert running.result.session_turns == 0 and names(llm) == ["ben"]

        llm.must_set(deactivate_policy="cancel")
        running = client.pieces("a story", session="ben", max_new_tokens=GREEDY_LONG)
        next(running)
        assert llm.change(DEACTIVATE)
        for _ in running:
            pass
        assert running.result.session_turns == 2
        kept = client.sessions.get("ben")
        assert kept.messages[-1].content == running.result.text and not kept.answering
        with pytest.raises(NotActiveError):
            client.ask("more", session="ben")
        assert llm.change(ACTIVATE)
        late = client.ask("more", session="ben", deadline=0.2, max_new_tokens=GREEDY_LONG)
        assert (late.finish_reason, late.session_turns) == (FinishReason.TIMEOUT, 3)


def test_two_people_talk_at_once(llm, capsys):
    spec = importlib.util.spec_from_file_location("two_people", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(f"/{llm.name}") == 0
    output = capsys.readouterr().out
    assert names(llm) == sorted(example.QUESTIONS)
    for name, questions in example.QUESTIONS.items():
        (info,) = command(llm, Sessions.Request.LIST, name).sessions
        assert [m.content for m in info.messages if m.role == "user"] == questions
        assert all(f"{name}: {question}" in output for question in questions)


def test_a_session_of_another_engine_is_refused(nodes, llm, tmp_path):
    directory = tmp_path / "kept"
    one = nodes.start(write_engine(tmp_path / "one"), sessions_dir=directory).bring_up()
    one.generate("hello", session="anna", sampling=SHORT)
    assert command(one, Sessions.Request.SAVE, "anna").error_code == ErrorCode.NONE
    two = nodes.start(write_engine(tmp_path / "two", script="no"), sessions_dir=directory).bring_up()
    answer = command(two, Sessions.Request.LOAD, "anna")
    assert answer.error_code == ErrorCode.INVALID_SESSION and "another engine" in answer.error_message
    assert names(two) == [] and two.generate("hello", sampling=SHORT).text == "no"
