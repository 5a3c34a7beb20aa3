"""The services, the action and the prompt topic: small callbacks on the executor's thread, none of them waiting."""

from __future__ import annotations

from array import array
from functools import partial

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from std_msgs.msg import String

from edgellm_ros import qos
from edgellm_ros.action import Generate as GenerateAction
from edgellm_ros.conversions import error_code, error_message, to_result, to_tool_calls, wire_text
from edgellm_ros.intake import Answer, RosIntake
from edgellm_ros.msg import ChatMessage, GenerationRequest
from edgellm_ros.srv import Cancel, Generate, Tokenize
from edgellm_ros.streams import ENDED_BY_ITSELF
from edgellm_ros.threads import Started
from engine_core.request import Piece
from engine_core.serving.intake import OpenRequest

# Seconds a finished goal's result is kept for a client that has not asked for it yet. rclpy's default of 15 minutes
# would let clients pile up memory; and each change of a goal's state publishes the states of all that are kept.
RESULT_TIMEOUT = 10


class GenerateService:
    """~/generate: answered when the whole text is there; any number of clients may wait."""

    def __init__(self, node: Node, intake: RosIntake) -> None:
        self._intake = intake
        group = ReentrantCallbackGroup()
        options = {"qos_profile": qos.SERVICE, "callback_group": group}
        node.create_service(Generate, "~/generate", self._generate, **options)
        node.create_service(Tokenize, "~/tokenize", self._tokenize, **options)
        node.create_service(Cancel, "~/cancel", self._cancel, **options)

    async def _generate(self, request: Generate.Request, response: Generate.Response) -> Generate.Response:
        response.result = to_result(*await self._intake.answer(request.request))
        return response

    def _cancel(self, request: Cancel.Request, response: Cancel.Response) -> Cancel.Response:
        response.num_cancelled = self._intake.requests.cancel(request.request_id)
        return response

    async def _tokenize(self, request: Tokenize.Request, response: Tokenize.Response) -> Tokenize.Response:
        try:
            ids, texts = await self._intake.tokenize(request.text, request.messages)
            response.token_ids, response.tokens = array("i", ids), [wire_text(text) for text in texts]
        except Exception as error:
            response.error_code, response.error_message = error_code(error), error_message(error)
        return response


class GenerateActionServer:
    """~/generate: feedback per piece. While the node is not active goals are rejected; what else cannot be accepted is
    aborted with its error code, because a rejection carries no reason.

    The work on a goal begins with its acceptance: rclpy would call ``_execute`` only after another round of the
    executor, the better part of a millisecond later.
    """

    def __init__(self, node: Node, intake: RosIntake) -> None:
        self._intake = intake
        self._open: dict[bytes, OpenRequest] = {}
        self._answers: dict[bytes, Started] = {}  # of goals accepted and not executed yet
        self._server = ActionServer(
            node,
            GenerateAction,
            "~/generate",
            self._execute,
            callback_group=ReentrantCallbackGroup(),
            handle_accepted_callback=self._begin,
            goal_callback=self._on_goal,
            cancel_callback=self._cancel,
            goal_service_qos_profile=qos.SERVICE,
            result_service_qos_profile=qos.SERVICE,
            cancel_service_qos_profile=qos.SERVICE,
            feedback_pub_qos_profile=qos.FEEDBACK,
            result_timeout=RESULT_TIMEOUT,
        )

    def destroy(self) -> None:
        self._server.destroy()

    def _on_goal(self, goal: GenerateAction.Goal) -> GoalResponse:
        return GoalResponse.REJECT if self._intake.refuses_goal(goal.request) else GoalResponse.ACCEPT

    def _begin(self, goal: ServerGoalHandle) -> None:
        self._answers[bytes(goal.goal_id.uuid)] = Started(self._answer(goal))
        goal.execute()

    async def _execute(self, goal: ServerGoalHandle) -> GenerateAction.Result:
        goal_id = bytes(goal.goal_id.uuid)
        try:
            answer = await self._answers.pop(goal_id)
        finally:
            self._open.pop(goal_id, None)
        if answer.result.finish_reason in ENDED_BY_ITSELF:
            goal.succeed()
        elif goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        return GenerateAction.Result(result=to_result(*answer))

    async def _answer(self, goal: ServerGoalHandle) -> Answer:
        feedback = GenerateAction.Feedback()

        def on_piece(piece: Piece) -> None:
            feedback.sequence = piece.sequence
            feedback.text = wire_text(piece.text)
            feedback.token_ids = array("i", piece.token_ids)
            feedback.reasoning = wire_text(piece.reasoning)
            feedback.tool_calls = to_tool_calls(piece.tool_calls)
            goal.publish_feedback(feedback)

        return await self._intake.answer(goal.request.request, on_taken=partial(self._taken, goal), on_piece=on_piece)

    def _taken(self, goal: ServerGoalHandle, opened: OpenRequest) -> None:
        self._open[bytes(goal.goal_id.uuid)] = opened

    def _cancel(self, goal: ServerGoalHandle) -> CancelResponse:
        if (opened := self._open.get(bytes(goal.goal_id.uuid))) is not None:
            opened.cancel()
        return CancelResponse.ACCEPT


class PromptTopic:
    """~/prompt → ~/response, for the command line: a user's message in, the whole text (or the error) out."""

    def __init__(self, node: Node, intake: RosIntake) -> None:
        self._intake = intake
        self._responses = node.create_publisher(String, "~/response", qos.COMMAND, event_callbacks=qos.NO_EVENTS)
        node.create_subscription(String, "~/prompt", self._prompt, qos.COMMAND, callback_group=ReentrantCallbackGroup())

    async def _prompt(self, prompt: String) -> None:
        message = GenerationRequest(messages=[ChatMessage(role="user", content=prompt.data)])
        result = (await self._intake.answer(message)).result
        text = wire_text(result.text) if result.error is None else f"Error: {error_message(result.error)}"
        self._responses.publish(String(data=text))
