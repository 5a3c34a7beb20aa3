"""Check the manifest of a TensorRT engine before a plan is loaded."""

from __future__ import annotations

from engine_core.backends.tensorrt.api import TensorRT
from engine_core.cuda.driver import Device
from engine_core.errors import EngineDirectoryError
from engine_core.formats.manifest import Manifest


def check_machine(manifest: Manifest, api: TensorRT, device: Device) -> None:
    """Raises EngineDirectoryError if the plan was built for another GPU architecture or TensorRT version."""
    built = manifest.builder.get("tensorrt", "an unknown version")
    if built != api.version:
        raise EngineDirectoryError(
            f"The plan was built by TensorRT {built}, but this machine has {api.version}, and plans do not carry over; "
            "run 'edgellm build --backend tensorrt' here."
        )
    if manifest.gpu_arch != device.arch:
        raise EngineDirectoryError(
            f"The plan was built for {manifest.gpu_arch or 'an unknown GPU'}, but {device.name} is {device.arch}, and "
            "plans do not carry over; run 'edgellm build --backend tensorrt' here."
        )
