"""``pip install .`` gives the inference core and the command ``edgellm``, without ROS; colcon uses CMakeLists.txt.

Everything stands here rather than in pyproject.toml because the setuptools of Ubuntu 22.04 (JetPack 6) is older than
the tables it would need.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def named(names, lines):
    return [line for line in lines if re.match(r"[\w.-]+", line).group() in names]


every = requirements("requirements.txt")
cpu = named(("onnx", "onnxruntime"), every)
torch = named(("torch",), requirements("tools/requirements-reference.txt"))

setup(
    name="edgellm",
    version=re.search(r"<version>(.+)</version>", (ROOT / "package.xml").read_text(encoding="utf-8")).group(1),
    description="The inference core of edgellm_ros: language models on robots, as a library and on the command line",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=("engine_core", "engine_core.*")),
    package_data={
        "engine_core": ["cuda/kernels/*.cu", "cuda/kernels/*.cuh", "hub/*.json", "http/*.html", "measure/*.json"]
    },
    install_requires=[line for line in every if line not in cpu],
    extras_require={
        "cpu": cpu,
        "gpu": ["cuda-bindings>=12.8", "cuda-pathfinder>=1.0"],
        "sign": ["cryptography>=3.4.8"],  # engine directories, and the parameter trusted_keys
        "build": cpu + torch,
        "quantize": torch,  # what calibration runs the layers with
        "test": requirements("tools/requirements-test.txt") + requirements("tools/requirements-reference.txt"),
    },
    entry_points={"console_scripts": ["edgellm = engine_core.cli:main"]},
    zip_safe=False,
)
