"""The energy of a machine, from files and libraries like those of a Jetson, a PC and a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from engine_core.cuda.nvml import open_nvml
from engine_core.measure import power
from engine_core.measure.power import CounterMeter, SampledMeter, open_meter


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def write_rails(root, **rails) -> None:
    """``rails``: name → (millivolts, milliamperes)."""
    chip = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    for number, (name, (volts, amperes)) in enumerate(rails.items(), start=1):
        write(chip / f"in{number}_label", name)
        write(chip / f"in{number}_input", volts)
        write(chip / f"curr{number}_input", amperes)
    write(chip / "in4_label", "sum of shunt voltages")


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(power.time, "monotonic", lambda: now.time)
    return now


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_jetson_counts_its_whole_module(tmp_path, clock, on_gpu):
    write_rails(tmp_path, VDD_IN=(5000, 2000), VDD_CPU_GPU_CV=(5000, 700))
    meter = open_meter(on_gpu=on_gpu, root=tmp_path, nvml=lambda: pytest.fail("asked for NVML"))
    assert meter.source == "INA3221, VDD_IN"
    clock.time += 3.0
    assert meter.joules() == pytest.approx(30.0)
    meter.close()
    assert not meter._thread.is_alive()


def test_a_jetson_without_such_a_rail_counts_the_sum(tmp_path, clock):
    write_rails(tmp_path, VDD_GPU_SOC=(12000, 500), VDD_CPU_CV=(12000, 250))
    meter = open_meter(on_gpu=True, root=tmp_path)
    assert meter.source == "INA3221, VDD_CPU_CV + VDD_GPU_SOC"
    clock.time += 2.0
    assert meter.joules() == pytest.approx(18.0)
    meter.close()


def test_a_processor_counts_packages_and_memory_and_wraps(tmp_path):
    base = tmp_path / "sys/class/powercap"
    for zone, name, energy in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 1),
        ("intel-rapl:0:1", "dram", 2_000_000),
    ):
        write(base / zone / "name", name)
        write(base / zone / "energy_uj", energy)
        write(base / zone / "max_energy_range_uj", 9_000_000)
    meter = open_meter(on_gpu=False, root=tmp_path)
    assert meter.source == "RAPL, package-0 + dram"
    write(base / "intel-rapl:0/energy_uj", 8_000_000)
    assert meter.joules() == pytest.approx(3.0)
    write(base / "intel-rapl:0/energy_uj", 1_000_000)
    write(base / "intel-rapl:0:1/energy_uj", 2_500_000)
    assert meter.joules() == pytest.approx(3.0 + 2.0 + 0.5)


def test_nothing_is_counted_where_nothing_can_be_read(tmp_path):
    assert open_meter(on_gpu=False, root=tmp_path) is None
    assert open_meter(on_gpu=True, root=tmp_path, nvml=lambda: None) is None


class FakeLibrary:
    """libcuda and libnvidia-ml. ``values``: what NVML knows, by function; others fail."""

    def __init__(self, **values: int) -> None:
        self._values = values

    def cuDeviceGetPCIBusId(self, bus, size, device) -> int:
        bus.value = b"0000:01:00.0"
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus, handle) -> int:
        assert bus.value == b"0000:01:00.0"
        return 0

    def __getattr__(self, name: str):
        if not name.startswith("nvmlDeviceGet"):
            return lambda *_: 0
        if name not in self._values:
            return lambda *_: 3  # NVML_ERROR_NOT_SUPPORTED

        def read(_handle, value) -> int:
            ctypes.memmove(value, ctypes.byref(type(value._obj)(self._values[name])), ctypes.sizeof(value._obj))
            return 0

        return read


def test_a_gpu_counts_its_energy(tmp_path):
    library = FakeLibrary(nvmlDeviceGetTotalEnergyConsumption=5000, nvmlDeviceGetPowerUsage=60000)
    meter = open_meter(on_gpu=True, root=tmp_path, nvml=lambda: open_nvml(load=lambda _: library))
    assert isinstance(meter, CounterMeter)
    library._values["nvmlDeviceGetTotalEnergyConsumption"] = 7500
    assert meter.joules() == pytest.approx(2.5)


def test_what_cannot_be_read_for_a_while_is_made_up_for(tmp_path, clock):
    library = FakeLibrary(nvmlDeviceGetTotalEnergyConsumption=5000, nvmlDeviceGetPowerUsage=60000)
    meter = open_meter(on_gpu=True, root=tmp_path, nvml=lambda: open_nvml(load=lambda _: library))
    values, library._values = library._values, {}
    assert meter.joules() == 0.0
    library._values = values | {"nvmlDeviceGetTotalEnergyConsumption": 7500}
    assert meter.joules() == pytest.approx(2.5)
    write_rails(tmp_path, VDD_IN=(5000, 2000))
    sampled = open_meter(on_gpu=True, root=tmp_path, period=None)
    next(tmp_path.rglob("curr1_input")).write_text("")
    clock.time += 3.0
    assert sampled.joules() == pytest.approx(30.0)


def test_a_gpu_without_a_counter_is_sampled(tmp_path, clock):
    library = FakeLibrary(nvmlDeviceGetPowerUsage=60000)
    meter = open_meter(on_gpu=True, root=tmp_path, nvml=lambda: open_nvml(load=lambda _: library))
    assert isinstance(meter, SampledMeter)
    clock.time += 0.5
    assert meter.joules() == pytest.approx(30.0)
    meter.close()


def test_a_gpu_that_tells_nothing_has_no_meter(tmp_path):
    assert open_meter(on_gpu=True, root=tmp_path, nvml=lambda: open_nvml(load=lambda _: FakeLibrary())) is None


def test_without_the_libraries_there_is_no_gpu():
    def missing(name: str):
        raise OSError(name)

    assert open_nvml(load=missing) is None
