"""The devices a plan can be made for: the Jetson modules by name, a memory size, or the machine this runs on.

``total`` of a Jetson is what its Linux sees (MemTotal, as tegrastats prints it): the module's memory less what the
firmware keeps. ``RESERVE`` is what we assume the rest of the robot takes of it, see there. Compute capabilities,
multiprocessors and bandwidths: NVIDIA's data sheets of the modules (128 CUDA cores are one multiprocessor; the
bandwidth of the Orin Nano is that of 15 W, to which the "super" mode of JetPack 6.2 adds half).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine_core.errors import BackendUnavailableError, ConfigurationError

_MIB = 1 << 20
# Held back: a Jetson without desktop (0.6 to 1.2 GiB when idle) and a ROS 2 stack beside the model (about 1 GiB: it
# differs with the robot). NVIDIA's Jetson AI Lab (RAM Optimization) counts 0.8 GiB more for the desktop.
RESERVE = 2 << 30
RESERVE_NOTE = (
    "assumed for JetPack without a desktop and a ROS 2 stack (the desktop takes about 0.8 GiB more: "
    "Jetson AI Lab, RAM Optimization)"
)


@dataclass(frozen=True)
class DeviceProfile:
    """A device as far as a plan depends on it. Bytes."""

    name: str
    title: str
    total: int
    reserve: int = 0  # held back for everything else that runs there
    note: str = ""  # where total and reserve come from
    capability: int = 0  # of its NVIDIA GPU, 87 = sm_87; 0 = unknown, or none with num_sms 0
    num_sms: int = 0  # 0 = no GPU
    shared_memory: bool = True  # CPU and GPU use the same memory
    bandwidth: float = 0.0  # bytes per second that its memory delivers; 0 = unknown
    bandwidth_note: str = ""  # where that is from

    @property
    def free(self) -> int:
        """Bytes that the engine may take."""
        return max(0, self.total - self.reserve)

    @property
    def has_gpu(self) -> bool:
        return self.num_sms > 0


def _jetson(
    name: str, title: str, total_mib: int, capability: int, num_sms: int, gb_per_second: float
) -> DeviceProfile:
    return DeviceProfile(
        name,
        title,
        total_mib * _MIB,
        RESERVE,
        RESERVE_NOTE,
        capability,
        num_sms,
        bandwidth=gb_per_second * 1e9,
        bandwidth_note="its data sheet",
    )


DEVICES = {
    profile.name: profile
    for profile in (
        _jetson("orin-nano-8gb", "Jetson Orin Nano 8 GB", 7620, 87, 8, 68.3),
        _jetson("orin-nx-8gb", "Jetson Orin NX 8 GB", 7620, 87, 8, 102.4),
        _jetson("orin-nx-16gb", "Jetson Orin NX 16 GB", 15656, 87, 8, 102.4),
        _jetson("agx-orin-32gb", "Jetson AGX Orin 32 GB", 30536, 87, 14, 204.8),
        _jetson("agx-orin-64gb", "Jetson AGX Orin 64 GB", 62841, 87, 16, 204.8),
        _jetson("thor-128gb", "Jetson AGX Thor 128 GB", 125772, 110, 20, 273.0),
    )
}
# Of a GPU given by its memory alone, taken for a Jetson's: those of 48 and more have longer chunks.
_GENERIC_SMS = 16

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_UNITS |= {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """Return ``16GB`` (10⁹ bytes each), ``16GiB`` or ``16G`` (2³⁰) as bytes. Raises ConfigurationError."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigurationError(f"{text!r} is not a memory size; write for instance 16GB, 14.5GiB or 900MiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def of_memory(num_bytes: int, *, gpu: bool) -> DeviceProfile:
    """Return a device of which only the free memory is known."""
    kind = "GPU" if gpu else "CPU"
    note = "as given; nothing is held back unless --reserve says so"
    return DeviceProfile("memory", f"a {kind}", num_bytes, 0, note, num_sms=_GENERIC_SMS if gpu else 0)


def named(name: str) -> DeviceProfile:
    """Raises ConfigurationError for a name that is not in DEVICES."""
    if name not in DEVICES:
        raise ConfigurationError(f"The device {name!r} is unknown; known are {', '.join(DEVICES)} and this.")
    return DEVICES[name]


def with_reserve(profile: DeviceProfile, reserve: int) -> DeviceProfile:
    return replace(profile, reserve=reserve, note="as given with --reserve")


def with_bandwidth(profile: DeviceProfile, gb_per_second: float) -> DeviceProfile:
    return replace(profile, bandwidth=gb_per_second * 1e9, bandwidth_note="as given with --bandwidth")


def cpu_of(profile: DeviceProfile) -> DeviceProfile:
    """Return the CPU beside the GPU of a device: with the same memory where they share it, else that of this machine.

    It is assumed to get half of a shared memory's bandwidth.
    """
    if not profile.shared_memory:
        return this_cpu(measure=True)
    return replace(profile, title=f"the CPU of {profile.title}", num_sms=0, bandwidth=profile.bandwidth / 2)


def this_cpu(*, measure: bool = False) -> DeviceProfile:
    """Return the main memory of this machine: what is free now (within its cgroup), so nothing is held back.

    ``measure``: measure its bandwidth, too, which takes a third of a second.
    """
    from engine_core.host_memory import available_memory, memory_bandwidth

    return DeviceProfile(
        "this",
        "this machine's CPU",
        available_memory(),
        0,
        "free now",
        bandwidth=memory_bandwidth() if measure else 0.0,
        bandwidth_note="measured now" if measure else "",
    )


def this_machine(*, measure: bool = False) -> DeviceProfile:
    """Return the NVIDIA GPU of this machine with what is free on it now, or the CPU where there is none that can be
    used.

    ``measure``: measure a CPU's bandwidth, see ``this_cpu``; a GPU's driver knows it.
    """
    from engine_core.cuda.driver import Device

    try:
        device = Device()
    except BackendUnavailableError:
        return this_cpu(measure=measure)
    try:
        free, _ = device.memory_info()
        return DeviceProfile(
            "this",
            f"this machine's {device.name}",
            free,
            note="free now",
            capability=device.capability,
            num_sms=device.num_sms,
            shared_memory=False,
            bandwidth=device.memory_bandwidth(),
            bandwidth_note="by its driver",
        )
    finally:
        device.close()
