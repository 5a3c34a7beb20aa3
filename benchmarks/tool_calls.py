"""Count right tools and arguments: 60 spoken commands for four robot tools, by a real model.

    python3 benchmarks/tool_calls.py ENGINE_DIR [--choice auto required] [--threads 2] [--commands 60]
    python3 benchmarks/tool_calls.py --server URL --name "llama.cpp b1234, Q4_K_M" [--choice auto required]

Asks an engine through ``Engine.generate``, without ROS, greedily, one command at a time, and judges each answer:

- tool: the first call is of the tool that was meant. arguments: its arguments are the ones meant, too; texts are
  compared without case, articles, colours and plural.
- malformed: a call of no tool, or whose arguments do not fit the tool's schema by the library ``jsonschema``.
- cuts: after each token of the answer, what was handed out by then is a beginning of the whole, and no call is half.

``--server``: asks an OpenAI-compatible server instead, for comparison; there are no cuts then. ``--name`` is what the
row calls it, with its version and the file of its model. llama.cpp's: ``llama-server -m FILE.gguf --jinja -c 4096``.
``--read-text``: in an answer without a call, the first JSON object of the text counts as one, as for a client that
parses calls itself.

Prints a line for each wrong answer and appends a row for each choice to benchmarks/results/tools.jsonl. Exit status 1
if an answer was malformed or cut wrongly. Needs the package ``jsonschema``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams, Tool  # noqa: E402
from engine_core.serving.engine import CancelToken, Engine  # noqa: E402
from engine_core.text.answer import AnswerReader  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "tools.jsonl"
MAX_TOKENS = 96
SYSTEM = "You control a robot at home. Call the function that does what the user asks for."
COLORS = ("red", "green", "blue", "yellow", "black", "white")
PLACES = ("kitchen", "bedroom", "office", "hall", "garage", "garden", "dock")


def _schema(required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


PARAMETERS = {
    "drive_to": _schema(
        ["place"], place={"type": "string", "enum": list(PLACES), "description": "Where the robot drives to."}
    ),
    "pick_up": _schema(
        ["object"], object={"type": "string", "description": "The object that the gripper takes, without its colour."},
        color={"type": "string", "enum": list(COLORS)},
    ),
    "set_speed": _schema(
        ["speed"], speed={"type": "number", "minimum": 0, "maximum": 2, "description": "Metres per second."}
    ),
    "switch_light": _schema(
        ["room", "on"], room={"type": "string", "enum": list(PLACES)}, on={"type": "boolean"}
    ),
}  # fmt: skip
DESCRIPTIONS = {
    "drive_to": "Drive the robot to a place.",
    "pick_up": "Pick up an object with the gripper.",
    "set_speed": "Set how fast the robot drives.",
    "switch_light": "Switch the light of a room on or off.",
}
TOOLS = tuple(Tool(name, DESCRIPTIONS[name], json.dumps(PARAMETERS[name])) for name in PARAMETERS)


@dataclass(frozen=True)
class Command:
    """A sentence that a person says, and the call that is meant."""

    text: str
    tool: str
    arguments: dict[str, Any]


def _drive(text: str, place: str) -> Command:
    return Command(text, "drive_to", {"place": place})


def _pick(text: str, thing: str, color: str = "") -> Command:
    return Command(text, "pick_up", {"object": thing} | ({"color": color} if color else {}))


def _speed(text: str, speed: float) -> Command:
    return Command(text, "set_speed", {"speed": speed})


def _light(text: str, room: str, on: bool) -> Command:
    return Command(text, "switch_light", {"room": room, "on": on})


COMMANDS = (
    _drive("go to the kitchen", "kitchen"), _drive("please drive to the office", "office"),
    _drive("come to the bedroom", "bedroom"), _drive("drive back to the dock", "dock"),
    _drive("could you go into the garage", "garage"), _drive("head over to the garden", "garden"),
    _drive("move to the hall now", "hall"), _drive("I need you in the kitchen", "kitchen"),
    _drive("return to your dock and charge", "dock"), _drive("wait for me in the hall", "hall"),
    _drive("robot, go to the bedroom please", "bedroom"), _drive("take yourself to the garden", "garden"),
    _drive("meet me at the office", "office"), _drive("roll to the garage", "garage"),
    _drive("let's go to the garden", "garden"),
    _pick("pick up the cup", "cup"), _pick("grab the red cup", "cup", "red"), _pick("take the ball", "ball"),
    _pick("pick up the blue ball", "ball", "blue"), _pick("lift the book", "book"),
    _pick("get hold of the green bottle", "bottle", "green"), _pick("please pick up my keys", "keys"),
    _pick("grab the yellow box", "box", "yellow"), _pick("pick the black shoe up", "shoe", "black"),
    _pick("take the white plate", "plate", "white"), _pick("grip the spoon", "spoon"),
    _pick("could you pick up the phone", "phone"), _pick("collect the red apple", "apple", "red"),
    _pick("take that bottle", "bottle"), _pick("pick up a blue pen", "pen", "blue"),
    _speed("set your speed to one metre per second", 1.0), _speed("drive at half a metre per second", 0.5),
    _speed("set the speed to 0.3", 0.3), _speed("your speed should be 1.5 metres per second", 1.5),
    _speed("from now on drive at 0.8 metres per second", 0.8), _speed("speed 2 please", 2.0),
    _speed("set speed to zero point two", 0.2), _speed("change the speed to 1.2 metres per second", 1.2),
    _speed("limit your speed to 0.6 metres per second", 0.6), _speed("set the driving speed to 0.4", 0.4),
    _speed("I want you to drive with 0.7 metres per second", 0.7), _speed("use a speed of 1.8", 1.8),
    _speed("set your speed to 0.9 metres per second, please", 0.9), _speed("speed to 0.1 metres per second", 0.1),
    _speed("drive with a speed of 1.1 metres a second", 1.1),
    _light("switch on the light in the kitchen", "kitchen", True), _light("light off in the office", "office", False),
    _light("turn the bedroom light off", "bedroom", False), _light("turn on the light in the hall", "hall", True),
    _light("make the garage bright", "garage", True), _light("lights out in the bedroom", "bedroom", False),
    _light("please switch the kitchen light off", "kitchen", False), _light("light up the garden", "garden", True),
    _light("put the office light on", "office", True), _light("switch off the hall light", "hall", False),
    _light("turn off the lights in the garden", "garden", False), _light("dark in the hall, light on", "hall", True),
    _light("turn the garage lights on", "garage", True), _light("no light in the kitchen please", "kitchen", False),
    _light("switch the light in the bedroom on", "bedroom", True),
)  # fmt: skip


@dataclass
class Counts:
    """The judgements of one choice."""

    answers: int = 0
    calls: int = 0  # answers with a call
    tools: int = 0  # right ones
    arguments: int = 0  # right tools with right arguments
    malformed: int = 0
    wrong_cuts: int = 0
    seconds: float = 0.0
    tokens: int = 0


Calls = list[tuple[str, Any]]


def main() -> int:
    arguments = parse()
    if arguments.server:
        ask, name = Server(arguments.server, arguments.read_text), arguments.name
    else:
        config = EngineConfig(arguments.engine, num_threads=arguments.threads, speculation=arguments.speculation)
        engine = Engine.open(config, report=lambda _: None)
        ask, name = Local(engine), f"{engine.manifest.model_name} {engine.manifest.quantization}"
    is_wrong = False
    for choice in arguments.choice:
        counts = Counts()
        for command in COMMANDS[:: max(1, len(COMMANDS) // arguments.commands)][: arguments.commands]:
            judge(ask, command, choice, counts)
        row = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "engine": name,
            "choice": choice,
            **({"read_text": True} if arguments.read_text else {}),
            **{key: round(value, 1) for key, value in vars(counts).items()},
        }
        print(json.dumps(row), flush=True)
        if not arguments.no_record:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        is_wrong = is_wrong or bool(counts.malformed or counts.wrong_cuts)
    return int(is_wrong)


def judge(ask: Local | Server, command: Command, choice: str, counts: Counts) -> None:
    """Ask for a command and count what comes."""
    start = time.monotonic()
    calls, text, tokens, has_wrong_cut = ask(command.text, choice)
    counts.seconds += time.monotonic() - start
    counts.answers += 1
    counts.tokens += tokens
    counts.calls += bool(calls)
    counts.malformed += any(is_malformed(*call) for call in calls)
    counts.wrong_cuts += has_wrong_cut
    is_tool = bool(calls) and calls[0][0] == command.tool
    is_right = is_tool and comparable(calls[0][1]) == comparable(command.arguments)
    counts.tools += is_tool
    counts.arguments += is_right
    if not is_right:
        print(f"{command.text!r}: {calls or text!r}, meant {command.tool} {command.arguments}", flush=True)


def is_malformed(name: str, arguments: Any) -> bool:
    """Return whether a call does not fit the schema of its tool, or is of none."""
    if name not in PARAMETERS:
        return True
    return not jsonschema.Draft202012Validator(PARAMETERS[name]).is_valid(arguments)


def comparable(arguments: Any) -> Any:
    """Return arguments in a form in which those that mean the same are equal."""
    if isinstance(arguments, dict):
        return {key: comparable(value) for key, value in arguments.items()}
    if isinstance(arguments, str):
        return re.sub(rf"\b(the|a|an|my|that|{'|'.join(COLORS)}) ", "", arguments.lower().strip()).rstrip("s")
    return arguments


class Local:
    """Asks an engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, text: str, choice: str) -> tuple[Calls, str, int, bool]:
        """Return the calls, the text, the number of tokens and whether a cut was wrong."""
        messages = (ChatMessage("system", SYSTEM), ChatMessage("user", text))
        sampling = SamplingParams(max_new_tokens=MAX_TOKENS)
        request = GenerationRequest(
            "0",
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            sampling=sampling,
        )
        prepared, pieces = self._engine.prepare(request), []
        generator = self._engine.generate(prepared, CancelToken())
        while True:
            try:
                pieces.append(next(generator))
            except StopIteration as stop:
                result = stop.value
                break
        calls = [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
        streamed = "".join(p.text for p in pieces), tuple(call for p in pieces for call in p.tool_calls)
        is_wrong = streamed != (result.text, result.tool_calls)
        for end in range(len(result.token_ids)):
            reader = AnswerReader(self._engine.tokenizer, prepared.expected)
            for token in result.token_ids[:end]:
                reader.feed(token)
            reader.finish(cut=True)
            parts = reader.take()
            found = [(call.name, json.loads(call.arguments)) for call in parts.calls]
            is_wrong = is_wrong or found != calls[: len(found)] or not result.text.startswith(parts.text.rstrip())
        return calls, result.text, result.generated_tokens, is_wrong


class Server:
    """Asks an OpenAI-compatible server."""

    def __init__(self, url: str, reads_text: bool) -> None:
        self._url = url.rstrip("/") + "/v1/chat/completions"
        self._reads_text = reads_text

    def __call__(self, text: str, choice: str) -> tuple[Calls, str, int, bool]:
        """Return the calls, the text, the number of tokens and False."""
        functions = [
            {"name": name, "description": DESCRIPTIONS[name], "parameters": PARAMETERS[name]} for name in PARAMETERS
        ]
        body = {
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
            "tools": [{"type": "function", "function": function} for function in functions],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        request = urllib.request.Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.load(response)
        message = answer["choices"][0]["message"]
        calls = [_call_of(call["function"]) for call in message.get("tool_calls") or ()]
        text = message.get("content") or ""
        if self._reads_text and not calls:
            calls = calls_in(text)
        return calls, text, answer.get("usage", {}).get("completion_tokens", 0), False


def _call_of(function: dict[str, str]) -> tuple[str, Any]:
    try:
        return function["name"], json.loads(function["arguments"])
    except ValueError:
        return function["name"], None  # fits no schema


def calls_in(text: str) -> Calls:
    """Return the call that the first JSON object of a text spells, else none."""
    start = text.find("{")
    try:
        value = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else {}
    except ValueError:
        return []
    return [(str(value["name"]), value.get("arguments"))] if "name" in value else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count right tools and arguments of spoken commands.")
    parser.add_argument("engine", nargs="?", type=Path, help="engine directory of a model whose template has tools")
    parser.add_argument("--server", default="", metavar="URL", help="ask this OpenAI-compatible server instead")
    parser.add_argument("--name", default="server", help="of the server, for the row")
    parser.add_argument("--read-text", action="store_true", help="of the server: take JSON in the text as a call")
    parser.add_argument("--choice", nargs="+", choices=("auto", "required"), default=["auto", "required"])
    parser.add_argument("--commands", type=int, default=len(COMMANDS), help="how many of the commands")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = the backend's choice")
    parser.add_argument("--speculation", default="auto", help="of the engine: auto, on, off")
    parser.add_argument("--no-record", action="store_true", help="write nothing to the results")
    arguments = parser.parse_args()
    if bool(arguments.engine) == bool(arguments.server):
        parser.error("name an engine directory or a server")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
