"""One file about a machine: what it has, what fits it, whether the kernels compute what they should, how fast it is.

``make_report`` needs no model: engines are built of published shapes with random weights. What cannot be done is noted
in ``problems`` and the rest goes on. ``report_schema.json`` describes the file; ``page`` makes a readable page of it.
"""

from __future__ import annotations

import datetime
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine_core
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.registry import backend_names
from engine_core.backends.toolkit import BuildRequest, toolkit_of
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError, EdgeLLMError
from engine_core.hub.known_models import find_known, unknown_name
from engine_core.measure.bench import MAX_REPEATS, Benchmark, figures
from engine_core.measure.power import open_meter
from engine_core.measure.random_checkpoint import write_random_checkpoint
from engine_core.memory import format_bytes
from engine_core.planning import devices, recommend
from engine_core.planning.doctor import examine

SCHEMA = 1
SCHEMA_FILE = Path(__file__).with_name("report_schema.json")
_SHAPES = ("qwen3-0.6b", "qwen3-1.7b")
_IDLE = 1.0  # s

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ReportOptions:
    """Choice of the measurements. ``backend``: "" = the fastest that runs here."""

    shapes: tuple[str, ...] = _SHAPES  # names of known models
    weights: tuple[str, ...] = ("int4",)
    backend: str = ""
    prompt_tokens: tuple[int, ...] = (32, 512)
    new_tokens: int = 64
    repeats: int = 3
    directory: Path | None = None  # of random checkpoints and engines, which are removed; None: the system's own

    def check(self) -> None:
        """Raises ConfigurationError."""
        for name in self.shapes:
            if find_known(name) is None:
                raise unknown_name(name)
        if min(self.prompt_tokens) < 1 or self.new_tokens < 3 or self.repeats < 1:
            raise ConfigurationError("A report needs at least 1 prompt token, 3 new tokens and 1 repeat.")
        if self.repeats > MAX_REPEATS:
            raise ConfigurationError(f"A report has at most {MAX_REPEATS} repeats, not {self.repeats}.")


def make_report(options: ReportOptions, progress: Progress = lambda line: None) -> dict[str, Any]:
    """Return the report, JSON-safe. Raises ConfigurationError for options that cannot be."""
    options.check()
    start = time.monotonic()
    problems: list[str] = []
    progress("machine")
    machine = examine()
    machine["python"] = machine["python"].partition(" ")[0]  # without a path of its owner
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "edgellm": engine_core.__version__,
        "machine": machine,
        "bandwidth": None,
        "plans": [],
        "kernels": [],
        "idle": None,
        "decode": [],
    }
    with _noting(problems, "bandwidth"):
        progress("bandwidth of the memory")
        report["bandwidth"] = _bandwidth()
    with _noting(problems, "plans"):
        progress("memory plans")
        report["plans"] = list(_plans(report["bandwidth"]))
    backend = options.backend or _fastest(machine, options.weights[0])
    with _noting(problems, "kernels"):
        if backend:
            report["kernels"] = [
                {**asdict(each), "error": _finite(each.error), "passed": each.passed}
                for each in toolkit_of(backend).check_kernels(lambda line: progress(f"kernels: {line}"))
            ]
    with _noting(problems, "power"):
        progress("power without work")
        report["idle"] = _idle(backend)
    if not backend:
        problems.append(f"decode: no backend can run {options.weights[0]} here, see machine.backends")
    for shape in options.shapes if backend else ():
        for weights in options.weights:
            with _noting(problems, f"decode of {shape} in {weights}"):
                report["decode"] += _decode(options, backend, shape, weights, report["bandwidth"], progress)
    failed = [each["name"] for each in report["kernels"] if not each["passed"]]
    problems += [f"kernels: {name} is off its reference or does not run" for name in failed]
    return report | {"problems": problems, "seconds": round(time.monotonic() - start, 1)}


@contextmanager
def _noting(problems: list[str], what: str) -> Iterator[None]:
    """A part that cannot be done is said, and the next one goes on."""
    try:
        yield
    except (EdgeLLMError, OSError, ImportError, MemoryError) as error:
        problems.append(f"{what}: {error}")


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _fastest(machine: dict[str, Any], weights: str) -> str:
    """Return the first backend that runs here; "" without one."""
    runs = {each["backend"] for each in machine["backends"] if each["runs"] and each["quantization"] == weights}
    return next((name for name in backend_names() if name in runs), "")


def _bandwidth() -> dict[str, Any]:
    """GB/s of the memory that models are read from, measured."""
    from engine_core.errors import BackendUnavailableError
    from engine_core.host_memory import memory_bandwidth

    try:
        from engine_core.cuda.driver import Device

        device = Device()
    except BackendUnavailableError:
        return {"gb_s": round(memory_bandwidth() / 1e9, 2), "of": "the CPU's memory, reading and writing by copies"}
    from engine_core.cuda.bandwidth import read_bandwidth

    try:
        return {"gb_s": round(read_bandwidth(device) / 1e9, 2), "of": f"{device.name}, a kernel that only reads"}
    finally:
        device.close()


