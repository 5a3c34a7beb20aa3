"""The screen of ``top``, as a rich renderable of any size."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgellm_ros.msg import EngineStatus, RequestStatus
from edgellm_ros.top_figures import Figures
from engine_core.memory import format_bytes

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"
_COLORS = ("blue", "cyan", "yellow", "magenta", "red", "white", "green")
_STATES = {
    EngineStatus.UNCONFIGURED: ("unconfigured", "yellow"),
    EngineStatus.INACTIVE: ("inactive", "yellow"),
    EngineStatus.ACTIVE: ("active", "green"),
    EngineStatus.FINALIZED: ("finalized", "red"),
}
_LABEL = 9  # columns
_FAILURES = 3  # lines
_HEAD = 6  # lines above the table's rows, its header among them


def sparkline(values: Sequence[float], *, ascii_only: bool = False) -> str:
    """Return a character for each value, as high as its share of the largest one."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    top = max(values, default=0.0)
    if top <= 0:
        return blocks[0] * len(values)
    return "".join(blocks[min(len(blocks) - 1, round(value / top * (len(blocks) - 1)))] for value in values)


def bar(parts: Iterable[float], whole: float, width: int, *, ascii_only: bool = False) -> Text:
    """Return ``width`` columns, the parts of ``whole`` in a colour each."""
    parts = list(parts)
    whole = max(whole, sum(parts), 1)
    text, full, empty = Text(), "#" if ascii_only else "█", "." if ascii_only else "░"
    done, drawn = 0.0, 0
    for index, part in enumerate(parts):
        done += part
        end = round(done / whole * width)
        if part > 0 and end == drawn == 0:
            end = 1  # what is there can be seen
        text.append(full * (end - drawn), _COLORS[index % len(_COLORS)])
        drawn = max(drawn, end)
    return text.append(empty * (width - drawn), "bright_black")


def seconds(value: float) -> str:
    """Return a duration for people."""
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


