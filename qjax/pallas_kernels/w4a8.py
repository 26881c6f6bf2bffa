"""W4A8 with many rows: int4 codes become int8 ones once, exactly, and ``w8a8`` multiplies by them.

::

  matrix[n, k] = 16 * code[k, n]                               this kernel
  out = x_scale * column * sum_b scale[b] * sum_{k in b} x * matrix / 16      ``w8a8``, ``groups``

``weight_only_large`` unpacks the codes on their way to the tensor core, once for every 96 or so
tokens, into registers, from which ``wgmma`` takes them slowly: by the time of whole products on an
H200 some 94 cycles for 96 tokens, where the tensor core needs 48. Here both operands come from
shared memory, and 112 tokens take some 100 cycles: 6 to 14 % less time with 4096 rows and the four
shapes of Llama-3.1-8B, the writing included. That takes as long for any number of rows, so this is
for many. The matrix exists beside the weight while the product runs: ``k * n`` bytes, 117 MB for
gate and up of an 8B model.

One warpgroup is a thread block (CTA), without roles; several CTAs per multiprocessor overlap::

  words of 4 tiles, 64 features by 128 of k        registers, 128-bit loads, all at once
  per tile: codes -> int8 -> shared memory -> TMA
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from qjax.pallas_kernels import _codes, _layout, w8a8
from qjax.typing import Array, DType

MIN_ROWS = 256
"""Rows from which this is worth timing: with fewer, writing the matrix takes as long."""


@dataclasses.dataclass(frozen=True)
class Config(w8a8.Config):
    """How ``w8a8`` cuts up the work."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product as the kernel sees it: rows, contraction, output features, bytes of one output."""

    m: int
    k: int
    n: int
    out_itemsize: int = 2

    @property
    def product(self) -> w8a8.Problem:
        """The product with the int8 matrix."""
        return w8a8.Problem(
            self.m, self.k, self.n, "int8", out_itemsize=self.out_itemsize, groups=True
        )


def unsupported_reason(p: Problem) -> str | None:
    """Why this path cannot compute a product; None if it can."""
    return w8a8.unsupported_reason(p.product)


def config_unsupported_reason(config: w8a8.Config, p: Problem) -> str | None:
    """Why a config does not fit a problem; None if it does."""
    return w8a8.config_unsupported_reason(config, p.product)


def heuristic_config(p: Problem) -> Config:
    """A config for any supported problem."""
    return Config(**dataclasses.asdict(w8a8.heuristic_config(p.product)))


def search_space(p: Problem) -> list[Config]:
    """Configs worth timing for a problem: the expected best first."""
    return [Config(**dataclasses.asdict(c)) for c in w8a8.search_space(p.product)]


def matmul(
    x: Array,
    words: Array,
    scales: Array,
    column: Array,
    row_scale: Array,
    *,
    config: Config | None = None,
    out_dtype: DType = jnp.bfloat16,
    keep_splits: bool = False,
    rows: int | None = None,
    interpret: bool = False,
) -> Array:
    """``x @ weight`` for int4 codes in groups of 128, packed in ``_layout.int8_order``.

    Args:
      x: int8 codes of activations ``(m, k)``.
      words: Packed codes, int32 ``(k / 128, n / 64, 4, 256)``.
      scales: float32 ``(k / 128, 1, n)``, as ``weight_only_large`` takes them.
      column: float32 ``(n,)``, applied to the output.
      row_scale: float32 ``(m,)``, applied to the output; there may be more than ``m``.
      config, out_dtype, keep_splits, rows, interpret: See ``w8a8.matmul``.

    Returns:
      As ``w8a8.matmul``.

    Raises:
      NotImplementedError: If this path or the config does not support the problem; says why.
      ValueError: If there are not so many rows.
    """
    m, k = x.shape
    problem = Problem(m, k, words.shape[1] * _layout.BLOCK_N, jnp.dtype(out_dtype).itemsize)
    reason = unsupported_reason(problem)
    if reason is not None:
        raise NotImplementedError(f"w4a8.matmul: {reason}")
    # The matrix must not be made before the product is due: see ``dequantize.matmul``.
    x, words = lax.optimization_barrier((x, words))
    # The stored scales are for codes in the unit that bfloat16 leaves them in.
    _, rest = _codes.constant_multiplier("int4", "bfloat16")
    return w8a8.matmul(
        x,
        int8_codes(words, interpret=interpret),
        row_scale,
        column * jnp.float32(2.0**rest / 16),
        scales[:, 0],
        config=heuristic_config(problem) if config is None else config,
        out_dtype=out_dtype,
        keep_splits=keep_splits,
        rows=rows,
        interpret=interpret,
    )


def int8_codes(words: Array, *, interpret: bool = False) -> Array:
    """The codes of a weight packed in ``_layout.int8_order``, times 16.

    Args:
      words: int32 ``(k / 128, n / 64, 4, 256)``.
      interpret: Run in the Pallas interpreter, on any device.

    Returns:
      int8 ``(n, k)``.
    """
    # Imported on first use: see weight_only.
    from qjax.pallas_kernels import _int8_codes_body

    return _int8_codes_body.call(words, interpret=interpret)
