"""The probability of a given token after a row of logits: wrapper of log_probability.cu."""

from __future__ import annotations

import ctypes

from engine_core.cuda.driver import DeviceArray, Launch, Stream
from engine_core.cuda.kernels import Kernels, check
from engine_core.cuda.kernels.launch_configs import LOG_PROBABILITY_THREADS


class LogProbability:
    """Writes the natural logarithm of the probability of one token after another."""

    def __init__(self, kernels: Kernels, logits: DeviceArray, output: DeviceArray) -> None:
        """``logits``: float32 [rows]; ``output``: float32 [n]. Raises KernelArgumentError or KernelCompileError."""
        (rows,), (places,) = logits.shape, output.shape
        check("logits", logits, (rows,), "fp32")
        check("output", output, (places,), "fp32")
        defines: dict[str, int | str] = {"ROWS": rows, "THREADS": LOG_PROBABILITY_THREADS}
        function = kernels.function("log_probability", "log_probability", defines)
        self.output = output
        self._row, self._place, self._num_rows = ctypes.c_int(0), ctypes.c_int(0), rows
        args = [logits, self._row, self._place, output]
        self._launch = Launch(kernels.device, function, (1,), LOG_PROBABILITY_THREADS, args)

    def __call__(self, stream: Stream, row: int, place: int) -> None:
        """Queue what writes to ``place`` of the output the logarithm for row ``row`` of the logits; -1: -infinity."""
        assert -1 <= row < self._num_rows and 0 <= place < self.output.shape[0]
        self._row.value, self._place.value = row, place
        self._launch(stream)
