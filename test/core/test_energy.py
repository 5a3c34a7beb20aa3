"""The energy of requests: how it is shared, and that nothing is read while none runs."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest

from engine_core.http.metrics import Metrics
from engine_core.request import FinishReason, GenerationRequest, GenerationResult, SamplingParams
from engine_core.serving import energy
from engine_core.serving.energy import EnergyAccount, EnergyShares
from engine_core.serving.worker import Worker
from fakes import text_ids


def test_requests_at_the_same_time_share_the_power_equally():
    shares = EnergyShares()
    first = shares.begin(0.0)
    shares.read(20.0, 2.0, 2.0)  # 10 W
    second = shares.begin(2.0)
    shares.read(120.0, 4.0, 6.0)  # 30 W for two
    assert shares.end(second, 6.0) == pytest.approx(60.0)
    shares.read(40.0, 4.0, 10.0)  # 10 W
    assert shares.end(first, 10.0) == pytest.approx(20.0 + 60.0 + 40.0)


def test_all_that_was_read_is_shared_out():
    shares = EnergyShares()
    first, total = shares.begin(0.0), 0.0
    second = shares.begin(0.3)
    shares.read(5.0, 0.5, 0.5)
    third = shares.begin(0.6)
    shares.read(7.0, 0.5, 1.0)
    total += shares.end(second, 1.0)
    shares.read(2.0, 1.0, 2.0)
    total += shares.end(first, 2.0) + shares.end(third, 2.0)
    assert total == pytest.approx(5.0 + 7.0 + 2.0)


def test_what_ends_between_two_readings_is_estimated_by_the_last_power():
    shares = EnergyShares()
    first = shares.begin(0.0)
    assert math.isnan(shares.end(first, 0.1))  # no power is known
    first = shares.begin(0.2)
    shares.read(10.0, 1.0, 1.0)
    assert shares.end(first, 1.5) == pytest.approx(8.0 + 5.0)
    short = shares.begin(1.6)
    other = shares.begin(1.7)
    assert shares.end(short, 1.9) == pytest.approx(1.0 + 1.0)
    shares.read(30.0, 1.0, 2.0)  # the next request's power is not that of the one before
    assert shares.end(other, 2.0) == pytest.approx(30.0 * (0.1 + 0.1))


def test_time_without_requests_belongs_to_none():
    shares = EnergyShares()
    shares.end(shares.begin(0.0), 1.0)
    shares.read(1.0, 1.0, 1.0)
    later = shares.begin(100.0)
    shares.read(8.0, 1.0, 101.0)
    assert shares.end(later, 101.0) == pytest.approx(8.0)


class FakeMeter:
    """Counts ten joules at each reading."""

    source = "a meter"

    def __init__(self) -> None:
        self.count = 0
        self.threads: set[str] = set()
        self.is_closed = False
        self.changed = threading.Condition()

    def joules(self) -> float:
        with self.changed:
            self.count += 1
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()
            return 10.0 * self.count

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.count >= count, 30)

    def close(self) -> None:
        self.is_closed = True


def test_the_meter_is_read_only_while_requests_run():
    meter = FakeMeter()
    with EnergyAccount(meter, period=0.005) as account:
        assert meter.count == 0 and math.isnan(account.watts)
        share = account.begin()
        meter.wait(4)
        assert account.end(share) > 0 and account.watts > 0
        thread = next(each for each in threading.enumerate() if each.name == "edgellm-power")
        for _ in range(1000):  # until it has seen that none runs
            if not account._wanted.is_set():
                break
            threading.Event().wait(0.005)
        count = meter.count
        threading.Event().wait(0.05)
        assert meter.count == count
        account.begin()
        meter.wait(count + 2)
    assert meter.is_closed and not thread.is_alive() and meter.threads == {"edgellm-power"}
    account.close()


def test_it_can_be_closed_while_it_reads():
    account = EnergyAccount(meter := FakeMeter(), period=0.005)
    share = account.begin()
    meter.wait(2)

    def read() -> float:
        account.end(share)
        account._closed.set()
        account._wanted.set()
        return FakeMeter.joules(meter)

    meter.joules = read
    account._thread.join(30)
    assert not account._thread.is_alive()
    account.close()


def test_a_meter_that_fails_costs_the_figures_alone(monkeypatch):
    def fail(**_):
        raise OSError("no such sensor")

    monkeypatch.setattr(energy, "open_meter", fail)
    assert energy.open_account(on_gpu=False) is None
    meter = FakeMeter()
    with EnergyAccount(meter, period=0.005) as account:
        share = account.begin()
        meter.wait(3)
        meter.joules = fail
        account._thread.join(30)
        assert math.isnan(account.end(share)) and math.isnan(account.end(account.begin())) and math.isnan(account.watts)


def test_results_have_the_energy_of_what_ran(open_engine):
    """Nothing is read on the thread that answers."""
    engine = open_engine(text_ids("some words"), num_slots=2)
    engine.energy = EnergyAccount(meter := FakeMeter(), period=0.005)
    worker = Worker(engine)
    request = GenerationRequest("1", prompt="go", sampling=SamplingParams(max_new_tokens=4))
    results, done = [], threading.Semaphore(0)

    def on_done(result) -> None:
        results.append(result)
        done.release()

    share = engine.energy.begin()  # so that a power is known before the request comes
    meter.wait(3)
    for name in ("1", "2"):
        worker.submit(request.replace(request_id=name), on_done=on_done)
    worker.submit(request.replace(request_id="3"), on_done=on_done).cancel()
    assert all(done.acquire(timeout=30) for _ in range(3))
    worker.close()
    engine.energy.end(share)
    ran = [result for result in results if result.finish_reason is not FinishReason.CANCELLED]
    assert len(ran) >= 2 and all(result.energy_joules > 0 for result in ran)
    assert meter.threads == {"edgellm-power"}
    engine.close()
    assert meter.is_closed


def test_without_a_reading_there_is_no_figure(open_engine):
    engine = open_engine(text_ids("some words"))
    assert engine.energy is None
    result = engine.answer(GenerationRequest("1", prompt="go", sampling=SamplingParams(max_new_tokens=2)))
    assert math.isnan(result.energy_joules)


def test_the_metrics_count_what_was_read():
    metrics = Metrics(SimpleNamespace(engine=None, worker=None))
    for joules in (1.5, math.nan, 2.0):
        metrics.observe(GenerationResult("1", energy_joules=joules))
    assert "edgellm_energy_joules_total 3.5" in metrics.text().decode()
