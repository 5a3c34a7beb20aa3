"""The energy of requests: what the device takes while they run, shared among those that run at the same time.

A thread of its own reads the meter, a few times a second, and only while a request runs. The thread of the answers
notes when a request begins and ends, and never reads. What goes wrong with the meter leaves the figures NaN, and
nothing else.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass

from engine_core.measure.power import Meter, open_meter

_log = logging.getLogger(__name__)
_PERIOD = 0.25  # s between two readings; the counters of some GPUs move ten times a second
_CLOSING = 2.0  # s that a reading may take which is under way when the account is closed


@dataclass
class Share:
    """A request's part of the energy, from when it begins to run."""

    begin: float  # s; see ``EnergyShares``
    joules: float | None = None  # what one request had had by then; None until the next reading


class EnergyShares:
    """Divides what a meter reads among the requests that run. Not thread-safe; times are in seconds.

    Where n requests run, each has 1/n of the power. So one sum for all is enough: the time that one request has had,
    the integral of 1/n, and the joules that belong to it. Power is the mean between two readings. Until the next
    reading the last one is taken to go on, so that the answer that has just ended has a figure.
    """

    def __init__(self) -> None:
        self.watts = math.nan  # mean of the last interval; NaN before there is one
        self.running = 0
        self._new: list[Share] = []  # begun since the last reading
        self._now = 0.0  # when ``_time`` was advanced
        self._time = 0.0  # s of one request's share of the device
        self._read_time = 0.0  # of them, at the last reading
        self._read_joules = 0.0  # J of one request's share until then

    def begin(self, now: float) -> Share:
        """Return the share of a request that runs from ``now`` on."""
        self._advance(now)
        self.running += 1
        share = Share(self._time)
        self._new.append(share)
        return share

    def end(self, share: Share, now: float) -> float:
        """Return the joules of a request that ends; NaN if no power is known yet."""
        self._advance(now)
        self.running -= 1
        if share.joules is None:
            self._new = [each for each in self._new if each is not share]
            return self.watts * (self._time - share.begin)
        return self._read_joules + self.watts * (self._time - self._read_time) - share.joules

    def read(self, joules: float, seconds: float, now: float) -> None:
        """Take what the device took in the ``seconds`` before ``now``."""
        self._advance(now)
        self.watts = joules / seconds
        for share in self._new:
            share.joules = self._read_joules + self.watts * (share.begin - self._read_time)
        self._new.clear()
        self._read_joules += self.watts * (self._time - self._read_time)
        self._read_time = self._time

    def lose(self) -> None:
        """Know no power from now on."""
        self.watts = math.nan

    def _advance(self, now: float) -> None:
        if self.running:
            self._time += (now - self._now) / self.running
        self._now = now


class EnergyAccount:
    """Shares the energy of a meter, which it owns. Thread-safe. A context manager.

    The energy is the device's, with what it takes at rest and what else runs there. Of a request that is shorter than
    the time between two readings it is an estimate by the power of the last ones.
    """

    def __init__(self, meter: Meter, period: float = _PERIOD) -> None:
        """``period``: seconds between two readings."""
        self._meter, self._period = meter, period
        self._shares = EnergyShares()
        self._lock = threading.Lock()
        self._wanted = threading.Event()  # a request runs, or it is closed
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="edgellm-power", daemon=True)
        self._thread.start()

    def __enter__(self) -> EnergyAccount:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def source(self) -> str:
        """Name of the meter, for people."""
        return self._meter.source

    @property
    def watts(self) -> float:
        """The device's mean power between the last two readings, while requests ran; NaN before there are two."""
        return self._shares.watts

    def begin(self) -> Share:
        with self._lock:
            share = self._shares.begin(time.monotonic())
            self._wanted.set()
            return share

    def end(self, share: Share) -> float:
        """Return the joules of a request that ends; NaN if no power is known yet."""
        with self._lock:
            return self._shares.end(share, time.monotonic())

    def close(self) -> None:
        """May be called twice."""
        self._closed.set()
        self._wanted.set()
        self._thread.join(_CLOSING)
        self._meter.close()

    def _read(self) -> None:
        try:
            self._read_until_closed()
        except BaseException:
            _log.exception("The energy can no longer be read")
            with self._lock:
                self._shares.lose()

    def _read_until_closed(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait()
            before, start = self._meter.joules(), time.monotonic()
            while True:
                if self._closed.wait(self._period):
                    return
                joules, now = self._meter.joules(), time.monotonic()
                with self._lock:
                    self._shares.read(max(0.0, joules - before), now - start, now)
                    before, start = joules, now
                    if not self._shares.running:
                        self._wanted.clear()
                        break


def open_account(*, on_gpu: bool) -> EnergyAccount | None:
    """Return an account of the device a model runs on; None where its energy cannot be read."""
    try:
        meter = open_meter(on_gpu=on_gpu, period=None)
    except Exception:  # an odd sensor or library is no reason not to answer
        _log.exception("The energy cannot be read")
        return None
    return None if meter is None else EnergyAccount(meter)
