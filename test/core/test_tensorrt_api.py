"""What api.py uses of TensorRT exists in the bindings of 10.3, 10.13 and 11.4, or is asked for first."""

from __future__ import annotations

import json
import zipfile

import pytest

import tensorrt_api

DATA = json.loads(tensorrt_api.TARGET.read_text(encoding="utf-8"))
USED = tensorrt_api.used_names()
VERSIONS = list(DATA["wheels"])


def test_three_generations_are_recorded():
    assert [version.rsplit(".", 2 if version.count(".") == 3 else 1)[0] for version in VERSIONS] == [
        "10.3",
        "10.13",
        "11.4",
    ]


def test_every_use_is_recorded():
    assert USED.keys() == DATA["names"].keys(), "run tools/tensorrt_api.py"
    assert (
        len(USED) > 50
        and USED["deserialize_cuda_engine"]
        and not USED["create_execution_context_without_device_memory"]
    )


@pytest.mark.parametrize("name", [name for name, must in USED.items() if must])
def test_what_is_used_without_asking_is_in_every_version(name):
    assert DATA["names"][name] == VERSIONS


@pytest.mark.parametrize(
    "one, other",
    [
        ("create_execution_context_without_device_memory", "create_execution_context"),
        ("device_memory_size_v2", "device_memory_size"),
        ("set_device_memory", "device_memory"),
        ("STRONGLY_TYPED", "FP16"),
    ],
)
def test_of_two_ways_every_version_has_one(one, other):
    assert set(DATA["names"][one]) | set(DATA["names"][other]) == set(VERSIONS)


def test_names_are_found_in_an_extension(tmp_path):
    wheel = tmp_path / "tensorrt_cu12_bindings-9.9.9-cp310-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tensorrt_bindings/tensorrt.so", b"\0\x01\0get_layer\0not this\0set_device_memory\0")
    assert tensorrt_api.version_of(wheel) == "9.9.9"
    assert tensorrt_api.strings_in(wheel) == ["get_layer", "set_device_memory"]
