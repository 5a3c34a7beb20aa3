"""Measure barge-in: from a client's cancel to the end of the sentences.

    tools/start run benchmarks/barge_in.py ENGINE_DIR [--rounds 40] [--threads 1] [--out FILE]

A client as examples/voice_loop.py is one: it asks through the service, reads ~/sentences, and calls ~/cancel while the
answer is generated, at another moment in each round. The node and the client are two processes; the client's times run
from before it calls ~/cancel to when its callback has the message with ``done``, after which no sentence comes. What
the client does not wait for, the answer of the service, is measured too. A sentence that comes in between was on its
way; the voice loop does not speak it, and the row counts it.

Prints a sentence and a JSON line. Exit status 1 if a sentence came after ``done``, or an answer was not cancelled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import rclpy
import ros_overhead
from rclpy.executors import SingleThreadedExecutor
from ros_overhead import DISCOVERY, LIMIT, NAME, PROMPT, OverRos

from edgellm_ros import qos
from edgellm_ros.msg import ChatMessage, FinishReason, GenerationRequest, SamplingOptions, Sentence
from edgellm_ros.srv import Cancel, Generate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import result_rows  # noqa: E402

TOKENS = 1500  # of an answer that nobody ends
MOMENTS = 10  # of a round's cancel
EARLIEST, LATEST = 0.02, 0.15  # s after the question
AFTERWARDS = 0.05  # s that a sentence after the end would have


class Interruption(NamedTuple):
    """One barge-in as its client saw it."""

    silent: float  # s from the cancel to the end of the sentences
    answered: float  # s from the cancel to the answer of the service
    on_their_way: int  # sentences between the cancel and the end
    late: int  # sentences after the end


class Listener:
    """Asks, listens to the sentences of its own answer, and ends it."""

    def __init__(self) -> None:
        self._node = rclpy.create_node("barge_in")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._generate = self._node.create_client(Generate, f"{NAME}/generate", qos_profile=qos.SERVICE)
        self._cancel = self._node.create_client(Cancel, f"{NAME}/cancel", qos_profile=qos.SERVICE)
        self._node.create_subscription(Sentence, f"{NAME}/sentences", self._on_sentence, qos.STREAM)
        for client in (self._generate, self._cancel):
            assert client.wait_for_service(LIMIT), "the node did not start"
        self._request_id = ""
        self._sentences: list[float] = []  # s, when each came that has a text
        self._ends: list[float] = []

    def _on_sentence(self, sentence: Sentence) -> None:
        if sentence.request_id == self._request_id:
            (self._ends if sentence.done else self._sentences).append(time.perf_counter())

    def _spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._executor.spin_once(timeout_sec=0.005)

    def interrupt(self, moment: float) -> Interruption:
        """Ask, and end the answer ``moment`` seconds later."""
        self._spin(DISCOVERY)
        self._request_id = uuid.uuid4().hex
        self._sentences, self._ends = [], []
        request = GenerationRequest(
            request_id=self._request_id, messages=[ChatMessage(role="user", content=PROMPT)],
            sampling=SamplingOptions(max_new_tokens=[TOKENS], ignore_eos=True),
        )  # fmt: skip
        answer = self._generate.call_async(Generate.Request(request=request))
        self._spin(moment)
        assert not answer.done(), "the answer ended before it was cancelled; take an engine that is slower"
        start = time.perf_counter()
        self._cancel.call_async(Cancel.Request(request_id=self._request_id))
        limit, answered = time.monotonic() + LIMIT, 0.0
        while not (self._ends and answered):
            assert time.monotonic() < limit, "the answer was not ended"
            self._executor.spin_once(timeout_sec=0.1)
            if answer.done() and not answered:
                answered = time.perf_counter()
        self._spin(AFTERWARDS)
        reason = answer.result().result.finish_reason
        assert reason == FinishReason.CANCELLED, f"the answer ended by the reason {reason}"
        after = [each for each in self._sentences if each > start]
        late = sum(each > self._ends[0] for each in after)
        return Interruption(self._ends[0] - start, answered - start, len(after) - late, late)

    def close(self) -> None:
        self._executor.shutdown()
        self._node.destroy_node()


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        return ros_overhead.serve(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; 0 = the backend's choice")
    parser.add_argument("--out", type=Path, help="file to append the JSON line to")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    ros_overhead.isolation.isolate()
    rclpy.init()
    over_ros = OverRos(options.engine_dir, TOKENS, options.threads, script=__file__)
    try:
        over_ros.bring_up()
        listener = Listener()
        step = (LATEST - EARLIEST) / (MOMENTS - 1)
        listener.interrupt(EARLIEST)  # warm
        rounds = [listener.interrupt(EARLIEST + step * (number % MOMENTS)) for number in range(options.rounds)]
        model = over_ros.model()
        listener.close()
    finally:
        over_ros.close()
        rclpy.shutdown()
    silent, answered, on_their_way, late = zip(*rounds)
    ordered = sorted(silent)
    row = result_rows.run_head() | {
        "python": platform.python_version(), "rmw": rclpy.get_rmw_implementation_identifier(), "model": model,
        "threads": options.threads, "rounds": options.rounds, "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2), "silent_ms": round(1e3 * statistics.median(silent), 2),
        "silent_95_ms": round(1e3 * ordered[len(ordered) * 95 // 100], 2),
        "silent_most_ms": round(1e3 * ordered[-1], 2), "answer_ms": round(1e3 * statistics.median(answered), 2),
        "sentences_on_their_way": sum(on_their_way),
        "sentences_after_the_end": sum(late),
    }  # fmt: skip
    print(
        f"{model}: silent {row['silent_ms']} ms after the cancel (median of {options.rounds}; 95 %: "
        f"{row['silent_95_ms']} ms, most: {row['silent_most_ms']} ms; load {row['load_before']})"
    )
    print(json.dumps(row))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return int(bool(row["sentences_after_the_end"]))


if __name__ == "__main__":
    sys.exit(main())
