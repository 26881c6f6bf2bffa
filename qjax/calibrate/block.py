"""Quantize one decoder block from the activations that enter it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.clock import PhaseClock
from qjax.calibrate.learn import Learned, learn_block
from qjax.calibrate.linears import (
    GROUPS,
    Batch,
    GroupStats,
    LinearGroup,
    Tree,
    collect,
    get_at,
    sample_inputs,
    set_at,
)
from qjax.calibrate.settings import Settings
from qjax.calibration.awq import quantize_clipped, search_awq_scale
from qjax.calibration.correction import CorrectionStats, corrected_error, corrected_weight
from qjax.calibration.folding import fold_into_norm, gqa_sources, scale_inputs, scale_outputs
from qjax.calibration.gptq import gptq_quantize
from qjax.calibration.refine import refine
from qjax.calibration.smoothquant import search_smooth_scale
from qjax.calibration.stats import ChannelStats, HessianStats, output_error
from qjax.formats import QuantFormat
from qjax.models.decoder import DecoderLayer
from qjax.quantize import quantize
from qjax.quantized_array import QuantizedArray
from qjax.typing import Array

Formats = Mapping[str, QuantFormat | None]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One line of the report.

    Attributes:
      path: Parameter path, ``model/layers_0/mlp/up_proj/kernel``.
      format: Name of the format, or None where it was left alone.
      error_rtn: Relative output error that rounding to nearest would have on the same activations;
        None if not measured.
      error: Relative output error of what was chosen, before its scales were learned if they
        are. With a correction both are against the original model's outputs. Rounding of
        activations (W8A8) is in neither.
      damping: Used by GPTQ, 0 for other methods.
      tokens: Calibration tokens seen.
      dead: Input channels that were never active.
      note: Why it was left alone, or a warning; empty otherwise.
    """

    path: str
    format: str | None
    error_rtn: float | None = None
    error: float | None = None
    damping: float = 0.0
    tokens: int = 0
    dead: int = 0
    note: str = ""


class BlockQuantized(NamedTuple):
    """A quantized block.

    Attributes:
      params: Parameters with ``QuantizedArray`` kernels.
      layers: One result for each linear layer.
      learned: Relative errors of the block's output, for each stage of learning one pair from
        before it and behind it; empty if nothing was learned.
    """

    params: Tree
    layers: list[LayerResult]
    learned: list[tuple[float, float]]


def quantize_block(
    module: DecoderLayer,
    params: Tree,
    batches: Sequence[Batch],
    formats: Formats,
    settings: Settings,
    *,
    prefix: str = "",
    clock: PhaseClock | None = None,
) -> BlockQuantized:
    """Quantize the linear layers of one block.

    Args:
      module: The block.
      params: Its parameters, plain arrays.
      batches: Calibration activations entering the block.
      formats: Path of a kernel within the block (``"mlp/up_proj/kernel"``) to its format. Kernels
        that are missing or None are left alone.
      settings: The method and its options.
      prefix: Put before paths in the results.
      clock: Is told where the time goes.
    """
    clock = PhaseClock() if clock is None else clock
    original = params
    factors: dict[str, tuple[Array, Array]] = {}
    if settings.scaling is not None:
        with clock.phase("scaling"):
            params, factors = scale_channels(module, params, batches, formats, settings)
            clock.wait(params)
    scaled = params
    learned: list[tuple[float, float]] = []

    def learn(start: Tree, paths: list[str], steps: int, *, offsets: bool) -> Tree:
        with clock.phase("learning"):
            found: Learned = learn_block(
                module, scaled, start, batches, paths, steps=steps, offsets=offsets
            )
        learned.append((found.before, found.after))
        return found.params

    chosen_paths = [p for g in GROUPS for m in g.members if formats.get(p := f"{m}/kernel")]
    starts: dict[str, QuantizedArray] = {}
    if settings.rounding == "learned" and chosen_paths:
        start = scaled
        for path in chosen_paths:
            fmt = formats[path]
            assert fmt is not None
            start = set_at(start, path, quantize(get_at(scaled, path), fmt, dtype=jnp.float32))
        start = learn(start, chosen_paths, settings.steps, offsets=True)
        starts = {path: get_at(start, path) for path in chosen_paths}
    plain = params  # here quantized kernels stand dequantized: one structure, one compilation
    teacher = scaled if settings.corrects else None
    results: list[LayerResult] = []
    stats: dict[str, GroupStats] = {}
    for group in GROUPS:
        with clock.phase("statistics"):
            if settings.sequential:
                stats = {}  # the last group's, before the next ones are allocated
                stats = collect(module, plain, teacher, batches, [group])
            elif not stats:
                stats = collect(module, plain, teacher, batches, GROUPS)
            clock.wait(stats)
        seen = stats[group.tap]
        rounded = _round_group(scaled, group, seen, formats, settings, clock, starts)
        for member, correction in zip(group.members, _split(scaled, group, seen), strict=True):
            path = f"{member}/kernel"
            fmt = formats.get(path)
            tokens = int(seen.hessian.count)
            if fmt is None:
                note = "left alone by a rule"
                results.append(LayerResult(prefix + path, None, tokens=tokens, note=note))
                # Scaling made it float32; what stays plain keeps its type.
                kept = get_at(params, path).astype(get_at(original, path).dtype)
                params = set_at(params, path, kept)
                continue
            value, damping = rounded[member]
            if fmt.activation is not None and not fmt.activation.dynamic:
                act_scale = _static_scale(seen.channel, fmt.activation)
                value = dataclasses.replace(value, act_scale=act_scale)
            target = get_at(scaled, path)
            with clock.phase("errors"):
                simple = quantize(get_at(original, path), fmt, dtype=jnp.float32).dequantize()
                if member in factors:  # compared where the chosen weights live: after scaling
                    rows, columns = factors[member]
                    simple = simple * rows[:, None] / columns[None, :]
                chosen = value.dequantize(jnp.float32)
                error_rtn = _error(target, simple, seen.hessian, correction)
                error = _error(target, chosen, seen.hessian, correction)
            results.append(
                LayerResult(
                    prefix + path,
                    fmt.name,
                    error_rtn=error_rtn,
                    error=error,
                    damping=damping,
                    tokens=tokens,
                    dead=int(jnp.sum(jnp.diagonal(seen.hessian.hessian) == 0)),
                    note=_warning(tokens, target.shape[0]),
                )
            )
            plain = set_at(plain, path, chosen.astype(target.dtype))
            params = set_at(params, path, value.astype(module.dtype))
    if settings.learns_scales and chosen_paths:
        params = learn(params, chosen_paths, settings.steps, offsets=False)
    return BlockQuantized(params, results, learned)


