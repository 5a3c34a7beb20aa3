"""The lifecycle: honest states, failing configures, faults, fifty rounds, and the end of the process."""

from __future__ import annotations

import json
import signal
import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import State, Transition

from edgellm_ros.msg import EngineStatus, ErrorCode, FinishReason
from fake_backend import write_engine
from llm_client import (
    ABORTED,
    ACTIVATE,
    ACTIVE,
    CLEANUP,
    CONFIGURE,
    DEACTIVATE,
    GREEDY_LONG,
    INACTIVE,
    LIMIT,
    UNCONFIGURED,
    LlmClient,
    Nodes,
)

LONG = {"sampling": {"max_new_tokens": GREEDY_LONG}}


def test_there_and_back_with_honest_states(nodes, engine_dir):
    llm = nodes.start(engine_dir)
    assert llm.state() == UNCONFIGURED and llm.status().state == EngineStatus.UNCONFIGURED
    assert not llm.change(ACTIVATE) and llm.state() == UNCONFIGURED
    assert llm.change(CONFIGURE) and llm.state() == INACTIVE
    assert not llm.change(CONFIGURE) and llm.state() == INACTIVE  # configure twice
    assert llm.change(ACTIVATE) and llm.state() == ACTIVE
    status = llm.status(lambda status: status.state == EngineStatus.ACTIVE)
    assert (status.model_name, status.backend, status.max_context) == ("fake", "fake", 2048)
    assert status.memory_total == llm.info().memory.total > 0
    assert llm.generate().error_code == 0
    assert llm.change(DEACTIVATE) and llm.change(CLEANUP) and llm.state() == UNCONFIGURED
    assert llm.status(lambda status: status.state == EngineStatus.UNCONFIGURED).model_name == ""
    assert llm.change(Transition.TRANSITION_UNCONFIGURED_SHUTDOWN)
    assert llm.state() == State.PRIMARY_STATE_FINALIZED
    assert llm.status(lambda status: status.state == EngineStatus.FINALIZED).error_code == 0


def test_the_status_tells_how_far_configure_is(nodes, tmp_path):
    llm = nodes.start(write_engine(tmp_path / "engine", load_time=1.0))
    assert llm.change(CONFIGURE)
    llm.status(lambda status: status.state == EngineStatus.INACTIVE)
    during = [status for status in llm.statuses if status.configuring]
    shares = [status.load_progress for status in during]
    assert {status.state for status in during} == {EngineStatus.UNCONFIGURED}
    assert len(shares) >= 3 and shares == sorted(shares) and 0 < shares[0] < 1
    assert (llm.status().configuring, llm.status().load_progress) == (False, 0.0)


def test_auto_takes_what_runs_here_and_says_why(nodes, tmp_path):
    write_engine(tmp_path / "engine" / "plan", backend="tensorrt")
    write_engine(tmp_path / "engine" / "fake")
    llm = nodes.start(tmp_path / "engine").bring_up()
    info = llm.info()
    assert info.backend == "fake"
    assert info.backend_reason.startswith("fake fp32 is the fastest of 2 variants that runs here and fits; not tensor")
    assert info.backend_reason in llm.node_process.log.read_text()


def test_late_subscribers_get_the_status_and_diagnostics_name_the_device(nodes, engine_dir):
    llm = nodes.start(engine_dir).bring_up()
    late = LlmClient(llm.name, llm.node_process)
    try:
        assert late.status().state == EngineStatus.ACTIVE
    finally:
        late.close()
    heard = []
    llm.node.create_subscription(DiagnosticArray, "/diagnostics", heard.append, 10)
    ours = lambda: [s for m in heard for s in m.status if f"/{llm.name}" in s.name]  # noqa: E731
    llm.until(ours)
    assert ours()[0].level == DiagnosticStatus.OK and "fake device" in ours()[0].hardware_id
    assert {"model", "backend", "busy", "queued"} <= {value.key for value in ours()[0].values}


