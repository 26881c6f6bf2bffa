"""What a quantized value is made of: storage type, tile of one scale, symmetry.

A ``QuantFormat`` is a frozen, hashable description and holds no arrays, so it can be a static field
of a pytree and an argument of a jitted function. The named presets cover the field's formats; any
other combination is composed by calling ``QuantFormat`` directly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

_INT_BITS = {f"int{bits}": bits for bits in range(2, 9)}
_FLOAT_BITS = {"float8_e4m3fn": 8, "float8_e5m2": 8, "float4_e2m1fn": 4}
_GRANULARITIES = ("tensor", "channel", "group", "block", "token")
_SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu")


@dataclasses.dataclass(frozen=True)
class QuantFormat:
    """How an array is quantized.

    Attributes:
      qtype: Stored type: ``int2`` to ``int8``, ``float8_e4m3fn``, ``float8_e5m2`` or
        ``float4_e2m1fn``. Integers are held in int4 or int8, whichever they fit in (XLA has no
        other usable type on every device); checkpoints store them at their own width.
      granularity: The tile that shares one scale: ``tensor`` (the two axes of the matrix),
        ``channel`` (one per output feature), ``group`` (``group_size`` elements along the
        contraction axis), ``block`` (2-D), or ``token`` (activations: one per row).
      group_size: Tile length along the contraction axis; only for ``group``.
      block: ``(contraction, output)`` tile; only for ``block``.
      symmetric: Without a zero point. Float types are always symmetric.
      scale_dtype: Type in which scales are held. float32 unless a checkpoint stores another.
      scale_steps: For groups of symmetric integers: a scale is a whole multiple, from 1 to so many,
        of a step that all groups of an output feature share. Code times multiple fits int8, so that
        products with int8 activations need not scale the sum of every group (QServe,
        arXiv:2405.04532). None: every scale is free. Checkpoints of other engines hold the scales,
        exactly, but not this number; it is found again in those of compressed-tensors.
      activation: For W8A8: the format in which the activations meeting this weight are quantized.
      dynamic: Activation formats only: scale computed per call (True) or stored with the weight.

    Raises:
      ValueError: If the combination is not meaningful; the message says which field to change.
    """

    qtype: str
    granularity: str = "channel"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"
    scale_steps: int | None = None
    activation: QuantFormat | None = None
    dynamic: bool = True

    def __post_init__(self) -> None:
        known = (*_INT_BITS, *_FLOAT_BITS)
        if self.qtype not in known:
            raise ValueError(f"unknown qtype={self.qtype!r}; choose one of {', '.join(known)}")
        if self.granularity not in _GRANULARITIES:
            raise ValueError(
                f"unknown granularity={self.granularity!r}; "
                f"choose one of {', '.join(_GRANULARITIES)}"
            )
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"unknown scale_dtype={self.scale_dtype!r}; "
                f"choose one of {', '.join(_SCALE_DTYPES)}"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size={self.group_size} with granularity={self.granularity!r}: "
                "'group' needs a group_size and the others take none"
            )
        for size in (self.group_size, *(self.block or ())):
            if size is not None and not isinstance(size, int):
                raise ValueError(f"a tile of {size!r} elements: sizes must be of type int")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be positive; use 'channel' for -1")
        if (self.granularity == "block") != (self.block is not None):
            raise ValueError(
                f"block={self.block} with granularity={self.granularity!r}: "
                "'block' needs a (contraction, output) block and the others take none"
            )
        if self.block is not None and min(self.block) < 1:
            raise ValueError(f"block={self.block} must be positive")
        if self.is_float and not self.symmetric:
            raise ValueError(f"qtype={self.qtype!r} has no zero point; use symmetric=True")
        if self.scale_steps is not None:
            self._check_scale_steps(self.scale_steps)
        if self.activation is not None and self.activation.activation is not None:
            raise ValueError("an activation format cannot itself have an activation format")

    def _check_scale_steps(self, steps: int) -> None:
        if self.is_float or self.bits > 7 or not self.symmetric or self.group_size is None:
            raise ValueError(
                f"scale_steps={steps} of {self.name}: only symmetric integers of fewer than 8 bits "
                "in groups have steps; use scale_steps=None"
            )
        if self.scale_dtype != "float32":
            raise ValueError(
                f"scale_steps={steps} with scale_dtype={self.scale_dtype!r}: multiples are exact "
                "in float32 only; use scale_dtype='float32', or scale_steps=None for free scales"
            )
        most = 2 ** (8 - self.bits)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 < steps <= most:
            raise ValueError(
                f"scale_steps={steps!r} of {self.qtype} must be a whole number from 2 to {most}: a "
                "code times a multiple must fit int8"
            )

    @property
    def is_float(self) -> bool:
        return self.qtype in _FLOAT_BITS

    @property
    def is_int(self) -> bool:
        return not self.is_float

    @property
    def bits(self) -> int:
        """Bits per stored code, without scales."""
        return _FLOAT_BITS[self.qtype] if self.is_float else _INT_BITS[self.qtype]

    @property
    def storage_dtype(self) -> Any:
        """The jnp dtype in which codes are held in memory."""
        if self.is_float:
            return jnp.dtype(self.qtype)
        return jnp.dtype("int4" if self.bits <= 4 else "int8")

    @property
    def qmin(self) -> float:
        """Smallest code. Symmetric integers give up the most negative one: -7, not -8."""
        if self.is_float:
            return -self.qmax
        return -self.qmax if self.symmetric else -(2.0 ** (self.bits - 1))

    @property
    def qmax(self) -> float:
        """Largest code."""
        if self.is_float:
            return float(jnp.finfo(self.storage_dtype).max)
        return 2.0 ** (self.bits - 1) - 1

    @property
    def bound(self) -> float:
        """Largest representable magnitude: ``scale = absmax / bound``."""
        return self.qmax

    @property
    def name(self) -> str:
        """A short label, such as ``int4_g128`` or ``float8_e4m3fn_channel``."""
        tile = self.granularity
        if self.group_size is not None:
            tile = f"g{self.group_size}"
        if self.scale_steps is not None:
            tile += f"x{self.scale_steps}"
        if self.block is not None:
            tile = "block" + "x".join(map(str, self.block))
        label = f"{self.qtype}_{tile}" + ("" if self.symmetric else "_asym")
        return label if self.activation is None else f"{label}+{self.activation.name}"

    def replace(self, **changes: Any) -> QuantFormat:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def tiles(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Extent of one scale's tile along every axis of an array.

        Args:
          shape: Shape of the array to be quantized.
          axis: Contraction axis, the one that groups run along.

        Returns:
          One positive length per axis. Leading (batch, expert) axes have tiles of one, but for
          ``channel`` and ``token``, where every axis except the contraction has.
        """
        ndim = len(shape)
        if ndim == 0:
            raise ValueError("cannot quantize a scalar; it has no contraction axis")
        if not -ndim <= axis < ndim:
            raise ValueError(f"{axis=} is out of range for an array of shape {shape}")
        axis %= ndim
        tiles = [1] * ndim
        if self.granularity in ("channel", "token"):
            tiles[axis] = shape[axis]
        elif self.granularity == "group":
            assert self.group_size is not None
            tiles[axis] = min(self.group_size, shape[axis])
        else:
            if ndim < 2 and self.granularity == "block":
                raise ValueError(f"a 2-D block needs a matrix; got an array of shape {shape}")
            if ndim >= 2 and axis < ndim - 2:
                raise ValueError(
                    f"{axis=} of shape {shape}: {self.granularity!r} needs the contraction axis "
                    "among the last two; transpose the array"
                )
            other = (ndim - 1) if axis == ndim - 2 else ndim - 2
            extents = self.block if self.block is not None else (shape[axis], shape[other])
            tiles[axis] = min(extents[0], shape[axis])
            if ndim >= 2:
                tiles[other] = min(extents[1], shape[other])
        return tuple(max(1, tile) for tile in tiles)


