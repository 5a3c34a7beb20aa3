"""Beside nav2_lifecycle_manager: its order of calls with autostart, and the bond it waits for."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from lifecycle_msgs.msg import State, Transition

from edgellm_ros import bond as module
from edgellm_ros.bond import Bond, make_bond, status_type
from llm_client import ACTIVATE, ACTIVE, CLEANUP, CONFIGURE, DEACTIVATE, INACTIVE, STREAM, UNCONFIGURED


def test_a_manager_takes_over_a_node_that_started_by_itself(nodes, engine_dir):
    """Do what LifecycleManager::changeStateForNode does: each transition succeeds and leads to its state."""
    llm = nodes.start(engine_dir, autostart=True)
    llm.until(lambda: llm.state() == ACTIVE)
    assert llm.change(CONFIGURE) and llm.state() == INACTIVE
    assert llm.change(ACTIVATE) and llm.state() == ACTIVE
    assert not llm.change(CONFIGURE) and llm.state() == ACTIVE  # from then on the manager's own fault
    assert llm.change(DEACTIVATE) and llm.state() == INACTIVE


def test_a_manager_that_comes_while_the_node_starts(nodes, engine_dir):
    llm = nodes.start(engine_dir, autostart=True)
    assert llm.change(CONFIGURE) and llm.state() == INACTIVE
    time.sleep(0.5)
    assert llm.state() == INACTIVE  # autostart holds back
    assert llm.change(ACTIVATE) and llm.state() == ACTIVE


# The methods of LifecycleManager, each a list of transitions. Every one of them has to succeed, and get_state is asked
# right after it and has to name its state within 2 s (Humble, Jazzy: LifecycleServiceClient::get_state; Kilted: 5 s).
STARTUP = ((CONFIGURE, INACTIVE), (ACTIVATE, ACTIVE))
PAUSE, RESUME = ((DEACTIVATE, INACTIVE),), ((ACTIVATE, ACTIVE),)
RESET = ((DEACTIVATE, INACTIVE), (CLEANUP, UNCONFIGURED))
SHUTDOWN = (*RESET, (Transition.TRANSITION_UNCONFIGURED_SHUTDOWN, State.PRIMARY_STATE_FINALIZED))


def seconds_until_state(llm, state) -> float:
    """Ask for the node's state, which has to be ``state``; return how long the answer took."""
    start = time.monotonic()
    assert llm.state() == state
    return time.monotonic() - start


def test_the_commands_of_a_manager(nodes, engine_dir):
    """The machine may be busy: of a few answers one has to come in time."""
    llm = nodes.start(engine_dir)
    for command in (STARTUP, PAUSE, RESUME, RESET, STARTUP, SHUTDOWN):
        for transition, state in command:
            assert llm.change(transition), (command, transition)
            assert any(seconds_until_state(llm, state) < 2.0 for _ in range(5)), (command, transition)


def test_a_manager_resets_a_node_after_another_one_has_failed(nodes, engine_dir):
    """A hard reset goes on after transitions that the node refuses, as it does with one that is down already."""
    llm = nodes.start(engine_dir)
    for transition, _ in RESET:
        assert not llm.change(transition) and llm.state() == UNCONFIGURED
    for transition, state in STARTUP:
        assert llm.change(transition) and llm.state() == state


class FakeNode:
    """A node with what Bond asks of one; ``sent``: what it published."""

    def __init__(self):
        self.sent = []
        self.warnings = []

    def get_name(self):
        return "llm"

    def get_logger(self):
        return SimpleNamespace(info=lambda text: None, warning=self.warnings.append)

    def get_clock(self):
        return SimpleNamespace(now=lambda: SimpleNamespace(to_msg=lambda: 0))

    def create_publisher(self, *_, **__):
        return SimpleNamespace(publish=self.sent.append)

    def create_subscription(self, *_, **__):
        pass

    def create_timer(self, *_, **__):
        pass


def status(**values):
    return SimpleNamespace(header=SimpleNamespace(stamp=None), heartbeat_timeout=0.0, heartbeat_period=0.0, **values)


def test_auto_answers_a_manager_and_nobody_else():
    node = FakeNode()
    bond = Bond(node, status, "auto")
    bond.start()
    bond._beat()
    assert node.sent == []  # nobody has asked
    bond._on_status(status(id="other", instance_id="m", active=True))
    assert not bond.is_formed and node.sent == []
    bond._on_status(status(id="llm", instance_id="m", active=True))
    assert bond.is_formed and [message.active for message in node.sent] == [True]
    bond._on_status(node.sent[0])  # its own heartbeat comes back
    bond._beat()
    assert len(node.sent) == 2 and node.sent[0].instance_id == node.sent[1].instance_id != "m"
    assert node.sent[0].heartbeat_timeout == 4.0
    bond.stop()
    assert [message.active for message in node.sent] == [True, True, False]
    bond._beat()
    assert len(node.sent) == 3


def test_always_beats_at_once_and_an_ended_bond_can_be_formed_again():
    node = FakeNode()
    bond = Bond(node, status, "always")
    bond.start()
    assert len(node.sent) == 1
    for instance in ("m1", "m2"):
        bond._on_status(status(id="llm", instance_id=instance, active=True))
        assert bond.is_formed
        bond._on_status(status(id="llm", instance_id=instance, active=False))
        assert not bond.is_formed and not node.sent[-1].active  # answered


@pytest.mark.parametrize(("mode", "at_start", "managed"), [("auto", 0, 1), ("always", 1, 1), ("never", 0, 0)])
def test_without_the_package_a_manager_is_told_once_how_to_get_it(monkeypatch, mode, at_start, managed):
    monkeypatch.setattr(module, "status_type", lambda: None)
    node = FakeNode()
    bond = make_bond(node, mode)
    assert len(node.warnings) == at_start
    for _ in range(2):
        bond.on_managed()
        bond.start()
        bond.stop()
    assert len(node.warnings) == managed and not bond.is_formed
    assert all("-bond" in text for text in node.warnings)


@pytest.mark.alone
@pytest.mark.skipif(status_type() is None, reason="the ROS package 'bond' is not installed")
def test_a_manager_forms_its_bond_within_two_seconds(nodes, engine_dir):
    """nav2_lifecycle_manager waits for half of bond_timeout, 4 s by default, and sends a heartbeat every 0.1 s."""
    llm = nodes.start(engine_dir).bring_up()
    heard = []
    llm.node.create_subscription(status_type(), "bond", heard.append, STREAM)
    publisher = llm.node.create_publisher(status_type(), "bond", STREAM)
    llm.until(lambda: publisher.get_subscription_count() > 1)  # the node's and ours; discovery does not count
    end = time.monotonic() + 2.0
    while not any(message.instance_id != "manager" and message.active for message in heard):
        assert time.monotonic() < end
        publisher.publish(status_type()(id=llm.name, instance_id="manager", active=True))
        llm.spin(0.1)
    llm.spin(1.0)
    assert sum(message.instance_id != "manager" for message in heard) >= 3  # it goes on beating
    assert llm.change(DEACTIVATE)
    llm.until(lambda: any(message.instance_id != "manager" and not message.active for message in heard))
