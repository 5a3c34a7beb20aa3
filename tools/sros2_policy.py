"""Writes config/sros2/policy.xml: what the node and its clients may do in a secured graph, from the node's interfaces.

    tools/start run tools/sros2_policy.py [--check] [--namespace /robot] [--name llm] [--output FILE]

The node is created, without an engine, and asked what it publishes, subscribes to and serves. Nothing is listed by hand
but what a node has only with certain packages or parameters. ``ros2 security create_permission`` turns the file into
permissions. With ``--check`` nothing is written, and the exit status is 1 if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "config" / "sros2" / "policy.xml"
_ACTION = "/_action/"  # in names of the topics and services that make up an action
# Topics that the node has only where a package is installed (bond, for lifecycle managers) or that rclpy opens itself.
_BOTH_WAYS = ("/bond", "/parameter_events")
_READ = ("/clock",)  # with use_sim_time
_TIMEOUT, _INTERVAL = 10.0, 0.2  # s, until the graph has the node's interfaces and between two looks at it
# Services that change the node for everybody: for operators, not for those who ask it something.
_OPERATING = ("change_state", "set_parameters", "set_parameters_atomically")


@dataclass(frozen=True)
class Interfaces:
    """Names of what a node has, as the graph says them."""

    published: frozenset[str]
    subscribed: frozenset[str]
    services: frozenset[str]
    actions: frozenset[str]


def interfaces_of(node) -> Interfaces:
    """Return the interfaces of an rclpy node."""
    from rclpy.action import get_action_server_names_and_types_by_node

    own = node.get_name(), node.get_namespace()

    def names(found: Iterable[tuple[str, list[str]]]) -> frozenset[str]:
        return frozenset(name for name, _ in found if _ACTION not in name)

    return Interfaces(
        names(node.get_publisher_names_and_types_by_node(*own)),
        names(node.get_subscriber_names_and_types_by_node(*own)),
        names(node.get_service_names_and_types_by_node(*own)),
        names(get_action_server_names_and_types_by_node(node, *own)),
    )


def _settled(node) -> Interfaces:
    """Return the interfaces of a new node once the graph has them all. Raises TimeoutError after some seconds.

    The graph hears of a node's own interfaces as of those of others, one by one.
    """
    published = {publisher.topic_name for publisher in node.publishers}
    services = {node.resolve_service_name(service.srv_name) for service in node.services}
    before, end = None, time.monotonic() + _TIMEOUT
    while time.monotonic() < end:
        found = interfaces_of(node)
        if found == before and published <= found.published and services <= found.services:
            return found
        before = found
        time.sleep(_INTERVAL)
    raise TimeoutError(f"The graph has not shown the interfaces of {node.get_name()} for {_TIMEOUT:.0f} s.")


def llm_interfaces(name: str = "llm", namespace: str = "/") -> Interfaces:
    """Return the interfaces of the node, which is created for it in a context of its own."""
    from rclpy.context import Context

    from edgellm_ros.node import LlmNode

    context = Context()
    context.init()
    try:
        node = LlmNode(name, namespace=namespace, context=context)
        try:
            return _settled(node)
        finally:
            node.stop()
            node.destroy_node()
    finally:
        context.try_shutdown()


def policy(found: Interfaces, name: str = "llm", namespace: str = "/") -> str:
    """Return the policy of three enclaves: the node's, that of clients, and that of operators.

    Clients ask; operators may also make transitions and set parameters.
    """
    root = ElementTree.Element("policy", version="0.2.0")
    enclaves = ElementTree.SubElement(root, "enclaves")
    path = f"{namespace.rstrip('/')}/{name}"

    def relative(names: Iterable[str]) -> list[str]:
        """~/x instead of the node's full name, so that the policy holds for whatever it is called."""
        return sorted(f"~{each.removeprefix(path)}" if each.startswith(f"{path}/") else each for each in names)

    node = _profile(enclaves, path, namespace, name)
    both = {*_BOTH_WAYS} | (found.published & found.subscribed)
    _rules(node, "topics", {"publish": "ALLOW", "subscribe": "ALLOW"}, relative(both))
    _rules(node, "topics", {"publish": "ALLOW"}, relative(found.published - both))
    _rules(node, "topics", {"subscribe": "ALLOW"}, relative({*found.subscribed, *_READ} - both))
    _rules(node, "services", {"reply": "ALLOW"}, relative(found.services))
    _rules(node, "actions", {"execute": "ALLOW"}, relative(found.actions))

    def own(names: Iterable[str]) -> list[str]:
        """Those of the node itself; everybody has /rosout and /parameter_events."""
        return sorted(each for each in names if each.startswith(f"{path}/"))

    operating = {f"{path}/{each}" for each in _OPERATING}
    for role, services in (("client", found.services - operating), ("operator", found.services)):
        user = _profile(enclaves, f"{path}_{role}", namespace, f"{name}_{role}")
        _rules(user, "topics", {"publish": "ALLOW", "subscribe": "ALLOW"}, ["/parameter_events"])
        _rules(user, "topics", {"publish": "ALLOW"}, [*own(found.subscribed), "/rosout"])
        _rules(user, "topics", {"subscribe": "ALLOW"}, [*own(found.published), *_READ])
        _rules(user, "services", {"request": "ALLOW"}, own(services))
        _rules(user, "actions", {"call": "ALLOW"}, own(found.actions))
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!-- Written by tools/sros2_policy.py. -->\n'
    return head + ElementTree.tostring(root, encoding="unicode") + "\n"


def _profile(enclaves: ElementTree.Element, path: str, namespace: str, name: str) -> ElementTree.Element:
    enclave = ElementTree.SubElement(enclaves, "enclave", path=path)
    return ElementTree.SubElement(ElementTree.SubElement(enclave, "profiles"), "profile", ns=namespace, node=name)


def _rules(profile: ElementTree.Element, kind: str, rights: dict[str, str], names: list[str]) -> None:
    if names:
        rules = ElementTree.SubElement(profile, kind, rights)
        for name in names:
            ElementTree.SubElement(rules, kind.removesuffix("s")).text = name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not up to date")
    parser.add_argument("--name", default="llm", help="of the node (default: %(default)s)")
    parser.add_argument("--namespace", default="/", help="of the node (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    text = policy(llm_interfaces(options.name, options.namespace), options.name, options.namespace)
    if options.check:
        return 0 if options.output.is_file() and options.output.read_text(encoding="utf-8") == text else 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