def _group(bits: int, size: int, symmetric: bool = True) -> QuantFormat:
    return QuantFormat(f"int{bits}", "group", group_size=size, symmetric=symmetric)


INT4_G32 = _group(4, 32)
INT4_G64 = _group(4, 64)
INT4_G128 = _group(4, 128)
INT4_G32_ASYM = _group(4, 32, symmetric=False)
INT4_G64_ASYM = _group(4, 64, symmetric=False)
INT4_G128_ASYM = _group(4, 128, symmetric=False)
INT4_CHANNEL = QuantFormat("int4")
INT4_CHANNEL_ASYM = QuantFormat("int4", symmetric=False)
INT3_G128 = _group(3, 128)
INT2_G32_ASYM = _group(2, 32, symmetric=False)
INT8_CHANNEL = QuantFormat("int8")
INT8_TENSOR = QuantFormat("int8", "tensor")
INT8_G128 = _group(8, 128)
FP8_E4M3_CHANNEL = QuantFormat("float8_e4m3fn")
FP8_E4M3_TENSOR = QuantFormat("float8_e4m3fn", "tensor")
FP8_E4M3_BLOCK128 = QuantFormat("float8_e4m3fn", "block", block=(128, 128))
FP8_E5M2_CHANNEL = QuantFormat("float8_e5m2")
FP8_E5M2_TENSOR = QuantFormat("float8_e5m2", "tensor")
FP8_E5M2_BLOCK128 = QuantFormat("float8_e5m2", "block", block=(128, 128))

