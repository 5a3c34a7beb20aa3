"""OpenAI's own client on the robot's own model: a stream, a choice, and JSON. It needs openai, but no ROS itself.

ros2 launch edgellm_ros llm.launch.py http_port:=8000    # or: edgellm serve ENGINE_DIR
python3 examples/openai_client.py bring me the red cup

The demo model has learned neither skills nor points: its last two answers have the right form and no meaning.
"""

import argparse
import json
import sys

try:
    from openai import OpenAI, OpenAIError
except ImportError:
    sys.exit(f"OpenAI's client is not installed; install it with: {sys.executable} -m pip install openai.")

POSE = {
    "type": "object",
    "properties": {axis: {"type": "number", "minimum": -10, "maximum": 10} for axis in "xy"},  # m
    "required": ["x", "y"],
    "additionalProperties": False,
}


class Robot:
    """Asks one model. Each method raises OpenAIError."""

    def __init__(self, client: OpenAI) -> None:
        self._client = client
        self._model = client.models.list().data[0].id

    def _ask(self, text: str, **options):
        messages = [{"role": "user", "content": text}]
        return self._client.chat.completions.create(model=self._model, messages=messages, max_tokens=200, **options)

    def answer(self, text: str) -> str:
        """Print an answer as it comes, and return it."""
        parts = []
        for chunk in self._ask(text, stream=True):
            parts.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
            print(parts[-1], end="", flush=True)
        print()
        return "".join(parts)

    def choose(self, text: str, choices: list[str]) -> str:
        """Return one of ``choices``."""
        answer = self._ask(text, temperature=0.0, extra_body={"structured_outputs": {"choice": choices}})
        return answer.choices[0].message.content

    def point(self, text: str) -> tuple[float, float]:
        """Return x and y, in m."""
        schema = {"type": "json_schema", "json_schema": {"name": "point", "schema": POSE}}
        answer = self._ask(text, temperature=0.0, response_format=schema, extra_body={"compact_json": True})
        value = json.loads(answer.choices[0].message.content)
        return value["x"], value["y"]


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="+")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the endpoint")
    options = parser.parse_args(args)
    command = " ".join(options.command)
    try:
        with OpenAI(base_url=options.url, api_key="none", timeout=60) as client:
            robot = Robot(client)
            robot.answer(command)
            print("skill:", robot.choose(f"Command: {command}. Which skill does it need?", ["drive", "grasp", "speak"]))
            print("point:", *robot.point("The cup is 2 m ahead (x) and 1 m to the left (y). Where is it?"))
    except (OpenAIError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
