"""A voice loop: each line is a question, whose answer is spoken sentence by sentence, and a new line interrupts it.

python3 examples/voice_loop.py                    # lines of the keyboard; an empty one interrupts, Ctrl-D leaves
python3 examples/voice_loop.py --topic /heard     # std_msgs/String, as a speech recognizer publishes them

Sentences come from ~/sentences and are spoken by espeak-ng where it is installed, and printed. An interruption silences
the speaker at once and ends the answer with ~/cancel. It prints the times from a question to its first sentence, and
from the cancel to the end of the sentences.
"""

import argparse
import queue
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String

from edgellm_ros import qos
from edgellm_ros.client import LLM, LLMError
from edgellm_ros.msg import Sentence
from edgellm_ros.srv import Cancel

END_LIMIT = 5.0  # s that an answer may take to end after a cancel
CANCEL_INTERVAL = 0.2  # s between two cancels: the first may have overtaken the question


class Speaker:
    """Speaks sentences one after the other, in a thread of its own; prints them where espeak-ng is not installed."""

    def __init__(self) -> None:
        self._program = shutil.which("espeak-ng")
        self._sentences: queue.Queue[tuple[int, str]] = queue.Queue()
        self._lock = threading.Lock()  # of what follows
        self._num_silenced = 0
        self._process: subprocess.Popen | None = None
        threading.Thread(target=self._speak, name="speaker", daemon=True).start()

    def say(self, text: str) -> None:
        """Speak ``text`` after what was given before. Returns at once."""
        print(text, flush=True)
        if self._program is not None:
            self._sentences.put((self._num_silenced, text))

    def silence(self) -> None:
        """End the sentence that is being spoken, and speak none of those that wait."""
        with self._lock:
            self._num_silenced += 1
            if self._process is not None:
                self._process.kill()

    def wait(self) -> None:
        """Wait until everything has been spoken."""
        self._sentences.join()

    def _speak(self) -> None:
        while True:
            round_, text = self._sentences.get()
            with self._lock:
                if round_ == self._num_silenced:
                    self._process = subprocess.Popen([self._program, "--stdin"], stdin=subprocess.PIPE, text=True)
            if self._process is not None:
                self._process.communicate(text)  # a pipe that silence() has broken is no error
                with self._lock:
                    self._process = None
            self._sentences.task_done()


class VoiceLoop:
    """Asks the node ``name`` and has its sentences spoken. An executor spins ``node`` in another thread."""

    def __init__(self, node: Node, llm: LLM, name: str, speaker: Speaker) -> None:
        self._llm = llm
        self._speaker = speaker
        self._cancel = node.create_client(Cancel, f"{name}/cancel", qos_profile=qos.SERVICE)
        self._asker = ThreadPoolExecutor(1)  # one question after the other, since they share a session
        self._answer: Future | None = None
        self._ended = threading.Event()  # no sentence of this answer will come any more
        self._ended_at = self._asked_at = 0.0  # s
        self._lock = threading.Lock()  # of what follows
        self._request_id = ""
        self._is_first = self._is_interrupted = False
        node.create_subscription(Sentence, f"{name}/sentences", self._on_sentence, qos.STREAM)

    def hear(self, text: str) -> None:
        """Interrupt the answer under way, and ask ``text`` unless it is empty. Returns before the answer comes."""
        self._interrupt()
        if not text:
            return
        self._ended.clear()
        with self._lock:
            self._request_id = uuid.uuid4().hex
            self._is_first, self._is_interrupted = True, False
        self._asked_at = time.monotonic()
        self._answer = self._asker.submit(self._ask, text, self._request_id)

    def wait(self) -> None:
        """Wait until the answer is there and spoken."""
        if self._answer is not None:
            self._answer.result()
            self._ended.wait(END_LIMIT)
        self._speaker.wait()

    def close(self) -> None:
        """End what runs."""
        self._interrupt()
        self._asker.shutdown()

    def _ask(self, text: str, request_id: str) -> None:
        try:
            self._llm.ask(text, session="voice", context_policy="drop_oldest", request_id=request_id)
        except LLMError as error:
            print(error, file=sys.stderr)
            self._ended.set()  # a node that is gone sends no end

    def _interrupt(self) -> None:
        start = time.monotonic()
        with self._lock:
            self._is_interrupted = True
        self._speaker.silence()
        if self._answer is None or self._ended.is_set():
            return
        while not self._ended.is_set() and time.monotonic() < start + END_LIMIT:
            self._cancel.call_async(Cancel.Request(request_id=self._request_id))
            self._ended.wait(CANCEL_INTERVAL)
        print(f"[silent {1e3 * (self._ended_at - start):.1f} ms after the cancel]", flush=True)

    def _on_sentence(self, sentence: Sentence) -> None:
        """Speak a sentence of the answer under way; in the executor's thread."""
        now = time.monotonic()
        with self._lock:
            if sentence.request_id != self._request_id:
                return
            is_spoken = bool(sentence.text) and not self._is_interrupted
            is_first = is_spoken and self._is_first
            if is_spoken:  # under the lock: never after an interruption
                self._is_first = False
                self._speaker.say(sentence.text)
        if is_first:
            print(f"[first sentence after {1e3 * (now - self._asked_at):.0f} ms]", flush=True)
        if sentence.done:
            self._ended_at = now
            self._ended.set()


def heard(node: Node, topic: str) -> Iterator[str]:
    """Return what is said: the messages of ``topic``, for ever, or with "" the lines of the keyboard to their end."""
    if not topic:
        yield from (line.strip() for line in sys.stdin)
        return
    texts: queue.Queue[str] = queue.Queue()
    node.create_subscription(String, topic, lambda message: texts.put(message.data.strip()), qos.COMMAND)
    while True:
        yield texts.get()


def talk(node: Node, name: str, topic: str) -> int:
    """Hear and answer until nothing more is said; return the exit status."""
    with LLM(name, node=node) as llm:
        loop = VoiceLoop(node, llm, name, Speaker())
        try:
            llm.wait()
            for text in heard(node, topic):
                loop.hear(text)
            loop.wait()
        except LLMError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            loop.close()
    return 0


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    parser.add_argument("--topic", default="", help="std_msgs/String with what is said; without it, the keyboard")
    options = parser.parse_args(args)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)  # Ctrl-C still has to end the answer
    node = Node("voice_loop")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.5)

    spinner = threading.Thread(target=spin, name="executor", daemon=True)
    spinner.start()
    try:
        return talk(node, options.node, options.topic)
    finally:
        ended.set()
        executor.wake()
        spinner.join()
        executor.shutdown()  # after the thread: one that still waits would raise
        node.destroy_node()
        rclpy.shutdown()


if __name__ == "__main__":
    sys.exit(main())
