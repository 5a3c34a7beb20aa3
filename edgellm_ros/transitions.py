"""Lifecycle transitions in a thread of their own, one at a time.

rclpy runs a transition inside the service callback. Loading an engine takes seconds and a deactivate may wait for a
request; on the executor's thread nothing else would be answered meanwhile, not even get_state or a cancel. rclpy also
lets the exception of an impossible transition (configure twice) end the executor: here it is an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.node import Node
from rclpy.task import Future

from edgellm_ros.threads import SerialThread


class Transitions:
    """``after`` is called, in that thread, when a transition is over, whatever came of it."""

    def __init__(self, node: Node, after: Callable[[], None]) -> None:
        self._node = node
        self._after = after
        self._thread = SerialThread(node, "edgellm-lifecycle")

    def take_over(self, instead: Callable[[ChangeState.Request], bool | None]) -> None:
        """Have the change_state service of ``node`` answered through this thread.

        ``instead`` is asked first, there: it answers a request with whether it succeeded, or with None to have the
        transition made as usual.
        """
        (service,) = (service for service in self._node.services if service.srv_type is ChangeState)
        make_transition = service.callback

        def change(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            success = instead(request)
            return make_transition(request, response) if success is None else ChangeState.Response(success=success)

        async def on_change_state(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            what = f"Transition {request.transition.label or request.transition.id}"
            answer = await self.run(what, partial(change, request, response))
            return ChangeState.Response(success=False) if answer is None else answer

        service.callback = on_change_state

    def run(self, what: str, transition: Callable[[], Any]) -> Future:
        """Has ``transition`` run; the future gets its result, or None if it was not possible."""

        def work() -> Any:
            try:
                return transition()
            except Exception as error:  # rclpy raises its private RCLError for what the state does not allow
                self._node.get_logger().warning(f"{what} was refused: {error}")
                return None
            finally:
                self._after()

        return self._thread.run(work)

    def close(self, timeout: float) -> bool:
        """Return False if a transition still runs after ``timeout`` seconds."""
        return self._thread.close(timeout)