def _round_group(
    params: Tree,
    group: LinearGroup,
    stats: GroupStats,
    formats: Formats,
    settings: Settings,
    clock: PhaseClock,
    starts: Mapping[str, QuantizedArray],
) -> dict[str, tuple[QuantizedArray, float]]:
    """Quantize the members; those whose columns are independent go in one call."""
    kernels = {m: get_at(params, f"{m}/kernel").astype(jnp.float32) for m in group.members}
    if stats.correction is not None:
        assert settings.correction is not None
        strength = jnp.float32(settings.correction)
        with clock.phase("correction"):
            for member, part in zip(group.members, _split(params, group, stats), strict=True):
                assert part is not None
                kernels[member] = corrected_weight(kernels[member], stats.hessian, part, strength)
            clock.wait(kernels)
    out: dict[str, tuple[QuantizedArray, float]] = {}
    chosen = {m: formats.get(f"{m}/kernel") for m in group.members}
    for fmt in dict.fromkeys(f for f in chosen.values() if f is not None):
        names = [m for m in group.members if chosen[m] == fmt]
        joint = fmt.granularity in ("channel", "group")
        for part in [names] if joint else [[name] for name in names]:
            weight = jnp.concatenate([kernels[m] for m in part], axis=1)
            start = [starts[f"{m}/kernel"] for m in part] if starts else None
            value, damping = round_kernel(weight, stats.hessian, fmt, settings, clock, start)
            begin = 0
            for name in part:
                end = begin + kernels[name].shape[1]
                out[name] = (_columns(value, begin, end) if len(part) > 1 else value, damping)
                begin = end
    return out


def round_kernel(
    weight: Array,
    stats: HessianStats,
    fmt: QuantFormat,
    settings: Settings,
    clock: PhaseClock,
    start: Sequence[QuantizedArray] | None = None,
) -> tuple[QuantizedArray, float]:
    """Quantize one kernel by the rounding of the settings; also the damping used.

    Learned rounding was done before, for the whole block: ``start`` is its result, in parts along
    the columns. Without it (``lm_head``) GPTQ takes its place.
    """
    if settings.rounding == "rtn":
        return quantize(weight, fmt), 0.0
    if settings.rounding == "clip":
        with clock.phase("clipping"):
            return clock.wait(quantize_clipped(weight, stats, fmt)), 0.0
    if start is not None:
        with clock.phase("descent"):
            value = _concatenate(start)
            return clock.wait(refine(weight, value, stats, sweeps=settings.sweeps)), 0.0
    with clock.phase("gptq"):
        value, info = gptq_quantize(
            weight,
            stats,
            fmt,
            damping=settings.damping,
            order=settings.order,
            search=settings.search,
        )
        clock.wait(value)
    with clock.phase("descent"):
        value = clock.wait(refine(weight, value, stats, sweeps=settings.sweeps))
    return value, float(info.damping)


