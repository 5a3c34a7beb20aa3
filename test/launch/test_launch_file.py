"""launch/llm.launch.py under the real launch system: skipped where launch_ros is not installed (the wheels lack it)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("launch_ros", reason="launch_ros is not installed; a ROS 2 installation has it")
rclpy = pytest.importorskip("rclpy", reason="rclpy is not installed")

from ament_index_python.packages import get_package_share_directory  # noqa: E402
from launch import LaunchContext, LaunchDescription  # noqa: E402
from launch.launch_description_sources import get_launch_description_from_python_launch_file  # noqa: E402
from lifecycle_msgs.srv import GetState  # noqa: E402
from rcl_interfaces.srv import GetParameters  # noqa: E402

from edgellm_ros import demo_engine  # noqa: E402
from edgellm_ros.parameter_table import LAUNCH_SPECS  # noqa: E402

LAUNCH_FILE = Path(get_package_share_directory("edgellm_ros")) / "launch" / "llm.launch.py"
RUNNER = Path(__file__).with_name("runner.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Stands for ~/.ros: the demo engine is cached and ROS logs here."""
    return tmp_path_factory.mktemp("ros_home")


@pytest.fixture(scope="module")
def client():
    """A client in a context of its own, beside launch's."""
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("launch_test", context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield Client(node, executor)
    node.destroy_node()
    rclpy.shutdown(context=context)


class Client:
    """Calls the services of launched nodes, each call with a limit."""

    def __init__(self, node, executor) -> None:
        self._node, self._executor = node, executor

    def call(self, type_, name: str, request, timeout: float = 20.0):
        service = self._node.create_client(type_, name)
        try:
            assert service.wait_for_service(timeout), f"{name} did not appear within {timeout} s"
            future = service.call_async(request)
            self._executor.spin_until_future_complete(future, timeout_sec=timeout)
            assert future.done(), f"{name} did not answer within {timeout} s"
            return future.result()
        finally:
            self._node.destroy_client(service)

    def state(self, node: str, timeout: float = 20.0) -> str:
        return self.call(GetState, f"{node}/get_state", GetState.Request(), timeout).current_state.label

    def wait_for_state(self, node: str, label: str, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        while (state := self.state(node, timeout)) != label:
            assert time.monotonic() < end, f"{node} is {state} after {timeout} s, expected {label}"
            time.sleep(0.1)

    def parameters(self, node: str, *names: str) -> list:
        request = GetParameters.Request(names=list(names))
        values = self.call(GetParameters, f"{node}/get_parameters", request).values
        return [rclpy.parameter.parameter_value_to_python(value) for value in values]


@contextlib.contextmanager
def launched(home: Path, log: Path, *arguments: str, file: Path = LAUNCH_FILE):
    """The launch system as a process; on exit interrupted as by Ctrl-C, after which nothing of it may be left."""
    env = os.environ | {"ROS_HOME": str(home), "ROS_LOG_DIR": str(home / "log")}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(RUNNER), str(file), *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) in (0, 1, 130)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(log.read_text(errors="replace"))  # pytest shows it when the test failed


def run_to_its_end(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"ROS_HOME": str(home), "ROS_LOG_DIR": str(home / "log")}
    command = [sys.executable, str(RUNNER), str(LAUNCH_FILE), *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, env=env, timeout=60, text=True, **streams)


def test_declares_its_arguments_with_descriptions():
    description: LaunchDescription = get_launch_description_from_python_launch_file(str(LAUNCH_FILE))
    declared = {argument.name: argument for argument in description.get_launch_arguments()}
    names = {spec.name for spec in LAUNCH_SPECS} | {"params_file", "namespace", "name", "log_level"}
    assert set(declared) == names | {f"llm_{name}" for name in names}
    context = LaunchContext()
    for argument in declared.values():
        assert argument.description
        argument.visit(context)  # every default can be evaluated
    assert Path(context.launch_configurations["params_file"]).is_file()


def test_alone_builds_the_demo_engine_once_and_activates(home, client, tmp_path):
    cache = home / "edgellm"
    shutil.rmtree(cache, ignore_errors=True)
    with launched(home, tmp_path / "first.log"):
        client.wait_for_state("/llm", "active", timeout=120.0)
        (engine,) = cache.iterdir()
        assert client.parameters("/llm", "engine_dir") == [str(engine)]
    assert "building the demo model's engine" in (tmp_path / "first.log").read_text()
    built = engine.stat().st_mtime_ns
    with launched(home, tmp_path / "second.log"):
        client.wait_for_state("/llm", "active")
    assert engine.stat().st_mtime_ns == built
    assert "building the demo model's engine" not in (tmp_path / "second.log").read_text()


@pytest.fixture(scope="module")
def engine(home, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engine") / "demo"
    subprocess.run(demo_engine.build_command(demo_engine.checkpoint_dir(), directory), check=True, timeout=120)
    return directory


def test_arguments_reach_the_node(home, client, tmp_path, engine):
    params = tmp_path / "params.yaml"
    params.write_text("/**:\n  ros__parameters:\n    max_context: 64\n    temperature: 0.25\n")
    arguments = (f"engine_dir:={engine}", f"params_file:={params}", "namespace:=robot1", "name:=brain")
    options = ("max_context:=128", "backend:=onnxruntime", "log_level:=warn")
    with launched(home, tmp_path / "log", *arguments, *options):
        client.wait_for_state("/robot1/brain", "active")
        values = client.parameters("/robot1/brain", "engine_dir", "max_context", "temperature", "backend", "autostart")
    assert values == [str(engine), 128, 0.25, "onnxruntime", True]


def test_engine_dir_of_the_params_file_counts(home, client, tmp_path, engine):
    params = tmp_path / "params.yaml"
    params.write_text(f"llm:\n  ros__parameters:\n    engine_dir: {engine}\n")
    with launched(home, tmp_path / "log", f"params_file:={params}"):
        client.wait_for_state("/llm", "active")
        assert client.parameters("/llm", "engine_dir") == [str(engine)]


def test_without_autostart_the_node_waits(home, client, tmp_path, engine):
    with launched(home, tmp_path / "log", f"engine_dir:={engine}", "autostart:=false"):
        client.wait_for_state("/llm", "unconfigured")
        time.sleep(1.0)  # long enough for an activation that should not come
        client.wait_for_state("/llm", "unconfigured")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("max_context:=many", "max_context is 'many'"),
        ("autostart:=perhaps", "autostart is 'perhaps'"),
        ("params_file:=/nowhere.yaml", "/nowhere.yaml cannot be read"),
        ("quantization:=int3", "demo engine could not be built"),
        ("engin_dir:=/x", "has no argument engin_dir; did you mean engine_dir?"),
        ("zzz:=1", "has no argument zzz; -s lists them."),
    ],
)
def test_bad_arguments_end_the_launch_with_a_reason(home, argument, says):
    result = run_to_its_end(home, argument)
    assert says in result.stdout
    assert result.returncode == 1


