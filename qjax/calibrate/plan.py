"""Choose the formats of a model's layers for a target size, from measured output errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.calibrate.linears import GROUPS, Batch, collect, get_at
from qjax.calibration.mixed_precision import choose_formats, sensitivity, stored_bits
from qjax.formats import QuantFormat
from qjax.models.decoder import DecoderLayer
from qjax.typing import Array


def block_sensitivities(
    module: DecoderLayer,
    params: dict[str, Any],
    batches: Sequence[Batch],
    candidates: Sequence[QuantFormat],
) -> dict[str, list[float]]:
    """Squared relative output error of every kernel of a block in every candidate format.

    Args:
      module: The block.
      params: Its original parameters.
      batches: What enters it in the original model.
      candidates: Formats to try.

    Returns:
      Path of the kernel in the block to one error per candidate.
    """
    stats = collect(module, params, None, batches, GROUPS)
    out = {}
    for group in GROUPS:
        for member in group.members:
            weight: Array = get_at(params, f"{member}/kernel")
            hessian = stats[group.tap].hessian
            out[f"{member}/kernel"] = [
                float(sensitivity(weight, hessian, fmt)) for fmt in candidates
            ]
    return out


def plan_formats(
    errors: Mapping[str, Sequence[float]],
    shapes: Mapping[str, tuple[int, int]],
    candidates: Sequence[QuantFormat],
    target_bits: float,
) -> dict[str, QuantFormat]:
    """A format for each kernel, so that together they take ``target_bits`` bits per weight at most.

    Args:
      errors: Path to one error per candidate.
      shapes: Path to shape.
      candidates: The formats.
      target_bits: Bits per weight, scales and zero points included.

    Returns:
      Path to format.

    Raises:
      ValueError: If the target is below the smallest candidate.
    """
    paths = list(errors)
    table = np.asarray([errors[path] for path in paths])
    bits = np.asarray([[stored_bits(shapes[path], fmt) for fmt in candidates] for path in paths])
    weights = sum(int(np.prod(shapes[path])) for path in paths)
    budget = int(target_bits * weights)
    try:
        chosen = choose_formats(table, bits, budget)
    except ValueError as error:
        least = bits.min(1).sum() / weights
        raise ValueError(
            f"{target_bits=} is below the {least:.3f} bits per weight of the smallest candidate; "
            "raise it, add a smaller one, or use 16-bit scales"
        ) from error
    return {path: candidates[i] for path, i in zip(paths, chosen, strict=True)}
