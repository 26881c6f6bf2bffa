"""AutoRound's own configs (``quant_method: "auto-round"``): tensors in the layout of GPTQ or AWQ.

``packing_format`` (``backend`` in older files) names the layout, ``auto_round:auto_gptq`` if there
is none; ``extra_config`` gives layers other settings. Both are said in the words of the layout's
own config, whose reader does the rest.

References:
  AutoRound ``export/export_to_autoround``; vLLM ``quantization/auto_round.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from qjax.checkpoints.awq import AwqReader
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.gptq import GptqReader
from qjax.checkpoints.reader import CheckpointSource, QuantizedReader

_METHODS = ("auto-round", "auto_round", "intel/auto-round")
_DEFAULT = "auto_round:auto_gptq"
_SETTINGS = ("bits", "group_size", "sym")
_UNQUANTIZED_BITS = 16

# Keys with the only values under which tensors are plain GPTQ or AWQ, and what others ask for.
_REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "data_type": ((None, "int"), "codes that are not integers"),
    "act_bits": ((None, 16, 32), "quantized activations"),
    "super_bits": ((None,), "scales that are quantized themselves"),
    "super_group_size": ((None,), "scales that are quantized themselves"),
    "static_kv_dtype": ((None,), "a quantized KV cache"),
    "rotation_config": ((None, "", {}), "rotated activations"),
    "transform_config": ((None, "", {}), "transformed activations"),
}
# Characters by which a name in extra_config shows that it is a pattern.
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")


def auto_round_reader(source: CheckpointSource) -> QuantizedReader | None:
    """The reader of the layout that the config names; None if it is not AutoRound's.

    Raises:
      CheckpointError: If something is not supported: file, key and value.
    """
    values = source.quantization
    if str(values.get("quant_method")).lower() not in _METHODS:
        return None
    where = f"{source.location}/{source.quantization_file}: auto-round"
    _check(values, where)
    layout = _layout(values, where)
    overrides = _overrides(values.get("extra_config"), where)
    # What the translation says itself, and what GPTQ's reader would take for its own.
    own = ("quant_method", "packing_format", "backend", "extra_config", "dynamic", "format")
    common = {key: value for key, value in values.items() if key not in own}
    if layout == "awq":
        excluded = _excluded(overrides, values, where)
        config = {**common, "quant_method": "awq", "version": "gemm", "zero_point": None}
        config["modules_to_not_convert"] = excluded
        return AwqReader(dataclasses.replace(source, quantization=config))
    config = {**common, "quant_method": "gptq", "dynamic": _dynamic(overrides)}
    return GptqReader(dataclasses.replace(source, quantization=config))


def _check(values: Mapping[str, Any], where: str) -> None:
    for key, (legal, meaning) in _REQUIRED.items():
        if not any(values.get(key) is v or values.get(key) == v for v in legal):
            raise CheckpointError(
                f"{where} key {key!r} is {values[key]!r} ({meaning}), which is not supported; load "
                "the unquantized checkpoint and quantize it here"
            )


def _layout(values: Mapping[str, Any], where: str) -> str:
    key = "packing_format" if values.get("packing_format") is not None else "backend"
    name = values.get(key)
    name = _DEFAULT if name is None else name
    parts = str(name).lower().replace("-", "_").split(":")
    kinds = {part.removeprefix("auto_") for part in parts} & {"gptq", "awq"}
    if parts[0] in ("auto_round", "autoround", "auto_gptq", "auto_awq") and len(kinds) == 1:
        return kinds.pop()
    raise CheckpointError(
        f"{where} key {key!r} is {name!r}, which is not supported; supported are "
        "'auto_round:auto_gptq' and 'auto_round:auto_awq'. Export the model again with one of "
        "them, or quantize the unquantized checkpoint here"
    )


def _overrides(value: Any, where: str) -> dict[str, dict[str, Any] | None]:
    """Settings of the layers that ``extra_config`` names; None for unquantized ones."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} key 'extra_config' must be an object, it is {value!r}")
    found: dict[str, dict[str, Any] | None] = {}
    for name, settings in value.items():
        place = f"{where} key 'extra_config', {name!r}:"
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"{place} settings must be an object, they are {settings!r}")
        bits = settings.get("bits")
        if type(bits) is int and bits >= _UNQUANTIZED_BITS:
            found[name] = None  # whatever else it says
            continue
        _check(settings, place)
        found[name] = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    return found


def _dynamic(overrides: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """``dynamic`` of GPTQ: whole names, or patterns of them."""
    dynamic: dict[str, Any] = {}
    for name, settings in overrides.items():
        pattern = f"(?:{name if _PATTERN.search(name) else re.escape(name)})$"
        dynamic[f"{'-' if settings is None else '+'}:{pattern}"] = settings or {}
    return dynamic


def _excluded(
    overrides: Mapping[str, dict[str, Any] | None], values: Mapping[str, Any], where: str
) -> list[str]:
    """``modules_to_not_convert`` of AWQ, which has no other settings of single layers."""
    excluded = values.get("modules_to_not_convert") or []
    if not isinstance(excluded, list):
        raise CheckpointError(
            f"{where} key 'modules_to_not_convert' must be a list of names, it is {excluded!r}"
        )
    for name, settings in overrides.items():
        differs = settings is not None and any(settings[k] != values.get(k) for k in settings)
        if differs or (settings is None and _PATTERN.search(name)):
            raise CheckpointError(
                f"{where} key 'extra_config' gives {name!r} the settings {settings!r}; in the AWQ "
                "layout only whole layers can be left unquantized, by their names"
            )
        if settings is None:
            excluded = [*excluded, name]
    return excluded
