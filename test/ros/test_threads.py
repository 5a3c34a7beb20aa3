"""Work beside the executor: asks that must not get lost, coroutines that begin before they are awaited."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from rclpy.task import Future

from edgellm_ros.threads import Soon, Started


def wait_until(true, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_soon_calls_once_for_all_who_ask_in_time():
    calls = []
    soon = Soon("test-soon", lambda: calls.append(1), delay=0.1)
    for _ in range(100):
        soon.ask()
    wait_until(lambda: calls)
    time.sleep(0.2)
    assert len(calls) == 1
    assert soon.close()


def test_soon_hears_who_asks_while_the_call_is_made():
    started, go_on, calls = threading.Semaphore(0), threading.Semaphore(0), []

    def call() -> None:
        started.release()
        go_on.acquire()
        calls.append(1)

    soon = Soon("test-soon", call, delay=0.0)
    soon.ask()
    assert started.acquire(timeout=60)
    soon.ask()
    go_on.release(2)
    wait_until(lambda: len(calls) == 2)
    go_on.release()
    assert soon.close()


def test_every_change_is_seen_by_a_later_call():
    change, seen = [0], [0]
    soon = Soon("test-soon", lambda: seen.__setitem__(0, change[0]), delay=0.0)
    for _ in range(2000):
        change[0] += 1
        soon.ask()
    wait_until(lambda: seen[0] == 2000)
    assert soon.close()


def test_soon_makes_the_last_call_at_once_when_it_is_closed():
    calls = []
    soon = Soon("test-soon", lambda: calls.append(1), delay=60.0)
    soon.ask()
    start = time.monotonic()
    assert soon.close()
    assert calls == [1] and time.monotonic() - start < 30.0


def run(coroutine, at_wait=lambda: None):
    """Go on with the coroutine until it ends, as rclpy's task does."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        at_wait()


async def awaited(started: Started):
    return await started


def test_started_runs_up_to_where_it_waits_and_ends_where_it_is_awaited():
    future, steps = Future(), []

    async def work() -> str:
        steps.append("first")
        value = await future
        steps.append("second")
        return value

    started = Started(work())
    assert steps == ["first"]
    assert run(awaited(started), at_wait=lambda: future.set_result("done")) == "done"
    assert steps == ["first", "second"]


def test_started_that_never_waits_has_its_result():
    async def work() -> int:
        return 7

    assert run(awaited(Started(work()))) == 7


@pytest.mark.parametrize("waits", [False, True])
def test_what_started_raises_is_raised_where_it_is_awaited(waits):
    future = Future()

    async def work() -> None:
        if waits:
            await future
        raise ValueError("at work")

    started = Started(work())
    with pytest.raises(ValueError, match="at work"):
        run(awaited(started), at_wait=lambda: future.set_result(None))


@pytest.mark.parametrize("way", ["signal.pthread_kill(threading.get_ident(), signal.SIGTERM)", "stop.set()"])
def test_the_main_thread_wakes_whichever_thread_a_signal_or_a_stop_comes_to(way):
    program = f"""
import signal, threading
from edgellm_ros.threads import StopSignal
stop = StopSignal((signal.SIGTERM,))
threading.Timer(0.2, lambda: {way}).start()
stop.wait()
print("woken")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "woken\n")


def test_signals_within_a_second_are_one_stop():
    program = """
import signal, time
from edgellm_ros.threads import StopSignal
stop = StopSignal((signal.SIGINT,))
print("ready", flush=True)
stop.wait()
time.sleep(0.3)
print("stopped in order", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.communicate(timeout=60)[0] == "stopped in order\n" and process.returncode == 0


def test_a_later_signal_ends_the_process_at_once():
    program = """
import signal, time
from edgellm_ros.threads import StopSignal
stop = StopSignal((signal.SIGTERM,))
print("ready", flush=True)
stop.wait()
print("stopping", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for said in ("ready", "stopping"):
        assert process.stdout.readline().strip() == said
        if said == "stopping":
            time.sleep(1.2)  # within a second it would be the same stop
        process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
