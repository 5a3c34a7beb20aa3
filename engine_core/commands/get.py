"""``edgellm get``: a public model from a hub to an engine that has answered."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine_core.commands.arguments import add_command, add_force, check_output, whole_number
from engine_core.commands.build import built
from engine_core.commands.progress import shown
from engine_core.commands.tables import print_verdict
from engine_core.config import BACKENDS, QUANTIZATIONS
from engine_core.paths import expand_user

if TYPE_CHECKING:
    from engine_core.hub.download import HubModel
    from engine_core.planning.devices import DeviceProfile
    from engine_core.planning.estimates import CheckpointEstimate
    from engine_core.planning.recommend import Variant

_PROMPT = "What can a robot do in a kitchen? Answer in one sentence."
_ANSWER_TOKENS = 48


def add(commands) -> None:
    parser = add_command(
        commands,
        "get",
        help="download a public model, build an engine of it and try it",
        description="Plans the model for this machine, downloads it into the cache of huggingface_hub (HF_HOME), "
        "checks its hashes, builds an engine with weights rounded to int8, or to int4 where that does not fit or would "
        "be slow (no calibration text is needed), lets it answer a prompt and prints the line that launches the node.",
        example="edgellm get qwen3-0.6b ~/engines/qwen3",
    )
    parser.add_argument(
        "model",
        help="a name from 'edgellm recommend', or a hub's id such as Qwen/Qwen3-0.6B; of a repository of GGUF files "
        "with the quantization of one, such as Qwen/Qwen3-0.6B-GGUF:Q8_0",
    )
    parser.add_argument("engine_dir", type=Path, nargs="?", help="where to write (default: ~/engines/NAME)")
    parser.add_argument("--variant", choices=QUANTIZATIONS, default="auto", help="weight format (default: see above)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: the GPU's where one runs the model")
    parser.add_argument(
        "--max-context", type=whole_number(0), default=0, help="tokens (default: 4096, or the model's if shorter)"
    )
    parser.add_argument("--revision", default="", help="commit, branch or tag (default: the known one, or main)")
    parser.add_argument(
        "--hub",
        type=Path,
        default=None,
        help="a directory that has the model: a cache of huggingface_hub (HF_HOME) or folders owner/name with "
        "checkpoints; the network is not used then (default: the environment variable EDGELLM_HUB)",
    )
    add_force(parser, "engine directory")
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="let the engine answer a prompt"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Job:
    """The resolved options."""

    model: HubModel
    name: str
    context: int  # tokens the model was made for; 0 = as its config.json says
    hub: Path | None
    engine_dir: Path


def run(options: argparse.Namespace) -> int:
    from engine_core.hub import download
    from engine_core.memory import format_bytes

    job = _resolve(options)
    checkpoint, estimate = _find(job)
    variant = _choose(estimate, options, job.context)
    assert variant.plan is not None
    print(
        f"{job.model.id} ({estimate.spec.num_parameters / 1e6:,.0f} M parameters) as {variant.quantization} for "
        f"{variant.backend}, max_context {variant.max_context}: {format_bytes(variant.plan.total)} of memory"
    )
    if checkpoint is None:
        stored = 2 * estimate.spec.num_parameters
        download.check_space(job.model, stored, job.engine_dir, variant.plan.item("weights"))
        checkpoint = _download(job.model)
    num_files = download.verify(checkpoint.parent if job.model.gguf else checkpoint, repair=job.hub is None)
    print(f"{checkpoint}: {f'{num_files} files have the hashes of the hub' if num_files else 'has no recorded hashes'}")
    _build(checkpoint, job, variant)
    if options.check:
        _check(job.engine_dir)
    print("\nStart the node with it:")
    print(f"ros2 launch edgellm_ros llm.launch.py engine_dir:={shlex.quote(str(job.engine_dir))}")
    return 0


def _find(job: _Job) -> tuple[Path | None, CheckpointEstimate]:
    """Return the checkpoint where it is here, and its plans.

    A GGUF file is downloaded first: its configuration is in it.
    """
    from engine_core.formats.json_file import read_json
    from engine_core.hub import download
    from engine_core.planning.estimates import CheckpointEstimate

    checkpoint = download.find_local(job.hub, job.model) if job.hub is not None else None
    if checkpoint is None and job.model.gguf:
        checkpoint = download.cached_gguf(job.model)
    if checkpoint is None:
        print(f"Asking the hub for {job.model.id}, revision {job.model.revision}", flush=True)
        if job.model.gguf:
            stored = download.gguf_bytes(job.model)
            download.check_space(job.model, stored, job.engine_dir, 2 * stored)
            checkpoint = _download(job.model)
    if job.model.gguf:
        assert checkpoint is not None
        return checkpoint, CheckpointEstimate(checkpoint)
    path = download.download_config(job.model) if checkpoint is None else checkpoint / "config.json"
    return checkpoint, CheckpointEstimate.of_config(read_json(path), job.name)


def _resolve(options: argparse.Namespace) -> _Job:
    """Raises ConfigurationError for a model or a variant that cannot be had, BuildError for a directory in use."""
    from engine_core.errors import ConfigurationError
    from engine_core.hub.download import HUB_VARIABLE, HubModel, is_model_id
    from engine_core.hub.known_models import find_known, unknown_name
    from engine_core.planning.recommend import check_rounded

    if options.variant != "auto":
        check_rounded(options.variant)
    asked, _, gguf = options.model.partition(":")
    hub = options.hub or (Path(os.environ[HUB_VARIABLE]) if os.environ.get(HUB_VARIABLE) else None)
    here = Path(options.model)
    # A folder owner/name may stand for the id that it has in a hub directory.
    is_checkpoint = (here / "config.json").is_file() and (hub is None or not is_model_id(asked))
    if here.is_file() or is_checkpoint:
        raise ConfigurationError(f"{options.model} is here already: 'edgellm build' makes an engine of it.")
    known = find_known(asked)
    if known is None and not is_model_id(asked):
        raise unknown_name(asked)
    model_id = known.id if known else asked
    name = model_id.partition("/")[2].lower().removesuffix("-gguf")
    engine_dir = expand_user(options.engine_dir or Path("~", "engines", name)).absolute()
    check_output(engine_dir, options.force)
    revision = options.revision or (known.revision if known else "main")
    return _Job(HubModel(model_id, revision, gguf), name, known.context if known else 0, hub, engine_dir)


def _download(model: HubModel) -> Path:
    """Download with a progress bar on a terminal. Raises DownloadError."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from engine_core.hub.download import download

    columns = (TextColumn("Weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            weights = bar.add_task("Weights", total=None)
            return download(model, lambda done, total: bar.update(weights, completed=done, total=total))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where the download stopped.", file=sys.stderr, end="")
        raise


def _choose(estimate, options: argparse.Namespace, context: int) -> Variant:
    """Return the variant to build for the first of this machine's devices that can use one.

    Raises InsufficientMemoryError or UnsupportedModelError with the reason where none can.
    """
    from engine_core.errors import InsufficientMemoryError, UnsupportedModelError
    from engine_core.memory import format_bytes
    from engine_core.planning import recommend

    quantization = "" if options.variant == "auto" else options.variant
    longest = min(context or estimate.spec.default_position, estimate.spec.max_position)
    max_context = recommend.context_of(longest, options.max_context)
    found = [
        recommend.choose_variant(estimate, device, max_context, quantization, backend=backend)
        for device, backend in _devices(options.backend)
    ]
    if (variant := next((each for each in found if each.usable), None)) is not None:
        return variant
    last = found[-1]
    if last.why_not or last.plan is None:
        raise UnsupportedModelError(last.why_not)
    raise InsufficientMemoryError(
        f"{estimate.name} as {last.quantization} with max_context {max_context} needs {format_bytes(last.plan.total)}, "
        f"but {last.plan.device} has {format_bytes(last.plan.available)} free; take a shorter --max-context or a "
        "smaller model: 'edgellm recommend' shows which fit."
    )


def _devices(backend: str) -> list[tuple[DeviceProfile, str]]:
    """Return the devices of this machine that may run the engine, each with the backend that was asked for."""
    from engine_core.backends.capabilities import capabilities_of
    from engine_core.planning import devices

    if backend != "auto" and not capabilities_of(backend).on_gpu:
        return [(devices.this_cpu(measure=True), backend)]
    device = devices.this_machine(measure=True)
    if backend != "auto":
        return [(device, backend)]
    return [(device, ""), (devices.this_cpu(measure=True), "")] if device.has_gpu else [(device, "")]


def _build(checkpoint: Path, job: _Job, variant: Variant) -> None:
    from engine_core.backends.toolkit import BuildRequest, toolkit_of
    from engine_core.errors import BuildError

    request = BuildRequest(
        checkpoint=checkpoint,
        engine_dir=job.engine_dir,
        weight_format=variant.quantization,
        max_context=variant.max_context,
        model_name=job.name,
    )
    try:
        with shown(f"Building {variant.quantization}") as (report, progress):
            manifest = toolkit_of(variant.backend).build(request, report, progress)
    except ImportError as error:
        raise BuildError(f"Building needs the Python package {error.name!r}: pip install it.") from error
    print_verdict(built(job.engine_dir, manifest))


def _check(engine_dir: Path) -> None:
    """Open the engine and print its answer to a prompt. Raises what opening and generating raise."""
    from engine_core.config import EngineConfig
    from engine_core.errors import InvalidRequestError
    from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
    from engine_core.serving.engine import CancelToken, Engine

    sampling = SamplingParams(max_new_tokens=_ANSWER_TOKENS)
    with shown("Loading") as (_, progress):
        engine = Engine.open(EngineConfig(engine_dir=engine_dir), lambda line: None, progress)
    try:
        try:
            prepared = engine.prepare(
                GenerationRequest("check", messages=(ChatMessage("user", _PROMPT),), sampling=sampling)
            )
        except InvalidRequestError:  # a model without a chat template continues texts
            prepared = engine.prepare(GenerationRequest("check", prompt=_PROMPT, sampling=sampling))
        pieces = engine.generate(prepared, CancelToken())
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                result = end.value
                break
    finally:
        engine.close()
    print(f"\n{_PROMPT}\n{result.text.strip() or '(an empty answer)'}")
    print(f"{result.generated_tokens} tokens at {result.tokens_per_second:.1f} tokens/s")
