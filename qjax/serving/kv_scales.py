"""What a run reads and tells about KV cache scales: files of static scales, statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qjax.checkpoints.kv_scale_files import read_kv_scale_file, write_kv_scale_file
from qjax.checkpoints.reader import KVScales
from qjax.kv_cache import QuantizedKVCache, static_scales_from
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.models.config import ModelConfig
from qjax.serving.results import fingerprint
from qjax.serving.settings import parse_layers

PLAIN_EXPORT_DTYPE = "float8_e4m3fn"
"""Type that scales are for when they are measured with a 16-bit cache."""
_INT32_MAX = np.iinfo(np.int32).max


def scales_for_run(
    path: str | Path, config: ModelConfig, *, kv_dtype: str, mode: str | None, skip_layers: str
) -> KVScales:
    """Read a file of static scales for a run with these choices.

    Args:
      path: See ``read_kv_scale_file``.
      config: The model.
      kv_dtype: KV cache type by its command-line name; ``auto`` is the file's.
      mode: Scale mode the user asked for, or None.
      skip_layers: Layers with an unquantized cache, such as ``0,1,-1``.

    Raises:
      ValueError: If the file does not fit the model, or a choice leaves no use for it.
    """
    scales = read_kv_scale_file(path, config)
    if mode not in (None, "static"):
        raise ValueError(
            f"{path} gives static KV scales, which the scale mode {mode!r} does not use; leave out "
            "one of the two"
        )
    wanted = parse_kv_format(kv_dtype, mode="static", model_dtype="float32").dtype
    if kv_dtype != "auto" and wanted != scales.dtype:
        raise ValueError(
            f"{path} gives scales for a KV cache in {scales.dtype}, but {wanted} is asked for; "
            "choose the same type (or 'auto'), or measure scales for this one"
        )
    # Layers out of range are reported where formats are made.
    if {i % config.num_layers for i in parse_layers(skip_layers)} == set(range(config.num_layers)):
        raise ValueError(
            f"{path} gives static KV scales, but no layer is left to use them: "
            f"{skip_layers!r} skips all; leave out one of the two"
        )
    return scales


def scales_fingerprint(scales: KVScales | None) -> str | None:
    """Short hash of scales, which results depend on; None for none."""
    if scales is None:
        return None
    numbers = [[s.tolist() for s in part] for part in (scales.keys, scales.values)]
    return fingerprint([scales.dtype, numbers, scales.without_key_bias])


def check_export(path: str | Path, *, overwrite: bool, kv_dtype: str, static: bool) -> None:
    """Find out before a long run whether scales can be measured and written.

    Args:
      path: The file to be.
      overwrite: Whether it may exist.
      kv_dtype: KV cache type by its command-line name.
      static: Whether the run itself uses static scales.

    Raises:
      ValueError: If the name does not end in ``.json``, the file exists or its folder does not, or
        the type mixes the features of keys.
    """
    path = Path(path)
    if kv_dtype == "int4" and not static:
        raise ValueError(
            f"{path}: static scales cannot be measured with a KV cache in int4, which mixes the "
            "features of keys; measure with another KV cache type"
        )
    if path.suffix != ".json":
        raise ValueError(f"{path}: scales are written as JSON; name the file .json")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; name another file, or give --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; make it first")


def export_scales(path: str | Path, cache: QuantizedKVCache, config: ModelConfig) -> str:
    """Write static scales that cover the largest magnitudes a cache has seen, per layer and head.

    Beside them stands what the layer lost while they were measured.

    Args:
      path: The file.
      cache: The cache after a run. Scales are for the type of its quantized layers, or for
        ``PLAIN_EXPORT_DTYPE`` if it has none; layers held in 16 bit get scales too.
      config: The model.

    Returns:
      The type they are for.

    Raises:
      ValueError: If a layer has seen nothing but zeros, or keys in another basis than static scales
        are for.
    """
    mixed = [i for i, f in enumerate(cache.formats) if f.mixes_keys]
    if mixed:
        raise ValueError(
            f"layer {mixed[0]} holds keys in {cache.formats[mixed[0]].name}, which mixes the "
            "features of a head; static scales are for plain ones: measure with another KV cache "
            "type"
        )
    dtype = next((f.dtype for f in cache.formats if f.quantized), PLAIN_EXPORT_DTYPE)
    pairs = [p for p in static_scales_from(cache, KVFormat(dtype, "static")) if p is not None]
    apart = tuple(i for i, f in enumerate(cache.formats) if f.without_key_bias)
    scales = KVScales(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), dtype, apart)
    lost = zip(np.asarray(cache.saturated), np.asarray(cache.underflowed), strict=True)
    counts = [{"saturated": s.tolist(), "underflowed": u.tolist()} for s, u in lost]
    write_kv_scale_file(path, scales, config, counts)
    return dtype


def kv_stats_lines(cache: QuantizedKVCache, tokens: int) -> list[str]:
    """Table to print: what each layer lost, and its largest magnitudes.

    Args:
      cache: The cache after a run.
      tokens: Tokens that were written into it.
    """
    largest = np.asarray(cache.absmax).max(axis=2)
    lost = zip(np.asarray(cache.saturated), np.asarray(cache.underflowed), strict=True)
    width = max(len(f.name) for f in cache.formats)
    elements = tokens * cache.num_kv_heads * cache.head_dim
    lines = [
        f"KV cache, per layer, of {elements:,} keys (K) and as many values (V): clipped or not "
        "finite,",
        "rounded to 0, and the largest finite magnitudes",
        f"layer  {'format':<{width}}  {'K clipped':>13}  {'V clipped':>13}  {'K to 0':>9}  "
        f"{'V to 0':>9}  {'K largest':>10}  {'V largest':>10}",
    ]
    for layer, (fmt, (clipped, zeroed), tops) in enumerate(
        zip(cache.formats, lost, largest, strict=True)
    ):
        cells = [f"{_count(int(n)):>13}" for n in clipped]
        cells += [f"{_share(int(n), elements):>9}" for n in zeroed]
        cells += [f"{top:>10.4g}" for top in tops]
        lines.append(f"{layer:>5}  {fmt.name:<{width}}  " + "  ".join(cells))
    return lines


def _share(n: int, elements: int) -> str:
    """Per cent: values near 0 are lost all the time, what matters is how many."""
    sign = ">=" if n == _INT32_MAX else ""
    return f"{sign}{n / max(elements, 1):.3%}"


def _count(n: int) -> str:
    return f">={n:,}" if n == _INT32_MAX else f"{n:,}"  # where the counter stops
