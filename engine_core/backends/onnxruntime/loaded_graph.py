"""A model file that is edited in memory while it is loaded; the engine directory, which may be read-only, stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort

from engine_core.errors import BackendUnavailableError

_FOLDER = "session.model_external_initializers_file_folder_path"
_FOLDER_SINCE = (1, 23)  # seen working in 1.23 and not in 1.20; absolute locations work up to 1.23 and not in 1.32


class LoadedGraph:
    """The model at ``path``, without its weights. Raises BackendUnavailableError without the package ``onnx``."""

    def __init__(self, path: Path, why: str) -> None:
        """``why``: what needs the edit, as the message about a missing package begins."""
        try:
            import onnx
        except ImportError as error:
            raise BackendUnavailableError(f"{why} needs the Python package 'onnx': pip install onnx.") from error
        self.path = path
        self.onnx = onnx
        self._model = onnx.load(str(path), load_external_data=False)

    @property
    def graph(self) -> Any:
        """Its GraphProto, to be changed in place."""
        return self._model.graph

    def serialized(self, options: ort.SessionOptions) -> bytes:
        """Return what a session with ``options`` is made of; they get to know where the data file is."""
        self._drop_unused()
        self._locate(options)
        return self._model.SerializeToString()

    def _drop_unused(self) -> None:
        used = set(_names_read(self.graph))
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in used]:
            self.graph.initializer.remove(tensor)

    def _locate(self, options: ort.SessionOptions) -> None:
        """A model handed over as bytes has no directory of its own."""
        directory = self.path.parent.resolve()
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) >= _FOLDER_SINCE:
            options.add_session_config_entry(_FOLDER, str(directory))
            return
        for tensor in self.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(directory / entry.value)


def _names_read(graph: Any) -> Iterator[str]:
    """Yield what the nodes of ``graph`` read, and those of the graphs in their attributes."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _names_read(attribute.g)
