"""The SROS2 policy has every interface of the node, and gives clients no right to change it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

import sros2_policy


@pytest.fixture(scope="module")
def found() -> sros2_policy.Interfaces:
    return sros2_policy.llm_interfaces()


def rules(text: str, enclave: str, right: str) -> set[str]:
    """Return what the enclave may do, by the name of the right."""
    profile = ElementTree.fromstring(text).find(f"enclaves/enclave[@path='{enclave}']/profiles/profile")
    return {each.text for kind in profile if kind.get(right) == "ALLOW" for each in kind}


def test_the_file_is_up_to_date(found):
    text = sros2_policy.TARGET.read_text(encoding="utf-8")
    assert text == sros2_policy.policy(found), "run tools/start run tools/sros2_policy.py"


def test_the_node_may_do_what_it_does(found):
    text = sros2_policy.policy(found)
    assert rules(text, "/llm", "publish") >= {"~/tokens", "~/status", "~/transition_event", "/diagnostics", "/bond"}
    assert rules(text, "/llm", "subscribe") >= {"~/prompt", "/bond", "/clock"}
    assert rules(text, "/llm", "reply") >= {"~/generate", "~/cancel", "~/change_state", "~/set_parameters"}
    assert rules(text, "/llm", "execute") == {"~/generate"}
    assert len(rules(text, "/llm", "reply")) == len(found.services)


def test_clients_ask_and_operators_change(found):
    text = sros2_policy.policy(found)
    client, operator = (rules(text, f"/llm_{role}", "request") for role in ("client", "operator"))
    assert operator - client == {"/llm/change_state", "/llm/set_parameters", "/llm/set_parameters_atomically"}
    assert client >= {"/llm/generate", "/llm/cancel", "/llm/get_state"}
    for role in ("client", "operator"):
        assert rules(text, f"/llm_{role}", "call") == {"/llm/generate"}
        assert rules(text, f"/llm_{role}", "publish") == {"/llm/prompt", "/rosout", "/parameter_events"}
        assert "/llm/tokens" in rules(text, f"/llm_{role}", "subscribe")


def test_another_name_and_namespace(found):
    other = sros2_policy.llm_interfaces("talker", "/robot")
    text = sros2_policy.policy(other, "talker", "/robot")
    assert rules(text, "/robot/talker", "reply") == rules(sros2_policy.policy(found), "/llm", "reply")
    assert "/robot/talker/generate" in rules(text, "/robot/talker_client", "request")
