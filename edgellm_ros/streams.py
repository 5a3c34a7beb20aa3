"""Publish pieces and sentences while a request runs, from the worker's thread and only where someone reads."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from functools import partial

from rclpy.node import Node

from edgellm_ros import qos
from edgellm_ros.conversions import error_code, finish_reason, to_speculation, to_stats, to_tool_calls, wire_text
from edgellm_ros.msg import GenerationStats, Sentence, TokenPiece
from engine_core.request import FinishReason, GenerationResult, Piece, SpeculationCounts
from engine_core.text.sentences import SentenceSplitter

# The reasons of an answer that nobody has ended from outside.
ENDED_BY_ITSELF = (FinishReason.STOP, FinishReason.TOOL_CALLS, FinishReason.LENGTH)
_KEPT_TIMES = 100


class Topics:
    """The topics of all answers, and the totals since the node was activated.

    The publishers are not managed by the lifecycle: those would drop the end of a request that came while the node was
    not active, and whoever follows the topics would wait for it.
    """

    def __init__(self, node: Node) -> None:
        self.clock = node.get_clock()
        publisher = partial(node.create_publisher, event_callbacks=qos.NO_EVENTS)
        self.tokens = publisher(TokenPiece, "~/tokens", qos.STREAM)
        self.sentences = publisher(Sentence, "~/sentences", qos.STREAM)
        self._stats = publisher(GenerationStats, "~/stats", qos.COMMAND)
        self._lock = threading.Lock()
        self.reset_totals()

    def reset_totals(self) -> None:
        with self._lock:
            self.requests_total = self.tokens_total = 0
            self.speculation_total = SpeculationCounts()
            self.last: GenerationResult | None = None
            self._first_tokens: deque[float] = deque(maxlen=_KEPT_TIMES)  # s

    def first_token_percentiles(self) -> tuple[float, float] | None:
        """Return the median and the 95th percentile, in s, of the last times to a first token; None without any."""
        with self._lock:
            times = sorted(self._first_tokens)
        if not times:
            return None
        return times[(len(times) - 1) // 2], times[min(len(times) - 1, int(0.95 * len(times)))]

    def publish_stats(self, result: GenerationResult) -> None:
        with self._lock:
            self.requests_total += 1
            self.tokens_total += result.generated_tokens
            self.speculation_total += result.speculation
            self.last = result
            if result.generated_tokens:
                self._first_tokens.append(result.time_to_first_token)
            totals = self.requests_total, self.tokens_total, self.speculation_total
        if self._stats.get_subscription_count():
            stats = to_stats(result)
            stats.requests_total, stats.tokens_total = totals[:2]
            stats.speculation_total = to_speculation(totals[2])
            stats.header.stamp = self.clock.now().to_msg()
            self._stats.publish(stats)


class RequestStream:
    """One answer on its way: pieces, sentences and the final ``done`` of each. Messages are reused piece after piece.

    ``spoken``: whether the answer is prose, of which ~/sentences
    gets the sentences; of a JSON value it gets the end alone.
    """

    def __init__(self, topics: Topics, request_id: str, spoken: bool = True) -> None:
        self._topics = topics
        self._spoken = spoken
        self._splitter = SentenceSplitter()
        self._token_piece = TokenPiece(request_id=request_id)
        self._sentence = Sentence(request_id=request_id)
        self._num_pieces = 0

    def piece(self, piece: Piece) -> None:
        self._num_pieces = piece.sequence + 1
        if self._topics.tokens.get_subscription_count():
            message = self._token_piece
            message.sequence = piece.sequence
            message.text = wire_text(piece.text)
            message.token_ids = array("i", piece.token_ids)
            message.reasoning = wire_text(piece.reasoning)
            message.tool_calls = to_tool_calls(piece.tool_calls)
            self._stamp(message)
            self._topics.tokens.publish(message)
        if self._spoken:
            for text in self._splitter.feed(piece.text):
                self._publish_sentence(text)

    def done(self, result: GenerationResult) -> None:
        """Ends every stream of the request. To be called once."""
        if self._topics.tokens.get_subscription_count():
            last = self._token_piece
            last.sequence = self._num_pieces
            last.text = last.reasoning = ""
            last.tool_calls = []
            last.token_ids = array("i")
            last.done = True
            last.finish_reason = finish_reason(result.finish_reason)
            last.error_code = error_code(result.error)
            self._stamp(last)
            self._topics.tokens.publish(last)
        rest = []  # never half a sentence, and nothing after an interruption
        if result.finish_reason in ENDED_BY_ITSELF:
            rest = self._splitter.flush(cut=result.finish_reason is FinishReason.LENGTH)
        self._sentence.done = True
        self._sentence.finish_reason = finish_reason(result.finish_reason)
        self._publish_sentence(rest[0] if rest else "")
        self._topics.publish_stats(result)

    def _publish_sentence(self, text: str) -> None:
        if self._topics.sentences.get_subscription_count():
            self._sentence.text = wire_text(text)
            self._sentence.complete = bool(text)  # the splitter gives whole sentences only
            self._stamp(self._sentence)
            self._topics.sentences.publish(self._sentence)
        self._sentence.sequence += 1

    def _stamp(self, message: TokenPiece | Sentence) -> None:
        seconds, nanoseconds = self._topics.clock.now().seconds_nanoseconds()
        message.header.stamp.sec = seconds
        message.header.stamp.nanosec = nanoseconds
