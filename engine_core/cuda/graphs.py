"""CUDA graphs: the one class that captures and replays them.

A graph bakes in every address and size, so its key names all of them that can differ. Without graphs the same
launches are queued one by one: the same kernels on the same arrays, hence the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine_core.cuda.driver import Graph, Stream


@dataclass(frozen=True)
class GraphKey:
    """All that is baked into a graph."""

    batch: int
    input_address: int  # of what is fed: a token, or a prompt's chunk
    output_address: int  # of the logits, or of what a chunk leaves for the head
    adapted: bool = False  # whether it has the kernels of LoRA adapters, which read on the device whose
    kv_bucket: int = 0  # tokens the grid was chosen for; 0 = any
    rows: int = 1  # tokens of a step; of a chunk, at most; patches of an encoder
    layers: tuple[int, int] = (0, 0)  # of an encoder, from the first one to the second


class GraphRunner:
    """Sequences of launches by key, replayed as graphs where ``enabled``."""

    def __init__(self, stream: Stream, enabled: bool) -> None:
        self._stream = stream
        self._enabled = enabled
        self._launches: dict[GraphKey, tuple[Callable[[Stream], None], ...]] = {}
        self._graphs: dict[GraphKey, Graph] = {}

    def add(
        self,
        key: GraphKey,
        launches: Sequence[Callable[[Stream], None]],
        capture: bool = True,
        trial: Sequence[Callable[[Stream], None]] | None = None,
    ) -> None:
        """Notes the launches of ``key``, runs them once (modules load, errors show) and captures them.

        Without ``capture`` they are always queued one by one, and ``trial`` may be run here in their place. Raises
        DeviceError.
        """
        assert trial is None or not capture, "a graph is captured of what has run"
        self._launches[key] = tuple(launches)
        for launch in launches if trial is None else trial:
            launch(self._stream)
        self._stream.wait()
        if self._enabled and capture:
            self._graphs[key] = Graph(self._stream, lambda: self._run_eagerly(key))

    def run(self, key: GraphKey) -> None:
        """Queues the launches of ``key``: one replay, or one by one."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay(self._stream)
        else:
            self._run_eagerly(key)

    def _run_eagerly(self, key: GraphKey) -> None:
        for launch in self._launches[key]:
            launch(self._stream)

    def close(self) -> None:
        """Gives the graphs back; may be called twice."""
        while self._graphs:
            self._graphs.popitem()[1].close()
        self._launches.clear()
