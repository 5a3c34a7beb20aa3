"""A behaviour for py_trees that asks the model: running while it answers, cancelled when the tree goes elsewhere.

python3 examples/py_trees_behaviour.py the cup has fallen from the table

``AskModel`` is what to copy into a tree of your own; ``main`` has a small one. It needs py_trees.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from edgellm_ros.client import LLM, LLMError, Pieces
from edgellm_ros.msg import FinishReason, GenerationResult

try:
    import py_trees
    from py_trees.common import Access, Status
except ImportError:
    pip = f"{sys.executable} -m pip install py_trees"
    sys.exit(f"py_trees is not installed; install it with: {pip} (ROS: ros-$ROS_DISTRO-py-trees).")


class AskModel(py_trees.behaviour.Behaviour):
    """Asks the text at ``question`` on the blackboard and writes the answer's text to ``answer``.

    RUNNING while the model answers; SUCCESS with a whole answer; FAILURE with the reason in ``feedback_message``.
    ``options`` are those of a request: ``choices=["a", "b"]``, ``deadline=10.0``.
    """

    def __init__(self, name: str, llm: LLM, question: str = "question", answer: str = "answer", **options: Any) -> None:
        super().__init__(name)
        self._llm, self._options = llm, options
        self._question, self._answer = question, answer
        self.blackboard = self.attach_blackboard_client(name=name)
        self.blackboard.register_key(key=question, access=Access.READ)
        self.blackboard.register_key(key=answer, access=Access.WRITE)
        self._asked: _Asked | None = None

    def initialise(self) -> None:
        """Ask; the answer comes in another thread, so that no tick waits."""
        pieces = self._llm.pieces(self.blackboard.get(self._question), **self._options)
        self._asked = _Asked(pieces)

    def update(self) -> Status:
        asked = self._asked
        assert asked is not None
        if not asked.ended.is_set():
            self.feedback_message = asked.text[-80:]
            return Status.RUNNING
        if asked.error is not None:
            self.feedback_message = str(asked.error)
            return Status.FAILURE
        result = asked.result
        assert result is not None
        if result.finish_reason != FinishReason.STOP:
            self.feedback_message = f"The answer is not whole (finish reason {result.finish_reason})."
            return Status.FAILURE
        self.blackboard.set(self._answer, result.text)
        self.feedback_message = result.text[-80:]
        return Status.SUCCESS

    def terminate(self, new_status: Status) -> None:
        """Cancel the request when another branch takes over."""
        if new_status is Status.INVALID and self._asked is not None:
            self._asked.pieces.cancel()


class _Asked:
    """A request that a thread waits for."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.text = ""
        self.result: GenerationResult | None = None
        self.error: LLMError | None = None
        self.ended = threading.Event()
        threading.Thread(target=self._wait, name="ask-model", daemon=True).start()

    def _wait(self) -> None:
        try:
            for piece in self.pieces:
                self.text += piece
            self.result = self.pieces.result
        except LLMError as error:
            self.error = error
        finally:
            self.ended.set()


def make_tree(llm: LLM, show: Callable[[str], None]) -> py_trees.behaviour.Behaviour:
    """Return a tree that has the model choose what to do about ``question``, and shows it."""
    ask = AskModel("choose", llm, choices=["pick it up", "ask a person", "ignore it"], temperature=0.0, deadline=30.0)

    class Show(py_trees.behaviour.Behaviour):
        def update(self) -> Status:
            show(py_trees.blackboard.Blackboard.get("answer"))
            return Status.SUCCESS

    root = py_trees.composites.Sequence("decide", memory=True)
    root.add_children([ask, Show("show")])
    return root


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("situation", nargs="+")
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    options = parser.parse_args(args)
    situation = " ".join(options.situation)
    py_trees.blackboard.Blackboard.set("question", f"You are a robot. {situation}. What do you do?")
    with LLM(options.node) as llm:
        tree = make_tree(llm, print)
        tree.tick_once()
        while tree.status is Status.RUNNING:
            time.sleep(0.05)
            tree.tick_once()
    if tree.status is not Status.SUCCESS:
        print(next(child.feedback_message for child in tree.iterate() if child.feedback_message), file=sys.stderr)
    return 0 if tree.status is Status.SUCCESS else 1


if __name__ == "__main__":
    sys.exit(main())
