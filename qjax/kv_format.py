"""How one layer of the KV cache is held: storage type and where its scales come from."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from qjax.numerics import bound
from qjax.typing import DType

CLIP_FACTORS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)
"""Scales that are tried where clipping may pay, over the one that clips nothing."""

_PLAIN = ("float32", "bfloat16", "float16")
_QUANTIZED = ("float8_e5m2", "float8_e4m3fn", "int8", "int4")
_MODES = ("none", "static", "dynamic", "tracked")
_GRANULARITIES = ("tensor", "head")
# Magnitude (in units of the scale) from which rounding to nearest leaves the range, so that the
# value is clipped: half a step beyond the largest representable one.
_CLIPPED_FROM = {
    "int4": 7.5,
    "int8": 127.5,
    "float8_e4m3fn": 464.0,
    "float8_e5m2": 61440.0,
    "float16": 65520.0,
    "bfloat16": float("inf"),
    "float32": float("inf"),
}
# Magnitude (in units of the scale) up to which rounding to nearest gives 0: half the smallest code.
_LOST_UP_TO = {
    "int4": 0.5,
    "int8": 0.5,
    "float8_e4m3fn": 2.0**-10,
    "float8_e5m2": 2.0**-17,
    "float16": 2.0**-25,
    "bfloat16": 0.0,
    "float32": 0.0,
}
_NAMES = {
    "f32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "f16": "float16",
    "float16": "float16",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e4m3": "float8_e4m3fn",
    "int8": "int8",
    "int4": "int4",
}


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """Format of the keys and values of one layer.

    Attributes:
      dtype: ``float32``, ``bfloat16``, ``float16`` (held as they are), ``float8_e5m2``,
        ``float8_e4m3fn``, ``int8`` or ``int4`` (symmetric codes with a float32 scale).
      mode: Where a scale comes from. ``none``: the plain types have no scale. ``static``:
        calibrated offline, fixed. ``dynamic``: absmax of the token, per KV head. ``tracked``:
        running absmax of the sequence, per KV head. A dynamic or tracked scale is stored next to
        its token, so what was written never changes its meaning.
      granularity: Extent of one static scale, ``tensor`` or ``head`` (per KV head, the default);
        None for the other modes.
      without_key_bias: Keys are stored without the bias of their projection, whose part of the
        logits attention adds (``qjax.ops.key_bias``); quantized types only.

    Raises:
      ValueError: If the combination is not meaningful; the message says what to change.
    """

    dtype: str
    mode: str = "none"
    granularity: str | None = None
    without_key_bias: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _PLAIN + _QUANTIZED:
            raise ValueError(
                f"KVFormat dtype={self.dtype!r} is unknown; "
                f"choose one of {', '.join(_PLAIN + _QUANTIZED)}"
            )
        if self.mode not in _MODES:
            raise ValueError(f"KVFormat mode={self.mode!r} is unknown; choose one of {_MODES}")
        if (self.mode == "none") != (self.dtype in _PLAIN):
            raise ValueError(
                f"KVFormat dtype={self.dtype!r} with mode={self.mode!r}: {', '.join(_PLAIN)} need "
                "mode 'none', the quantized types one of 'static', 'dynamic', 'tracked'"
            )
        if self.mode == "static" and self.granularity is None:
            object.__setattr__(self, "granularity", "head")
        if self.mode != "static" and self.granularity is not None:
            raise ValueError(
                f"granularity={self.granularity!r} with mode={self.mode!r}: only static "
                "scales have a granularity; leave it None"
            )
        if self.mode == "static" and self.granularity not in _GRANULARITIES:
            raise ValueError(
                f"granularity={self.granularity!r} is unknown; choose one of {_GRANULARITIES}"
            )
        if self.without_key_bias and not self.quantized:
            raise ValueError(
                f"KVFormat dtype={self.dtype!r} with without_key_bias=True: only quantized keys "
                "gain from leaving the bias out"
            )

    @property
    def quantized(self) -> bool:
        """Whether values are codes that need a scale."""
        return self.dtype in _QUANTIZED

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte (int4)."""
        return self.dtype == "int4"

    @property
    def stores_scales(self) -> bool:
        """Whether every token carries its own scale (dynamic and tracked)."""
        return self.mode in ("dynamic", "tracked")

    @property
    def clips(self) -> bool:
        """Whether the scale of a token may be smaller than its largest element needs.

        Only int4 with scales of its own: clipping an element or two makes its 15 steps finer.
        """
        return self.packed and self.stores_scales

    @property
    def mixes_keys(self) -> bool:
        """Whether the model's attention stores keys in a mixed basis, and queries see them so.

        An orthogonal matrix over the features of a head leaves every logit as it is, and makes
        features equally large, which 15 steps need: int4 with scales of its own. Not where the
        bias is left out, whose part of the logits is computed in the plain basis.
        """
        return self.packed and self.stores_scales and not self.without_key_bias

    @property
    def bits(self) -> int:
        """Bits of one value, without its scale."""
        return 4 if self.packed else jnp.dtype(self.dtype).itemsize * 8

    @property
    def bound(self) -> float:
        """Largest representable code: 7, 127, 448 (e4m3), 57344 (e5m2)."""
        return bound(jnp.dtype(self.dtype))

    @property
    def clipped_from(self) -> float:
        """Magnitude in units of the scale above which a value is clipped, not rounded."""
        return _CLIPPED_FROM[self.dtype]

    @property
    def lost_up_to(self) -> float:
        """Magnitude in units of the scale up to which a value is stored as 0.

        Taken as 0 for bfloat16 and float32, which lose nothing that XLA would not flush itself.
        """
        return _LOST_UP_TO[self.dtype]

    @property
    def storage_dtype(self) -> DType:
        """Type of the page arrays: fp8 as its bits and int4 packed, both in uint8.

        XLA's CPU backend turns a scatter into an fp8 or int4 array into a conversion of the whole
        array and back (jax 0.10.2 and 0.11.2); into uint8 it is done in place.
        """
        return jnp.dtype("uint8" if self.dtype.startswith("float8") or self.packed else self.dtype)

    @property
    def name(self) -> str:
        """Short name for reports, such as ``fp8_e4m3-tracked`` or ``int8-static-head``."""
        short = next(key for key, value in _NAMES.items() if value == self.dtype)
        bias = "unbiased" if self.without_key_bias else None
        return "-".join(p for p in (short, self.mode, self.granularity, bias) if p and p != "none")


