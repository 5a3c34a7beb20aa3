"""Demands of requests on a model's answers: whether it can answer so, what it reads, and what constrains it."""

from __future__ import annotations

import numpy as np

from engine_core.errors import InvalidImageError, InvalidRequestError
from engine_core.models.vision import VisionSpec
from engine_core.request import ChatMessage, GenerationRequest
from engine_core.serving.constraint import AnswerConstraint, ConstraintFactory, Demand
from engine_core.serving.tools import checked_tool
from engine_core.text.answer import ExpectedAnswer
from engine_core.text.call_formats import Arguments
from engine_core.text.tokenizer import Prompt, Reasoning, Tokenizer, common_prefix_length
from engine_core.vision.prompt import PlacedImage, placed, shown_text
from engine_core.vision.video import Shown, gather_videos


class Answers:
    """The answers of one model. Thread-safe.

    ``kept_ids``: int [n], the full-vocabulary ids that can be sampled, or None when all can. ``vision``: the encoder of
    a model that sees, within the limits of the engine.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        constraints: ConstraintFactory,
        kept_ids: np.ndarray | None,
        vision: VisionSpec | None = None,
    ) -> None:
        self._vision = vision
        self._tokenizer = tokenizer
        self._constraints = constraints
        self._kept_ids = None if kept_ids is None else frozenset(kept_ids.tolist())
        self.format = tokenizer.answer_format

    def check(self, request: GenerationRequest) -> None:
        """Check what a request demands, but for its messages and its JSON schema.

        Raises InvalidRequestError if the model cannot answer so, InvalidSchemaError for the parameters of a tool.
        """
        form = self.format
        if request.tools and form.calls is None:
            reason = "writes calls in a way that is not known here" if form.has_tools else "has no tools"
            raise InvalidRequestError(f"The chat template of this model {reason}; send the request without tools.")
        kept = self._kept_ids
        missing = [] if kept is None else [text for text, index in form.token_ids.items() if index not in kept]
        if request.tools and missing:
            raise InvalidRequestError(
                f"The reduced vocabulary of this engine lacks the token {missing[0]!r}, which calls of tools need; "
                "edgellm reduce-vocab keeps it."
            )
        for tool in request.tools:
            checked_tool(tool)
        if request.tools and request.is_json and form.calls is not None and form.calls.may_be_bare:
            raise InvalidRequestError(
                "Calls of this model are JSON without a marker, which a JSON schema's value cannot be told from; send "
                "the request without one of them."
            )
        if request.thinking_budget and not form.thinks:
            raise InvalidRequestError("This model does not reason before it answers; leave the thinking budget out.")

    def prompt(self, request: GenerationRequest) -> Prompt:
        """Return what the model reads of a request that ``check`` has passed. Raises InvalidRequestError."""
        messages, shown = self._shown(request)
        texts = self._image_texts(shown)
        if not request.messages:
            return Prompt(self._tokenizer.encode(self._tokenizer.with_images(request.prompt, texts)))
        return self._tokenizer.prompt(
            messages,
            tools=request.tools,
            variables=request.parse_template_variables(),
            thinking=request.thinking,
            allow_special=request.allow_special,
            image_texts=texts,
            videos=[index for index, each in enumerate(shown) if each.is_video],
        )

    def _shown(self, request: GenerationRequest) -> tuple[tuple[ChatMessage, ...], list[Shown]]:
        """Return the messages of a request with one place for each image and each video, and what stands there.

        A raw prompt has images alone.
        """
        if self._vision is None or not request.images:
            return request.messages, []
        if not request.messages:
            return (), [Shown((image,)) for image in request.images]
        return gather_videos(request.messages, request.images, self._vision)

    def _image_texts(self, shown: list[Shown]) -> list[str]:
        """Return what stands for each image. Raises InvalidImageError for a shape that the model does not take."""
        if not shown:
            return []
        assert self._vision is not None
        placeholders = self._tokenizer.image_token, self._tokenizer.token_text(self._vision.frame_token_id)
        try:
            return [shown_text(self._vision, placeholders, each) for each in shown]
        except ValueError as error:
            raise InvalidImageError(f"{error}") from None

    def placed_images(self, request: GenerationRequest, prompt: Prompt) -> tuple[PlacedImage, ...]:
        """Return the images of a request with their places in its prompt. Raises InvalidImageError."""
        if self._vision is None:
            return ()
        found = placed(prompt.token_ids, self._shown(request)[1], self._vision)
        if found is None:
            raise InvalidImageError(
                f"The prompt spells {self._tokenizer.image_token!r}, the token of images, outside of its "
                f"{len(request.images)} images; leave it out."
            )
        return found

    def shared_prefix(self, request: GenerationRequest, prompt: Prompt) -> np.ndarray:
        """Return the part of a prompt, int32 [m], that other conversations with its system message and tools share."""
        first = request.messages[0] if request.messages else None
        system = first.content if first is not None and first.role == "system" else ""
        if not system and not request.tools:
            return np.empty(0, dtype=np.int32)
        prefix = self._tokenizer.system_prefix(system, request.tools, request.template_variables, request.thinking)
        return prefix[: common_prefix_length(prefix, prompt.token_ids)]

    def expected(self, request: GenerationRequest, prompt: Prompt) -> ExpectedAnswer:
        """Return what the answer may have."""
        if not request.messages:
            return ExpectedAnswer()
        calls = self.format.calls
        strings: dict[str, frozenset[str]] = {}
        unmarked: tuple[str, ...] = ()
        may_call = calls is not None and bool(request.tools) and request.tool_choice != "none"
        if calls is not None and may_call:
            if calls.arguments is Arguments.XML:
                strings = {tool.name: checked_tool(tool).strings for tool in request.tools}
            if calls.may_be_unmarked and request.tool_choice == "auto" and not request.is_json:
                unmarked = tuple(tool.name for tool in request.tools)
        return ExpectedAnswer(
            self.format,
            begins_reasoning=prompt.reasoning is Reasoning.BEGUN,
            may_call=may_call,
            is_value=request.is_json,
            unmarked=unmarked,
            strings=strings,
        )

    def constraint(
        self, request: GenerationRequest, prompt: Prompt, expected: ExpectedAnswer, timeout: float | None
    ) -> AnswerConstraint | None:
        """Return what holds the answer to what is demanded; None if it may be anything. ``timeout``: s, None = none.

        Raises InvalidSchemaError, DeadlinePassedError or QueueFullError.
        """
        budget = request.thinking_budget if prompt.reasoning is not Reasoning.NEVER else 0
        if not (request.has_form or request.tools or budget):
            return None
        is_value_alone = not request.tools and prompt.reasoning is Reasoning.NEVER
        demand = Demand.of(request, prompt.reasoning)
        return self._constraints.compile(demand, timeout, None if is_value_alone else expected, budget)
