"""Two people talk to the robot at the same time, each in a session of their own. Run it beside a node that is active.

python3 examples/two_people.py

With max_batch 2 or more they are answered at the same time, else in turns.
"""

import asyncio
import sys

from edgellm_ros.client import LLM, LLMError

QUESTIONS = {
    "Anna": ["bring me the red cup from the kitchen", "and now the blue one"],
    "Ben": ["turn on the light in the hall", "thank you, turn it off again"],
}


async def talk(llm: LLM, name: str) -> None:
    for question in QUESTIONS[name]:
        # Only the question is sent: the node has what was said before.
        answer = await llm.generate(question, session=name, context_policy="drop_oldest", max_new_tokens=64)
        print(f"{name}: {question}\n  → {answer.text}")


async def talk_at_once(node: str) -> None:
    async with LLM(node) as llm:
        await asyncio.gather(*(talk(llm, name) for name in QUESTIONS))


def main(node: str = "/llm") -> int:
    try:
        asyncio.run(talk_at_once(node))
    except LLMError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
