"""What a calibration run shall do; everything that decides its result, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qjax.formats import QuantFormat

METHODS = (
    "rtn",
    "gptq",
    "gptq+scales",
    "awq",
    "awq+gptq",
    "awq+gptq+scales",
    "autoround",
    "smoothquant",
    "smoothquant+gptq",
)

DEFAULT_RULE = r"model/layers_\d+/.*/kernel"
"""What gets the main format: every linear layer of the blocks."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a calibration run.

    Attributes:
      fmt: Format of the linear layers; None only if every layer that is quantized has a rule.
      method: One of ``METHODS``. ``awq`` and ``smoothquant`` scale channels and then round to
        nearest (AWQ with clipping); with ``+gptq`` the scaled weights go through GPTQ, and with
        ``+scales`` the scales are then learned by gradients over the whole block. ``autoround``
        learns roundings and scales that way, then makes sweeps of coordinate descent and learns
        the scales once more.
      rules: Pairs of a regular expression on parameter paths and a format (None: leave as it is);
        the first match wins, before ``fmt``. ``lm_head`` is left alone unless a rule names it.
      damping: GPTQ's damping.
      order: GPTQ's order of rows.
      search: GPTQ: search scales by weighted error.
      sweeps: GPTQ and AutoRound: sweeps of coordinate descent afterwards.
      steps: Updates of each stage of learning, for ``autoround`` and ``+scales``.
      sequential: Collect statistics of each group of layers anew, with the groups before it in the
        block quantized. Without it one pass per block serves all groups.
      correction: Aim at the original model's outputs instead of the layer's own, with this ridge
        (``calibration.correction``); None does not. Costs a second pass of the original block.
        Only ``rtn`` and ``smoothquant`` do not use it.
      target_bits: Mixed precision: bits per weight over all layers that no rule decides, scales
        included; each gets the one of ``candidates`` that its output error is worth. None gives
        ``fmt`` to all.
      candidates: Formats to choose from with ``target_bits``.
      rotate: Rotate the residual stream and the value heads first (``calibration.rotation``), which
        spreads outlier channels. The result is never tied: it has a matrix ``lm_head``.
      kv_dtype: Also calibrate static KV cache scales for this storage type, or None.
    """

    fmt: QuantFormat | None
    method: str = "gptq"
    rules: tuple[tuple[str, QuantFormat | None], ...] = ()
    damping: float = 0.01
    order: str = "group"
    search: bool = True
    sweeps: int = 4
    steps: int = 200
    sequential: bool = True
    correction: float | None = 0.1
    target_bits: float | None = None
    candidates: tuple[QuantFormat, ...] = ()
    rotate: bool = False
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method={self.method!r}; choose one of {', '.join(METHODS)}")
        if self.correction is not None and not 0 < self.correction < math.inf:
            raise ValueError(
                f"correction={self.correction} must be positive and finite, or None for none"
            )
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping={self.damping} must be positive and finite; 0.01 is usual")
        if self.target_bits is not None and not 0 < self.target_bits < math.inf:
            raise ValueError(f"target_bits={self.target_bits} must be positive and finite")
        if (self.target_bits is None) != (not self.candidates):
            raise ValueError("target_bits and candidates go together; give both or neither")
        if self.sweeps < 0:
            raise ValueError(f"sweeps={self.sweeps} must not be negative")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be positive")
        if self.method == "autoround":
            formats = (self.fmt, *(f for _, f in self.rules), *self.candidates)
            if floats := [f.name for f in formats if f is not None and f.is_float]:
                raise ValueError(
                    f"autoround learns roundings to integers; {floats[0]} has none. Use gptq, or "
                    "an integer format"
                )
        if self.scaling == "smoothquant" and self.fmt is not None and self.fmt.activation is None:
            raise ValueError(
                f"smoothquant is for formats that quantize activations, {self.fmt.name} does not; "
                "use w8a8_int8 or w8a8_fp8, or method='awq'"
            )

    @property
    def scaling(self) -> str | None:
        """``"awq"``, ``"smoothquant"`` or None."""
        first = self.method.split("+")[0]
        return first if first in ("awq", "smoothquant") else None

    @property
    def rounding(self) -> str:
        """``"gptq"``, ``"learned"``, ``"clip"`` or ``"rtn"``."""
        if self.method == "autoround":
            return "learned"
        if "gptq" in self.method.split("+"):
            return "gptq"
        return "clip" if self.method == "awq" else "rtn"

    @property
    def learns_scales(self) -> bool:
        """Whether scales are learned at the end."""
        return self.method == "autoround" or self.method.endswith("+scales")

    @property
    def corrects(self) -> bool:
        """Whether the original model's activations are needed too."""
        return self.correction is not None and self.rounding != "rtn"

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed at all."""
        others = (self.kv_dtype, self.target_bits)
        return self.method != "rtn" or any(x is not None for x in others)

    def ordered_rules(self) -> Mapping[str, QuantFormat | None]:
        """The rules, then ``lm_head`` left alone, then ``fmt`` for every other kernel."""
        ordered = dict(self.rules)
        if self.fmt is not None:
            ordered.setdefault(DEFAULT_RULE, self.fmt)
        return ordered

    def to_json(self) -> dict[str, Any]:
        """Plain values; two runs with equal ones give equal results on equal data."""
        return dataclasses.asdict(self)
