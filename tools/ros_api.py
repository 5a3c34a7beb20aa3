"""Records what the ROS distributions have of the names this package uses; a test compares the package with it.

    python3 tools/ros_api.py SOURCES      # writes test/package/ros_api.json

SOURCES is a folder with clones of the release repositories of github.com/ros2-gbp (``git clone --bare
https://github.com/ros2-gbp/rclpy-release``, and so on: PACKAGES in ros_sources.py) and of github.com/ros/rosdistro.
Recorded are facts alone, for each distribution: the version of each package, whether a name exists, which arguments it
takes by place and by name, and what rosdep knows of the dependencies in package.xml. Run it after the package uses
something new of ROS, which the test says, or for a new distribution.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ros_sources import DISTRIBUTIONS, PACKAGES, Definition, Distribution
from ros_uses import Sources, Use

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "test" / "package" / "ros_api.json"
# What ROS returns where none of its annotations says so.
_RETURNS = {
    "rclpy.node.Node.get_logger": "rclpy.impl.rcutils_logger.RcutilsLogger",
    "rclpy.logging.get_logger": "rclpy.impl.rcutils_logger.RcutilsLogger",
    "rclpy.node.Node.get_clock": "rclpy.clock.Clock",
    "rclpy.clock.Clock.now": "rclpy.time.Time",
    "rclpy.node.Node.get_parameter": "rclpy.parameter.Parameter",
    "rclpy.node.Node.executor": "rclpy.executors.Executor",
    "rclpy.node.Node.context": "rclpy.context.Context",
    "rclpy.node.Node.create_publisher": "rclpy.publisher.Publisher",
    "rclpy.node.Node.create_subscription": "rclpy.subscription.Subscription",
    "rclpy.node.Node.create_client": "rclpy.client.Client",
    "rclpy.node.Node.create_service": "rclpy.service.Service",
    "rclpy.node.Node.create_timer": "rclpy.timer.Timer",
    "rclpy.node.Node.create_guard_condition": "rclpy.guard_condition.GuardCondition",
    "rclpy.executors.Executor.context": "rclpy.context.Context",
    "rclpy.executors.SingleThreadedExecutor.context": "rclpy.context.Context",
    "rclpy.client.Client.call_async": "rclpy.task.Future",
    "rclpy.action.client.ActionClient.send_goal_async": "rclpy.task.Future",
    "rclpy.action.ActionClient.send_goal_async": "rclpy.task.Future",
    "rclpy.action.client.ClientGoalHandle.cancel_goal_async": "rclpy.task.Future",
    "rclpy.action.client.ClientGoalHandle.get_result_async": "rclpy.task.Future",
}


def problems(use: Use, signatures: Mapping[str, Any], distribution: str) -> list[str]:
    """Return what ``use`` asks for and ``distribution`` does not have; ``signatures``: of names, as recorded."""
    found = [signatures.get(name, {}).get(distribution) for name in use.names]
    there = [each for each in found if each is not None]
    if not there:
        return [] if use.optional else [f"{use.where}: {distribution} has no {' or '.join(use.names)}"]
    if use.keywords is None or any(each == "value" for each in there):
        return []
    return [] if any(_accepts(each, use) for each in there) else [_refusal(use, there, distribution)]


def _accepts(signature: Mapping[str, Any], use: Use) -> bool:
    positional, keywords = signature["positional"], set(signature["keywords"])
    by_place = set(positional[: use.positional])
    return (use.positional <= len(positional) or signature["any_positional"]) and all(
        keyword not in by_place and (keyword in keywords or signature["any_keyword"]) for keyword in use.keywords or ()
    )


def _refusal(use: Use, there: Sequence[Mapping[str, Any]], distribution: str) -> str:
    known = sorted({keyword for each in there for keyword in each["keywords"]})
    return (
        f"{use.where}: {' or '.join(use.names)} of {distribution} takes {known}, but is given {use.positional} "
        f"arguments by place and {list(use.keywords or ())}"
    )


# --- recording ----------------------------------------------------------------------------------------------


def record(sources: Path) -> dict[str, Any]:
    """Return what is written to TARGET. Raises LookupError."""
    distributions = [Distribution(name, sources) for name in DISTRIBUTIONS]
    returns = dict(_RETURNS)
    while True:
        uses = list(Sources(tuple(PACKAGES), returns).uses())
        names = sorted({name for use in uses for name in use.names})
        new = {name: found for name in names if name not in returns and (found := _returned(name, distributions))}
        if not new:
            break
        returns |= new
    return {
        "versions": {each.name: each.versions for each in distributions},
        "returns": {name: returns[name] for name in sorted(returns) if name in names},
        "names": {name: dict(_recorded(name, distributions)) for name in names},
        "rosdep": rosdep_keys(sources / "rosdistro"),
    }


def _returned(name: str, distributions: Sequence[Distribution]) -> str:
    """Return the class of what a call of ``name`` returns, or of a property; "" where no distribution says."""
    for distribution in reversed(distributions):
        found = distribution.find(name)
        if found is None or found.kind in ("class", "message"):
            continue
        type_ = found.type or (found.signature.returns if found.signature else "")
        of = distribution.find(type_) if type_.split(".")[0] in PACKAGES else None
        if of is not None and of.kind in ("class", "message"):  # a type variable is a value
            return type_
    return ""


def _recorded(name: str, distributions: Sequence[Distribution]) -> Iterator[tuple[str, Any]]:
    for distribution in distributions:
        found = distribution.find(name)
        yield distribution.name, None if found is None else _as_data(found, name, distribution)


def _as_data(found: Definition, name: str, distribution: Distribution) -> Any:
    """Return the arguments of a callable, or "value"."""
    if found.kind in ("class", "message"):
        constructor = distribution.find(f"{name}.__init__") or distribution.find(f"{name}.__new__")
        found = constructor or Definition("value")
    signature = found.signature
    if signature is None or found.kind == "property":
        return "value"
    return {
        "positional": list(signature.positional),
        "keywords": list(signature.keywords),
        "any_positional": signature.any_positional,
        "any_keyword": signature.any_keyword,
    }


_UBUNTU = {"humble": "jammy", "jazzy": "noble", "kilted": "noble", "rolling": "noble"}


def dependencies() -> dict[str, str]:
    """Return each dependency of package.xml → its condition."""
    elements = [each for each in ElementTree.parse(ROOT / "package.xml").getroot() if each.tag.endswith("depend")]
    return {each.text or "": each.get("condition", "") for each in elements}


def applies(condition: str, distribution: str) -> bool:
    """Return whether a condition such as ``$ROS_DISTRO != humble`` holds there."""
    if not condition:
        return True
    variable, operator, value = condition.split()
    assert variable == "$ROS_DISTRO" and operator in ("==", "!="), condition
    return (value == distribution) == (operator == "==")


def rosdep_keys(clone: Path) -> dict[str, Any]:
    """Return what each dependency is in each distribution: a package of ROS, what rosdep installs, or None."""
    import yaml

    def read(path: str) -> Any:
        command = ["git", "-C", str(clone), "show", f"HEAD:{path}"]
        return yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    rules = {**read("rosdep/base.yaml"), **read("rosdep/python.yaml")}
    date = subprocess.run(
        ["git", "-C", str(clone), "log", "-1", "--format=%cs"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found: dict[str, dict[str, str | None]] = {name: {} for name in dependencies()}
    for distribution in DISTRIBUTIONS:
        repositories = read(f"{distribution}/distribution.yaml")["repositories"]
        released = {
            package
            for name, each in repositories.items()
            if "version" in each.get("release", {})
            for package in each["release"].get("packages", [name])
        }
        for name in found:
            rule = _rule(rules.get(name), _UBUNTU[distribution])
            found[name][distribution] = "ROS package" if name in released else rule
    return {"date": date, "keys": found}


def _rule(rule: Any, codename: str) -> str | None:
    """Return what rosdep installs on that Ubuntu."""
    rule = (rule or {}).get("ubuntu", (rule or {}).get("*"))
    if isinstance(rule, dict) and "pip" not in rule:
        rule = rule.get(codename, rule.get("*"))
    if isinstance(rule, dict):
        return "pip: " + " ".join(rule["pip"]["packages"])
    return " ".join(rule) if rule else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path)
    recorded = record(parser.parse_args().sources)
    lines = [json.dumps(name) + ": " + json.dumps(value) for name, value in recorded["names"].items()]
    rest = {name: value for name, value in recorded.items() if name != "names"}
    text = json.dumps(rest, indent=1)[:-2] + ',\n "names": {\n  ' + ",\n  ".join(lines) + "\n }\n}\n"
    TARGET.write_text(text, encoding="utf-8")
    uses = list(Sources(tuple(PACKAGES), recorded["returns"]).uses())
    found = [each for use in uses for name in DISTRIBUTIONS for each in problems(use, recorded["names"], name)]
    print(f"{len(recorded['names'])} names in {len(uses)} places", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
