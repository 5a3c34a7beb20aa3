"""``edgellm doctor``: what it finds, on this machine and on machines made of files."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from engine_core import cli
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.machine import Machine
from engine_core.cuda import driver
from engine_core.cuda.gpu_info import GpuInfo, GpuReport, find_gpus
from engine_core.cuda.kernels import blas
from engine_core.planning import doctor

ORIN = GpuReport((GpuInfo("Orin", 87, 16, 64 << 30, True),), "12.6")
PACKAGES = {name: "1.0" for name in doctor.PACKAGES} | {"cuda-bindings": "12.6.2", "onnxruntime": "1.23.0"}

_FAKE_DRIVER = """
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strcpy(name, device == 41 ? "second" : "first"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 7 : which == 16 ? 14 : which == 18 ? 1 : -1;
    return 0;
}
"""


class Nvrtc:
    @staticmethod
    def nvrtcVersion():
        return 0, 12, 6


def fake_driver(tmp_path, count: int) -> str:
    """Compile a libcuda that reports ``count`` GPUs; return its path."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "driver.c", tmp_path / f"libcuda{count}.so"
    source.write_text(_FAKE_DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", f"-DCOUNT={count}", "-o", library, source], check=True)
    return str(library)


def test_doctor_on_this_machine(capsys):
    code = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["healthy"]  # the tests need onnxruntime
    runs = {(check["backend"], check["quantization"]): check["runs"] for check in found["backends"]}
    assert runs["onnxruntime", "int8"] and ("cuda", "fp16") in runs
    assert all(check["runs"] or check["why_not"] for check in found["backends"])
    assert found["cpu"]["memory_free"] > 0 and found["packages"]["numpy"]
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "onnxruntime" in text and "why not" in text and "machine" in text


def test_the_driver_is_asked_for_its_gpus(tmp_path):
    report = find_gpus(fake_driver(tmp_path, 2))
    assert (report.cuda_version, report.why_none) == ("12.6", "")
    assert report.gpus == (GpuInfo("first", 87, 14, 40 << 30, True), GpuInfo("second", 87, 14, 41 << 30, True))
    assert "finds no GPU" in find_gpus(fake_driver(tmp_path, 0)).why_none
    assert "no NVIDIA driver" in find_gpus("libcuda-of-nobody.so").why_none


def reasons(report: GpuReport, *, on_jetson: bool = False, **packages: str) -> dict[str, doctor.Check]:
    changed = PACKAGES | {name.replace("_", "-"): version for name, version in packages.items()}
    checks = doctor.check_backends(Machine(changed, report, on_jetson))
    return {check.quantization: check for check in checks if check.backend == "cuda"}


def test_what_a_gpu_backend_lacks_comes_with_the_command_that_helps(monkeypatch):
    monkeypatch.setattr(driver, "bindings", lambda: (None, Nvrtc))
    monkeypatch.setattr(blas, "load_library", lambda: None)
    assert all(check.runs for check in reasons(ORIN).values()) and {"fp16", "int4", "fp8", "nvfp4"} <= set(
        reasons(ORIN)
    )
    without = reasons(ORIN, cuda_bindings="")["fp16"]
    assert not without.runs and without.install == "pip install 'cuda-bindings==12.*' cuda-pathfinder"
    newer = reasons(ORIN, cuda_bindings="13.0.1")["fp16"]
    assert "driver supports CUDA 12.6" in newer.why_not and "==12.*" in newer.install
    old = reasons(GpuReport((GpuInfo("T4", 75, 40, 16 << 30, False),), "12.6"))["fp16"]
    assert "sm_75" in old.why_not
    none = reasons(GpuReport(why_none="there is no NVIDIA driver"), on_jetson=True)["fp16"]
    assert none.install == "sudo apt install nvidia-jetpack"


def test_a_library_that_is_missing_is_named(monkeypatch):
    class Missing:
        @staticmethod
        def nvrtcVersion():
            raise RuntimeError("Failed to dlopen libnvrtc.so.12")

    monkeypatch.setattr(driver, "bindings", lambda: (None, Missing))
    lacking = reasons(ORIN, on_jetson=True)["fp16"]
    assert "libnvrtc.so.12" in lacking.why_not and lacking.install == "sudo apt install cuda-nvrtc-12-6"
    assert reasons(ORIN)["fp16"].install == "pip install nvidia-cuda-nvrtc-cu12"
    monkeypatch.setattr(driver, "bindings", lambda: (None, Nvrtc))

    def no_library():
        raise driver.DeviceUnavailableError("cuBLAS was not found.")

    monkeypatch.setattr(blas, "load_library", no_library)
    lacking = reasons(ORIN)["fp16"]
    assert lacking.why_not == "cuBLAS was not found" and lacking.install == "pip install nvidia-cublas-cu12"
    monkeypatch.setattr(blas, "load_library", lambda: None)
    assert reasons(ORIN)["fp16"].runs


@pytest.mark.parametrize(("version", "runs"), [("", False), ("1.19.2", False), ("1.20.0", True), ("2.0", True)])
def test_onnxruntime_is_new_enough(version, runs):
    machine = Machine(PACKAGES | {"onnxruntime": version}, GpuReport(why_none="there is no NVIDIA driver"))
    formats = capabilities_of("onnxruntime").weight_formats
    checks = [check for check in doctor.check_backends(machine) if check.backend == "onnxruntime"]
    assert [check.quantization for check in checks if check.quantization in formats] == list(formats)
    for check in checks:
        if check.quantization not in formats:
            continue
        assert check.runs == runs and bool(check.install) != runs


def test_a_jetson_is_recognised_by_its_files(tmp_path):
    assert doctor.find_jetson(tmp_path) == {}
    for name, text in {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    jetson = doctor.find_jetson(tmp_path)
    assert jetson == {
        "l4t": "36.4.3",
        "jetpack": "6.1 or 6.2",
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "power_mode": "1 (25W)",
    }
    governor, mode = doctor.hints(jetson, tmp_path)
    assert "schedutil" in governor and "jetson_clocks" in governor and "25W" in mode
    assert doctor.hints(jetson | {"power_mode": "0 (MAXN)"}, tmp_path) == [governor]


def test_ros_is_read_from_the_environment(monkeypatch, tmp_path):
    share = tmp_path / "share" / "edgellm_ros"
    share.mkdir(parents=True)
    (share / "package.xml").write_text("<package/>")
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/nowhere:{tmp_path}")
    found = doctor.find_ros()
    assert found["distro"] == "jazzy" and found["edgellm_ros"]


def test_no_backend_at_all_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "version_of", lambda *names: "" if "onnxruntime" in names else "1.0")
    monkeypatch.setattr(doctor, "find_gpus", lambda: GpuReport(why_none="there is no NVIDIA driver"))
    assert cli.main(["doctor"]) == 1
    assert "pip install 'onnxruntime>=1.20'" in capsys.readouterr().out
