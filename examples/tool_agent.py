"""A tool agent: the model drives a small simulated robot by calling its tools. Run it beside a node that is active.

python3 examples/tool_agent.py bring the cup from the kitchen to the office

Each round sends the conversation, runs the call that comes back and adds what came of it, until the answer is text.
One call a round: the model sees what came of it before it asks for the next.
The model's chat template must have tools: edgellm inspect names the tool format.
"""

import json
import sys

from edgellm_ros.client import LLM, LLMError
from edgellm_ros.msg import FinishReason

SYSTEM = (
    "You control a robot at home with the functions. Do what the user asks for, one step after the other: drive to an "
    "object before you pick it up, and to the place where it belongs before you put it down. When all is done, answer "
    "in one sentence."
)
PLACES = ("kitchen", "office", "garden", "dock")
MAX_ROUNDS = 8  # small models may go on for ever
LIMITS = {"temperature": 0.0, "max_new_tokens": 96, "deadline": 60.0}  # s


def _tool(name: str, description: str, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = [
    _tool("drive_to", "Drive the robot to a place.", place={"type": "string", "enum": list(PLACES)}),
    _tool("pick_up", "Pick up an object where the robot is.", object={"type": "string", "description": "its name"}),
    _tool("put_down", "Put down the object that the robot holds."),
    _tool("say", "Say a sentence to the people around.", text={"type": "string", "maxLength": 200}),
]


class Robot:
    """A simulated robot with one gripper. Each tool is a method that returns what came of it, for the model to read."""

    def __init__(self) -> None:
        self.place = "dock"
        self.held = ""
        self.objects = {"cup": "kitchen", "book": "office", "ball": "garden"}  # what lies where

    def drive_to(self, place: str) -> str:
        self.place = place
        here = [name for name, where in self.objects.items() if where == place]
        return f"Arrived: {place}. Objects here: {', '.join(here) or 'none'}."

    def pick_up(self, object: str) -> str:
        if self.held:
            return f"Failed: the gripper holds the {self.held}; put it down first."
        if self.objects.get(object) != self.place:
            return f"Failed: no {object} here, the robot is at: {self.place}."
        del self.objects[object]
        self.held = object
        return f"Picked up: {object}."

    def put_down(self) -> str:
        if not self.held:
            return "Failed: the gripper is empty."
        self.objects[self.held] = self.place
        name, self.held = self.held, ""
        return f"Put down: {name}, at: {self.place}."

    def say(self, text: str) -> str:
        print(f"robot: {text}")
        return f"Said: {text}"


def run(llm: LLM, robot: Robot, command: str) -> str:
    """Have the model carry out ``command`` and return its answer. Raises RuntimeError if it comes to no end."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": command}]
    choice, last = "required", []  # a command takes a call at least
    for _ in range(MAX_ROUNDS):
        answer = llm.ask(turns, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, **LIMITS)
        calls = [(call.name, call.arguments) for call in answer.tool_calls]
        if calls and calls == last:  # as small models do that do not see that they are done
            choice = "none"
            continue
        choice, last = "auto", calls
        if answer.finish_reason == FinishReason.STOP:
            return answer.text
        if answer.finish_reason != FinishReason.TOOL_CALLS:  # late, cancelled or cut: the calls may not be all
            raise RuntimeError(f"There is no whole answer (finish reason {answer.finish_reason}).")
        turns.append({"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls})
        for call in answer.tool_calls:
            # Neither can fail: the name was held to those of the tools, and the arguments to their schema.
            outcome = getattr(robot, call.name)(**json.loads(call.arguments))
            print(f"{call.name} {call.arguments} → {outcome}")
            turns.append({"role": "tool", "content": outcome, "tool_call_id": call.id})
    raise RuntimeError(f"The model was not done after {MAX_ROUNDS} rounds.")


def main(command: str, node: str = "/llm") -> int:
    try:
        with LLM(node) as llm:
            print(run(llm, Robot(), command))
    except (LLMError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]) or "bring the cup from the kitchen to the office"))
