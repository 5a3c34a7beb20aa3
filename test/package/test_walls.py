"""Who may import what: torch in calibration, CUDA and TensorRT where devices are handled, ROS never in the core."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "engine_core"
TORCH = {"torch"}
DEVICE = {"cuda", "cupy", "pycuda", "tensorrt", "torch_tensorrt", "pynvml"}
ROS = {"rclpy", "ament_index_python", "diagnostic_updater", "edgellm_ros", "launch", "launch_ros"}
ROS |= {f"{name}_msgs" for name in ("action", "diagnostic", "geometry", "lifecycle", "sensor", "std")}
ROS |= {f"{name}_interfaces" for name in ("builtin", "rcl")}
TENSORS = TORCH | DEVICE | {"numpy", "onnx", "onnxruntime", "tokenizers", "transformers", "safetensors", "llguidance"}


def imports(path: Path) -> dict[str, int]:
    """Top-level package → line, for every import anywhere in the file, those inside functions included."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            found.setdefault(name.split(".")[0], node.lineno)
    return found


def forbidden_in(path: Path) -> set[str]:
    if CORE not in path.parents:
        return TENSORS  # the ROS layer never sees a tensor
    inside = path.relative_to(CORE)
    forbidden = set(ROS)
    if inside.parts[0] != "quantize":
        forbidden |= TORCH
    if inside.parts[0] not in ("backends", "cuda"):
        forbidden |= DEVICE
    return forbidden


SOURCES = sorted([*CORE.rglob("*.py"), *(ROOT / "edgellm_ros").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_inside_the_walls(path):
    crossing = {name: line for name, line in imports(path).items() if name in forbidden_in(path)}
    assert not crossing, f"{path.relative_to(ROOT)} must not import {crossing}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_each_other():
    """Not even for types, or inside functions."""
    paths = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        named = {(f"{node.module}.{alias.name}", node.module) for node in nodes for alias in node.names}
        graph[module] = {name if name in paths else parent for name, parent in named} & paths.keys() - {module}
    assert "engine_core.errors" in graph["engine_core.config"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules


def test_the_walls_see_imports_of_every_form(tmp_path):
    source = "def f():\n    import torch.nn as nn\nfrom tensorrt import Logger\nimport_module('cuda.bindings')\n"
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imports(path) == {"torch": 2, "tensorrt": 3, "cuda": 4}


def test_importing_the_core_loads_nothing_heavy(tmp_path):
    """The node imports these before it is configured: a robot without a GPU or torch has to get that far."""
    heavy = TORCH | DEVICE | ROS | {"onnxruntime", "transformers"}
    program = (
        "import sys, engine_core.serving.engine, engine_core.serving.worker, engine_core.backends\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (result.stdout.strip(), result.stderr, result.returncode) == ("[]", "", 0)


# --- backends ---------------------------------------------------------------------------------------------

BACKENDS = {path.name for path in (CORE / "backends").iterdir() if (path / "capabilities.py").is_file()}
OUTSIDE = sorted(
    path
    for folder in ("engine_core", "edgellm_ros", "launch", "scripts", "tools")
    for path in (ROOT / folder).rglob("*.py")
    if CORE / "backends" not in path.parents and "demo_model" not in path.parts
)


def names_compared(source: str) -> list[int]:
    """Lines that compare with a backend's name, match it, or look something up by it in a literal table."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            operands = node.value.keys
        else:
            continue
        literals = [each for operand in operands if operand is not None for each in ast.walk(operand)]
        if any(isinstance(each, ast.Constant) and each.value in BACKENDS for each in literals):
            found.append(node.lineno)
    return found


def test_there_are_backends_to_look_for():
    assert {"cuda", "onnxruntime", "tensorrt"} == BACKENDS
    for source in (
        'if backend == "cuda": pass',
        'if "tensorrt" != name: pass',
        'if x in ("cpu", "cuda"): pass',
        '{"cuda": 1, "tensorrt": 2}[name]',
        'match name:\n    case "cuda":\n        pass',
    ):
        assert names_compared(source) == [2 if source.startswith("match") else 1], source
    assert names_compared('backend = "onnxruntime"\nprint({"cuda": 1})') == []


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_backends_asks_for_a_backends_name(path):
    assert names_compared(path.read_text(encoding="utf-8")) == []


PRODUCT = [path for path in OUTSIDE if ROOT / "tools" not in path.parents]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_backends_imports_one(path):
    """A backend is asked through ``backends``, ``capabilities`` and ``toolkit``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    own = tuple(f"engine_core.backends.{name}" for name in BACKENDS)
    assert [module for module in modules if module.startswith(own)] == []


def test_capabilities_need_no_package_of_a_backend(tmp_path):
    """A machine without a GPU, ONNX Runtime or onnx can say what another one would run."""
    heavy = TENSORS - {"numpy"}
    program = (
        "import sys\n"
        "from engine_core.backends.capabilities import all_capabilities\n"
        "assert [each.refusal(None, 'int8') for each in all_capabilities()]\n"
        "import engine_core.cli\n"
        "engine_core.cli.make_parser()\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (result.stdout.strip(), result.stderr, result.returncode) == ("[]", "", 0)
