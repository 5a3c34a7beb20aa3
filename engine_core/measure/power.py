"""The energy a machine takes, where it can be read: NVML of NVIDIA GPUs, INA3221 of Jetsons, RAPL of x86 processors.

A ``Meter`` counts joules from when it is opened. What has a counter of its own is read when asked; power sensors are
sampled by a thread. None of them sees one process alone: they count whatever else runs there, too.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from engine_core.cuda.nvml import NvmlDevice, open_nvml

_PERIOD = 0.02  # s between samples of a power sensor
_ROOT = Path("/")
# Rails of a Jetson's first INA3221 that are all the module takes; elsewhere the sum of its rails is.
_MODULE_RAILS = ("VDD_IN", "VIN")


class Meter(Protocol):
    """Counts the joules of something."""

    source: str  # what is read, for people

    def joules(self) -> float:
        """Return the joules since it was opened."""

    def close(self) -> None: ...


class CounterMeter:
    """Reads a counter of joules, which may start again from 0 at ``wraps``. NaN: it cannot be read now, and the next
    reading makes up for it."""

    def __init__(self, source: str, read: Callable[[], float], wraps: float = 0.0) -> None:
        self.source = source
        self._read, self._wraps = read, wraps
        self._last, self._sum = read(), 0.0
        self._lock = threading.Lock()

    def joules(self) -> float:
        with self._lock:
            now = self._read()
            if not math.isnan(now):
                self._sum += now - self._last + (self._wraps if now < self._last else 0.0)
                self._last = now
            return self._sum

    def close(self) -> None:
        """Nothing is held."""


class SampledMeter:
    """Adds up samples of a power sensor, in watts. NaN: it cannot be read now, and the last sample goes on."""

    def __init__(self, source: str, read: Callable[[], float], period: float | None = _PERIOD) -> None:
        """``period``: seconds between two samples by a thread of its own; None: it is sampled when asked, alone."""
        self.source = source
        self._read = read
        self._lock = threading.Lock()
        self._sum, self._watts, self._time = 0.0, read(), time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if period is not None:
            self._thread = threading.Thread(target=self._sample, args=(period,), name="edgellm-power", daemon=True)
            self._thread.start()

    def joules(self) -> float:
        self._add()
        return self._sum

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _add(self) -> None:
        with self._lock:
            now, watts = time.monotonic(), self._read()
            watts = self._watts if math.isnan(watts) else watts
            self._sum += (watts + self._watts) / 2 * (now - self._time)
            self._watts, self._time = watts, now

    def _sample(self, period: float) -> None:
        while not self._closed.wait(period):
            self._add()


def open_meter(
    *,
    on_gpu: bool,
    root: Path = _ROOT,
    nvml: Callable[[], NvmlDevice | None] = open_nvml,
    period: float | None = _PERIOD,
) -> Meter | None:
    """Return what counts the energy of the device a model runs on; None where nothing can be read.

    That is a Jetson's whole module, else the GPU, or the processor and its memory. ``period``: see ``SampledMeter``.
    """
    if (meter := _jetson(root, period)) is not None:
        return meter
    if not on_gpu:
        return _rapl(root)
    return _gpu(nvml(), period)


def _gpu(device: NvmlDevice | None, period: float | None) -> Meter | None:
    if device is None:
        return None
    if device.energy() is not None:
        return CounterMeter("NVML, energy counter of the GPU", lambda: _known(device.energy()))
    if device.power() is not None:
        return SampledMeter("NVML, power of the GPU", lambda: _known(device.power()), period)
    return None


def _jetson(root: Path, period: float | None) -> Meter | None:
    """Return the INA3221 with the lowest address (Jetson Linux developer guide, "Software-Based Power Monitoring")."""
    for chip in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*")):
        rails = _rails(chip)
        if rails:
            whole = [name for name in _MODULE_RAILS if name in rails]
            names = whole[:1] or sorted(rails)
            read = partial(_total, [rails[name] for name in names])
            return SampledMeter(f"INA3221, {' + '.join(names)}", read, period)
    return None


def _rails(chip: Path) -> dict[str, tuple[Path, Path]]:
    """Name of a rail → the files with its millivolts and milliamperes."""
    found = {}
    for label in sorted(chip.glob("in*_label")):
        number = re.fullmatch(r"in(\d+)_label", label.name)
        files = (chip / f"in{number[1]}_input", chip / f"curr{number[1]}_input") if number else ()
        name = label.read_text(encoding="ascii").strip()
        # The kernel adds channels that are sums or are not connected.
        if files and name.startswith(("V", "C")) and all(_number(file) is not None for file in files):
            found[name] = (files[0], files[1])
    return found


def _total(rails: Sequence[tuple[Path, Path]]) -> float:
    """Return watts."""
    return sum(_known(_number(volts)) * _known(_number(amperes)) for volts, amperes in rails) / 1e6


def _rapl(root: Path) -> Meter | None:
    """Return the meters of the processor's packages and of memory that is counted apart; often only root reads them."""
    counters = []
    for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        with contextlib.suppress(OSError):
            name = (zone / "name").read_text(encoding="ascii").strip()
            if (name.startswith("package") or name == "dram") and _number(zone / "energy_uj") is not None:
                counters.append(
                    CounterMeter(name, _joules_of(zone), (_number(zone / "max_energy_range_uj") or 0) / 1e6)
                )
    return _Sum(f"RAPL, {' + '.join(each.source for each in counters)}", counters) if counters else None


def _joules_of(zone: Path) -> Callable[[], float]:
    return lambda: _known(_number(zone / "energy_uj")) / 1e6


class _Sum:
    """The sum of several meters."""

    def __init__(self, source: str, meters: Sequence[Meter]) -> None:
        self.source, self._meters = source, meters

    def joules(self) -> float:
        return sum(meter.joules() for meter in self._meters)

    def close(self) -> None:
        for meter in self._meters:
            meter.close()


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
