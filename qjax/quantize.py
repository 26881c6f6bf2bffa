"""``quantize``, ``dequantize``, ``fake_quantize`` and their tree versions: round to nearest (RTN).

Calibrated methods (GPTQ, AWQ, ...) return the same ``QuantizedArray`` with better codes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import numerics
from qjax.formats import QuantFormat
from qjax.quantized_array import QuantizedArray, packed_nbytes
from qjax.typing import Array, DType, PyTree


def compute_scale(x: Array, fmt: QuantFormat, *, axis: int = -2) -> tuple[Array, Array | None]:
    """Scale and zero point of every tile of ``x``.

    Args:
      x: ``(..., k, n)`` values.
      fmt: The format.
      axis: Contraction axis, along which groups run.

    Returns:
      ``(scale, zero_point)`` with the rank of ``x``; zero_point is None for symmetric formats.
    """
    tiles = fmt.tiles(x.shape, axis)
    if fmt.symmetric:
        absmax = numerics.tile_absmax(x, tiles)
        return numerics.absmax_scale(absmax, fmt, numerics.scale_step(absmax, fmt, axis)), None
    return numerics.minmax_scale(*numerics.tile_reduce(x, tiles), fmt)


def encode(
    x: Array,
    scale: Array,
    zero_point: Array | None,
    fmt: QuantFormat,
    tiles: tuple[int, ...],
    *,
    dtype: DType | None = None,
) -> Array:
    """Nearest codes of ``x`` for given scales: ``clip(round(x / scale) + zero_point)``.

    Args:
      x: Values, any float type.
      scale: Scales in any type, one per tile.
      zero_point: int8 in the shape of ``scale``, or None.
      fmt: The format.
      tiles: Tile extents, one per axis of ``x``.
      dtype: A wider type to leave the codes in; ``fmt.storage_dtype`` by default.

    Returns:
      Codes of ``x.shape``; never NaN or inf.
    """
    wide = numerics.expand_tiles(scale.astype(jnp.float32), x.shape, tiles)
    ratio = x.astype(jnp.float32) / wide
    if zero_point is not None:
        offset = numerics.expand_tiles(zero_point.astype(jnp.float32), x.shape, tiles)
        # Rounded before the shift, as every published quantizer does; NaN must become the code of
        # zero, which here is the zero point.
        ratio = jnp.where(jnp.isnan(ratio), jnp.float32(0), jnp.rint(ratio)) + offset
    dtype = fmt.storage_dtype if dtype is None else dtype
    return numerics.cast_saturating(ratio, dtype, lower=fmt.qmin, upper=fmt.qmax)


def quantize(
    x: Array,
    fmt: QuantFormat,
    *,
    axis: int = -2,
    dtype: DType | None = None,
    scale: Array | None = None,
    zero_point: Array | None = None,
) -> QuantizedArray:
    """Quantize an array, round to nearest.

    Args:
      x: ``(..., k, n)`` floating-point values.
      fmt: The format.
      axis: Contraction axis ``k``: 0 (or -2) for a kernel ``(in, out)``, -1 for activations.
      dtype: What ``dequantize`` shall return; ``x.dtype`` by default.
      scale: Use these scales instead of computing them (static quantization); the rank of ``x``.
      zero_point: With ``scale``, for asymmetric formats; int8.

    Returns:
      A ``QuantizedArray`` of the logical shape of ``x``.

    Raises:
      ValueError: If ``x`` or ``dtype`` is not floating point, ``x`` is quantized already, ``fmt``
        is no ``QuantFormat``, or the format does not fit the shape.
    """
    if not isinstance(fmt, QuantFormat):
        raise ValueError(f"{fmt=} is no QuantFormat; parse_format('int4') and the like give one")
    if isinstance(x, QuantizedArray):
        raise ValueError(f"the array is quantized already ({x.fmt.name}); dequantize it first")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"only floating-point arrays are quantized; got {x.dtype}")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{dtype=} must be a floating-point type; integers would cut values off")
    if scale is None and zero_point is not None:
        raise ValueError("zero_point was given without scale; give both or neither")
    if scale is not None and scale.ndim != x.ndim:
        raise ValueError(f"{scale.shape=} must have the rank of x, {x.shape}")
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    return _quantize(x, scale, zero_point, fmt, axis, dtype)


# Jitted as a whole: called eagerly on a large weight, the separate operations would each hold a
# float32 copy of it.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _quantize(
    x: Array, scale: Array | None, zero_point: Array | None, fmt: QuantFormat, axis: int, dtype: Any
) -> QuantizedArray:
    if x.dtype == jnp.float64:  # scales are float32: beyond it is inf, which saturates
        x = x.astype(jnp.float32)
    if scale is None:
        scale, zero_point = compute_scale(x, fmt, axis=axis)
    qvalue = encode(x, scale, zero_point, fmt, fmt.tiles(x.shape, axis))
    return QuantizedArray.make(qvalue, scale, fmt, zero_point=zero_point, dtype=dtype)


def dequantize(x: QuantizedArray | Array, dtype: DType | None = None) -> Array:
    """The values that ``x`` stands for; a plain array is returned as it is (cast to ``dtype``)."""
    if isinstance(x, QuantizedArray):
        return x.dequantize(dtype)
    return x if dtype is None else x.astype(dtype)


def fake_quantize(x: Array, fmt: QuantFormat, *, axis: int = -2) -> Array:
    """Quantize and dequantize, with the identity as gradient (straight-through estimator).

    Args:
      x: ``(..., k, n)`` values.
      fmt: The format.
      axis: Contraction axis.

    Returns:
      Values of ``x.shape`` and ``x.dtype`` on the format's grid.

    References:
      Bengio et al., arXiv:1308.3432.
    """
    codes = quantize(jax.lax.stop_gradient(x), fmt, axis=axis)
    # XLA for GPUs drops a conversion to fp8 and back as excess precision, the rounding with it.
    rounded = jax.lax.optimization_barrier(codes).dequantize(x.dtype)
    # x + stop_gradient(rounded - x) would round twice in bf16; this form returns `rounded` exactly.
    return straight_through(x, rounded)


@jax.custom_vjp
def straight_through(x: Array, rounded: Array) -> Array:
    """``rounded``, exactly, with the gradient of ``x``; both of the same shape and type."""
    return rounded


def _pass_fwd(x: Array, rounded: Array) -> tuple[Array, None]:
    return rounded, None


def _pass_bwd(_: None, grad: Array) -> tuple[Array, Array]:
    return grad, jnp.zeros_like(grad)


straight_through.defvjp(_pass_fwd, _pass_bwd)


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a ``QuantizedArray``; the ``is_leaf`` of tree maps over parameters."""
    return isinstance(x, QuantizedArray)


