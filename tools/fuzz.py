"""Run the fuzz tests with many cases each, on all cores, and record the figures of each in a file.

    make fuzz                                        20,000 cases for each fuzz test
    make fuzz FUZZ="--cases 2000 --limit 540 -k schema"   those whose name has "schema", for nine minutes at most

A fuzz test is a test of test/core/test_fuzz_*.py that hypothesis calls; what is parametrized shares the cases. They are
tried in parts of ``--part`` cases, each in a process of its own with a seed of its own, in turn over the tests, so that
every test gets as far as any when ``--limit`` ends the run. Each process runs on one core: an engine in it would
otherwise start a thread for every core. A part that fails says how to run it again, and so does one that is not done
after ``--part-limit`` seconds.

``--results`` (benchmarks/results/fuzz.jsonl) gets a row for each fuzz test of the run, written anew with every part
that is done: date, commit, cases asked and tried (what hypothesis calls invalid is not counted), parts that failed,
parts that hung, parts that have not run, seconds of all its parts together. Hypothesis tries fewer cases than asked
where there are no more. Exit status 1 if a part failed, hung or did not run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from result_rows import run_head, write_run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.jsonl"
TESTS = ROOT / "test" / "core"
PYTEST = (
    sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin",
    "-o", "faulthandler_timeout=0", "-o", "addopts=",
)  # fmt: skip
ENVIRONMENT = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_COUNTS = re.compile(r"- (\d+) passing, (\d+) failing, and \d+ invalid test cases")


@dataclass
class Fuzzer:
    """A fuzz test: its cases of pytest, and what has come of them."""

    name: str
    ids: list[str] = field(default_factory=list)
    asked: int = 0
    tried: int = 0
    failed: int = 0
    hung: int = 0
    not_run: int = 0  # parts for which there was no time
    seconds: float = 0.0


@dataclass(frozen=True)
class Part:
    """Some cases of a fuzz test, for one process."""

    fuzzer: Fuzzer
    id: str
    cases: int
    seed: int


def collect(selection: list[str]) -> list[Fuzzer]:
    """Return the fuzz tests that pytest finds with the arguments ``selection``."""
    files = sorted(map(str, TESTS.glob("test_fuzz_*.py")))
    command = [*PYTEST, "--collect-only", "-m", "hypothesis", *selection, *files]
    found = subprocess.run(command, cwd=ROOT / "test", env=ENVIRONMENT, capture_output=True, text=True)
    fuzzers: dict[str, Fuzzer] = {}
    for line in found.stdout.splitlines():
        if "::" in line:
            name = line.partition("[")[0].rpartition("::")[2]
            fuzzers.setdefault(name, Fuzzer(name)).ids.append(line.strip())
    if not fuzzers:
        raise SystemExit(f"No fuzz test was found.\n{found.stdout}{found.stderr}")
    return list(fuzzers.values())


def parts_of(fuzzers: list[Fuzzer], cases: int, size: int, seed: int) -> list[Part]:
    """Return the parts of all, in turn over the fuzz tests: ``cases`` of each, at most ``size`` in a part."""
    rows = []
    for fuzzer in fuzzers:
        row = []
        for number, name in enumerate(fuzzer.ids):
            left = cases * (number + 1) // len(fuzzer.ids) - cases * number // len(fuzzer.ids)
            while left > 0:
                row.append((str(ROOT / name), min(size, left)))
                left -= size
        row = sorted(enumerate(row), key=lambda entry: entry[0] % max(1, len(row) // len(fuzzer.ids)))
        rows.append([Part(fuzzer, name, count, seed + number) for number, (name, count) in row])
        fuzzer.asked, fuzzer.not_run = sum(part.cases for part in rows[-1]), len(rows[-1])
    longest = max(map(len, rows))
    # A fuzz test with fewer parts than others has them spread over the run, too.
    order = [((index + 0.5) * longest / len(row), part) for row in rows for index, part in enumerate(row)]
    return [part for _, part in sorted(order, key=lambda entry: entry[0])]


def run(part: Part, limit: float) -> tuple[Part, str, int, float]:
    """Run a part; return it, its outcome ("passed", "failed" or "hung"), the cases tried and the seconds it took."""
    started = time.monotonic()
    env = ENVIRONMENT | {"EDGELLM_FUZZ_EXAMPLES": str(part.cases)}
    command = [*PYTEST, "--hypothesis-show-statistics", f"--hypothesis-seed={part.seed}"]
    with tempfile.TemporaryDirectory() as directory:
        command += [f"--basetemp={directory}/pytest", part.id]
        try:
            done = subprocess.run(
                command, cwd=ROOT / "test", env=env | {"TMPDIR": directory}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            again(part, f"was not done after {limit:.0f} s", error.stdout or b"")
            return part, "hung", 0, time.monotonic() - started
    tried = sum(int(good) + int(bad) for good, bad in _COUNTS.findall(done.stdout.decode(errors="replace")))
    if done.returncode:
        again(part, f"failed (exit status {done.returncode})", done.stdout)
    return part, "failed" if done.returncode else "passed", tried, time.monotonic() - started


def again(part: Part, what: str, output: bytes) -> None:
    """Print the end of a part's output, and how it is run again."""
    print(output.decode(errors="replace")[-6000:])
    print(f"{part.id} {what}; again, with the environment of tools/start, in test/:\n"
          f"  EDGELLM_FUZZ_EXAMPLES={part.cases} python -m pytest -p _hypothesis_pytestplugin "
          f"--hypothesis-seed={part.seed} '{part.id}'", flush=True)  # fmt: skip


