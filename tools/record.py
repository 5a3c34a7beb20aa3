"""Record a terminal as an animated SVG: what a program really prints, with its times.

python3 -m pip install pyte
tools/start run tools/record.py demo docs/demo.svg   # make demo
tools/start run tools/record.py top docs/top.svg     # top, while a node answers four clients
tools/start run tools/record.py page docs/page.png   # the page of its HTTP endpoint, in Chromium

The recording needs no script to play: it is an image with SMIL animations. A pause is shortened to a second.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
_LONGEST_PAUSE = 1.0  # s
_SLOWER = 3  # the demo: it answers faster than one reads
_PORT = 8123  # of the page
_LAST = 3.0  # s that the last picture stays
_FRAME = 0.1  # s: what is drawn within this time is one picture
_CELL, _LINE, _FONT = 8.4, 18, 14  # px
_SPACE = "\N{NO-BREAK SPACE}"  # spaces beside each other would be one
_PAGE, _TEXT = "#161b22", "#d6dde6"
_COLORS = {
    "black": "#3b4350", "red": "#f2726f", "green": "#4cc38a", "brown": "#f0b04c", "yellow": "#f0b04c",
    "blue": "#6ba3f5", "magenta": "#b98cf0", "cyan": "#4fd0ba", "white": "#d6dde6", "brightblack": "#7d8896",
}  # fmt: skip

Run = tuple[str, str, bool, bool]  # text, colour, bold, reversed
Rows = tuple[tuple[Run, ...], ...]


def capture(command: Sequence[str], size: tuple[int, int], keys: Sequence[tuple[float, str]] = ()) -> list:
    """Return (seconds, bytes) of what ``command`` writes to a terminal of ``size`` columns and lines until it ends.

    ``keys``: what is typed, and when.
    """
    end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    start, chunks, waiting = time.monotonic(), [], list(keys)
    with contextlib.suppress(OSError):  # the other end is closed
        while True:
            now = time.monotonic() - start
            while waiting and waiting[0][0] <= now:
                os.write(end, waiting.pop(0)[1].encode())
            if select.select([end], [], [], 0.05)[0]:
                data = os.read(end, 65536)
                if not data:
                    break
                chunks.append((time.monotonic() - start, data))
    os.close(end)
    if process.wait():
        raise SystemExit(f"{command[0]} ended with exit status {process.returncode}: {chunks[-1:]}")
    return chunks


def pictures(chunks: list, size: tuple[int, int]) -> Iterator[tuple[float, Rows]]:
    """Yield (seconds, rows) of each picture that the terminal shows."""
    import pyte

    screen = pyte.Screen(*size)
    stream = pyte.ByteStream(screen)
    shown: Rows = ()
    clock = before = drawn = 0.0
    for index, (when, data) in enumerate(chunks):
        # Of a program that leaves the alternate screen, the last picture is the one before.
        data = re.sub(rb"\x1b\[\?1049l.*", b"", data, flags=re.DOTALL)
        stream.feed(data)
        clock += min(when - before, _LONGEST_PAUSE)
        before = when
        following = chunks[index + 1][0] if index + 1 < len(chunks) else when + 1
        is_due = following - when >= _FRAME / 2 or clock - drawn >= _FRAME
        if is_due and (rows := _rows(screen)) != shown:
            shown, drawn = rows, clock
            yield clock, rows


def _rows(screen) -> Rows:
    rows = []
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        runs = []
        for style, group in groupby(cells, key=lambda cell: (cell.fg, cell.bold, cell.reverse)):
            runs.append(("".join(cell.data for cell in group), *style))
        while runs and not runs[-1][0].strip() and not runs[-1][3]:
            runs.pop()
        rows.append(tuple(runs))
    return tuple(rows)


def draw(shown: list[tuple[float, Rows]], size: tuple[int, int], title: str) -> str:
    """Return the SVG. Each row is drawn once for each content it has, visible as long as it has it."""
    columns = size[0]
    lines = max(max((y for y, row in enumerate(rows) if row), default=0) for _, rows in shown) + 1
    total = shown[-1][0] + _LAST
    width, height = round(columns * _CELL) + 24, lines * _LINE + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="{_FONT}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="9" fill="{_PAGE}"/>',
        *(
            f'<circle cx="{18 + 18 * index}" cy="16" r="5.5" fill="{_COLORS[name]}"/>'
            for index, name in enumerate(("red", "yellow", "green"))
        ),
        f'<text x="{width / 2:g}" y="21" fill="#7d8896" text-anchor="middle" font-size="12">{escape(title)}</text>',
        f'<g fill="{_TEXT}" transform="translate(12 46)">',
    ]  # fmt: skip
    times = [when for when, _ in shown] + [total]
    for y in range(lines):
        spans = groupby(enumerate(rows[y] for _, rows in shown), key=lambda pair: pair[1])
        for row, group in spans:
            indices = [index for index, _ in group]
            if row:
                begin, end = times[indices[0]], times[indices[-1] + 1]
                parts.append(_row(row, y, begin / total, end / total, total))
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _row(row: tuple[Run, ...], y: int, begin: float, end: float, total: float) -> str:
    text, boxes, column = "", "", 0
    for content, color, bold, is_reversed in row:
        fill = _COLORS.get(color, f"#{color}" if re.fullmatch("[0-9a-f]{6}", color) else "")
        if is_reversed:
            box = f'<rect x="{column * _CELL:g}" y="{y * _LINE - 13:g}" width="{len(content) * _CELL:g}"'
            boxes += f'{box} height="{_LINE}" fill="{fill or _TEXT}"/>'
            fill = _PAGE
        style = (f' fill="{fill}"' if fill else "") + (' font-weight="bold"' if bold else "")
        if shown := content.strip():
            place = column + len(content) - len(content.lstrip())
            text += f'<tspan x="{place * _CELL:g}"{style}>{escape(shown).replace("  ", 2 * _SPACE)}</tspan>'
        column += len(content)
    animation = ""
    if begin > 0 or end < 1:
        values, keys = ["visible"], [0.0]
        if begin > 0:
            values, keys = ["hidden", "visible"], [0.0, begin]
        if end < 1:
            values, keys = [*values, "hidden"], [*keys, end]
        animation = (
            f'<animate attributeName="visibility" values="{";".join(values)}" calcMode="discrete" '
            f'keyTimes="{";".join(f"{key:.4g}" for key in keys)}" dur="{total:.1f}s" repeatCount="indefinite"/>'
        )
    hidden = ' visibility="hidden"' if end < 1 else ""  # without animations the last picture is there
    return f'<g{hidden}>{animation}{boxes}<text y="{y * _LINE}">{text}</text></g>'


# --- scenes -----------------------------------------------------------------------------------------------


def demo() -> tuple[list, tuple[int, int], str]:
    """``make demo``, after it has set everything up."""
    size = (110, 24)
    command = [sys.executable, str(ROOT / "tools" / "demo.py")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # builds the engine the first time
    chunks = [(_SLOWER * when, data) for when, data in capture(command, size)]
    chunks = [(when, data.replace(f"{ROOT}/".encode(), b"")) for when, data in chunks]
    return chunks, size, f"make demo, shown {_SLOWER} times slower than it is"


def top() -> tuple[list, tuple[int, int], str]:
    """``top`` beside a node of the demo model, which four clients ask."""
    size, seconds = (100, 18), 14.0
    with _busy_node():
        keys = [(seconds - 5, "\x1b[B"), (seconds - 4, "c"), (seconds, "q")]
        return capture([sys.executable, "-m", "edgellm_ros.top"], size, keys), size, "ros2 run edgellm_ros top"


def photograph(url: str, seconds: float, size: tuple[int, int]) -> bytes:
    """Return a PNG of a page after ``seconds`` in Chromium, which is told by its DevTools protocol."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("A picture of the page needs chromium: sudo apt install chromium")
    (theirs, ours), (answers, their_answers) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as home:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--user-data-dir={home}", f"--window-size={size[0]},{size[1]}",
        ]  # fmt: skip

        def wire() -> None:  # Chromium reads commands from descriptor 3 and writes answers to 4
            os.dup2(theirs, 100)
            os.dup2(their_answers, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)

        process = subprocess.Popen(command, close_fds=False, preexec_fn=wire, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(their_answers)
        number, rest = 0, b""

        def call(method: str, session: str = "", **parameters: object) -> dict:
            nonlocal number, rest
            number += 1
            message = {"id": number, "method": method, "params": parameters} | (
                {"sessionId": session} if session else {}
            )
            os.write(ours, json.dumps(message).encode() + b"\0")
            while True:
                while b"\0" not in rest:
                    rest += os.read(answers, 1 << 20)
                answer, _, rest = rest.partition(b"\0")
                if (found := json.loads(answer)).get("id") == number:
                    return found["result"]

        target = call("Target.createTarget", url=url)["targetId"]
        session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        time.sleep(seconds)
        picture = call("Page.captureScreenshot", session)["data"]
        process.terminate()
        process.wait()
    return base64.b64decode(picture)


def page(out: Path) -> None:
    """The page of the HTTP endpoint, beside the same node."""
    with _busy_node(http_port=_PORT):
        out.write_bytes(photograph(f"http://127.0.0.1:{_PORT}/", 45.0, (1000, 720)))


@contextlib.contextmanager
def _busy_node(**parameters: object) -> Iterator[None]:
    """An active node of the demo model, which four clients keep busy."""
    from edgellm_ros import demo_engine

    checkpoint = demo_engine.checkpoint_dir()
    engine = demo_engine.engine_dir(checkpoint)
    if not demo_engine.is_built(engine):
        subprocess.run(demo_engine.build_command(checkpoint, engine), check=True)
    with contextlib.ExitStack() as undo:
        parameters |= {"engine_dir": engine, "autostart": "true", "max_batch": 2, "session_memory": 64}
        options = [part for name, value in parameters.items() for part in ("-p", f"{name}:={value}")]
        log = undo.enter_context(tempfile.TemporaryFile())
        command = [sys.executable, str(ROOT / "scripts" / "llm_node"), "--ros-args", *options]
        node = subprocess.Popen(command, stdout=log, stderr=log)
        undo.callback(node.wait)
        undo.callback(node.send_signal, signal.SIGINT)
        stop = threading.Event()
        clients = threading.Thread(target=_ask, args=(active := threading.Event(), stop))
        clients.start()
        undo.callback(clients.join)
        undo.callback(stop.set)
        if not active.wait(60.0):
            raise SystemExit("The node did not become active.")
        yield


_COMMANDS = (
    "Please bring me the red cup from the kitchen.", "Go to the garage and wait there.",
    "Open the window in the bedroom.", "Take the book from the table and put it on the shelf.",
)  # fmt: skip


def _ask(active: threading.Event, stop: threading.Event) -> None:
    """Keep four requests of four clients open, which go on past the end of their answers."""
    import rclpy
    from rclpy.context import Context
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node

    from edgellm_ros import qos
    from edgellm_ros.msg import ChatMessage, EngineStatus, GenerationRequest, SamplingOptions
    from edgellm_ros.srv import Generate

    context = Context()
    rclpy.init(context=context)
    node = Node("clients", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    service = node.create_client(Generate, "/llm/generate")

    def on_status(status: EngineStatus) -> None:
        if status.state == EngineStatus.ACTIVE:
            active.set()

    node.create_subscription(EngineStatus, "/llm/status", on_status, qos.LATCHED)
    names, turns, futures = ("planner", "voice", "patrol", "arm"), [0] * 4, [None] * 4
    while not stop.is_set():
        executor.spin_once(timeout_sec=0.05)
        for index, future in enumerate(futures):
            if active.is_set() and service.service_is_ready() and (future is None or future.done()):
                turns[index] += 1
                request = GenerationRequest(
                    request_id=f"{names[index]}-{turns[index]}", priority=3 - index,
                    messages=[ChatMessage(role="user", content=_COMMANDS[index])],
                    session="anna" if index == 1 else "", context_policy="drop_oldest" if index == 1 else "",
                    sampling=SamplingOptions(ignore_eos=True, max_new_tokens=[300 + 150 * index]),
                )  # fmt: skip
                futures[index] = service.call_async(Generate.Request(request=request))
    executor.shutdown()
    node.destroy_node()
    context.try_shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", choices=("demo", "top", "page"), help="what is recorded")
    parser.add_argument("out", type=Path, help="the SVG, or the PNG of the page, to write")
    options = parser.parse_args()
    out = options.out if options.out.is_absolute() else ROOT / options.out
    if options.scene != "page" and importlib.util.find_spec("pyte") is None:
        print("Recording needs the Python package pyte: python3 -m pip install pyte", file=sys.stderr)
        return 1
    os.environ["ROS_HOME"] = str(ROOT / ".demo")  # where the engine of the demo is
    if options.scene == "page":
        page(out)
        print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")
        return 0
    chunks, size, title = {"demo": demo, "top": top}[options.scene]()
    shown = list(pictures(chunks, size))
    out.write_text(draw(shown, size, title), encoding="utf-8")
    print(f"{out}: {len(shown)} pictures, {shown[-1][0]:.1f} s, {out.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
