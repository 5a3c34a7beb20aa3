"""The memory plan on a GPU: what a 1 B model takes is within 1 % of what its plan says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_decode import SHAPES
from benchmarks.gpu_trt import model_config
from engine_core.backends.cuda.build import build_cuda
from engine_core.measure.random_checkpoint import write_random_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
PROBE = Path(__file__).with_name("memory_probe.py")
CONTEXT = 2048


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = model_config(SHAPES["llama-3.2-1b"], CONTEXT)
    return write_random_checkpoint(tmp_path_factory.mktemp("1b"), config)


@pytest.mark.parametrize("quantization", ["fp16", "int8", "tensorrt"])
def test_the_plan_is_what_is_taken(checkpoint, tmp_path, quantization):
    engine_dir = tmp_path / "engine"
    if quantization == "tensorrt":
        if importlib.util.find_spec("tensorrt") is None:
            pytest.skip("needs the Python package tensorrt")
        from engine_core.backends.tensorrt.build import build_tensorrt

        build_tensorrt(checkpoint, engine_dir, max_context=CONTEXT, level=1)
    else:
        build_cuda(checkpoint, engine_dir, quantization=quantization, max_context=CONTEXT)
    for parameters in ([], ["kv_cache_type=int8"], *([["speculation=on"]] if quantization == "int8" else [])):
        command = [sys.executable, str(PROBE), str(engine_dir), *parameters]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"{quantization} {parameters}: {found}, {100 * (found['taken'] / found['planned'] - 1):+.2f} %")
        assert abs(found["taken"] / found["planned"] - 1) < 0.01