def test_an_empty_engine_dir_is_named(nodes):
    llm = nodes.start()
    assert not llm.change(CONFIGURE)
    status = llm.status(lambda status: status.error_code != 0)
    assert "engine_dir is empty" in status.error_message and f"/{llm.name}" in status.error_message


def test_fifty_rounds_without_growth(nodes, tmp_path):
    llm = nodes.start(write_engine(tmp_path / "engine", script="done"))

    def rounds(count):
        for _ in range(count):
            assert llm.change(CONFIGURE) and llm.change(ACTIVATE)
            assert llm.generate().text == "done"
            assert llm.change(DEACTIVATE) and llm.change(CLEANUP)

    rounds(10)
    memory, threads = llm.node_process.resident(), llm.node_process.threads()
    rounds(40)
    assert llm.node_process.threads() == threads
    assert llm.node_process.resident() - memory < 4 << 20


def damage(directory, what):
    """Damage the manifest of an engine directory in the way that ``what`` says."""
    manifest = directory / "engine.json"
    values = json.loads(manifest.read_text())
    if what == "newer manifest":
        values["schema_version"] += 1
    elif what == "wrong hash":
        values["files"]["tokenizer.json"]["sha256"] = "0" * 64
    elif what == "other backend":
        values["backend"] = "abacus"
    manifest.write_text(json.dumps(values) if what != "torn manifest" else "{")


@pytest.mark.parametrize(
    "what, code",
    [("missing", ErrorCode.ENGINE_DIRECTORY), ("torn manifest", ErrorCode.ENGINE_DIRECTORY),
     ("newer manifest", ErrorCode.SCHEMA_VERSION), ("wrong hash", ErrorCode.INTEGRITY),
     ("other backend", ErrorCode.BACKEND_UNAVAILABLE), ("context", ErrorCode.CONFIGURATION),
     ("load", ErrorCode.ENGINE_FAULT)],
)  # fmt: skip
def test_a_failing_configure_says_why_and_leaves_nothing(failing, what, code):
    llm, directory, good = failing
    if what not in ("missing", "context"):
        write_engine(directory, fail_load=what == "load")
        damage(directory, what)
    if what == "context":
        llm.must_set(engine_dir=str(good), max_context=99999)
    else:
        llm.must_set(engine_dir=str(directory), max_context=0)
    assert not llm.change(CONFIGURE) and llm.state() == UNCONFIGURED
    status = llm.status(lambda status: status.error_code == code)
    assert status.state == EngineStatus.UNCONFIGURED and status.error_message.endswith(".")
    assert "\n" not in status.error_message
    llm.must_set(engine_dir=str(good), max_context=0)
    assert llm.change(CONFIGURE)
    assert llm.status(lambda status: status.state == EngineStatus.INACTIVE).error_code == 0
    assert llm.change(CLEANUP)


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("failing"))
    yield nodes.start()
    nodes.close()


@pytest.fixture
def failing(one_node, tmp_path, engine_dir):
    return one_node, tmp_path / "engine", engine_dir


def test_an_engine_fault_answers_everybody_and_configure_brings_the_node_back(nodes, tmp_path):
    fault = tmp_path / "fault"
    llm = nodes.start(write_engine(tmp_path / "engine", step_time=0.005, fault_file=str(fault))).bring_up()
    heard = []
    llm.node.create_subscription(DiagnosticArray, "/diagnostics", heard.append, 10)
    before = llm.generate("x").text
    goal = llm.goal("a", **LONG)
    waiting = [llm.generate_async(str(i)) for i in range(3)]
    llm.status(lambda status: status.busy and status.queued == 3)
    fault.touch()
    status, result = goal.result()
    assert (status, result.error_code, result.finish_reason) == (ABORTED, ErrorCode.ENGINE_FAULT, FinishReason.ERROR)
    assert "fell off the bus" in result.error_message
    assert {llm.wait(answer).error_code for answer in waiting} == {ErrorCode.ENGINE_FAULT}
    llm.until(lambda: llm.state() == UNCONFIGURED)
    status = llm.status(lambda status: status.state == EngineStatus.UNCONFIGURED)
    assert status.error_code == ErrorCode.ENGINE_FAULT
    assert llm.generate().error_code == ErrorCode.NOT_ACTIVE
    llm.until(lambda: any(s.level == DiagnosticStatus.ERROR for m in heard for s in m.status))
    fault.unlink()
    llm.bring_up()
    assert llm.generate("x").text == before
    assert llm.status(lambda status: status.state == EngineStatus.ACTIVE).error_code == 0


