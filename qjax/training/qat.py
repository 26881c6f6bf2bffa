"""Quantization-aware training: the forward pass sees what will be quantized as it will be.

That is the weights and, where the format says so or a KV cache type is named, the inputs of linear
layers per token, and keys and values per token and head (keys before their rotation, which changes
the largest magnitude of a head a little; the cache rounds them after it).

Gradients pass the rounding as if it were not there (straight-through), so the full-precision
kernels are trained to be good after rounding. Scales either cover the range of a tile, computed
anew at every step, or are learned themselves (learned step size): then their logarithms stand
beside every kernel in the parameter tree, and saturated weights, which give no gradient to
themselves, give it to their scale.

References:
  Bengio et al., arXiv:1308.3432 (straight-through); Esser et al., LSQ, arXiv:1902.08153.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.calibration.scale_search import search_scale
from qjax.evaluation.memory import LINEAR_KERNELS
from qjax.formats import QuantFormat
from qjax.nn import QuantDense
from qjax.quantize import fake_quantize, is_quantized, quantize, straight_through
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array, PyTree

LOG_SCALE, ZERO_POINT, MULTIPLE = "qat_log_scale", "qat_zero_point", "qat_multiple"
"""Names of the leaves beside a kernel."""


def add_scales(params: Mapping[str, Any], fmt: QuantFormat) -> dict[str, Any]:
    """Put learned scales beside the kernels of all linear layers but ``lm_head``.

    Args:
      params: Parameters in float32; kernels may be quantized in ``fmt`` already (by GPTQ, say),
        then training begins with their codes and scales.
      fmt: Weight format.

    Returns:
      The tree with float32 kernels and, beside each, ``log(scale)`` and the zero points of
      asymmetric formats, which stay as they are. With ``scale_steps`` it is the logarithm of the
      steps, and the multiples stay as they are. Scales of plain kernels are those with the least
      square error.

    Raises:
      ValueError: If a kernel is quantized in another format.
    """

    def node(path: str, parts: dict[str, Any]) -> dict[str, Any]:
        kernel = parts["kernel"]
        if is_quantized(kernel):
            # Its scales may be of another type; multiples of a step are of one only.
            wanted = fmt if fmt.scale_steps else fmt.replace(scale_dtype=kernel.fmt.scale_dtype)
            if kernel.fmt != wanted:
                raise ValueError(
                    f"{path} is quantized as {kernel.fmt.name}, training is for {fmt.name}; start "
                    "from a checkpoint in this format, or from an unquantized one"
                )
            scale, zero = kernel.scale, kernel.zero_point
            kernel = kernel.dequantize(jnp.float32)
        else:
            importance = jnp.ones((kernel.shape[0],), jnp.float32)
            scale, zero = jax.jit(search_scale, static_argnums=2)(kernel, importance, fmt)
        new = parts | {"kernel": kernel}
        if fmt.scale_steps is not None:
            step, _ = numerics.find_scale_step(scale, fmt.scale_steps)
            new[MULTIPLE] = jnp.rint(scale / step)
            scale = step
        if zero is not None:
            new[ZERO_POINT] = zero.astype(jnp.float32)
        return new | {LOG_SCALE: jnp.log(scale.astype(jnp.float32))}

    return _map_linears(params, node)


def fake_quantized(params: Mapping[str, Any], fmt: QuantFormat) -> dict[str, Any]:
    """Parameters with the kernels of all linear layers but ``lm_head`` on the format's grid.

    Args:
      params: Unquantized parameters, with or without the scales of ``add_scales``.
      fmt: Weight format.

    Returns:
      The tree that the model takes: the same shapes and dtypes, without scales.

    Raises:
      ValueError: If the format also quantizes activations, which parameters cannot show.
    """
    if fmt.activation is not None:
        raise ValueError(f"{fmt.name} quantizes activations too; use apply_fake_quantized")
    return _on_grid(params, fmt)


def apply_fake_quantized(
    module: nn.Module,
    params: Mapping[str, Any],
    fmt: QuantFormat,
    *args: Any,
    kv_qtype: str | None = None,
) -> Any:
    """``module.apply`` with everything fake-quantized that the formats quantize.

    Args:
      module: A ``Decoder``.
      params: See ``fake_quantized``.
      fmt: Format of weights and, where it has one, of activations (dynamic, per token).
      *args: Tokens and the other arguments of the module.
      kv_qtype: Type of the KV cache, such as ``int8`` or ``float8_e4m3fn``; None leaves it plain.

    Returns:
      What the module returns; differentiable, roundings passing gradients straight through.

    Raises:
      ValueError: If activations have static scales.
    """
    if fmt.activation is not None and not fmt.activation.dynamic:
        raise ValueError(f"{fmt.name} has static activation scales; train with a dynamic format")
    heads = None if kv_qtype is None else QuantFormat(kv_qtype, "token")

    def layer(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, QuantDense) or context.module.name == "lm_head":
            return call(*args, **kwargs)
        if fmt.activation is not None:
            args = (fake_quantize(args[0], fmt.activation, axis=-1), *args[1:])
        out = call(*args, **kwargs)
        if heads is None or context.module.name not in ("k_proj", "v_proj"):
            return out
        split = out.reshape(*out.shape[:-1], -1, module.config.head_dim)  # type: ignore[attr-defined]
        return fake_quantize(split, heads, axis=-1).reshape(out.shape)

    with nn.intercept_methods(layer):
        return module.apply({"params": _on_grid(params, fmt)}, *args)


def _on_grid(params: Mapping[str, Any], fmt: QuantFormat) -> dict[str, Any]:
    def node(path: str, parts: dict[str, Any]) -> dict[str, Any]:
        del path
        if LOG_SCALE not in parts:
            return parts | {"kernel": fake_quantize(parts["kernel"], fmt)}
        scales = parts[LOG_SCALE], parts.get(ZERO_POINT), fmt, parts.get(MULTIPLE)
        value = learned_step(parts["kernel"], *scales)
        return _without_scales(parts) | {"kernel": value}

    return _map_linears(params, node)


def learned_step(
    kernel: Array,
    log_scale: Array,
    zero_point: Array | None,
    fmt: QuantFormat,
    multiple: Array | None = None,
) -> Array:
    """A kernel ``(k, n)`` on the grid of its scales, with gradients to both.

    With ``multiple``, the multiples of ``scale_steps``, ``log_scale`` is that of the steps.
    """
    tiles = fmt.tiles(kernel.shape, 0)

    def wide(values: Array) -> Array:
        return numerics.expand_tiles(values, kernel.shape, tiles)

    scale = jnp.exp(log_scale)
    if multiple is not None:
        scale = scale * jax.lax.stop_gradient(multiple)
    stored = _stored_scale(log_scale, multiple, fmt).astype(jnp.float32)
    scale = wide(straight_through(scale, stored))
    zero = jnp.zeros((1, 1), jnp.float32) if zero_point is None else wide(zero_point)
    low = jnp.float32(-fmt.bound if fmt.is_float else fmt.qmin) - jax.lax.stop_gradient(zero)
    high = jnp.float32(fmt.bound if fmt.is_float else fmt.qmax) - jax.lax.stop_gradient(zero)
    code = kernel.astype(jnp.float32) / scale
    nearest = jnp.rint(code)
    if fmt.is_float:
        nearest = numerics.cast_saturating(code, fmt.storage_dtype).astype(jnp.float32)
    code = code + jax.lax.stop_gradient(nearest - code)
    # `where`: the gradient of clip is halved where a value is exactly the limit, as codes are.
    code = jnp.where(code < low, low, jnp.where(code > high, high, code))
    return (code * scale).astype(kernel.dtype)


def _stored_scale(log_scale: Array, multiple: Array | None, fmt: QuantFormat) -> Array:
    if multiple is not None:
        return numerics.round_step(jnp.exp(log_scale)) * multiple
    return numerics.round_scale(jnp.exp(log_scale), fmt.scale_dtype)


def quantize_trained(params: Mapping[str, Any], fmt: QuantFormat, dtype: Any) -> dict[str, Any]:
    """What was trained as ``QuantizedArray`` kernels, exactly what ``fake_quantized`` stands for.

    Args:
      params: Trained parameters, with or without learned scales.
      fmt: The format they were trained for.
      dtype: Result type of the quantized kernels, and type of what is not quantized.
    """

    def node(path: str, parts: dict[str, Any]) -> dict[str, Any]:
        del path
        scale = zero = None
        if LOG_SCALE in parts:
            scale = _stored_scale(parts[LOG_SCALE], parts.get(MULTIPLE), fmt)
            zero = parts[ZERO_POINT].astype(jnp.int8) if ZERO_POINT in parts else None
        value = quantize(parts["kernel"], fmt, dtype=dtype, scale=scale, zero_point=zero)
        return _without_scales(parts) | {"kernel": value}

    def plain(leaf: Any) -> Any:
        return leaf if isinstance(leaf, QuantizedArray) else leaf.astype(dtype)

    return jax.tree_util.tree_map(plain, _map_linears(params, node), is_leaf=is_quantized)


def _without_scales(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: leaf for k, leaf in parts.items() if k not in (LOG_SCALE, ZERO_POINT, MULTIPLE)}


def _map_linears(
    tree: Mapping[str, Any], node: Callable[[str, dict[str, Any]], dict[str, Any]], prefix: str = ""
) -> PyTree:
    """Replace the dictionaries that hold the kernel of a linear layer."""
    out = {}
    for name, child in tree.items():
        path = f"{prefix}{name}"
        if not isinstance(child, Mapping):
            out[name] = child
        elif "kernel" in child and re.fullmatch(LINEAR_KERNELS, f"{path}/kernel"):
            out[name] = node(path, dict(child))
        else:
            out[name] = _map_linears(child, node, f"{path}/")
    return out
