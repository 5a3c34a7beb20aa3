"""The memory plan: what an engine takes when it is opened, said before it is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine_core.errors import InsufficientMemoryError

NUMBER_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


def format_bytes(count: int) -> str:
    """Return ``count`` in the largest binary unit that leaves a number of at least 1, such as ``1.50 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{int(value)} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError


def kv_cache_bytes(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    max_context: int,
    max_batch: int = 1,
    kv_cache_type: str,
    int8_scales: str = "token",
) -> int:
    """Return the bytes of the linear KV cache ``[layers][batch][K, V][kv_heads][max_context][head_dim]`` and of its
    scales.

    ``int8_scales``: of an int8 cache, token (fp16, one for each token and head of K and of V), channel (float32, one
    for each channel, whatever the tokens) or none (counted elsewhere). An fp8 cache has those of tokens.
    """
    heads = num_layers * 2 * num_kv_heads
    vectors = heads * max_batch * max_context
    scales = 0
    if kv_cache_type == "int8":
        scales = {"token": vectors * 2, "channel": heads * head_dim * 4, "none": 0}[int8_scales]
    elif kv_cache_type == "fp8":
        scales = vectors * 2
    return vectors * head_dim * NUMBER_BYTES[kv_cache_type] + scales


@dataclass(frozen=True)
class MemoryItem:
    """Bytes that are taken for one purpose."""

    name: str  # docs/memory.md says what each is
    bytes: int
    on_host: bool = False  # in the host's memory, which is not the device's


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that ``load`` is going to take, and those that are free on the device it takes them from."""

    items: tuple[MemoryItem, ...]
    available: int  # bytes free before anything is taken
    device: str  # "CPU" or the GPU's name
    host_available: int = 0  # bytes free on the host, where the plan has items there

    @classmethod
    def of(
        cls,
        totals: Mapping[str, int],
        available: int,
        device: str,
        host: Mapping[str, int] | None = None,
        host_available: int = 0,
    ) -> MemoryPlan:
        """Return a plan. ``totals``, ``host``: bytes by an item's name, in the order of the plan."""
        items = [MemoryItem(name, count) for name, count in totals.items()]
        items += [MemoryItem(name, count, on_host=True) for name, count in (host or {}).items()]
        return cls(tuple(items), available, device, host_available)

    @property
    def total(self) -> int:
        """Return the bytes that are taken of the device's memory."""
        return sum(item.bytes for item in self.items if not item.on_host)

    @property
    def host_total(self) -> int:
        """Return the bytes that are taken of the host's memory beside the device."""
        return sum(item.bytes for item in self.items if item.on_host)

    def item(self, name: str) -> int:
        """Return the bytes of the item ``name``; 0 if the plan has none."""
        return sum(item.bytes for item in self.items if item.name == name)

    @staticmethod
    def names(plans: Iterable[MemoryPlan | None]) -> list[str]:
        """Return the names of the items that any of ``plans`` has, in their order."""
        return list(dict.fromkeys(item.name for plan in plans if plan is not None for item in plan.items))

    def table(self) -> str:
        """Return the plan as aligned lines, for a log or a terminal."""
        rows = [(item.name, item.bytes) for item in self.items if not item.on_host]
        rows += [("total", self.total), ("free", self.available)]
        if self.host_total:
            rows += [(f"{item.name} (host)", item.bytes) for item in self.items if item.on_host]
            rows += [("free (host)", self.host_available)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {format_bytes(count):>11}" for name, count in rows)

    def check(self, advice: str = "") -> None:
        """Raises InsufficientMemoryError with the numbers, and ``advice`` on what would fit, if it does not fit."""
        if self.host_total > self.host_available:
            on_host = {item.name: item.bytes for item in self.items if item.on_host}
            series = ", ".join(f"{name} {format_bytes(count)}" for name, count in on_host.items())
            lower = "session_memory or image_frames_memory" if "frames" in on_host else "session_memory"
            raise InsufficientMemoryError(
                f"The engine needs {format_bytes(self.host_total)} of the host's memory ({series}), but "
                f"{format_bytes(self.host_available)} are free; lower {lower}."
            )
        if self.total <= self.available:
            return
        parts = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in self.items if not item.on_host)
        raise InsufficientMemoryError(
            f"The engine needs {format_bytes(self.total)} ({parts}), but {self.device} has "
            f"{format_bytes(self.available)} free{'; ' + advice if advice else ''}."
        )
