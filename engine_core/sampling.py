"""Choosing the next token on the host: the CPU backend's sampler and the reference of the device samplers.

The steps and their order are those of ``transformers`` (generation/logits_process.py): repetition penalty
(Keskar et al. 2019, arXiv 1909.05858), logit bias, constraint mask, temperature, top-k (Fan et al. 2018,
arXiv 1805.04833), top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et al. 2024, arXiv 2407.01082).
Randomness is counter-based, Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
the draw of a step depends on the request's seed and the step's number alone.
"""

from __future__ import annotations

import numpy as np

from engine_core.errors import EngineFaultError, InvalidSamplingError
from engine_core.request import SamplingParams

# What every backend says of logits that are NaN, and of a step that no token is left for.
NAN_LOGITS = "The model's logits are NaN; the weights or the engine are damaged."
NO_TOKEN_LEFT = "No token is left to sample: the logit bias, the JSON schema and the vocabulary exclude each other."
_MASK32 = 0xFFFFFFFF
_FIRST_NUCLEUS = 1024  # candidates sorted before top-p is known to need more of the vocabulary


def philox4x32(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return four 32-bit words of Philox4x32-10 for a 64-bit key and a 128-bit counter, low words first."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, step: int) -> float:
    """Return the draw of step ``step`` (0, 1, …) for ``seed`` (uint64): a double in [0, 1) with 53 random bits."""
    w0, w1, _, _ = philox4x32((seed & _MASK32, seed >> 32), (step & _MASK32, step >> 32, 0, 0))
    return ((w0 >> 5) * 67108864.0 + (w1 >> 6)) / 9007199254740992.0


class Sampler:
    """Samples one sequence's tokens from logits over the rows of the (possibly reduced) LM head.

    ``vocab_map``: int32 [rows], the full-vocabulary id of each row, or None when rows are ids. Ids handed in
    (history, bias, mask) and handed out are always those of the full vocabulary. All arrays that grow with the
    vocabulary are taken by the constructor.
    """

    def __init__(self, vocab_size: int, vocab_map: np.ndarray | None = None) -> None:
        self.vocab_size = vocab_size
        self.num_rows = vocab_size if vocab_map is None else len(vocab_map)
        self._map = None if vocab_map is None else np.ascontiguousarray(vocab_map, dtype=np.int32)
        if self._map is not None:
            self._row_of = np.full(vocab_size, -1, dtype=np.int32)
            self._row_of[self._map] = np.arange(self.num_rows, dtype=np.int32)
        self._work = np.empty(self.num_rows, dtype=np.float32)
        self._seen = np.zeros(self.num_rows, dtype=bool)
        self._seen_rows = np.empty(self.num_rows, dtype=np.int32)
        self._num_seen = 0
        self._step = 0
        self._sampling: SamplingParams | None = None
        self._bias_rows = self._bias_values = np.empty(0)

    def begin(self, sampling: SamplingParams, history: np.ndarray) -> None:
        """Starts a sequence. ``sampling``: resolved; ``history``: int32 [n], the prompt, for the repetition penalty."""
        self._sampling = sampling
        self._step = 0
        self._seen[self._seen_rows[: self._num_seen]] = False
        self._num_seen = 0
        if sampling.repetition_penalty != 1.0:
            self._add_seen(np.unique(self._rows(np.asarray(history, dtype=np.int32))))
        biased = [(token_id, bias) for token_id, bias in sampling.logit_bias if 0 <= token_id < self.vocab_size]
        rows = self._rows(np.array([token_id for token_id, _ in biased], dtype=np.int32))
        values = np.array([bias for _, bias in biased], dtype=np.float32)
        self._bias_rows, self._bias_values = rows[rows >= 0], values[rows >= 0]

    def sample(self, logits: np.ndarray, mask: np.ndarray | None = None) -> int:
        """Return the next token's full-vocabulary id.

        ``logits``: float32 [rows], left as they are. ``mask``: uint32 [ceil(vocab_size / 32)], bit i of word
        i // 32 set = id i allowed. Raises EngineFaultError on NaN logits, InvalidSamplingError when bias and mask
        leave no token.
        """
        sampling = self._sampling
        assert sampling is not None, "begin comes first"
        scores = self._adjust(logits, mask)
        if sampling.temperature == 0.0:
            row = int(scores.argmax())
            self._check(float(scores[row]))
        else:
            row = self._draw(scores)
        self._note(row)
        return row if self._map is None else int(self._map[row])

    def advance(self, token_id: int) -> None:
        """Take a full-vocabulary id as the next token, as if it had been sampled."""
        self._note(token_id if self._map is None else int(self._row_of[token_id]))

    def log_probability(self, logits: np.ndarray, token_id: int) -> float:
        """Return that of a full-vocabulary id under the softmax over all rows; -inf for one that the LM head lacks."""
        row = int(self._rows(np.array([token_id]))[0])
        if row < 0:
            return -np.inf
        peak = logits.max()
        return float(logits[row] - peak) - float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))

    # --- steps ------------------------------------------------------------------------------------

    def _adjust(self, logits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Penalty, bias and mask; the logits themselves where none applies (greedy without options)."""
        sampling = self._sampling
        assert sampling is not None
        if sampling.repetition_penalty == 1.0 and not len(self._bias_rows) and mask is None:
            return logits
        work = self._work
        np.copyto(work, logits)
        if self._num_seen:
            rows = self._seen_rows[: self._num_seen]
            values = work[rows]
            penalty = np.float32(sampling.repetition_penalty)
            work[rows] = np.where(values < 0, values * penalty, values / penalty)
        np.add.at(work, self._bias_rows.astype(np.int64), self._bias_values)
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size]
            work[(allowed if self._map is None else allowed[self._map]) == 0] = -np.inf
        return work

    def _draw(self, scores: np.ndarray) -> int:
        sampling = self._sampling
        assert sampling is not None
        peak = float(scores.max())
        self._check(peak)
        rows = None  # None: every row, in order
        if 0 < sampling.top_k < self.num_rows:
            threshold = np.partition(scores, self.num_rows - sampling.top_k)[self.num_rows - sampling.top_k]
            rows = np.flatnonzero(scores >= threshold)
            scores = scores[rows]
        weights = np.exp((scores - np.float32(peak)) / np.float32(sampling.temperature), dtype=np.float32)
        if sampling.top_p < 1.0:
            kept = _nucleus(weights, sampling.top_p)
            weights, rows = weights[kept], kept if rows is None else rows[kept]
        if sampling.min_p > 0.0:
            kept = np.flatnonzero(weights >= np.float32(sampling.min_p))  # the likeliest token's weight is 1
            weights, rows = weights[kept], kept if rows is None else rows[kept]
        cumulative = np.cumsum(weights, dtype=np.float64)
        assert sampling.seed is not None  # it is resolved
        target = uniform(sampling.seed, self._step) * cumulative[-1]
        index = min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)
        return index if rows is None else int(rows[index])

    # --- helpers ----------------------------------------------------------------------------------

    def _note(self, row: int) -> None:
        assert self._sampling is not None and row >= 0
        self._step += 1
        if self._sampling.repetition_penalty != 1.0 and not self._seen[row]:
            self._add_seen(np.array([row], dtype=np.int32))

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        return ids if self._map is None else self._row_of[ids]

    def _add_seen(self, rows: np.ndarray) -> None:
        rows = rows[rows >= 0]
        self._seen[rows] = True
        self._seen_rows[self._num_seen : self._num_seen + len(rows)] = rows
        self._num_seen += len(rows)

    def _check(self, peak: float) -> None:
        if peak != peak:
            raise EngineFaultError(NAN_LOGITS)
        if peak == -np.inf:
            reduced = ""
            if self._map is not None:
                reduced = (
                    f" The vocabulary is reduced to {self.num_rows} of {self.vocab_size} tokens: "
                    "'edgellm reduce-vocab' makes maps that keep all that JSON needs."
                )
            raise InvalidSamplingError(NO_TOKEN_LEFT + reduced)


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices, ascending, of the fewest largest ``weights`` (float32 [n]) that hold ``top_p`` of their sum.

    A token is kept if the mass of those before it, in falling order, is below ``top_p``; the sort is of a
    growing share of the vocabulary, since a nucleus is nearly always small.
    """
    total = float(weights.sum(dtype=np.float64))
    count = _FIRST_NUCLEUS
    while True:
        if count < len(weights):
            candidates = np.argpartition(weights, len(weights) - count)[len(weights) - count :]
        else:
            candidates = np.arange(len(weights))
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        before = np.cumsum(weights[order], dtype=np.float64)
        before = np.concatenate(([0.0], before[:-1]))
        num_kept = int(np.count_nonzero(before < top_p * total))
        if num_kept < len(order) or len(order) == len(weights):
            return np.sort(order[: max(1, num_kept)])
        count *= 8
