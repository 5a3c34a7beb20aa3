"""What the package uses of ROS exists in every supported distribution, and takes the arguments that it is given."""

from __future__ import annotations

import json

import pytest

import ros_api
from ros_sources import DISTRIBUTIONS, PACKAGES, Distribution, _read_interface, _read_module
from ros_uses import Sources, Use

DATA = json.loads(ros_api.TARGET.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return list(Sources(tuple(PACKAGES), DATA["returns"]).uses())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_use_fits_the_distribution(uses, distribution):
    found = [problem for use in uses for problem in ros_api.problems(use, DATA["names"], distribution)]
    assert found == [], "run tools/ros_api.py if a name is new"


def test_what_is_optional_exists_somewhere(uses):
    optional = [use for use in uses if use.optional]
    assert optional
    assert all(any(DATA["names"][name][each] for name in use.names for each in DISTRIBUTIONS) for use in optional)


def test_the_uses_of_each_part_are_seen(uses):
    """A follower of types that loses them would find nothing wrong."""
    names = {name for use in uses for name in use.names}
    assert names >= {
        "rclpy.node.Node.create_publisher", "rclpy.lifecycle.LifecycleNodeMixin.trigger_shutdown",
        "rclpy.action.server.ServerGoalHandle.publish_feedback", "rclpy.publisher.Publisher.publish",
        "launch.actions.GroupAction", "rcl_interfaces.msg.FloatingPointRange", "lifecycle_msgs.msg.Transition.label",
        "diagnostic_updater.Updater.add", "bond.msg.Status", "rclpy.qos.HistoryPolicy.KEEP_LAST",
    }  # fmt: skip
    given = {keyword for use in uses for keyword in use.keywords or ()}
    assert given >= {"callback_group", "event_callbacks", "forwarding", "signal_handler_options", "default_value"}
    assert len(uses) > 350


def test_every_dependency_is_known_to_rosdep():
    keys = DATA["rosdep"]["keys"]
    assert keys.keys() == ros_api.dependencies().keys(), "run tools/ros_api.py"
    for name, condition in ros_api.dependencies().items():
        wanted = [each for each in DISTRIBUTIONS if ros_api.applies(condition, each)]
        assert [each for each in wanted if not keys[name][each]] == [], name


# --- the tools themselves -----------------------------------------------------------------------------------

MODULE = """
from typing import Any, Optional
from .base import Base, Thing

class Node(Base):
    def __init__(self, name, *, context=None): ...
    def create(self, kind, /, topic: str, *, group=None) -> Optional[Thing]: ...
    @property
    def thing(self) -> "Thing": ...
    KINDS = (A, B) = range(2)

def init(args=None, **options): ...
"""
BASE = """
class Base:
    def close(self, *args) -> None: ...
class Thing:
    def __init__(self, size): self.size = size
    def publish(self, message): ...
"""
OURS = """
import ros
from ros import Node
try:
    from ros.new import Event
except ImportError:
    from ros.old import Event

class Ours(Node):
    def __init__(self, name: str):
        super().__init__(name, context=None)
        self._thing = self.create(1, topic="x")
        self._thing.publish(2)
        if hasattr(self, "later"):
            self.later()

def use(node: Node, other):
    with Ours("x") as ours:
        ours.thing.publish(3)
    node.close(1, 2)
    other.create()
    ros.init(domain=3)
    Event()
"""


class FakeDistribution(Distribution):
    def __init__(self) -> None:
        self.name, self._names = "fake", {}
        _read_module("ros", MODULE, True, self._names)
        _read_module("ros.base", BASE, False, self._names)
        _read_module("ros.old", "class Event: ...", False, self._names)


def problems_of(source: str, tmp_path) -> list[str]:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "ours.py").write_text(source)
    distribution, returns = FakeDistribution(), {}
    for _ in range(3):
        uses = list(Sources(("ros",), returns, tmp_path).uses())
        names = {name for use in uses for name in use.names}
        for name in names:
            found = distribution.find(name)
            if found is not None and found.signature and found.signature.returns:
                returns[name] = found.signature.returns
    signatures = {name: dict(ros_api._recorded(name, [distribution])) for name in names}
    return [problem for use in uses for problem in ros_api.problems(use, signatures, "fake")]


def test_right_uses_are_no_problem(tmp_path):
    assert problems_of(OURS, tmp_path) == []


@pytest.mark.parametrize(
    "before, after, problem",
    [
        ('topic="x")', 'topic="x", late=1)', "given 1 arguments by place and ['topic', 'late']"),
        ("self._thing.publish(2)", "self._thing.send(2)", "no ros.base.Thing.send"),
        ("self._thing.publish(2)", "self._thing.publish(2, 3)", "given 2"),
        ("ours.thing.publish(3)", "ours.thing.size_of", "no ros.base.Thing.size_of"),
        ('super().__init__(name, context=None)', 'super().__init__(name, 1)', "given 2"),
        ("node.close(1, 2)", "node.shut(1)", "no ros.Node.shut"),
        ("    from ros.old import Event", "    from ros.older import Event", "no ros.new.Event or ros.older.Event"),
        ('if hasattr(self, "later")', "if name", "no ros.Node.later"),
        ("from ros import Node\n", "from ros import Node, Lost\n", "no ros.Lost"),
        ("ros.init(domain=3)", "ros.start()", "no ros.start"),
    ],
)  # fmt: skip
def test_wrong_uses_are_told(tmp_path, before, after, problem):
    assert before in OURS
    found = problems_of(OURS.replace(before, after), tmp_path)
    assert found and all(problem in each for each in found), found


def test_fields_and_constants_of_interfaces_are_read():
    text = "# a: b\nuint8 HIGH=3 # x\nfloat64[<=2] sizes\nother_msgs/Thing thing\nstring<=5 label 'x'\nint32 count 7\n"
    names = _read_interface("some_msgs", "msg/Some.msg", text)
    some = names["some_msgs.msg.Some"]
    assert set(some.members) >= {"HIGH", "sizes", "thing", "label", "count", "get_fields_and_field_types"}
    assert some.members["__init__"].signature.keywords == ("sizes", "thing", "label", "count")
    assert some.members["thing"].type == "other_msgs.msg.Thing"
    service = _read_interface("some_msgs", "srv/Ask.srv", "---\nbool ok\n")["some_msgs.srv.Ask"]
    assert service.members["Request"].members["__init__"].signature.keywords == ()
    assert "ok" in service.members["Response"].members
