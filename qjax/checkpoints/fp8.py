"""Hugging Face ``fp8`` checkpoints: DeepSeek-style 128 x 128 blocks, and per tensor or channel.

====================  =============  ===========================================================
tensor                type           meaning
====================  =============  ===========================================================
``weight``            F8_E4M3        ``(N, K)``
``weight_scale_inv``  F32            multiplier in spite of its name: ``weight * weight_scale_inv``.
                                     ``(ceil(N/128), ceil(K/128))``, the last blocks may be partial
``weight_scale``      F32            the same for per tensor ``()`` and per channel ``(N, 1)``
``input_scale``       F32            static activations: multiplier, a scalar. Newer transformers
                                     write ``activation_scale``
====================  =============  ===========================================================

A layer is quantized if its weight is stored in fp8. The lists of excluded modules are checked
against that instead of being trusted: engines disagree on whether they hold names or substrings.

References:
  transformers ``integrations/finegrained_fp8.py``, vLLM ``layers/quantization/fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.kv_scales import kv_scale_names, read_kv_scales
from qjax.checkpoints.reader import CheckpointSource, ExpectedTensor, GetTensor, KVScales
from qjax.checkpoints.scales import (
    FLOAT_DTYPES,
    kernel_scale,
    legal_scale_shapes,
    scalar,
    scale_dtype,
    tile_counts,
)
from qjax.formats import FP8_PER_TENSOR, FP8_PER_TOKEN, QuantFormat
from qjax.quantized_array import QuantizedArray

_QTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("input_scale", "activation_scale")


@dataclass(frozen=True)
class Fp8Reader:
    """Reader of one ``fp8`` checkpoint."""

    source: CheckpointSource
    block: tuple[int, int] | None
    """``(N, K)`` tile, as the config has it."""
    static: bool

    @classmethod
    def from_source(cls, source: CheckpointSource) -> Fp8Reader | None:
        """The reader if the config says ``fp8``.

        Raises:
          CheckpointError: If an option is not supported or config and tensors contradict.
        """
        config = source.quantization
        if str(config.get("quant_method")).lower() != "fp8":
            return None
        where = f"{source.location}/{source.quantization_file}: fp8"
        scheme = config.get("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise CheckpointError(f"{where}: {scheme=} of activation_scheme is not known")
        block = _block(config.get("weight_block_size"), where)
        if block is not None and scheme == "static":
            raise CheckpointError(
                f"{where}: weight_block_size={list(block)} with activation_scheme='static' has no "
                "meaning; block weights go with dynamic activations"
            )
        fmt = config.get("fmt", "e4m3")
        if fmt not in ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"):
            raise CheckpointError(f"{where}: fmt={fmt!r} is not supported; only e4m3 and e5m2 are")
        if config.get("kv_cache_scheme") not in (None, "static"):
            raise CheckpointError(
                f"{where}: kv_cache_scheme={config['kv_cache_scheme']!r} is not supported; only "
                "'static' is"
            )
        semantics = config.get("weight_scale_semantics")
        if semantics not in (None, "multiplier"):
            raise CheckpointError(
                f"{where}: weight_scale_semantics={semantics!r} is not supported: scales must "
                "multiply the weight, these divide it"
            )
        if config.get("expert_dtype", "fp8") != "fp8":
            raise CheckpointError(
                f"{where}: expert_dtype={config['expert_dtype']!r} is not supported"
            )
        reader = cls(source, block, scheme == "static")
        reader._check(fmt, where)
        return reader

    @property
    def name(self) -> str:
        """Method and variant."""
        tile = "x".join(map(str, self.block)) + " blocks" if self.block else "no blocks"
        return f"fp8 ({tile}, {'static' if self.static else 'dynamic'} activations)"

    def is_quantized(self, layer: str) -> bool:
        """Whether the weight of a layer is stored in fp8."""
        info = self.source.tensors.get(f"{layer}.weight")
        return info is not None and info.dtype in _QTYPES

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        """Tensors of one layer of kernel shape ``(K, N)``."""
        fmt = self.format(layer)
        tensors = self.source.tensors
        scale = self._scale_name(layer)
        legal = legal_scale_shapes(fmt, shape)
        found = tensors[scale].shape
        expected = {
            f"{layer}.weight": ExpectedTensor(shape[::-1], tuple(_QTYPES)),
            scale: ExpectedTensor(
                found if found in legal else legal[0], (*FLOAT_DTYPES, "F8_E8M0", "U8")
            ),
        }
        if self.static:
            expected[self._input_scale_name(layer)] = ExpectedTensor(None, FLOAT_DTYPES)
        return expected

    def read(
        self, layer: str, get: GetTensor, shape: tuple[int, int], dtype: Any
    ) -> QuantizedArray:
        """One layer as it is stored; the kernel is a transposed view of the file."""
        fmt = self.format(layer)
        scale_name = self._scale_name(layer)
        scale = kernel_scale(scale_name, get(scale_name), tile_counts(fmt, shape))
        act_scale = scalar(self._input_scale_name(layer), get) if self.static else None
        weight: Any = get(f"{layer}.weight").T
        return QuantizedArray.make(weight, _any(scale), fmt, act_scale=_any(act_scale), dtype=dtype)

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        """Names that belong to the KV cache."""
        return kv_scale_names(self.source.tensors, num_layers)

    def kv_scales(self, get: GetTensor, num_layers: int, num_kv_heads: int) -> KVScales | None:
        """Static KV cache scales, or None."""
        # AutoFP8 writes kv_cache_scheme; others store the scales without saying so.
        static = self.source.quantization.get("kv_cache_scheme") is not None
        declared = "kv_cache_scheme" if static else None
        return read_kv_scales(self.source.tensors, get, num_layers, num_kv_heads, declared=declared)

    def format(self, layer: str) -> QuantFormat:
        """The format of one layer, from its tensors' types and shapes."""
        tensors = self.source.tensors
        qtype = _QTYPES[tensors[f"{layer}.weight"].dtype]
        scale = self._scale_name(layer)
        scale_type = scale_dtype(scale, tensors, self._scale_dtypes())
        if self.static:
            # Not only the config: the scale must be there before the first weight is read.
            self._input_scale_name(layer)
        dynamic = FP8_PER_TENSOR if self.static else FP8_PER_TOKEN
        if self.block is not None:
            activation = QuantFormat(FP8_PER_TOKEN.qtype, "group", group_size=self.block[1])
            return QuantFormat(
                qtype,
                "block",
                block=(self.block[1], self.block[0]),
                scale_dtype=scale_type,
                activation=activation,
            )
        rows = int(np.prod(tensors[scale].shape, dtype=np.int64))
        granularity = "tensor" if rows == 1 else "channel"
        return QuantFormat(qtype, granularity, scale_dtype=scale_type, activation=dynamic)

    def _scale_dtypes(self) -> tuple[str, ...]:
        if self.source.quantization.get("scale_fmt") == "ue8m0":
            return (*FLOAT_DTYPES, "F8_E8M0", "U8")
        return (*FLOAT_DTYPES, "F8_E8M0")

    def _scale_name(self, layer: str) -> str:
        return self._one_of(layer, _SCALES, "a quantized weight cannot be used without it")

    def _input_scale_name(self, layer: str) -> str:
        return self._one_of(layer, _INPUT_SCALES, "activation_scheme='static' needs it")

    def _one_of(self, layer: str, suffixes: tuple[str, ...], why: str) -> str:
        names = [f"{layer}.{suffix}" for suffix in suffixes]
        found = [name for name in names if name in self.source.tensors]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.source.location}: {' and '.join(found)} contradict each other"
                if found
                else f"{self.source.location}: {' or '.join(names)} is missing; {why}"
            )
        return found[0]

    def _check(self, fmt: str, where: str) -> None:
        tensors, config = self.source.tensors, self.source.quantization
        excluded: set[str] = set()
        for key in ("ignored_layers", "modules_to_not_convert"):
            names = config.get(key) or []
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"{where}: {key} must be a list of names, it is {names!r}")
            excluded.update(names)
        some = False
        for name, info in tensors.items():
            layer, _, suffix = name.rpartition(".")
            if suffix == "weight" and info.dtype in _QTYPES:
                some = True
                if layer in excluded:
                    raise CheckpointError(
                        f"{where}: {layer} is excluded from quantization but its weight is "
                        f"{info.dtype}; config and tensors do not belong together"
                    )
                if not _QTYPES[info.dtype].startswith(fmt) and fmt not in _QTYPES[info.dtype]:
                    raise CheckpointError(f"{where}: fmt={fmt!r} but {name} is {info.dtype}")
                self.format(layer)
            elif suffix in (*_SCALES, *_INPUT_SCALES) and not self.is_quantized(layer):
                weight = tensors.get(f"{layer}.weight")
                what = "missing" if weight is None else f"{weight.dtype}, not fp8"
                raise CheckpointError(f"{where}: there is {name} but {layer}.weight is {what}")
        if not some:
            raise CheckpointError(f"{where}: the config says fp8 and no weight is stored in fp8")


def _block(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    legal = isinstance(value, (list, tuple)) and len(value) == 2
    if not legal or not all(type(v) is int and v > 0 for v in value):
        raise CheckpointError(f"{where}: weight_block_size={value!r} must be two positive integers")
    return value[0], value[1]


def _any(array: np.ndarray | None) -> Any:
    # QuantizedArray's fields are annotated as jax arrays; host arrays serve until the loader moves
    # them to a device.
    return array