@pytest.mark.parametrize("policy", ["finish", "cancel"])
def test_deactivate_finishes_or_cancels_the_running_request(nodes, engine_dir, policy):
    llm = nodes.start(engine_dir, deactivate_policy=policy, deactivate_timeout=10.0).bring_up()
    goal = llm.goal("a", sampling={"max_new_tokens": 150})  # 0.6 s
    llm.until(lambda: goal.feedback)
    waiting = llm.generate_async("b")
    llm.status(lambda status: status.busy and status.queued == 1)
    assert llm.change(DEACTIVATE) and llm.state() == INACTIVE
    expected = FinishReason.LENGTH if policy == "finish" else FinishReason.CANCELLED
    assert goal.result()[1].finish_reason == expected and goal.result()[1].text
    assert llm.wait(waiting).finish_reason == FinishReason.CANCELLED
    assert llm.change(ACTIVATE) and llm.generate().error_code == 0


def test_deactivate_does_not_wait_longer_than_its_timeout(nodes, engine_dir):
    llm = nodes.start(engine_dir, deactivate_timeout=1.0).bring_up()
    assert llm.state() == ACTIVE  # from here on the node knows this client: no answer is dropped below
    goal = llm.goal("a", **LONG)
    llm.until(lambda: goal.feedback)
    start = time.monotonic()
    deactivating = llm.call_async(*change_request(DEACTIVATE))
    while (state := llm.state()) == ACTIVE:  # asked by another service, which may be served first
        assert time.monotonic() - start < LIMIT
    assert state == State.TRANSITION_STATE_DEACTIVATING  # answered while it waits
    assert llm.wait(deactivating).success
    assert goal.result()[1].finish_reason == FinishReason.CANCELLED


def change_request(transition):
    from lifecycle_msgs.srv import ChangeState

    return ChangeState, "change_state", ChangeState.Request(transition=Transition(id=transition))


def test_autostart(nodes, engine_dir, tmp_path):
    llm = nodes.start(engine_dir, autostart=True)
    assert llm.status(lambda status: status.state == EngineStatus.ACTIVE).error_code == 0
    assert llm.generate().error_code == 0
    failed = nodes.start(tmp_path / "nothing", autostart=True)
    assert failed.status(lambda status: status.error_code).error_code == ErrorCode.ENGINE_DIRECTORY
    assert failed.state() == UNCONFIGURED


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_request_is_a_cancel_and_a_clean_exit(nodes, engine_dir, signum):
    llm = nodes.start(engine_dir).bring_up()
    llm.listen()
    answer = llm.generate_async("a", request_id="a", **LONG)
    llm.until(lambda: llm.pieces_of("a"))
    goal = llm.goal("b", **LONG)
    llm.status(lambda status: status.busy and status.queued == 1)
    llm.node_process.process.send_signal(signum)
    llm.may_end = True
    response = llm.wait(answer)
    assert response.finish_reason == FinishReason.CANCELLED and response.text and response.error_code == 0
    status, result = goal.result()
    assert (status, result.finish_reason) == (ABORTED, FinishReason.CANCELLED)
    assert llm.node_process.process.wait(20) == 0
    assert "Traceback" not in llm.node_process.log.read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_unconfigured_node_too(nodes, signum):
    llm = nodes.start()
    llm.state()
    assert llm.node_process.stop(signum) == 0
    assert "Traceback" not in llm.node_process.log.read_text()
