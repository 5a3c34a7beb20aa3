"""A planner: turns a command into the steps of a plan through the node's action. Run it beside a node that is active:

python3 examples/planner_node.py bring me the red cup from the kitchen
"""

import json
import sys
from pathlib import Path

import rclpy
from ament_index_python.packages import get_package_share_directory
from rclpy.action import ActionClient
from rclpy.node import Node

from edgellm_ros.action import Generate
from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason


class Planner(Node):
    def __init__(self) -> None:
        super().__init__("planner")
        self._llm = ActionClient(self, Generate, "/llm/generate")
        share = Path(get_package_share_directory("edgellm_ros"))
        self._schema = (share / "models" / "demo" / "plan.schema.json").read_text()

    async def plan(self, command: str) -> list[dict]:
        """The steps to do. Raises RuntimeError with a sentence for the user if there are none."""
        if not self._llm.wait_for_server(timeout_sec=5.0):
            raise RuntimeError("Nobody serves /llm/generate.")
        goal = Generate.Goal(json_schema=self._schema, deadline=10.0)  # s
        goal.messages = [ChatMessage(role="user", content=command)]
        goal.sampling.temperature = [0.0]
        handle = await self._llm.send_goal_async(goal, feedback_callback=self._on_feedback)
        if not handle.accepted:
            raise RuntimeError("The language model is not active.")
        answer = (await handle.get_result_async()).result
        print()
        if answer.error_code != ErrorCode.NONE:
            raise RuntimeError(answer.error_message)
        if answer.finish_reason != FinishReason.STOP:  # late, cancelled or cut: not a whole plan
            raise RuntimeError(f"There is no whole plan (finish reason {answer.finish_reason}).")
        value = json.loads(answer.text)  # cannot fail: the schema held while it was generated
        if "plan" not in value:
            raise RuntimeError(value.get("refuse") or value.get("ask"))
        return value["plan"]

    def _on_feedback(self, message) -> None:
        print(message.feedback.text, end="", flush=True)


def main() -> int:
    rclpy.init()
    planner = Planner()
    task = rclpy.get_global_executor().create_task(planner.plan(" ".join(sys.argv[1:])))
    try:
        rclpy.spin_until_future_complete(planner, task)
        for number, step in enumerate(task.result(), start=1):
            print(number, step.pop("do"), *(f"{key}={value}" for key, value in step.items()))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        planner.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
