"""llama.cpp on a GGUF file, called as the C library it is: none of the Python binding's bookkeeping is measured."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

_BATCH = 512  # tokens that are computed at once, at most


class LlamaCpp:
    """One sequence, decoded greedily."""

    def __init__(self, path: Path, threads: int, max_context: int) -> None:
        """Raises ImportError where the Python binding is not installed, RuntimeError where the file does not load."""
        import llama_cpp

        self._library, self.version = llama_cpp, llama_cpp.__version__
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # has to live as long
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_context
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Forget the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def feed(self, ids: list[int]) -> int:
        """Return the likeliest token after ``ids``, which follow what was fed before. Raises RuntimeError."""
        library = self._library
        tokens = (library.llama_token * len(ids))(*ids)
        if library.llama_decode(self._context, library.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        logits = library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())
