"""Starts the node: ``ros2 launch edgellm_ros llm.launch.py [name:=value …]``; ``-s`` lists the arguments.

Without engine_dir, in the arguments or in the params_file, the engine of the demo model is built on first use.
Works on ROS 2 Humble and Jazzy.

Included by another launch file, it has to be given its arguments with the prefix ``llm_``, such as ``llm_params_file``:
names like params_file and namespace are the parent's own there, and launch hands them down without being asked. Nothing
it sets stays behind for what the parent includes next. What scopes every node of a group holds here, too:
PushROSNamespace, SetRemap, SetParameter and the environment.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import yaml
from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    GroupAction,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit
from launch_ros.actions import LifecycleNode

from edgellm_ros import demo_engine
from edgellm_ros.parameter_table import LAUNCH_SPECS

# name → (default, description). An empty default leaves the value to params_file, and without one there to the node.
ARGUMENTS = {
    **{spec.name: (spec.launch_default, spec.full_description) for spec in LAUNCH_SPECS},
    "params_file": (
        str(Path(get_package_share_directory("edgellm_ros")) / "config" / "llm.yaml"),
        "YAML file with the node's parameters; the arguments above come before it.",
    ),
    "namespace": ("", "Namespace of the node."),
    "name": ("llm", "Name of the node."),
    "log_level": ("info", "debug, info, warn, error or fatal."),
}
PREFIX = "llm_"
# Names that no other launch file has. The others are taken without the prefix only where this file is launched itself.
UNMISTAKABLE = ("engine_dir", "vocab_map")


def generate_launch_description() -> LaunchDescription:
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    declared += [
        DeclareLaunchArgument(PREFIX + name, default_value="", description=f"As {name}, which it comes before.")
        for name in ARGUMENTS
    ]
    # With forwarding: without it, -s would not list the arguments, and --launch-prefix and PushROSNamespace be lost.
    group = GroupAction([*declared, OpaqueFunction(function=start)], scoped=True, forwarding=True)
    return LaunchDescription([group, OpaqueFunction(function=mark_as_used)])


class Used(str):
    """A value that an include of this file was given: still there for the parent, but not for the next include."""

    is_used_llm_argument = True  # asked for by name, since each include loads this file, and with it the class, anew


def mark_as_used(context: LaunchContext) -> None:
    """Keep what this include was given from the next one.

    An include sets its arguments in the parent's scope, where they stay. They cannot be removed: the parent may have
    declared them, to pass them on again. Passing one on makes an ordinary string of it.
    """
    configurations = context.launch_configurations
    for name in ARGUMENTS:
        if (value := configurations.get(PREFIX + name)) is not None:
            configurations[PREFIX + name] = Used(value)


def is_launched_directly(command_line: list[str]) -> bool:
    """Return whether the command line names this very file, by path or as ``edgellm_ros llm.launch.py``.

    launch itself does not tell: to it, ``ros2 launch`` includes the file, as another launch file does.
    """
    this = Path(__file__)
    for before, word in zip(["", *command_line], command_line, strict=False):
        if Path(word).name != this.name or ":=" in word:
            continue
        if (before, word) == ("edgellm_ros", this.name) or (Path(word).is_file() and Path(word).samefile(this)):
            return True
    return False


def refuse_unknown(command_line: list[str]) -> None:
    """Raise RuntimeError if the command line gives an argument that this file has not: launch itself drops it."""
    known = [prefix + name for prefix in ("", PREFIX) for name in ARGUMENTS]
    for word in command_line:
        name, sign, _ = word.partition(":=")
        if sign and name.isidentifier() and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "-s lists them."
            raise RuntimeError(f"llm.launch.py has no argument {name}; {hint}")


def read_arguments(context: LaunchContext) -> tuple[dict[str, str], list[str]]:
    """Return the value of each of ARGUMENTS, and the names whose values are left to an including file.

    A value is the one with the prefix, else the one without it, else the default. Raises RuntimeError if the command
    line names this file and an argument that it has not.
    """
    given, foreign, direct = {}, [], is_launched_directly(sys.argv)
    if direct:
        refuse_unknown(sys.argv)
    for name, (default, _) in ARGUMENTS.items():
        prefixed = context.launch_configurations[PREFIX + name]
        value = "" if hasattr(prefixed, "is_used_llm_argument") else prefixed.strip()
        plain = context.launch_configurations[name].strip()
        if not value and (direct or name in UNMISTAKABLE):
            value = plain
        elif not value:
            value = default
            if plain != default:
                foreign.append(name)
        given[name] = value
    return given, foreign


def start(context: LaunchContext) -> list:
    """Start the node at once, or after the demo engine has been built."""
    given, foreign = read_arguments(context)
    if not foreign:
        return start_node(context, given)
    ours = ", ".join(PREFIX + name for name in foreign)
    text = f"llm.launch.py leaves {', '.join(foreign)} to the launch file that includes it; here they are {ours}."
    return [LogInfo(msg=text), *start_node(context, given)]


def start_node(context: LaunchContext, given: dict[str, str]) -> list:
    if given["engine_dir"] or file_names_engine(Path(given["params_file"])):
        return [make_node(given)]
    checkpoint = demo_engine.checkpoint_dir()
    options = {name: given[name] or "auto" for name in ("backend", "quantization")}
    directory = demo_engine.engine_dir(checkpoint, **options)
    node = make_node({**given, "engine_dir": str(directory)})
    if demo_engine.is_built(directory):
        return [node]
    build = ExecuteProcess(
        cmd=demo_engine.build_command(checkpoint, directory, **options), name="build_demo_engine", output="screen"
    )

    # The node starts when the scopes of this file and of the groups around it have ended: PushROSNamespace, SetRemap.
    configurations, environment = dict(context.launch_configurations), dict(context.environment)

    def restore_scope(later: LaunchContext) -> None:
        later.launch_configurations.update(configurations)
        later.environment.update(environment)

    def after_build(event, _context: LaunchContext) -> list:
        # A second include of this file may have built the same engine meanwhile.
        if event.returncode != 0 and not demo_engine.is_built(directory):
            # An exception, unlike a Shutdown, gives ros2 launch an exit status.
            raise RuntimeError("The demo engine could not be built; its builder says why above.")
        return [GroupAction([OpaqueFunction(function=restore_scope), node], scoped=True)]

    return [
        LogInfo(msg=f"No engine_dir was given: building the demo model's engine into {directory}, once."),
        RegisterEventHandler(OnProcessExit(target_action=build, on_exit=after_build)),
        build,
    ]


def make_node(given: dict[str, str]) -> LifecycleNode:
    """The node activates itself (its parameter autostart). Doing that from here would need the transition events of a
    process that is just starting: a first event sent before launch has discovered the topic is lost, and with it the
    activation."""
    try:
        values = {spec.name: spec.value_of(given[spec.name]) for spec in LAUNCH_SPECS if given[spec.name]}
    except ValueError as error:
        raise RuntimeError(f"The launch argument {error}") from None
    return LifecycleNode(
        package="edgellm_ros",
        executable="llm_node",
        name=given["name"],
        namespace=given["namespace"],
        parameters=[given["params_file"], values] if given["params_file"] else [values],
        ros_arguments=["--log-level", given["log_level"]],
        output="screen",
    )


def file_names_engine(params_file: Path) -> bool:
    """Return True if any section of the file sets engine_dir to something. Raises RuntimeError if it cannot be read."""
    if params_file == Path():
        return False
    try:
        tree = yaml.safe_load(params_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RuntimeError(f"params_file {params_file} cannot be read: {error}") from error

    def search(value: object) -> bool:
        if not isinstance(value, dict):
            return False
        return bool(value.get("engine_dir")) or any(search(child) for child in value.values())

    return search(tree)
