"""Two models and a router: a fast one answers what it can, a big one the rest.

ros2 launch edgellm_ros llm.launch.py name:=fast engine_dir:=…    # in a terminal of its own
ros2 launch edgellm_ros llm.launch.py name:=big engine_dir:=…     # in another one
python3 examples/two_models.py plan a party for ten people

The fast model chooses who answers: its answer is held to one of two words, which takes it a token or two. Where the
big one is missing, inactive or full, the fast one answers.
"""

import argparse
import sys

from edgellm_ros.client import LLM, LLMError, NotActiveError, QueueFullError, UnavailableError
from edgellm_ros.msg import FinishReason

ROUTE = (
    "A small and a large language model serve a robot. Which one should answer? Say small for greetings, commands and "
    "simple facts, large for plans, explanations and arithmetic. Question: "
)


def route(fast: LLM, question: str) -> str:
    """Return who is to answer, "small" or "large"."""
    answer = fast.ask(ROUTE + question, choices=["small", "large"], temperature=0.0, max_new_tokens=16, priority=200)
    return answer.text if answer.finish_reason == FinishReason.STOP else "small"


def answer(fast: LLM, big: LLM, question: str) -> tuple[str, str]:
    """Return who has answered, and the answer. Raises LLMError."""
    who = route(fast, question)
    if who == "large":
        try:
            return who, big.ask(question, deadline=60.0).text
        except (UnavailableError, NotActiveError, QueueFullError) as error:
            print(f"{error} The small model answers.", file=sys.stderr)
    return "small", fast.ask(question, deadline=60.0).text


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="+")
    parser.add_argument("--fast", default="/fast", help="full name of the fast model's node (default: /fast)")
    parser.add_argument("--big", default="/big", help="full name of the big model's node (default: /big)")
    options = parser.parse_args(args)
    try:
        with LLM(options.fast) as fast, LLM(options.big, wait=1.0) as big:
            who, text = answer(fast, big, " ".join(options.question))
    except LLMError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"[{who}] {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
