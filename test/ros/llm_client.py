"""The node as a process, and everything a client can ask of it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import rclpy
from action_msgs.msg import GoalStatus
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, GetParameters, SetParameters
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from edgellm_ros.action import Generate as GenerateAction
from edgellm_ros.msg import ChatMessage, EngineStatus, GenerationRequest, GenerationResult, SamplingOptions, TokenPiece
from edgellm_ros.srv import Generate, GetInfo, Tokenize

HERE = Path(__file__).parent
LIMIT = 60.0  # s; nothing here may take longer, however busy the machine is
CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE = (
    Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_CLEANUP,
    Transition.TRANSITION_ACTIVATE, Transition.TRANSITION_DEACTIVATE,
)  # fmt: skip
UNCONFIGURED, INACTIVE, ACTIVE = (
    State.PRIMARY_STATE_UNCONFIGURED, State.PRIMARY_STATE_INACTIVE, State.PRIMARY_STATE_ACTIVE
)  # fmt: skip
STREAM = QoSProfile(depth=4096, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_numbers = itertools.count()
GREEDY_LONG = 1000  # tokens


def options(**values) -> SamplingOptions:
    """``max_new_tokens=5`` for ``[5]``, which is how an option is set; lists and flags as they are."""
    message = SamplingOptions()
    for name, value in values.items():
        plain = isinstance(value, (list, bool))
        setattr(message, name, value if plain else [value])
    return message


def make_request(text="hello", **fields) -> GenerationRequest:
    """A request that says ``text`` unless ``messages`` or ``prompt`` is given."""
    if "prompt" not in fields and "messages" not in fields:
        fields["messages"] = [ChatMessage(role="user", content=text)]
    sampling = fields.pop("sampling", None) or {"max_new_tokens": 8}
    return GenerationRequest(sampling=options(**sampling), **fields)


class NodeProcess:
    """One llm_node, in a process of its own, under a name of its own."""

    def __init__(
        self, name: str, log: Path, script: str = "fake_llm_node.py", params_file: Path | None = None, **parameters
    ) -> None:
        arguments = ["--ros-args", "-r", f"__node:={name}"]
        if params_file is not None:
            arguments += ["--params-file", str(params_file)]
        for key, value in parameters.items():
            arguments += ["-p", f"{key}:={str(value).lower() if isinstance(value, bool) else value}"]
        self.log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def stop(self, signum: int = signal.SIGINT, limit: float = 20.0) -> int:
        """The exit code after ``signum``."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(limit)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def resident(self) -> int:
        """Bytes."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Goal:
    """An action goal on its way."""

    def __init__(self, client: LlmClient, goal: GenerateAction.Goal) -> None:
        self._client = client
        self.feedback: list[GenerateAction.Feedback] = []
        sent = client.action.send_goal_async(goal, feedback_callback=lambda m: self.feedback.append(m.feedback))
        self.handle = client.wait(sent)
        self.accepted = self.handle.accepted
        self._result = self.handle.get_result_async() if self.accepted else None

    @property
    def done(self) -> bool:
        return self._result.done()

    @property
    def text(self) -> str:
        """The text of the feedback. An rclpy client drops what arrives after the result, which is authoritative."""
        assert [piece.sequence for piece in self.feedback] == list(range(len(self.feedback)))
        return "".join(piece.text for piece in self.feedback)

    def result(self):
        """(status, result)"""
        answer = self._client.wait(self._result)
        return answer.status, answer.result.result

    def cancel(self):
        return self._client.wait(self.handle.cancel_goal_async())


class Answer:
    """The future of what the service answers."""

    def __init__(self, future) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> GenerationResult:
        return self._future.result().result


class LlmClient:
    """Asks one node; all waiting spins here, with a limit."""

    def __init__(self, name: str, process: NodeProcess | None = None) -> None:
        self.name, self.node_process = name, process
        self.may_end = False  # the node's end is no failure while something is waited for
        self._met = process is None  # it has answered us; a node that was not started here is there already
        self.node = rclpy.create_node(f"client_{next(_numbers)}_of_{name}")
        self._clients = {}
        self.action = ActionClient(self.node, GenerateAction, f"/{name}/generate")
        self.statuses: list[EngineStatus] = []
        self.pieces: list[TokenPiece] = []
        self._listens = False
        self.node.create_subscription(EngineStatus, f"/{name}/status", self.statuses.append, LATCHED)

    def listen(self) -> None:
        """Collects ~/tokens in ``pieces`` from now on; again changes nothing."""
        if self._listens:
            return
        self._listens = True
        self.node.create_subscription(TokenPiece, f"/{self.name}/tokens", self.pieces.append, STREAM)
        self.until(lambda: self.node.count_publishers(f"/{self.name}/tokens"))
        self.spin(0.3)  # the node has to have found us, too

    def pieces_of(self, request_id: str) -> list[TokenPiece]:
        return [piece for piece in self.pieces if piece.request_id == request_id]

    def close(self) -> None:
        self.action.destroy()
        self.node.destroy_node()

    # --- waiting ----------------------------------------------------------------------------------

    def until(self, condition, limit: float = LIMIT) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"nothing came within {limit} s"
            ended = self.node_process is not None and self.node_process.process.poll() is not None
            if ended and not self.may_end:
                raise AssertionError(f"the node ended: {self.node_process.log.read_text(errors='replace')[-2000:]}")
            rclpy.spin_once(self.node, timeout_sec=0.05)

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rclpy.spin_once(self.node, timeout_sec=0.02)

    def wait(self, future, limit: float = LIMIT):
        self.until(future.done, limit)
        return future.result()

    def call_async(self, kind, service: str, request):
        if service not in self._clients:
            # The default depth of 10 would drop the oldest of many requests sent at once by this one client.
            self._clients[service] = self.node.create_client(kind, f"/{self.name}/{service}", qos_profile=STREAM)
            self.until(self._clients[service].service_is_ready)
        if not self._met and service != "get_state":
            self.state()
        return self._clients[service].call_async(request)

    def call(self, kind, service: str, request, limit: float = LIMIT):
        return self.wait(self.call_async(kind, service, request), limit)

    # --- what can be asked ------------------------------------------------------------------------

    def change(self, transition: int, limit: float = LIMIT) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        return self.call(ChangeState, "change_state", request, limit).success

    def state(self) -> int:
        """Asks again after 3 s: rmw_fastrtps drops a response ("client will not receive response") if the node takes
        more than 0.1 s to discover a client that has discovered it already, as happens while both are starting. So
        this is also the first that a node started here is asked."""
        start, futures = time.monotonic(), []

        def answered() -> bool:
            if time.monotonic() >= start + 3.0 * len(futures):
                futures.append(self.call_async(GetState, "get_state", GetState.Request()))
            return any(future.done() for future in futures)

        self.until(answered)
        self._met = True
        return next(future for future in futures if future.done()).result().current_state.id

    def bring_up(self) -> LlmClient:
        assert self.change(CONFIGURE), self.node_process.log.read_text()
        assert self.change(ACTIVATE)
        return self

    def generate_async(self, text="hello", **fields) -> Answer:
        return Answer(self.call_async(Generate, "generate", Generate.Request(request=make_request(text, **fields))))

    def generate(self, text="hello", **fields) -> GenerationResult:
        return self.wait(self.generate_async(text, **fields))

    def goal(self, text="hello", **fields) -> Goal:
        self.until(self.action.server_is_ready)
        return Goal(self, GenerateAction.Goal(request=make_request(text, **fields)))

    def info(self) -> GetInfo.Response:
        return self.call(GetInfo, "get_info", GetInfo.Request())

    def tokenize(self, text="", messages=()) -> Tokenize.Response:
        return self.call(Tokenize, "tokenize", Tokenize.Request(text=text, messages=list(messages)))

    def set(self, **values) -> list[tuple[bool, str]]:
        """(taken, reason) of each."""
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        answer = self.call(SetParameters, "set_parameters", SetParameters.Request(parameters=parameters))
        return [(result.successful, result.reason) for result in answer.results]

    def must_set(self, **values) -> None:
        results = self.set(**values)
        assert all(taken for taken, _ in results), results

    def get(self, *names: str) -> list:
        return self.call(GetParameters, "get_parameters", GetParameters.Request(names=list(names))).values

    def describe(self, *names: str) -> list:
        request = DescribeParameters.Request(names=list(names))
        return self.call(DescribeParameters, "describe_parameters", request).descriptors

    def status(self, condition=lambda status: True) -> EngineStatus:
        """The next or last status for which ``condition`` holds."""
        try:
            self.until(lambda: self.statuses and condition(self.statuses[-1]))
        except AssertionError as error:
            raise AssertionError(f"{error}; the last of {len(self.statuses)}: {self.statuses[-1:]}") from error
        return self.statuses[-1]


class Nodes:
    """Starts nodes and their clients; stops them all."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._clients = directory, []

    def start(self, engine_dir: Path | str = "", **parameters) -> LlmClient:
        name = f"llm_{os.getpid()}_{next(_numbers)}"  # of its own: a namesake would answer in its place
        if engine_dir:
            parameters["engine_dir"] = engine_dir
        process = NodeProcess(name, self._directory / f"{name}.log", **parameters)
        self._clients.append(LlmClient(name, process))
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.node_process.stop()
            client.close()


SUCCEEDED, CANCELED, ABORTED = GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_ABORTED