PARENT = """
from pathlib import Path
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import AnyLaunchDescriptionSource

MINE = {{"params_file": "/nowhere/nav2.yaml", "namespace": "navigation", "autostart": "false", "log_level": "warn"}}

def include(**arguments):
    return IncludeLaunchDescription(AnyLaunchDescriptionSource({file!r}), launch_arguments=list(arguments.items()))

def note(context):
    Path({out!r}).write_text(repr(sorted(context.launch_configurations.items())))

def generate_launch_description():
    return LaunchDescription([
        *(DeclareLaunchArgument(name, default_value=value) for name, value in MINE.items()),
        include(engine_dir={engine!r}, llm_name="fast", llm_max_context="128"),
        include(llm_engine_dir={engine!r}, llm_name="big", llm_namespace="robot1"),
        OpaqueFunction(function=note),
    ])
"""


def test_a_parent_keeps_its_arguments_and_includes_two(home, client, tmp_path, engine):
    parent, out = tmp_path / "parent.launch.py", tmp_path / "configurations"
    parent.write_text(PARENT.format(file=str(LAUNCH_FILE), engine=str(engine), out=str(out)))
    with launched(home, tmp_path / "log", file=parent):
        client.wait_for_state("/fast", "active")  # neither the parent's namespace nor its autostart nor its params_file
        client.wait_for_state("/robot1/big", "active")
        assert client.parameters("/fast", "max_context") == [128]
        assert client.parameters("/robot1/big", "max_context") == [0]  # not what the first include was given
    left = dict(eval(out.read_text()))
    mine = {"params_file": "/nowhere/nav2.yaml", "namespace": "navigation", "autostart": "false", "log_level": "warn"}
    assert {name: left.get(name) for name in mine} == mine
    assert "llm_params_file" not in left and "backend" not in left  # declared by the included file