class View:
    """Draws the figures of one node. ``selected``: the index of the request that keys act on."""

    def __init__(self, name: str, figures: Figures) -> None:
        self.name = name
        self.figures = figures
        self.selected = 0
        self.message = ""  # of the last key

    @property
    def requests(self) -> list[RequestStatus]:
        status = self.figures.status
        return [] if status is None else list(status.requests)

    @property
    def chosen(self) -> RequestStatus | None:
        """The request that is selected."""
        requests = self.requests
        return requests[min(self.selected, len(requests) - 1)] if requests else None

    def move(self, step: int) -> None:
        self.selected = max(0, min(len(self.requests) - 1, self.selected + step))

    def render(self, width: int, height: int = 0, *, ascii_only: bool = False, keys: str = "") -> Group:
        """Return the screen. ``height``: 0 = as many lines as there are; ``keys``: the last line."""
        failures = list(self.figures.failures)[-_FAILURES:]
        lines: list[RenderableType] = [self._title(width), *self._head(width, ascii_only)]
        below = (1 + len(failures) if failures else 0) + bool(keys)
        room = max(1, height - _HEAD - below) if height else 0
        table, num_lines = self._table(room)
        lines.append(table)
        used = len(lines) - 1 + num_lines
        if height and (blank := height - used - below) > 0:
            lines.append(Text("\n" * (blank - 1)))
        if failures:
            lines.append(Text("last errors", "bold"))
            lines += [self._failure(failure, width) for failure in failures]
        if keys:
            lines.append(Text(self.message or keys, "reverse" if self.message else "bright_black", no_wrap=True))
        return Group(*lines)

    def _title(self, width: int) -> Text:
        status = self.figures.status
        if status is None:
            return _line(width, (self.name, "bold"), "  ", ("not there", "red"), "  waiting for its ~/status")
        name, color = _STATES.get(status.state, (str(status.state), "red"))
        if status.configuring:
            name, color = f"configuring {status.load_progress:.0%}", "yellow"
        model = f"{status.model_name} ({status.quantization}, {status.backend})" if status.model_name else "no model"
        running = sum(request.running for request in self.requests)
        load = f"{running} running, {len(self.requests) - running} waiting" if status.model_name else ""
        more = [part for part in (load, model, *self._device()) if part]
        return _line(width, (self.name, "bold"), "  ", (name, f"bold {color}"), "  ", "  ".join(more))

    def _device(self) -> list[str]:
        info = self.figures.info
        return [] if info is None else [info.device]

    def _head(self, width: int, ascii_only: bool) -> list[Text]:
        figures, status, info = self.figures, self.figures.status, self.figures.info
        now = time.monotonic()
        narrow = max(10, min(40, width - 50))
        if status is not None and status.configuring:
            done = status.load_progress
            memory = _labelled("loading", bar([done], 1.0, narrow, ascii_only=ascii_only), f" {done:.0%}")
        elif info is not None:
            items = [item for item in info.memory.items if item.bytes]
            names = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in items)
            shares = bar([item.bytes for item in items], info.memory.available, narrow, ascii_only=ascii_only)
            total = f" {format_bytes(info.memory.total)} of {format_bytes(info.memory.available)}: {names}"
            memory = _labelled("memory", shares, total)
        else:
            total = format_bytes(status.memory_total) if status is not None and status.memory_total else "-"
            memory = _labelled("memory", Text(), total)
        room = status.max_context * (info.max_batch if info is not None else 1) if status is not None else 0
        used, kept, pool = (status.kv_tokens, status.pool_tokens_used, status.pool_tokens) if status else (0, 0, 0)
        kv = _labelled(
            "KV",
            bar([used], room, narrow, ascii_only=ascii_only),
            f" {used} of {room} tokens in use; kept {kept} of {pool}",
        )
        rates, waits = figures.rates(now, narrow), [*figures.waits][-narrow:]
        speed = _labelled(
            "tokens/s", Text(sparkline(rates, ascii_only=ascii_only), "green"),
            f" {figures.rate(now):.1f} now; {figures.num_tokens} tokens of {figures.num_requests} answers",
        )  # fmt: skip
        last = f" last {seconds(waits[-1])}, first token after {seconds(figures.first_tokens[-1])}" if waits else " -"
        drawn = sparkline(waits, ascii_only=ascii_only).rjust(narrow)
        wait = _labelled("wait", Text(drawn, "yellow"), last)
        lines = [memory, kv, speed, wait]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _table(self, room: int) -> tuple[Table, int]:
        """Return the table of requests and its number of lines. ``room``: rows at most; 0 = all."""
        requests = self.requests
        self.move(0)
        start = max(0, min(self.selected - room // 2, len(requests) - room)) if room else 0
        shown = requests[start : start + room] if room else requests
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("request", no_wrap=True, ratio=3, overflow="ellipsis")
        for name, wide in (("prio", 4), ("session", 10), ("adapter", 10), ("state", 7)):
            justify = "right" if name == "prio" else "left"
            table.add_column(name, no_wrap=True, width=wide, overflow="ellipsis", justify=justify)  # type: ignore[arg-type]
        for name, wide in (("prompt", 6), ("tokens", 6), ("wait", 7)):
            table.add_column(name, no_wrap=True, width=wide, justify="right")
        for index, request in enumerate(shown, start):
            cells = [
                request.request_id, str(request.priority), request.session, request.adapter,
                "running" if request.running else "waits", str(request.prompt_tokens), str(request.generated_tokens),
                seconds(request.wait),
            ]  # fmt: skip
            style = "reverse" if room and index == self.selected else "" if request.running else "bright_black"
            table.add_row(*(Text(_printable(cell)) for cell in cells), style=style)
        if not shown:
            table.add_row(Text("none", "bright_black"))
        return table, 1 + max(1, len(shown))

    def _failure(self, failure, width: int) -> Text:
        clock = time.strftime("%H:%M:%S", time.localtime(failure.time))
        return _line(width, (clock, "bright_black"), " ", (failure.what, "bold"), " ", (failure.why, "red"))


def _labelled(label: str, drawn: Text, rest: str) -> Text:
    text = Text(f"{label:<{_LABEL}}", "bold", no_wrap=True)
    return Text.assemble(text, drawn, (_printable(rest), "default"), no_wrap=True)


def _line(width: int, *parts: str | tuple[str, str]) -> Text:
    clean = [_printable(part) if isinstance(part, str) else (_printable(part[0]), part[1]) for part in parts]
    line = Text.assemble(*clean, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def _printable(text: str) -> str:
    """Return ``text`` on one line, without what a client could steer the terminal with."""
    return "".join(char if char.isprintable() else " " for char in text)
