"""The quantization config of GPTQ checkpoints: AutoGPTQ, GPTQModel, AutoRound and optimum.

Keys which say how the codes were found (``damp_percent``, ``iters``, ``meta``, ...) change nothing
about the tensors and are not looked at; keys which change what the tensors mean are read, or
refused by name.

References:
  GPTQModel ``quantization/config.py``; vLLM ``quantization/utils/gptq_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qjax.checkpoints.errors import CheckpointError
from qjax.formats import QuantFormat

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"

# Keys with the only values under which a file is plain GPTQ, and what another value would ask for.
_REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "pack_dtype": ((None, "int32"), "codes packed in other words than int32"),
    "data_type": ((None, "int"), "codes that are not integers"),
    "is_marlin_format": ((None, False), "weights shuffled for the Marlin kernel"),
    "rotation": ((None, ""), "rotated activations"),
    "adapter": ((None, {}), "a low-rank correction beside the weights"),
    "extra_config": ((None, {}), "AutoRound's per-layer overrides"),
}


@dataclass(frozen=True)
class GptqLayer:
    """How one layer is stored.

    Attributes:
      bits: 2, 3, 4 or 8.
      group_size: Rows per scale; None is one group over all rows (``-1`` in files).
      sym: Every zero point is ``2**(bits-1)``.
      desc_act: Whether activation order was used; None if the config does not say.
    """

    bits: int
    group_size: int | None
    sym: bool
    desc_act: bool | None

    def format(self, scale_dtype: str) -> QuantFormat:
        """The format of the layer's ``QuantizedArray``."""
        tile = "channel" if self.group_size is None else "group"
        return QuantFormat(
            f"int{self.bits}",
            tile,
            group_size=self.group_size,
            symmetric=self.sym,
            scale_dtype=scale_dtype,
        )


class GptqConfig:
    """A parsed quantization config.

    Args:
      values: The config, as JSON gives it.
      file: Where it stands, for messages.

    Raises:
      CheckpointError: If something is not supported or makes no sense: file, key and value.
    """

    def __init__(self, values: Mapping[str, Any], file: str = "config.json"):
        self._values = values
        self._file = file
        self.base = self._layer(values, "")
        self.lm_head = bool(values.get("lm_head", False))
        self.checkpoint_format = _checkpoint_format(values, file)
        dynamic = values.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise CheckpointError(
                f"{file}: gptq key 'dynamic' must map patterns to settings, it is {dynamic!r}"
            )
        self._dynamic: list[tuple[re.Pattern[str], GptqLayer | None]] = []
        for pattern, override in dynamic.items():
            excluded = pattern.startswith("-:")
            try:
                regex = re.compile(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(
                    f"{file}: gptq key 'dynamic' has {pattern!r}, no regular expression: {error}"
                ) from None
            if excluded:
                self._dynamic.append((regex, None))
                continue
            if not isinstance(override, Mapping):
                raise CheckpointError(
                    f"{file}: gptq key 'dynamic' gives {pattern!r} the settings {override!r}; they "
                    "must be an object such as {'bits': 8}"
                )
            names_one = override.keys() & {"checkpoint_format", "format"}
            if names_one and _checkpoint_format(override, file) != self.checkpoint_format:
                raise CheckpointError(
                    f"{file}: gptq 'dynamic' gives {pattern!r} another checkpoint format, "
                    f"{dict(override)!r}, than the rest has, {self.checkpoint_format!r}"
                )
            where = f"'dynamic' {pattern!r}, "
            self._dynamic.append((regex, self._layer({**values, **override}, where)))

    def layer(self, name: str) -> GptqLayer | None:
        """Settings of a layer; None if a ``-:`` pattern excludes it. The first match wins."""
        for regex, settings in self._dynamic:
            if regex.match(name):  # from the start of the name, not the whole of it
                return settings
        return self.base

    def _layer(self, values: Mapping[str, Any], where: str) -> GptqLayer:
        for key, (legal, meaning) in _REQUIRED.items():
            if values.get(key) not in legal:
                raise CheckpointError(
                    f"{self._file}: gptq {where}key {key!r} is {values[key]!r} ({meaning}), which "
                    "is not supported; load the unquantized checkpoint and quantize it here"
                )
        bits = values.get("bits")
        if type(bits) is not int or bits not in BITS:
            raise CheckpointError(
                f"{self._file}: gptq {where}key 'bits' is {bits!r}; supported are "
                f"{', '.join(map(str, BITS))}"
            )
        group_size = values.get("group_size")
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise CheckpointError(
                f"{self._file}: gptq {where}key 'group_size' is {group_size!r}; it must be "
                "positive, or -1 for one group over all rows"
            )
        for key in ("sym", "desc_act"):
            if values.get(key) not in (None, True, False):
                raise CheckpointError(
                    f"{self._file}: gptq {where}key {key!r} is {values[key]!r}, not true or false"
                )
        activation_bits = values.get("act_bits")
        if activation_bits not in (None, 16, 32):
            raise CheckpointError(
                f"{self._file}: gptq {where}key 'act_bits' is {activation_bits!r}: quantized "
                "activations are not supported in this format"
            )
        return GptqLayer(
            bits=bits,
            group_size=None if group_size == -1 else group_size,
            # Reading zero points where there need be none is always exact; the reverse is not.
            sym=bool(values.get("sym", False)),
            desc_act=values.get("desc_act"),
        )


def _checkpoint_format(values: Mapping[str, Any], file: str) -> str:
    """``"gptq"`` (v1) or ``"gptq_v2"``; the spelling of the key depends on the writer."""
    found = {}
    for key in ("checkpoint_format", "format"):
        if values.get(key) is not None:
            found[key] = str(values[key]).lower()
            if found[key] not in (V1, V2):
                raise CheckpointError(
                    f"{file}: gptq key {key!r} is {values[key]!r}, which is not supported; "
                    f"supported are {V1!r} and {V2!r}. Convert the checkpoint with GPTQModel, or "
                    "quantize the unquantized one here"
                )
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{file}: gptq keys contradict each other: {found}")
    return next(iter(found.values()), V1)  # AutoGPTQ and AutoRound write neither
