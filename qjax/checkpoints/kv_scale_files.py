"""Static KV cache scales in a JSON file of their own, apart from any checkpoint.

Two layouts are read. SGLang's (and formerly vLLM's) has one number per tensor parallel rank and
layer, which serves for keys and values alike::

    {"model_type": "llama",
     "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.021, "1": 0.034}}}}

Ours has keys and values apart, one number or one per KV head; it is the one that is written::

    {"model_type": "llama", "num_layers": 2, "num_kv_heads": 2, "dtype": "int8",
     "layers": {"0": {"k_scale": [0.02, 0.03], "v_scale": 0.01},
                "1": {"k_scale": 0.02, "v_scale": 0.01}}}

A layer may also have ``"k_bias": "apart"`` (its key scales are for keys without the bias of their
projection), and ``"saturated": [0, 0]`` and ``"underflowed": [12, 7]``, what keys and values lost
when the scales were measured; for information.

A stored code times its scale is the value. Other engines take 1.0 where something is missing or
wrong; here everything that does not fit the model is an error, since a wrong scale shows only as
worse text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax._files import write_text_atomic
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import KVScales
from qjax.models.config import ModelConfig

_RANKED_DTYPE = "float8_e4m3fn"  # the only one that SGLang's layout has
_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8", "int4")


def read_kv_scale_file(path: str | Path, config: ModelConfig) -> KVScales:
    """Read scales and check them against a model.

    Args:
      path: JSON file in one of the two layouts.
      config: The model they must fit.

    Returns:
      Scales of every layer, repeated over the heads where the file has one for all.

    Raises:
      CheckpointError: If the file cannot be read, is of no known layout, was made for another
        model or type, lacks a layer, has one too many, or holds a scale that is not positive and
        finite in float32; the message names the place.
    """
    file = _File(Path(path), config)
    values = file.load()
    if "kv_cache" in values:
        return file.ranked(values)
    if "layers" in values:
        return file.per_head(values)
    raise file.error(
        f"has the keys {sorted(values)}; expected 'kv_cache' (SGLang's layout, one number per "
        "layer) or 'layers' (keys and values apart)"
    )


def write_kv_scale_file(
    path: str | Path,
    scales: KVScales,
    config: ModelConfig,
    counts: Sequence[Mapping[str, list[int]]] | None = None,
) -> None:
    """Write scales so that ``read_kv_scale_file`` returns exactly the same. Atomic.

    Args:
      path: The file.
      scales: Of every layer, float32 ``(num_kv_heads,)``.
      config: The model they belong to.
      counts: Per layer ``saturated`` and ``underflowed``, of keys and of values; None for none.

    Raises:
      ValueError: If the number of layers or heads is not that of the model.
    """
    lengths = [len(part) for part in (scales.keys, scales.values, counts) if part is not None]
    if set(lengths) != {config.num_layers}:
        raise ValueError(f"scales of {lengths} layers do not fit the model's {config.num_layers}")
    shapes = {np.shape(s) for s in (*scales.keys, *scales.values)}
    if shapes != {(config.num_kv_heads,)}:
        raise ValueError(f"scales of shapes {shapes} must all be ({config.num_kv_heads},)")
    head = {
        "model_type": config.model_type,
        "num_layers": config.num_layers,
        "num_kv_heads": config.num_kv_heads,
        "dtype": scales.dtype,
    }
    rows = []
    for i, (k, v) in enumerate(zip(scales.keys, scales.values, strict=True)):
        row: dict[str, Any] = {"k_scale": _numbers(k), "v_scale": _numbers(v)}
        if i in scales.without_key_bias:
            row["k_bias"] = "apart"
        row |= {} if counts is None else counts[i]
        rows.append(f'    "{i}": ' + json.dumps(row))
    fields = "".join(
        f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()
    )
    text = "{\n" + fields + '  "layers": {\n' + ",\n".join(rows) + "\n  }\n}\n"
    write_text_atomic(path, text)


def _numbers(scales: np.ndarray) -> float | list[float]:
    # Python prints float32 numbers so that they are read back exactly.
    numbers = np.asarray(scales, np.float32).tolist()
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Object of JSON; Python's parser would silently take the last of two equal keys."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


class _File:
    """One file and the model it must fit."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path, self.config = path, config

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {message}")

    def load(self) -> Mapping[str, Any]:
        try:
            text = self.path.read_text(encoding="utf-8")
            values = json.loads(text, object_pairs_hook=_no_duplicates)
        except OSError as e:
            raise self.error(f"cannot be read: {e.strerror or e}") from e
        except ValueError as e:
            raise self.error(f"is not valid JSON ({e})") from e
        return self.object(values, "the file")

    def object(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{where} must be a JSON object, it is a {type(value).__name__}")
        return value

    def keys(
        self,
        values: Mapping[str, Any],
        where: str,
        expected: tuple[str, ...],
        optional: tuple[str, ...] = (),
    ) -> None:
        """Exactly these keys: what is not understood could change the meaning."""
        for key in expected:
            if key not in values:
                raise self.error(f"{where} lacks {key!r}")
        for key in values:
            if key not in expected + optional:
                known = expected + optional
                raise self.error(f"{where} has the unknown key {key!r}; known: {known}")

    def model(self, values: Mapping[str, Any], **expected: Any) -> None:
        for name, wanted in expected.items():
            if values[name] != wanted or isinstance(values[name], bool):
                raise self.error(
                    f"has {name} {values[name]!r}, the model has {wanted!r}; the scales were "
                    "measured on another model: measure them on this one"
                )

    def numbered(self, value: Any, where: str, count: int, what: str) -> list[Any]:
        """Values of an object whose keys are ``"0"`` to ``"count - 1"``."""
        values = self.object(value, where)
        wanted = [str(i) for i in range(count)]
        missing = [key for key in wanted if key not in values]
        if missing:
            raise self.error(
                f"{where} lacks {what} {', '.join(missing)} of {count}; there is no default scale"
            )
        extra = [key for key in values if key not in wanted]
        if extra:
            raise self.error(f"{where} has {what} {extra[0]!r}; there are 0 to {count - 1}")
        return [values[key] for key in wanted]

    def number(self, value: Any, where: str) -> np.float32:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{where} is {value!r}; a scale must be a number")
        # Compared before the cast, which would overflow. A subnormal float32 is flushed to zero.
        limits = np.finfo(np.float32)
        if not float(limits.tiny) <= value <= float(limits.max):
            raise self.error(
                f"{where} is {value!r}; a scale must be positive and finite in float32 (-1 means "
                "that it was never measured)"
            )
        return np.float32(value)

    def ranked(self, values: Mapping[str, Any]) -> KVScales:
        """SGLang's layout."""
        self.keys(values, "the file", ("model_type", "kv_cache"))
        self.model(values, model_type=self.config.model_type)
        cache = self.object(values["kv_cache"], "kv_cache")
        self.keys(cache, "kv_cache", ("dtype", "scaling_factor"))
        if cache["dtype"] != _RANKED_DTYPE:
            raise self.error(
                f"kv_cache.dtype is {cache['dtype']!r}; in this layout it must be {_RANKED_DTYPE!r}"
            )
        where, heads = "kv_cache.scaling_factor", self.config.num_kv_heads
        table = self.object(cache["scaling_factor"], where)
        # A rank holds a contiguous part of the heads.
        ranks = len(table)
        if ranks == 0 or heads % ranks:
            raise self.error(
                f"{where} has {ranks} tensor parallel ranks, which do not divide the model's "
                f"{heads} KV heads; measure with one rank"
            )
        per_rank = []
        for rank, layers in enumerate(self.numbered(table, where, ranks, "rank")):
            at = f"{where}[{rank}]"
            numbers = self.numbered(layers, at, self.config.num_layers, "layer")
            per_rank.append([self.number(x, f"{at}[{i}]") for i, x in enumerate(numbers)])
        scales = np.repeat(np.asarray(per_rank, np.float32).T, heads // ranks, axis=1)
        return KVScales(tuple(scales), tuple(scales.copy()), _RANKED_DTYPE)

    def per_head(self, values: Mapping[str, Any]) -> KVScales:
        """Our layout."""
        expected = ("model_type", "num_layers", "num_kv_heads", "dtype", "layers")
        self.keys(values, "the file", expected)
        config = self.config
        self.model(
            values,
            model_type=config.model_type,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
        )
        dtype = values["dtype"]
        if dtype not in _DTYPES:
            raise self.error(f"dtype is {dtype!r}; known are {', '.join(_DTYPES)}")
        keys, vals, apart = [], [], []
        layers = self.numbered(values["layers"], "layers", config.num_layers, "layer")
        for i, layer in enumerate(layers):
            pair = self.object(layer, f"layers[{i}]")
            optional = ("k_bias", "saturated", "underflowed")
            self.keys(pair, f"layers[{i}]", ("k_scale", "v_scale"), optional)
            if pair.get("k_bias", "apart") != "apart":
                raise self.error(
                    f"layers[{i}].k_bias is {pair['k_bias']!r}; it must be 'apart', or left out"
                )
            if "k_bias" in pair:
                apart.append(i)
            keys.append(self.heads(pair["k_scale"], f"layers[{i}].k_scale"))
            vals.append(self.heads(pair["v_scale"], f"layers[{i}].v_scale"))
        return KVScales(tuple(keys), tuple(vals), dtype, tuple(apart))

    def heads(self, value: Any, where: str) -> np.ndarray:
        """One number for all KV heads, or a list with one for each: float32 ``[kv_heads]``."""
        heads = self.config.num_kv_heads
        if not isinstance(value, list):
            return np.full(heads, self.number(value, where), np.float32)
        if len(value) != heads:
            raise self.error(f"{where} has {len(value)} numbers; the model has {heads} KV heads")
        numbers = [self.number(x, f"{where}[{h}]") for h, x in enumerate(value)]
        return np.asarray(numbers, np.float32)
