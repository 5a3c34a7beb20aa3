"""The node and its base classes of rclpy have no private name in common."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import rclpy.lifecycle
import rclpy.node

NODE = Path(__file__).resolve().parents[2] / "edgellm_ros" / "node.py"


def private_accesses(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            yield node


def own_names(tree: ast.AST) -> set[str]:
    """Private names that this file defines: functions, methods and attributes of self."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    stored = {node.attr for node in private_accesses(tree) if isinstance(node.ctx, ast.Store)}
    return defined | stored


def test_the_node_uses_and_hides_no_private_member_of_its_base_classes():
    node = ast.parse(NODE.read_text(encoding="utf-8"))
    ours = own_names(node) | {access.attr for access in private_accesses(node)}
    for base in (rclpy.node.Node, rclpy.lifecycle.LifecycleNodeMixin):
        theirs = own_names(ast.parse(inspect.getsource(inspect.getmodule(base))))
        assert not {name for name in ours & theirs if name.startswith("_") and not name.endswith("__")}
