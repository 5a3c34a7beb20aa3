"""Rotary position embeddings: the frequencies of each scaling method and the table made of them.

RoPE: Su et al. 2021 (arXiv 2104.09864). Linear interpolation: Chen et al. 2023 (arXiv 2306.15595). YaRN: Peng et al.
2023 (arXiv 2309.00071). LongRoPE: Ding et al. 2024 (arXiv 2402.13753). The Llama 3 scaling is the one published with
Llama 3.1. Parameter names are those of ``transformers`` (modeling_rope_utils.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from engine_core.errors import UnsupportedModelError


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding; a model has one or two (Gemma 3: local and global layers)."""

    dim: int  # elements of a head that are rotated; the rest pass through
    theta: float
    kind: str = "default"  # default, linear, llama3, yarn, longrope; none = it turns nothing
    original_max_position: int = 0  # positions before scaling
    max_position: int = 0
    parameters: dict = field(default_factory=dict, hash=False)

    def check(self) -> None:
        """Raises UnsupportedModelError for a scaling that is not implemented or lacks a parameter."""
        for length in {1, self.original_max_position + 1}:  # both sets of LongRoPE's factors
            frequencies, attention_factor = self._frequencies(length)
            if not (np.isfinite(frequencies).all() and math.isfinite(attention_factor)):
                raise UnsupportedModelError(
                    f"The RoPE scaling {self.kind!r} has parameters without finite frequencies."
                )

    @property
    def switch(self) -> int:
        """Return the length up to which a sequence has LongRoPE's short factors; a longer one has the long factors at
        all its positions. 0: the frequencies do not depend on the length."""
        has_two = self.kind == "longrope" and self.parameters.get("short_factor") != self.parameters.get("long_factor")
        return self.original_max_position if has_two else 0

    def table(self, max_context: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float32 [max_context, dim / 2] each, of a sequence of ``max_context`` tokens: see ``switch``."""
        frequencies, attention_factor = self._frequencies(max_context)
        angles = np.arange(max_context, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
        factor = np.float32(attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def rows(self, switch: int, max_context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin, float32 [switch + max_context, dim / 2] each: ``table`` of sequences of up to ``switch``
        tokens, unless that is 0, then ``table`` of longer ones."""
        parts = [self.table(length) for length in (switch, max_context) if length]
        cos, sin = map(np.concatenate, zip(*parts, strict=True))
        return cos, sin

    def _frequencies(self, max_context: int) -> tuple[np.ndarray, float]:
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        base = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "default":
            return base, 1.0
        if self.kind == "none":
            return np.zeros_like(base), 1.0
        if self.kind == "linear":
            return base / np.float32(self._positive("factor")), 1.0
        if self.kind == "llama3":
            return self._llama3(base), 1.0
        if self.kind == "yarn":
            return self._yarn(base)
        if self.kind == "longrope":
            return self._longrope(base, max_context)
        raise UnsupportedModelError(
            f"The RoPE scaling {self.kind!r} is not implemented; default, linear, llama3, yarn and longrope are."
        )

    def _value(self, name: str, default: float | None = None) -> float:
        value = self.parameters.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise UnsupportedModelError(f"The RoPE scaling {self.kind!r} has no usable {name!r} (it is {value!r}).")
        return float(value)

    def _positive(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if value <= 0:
            raise UnsupportedModelError(f"The RoPE scaling {self.kind!r} has {name!r} = {value:g}, expected above 0.")
        return value

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        factor, low, high = (self._positive(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        if low == high:
            raise UnsupportedModelError("The RoPE scaling 'llama3' has equal low_freq_factor and high_freq_factor.")
        original = self._value("original_max_position_embeddings", self.original_max_position or None)
        wavelength = 2 * math.pi / base
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * base / factor + smooth * base
        scaled = np.where(wavelength > original / low, base / factor, base)
        between = (wavelength <= original / low) & (wavelength >= original / high)
        return np.where(between, blended, scaled)

    def _yarn(self, base: np.ndarray) -> tuple[np.ndarray, float]:
        factor = self._positive("factor")
        original = self._value("original_max_position_embeddings", self.original_max_position or None)

        if self.theta == 1 or min(self._value("beta_fast", 32.0), self._value("beta_slow", 1.0)) < 0:
            raise UnsupportedModelError("The RoPE scaling 'yarn' needs a rope_theta other than 1 and positive betas.")

        def correction(rotations: float) -> float:
            """Return the dimension whose wavelength fits ``rotations`` times into the original context."""
            return self.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low = correction(self._value("beta_fast", 32.0) or 32.0)
        high = correction(self._value("beta_slow", 1.0) or 1.0)
        if self.parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        ramp = (np.arange(self.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
        extrapolated = 1 - np.clip(ramp, 0, 1)
        frequencies = base / factor * (1 - extrapolated) + base * extrapolated
        return frequencies, self._yarn_attention(factor)

    def _yarn_attention(self, factor: float) -> float:
        def mscale(scale: float, by: float) -> float:
            return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

        if self.parameters.get("attention_factor") is not None:
            return self._positive("attention_factor")
        if self.parameters.get("mscale") and self.parameters.get("mscale_all_dim"):
            return mscale(factor, self._value("mscale")) / mscale(factor, self._value("mscale_all_dim"))
        return mscale(factor, 1.0)

    def _longrope(self, base: np.ndarray, max_context: int) -> tuple[np.ndarray, float]:
        original = self._value("original_max_position_embeddings", self.original_max_position or None)
        name = "long_factor" if max_context > original else "short_factor"
        values = self.parameters.get(name, ())
        if not isinstance(values, list) or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in values):
            raise UnsupportedModelError(f"The RoPE scaling 'longrope' has no list of numbers in {name}.")
        factors = np.asarray(values, dtype=np.float32)
        if factors.size and not (np.isfinite(factors).all() and factors.min() > 0):
            raise UnsupportedModelError(f"The RoPE scaling 'longrope' has values in {name} that are not above 0.")
        if factors.shape != base.shape:
            raise UnsupportedModelError(
                f"The RoPE scaling 'longrope' has {factors.size} values in {name}, expected {base.size}."
            )
        if self.parameters.get("attention_factor") is not None:
            return base / factors, self._positive("attention_factor")
        stretch = self._positive("factor", self.max_position / original)
        attention = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(max(original, 2)))
        return base / factors, attention
