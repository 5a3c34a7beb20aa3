"""Ask what happened before a camera in the last seconds. Run it beside a node that is active with a model that sees.

python3 examples/what_happens.py camera/image_raw What does the person do?

The node keeps the frames: it is started with image_topics, and with image_frames and image_frame_interval for as many
and as long ago as a request asks for (docs/vision.md). Here four frames over three seconds are shown.
"""

import argparse
import sys

from edgellm_ros.client import LLM, LLMError

FRAMES, SPAN = 4, 3.0  # s


def what_happens(llm: LLM, topic: str, question: str, frames: int = FRAMES, span: float = SPAN) -> None:
    """Print the answer, and how long before the newest frame each of the others was taken. Raises LLMError."""
    result = llm.ask(question, image_topics=[topic], frames_per_topic=frames, frames_span=span, max_new_tokens=64)
    times = [header.stamp.sec + header.stamp.nanosec / 1e9 for header in result.image_headers]
    print("Seen:", ", ".join(f"{time - times[-1]:.1f} s" for time in times))
    print(result.text)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("topic", help="as image_topics of the node has it")
    parser.add_argument("question", nargs="+")
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    options = parser.parse_args(args)
    try:
        with LLM(options.node) as llm:
            what_happens(llm, options.topic, " ".join(options.question))
    except LLMError as error:  # there may be too few frames yet, or the camera has stopped
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