INCLUDES = """
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import PushRosNamespace


def declare(name, value):
    return DeclareLaunchArgument(name, default_value=value)


def llm(**arguments):
    given = [("llm_" + name, value) for name, value in arguments.items()]
    return IncludeLaunchDescription(PythonLaunchDescriptionSource({file!r}), launch_arguments=given)


def generate_launch_description():
    return LaunchDescription([{actions}])
"""


def write_parent(path: Path, actions: str) -> Path:
    path.write_text(INCLUDES.format(file=str(LAUNCH_FILE), actions=actions))
    return path


def test_two_includes_build_one_demo_engine_and_keep_the_scopes_around_them(home, client, tmp_path):
    """The nodes start when the build has ended, long after the groups have."""
    shutil.rmtree(home / "edgellm", ignore_errors=True)
    actions = "GroupAction([PushRosNamespace('robot3'), llm(name='first')]), llm(name='second')"
    with launched(home, tmp_path / "log", file=write_parent(tmp_path / "parent.launch.py", actions)):
        client.wait_for_state("/robot3/first", "active", timeout=180.0)  # two builds on two cores
        client.wait_for_state("/second", "active", timeout=60.0)
    (_,) = (home / "edgellm").glob("demo-*")


def test_a_parent_passes_its_own_argument_on_twice(home, client, tmp_path, engine):
    """The third include is not given it, and does not find what the others were given."""
    same = f"engine_dir={str(engine)!r}, max_context=LaunchConfiguration('llm_max_context')"
    actions = (
        f"declare('llm_max_context', '96'), llm(name='first', namespace='robot5', {same}), llm(name='second', {same}), "
        f"llm(name='third', engine_dir={str(engine)!r})"
    )
    with launched(home, tmp_path / "log", file=write_parent(tmp_path / "parent.launch.py", actions)):
        for node, max_context in (("/robot5/first", 96), ("/second", 96), ("/third", 0)):
            client.wait_for_state(node, "active")
            assert client.parameters(node, "max_context") == [max_context]


def test_a_parent_of_the_same_file_name_keeps_its_arguments(home, client, tmp_path, engine):
    own = {"namespace": "nav", "backend": "gazebo", "max_context": "7", "log_level": "fatal", "autostart": "false"}
    actions = ", ".join(f"declare({name!r}, {value!r})" for name, value in own.items())
    file = write_parent(tmp_path / LAUNCH_FILE.name, f"{actions}, llm(engine_dir={str(engine)!r})")
    with launched(home, tmp_path / "log", "namespace:=robot1", file=file):
        client.wait_for_state("/llm", "active")
        assert client.parameters("/llm", "backend", "max_context") == ["auto", 0]
    assert "leaves backend, max_context, autostart, namespace, log_level to" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("argument", ["namespace:=robot4", "llm_namespace:=robot4"])
def test_launched_directly_it_takes_both_names(home, client, tmp_path, engine, argument):
    with launched(home, tmp_path / "log", f"engine_dir:={engine}", argument):
        client.wait_for_state("/robot4/llm", "active")