# Activation formats.
FP8_PER_TOKEN = QuantFormat("float8_e4m3fn", "token")
FP8_PER_TENSOR = QuantFormat("float8_e4m3fn", "tensor", dynamic=False)
FP8_TOKEN_G128 = QuantFormat("float8_e4m3fn", "group", group_size=128)
INT8_PER_TOKEN = QuantFormat("int8", "token")
INT8_PER_TENSOR = QuantFormat("int8", "tensor", dynamic=False)

W8A8_FP8 = FP8_E4M3_CHANNEL.replace(activation=FP8_PER_TOKEN)
W8A8_FP8_BLOCK = FP8_E4M3_BLOCK128.replace(activation=FP8_TOKEN_G128)
W8A8_INT8 = INT8_CHANNEL.replace(activation=INT8_PER_TOKEN)
W4A8_INT8 = INT4_G128.replace(scale_steps=16, activation=INT8_PER_TOKEN)

FORMATS: dict[str, QuantFormat | None] = {
    "none": None,
    "bf16": None,
    "fp8": FP8_E4M3_CHANNEL,
    "fp8_tensor": FP8_E4M3_TENSOR,
    "fp8_block": FP8_E4M3_BLOCK128,
    "fp8_e5m2": FP8_E5M2_CHANNEL,
    "fp8_e5m2_tensor": FP8_E5M2_TENSOR,
    "int8": INT8_CHANNEL,
    "int8_tensor": INT8_TENSOR,
    "int8_g128": INT8_G128,
    "int4": INT4_G128,
    "int4_g32": INT4_G32,
    "int4_g64": INT4_G64,
    "int4_g128": INT4_G128,
    "int4_channel": INT4_CHANNEL,
    "int4_g32_asym": INT4_G32_ASYM,
    "int4_g64_asym": INT4_G64_ASYM,
    "int4_g128_asym": INT4_G128_ASYM,
    "int3_g128": INT3_G128,
    "w8a8_fp8": W8A8_FP8,
    "w8a8_fp8_block": W8A8_FP8_BLOCK,
    "w8a8_int8": W8A8_INT8,
    "w4a8_int8": W4A8_INT8,
}
"""Names understood by the command line; ``none`` and ``bf16`` leave weights as they are."""


def parse_format(name: str) -> QuantFormat | None:
    """The format of a command-line name.

    Args:
      name: A key of ``FORMATS``.

    Returns:
      The format, or None for unquantized weights.

    Raises:
      ValueError: If the name is not known; lists those that are.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
