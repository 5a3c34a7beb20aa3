"""Runs the core on an emulated arm64 processor, and compares its answers with this machine's.

    python3 tools/aarch64.py [--root build/aarch64] [--tests PATH …]

qemu-aarch64-static runs Debian's arm64 Python, whose files mmdebstrap unpacks (nothing of them is run to install them),
with the arm64 wheels of requirements.txt, which pip unpacks on this machine. Needed are the Debian packages
qemu-user-static and mmdebstrap, and a Debian or its package mirror in apt's settings. Steps: root, wheels, the demo
engine built there and here, answers of both to the same prompts, then the tests that are named. Exit status 1 if an
answer differs or a step fails. Emulation shows that the code runs there and what it computes; it shows nothing about
speed, and no ROS is in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = "qemu-aarch64-static"
# What the wheels expect of a system.
PACKAGES = "python3,libpython3-stdlib,python3-distutils,libstdc++6,libgomp1,zlib1g,libffi8,libssl3,ca-certificates"
# Without the calibration of an int8 KV cache, which takes long there.
_BUILD = ("--quantization", "int4", "--kv-cache-type", "fp32")
PROMPTS = ("Please bring me the red cup from the kitchen.", "Open the door.", "What is your name?")
TESTS = ("test/core/test_sampling.py", "test/core/test_memory.py", "test/core/test_sentences.py")
# The newest that starts under qemu 7.2, Debian 12's; 1.32 ends with a segmentation fault at its import there.
ONNXRUNTIME = "onnxruntime==1.27.0"
TEST_TOOLS = ("pytest", "hypothesis", "jsonschema", "psutil")


class Emulated:
    """Debian's arm64 Python in a folder, and the packages it sees."""

    def __init__(self, directory: Path) -> None:
        self.root, self.wheels = directory / "root", directory / "site-packages"
        self.directory = directory

    @property
    def python(self) -> Path:
        return next(iter(sorted((self.root / "usr" / "bin").glob("python3.[0-9]*"))))

    @property
    def version(self) -> str:
        return self.python.name.removeprefix("python")

    def make_root(self, suite: str) -> None:
        if (self.root / "usr" / "bin").is_dir():
            return
        command = ["mmdebstrap", "--variant=extract", "--architectures=arm64", f"--include={PACKAGES}", suite]
        subprocess.run([*command, str(self.root)], check=True)

    def install(self) -> None:
        """Unpack the arm64 wheels of what the core needs, and of the tests' tools."""
        if self.wheels.is_dir():
            return
        platforms = [f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28, 31, 34)] + [
            "manylinux2014_aarch64"
        ]
        options = [option for platform in platforms for option in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        command += ["--target", str(self.wheels), "--only-binary", ":all:", "--python-version", self.version]
        command += ["--implementation", "cp", *options, "-r", str(ROOT / "requirements.txt"), ONNXRUNTIME, *TEST_TOOLS]
        subprocess.run(command, check=True)

    def run(self, *arguments: str) -> str:
        """Return what Python prints with ``arguments``. Raises CalledProcessError."""
        env = {
            "PYTHONPATH": f"{self.wheels}:{ROOT}:{ROOT / 'test' / 'core'}",
            "PYTHONHOME": str(self.root / "usr"),
            "QEMU_LD_PREFIX": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HOME": str(self.directory),
            "PATH": os.environ["PATH"],
        }
        command = [EMULATOR, str(self.python.resolve()), *arguments]
        done = subprocess.run(command, env=env, cwd=ROOT / "test", stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout


def native(*arguments: str) -> str:
    """Return what this machine's Python prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def answers(run, engine: Path) -> list[str]:
    """Return the greedy answers of an engine to ``PROMPTS``."""
    return [run("-m", "engine_core.cli", "generate", str(engine), prompt, "--threads", "1") for prompt in PROMPTS]


def check(emulated: Emulated, tests: list[str]) -> list[str]:
    """Return what differs. Raises CalledProcessError where a step fails."""
    print(
        emulated.run("-c", "import platform, sys; print(platform.machine(), sys.version.split()[0])").strip(),
        flush=True,
    )
    print(emulated.run("-m", "engine_core.cli", "--version").strip(), flush=True)
    demo = str(ROOT / "models" / "demo")
    engines = {}
    for name, run in (("here", native), ("arm64", emulated.run)):
        engines[name] = emulated.directory / f"engine-{name}"
        shutil.rmtree(engines[name], ignore_errors=True)
        run("-m", "engine_core.cli", "build", demo, str(engines[name]), *_BUILD)
        print(f"{name}: built {engines[name].name}", flush=True)
    wrong = []
    expected, found = answers(native, engines["here"]), answers(emulated.run, engines["arm64"])
    for prompt, ours, theirs in zip(PROMPTS, expected, found, strict=True):
        print(f"{prompt}\n  {theirs.strip()}", flush=True)
        if ours != theirs:
            wrong.append(f"{prompt}: here {ours.strip()!r}, on arm64 {theirs.strip()!r}")
    if tests:
        paths = [str(ROOT / test) for test in tests]
        print(emulated.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths).splitlines()[-1])
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT / "build" / "aarch64", help="default: %(default)s")
    parser.add_argument("--suite", default="bookworm", help="of Debian (default: %(default)s)")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="paths of tests to run there")
    options = parser.parse_args()
    for program in (EMULATOR, "mmdebstrap"):
        if shutil.which(program) is None:
            print(f"error: {program} was not found: sudo apt install qemu-user-static mmdebstrap", file=sys.stderr)
            return 1
    options.root.mkdir(parents=True, exist_ok=True)
    emulated = Emulated(options.root.resolve())
    try:
        emulated.make_root(options.suite)
        emulated.install()
        wrong = check(emulated, options.tests)
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*wrong or ["The answers are the same."], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
