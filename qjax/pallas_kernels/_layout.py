"""Memory layout of weights that a warpgroup loads straight into the registers of ``wgmma``.

``wgmma`` multiplies a 64-row operand A, held in registers, by an operand B in shared memory. The
weights are that operand A, transposed: 64 output features by 16 of the contraction per
instruction. Codes are stored so that each of the 128 threads finds those of its own fragment in
consecutive 32-bit words: one 128-bit load, no shuffle, no bank conflict.

A *weight tile* is 64 output features by 128 of the contraction (``BLOCK_K``). Thread ``t`` of warp
``t // 32`` and lane ``t % 32`` holds, for the column tile ``ct`` (8 columns) and ``e`` in (0, 1)::

  row(t, half) = 16 * warp + 8 * half + lane // 4        half in (0, 1)
  col(t, ct, e) = 8 * ct + 2 * (lane % 4) + e

* 4-bit: word ``s`` (one step of 16 columns) holds eight nibbles; nibble ``4 e + 2 c + half`` is the
  code of column tile ``2 s + c``. A mask therefore yields a pair ``e = 0, 1`` in the two halves of
  a register, as the packed 16-bit arithmetic wants it.
  For int8 activations nibbles become bytes ``2 e + c``, columns ``4 (lane % 4) + 2 e + c`` of the
  step: the contraction is put in that order before it is packed (``int8_order``).
* 8-bit: word ``s`` (one step of 8 columns) holds four bytes; byte ``2 half + e`` is the code of
  column tile ``s``.

Word ``4 i + j`` of thread ``t`` lies at ``(i * 128 + t) * 4 + j`` of the tile, and the tile is
shaped ``(4 or 8, 256)`` because a copy by the tensor memory accelerator (TMA) is limited to 256
elements per dimension. The whole matrix is int32 ``(k / 128, n / 64, 4 or 8, 256)``.

Codes are unsigned: integers are moved up by half their range, fp8 codes are their bit patterns.

References:
  PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"; Marlin (arXiv:2408.11743) and
  Machete, which reorder weights offline for the same reason.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from qjax.typing import Array

BLOCK_K = 128
"""Contraction length of a weight tile."""
BLOCK_N = 64
"""Output features of a weight tile: the rows of one ``wgmma``."""

PACKING_VERSION = 2
"""Of all that a packed weight holds: words, scales, offsets and columns. Checkpoints keep packed
weights, so whoever changes what packing gives counts this up (a test compares digests)."""

# Names of the axes into which (k, n) is cut; see the module's docstring.
_AXES = {4: ("k_tile", "i", "j", "c", "lane_k", "e"), 8: ("k_tile", "i", "j", "lane_k", "e")}
_N_AXES = ("n_tile", "warp", "half", "lane_n")
_EXTENT = {
    "i": {4: 2, 8: 4},
    "j": 4,
    "c": 2,
    "lane_k": 4,
    "e": 2,
    "warp": 4,
    "half": 2,
    "lane_n": 8,
}
_WORD_AXES = ("k_tile", "n_tile", "i", "warp", "lane_n", "lane_k", "j")
# Axes inside one word, most significant first.
_CODE_AXES = {4: ("e", "c", "half"), 8: ("half", "e")}


def _extents(bits: int, names: tuple[str, ...], k: int, n: int) -> list[int]:
    sizes = {"k_tile": k // BLOCK_K, "n_tile": n // BLOCK_N}
    for name in names:
        extent = _EXTENT.get(name)
        if extent is not None:
            sizes[name] = extent[bits] if isinstance(extent, dict) else extent
    return [sizes[name] for name in names]


def words_shape(k: int, n: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the packed words of a ``(k, n)`` weight with 4- or 8-bit codes."""
    return k // BLOCK_K, n // BLOCK_N, bits, 256


def pack_words(codes: Array, bits: int) -> Array:
    """Reorder and pack codes for ``wgmma``.

    Args:
      codes: Unsigned codes ``(k, n)``, uint8; ``k`` a multiple of 128 and ``n`` of 64.
      bits: 4 or 8.

    Returns:
      int32 ``(k / 128, n / 64, bits, 256)``.

    Raises:
      ValueError: If the shape is not a multiple of the weight tile.
    """
    k, n = codes.shape
    if k % BLOCK_K or n % BLOCK_N:
        raise ValueError(f"codes of shape {codes.shape} must be multiples of {BLOCK_K, BLOCK_N}")
    axes = _AXES[bits] + _N_AXES
    order = [axes.index(name) for name in _WORD_AXES + _CODE_AXES[bits]]
    tiles = codes.reshape(_extents(bits, axes, k, n)).transpose(order)
    tiles = tiles.reshape(*words_shape(k, n, bits), 32 // bits).astype(jnp.uint32)
    count = 32 // bits
    # _CODE_AXES flattened, the last axis counts codes from the least significant one.
    shifts = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(bits)
    words = (tiles << shifts.reshape(1, 1, 1, 1, count)).sum(-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


def unpack_words(words: Array, bits: int) -> Array:
    """The inverse of ``pack_words``.

    Args:
      words: int32 ``(k / 128, n / 64, bits, 256)``.
      bits: 4 or 8.

    Returns:
      Unsigned codes ``(k, n)``, uint8.
    """
    k, n = words.shape[0] * BLOCK_K, words.shape[1] * BLOCK_N
    count = 32 // bits
    shifts = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(bits)
    unsigned = lax.bitcast_convert_type(words, jnp.uint32)[..., None]
    codes = (unsigned >> shifts.reshape(1, 1, 1, 1, count)) & jnp.uint32(2**bits - 1)
    axes = _WORD_AXES + _CODE_AXES[bits]
    order = [axes.index(name) for name in _AXES[bits] + _N_AXES]
    tiles = codes.astype(jnp.uint8).reshape(_extents(bits, axes, k, n)).transpose(order)
    return tiles.reshape(k, n)


def int8_order(codes: Array, *, inverse: bool = False) -> Array:
    """4-bit codes in the order that ``_unpack.unpack_int8`` turns into the usual one.

    Args:
      codes: ``(k, n)``, ``k`` a multiple of 16.
      inverse: Undo it.

    Returns:
      The same, with row ``4 q + 2 e + c`` of each 16 moved to ``8 c + 2 q + e``.
    """
    k, n = codes.shape
    if inverse:
        return codes.reshape(k // 16, 2, 4, 2, n).transpose(0, 2, 3, 1, 4).reshape(k, n)
    return codes.reshape(k // 16, 4, 2, 2, n).transpose(0, 3, 1, 2, 4).reshape(k, n)


def swap_halves(x: Array, axis: int = -1, *, tile: int = 1, alternate: bool) -> Array:
    """Let the tiles of an axis's left half and of its right half take turns, or undo that.

    Args:
      x: Of which ``axis`` is a multiple of ``2 * tile`` long.
      axis: The axis.
      tile: Elements that stay together.
      alternate: False for the inverse.

    Returns:
      Like ``x``.
    """
    axis %= x.ndim
    sizes = (2, -1, tile) if alternate else (-1, 2, tile)
    apart = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
    return jnp.swapaxes(apart, axis, axis + 1).reshape(x.shape)
