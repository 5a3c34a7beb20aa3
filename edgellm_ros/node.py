"""The lifecycle node: transitions and wiring. The executable ``llm_node`` is ``main``."""

from __future__ import annotations

import threading
import traceback

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node

from edgellm_ros import latency, qos
from edgellm_ros.bond import make_bond
from edgellm_ros.conversions import error_message
from edgellm_ros.diagnostics import Diagnostics, Health
from edgellm_ros.endpoints import GenerateActionServer, GenerateService, PromptTopic
from edgellm_ros.frames import FrameTopics
from edgellm_ros.http_endpoint import HttpEndpoint
from edgellm_ros.intake import RosIntake
from edgellm_ros.message_schema import MessageSchemaService
from edgellm_ros.msg import EngineStatus
from edgellm_ros.parameters import (
    check_declared,
    check_parameters,
    declare_parameters,
    read_engine_config,
    read_settings,
)
from edgellm_ros.process import run_node
from edgellm_ros.reports import fill_info, make_health, make_status
from edgellm_ros.session_service import SessionService
from edgellm_ros.srv import GetInfo
from edgellm_ros.state import NodeState
from edgellm_ros.streams import Topics
from edgellm_ros.threads import Soon
from edgellm_ros.transitions import Transitions
from engine_core.errors import ConfigurationError, EdgeLLMError, EngineFaultError
from engine_core.serving.engine import Engine
from engine_core.serving.worker import Worker

SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)
_STATUS_DELAY = 0.02  # s from a change to ~/status
_PROGRESS_STEP = 0.01  # of configure, which ~/status tells


