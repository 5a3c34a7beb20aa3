"""Conversations about pictures, which tests of several backends ask."""

from __future__ import annotations

from engine_core.config import EngineConfig
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine
from engine_core.serving.sequence import Sequence
from vision_checkpoints import picture

TALL, WIDE, SMALL, HUGE = picture(160, 90, 1), picture(60, 170, 2), picture(20, 20, 3), picture(500, 400, 4)
USER, ANSWER = "user", ChatMessage("assistant", "Two cubes.")
CONVERSATIONS = {
    "one": ([ChatMessage(USER, "What is this?", images=(0,))], [SMALL]),
    "tiles": ([ChatMessage(USER, "What is this?", images=(0,))], [TALL]),
    "behind": ([ChatMessage(USER, "Look: ", images=(6,))], [HUGE]),
    "two": ([ChatMessage(USER, "A and B. Which?", images=(1, 7))], [WIDE, SMALL]),
    "together": ([ChatMessage(USER, "Compare.", images=(0, 0))], [SMALL, TALL]),
    "turns": (
        [ChatMessage(USER, "And this?", images=(0,)), ANSWER, ChatMessage(USER, "Now?", images=(0,))],
        [SMALL, picture(25, 70, 5)],
    ),
    "text": ([ChatMessage(USER, "Hello.")], []),
}


def request_of(messages, images, count=1, **changes) -> GenerationRequest:
    sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
    return GenerationRequest("1", messages=tuple(messages), images=tuple(images), sampling=sampling, **changes)


def open_engine(directory, **config) -> Engine:
    return Engine.open(EngineConfig(directory, **config), report=lambda line: None)


def add(engine: Engine, request: GenerationRequest) -> tuple[Sequence, list]:
    """Hand a request to the scheduler; return its sequence, and a list that its result is added to."""
    results: list = []
    sequence = Sequence(engine.prepare(request), engine.tokenizer, on_piece=None, on_done=results.append)
    engine.scheduler.add(sequence)
    return sequence, results
