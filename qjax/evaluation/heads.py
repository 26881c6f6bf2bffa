"""The format of ``lm_head`` beside that of all other layers, as comparing scripts take it.

What is not quantized at all is what they compare with, and keeps its ``lm_head`` too. So does a
checkpoint that is quantized already; with another ``lm_head`` it is a second model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import jax

from qjax.formats import QuantFormat, parse_format
from qjax.quantize import quantize_tree
from qjax.typing import Params


def check_head_format(
    name: str, formats: Collection[QuantFormat | None], *, stored: bool = False
) -> None:
    """Refuse a format of ``lm_head`` that is not known or that would not be used.

    Args:
      name: Its command-line name.
      formats: Those of the other layers that are compared.
      stored: Whether the checkpoint is, or may be, quantized already.

    Raises:
      ValueError: If there is no such format, or ``lm_head`` would stay in 16 bits with all others.
    """
    if parse_format(name) is not None and not any(formats) and not stored:
        raise ValueError(
            f"--lm-head-format {name}: none of --formats quantizes anything, and beside such a one "
            "lm_head stays as it is; add a format, or leave it out"
        )


def head_beside(name: str, fmt: QuantFormat | None) -> str | None:
    """The name again, or None if ``lm_head`` stays as it is beside this format."""
    return None if fmt is None or parse_format(name) is None else name


def with_head(params: Params, rules: Mapping[str, QuantFormat]) -> Params:
    """The parameters of a checkpoint that is quantized already, with another ``lm_head``.

    Args:
      params: As loaded.
      rules: Those of ``qjax.checkpoints.layout.head_rules``.

    Raises:
      ValueError: If its ``lm_head`` is quantized too.
    """
    kernel = params["lm_head"]["kernel"]
    if not isinstance(kernel, jax.Array):
        raise ValueError(
            f"the checkpoint stores lm_head quantized already ({kernel.fmt.name}); leave "
            "--lm-head-format out"
        )
    return quantize_tree(params, rules)


def label(format_name: str, head_name: str | None) -> str:
    """Both in one: ``int4, lm_head int8``."""
    return format_name if head_name is None else f"{format_name}, lm_head {head_name}"
