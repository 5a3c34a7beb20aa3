"""Check a real model's answers: schemas kept, streams whole, stops exact, seeds repeated.

    python3 benchmarks/real_model_checks.py ENGINE_DIR [--cases schema stream stop seed conversation] [--minutes 30]

Asks an engine through ``Worker``, without ROS, ``--answers`` times a case and temperature, and judges each answer:

- every case: the pieces, joined, are the result's text and ids; numbers without a gap; whole characters only; the text
  is what the ids decode to; the finish reason fits.
- schema: a finished answer parses as JSON without a key twice, and fits its schema by the library ``jsonschema``.
- stop: the text with stop strings is the text without them up to the first one.
- seed: the same request with a seed gives the same text after other requests as before them.
- conversation: each turn is sent with the answers before it, and reuses at least the KV of the prompt before.

Prints a table and appends a row for each finished case and temperature to benchmarks/results/real_model_checks.jsonl.
A run that was ended goes on where it was: what has been judged is kept in ``--state``, which several processes may
share (``--shard 0/4`` to ``3/4``, then once without). Exit status 1 if an answer was wrong. Needs the package
``jsonschema[format-nongpl]``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import real_model_requests as requests  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.request import (  # noqa: E402
    ChatMessage,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Piece,
    SamplingParams,
)
from engine_core.serving.engine import Engine  # noqa: E402
from engine_core.serving.worker import Worker  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "real_model_checks.jsonl"
STATE = ROOT / "benchmarks" / "work" / "real_model_checks.jsonl"
LIMIT = 600.0  # s to wait for an answer
_VALIDATOR = jsonschema.Draft202012Validator


@dataclass
class Judged:
    """The answers of one unit of work and what was wrong with them."""

    answers: int = 0
    finished: int = 0  # by STOP
    wrong: list[str] = field(default_factory=list)

    def add(self, finish: FinishReason, faults: list[str], what: str) -> None:
        self.answers += 1
        self.finished += finish is FinishReason.STOP
        if faults:
            self.wrong.append(f"{'; '.join(faults)} [{what}]")


class Client:
    """Sends requests to a worker and waits for them; judges what every answer has to be."""

    def __init__(self, engine: Engine, worker: Worker) -> None:
        self.engine, self.worker = engine, worker
        self._numbers = 0

    def ask(self, *questions: GenerationRequest) -> list[tuple[GenerationResult, list[str]]]:
        """Send all at once; return each one's result and its faults."""
        waiting = []
        for question in questions:
            pieces: list[Piece] = []
            done: queue.SimpleQueue[GenerationResult] = queue.SimpleQueue()
            self._numbers += 1
            request = question.replace(request_id=str(self._numbers))
            self.worker.submit(request, on_piece=pieces.append, on_done=done.put)
            waiting.append((request, pieces, done))
        answers = []
        for request, pieces, done in waiting:
            result = done.get(timeout=LIMIT)
            faults = self._faults(request, pieces, result)
            if not done.empty():
                faults.append("answered twice")
            answers.append((result, faults))
        return answers

    def _faults(self, request: GenerationRequest, pieces: list[Piece], result: GenerationResult) -> list[str]:
        faults = []
        if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return [f"ended by {result.finish_reason.value}: {result.error}"]
        if "".join(piece.text for piece in pieces) != result.text:
            faults.append(f"the stream {''.join(piece.text for piece in pieces)!r} is not the result {result.text!r}")
        if [piece.sequence for piece in pieces] != list(range(len(pieces))):
            faults.append("the pieces' numbers have a gap")
        if tuple(token for piece in pieces for token in piece.token_ids) != result.token_ids:
            faults.append("the pieces' ids are not the result's")
        if "\ufffd" in result.text or any("\ufffd" in piece.text for piece in pieces):
            faults.append(f"half a character in {result.text!r}")
        whole = self.engine.tokenizer.decode(result.token_ids).replace("\ufffd", "")
        if result.text != whole and not (request.stop and whole.startswith(result.text)):
            faults.append(f"the text {result.text!r} is not the ids' {whole!r}")
        if result.finish_reason is FinishReason.LENGTH and result.generated_tokens < request.sampling.max_new_tokens:
            faults.append(f"ended by length after {result.generated_tokens} tokens")
        return faults


# --- the cases: (client, temperature, unit) → Judged; all randomness comes from the unit, a number --------------------


def _question(text: str, temperature: float, tokens: int, seed: int | None, **more) -> GenerationRequest:
    system = more.pop("system", "")
    messages = (*((ChatMessage("system", system),) if system else ()), ChatMessage("user", text))
    sampling = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=tokens, top_p=0.95)
    return GenerationRequest("", messages, sampling=sampling, **more)


