"""The only module that looks at a jax version or at private jax names."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3])

MOSAIC_GPU_MIN_JAX = (0, 11, 2)
"""Pallas Mosaic GPU kernels are written for this jax and later; the XLA backend runs on 0.10.2."""


def default_device() -> Any:
    """The device or platform name that is set as default in this thread; None if none is."""
    config: Any = jax.config  # its attributes are made at run time
    return config.jax_default_device


def compile_lowered(lowered: Any, options: dict[str, Any] | None) -> Any:
    """``lowered.compile(options)``, to be called with arrays on several devices too.

    jax 0.10 tells of int4 arrays that are committed to devices that they are not packed, and then
    refuses them to the program for packed ones, which they are.
    """
    compiled = lowered.compile(compiler_options=options)
    if JAX_VERSION < (0, 11):
        program = compiled._executable
        program._xla_in_layouts = [
            None if layout is None or layout.sub_byte_element_size_in_bits else layout
            for layout in program._xla_in_layouts
        ]
    return compiled


@functools.cache
def cudnn_unsupported_reason() -> str | None:
    """Why jax's internal interface to cuDNN's attention cannot be used; None if it can."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo
    except ImportError:
        return f"jax {jax.__version__} has no module jax._src.cudnn.fused_attention_stablehlo"
    library: Any = fused_attention_stablehlo
    names = inspect.signature(library.dot_product_attention).parameters
    wanted = {"scale", "mask_type", "return_residual"}
    known = {"CAUSAL", "PADDING"} <= set(dir(library.MaskType))
    if not wanted <= set(names) or not known or not hasattr(library, "check_cudnn_version"):
        return f"jax {jax.__version__} calls cuDNN's attention in another way"
    try:
        library.check_cudnn_version()  # what it does itself as soon as it is called
    except RuntimeError as error:
        return f"jax finds no cuDNN: {error}"
    return None


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_lengths: jax.Array,
    kv_lengths: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """cuDNN's flash attention with its log-sum-exp in float32. Every query sees every key.

    The public ``jax.nn.dot_product_attention`` rounds the log-sum-exp to 16 bits, too coarse to
    merge parts of a softmax by.

    Args:
      q: ``[b, t, q_heads, head_dim]``, bfloat16 or float16.
      k: ``[b, s, kv_heads, head_dim]``.
      v: Like ``k``.
      q_lengths: int32 ``[b]``, at least 1; what lies behind is padding, with undefined results.
      kv_lengths: int32 ``[b]``, at least 1.
      scale: Multiplier of the logits.

    Returns:
      ``[b, t, q_heads, head_dim]`` and float32 ``[b, q_heads, t]``, natural logarithms.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    library: Any = fused_attention_stablehlo
    out, lse = library.dot_product_attention(
        q,
        k,
        v,
        None,
        None,
        q_lengths,
        kv_lengths,
        scale=scale,
        mask_type=library.MaskType.PADDING,
        return_residual=True,
    )
    return out, lse


def cudnn_causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, with_lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """cuDNN's flash attention where query ``i`` sees the keys ``<= i``.

    Without lengths: with them it is slower.

    Args:
      q: ``[b, t, q_heads, head_dim]``, bfloat16 or float16.
      k: ``[b, t, kv_heads, head_dim]``.
      v: Like ``k``.
      scale: Multiplier of the logits.
      with_lse: Whether the log-sum-exp is computed too.

    Returns:
      As ``cudnn_attention``; None for the log-sum-exp if it is not asked for.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    library: Any = fused_attention_stablehlo
    result = library.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        mask_type=library.MaskType.CAUSAL,
        return_residual=with_lse,
    )
    return result if with_lse else (result, None)