def scale_channels(
    module: DecoderLayer,
    params: Tree,
    batches: Sequence[Batch],
    formats: Formats,
    settings: Settings,
) -> tuple[Tree, dict[str, tuple[Array, Array]]]:
    """AWQ or SmoothQuant: fold factors into producers; the block computes the same as before.

    Returns:
      New parameters, and by linear layer the factors of its kernel's rows and the divisors of its
      columns.
    """
    original = params
    stats = collect(module, params, None, batches, GROUPS)
    factors: dict[str, tuple[Array, Array]] = {}
    for member in (m for group in GROUPS for m in group.members):
        k, n = get_at(params, f"{member}/kernel").shape
        factors[member] = (jnp.ones((k,), jnp.float32), jnp.ones((n,), jnp.float32))
    # Consumers before producers: v_proj and up_proj get the factors of their outputs first.
    for group in reversed(GROUPS):
        fmts = [f for m in group.members if (f := formats.get(f"{m}/kernel")) is not None]
        if not fmts:
            continue
        kernels = [get_at(params, f"{m}/kernel") for m in group.members]
        sources = None
        if group.producer == "self_attn/v_proj":
            c = module.config
            sources = gqa_sources(c.num_q_heads, c.num_kv_heads, c.head_dim)
        seen = stats[group.tap]
        # One factor serves all members; it is judged in the format of the first that has one.
        if settings.scaling == "awq":
            found = search_awq_scale(kernels, seen.hessian, fmts[0], sources=sources)
        else:
            x = sample_inputs(module, original, batches[0], group)
            found = search_smooth_scale(kernels, seen.channel, x, fmts[0], sources=sources)
        scale, channel_scale = found.scale, found.channel_scale
        if group.producer.endswith("layernorm"):
            path = f"{group.producer}/weight"
            weight, channel_scale = fold_into_norm(get_at(params, path), scale)
            params = set_at(params, path, weight)
        else:
            path = f"{group.producer}/kernel"
            params = set_at(params, path, scale_outputs(get_at(params, path), scale))
            if "bias" in get_at(params, group.producer):
                bias = get_at(params, f"{group.producer}/bias")
                divided = (bias.astype(jnp.float32) / scale).astype(bias.dtype)
                params = set_at(params, f"{group.producer}/bias", divided)
            rows, columns = factors[group.producer]
            factors[group.producer] = (rows, columns * scale)
        for member, kernel in zip(group.members, kernels, strict=True):
            params = set_at(params, f"{member}/kernel", scale_inputs(kernel, channel_scale))
            rows, columns = factors[member]
            factors[member] = (rows * channel_scale, columns)
    return params, factors


def _split(params: Tree, group: LinearGroup, stats: GroupStats) -> list[CorrectionStats | None]:
    """The correction statistics of each member."""
    if stats.correction is None:
        return [None] * len(group.members)
    ends = np.cumsum([get_at(params, f"{m}/kernel").shape[1] for m in group.members])
    cross = jnp.split(stats.correction.cross, ends[:-1], axis=1)
    energy = jnp.split(stats.correction.energy, ends[:-1])
    return [CorrectionStats(c, e) for c, e in zip(cross, energy, strict=True)]


def _error(
    target: Array, value: Array, stats: HessianStats, correction: CorrectionStats | None
) -> float:
    if correction is None:
        return float(output_error(target, value, stats))
    return float(corrected_error(target, value, stats, correction))


def _columns(value: QuantizedArray, begin: int, end: int) -> QuantizedArray:
    zero_point = value.zero_point
    return dataclasses.replace(
        value,
        qvalue=value.qvalue[:, begin:end],
        scale=value.scale[:, begin:end],
        zero_point=None if zero_point is None else zero_point[:, begin:end],
    )


def _concatenate(values: Sequence[QuantizedArray]) -> QuantizedArray:
    """Side by side; all of one format with independent columns, or only one."""
    if len(values) == 1:
        return values[0]
    zeros = [x.zero_point for x in values if x.zero_point is not None]
    return dataclasses.replace(
        values[0],
        qvalue=jnp.concatenate([x.qvalue for x in values], axis=1),
        scale=jnp.concatenate([x.scale for x in values], axis=1),
        zero_point=jnp.concatenate(zeros, axis=1) if zeros else None,
    )


def _static_scale(stats: ChannelStats, fmt: QuantFormat) -> Array:
    scale = jnp.max(stats.absmax) / jnp.float32(fmt.bound)
    return jnp.where(scale > 0, scale, jnp.float32(1))


def _warning(tokens: int, in_features: int) -> str:
    """A Hessian of fewer tokens than channels has no inverse but for the damping."""
    if tokens >= in_features:
        return ""
    return f"only {tokens} tokens for {in_features} channels; use more calibration text"
