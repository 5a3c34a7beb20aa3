"""A planner: turns a command into the steps of a plan. Run it beside a node that is active.

python3 examples/planner_node.py bring me the red cup from the kitchen
"""

import json
import sys
from pathlib import Path

from ament_index_python.packages import get_package_share_directory

from edgellm_ros.client import LLM, LLMError
from edgellm_ros.msg import FinishReason

SCHEMA = Path(get_package_share_directory("edgellm_ros")) / "models" / "demo" / "plan.schema.json"


def plan(llm: LLM, command: str) -> list[dict]:
    """Return the steps to do. Raises RuntimeError with a sentence for the user if there are none."""
    pieces = llm.pieces(command, json_schema=SCHEMA.read_text(), temperature=0.0, deadline=10.0)  # s
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    answer = pieces.result
    if answer.finish_reason != FinishReason.STOP:  # late, cancelled or cut: not a whole plan
        raise RuntimeError(f"There is no whole plan (finish reason {answer.finish_reason}).")
    value = json.loads(answer.text)  # cannot fail: the schema held while it was generated
    if "plan" not in value:
        raise RuntimeError(value.get("refuse") or value.get("ask"))
    return value["plan"]


def main() -> int:
    try:
        with LLM("/llm") as llm:
            for number, step in enumerate(plan(llm, " ".join(sys.argv[1:])), start=1):
                print(number, step.pop("do"), *(f"{key}={value}" for key, value in step.items()))
    except (LLMError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
