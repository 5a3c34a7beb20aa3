"""Reports about the node: ~/status, ~/get_info and the health behind /diagnostics."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from functools import lru_cache

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus

from edgellm_ros.conversions import error_code, error_message, to_memory_plan
from edgellm_ros.diagnostics import Health
from edgellm_ros.http_endpoint import HttpEndpoint
from edgellm_ros.msg import EngineStatus, RequestStatus
from edgellm_ros.srv import GetInfo
from edgellm_ros.state import NodeState
from edgellm_ros.streams import Topics
from engine_core import __version__
from engine_core.errors import NotActiveError
from engine_core.memory import format_bytes
from engine_core.serving.engine import Engine
from engine_core.serving.snapshot import EngineSnapshot

_PACKAGES = ("rclpy", "numpy", "onnxruntime", "tensorrt", "tokenizers", "transformers", "llguidance")
_STATE_NAMES = {
    EngineStatus.UNCONFIGURED: "unconfigured",
    EngineStatus.INACTIVE: "inactive",
    EngineStatus.ACTIVE: "active",
    EngineStatus.FINALIZED: "finalized",
}


def make_status(state: NodeState) -> EngineStatus:
    """Return ~/status without its time."""
    error = state.error
    status = EngineStatus(state=state.lifecycle, error_code=error_code(error), error_message=error_message(error))
    status.configuring, status.load_progress = state.is_configuring, state.load_progress
    if (engine := state.engine) is not None:
        found = vars(EngineSnapshot.of(engine))
        requests = [RequestStatus(**vars(request)) for request in found.pop("requests")]
        for name, value in found.items():
            setattr(status, name, value)
        status.requests = requests
    return status


def fill_info(info: GetInfo.Response, engine: Engine | None, image_topics: list[str]) -> GetInfo.Response:
    info.versions = list(_versions())
    if engine is None:
        error = NotActiveError("Nothing is configured; configure the node first.")
        info.error_code, info.error_message = error_code(error), str(error)
        return info
    manifest, config = engine.manifest, engine.config
    info.model_name = manifest.model_name
    info.architecture = manifest.model.architecture
    info.engine_dir = str(config.engine_dir)
    info.backend, info.backend_reason = engine.backend_name, engine.backend_reason
    info.quantization = manifest.quantization
    info.kv_cache_type = manifest.kv_cache_type if config.kv_cache_type == "auto" else config.kv_cache_type
    info.tool_format, info.thinks = engine.answers.format.tools, engine.answers.format.thinks
    if engine.images is not None:
        info.max_images, info.max_image_tokens = engine.images.max_images, engine.images.most_tokens
    info.image_topics = image_topics
    info.adapters = list(engine.adapters)
    info.schemas = engine.schemas.names
    info.device = engine.device
    info.cuda_graph = config.use_cuda_graph and manifest.use_cuda_graph
    info.max_context, info.max_batch = engine.max_context, engine.config.max_batch
    info.max_draft = engine.speculation.max_draft
    info.vocab_size, info.reduced_vocab_size = engine.vocab_size, engine.reduced_vocab_size
    info.parameters = manifest.model.num_parameters
    info.load_time = engine.load_time
    info.memory = to_memory_plan(engine.plan)
    return info


def make_health(state: NodeState, topics: Topics, num_refused: int, http: HttpEndpoint) -> Health:
    """Return what /diagnostics says. ``num_refused``: requests since the node started."""
    name = _STATE_NAMES[state.lifecycle]
    engine, worker, error, last = state.engine, state.worker, state.error, topics.last
    values = {
        "state": name,
        "requests": str(topics.requests_total),
        "refused": str(num_refused),
        "tokens": str(topics.tokens_total),
    }
    if engine is not None:
        values["model"] = engine.manifest.model_name
        values["backend"] = engine.backend_name
        values["quantization"] = engine.manifest.quantization
        values["memory"] = format_bytes(engine.plan.total)
        if engine.energy is not None and not math.isnan(engine.energy.watts):
            values["power while answering"] = f"{engine.energy.watts:.1f} W ({engine.energy.source})"
        if engine.speculation.enabled:
            for key, count in dataclasses.asdict(topics.speculation_total).items():
                values[f"speculation, {key}"] = str(count)
    if http.url or http.problem:
        values["http"] = http.url or http.problem
    if worker is not None:
        values["busy"], values["queued"] = str(worker.busy), str(worker.queued)
    wait = worker.longest_wait if worker is not None else 0.0
    if (times := topics.first_token_percentiles()) is not None:
        values["time to first token, p50"], values["time to first token, p95"] = (f"{t * 1e3:.1f} ms" for t in times)
    if last is not None:
        values["last finish reason"] = last.finish_reason.value
        values["last time to first token"] = f"{last.time_to_first_token * 1e3:.1f} ms"
        values["last tokens per second"] = f"{last.tokens_per_second:.1f}"
    level, message = DiagnosticStatus.OK, name
    if error is not None:
        level, message = DiagnosticStatus.ERROR, error_message(error)
    elif worker is not None and worker.queued >= max(1, state.settings.queue_depth):
        level, message = DiagnosticStatus.WARN, f"the queue is full ({worker.queued} requests wait)"
    elif 0 < state.settings.warn_wait < wait:
        level, message = DiagnosticStatus.WARN, f"a request has been waiting for {wait:.1f} s"
    elif http.problem:
        level, message = DiagnosticStatus.WARN, http.problem
    device = engine.device if engine is not None else "no engine"
    return Health(level, message, f"{platform.node()}: {device}", values)


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    found = [f"edgellm_ros {__version__}", f"python {platform.python_version()}"]
    found.append(f"rmw {rclpy.get_rmw_implementation_identifier()}")
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)