def _plans(bandwidth: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Return the known models as this machine could run them."""
    device = devices.this_machine()
    if bandwidth is not None:
        device = devices.with_bandwidth(device, bandwidth["gb_s"])
    for offer in recommend.offers(device):
        variant = offer.variant
        yield {
            "model": offer.model.name,
            "weights": variant.quantization,
            "backend": variant.backend,
            "max_context": variant.max_context,
            "bytes": variant.plan.total if variant.plan else None,
            "fits": variant.fits,
            "tok_s_estimated": round(variant.tokens_per_second, 1),
        }


def _idle(backend: str) -> dict[str, Any] | None:
    """Return the power without work; None where it cannot be read."""
    meter = open_meter(on_gpu=bool(backend) and capabilities_of(backend).on_gpu)
    if meter is None:
        return None
    try:
        before, start = meter.joules(), time.monotonic()
        time.sleep(_IDLE)
        return {"watts": round((meter.joules() - before) / (time.monotonic() - start), 2), "source": meter.source}
    finally:
        meter.close()


def _decode(
    options: ReportOptions,
    backend: str,
    shape: str,
    weights: str,
    bandwidth: dict[str, Any] | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return the figures of one engine with random weights, one for each prompt length."""
    model = find_known(shape)
    assert model is not None
    context = -(-(max(options.prompt_tokens) + options.new_tokens) // 256) * 256
    with tempfile.TemporaryDirectory(prefix="edgellm-report-", dir=options.directory) as temporary:
        checkpoint, engine = Path(temporary) / "checkpoint", Path(temporary) / "engine"
        progress(f"{shape}: random weights")
        write_random_checkpoint(checkpoint, dict(model.config))
        progress(f"{shape}: building {weights} for {backend}")
        start = time.monotonic()
        request = BuildRequest(checkpoint, engine, weights, max_context=context, model_name=shape)
        toolkit_of(backend).build(request, lambda line: None)
        built = time.monotonic() - start
        progress(f"{shape}: loading")
        with Benchmark(EngineConfig(engine, backend=backend)) as bench:
            bench.check(options.prompt_tokens, options.new_tokens)
            lines = []
            for count in options.prompt_tokens:
                progress(f"{shape}, {weights}: {count} prompt tokens")
                timing = bench.measure(count, options.new_tokens, options.repeats)
                energy = bench.measure_energy(count, options.new_tokens)
                line = {"shape": shape, "build_s": round(built, 1), **figures(bench, timing, energy)}
                line["bandwidth_share"] = round(line["gb_s"] / bandwidth["gb_s"], 3) if bandwidth else None
                lines.append(line)
            return lines


# --- the page -----------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = [
        f"# {title(report)}",
        f"edgellm {report['edgellm']}, {report['date']}, made in {report['seconds']:.0f} s by `edgellm report`.",
        "## Machine",
        _table(["", ""], _machine_rows(report)),
        "## Decode, random weights",
        _table(*decode_table([report])) if report["decode"] else "Nothing was measured.",
        "GB/s: bytes of weights over the time of a step; share: of the measured bandwidth. Energy: of the device while "
        "it decodes, with whatever else runs there.",
        "## Kernels against their references",
        _kernel_part(report["kernels"]),
        "## Models that fit",
        _table(
            ["model", "weights", "backend", "memory", "tokens/s, estimated"],
            [
                [
                    each["model"],
                    each["weights"],
                    each["backend"],
                    format_bytes(each["bytes"]),
                    f"{each['tok_s_estimated']:.0f}",
                ]
                for each in report["plans"]
                if each["fits"]
            ],
        ),
        "## Problems",
        "\n".join(f"- {problem}" for problem in report["problems"]) or "None.",
    ]
    return "\n\n".join(parts) + "\n"


def title(report: dict[str, Any]) -> str:
    """Return the name of the machine."""
    machine = report["machine"]
    if machine["jetson"]:
        return machine["jetson"]["model"]
    return machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]["name"]


def decode_table(reports: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of what the reports measured."""
    header = [
        "machine",
        "shape",
        "weights",
        "backend",
        "prompt",
        "first token ms",
        "ms/token",
        "tokens/s",
        "GB/s",
        "share",
    ]
    header += ["J/token", "W"]

    def shown(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    return header, [
        [
            *(title(report), line["shape"], line["weights"], line["engine"], str(line["prompt_tokens"])),
            *(f"{line['ttft_ms']:.1f}", f"{line['ms_per_token']:.2f}", f"{line['tok_s']:.1f}", f"{line['gb_s']:.1f}"),
            "–" if line["bandwidth_share"] is None else f"{line['bandwidth_share']:.0%}",
            *(shown(line["joules_per_token"], 3), shown(line["watts"], 1)),
        ]
        for report in reports
        for line in report["decode"]
    ]


def _machine_rows(report: dict[str, Any]) -> list[list[str]]:
    machine, bandwidth, idle = report["machine"], report["bandwidth"], report["idle"]
    cpu, jetson = machine["cpu"], machine["jetson"]
    rows = [["system", machine["system"]], ["CPU", f"{cpu['name']}, {cpu['cores']} cores"]]
    rows += [["Python", machine["python"]], ["memory free", format_bytes(cpu["memory_free"])]]
    if jetson:
        rows.append(["Jetson", f"L4T {jetson['l4t']}, JetPack {jetson['jetpack']}, power mode {jetson['power_mode']}"])
    rows += [["GPU", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['num_sms']} SMs"] for gpu in machine["gpus"]]
    if machine["cuda_driver"]:
        rows.append(["driver", f"up to CUDA {machine['cuda_driver']}"])
    if bandwidth:
        rows.append(["bandwidth", f"{bandwidth['gb_s']:.1f} GB/s ({bandwidth['of']})"])
    rows.append(["power without work", f"{idle['watts']:.1f} W ({idle['source']})" if idle else "cannot be read"])
    return rows


def _kernel_part(kernels: list[dict[str, Any]]) -> str:
    if not kernels:
        return "Nothing was compared: there is no GPU, or the backend has no kernels of its own."
    passed = sum(each["passed"] for each in kernels)
    wrong = [each for each in kernels if not each["passed"]]
    rows = [[each["name"], str(each["error"]), str(each["tolerance"]), each["problem"]] for each in wrong]
    text = f"{passed} of {len(kernels)} agree."
    return text + ("\n\n" + _table(["kernel", "error", "tolerance", "problem"], rows) if rows else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
