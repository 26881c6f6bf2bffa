"""Rotary position embedding in the half-split layout of Hugging Face checkpoints.

Feature ``i`` of the first half and ``i`` of the second half are one pair, rotated by
``position * frequency[i]``. Context extensions change the frequencies (and, for YaRN, a factor on
the result) and are fixed by the checkpoint, so frequencies are computed once, in numpy.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from qjax.ops.rotary import rotary_table, rotate_heads

ROPE_TYPES = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A context extension. Fields a type does not use keep their defaults.

    Attributes:
      rope_type: ``linear`` (all frequencies divided by ``factor``), ``llama3`` (low frequencies
        divided, high ones kept, a ramp between) or ``yarn`` (a ramp over feature index, and
        attention sharpened).
      factor: How many times the original context is extended.
      original_max_position_embeddings: Context before extension; llama3 and yarn.
      low_freq_factor: llama3: wavelengths above ``original / low_freq_factor`` are divided.
      high_freq_factor: llama3: wavelengths below ``original / high_freq_factor`` are kept.
      beta_fast: yarn: rotations over the original context above which a frequency is kept.
      beta_slow: yarn: rotations below which it is divided by ``factor``.
      attention_factor: yarn: multiplies cos and sin.
      truncate: yarn: round the ends of the ramp to whole feature indices.

    Raises:
      ValueError: If a value makes no sense; the message prints it.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type={self.rope_type!r} is not implemented; known are 'default', "
                f"{', '.join(map(repr, ROPE_TYPES))}"
            )
        if self.factor <= 0:
            raise ValueError(f"rope factor={self.factor} must be positive")
        if self.rope_type != "linear" and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"rope_type={self.rope_type!r} needs original_max_position_embeddings, got "
                f"{self.original_max_position_embeddings}"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle per position of every feature pair.

    Args:
      head_dim: Features of one head, even.
      theta: Base of the geometric series of wavelengths.
      scaling: Context extension, or None.

    Returns:
      float32 ``(head_dim / 2,)``.

    References:
      RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071); the llama3 rule as released with
      Llama 3.1.
    """
    pairs = np.arange(0, head_dim, 2, dtype=np.float64)
    freqs = theta ** (-pairs / head_dim)
    if scaling is None:
        return freqs.astype(np.float32)
    if scaling.rope_type == "linear":
        freqs = freqs / scaling.factor
    elif scaling.rope_type == "llama3":
        rotations = scaling.original_max_position_embeddings * freqs / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        freqs = freqs * (kept + (1 - kept) / scaling.factor)
    else:
        low, high = _yarn_ramp(head_dim, theta, scaling)
        divided = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
        freqs = freqs * ((1 - divided) + divided / scaling.factor)
    return freqs.astype(np.float32)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    def pair_index(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A ramp of zero width would divide by zero; the reference widens it by the same amount.
    return low, high + 0.001 if low == high else high


def apply_rotary(
    x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Rotate queries or keys to their positions.

    Angles and the rotation are computed in float32: bfloat16 cannot tell positions above 256 apart.

    Args:
      x: ``(b, t, heads, head_dim)``.
      positions: int32 ``(b, t)``.
      theta: Base of the wavelengths.
      scaling: Context extension, or None.

    Returns:
      Same shape and dtype as ``x``.
    """
    frequencies = rope_frequencies(x.shape[-1], theta, scaling)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return rotate_heads(x, rotary_table(positions, frequencies, factor))