def schema(client: Client, temperature: float, unit: int) -> Judged:
    """Four answers, held to schemas."""
    rng, judged = random.Random(f"schema {temperature} {unit}"), Judged()
    asked = [(requests.prompt(rng), *requests.schema(rng, unit * 4 + i)) for i in range(4)]
    sent = [_question(text, temperature, 120, rng.randrange(2**32), json_schema=s) for text, _, s in asked]
    for (_, kind, held), (result, faults) in zip(asked, client.ask(*sent)):
        if not faults and result.finish_reason is FinishReason.STOP:
            faults = misfits(result.text, held)
        judged.add(result.finish_reason, faults, f"{kind} {held[:300]}")
    return judged


def misfits(text: str, schema: str) -> list[str]:
    """Return why ``text`` is not a JSON value of ``schema``."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except ValueError as error:
        return [f"{text!r} does not parse: {error}"]
    parsed = json.loads(schema)
    validator = _VALIDATOR(parsed.get("schema", parsed), format_checker=_VALIDATOR.FORMAT_CHECKER)
    return [f"{text!r}: {error.message[:200]}" for error in validator.iter_errors(value)]


def stream(client: Client, temperature: float, unit: int) -> Judged:
    """Four answers of free text, one of them with its pieces coalesced."""
    rng, judged = random.Random(f"stream {temperature} {unit}"), Judged()
    asked = [
        _question(
            requests.prompt(rng), temperature, rng.randrange(8, 48), None, system=rng.choice(("", requests.SYSTEM)),
            stream_interval=0.05 if index == 3 else 0.0,
        )
        for index in range(4)
    ]  # fmt: skip
    for question, (result, faults) in zip(asked, client.ask(*asked)):
        judged.add(result.finish_reason, faults, question.messages[-1].content)
    return judged


def stop(client: Client, temperature: float, unit: int) -> Judged:
    """One answer without stop strings, and five with some that it holds or nearly holds."""
    rng, judged = random.Random(f"stop {temperature} {unit}"), Judged()
    question = _question(requests.prompt(rng), temperature, 40, rng.randrange(2**32))
    ((free, faults),) = client.ask(question)
    if faults or len(free.text) < 2:
        judged.add(free.finish_reason, faults, question.messages[-1].content)
        return judged
    strings = []
    for _ in range(5):
        start = rng.randrange(len(free.text))
        found = free.text[start : start + rng.randrange(1, 16)]
        strings.append((found, *([found + "\u0001", free.text[-1] + "?", "zzz"] if rng.random() < 0.5 else [])))
    answers = client.ask(*(question.replace(stop=each) for each in strings))
    for each, (result, faults) in zip(strings, answers):
        # A stop string that is cut at the end of an answer is no stop string.
        place = min((free.text.find(s) for s in each if s in free.text), default=-1)
        expected = free.text if place < 0 else free.text[:place]
        if result.text != expected:
            faults.append(f"{result.text!r} instead of {expected!r}")
        if place >= 0 and result.finish_reason is not FinishReason.STOP:
            faults.append(f"ended by {result.finish_reason.value}")
        judged.add(result.finish_reason, faults, f"{each} in {free.text!r}")
    return judged


def seed(client: Client, temperature: float, unit: int) -> Judged:
    """Ten requests, each asked again after others, in another order; requests without a seed come between."""
    rng, judged = random.Random(f"seed {temperature} {unit}"), Judged()
    questions = []
    for _ in range(10):
        options: dict = {"system": rng.choice(("", requests.SYSTEM))}
        if rng.random() < 0.3:
            options["json_schema"] = requests.schema(rng, rng.randrange(1000))[1]
        tokens = rng.randrange(8, 32)
        questions.append(_question(requests.prompt(rng), temperature, tokens, rng.randrange(2**32), **options))
    first = [client.ask(question)[0] for question in questions]
    order = rng.sample(range(10), 10)
    between = [_question(requests.prompt(rng), 0.8, 4, None, system=requests.SYSTEM) for _ in range(3)]
    asked = [questions[i] for i in order]
    for index, other in zip((2, 5, 8), between):
        asked.insert(index, other)
    again = [answer for question, answer in zip(asked, client.ask(*asked)) if question not in between]
    for index, (result, faults) in zip(order, again):
        faults = [*first[index][1], *faults]
        if result.token_ids != first[index][0].token_ids:
            faults.append(f"{result.text!r} after {first[index][0].text!r}")
        judged.add(result.finish_reason, faults, questions[index].messages[-1].content)
    return judged


def conversation(client: Client, temperature: float, unit: int) -> Judged:
    """One conversation of five turns."""
    rng, judged = random.Random(f"conversation {temperature} {unit}"), Judged()
    messages, before = [ChatMessage("system", requests.SYSTEM)], 0
    for text in requests.turns(rng, 5):
        messages.append(ChatMessage("user", text))
        sampling = SamplingParams(temperature=temperature, max_new_tokens=rng.randrange(8, 40))
        ((result, faults),) = client.ask(GenerationRequest("", tuple(messages), sampling=sampling))
        if result.cached_tokens < before:
            faults.append(f"{result.cached_tokens} tokens reused, though the prompt before had {before}")
        before = result.prompt_tokens
        messages.append(ChatMessage("assistant", result.text))
        judged.add(result.finish_reason, faults, text)
    return judged


@dataclass(frozen=True)
class Case:
    """``run`` gives about ``per_unit`` answers."""

    run: Callable[[Client, float, int], Judged]
    per_unit: int


CASES = {
    "schema": Case(schema, 4),
    "stream": Case(stream, 4),
    "stop": Case(stop, 5),
    "seed": Case(seed, 10),
    "conversation": Case(conversation, 5),
}


# --- the run ----------------------------------------------------------------------------------------------------------


def open_client(engine_dir: Path, threads: int, reproducible: bool = True) -> Client:
    """Open the engine with a small context and start a worker on it; end both with ``close_client``."""
    config = EngineConfig(engine_dir, max_context=1024, num_threads=threads, reproducible=reproducible)
    engine = Engine.open(config, report=lambda line: None)
    return Client(engine, Worker(engine, queue_depth=32))


def close_client(client: Client) -> None:
    client.worker.close()
    client.engine.close()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--answers", type=int, default=500, help="a case and temperature (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (default: %(default)s)")
    parser.add_argument("--shard", default="0/1", help="I/N: the I-th of N processes that share the work and --state")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so many; 0 = when all is done")
    parser.add_argument("--not-reproducible", action="store_true", help="set the parameter reproducible to false")
    parser.add_argument("--record", action="store_true", help="append rows of unfinished cases too")
    parser.add_argument("--state", type=Path, default=STATE, help="what has been judged (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to (default: %(default)s)")
    options = parser.parse_args()
    end = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    shard, num_shards = map(int, options.shard.split("/"))
    client = open_client(options.engine_dir, options.threads, not options.not_reproducible)
    manifest = client.engine.manifest
    about = {"model": manifest.model_name, "quantization": manifest.quantization, "backend": manifest.backend}
    about["reproducible"] = not options.not_reproducible
    state = State(options.state, about)
    try:
        for unit, name, temperature in _units(options):
            if time.monotonic() > end:
                break
            if unit % num_shards == shard and not state.has(name, temperature, unit):
                judged = CASES[name].run(client, temperature, unit)
                state.add(name, temperature, unit, judged)
                for line in judged.wrong:
                    print(f"wrong: {line[:600]}", file=sys.stderr, flush=True)
    finally:
        close_client(client)
    if num_shards > 1:  # a run without --shard sums up afterwards
        return 0
    print(f"{'case':14} {'T':>4} {'answers':>8} {'finished':>9} {'wrong':>6}")
    any_wrong = False
    for name in options.cases:
        for temperature in options.temperatures:
            row = state.summary(name, temperature)
            any_wrong |= row["wrong"] > 0
            print(f"{name:14} {temperature:4} {row['answers']:8} {row['finished']:9} {row['wrong']:6}")
            if row["answers"] and (options.record or row["answers"] >= options.answers * 0.9):
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return int(any_wrong)


def _units(options: argparse.Namespace) -> Iterator[tuple[int, str, float]]:
    """Yield (unit, case, temperature), the cases in turn, so that a run that is ended has some of each."""
    counts = {name: max(1, round(options.answers / CASES[name].per_unit)) for name in options.cases}
    for unit in range(max(counts.values())):
        for name in options.cases:
            if unit < counts[name]:
                yield from ((unit, name, temperature) for temperature in options.temperatures)


class State:
    """The units of one engine that have been judged, kept in a file with a line a unit."""

    def __init__(self, path: Path, about: dict) -> None:
        self._path, self._about = path, about
        self._commit = _commit()
        self._rows = []
        if path.is_file():
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self._rows = [row for row in rows if about.items() <= row.items()]

    def has(self, case: str, temperature: float, unit: int) -> bool:
        return any((row["case"], row["temperature"], row["unit"]) == (case, temperature, unit) for row in self._rows)

    def add(self, case: str, temperature: float, unit: int, judged: Judged) -> None:
        row = {**self._about, "case": case, "temperature": temperature, "unit": unit, "commit": self._commit}
        row |= {"answers": judged.answers, "finished": judged.finished, "wrong": judged.wrong}
        self._rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def summary(self, case: str, temperature: float) -> dict:
        """Return the row of results: several commits where the run went on after a change."""
        rows = [row for row in self._rows if (row["case"], row["temperature"]) == (case, temperature)]
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            "commit": " ".join(dict.fromkeys(row["commit"] for row in rows)),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            **self._about, "case": case, "temperature": temperature,
            "answers": sum(row["answers"] for row in rows),
            "finished": sum(row["finished"] for row in rows),
            "wrong": sum(len(row["wrong"]) for row in rows),
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