def path_string(path: tuple[Any, ...]) -> str:
    """``model/layers_0/mlp/up_proj/kernel`` for a key path of ``jax.tree_util``."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def match_rules(
    paths: list[str], rules: Mapping[str, QuantFormat | None]
) -> dict[str, QuantFormat | None]:
    """The format of every path that some rule matches (first match wins).

    Args:
      paths: Slash-separated parameter paths.
      rules: Regular expression (matched against the whole path) to format; None leaves the
        parameter as it is.

    Returns:
      ``{path: format}`` for the paths that matched.

    Raises:
      ValueError: If a rule is no regular expression, or matches no path: a misspelt rule would
        otherwise leave a layer unquantized in silence.
    """
    compiled: list[tuple[str, re.Pattern[str], QuantFormat | None]] = []
    for pattern, fmt in rules.items():
        try:
            compiled.append((pattern, re.compile(pattern), fmt))
        except re.error as error:
            raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None
    unused = {pattern for pattern, _, _ in compiled}
    chosen: dict[str, QuantFormat | None] = {}
    for path in paths:
        for pattern, regex, fmt in compiled:
            if regex.fullmatch(path):
                # A rule shadowed by an earlier one still matches something: only the first wins.
                unused.discard(pattern)
                chosen.setdefault(path, fmt)
    if unused:
        raise ValueError(
            f"rules {sorted(unused)} match none of the {len(paths)} parameters, such as "
            f"{paths[:3]}; rules are matched against the whole path"
        )
    return chosen


def quantize_tree(
    params: PyTree,
    rules: Mapping[str, QuantFormat | None],
    *,
    axis: int = -2,
    quantizer: Callable[..., QuantizedArray] = quantize,
) -> PyTree:
    """Quantize the leaves of a parameter tree that the rules choose.

    Args:
      params: Nested dictionaries of arrays, such as Flax Linen parameters.
      rules: Regular expression on the whole slash-separated path to a format, or to None to keep
        the leaf; the first match wins and leaves without a match are kept. Example:
        ``{r".*lm_head.*": None, r".*/(q|k|v|o)_proj/kernel": INT4_G128}``.
      axis: Contraction axis of the chosen leaves.
      quantizer: ``quantize`` or a function with its signature.

    Returns:
      The tree with ``QuantizedArray`` leaves.

    Raises:
      ValueError: If a rule matches nothing, or chooses a leaf that is no matrix.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    paths = [path_string(path) for path, _ in flat]
    chosen = match_rules(paths, rules)
    leaves = []
    for path, (_, leaf) in zip(paths, flat, strict=True):
        fmt = chosen.get(path)
        if fmt is None:
            leaves.append(leaf)
        elif is_quantized(leaf):
            raise ValueError(f"{path} is quantized already ({leaf.fmt.name}); dequantize it first")
        elif leaf.ndim < 2:
            raise ValueError(f"{path} of shape {leaf.shape} is no matrix; exclude it by a rule")
        else:
            leaves.append(quantizer(leaf, fmt, axis=axis))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def dequantize_tree(params: PyTree, dtype: DType | None = None) -> PyTree:
    """Replace every ``QuantizedArray`` of a tree by its values."""
    return jax.tree_util.tree_map(
        lambda x: x.dequantize(dtype) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def quantized_nbytes(tree: PyTree) -> int:
    """Bytes of all leaves, sub-byte types packed; works on abstract values (``eval_shape``) too.

    A Python number counts as the array that jax makes of it: a bool 1 byte, an int or a float 4.

    Raises:
      ValueError: If a leaf is neither an array nor a number, such as a string.
    """
    total = 0
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, bool | int | float | complex) and not isinstance(x, np.generic):
            x = jax.ShapeDtypeStruct((), jnp.result_type(type(x)))
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(
                f"{path_string(path) or 'the tree'} is {x!r}, neither an array nor a number; leave "
                "it out"
            )
        total += packed_nbytes(x.shape, x.dtype)
    return total