def parse_kv_format(name: str, *, mode: str = "tracked", model_dtype: DType) -> KVFormat:
    """Format from a command line name.

    Args:
      name: ``auto`` (the model's own type), ``bf16``, ``f16``, ``f32``, ``fp8_e5m2``, ``fp8_e4m3``,
        ``int8`` or ``int4``; jax's names of the plain types are understood too.
      mode: Scale mode of the quantized types: ``static``, ``dynamic`` or ``tracked``. The plain
        types have no scales and always get mode ``none``.
      model_dtype: Type the model computes in; what ``auto`` means.

    Returns:
      The format; static scales are per KV head.

    Raises:
      ValueError: If the name, the mode or the model's type is unknown.
    """
    if mode not in _MODES[1:]:
        raise ValueError(f"KV cache {mode=} is unknown; choose one of {', '.join(_MODES[1:])}")
    if name == "auto":
        dtype = jnp.dtype(model_dtype).name
        if dtype not in _PLAIN:
            raise ValueError(
                f"{model_dtype=} cannot be a KV cache type; name one instead of 'auto'"
            )
        return KVFormat(dtype)
    if name not in _NAMES:
        raise ValueError(
            f"KV cache format {name!r} is unknown; choose one of auto, {', '.join(_NAMES)}"
        )
    dtype = _NAMES[name]
    return KVFormat(dtype, "none" if dtype in _PLAIN else mode)
