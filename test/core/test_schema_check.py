"""Schemas that compile slowly hold up nobody's quick ones, and a request's own deadline is not blamed on its schema."""

from __future__ import annotations

import json
import threading
import time

import pytest

import fakes
from engine_core.errors import DeadlinePassedError, QueueFullError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest
from engine_core.serving import schema_check
from engine_core.serving.constraint import ConstraintFactory
from engine_core.serving.schema_check import SchemaChecker
from engine_core.serving.worker import Worker
from engine_core.text.tokenizer import Tokenizer

# Sleeps as long as a grammar says, in seconds, and answers with an empty reason.
SLEEPER = """
import json, sys, time
print('""', flush=True)
for line in sys.stdin:
    time.sleep(float(json.loads(line)))
    print('""', flush=True)
"""
SLOW_SCHEMA = json.dumps({"type": "integer", "multipleOf": 9999991})


@pytest.fixture
def checker(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setattr(schema_check, "_SCRIPT", str(tmp_path / "sleeper.py"))
    made = SchemaChecker()
    yield made
    made.close()
    assert made._num_quick == 0 and not made._slow and not made._num_waiting


class Asked:
    """A check in a thread of its own."""

    def __init__(self, checker, seconds, timeout=None):
        self.seconds = -1.0
        self.outcome = None
        self._work = (checker, str(seconds), None if timeout is None else time.monotonic() + timeout)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        checker, grammar, deadline = self._work
        begin = time.monotonic()
        try:
            self.outcome = checker.check(grammar, deadline)
        except (QueueFullError, DeadlinePassedError) as error:
            self.outcome = error
        self.seconds = time.monotonic() - begin

    def wait(self):
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        return self


@pytest.mark.alone
def test_quick_schemas_do_not_wait_for_slow_ones(checker):
    warm = [Asked(checker, 0.3) for _ in range(4)]  # starts the processes
    assert all(each.wait().outcome == "" for each in warm)
    slow = [Asked(checker, 60) for _ in range(4)]
    time.sleep(0.1)
    quick = [Asked(checker, 0).wait() for _ in range(6)]
    assert [each.outcome for each in quick] == [""] * 6
    assert max(each.seconds for each in quick) < 2.5  # 0.5 s; the machine may be busy
    for each in slow:
        each.wait()
    # Those that gave way may try again; the others had their whole time.
    assert all(each.outcome == "it takes too long to compile" or "try again" in str(each.outcome) for each in slow)
    assert all(each.seconds < 10 for each in slow)


def test_a_slow_schema_alone_has_its_whole_time(checker):
    slow = [Asked(checker, 1.0) for _ in range(2)]
    assert [each.wait().outcome for each in slow] == ["", ""]


def test_a_deadline_while_a_schema_compiles_or_waits(checker):
    slow = Asked(checker, 60, timeout=1.5).wait()
    assert isinstance(slow.outcome, DeadlinePassedError) and slow.seconds < 5
    others = [Asked(checker, 2.0) for _ in range(2)]
    time.sleep(0.05)
    waits = Asked(checker, 2.0, timeout=0.01).wait()
    assert isinstance(waits.outcome, DeadlinePassedError)
    assert [each.wait().outcome for each in others] == ["", ""]


def test_a_deadline_that_comes_while_a_process_starts_costs_no_process(checker):
    for _ in range(5):
        with pytest.raises(DeadlinePassedError):
            checker.check("0", time.monotonic() + 0.001)
    assert len(checker._idle) <= 1
    assert checker.check("0") == ""


def test_a_process_that_dies_is_replaced(checker):
    assert checker.check("0") == ""
    checker._idle[0].process.kill()
    checker._idle[0].process.wait()
    assert checker.check("0") == ""
    assert "too much memory" in checker.check("no number")
    assert checker.check("0") == ""


def test_a_request_whose_deadline_ends_its_schema_ends_by_its_deadline(open_engine):
    engine = open_engine()
    worker, done, results = Worker(engine), threading.Event(), []
    try:
        request = GenerationRequest("r", (ChatMessage("user", "a"),), json_schema=SLOW_SCHEMA, timeout=1.0)
        worker.submit(request, on_done=lambda result: (results.append(result), done.set()))
        assert done.wait(30.0) and len(results) == 1
        assert results[0].finish_reason is FinishReason.TIMEOUT and results[0].error is None
        assert not engine.knows(GenerationRequest("", json_schema=SLOW_SCHEMA))  # nothing is known of it
    finally:
        assert worker.close()


def test_a_known_schema_waits_for_nobody(tokenizer_dir, monkeypatch):
    factory = ConstraintFactory(Tokenizer(tokenizer_dir), fakes.VOCAB_SIZE, [fakes.EOS])
    try:
        factory.compile('{"type":"boolean"}')
        monkeypatch.setattr(factory._checker, "check", lambda *_: pytest.fail("checked again"))
        assert factory.knows(GenerationRequest("", json_schema='{"type":"boolean"}'))
        factory.compile('{"type":"boolean"}')
    finally:
        factory.close()
