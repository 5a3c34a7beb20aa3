"""A LangChain agent on the robot's own model. It needs langchain-openai and the node's HTTP port, but no ROS itself.

ros2 launch edgellm_ros llm.launch.py http_port:=8000 engine_dir:=…    # of a model whose chat template has tools
python3 examples/langchain_agent.py is there coffee in the kitchen

The loop is written out: any agent of LangChain or LangGraph takes the same ChatOpenAI.
"""

import argparse
import sys
from typing import Literal

try:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from openai import OpenAIError
except ImportError:
    sys.exit(f"LangChain is not installed; install it with: {sys.executable} -m pip install langchain-openai.")

SYSTEM = "You control a robot at home. Use the tools to find out and to act, then answer in one sentence."
MAX_ROUNDS = 8  # small models may go on for ever
THINGS = {"kitchen": "a coffee pot and a red cup", "office": "a book", "garden": "a ball"}


@tool
def look(place: Literal["kitchen", "office", "garden"]) -> str:
    """Drive to a place and return what the camera sees there."""
    return f"In the {place} there is {THINGS[place]}."


@tool
def battery() -> str:
    """Return the charge of the battery."""
    return "The battery is at 74 %."


TOOLS = {each.name: each for each in (look, battery)}


def run(model: ChatOpenAI, question: str) -> str:
    """Return the agent's answer. Raises OpenAIError, and RuntimeError if the model comes to no end."""
    agent = model.bind_tools(list(TOOLS.values()))
    turns = [SystemMessage(SYSTEM), HumanMessage(question)]
    for _ in range(MAX_ROUNDS):
        answer = agent.invoke(turns)
        turns.append(answer)
        if not answer.tool_calls:
            return answer.text if isinstance(answer.text, str) else answer.text()
        for call in answer.tool_calls:
            result = TOOLS[call["name"]].invoke(call)
            print(f"{call['name']} {call['args']} → {result.content}", flush=True)
            turns.append(result)
    raise RuntimeError(f"The model was not done after {MAX_ROUNDS} rounds.")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="+")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the endpoint")
    options = parser.parse_args(args)
    try:
        model = ChatOpenAI(base_url=options.url, api_key="none", model="", temperature=0.0, max_tokens=200, timeout=60)
        print(run(model, " ".join(options.question)))
    except (OpenAIError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