def main() -> int:
    num_cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20000, help="of each fuzz test (default: %(default)s)")
    parser.add_argument("--part", type=int, default=500, help="cases of one process (default: %(default)s)")
    parser.add_argument("--part-limit", type=float, default=900.0, help="s for a part (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.0, help="s; no part begins later; 0 = none (default)")
    parser.add_argument("--jobs", type=int, default=num_cores, help="processes at a time (default: the cores)")
    parser.add_argument("--seed", type=int, default=1, help="of the first part (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the rows (default: %(default)s)")
    options, selection = parser.parse_known_args()
    head = run_head() | {"seed": options.seed}
    fuzzers = collect(selection)
    parts = parts_of(fuzzers, options.cases, options.part, options.seed)
    print(f"{len(fuzzers)} fuzz tests, {len(parts)} parts, {options.jobs} at a time", flush=True)
    started = time.monotonic()

    def write() -> None:
        keys = ("asked", "tried", "failed", "hung", "not_run")
        rows = [
            head | {"test": each.name} | {key: getattr(each, key) for key in keys} | {"seconds": round(each.seconds, 1)}
            for each in fuzzers
        ]
        write_run(options.results, rows)

    def begin(part: Part) -> tuple[Part, str, int, float] | None:
        late = options.limit and time.monotonic() - started > options.limit
        return None if late else run(part, options.part_limit)

    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))

    def pin() -> None:
        os.sched_setaffinity(0, {next(cores)})  # of this thread, and of the processes that it starts

    write()
    with concurrent.futures.ThreadPoolExecutor(options.jobs, initializer=pin) as pool:
        done = 0
        for future in concurrent.futures.as_completed([pool.submit(begin, part) for part in parts]):
            if (result := future.result()) is None:
                continue
            part, outcome, tried, seconds = result
            part.fuzzer.not_run -= 1
            part.fuzzer.tried += tried
            part.fuzzer.seconds += seconds
            part.fuzzer.failed += outcome == "failed"
            part.fuzzer.hung += outcome == "hung"
            done += 1
            write()
            if done % 20 == 0 or outcome != "passed":
                bad = sum(each.failed + each.hung for each in fuzzers)
                print(f"{time.monotonic() - started:.0f} s: {done} of {len(parts)} parts, {bad} not passed", flush=True)
    for each in fuzzers:
        print(f"{each.name:62} {each.tried:6} of {each.asked} cases, {each.failed} parts failed, {each.hung} hung, "
              f"{each.not_run} not run, {each.seconds:.0f} s")  # fmt: skip
    return 1 if any(each.failed or each.hung or each.not_run for each in fuzzers) else 0


if __name__ == "__main__":
    sys.exit(main())
