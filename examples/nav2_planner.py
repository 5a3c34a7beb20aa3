"""A planner for Nav2: a command becomes poses, to which Nav2 drives one after the other.

python3 examples/nav2_planner.py go to the kitchen, then one metre ahead

It needs Nav2 (nav2_msgs and its action navigate_to_pose) and the node /llm, both active. The model chooses among the
places below, or says where to go from where the robot stands. It hears when a goal cannot be reached, and plans again.
"""

import argparse
import json
import math
import sys
import threading

import rclpy
from action_msgs.msg import GoalStatus
from geometry_msgs.msg import PoseStamped
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future

from edgellm_ros.client import LLM, LLMError
from edgellm_ros.msg import FinishReason

try:
    from nav2_msgs.action import NavigateToPose
except ImportError:
    sys.exit("Nav2's nav2_msgs is not found; install it (sudo apt install ros-$ROS_DISTRO-nav2-msgs) and source ROS.")

# x and y in m, yaw in degrees.
PLACES = {"kitchen": (4.0, 1.5, 90.0), "office": (-2.0, 3.0, 180.0), "dock": (0.0, 0.0, 0.0)}
SYSTEM = (
    f"You plan the way of a robot. A goal is a place ({', '.join(PLACES)}) or a move from where the robot stands: "
    "ahead and left in m, turn in degrees, left is positive. Answer with the goals in their order and a sentence to "
    "say when the robot is there."
)
_MOVE = {name: {"type": "number", "minimum": -bound, "maximum": bound} for name, bound in
         (("ahead", 20), ("left", 20), ("turn", 180))}  # fmt: skip
_GOALS = [
    {"type": "object", "properties": {"place": {"enum": list(PLACES)}}, "required": ["place"]},
    {"type": "object", "properties": _MOVE, "required": list(_MOVE)},
]
PLAN = {
    "type": "object",
    "properties": {
        "goals": {"type": "array", "items": {"anyOf": [{**goal, "additionalProperties": False} for goal in _GOALS]},
                  "maxItems": 8},
        "say": {"type": "string", "maxLength": 200},
    },
    "required": ["goals", "say"],
    "additionalProperties": False,
}  # fmt: skip
MAX_PLANS = 3
LIMITS = {"temperature": 0.0, "max_new_tokens": 300, "deadline": 60.0}  # s


def pose_of(goal: dict) -> PoseStamped:
    """Return the pose of a goal of the plan, in the frame of the map or of the robot."""
    pose = PoseStamped()
    if "place" in goal:
        pose.header.frame_id = "map"
        x, y, yaw = PLACES[goal["place"]]
    else:
        pose.header.frame_id = "base_link"
        x, y, yaw = goal["ahead"], goal["left"], goal["turn"]
    pose.pose.position.x, pose.pose.position.y = float(x), float(y)
    half = math.radians(yaw) / 2.0
    pose.pose.orientation.z, pose.pose.orientation.w = math.sin(half), math.cos(half)
    return pose


class Navigator:
    """Drives to poses with Nav2. An executor spins ``node`` in another thread."""

    def __init__(self, node: Node, action: str = "navigate_to_pose") -> None:
        self._action = ActionClient(node, NavigateToPose, action)
        self._name = action
        self._clock = node.get_clock()

    def drive(self, pose: PoseStamped) -> str:
        """Drive to ``pose`` and return "", or why it was not reached. Raises RuntimeError if there is no Nav2."""
        if not self._action.wait_for_server(timeout_sec=5.0):
            raise RuntimeError(f"Nobody offers the action {self._name}; start Nav2.")
        pose.header.stamp = self._clock.now().to_msg()
        goal = _wait(self._action.send_goal_async(NavigateToPose.Goal(pose=pose)))
        if not goal.accepted:
            return "Nav2 rejected it"
        result = goal.get_result_async()
        try:
            status = _wait(result).status
        except KeyboardInterrupt:
            _wait(goal.cancel_goal_async())
            raise
        return "" if status == GoalStatus.STATUS_SUCCEEDED else f"Nav2 did not get there (status {status})"


def _wait(future: Future):
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait()
    return future.result()


def carry_out(llm: LLM, navigator: Navigator, command: str) -> str:
    """Plan and drive; return the sentence to say at the end. Raises RuntimeError if no plan leads to the end."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": command}]
    for _ in range(MAX_PLANS):
        answer = llm.ask(turns, json_schema=PLAN, compact_json=True, **LIMITS)
        if answer.finish_reason != FinishReason.STOP:  # late, cancelled or cut: not a whole plan
            raise RuntimeError(f"There is no whole plan (finish reason {answer.finish_reason}).")
        plan = json.loads(answer.text)  # cannot fail: the schema held while it was generated
        for goal in plan["goals"]:
            print(f"→ {goal}", flush=True)
            if problem := navigator.drive(pose_of(goal)):
                print(f"  {problem}", flush=True)
                turns.append({"role": "assistant", "content": answer.text})
                turns.append({"role": "user", "content": f"{json.dumps(goal)}: {problem}. Plan again from here."})
                break
        else:
            return plan["say"]
    raise RuntimeError(f"The robot did not get there with {MAX_PLANS} plans.")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="+", help="what the robot is to do")
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    parser.add_argument("--action", default="navigate_to_pose", help="of Nav2 (default: navigate_to_pose)")
    options = parser.parse_args(args)
    rclpy.init()
    node = Node("nav2_planner")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    threading.Thread(target=executor.spin, name="executor", daemon=True).start()
    try:
        with LLM(options.node) as llm:
            print(carry_out(llm, Navigator(node, options.action), " ".join(options.command)))
    except (LLMError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
