"""Measuring launch configurations on a GPU that ``launch_configs.TABLE`` does not list.

The first configure on such a GPU times a few candidates of every problem of the model, for ``TIME_LIMIT`` seconds in
all, and keeps what it chose in a file beside the compiled kernels. Later configures read the file, so the same GPU with
the same kernels always launches the same configurations. A problem whose turn did not come keeps its rule's
configuration, in the file too. Without a file nothing is measured: another process would choose differently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_core.cuda.driver import DeviceError, Event, Graph, KernelCompileError, Stream
from engine_core.cuda.kernels.launch_configs import Gpu, LaunchConfigs, Problem
from engine_core.formats.atomic import replaced_file

TIME_LIMIT = 10.0  # seconds a configure may measure, compiling included; the candidates of one problem may exceed it
_MARGIN = 0.97  # a candidate replaces the rule's configuration if it takes less than this part of its time
_REPEATS = 3  # timed runs of a candidate; the shortest counts
_FORMAT = 1  # of the file

_log = logging.getLogger(__name__)

Work = Callable[[Stream], None]


class EventTimer:
    """Times work on a stream: captured as a graph, so that the host's time to queue it does not count."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __call__(self, work: Sequence[Work]) -> float:
        """Return the shortest time in seconds that all of ``work`` takes. Raises DeviceError."""

        def queue() -> None:
            for each in work:
                each(self._stream)

        with contextlib.ExitStack() as undo:
            start, end = (Event(self._stream.device, timing=True) for _ in range(2))
            undo.callback(start.close)
            undo.callback(end.close)
            queue()  # loads the code
            self._stream.wait()
            graph = Graph(self._stream, queue)
            undo.callback(graph.close)
            best = float("inf")
            for _ in range(_REPEATS):
                start.record(self._stream)
                graph.replay(self._stream)
                end.record(self._stream)
                end.wait()
                best = min(best, end.elapsed(start))
            return best


class ConfigFile:
    """The launch configurations chosen for one GPU and one version of the kernels, as JSON."""

    def __init__(self, directory: Path, gpu: Gpu, dtype: str, source_hash: str) -> None:
        """``dtype``: the kernels' 16-bit type; ``source_hash``: of everything the configurations depend on."""
        self._head = {"format": _FORMAT, "gpu": dataclasses.asdict(gpu), "dtype": dtype, "kernels": source_hash}
        digest = hashlib.sha256(json.dumps(self._head, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"launch-configs-sm_{gpu.capability}-{digest[:32]}.json"

    def read(self, problems: Sequence[Problem[Any]], gpu: Gpu) -> dict[Problem[Any], Any]:
        """Return the stored configurations of ``problems``. What is damaged or no candidate is left out."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            entries = stored["configs"] if {key: stored.get(key) for key in self._head} == self._head else {}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return {}
        found = {}
        for problem in problems:
            values = entries.get(problem.key) if isinstance(entries, dict) else None
            for config in problem.candidates(gpu):
                if dataclasses.asdict(config) == values:
                    found[problem] = config
        return found

    def write(self, configs: Mapping[Problem[Any], Any]) -> bool:
        """Add ``configs`` to the file, which is replaced at once. Return whether that was possible."""
        entries: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            entries = dict(json.loads(self.path.read_text(encoding="utf-8"))["configs"])
        entries.update({problem.key: dataclasses.asdict(config) for problem, config in configs.items()})
        try:
            with replaced_file(self.path) as file:
                text = json.dumps({**self._head, "configs": entries}, indent=1, sort_keys=True)
                file.write_text(text, encoding="utf-8")
        except OSError:
            return False
        return True


class Tuner:
    """Chooses launch configurations: stored ones, else the fastest of each problem's candidates."""

    def __init__(
        self,
        configs: LaunchConfigs,
        file: ConfigFile,
        work_of: Callable[[Problem[Any]], Sequence[Work]],
        compile_ahead: Callable[[Callable[[], object]], None],
        timer: Callable[[Sequence[Work]], float],
        clock: Callable[[], float] = time.monotonic,
        time_limit: float | None = None,
    ) -> None:
        """``work_of``: what to time for a problem, with the configuration ``configs`` has for it at the call.

        ``compile_ahead``: compiles side by side what its argument asks for, as ``Kernels.compile_ahead``.
        """
        self._configs = configs
        self._file = file
        self._work_of = work_of
        self._compile_ahead = compile_ahead
        self._timer = timer
        self._clock = clock
        self._time_limit = TIME_LIMIT if time_limit is None else time_limit

    def choose(self, problems: Sequence[Problem[Any]]) -> int:
        """Set the configuration of each problem in ``configs``; return how many problems were measured.

        On a GPU the table lists nothing changes.
        """
        gpu = self._configs.gpu
        if self._configs.in_table:
            return 0
        known = self._file.read(problems, gpu)
        for problem, config in known.items():
            self._configs.choose(problem, config)
        missing = sorted((p for p in problems if p not in known), key=lambda p: (p.order, -p.size))
        if not missing:
            return 0
        if not self._file.write({}):
            _log.warning("%s cannot be written: launch configurations are not measured.", self._file.path)
            return 0
        start = self._clock()
        measured = 0
        for problem in missing:
            if self._clock() - start >= self._time_limit:
                break
            self._configs.choose(problem, self._fastest(problem, start + self._time_limit))
            measured += 1
        self._file.write({problem: self._configs.lookup(problem) for problem in missing})
        _log.info(
            "Measured the launch configurations of %d of %d kernels on %s in %.1f s; kept in %s.",
            *(measured, len(missing), gpu.name, self._clock() - start, self._file.path),
        )
        return measured

    def _fastest(self, problem: Problem[Any], deadline: float) -> Any:
        rule, *others = candidates = problem.candidates(self._configs.gpu)
        if not others:
            return rule
        try:
            self._compile_ahead(lambda: [self._work(problem, config) for config in candidates])
            best, best_time = rule, _MARGIN * self._timer(self._work(problem, rule))
            for config in others:
                if self._clock() >= deadline:
                    break
                seconds = self._timer(self._work(problem, config))
                if seconds < best_time:
                    best, best_time = config, seconds
        except (DeviceError, KernelCompileError) as error:
            _log.warning("%s keeps the configuration of its rule: %s", problem.key, error)
            return rule
        return best

    def _work(self, problem: Problem[Any], config: Any) -> Sequence[Work]:
        with self._configs.trying(problem, config):
            return self._work_of(problem)