class LlmNode(LifecycleNodeMixin, Node):
    """``unconfigured`` → configure loads the engine → ``inactive`` → activate takes requests → ``active``.

    The executor's thread answers everything and waits for a first token at most (``intake``), one runs transitions, the
    worker's alone touches the engine; two more are for long texts and for ~/status. LifecycleNode itself would put its
    services into a group in which a transition that runs keeps get_state from being answered; hence the mixin with a
    group of our own.
    """

    def __init__(self, node_name: str = "llm", **options) -> None:
        """Raises rclpy's parameter exceptions or ConfigurationError for a value the node cannot be started with."""
        Node.__init__(self, node_name, **options)
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        declare_parameters(self)
        if problem := check_declared(self):
            raise ConfigurationError(problem)
        self._state = NodeState(read_settings(self))
        self._topics = Topics(self)
        self._parameters_changed = False
        self._frames = FrameTopics(self)
        self._intake = RosIntake(
            self, self._topics, self._frames, self._state, before_request=self._take_over_parameters
        )
        self._http = HttpEndpoint(self._intake.requests, self.get_logger)
        self._transitions = Transitions(self, after=self._publish_status)
        self._transitions.take_over(self._hand_over_to_manager)
        self._is_managed = False  # somebody else makes the transitions: autostart holds back
        self._bond = make_bond(self, self.get_parameter("bond").value)
        self._status = self.create_publisher(EngineStatus, "~/status", qos.LATCHED, event_callbacks=qos.NO_EVENTS)
        self._status_lock = threading.Lock()
        # A transition is in ~/status before it is answered. What a request changes is said when its first token is
        # out, and not by the executor, which has the request to take.
        self._status_report = Soon("edgellm-status", self._publish_status, _STATUS_DELAY)
        self._parameters_set = self.create_guard_condition(self._take_over_parameters)
        self.create_service(
            GetInfo, "~/get_info",
            lambda _, response: fill_info(response, self._state.engine, self._frames.topics),
            callback_group=ReentrantCallbackGroup(),
        )  # fmt: skip
        self._service = GenerateService(self, self._intake)
        self._action = GenerateActionServer(self, self._intake)
        self._prompt = PromptTopic(self, self._intake)
        self._message_schemas = MessageSchemaService(self, self._intake.requests.pool)
        self._sessions = SessionService(self, self._state, self.get_parameter("sessions_dir").value)
        self._diagnostics = Diagnostics(self, self._health)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._publish_status()
        if self.get_parameter("autostart").value:
            steady = Clock(clock_type=ClockType.STEADY_TIME)
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=steady)

    # --- transitions: in their own thread -----------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """FAILURE leads back to unconfigured, with nothing left allocated and the reason in ~/status."""
        self._state.error, self._state.is_configuring = None, True
        try:
            config = read_engine_config(self)
            self._state.engine = Engine.open(config, report=self.get_logger().info, progress=self._on_progress)
        except Exception as error:
            self._fail("configure", error)
            return FAILURE
        finally:
            self._state.is_configuring, self._state.load_progress = False, 0.0
        latency.freeze()
        return super().on_configure(state)

    def _on_progress(self, share: float) -> None:
        if share - self._state.load_progress >= _PROGRESS_STEP or not self._state.load_progress:
            self._state.load_progress = share
            self._refresh()

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        settings = read_settings(self)
        self._topics.reset_totals()
        engine = self._state.engine
        assert engine is not None  # it is inactive: configured
        worker = Worker(
            engine, queue_depth=settings.queue_depth, busy_policy=settings.busy_policy,
            on_change=self._refresh, on_fault=self._on_fault,
        )  # fmt: skip
        worker.warm_system_prompt(settings.system_prompt)
        if engine.images is not None:
            self._frames.open(
                settings.image_topics, settings.image_frames, settings.image_frame_interval,
                engine.config.image_frames_memory << 20,
            )  # fmt: skip
        elif settings.image_topics:
            self.get_logger().warning(f"image_topics has no effect: {engine.manifest.model_name} takes no images.")
        result = super().on_activate(state)
        self._state.worker = worker
        self._http.open(settings)
        self._bond.start()
        self.get_logger().info(
            f"Ready: {engine.manifest.model_name} on {engine.backend_name}, loaded in {engine.load_time:.1f} s."
        )
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """ERROR, and with it error processing, if the engine has failed or hangs."""
        settings = self._state.settings
        finish = settings.deactivate_policy == "finish"
        stopped = self._stop_worker(drain=finish, timeout=settings.deactivate_timeout)
        result = super().on_deactivate(state)
        return result if stopped and self._state.error is None else ERROR

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._close_engine()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_worker()
        self._close_engine()
        result = super().on_shutdown(state)
        self._state.is_finalized = True
        return result

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """SUCCESS leads to unconfigured, from where configure brings the node back; an exception to finalized."""
        try:
            self._stop_worker()
            self._close_engine()
            return super().on_error(state)
        except BaseException:
            self._state.is_finalized = True
            raise

    def _stop_worker(self, *, drain: bool = False, timeout: float = 2.0) -> bool:
        """Answers every request. False if the engine hangs in a step; it is then left to its thread."""
        self._bond.stop()
        worker, self._state.worker = self._state.worker, None
        # One second of the worker's limit is for cancelling what has not finished by then.
        is_stopped = worker is None or worker.close(drain=drain, timeout=timeout + 1.0)
        self._intake.requests.cancel("")  # those that the worker has not seen yet
        self._http.close()  # with every answer handed to it
        self._frames.close()
        if is_stopped:
            return True
        self._state.engine = None
        self._state.error = EngineFaultError("The engine hangs in a step; start the node again.")
        self.get_logger().error(str(self._state.error))
        return False

    def _close_engine(self) -> None:
        engine, self._state.engine = self._state.engine, None
        if engine is not None:
            engine.close()
        latency.unfreeze()

    def _on_fault(self, error: Exception) -> None:
        """Called by the worker, with every request answered: takes the node to unconfigured."""
        self._fail("the engine", error)
        self._transitions.run("Error processing", lambda: self._process_fault(error))

    def _process_fault(self, error: Exception) -> None:
        """An active node reaches error processing through a deactivate that ends in ERROR."""
        if self._state.error is error and self._state.worker is not None:
            self.trigger_deactivate()

    def _fail(self, what: str, error: Exception) -> None:
        self._state.error = error
        self.get_logger().error(f"{what} failed: {error_message(error)}")
        if not isinstance(error, EdgeLLMError):
            self.get_logger().error("".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def _autostart(self) -> None:
        """Configures and activates; a failure leaves the node unconfigured, to be configured by hand."""
        self.destroy_timer(self._autostart_timer)

        def start() -> None:
            if not self._is_managed and self.trigger_configure() == SUCCESS and not self._is_managed:
                self.trigger_activate()

        self._transitions.run("Autostart", start)

    def _hand_over_to_manager(self, request: ChangeState.Request) -> bool | None:
        """Give the first configure of a lifecycle manager what it expects of a node that has started by itself.

        nav2_lifecycle_manager demands that configure succeeds and leaves the node inactive, before it activates it.
        """
        was_managed, self._is_managed = self._is_managed, True
        asked = request.transition
        is_configure = asked.id == Transition.TRANSITION_CONFIGURE or asked.label == "configure"
        if is_configure:
            self._bond.on_managed()
        if was_managed or not is_configure or not self.get_parameter("autostart").value:
            return None
        if self._state.lifecycle == EngineStatus.ACTIVE:
            return self.trigger_deactivate() == SUCCESS
        return True if self._state.lifecycle == EngineStatus.INACTIVE else None

    # --- the executor's thread ------------------------------------------------------------------------

    def _on_set_parameters(self, parameters) -> SetParametersResult:
        result = check_parameters(
            parameters,
            configured=self._state.is_configured,
            current=lambda name: self.get_parameter(name).value,
        )
        if result.successful:
            self._parameters_changed = True
            self._parameters_set.trigger()  # read after they have been set: Humble has no callback for that
        return result

    def _take_over_parameters(self) -> None:
        """Soon after they have been set, or when a request comes before that."""
        if not self._parameters_changed:
            return
        self._parameters_changed = False
        before, settings = self._state.settings, read_settings(self)
        self._state.settings = settings
        if (worker := self._state.worker) is not None and settings != before:
            worker.update(queue_depth=settings.queue_depth, busy_policy=settings.busy_policy)
            if settings.system_prompt != before.system_prompt:
                worker.warm_system_prompt(settings.system_prompt)

    def _health(self) -> Health:
        return make_health(self._state, self._topics, self._intake.requests.num_refused, self._http)

    # --- any thread -----------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Has ~/status say how the node is, soon."""
        self._status_report.ask()

    def _publish_status(self) -> None:
        try:
            with self._status_lock:  # the last message is the newest
                status = make_status(self._state)
                status.header.stamp = self.get_clock().now().to_msg()
                self._status.publish(status)
        except Exception as error:
            if self.context.ok():  # else somebody else has ended it, and nobody can be told
                self.get_logger().error(f"~/status could not be published: {error_message(error)}")

    # --- the end --------------------------------------------------------------------------------------

    def stop(self, timeout: float = 3.0) -> bool:
        """Shuts the node down: running and waiting requests are answered as cancelled, the engine is closed.

        The executor has to go on spinning for the answers to leave. From another thread. False: something hangs.
        """
        self._transitions.run("Shutdown", lambda: None if self._state.is_finalized else self.trigger_shutdown())
        return self._transitions.close(timeout)

    @property
    def worker(self) -> Worker | None:
        """Return the worker that serves the requests while the node is active."""
        return self._state.worker

    @property
    def num_open_requests(self) -> int:
        return self._intake.num_open

    def destroy_node(self) -> None:
        self._intake.close()
        self._sessions.close()
        self._status_report.close()
        self._action.destroy()
        super().destroy_node()


def main(args: list[str] | None = None) -> None:
    raise SystemExit(run_node(LlmNode, args))


if __name__ == "__main__":
    main()
