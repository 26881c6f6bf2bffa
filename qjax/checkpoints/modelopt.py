"""NVIDIA modelopt checkpoints: FP8, NVFP4 and MXFP4 weights.

The config is ``hf_quant_config.json`` or, with ``quant_method: "modelopt"``, part of config.json.

==========  ========================  ===========================================================
algorithm   tensors of a layer        meaning
==========  ========================  ===========================================================
FP8         ``weight`` F8_E4M3        ``(N, K)``
            ``weight_scale`` F32      a scalar (``(N,)`` for FP8_PER_CHANNEL_PER_TOKEN,
                                      128 x 128 blocks ``(N/128, 1, K/128, 1)`` for FP8_PB_WO)
            ``input_scale`` F32       a scalar, static activations (FP8 only)
NVFP4       ``weight`` U8             ``(N, K/2)``, two E2M1 codes per byte, even k in the low half
            ``weight_scale`` F8_E4M3  ``(N, K/16)``
            ``weight_scale_2`` F32    a scalar: ``w = code * weight_scale * weight_scale_2``
MXFP4       ``weight`` U8             as NVFP4
            ``weight_scale`` U8       ``(N, K/32)`` exponents: ``2**(e - 127)``
==========  ========================  ===========================================================

The fp4 formats run as W4A16: their ``input_scale`` has nothing to multiply.

References:
  NVIDIA/TensorRT-Model-Optimizer ``modelopt/torch/export/{quant_utils,convert_hf_config}.py``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes

from qjax.checkpoints.bitpack import unpack
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.kv_scales import kv_scale_names, read_kv_scales
from qjax.checkpoints.reader import CheckpointSource, ExpectedTensor, GetTensor, KVScales
from qjax.checkpoints.scales import kernel_scale, scalar, tile_counts
from qjax.formats import FP8_PER_TENSOR, FP8_PER_TOKEN, QuantFormat
from qjax.quantized_array import QuantizedArray

_FP8 = QuantFormat("float8_e4m3fn", "tensor")
_NVFP4 = QuantFormat("float4_e2m1fn", "group", group_size=16, scale_dtype="float8_e4m3fn")
_MXFP4 = QuantFormat("float4_e2m1fn", "group", group_size=32, scale_dtype="float8_e8m0fnu")
_ALGORITHMS = {
    "FP8": _FP8.replace(activation=FP8_PER_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": _FP8.replace(granularity="channel", activation=FP8_PER_TOKEN),
    "FP8_PB_WO": _FP8.replace(granularity="block", block=(128, 128)),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
    "MXFP4": _MXFP4,
}
_KV_DTYPES = {"FP8": "float8_e4m3fn", "INT8": "int8"}
_SUFFIXES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


@dataclass(frozen=True)
class ModeloptReader:
    """Reader of one modelopt checkpoint."""

    source: CheckpointSource
    algorithm: str
    layers: Mapping[str, str] | None
    """Mixed precision: algorithm of every quantized layer."""
    kv_dtype: str | None

    @classmethod
    def from_source(cls, source: CheckpointSource) -> ModeloptReader | None:
        """The reader if the config is modelopt's.

        Raises:
          CheckpointError: If an option is not supported or config and tensors contradict.
        """
        config = source.quantization
        where = f"{source.location}/{source.quantization_file}: modelopt"
        if source.quantization_file == "hf_quant_config.json":
            producer = config.get("producer")
            name = producer.get("name") if isinstance(producer, Mapping) else None
            inner = config.get("quantization")
            if name not in (None, "modelopt") or not isinstance(inner, Mapping):
                raise CheckpointError(
                    f"{where}: expected producer.name 'modelopt' and an object 'quantization'; "
                    f"found producer={producer!r}"
                )
            config = inner
        elif not str(config.get("quant_method")).startswith("modelopt"):
            if config.get("quant_method") is not None or "quant_algo" not in config:
                return None
        algorithm = config.get("quant_algo")
        kv_dtype = _kv_dtype(config, where)
        layers = None
        if algorithm is None and kv_dtype is not None:
            layers = {}  # only the KV cache is quantized
        elif algorithm == "MIXED_PRECISION":
            layers = _mixed(config.get("quantized_layers"), where)
        else:
            _known(algorithm, where)
        if algorithm in ("NVFP4", "W4A16_NVFP4") and config.get("group_size", 16) != 16:
            raise CheckpointError(f"{where}: group_size={config['group_size']!r} must be 16")
        reader = cls(source, str(algorithm), layers, kv_dtype)
        reader._check(config, where)
        return reader

    @property
    def name(self) -> str:
        """Method and variant."""
        return f"modelopt {self.algorithm}"

    def is_quantized(self, layer: str) -> bool:
        """Whether the weight of a layer is stored in fp8 or packed bytes."""
        info = self.source.tensors.get(f"{layer}.weight")
        return info is not None and info.dtype in ("F8_E4M3", "U8")

    def format(self, layer: str) -> QuantFormat:
        """The format of one layer."""
        algorithm = self.algorithm if self.layers is None else self.layers[layer]
        return _ALGORITHMS[algorithm]

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        """Tensors of one layer of kernel shape ``(K, N)``."""
        fmt, (k, n) = self.format(layer), shape
        rows, groups = tile_counts(fmt, shape)
        if fmt.bits == 4:
            if k % 2:
                raise CheckpointError(f"{layer}: packed fp4 needs an even size, K is {k}")
            scale_type = ("F8_E4M3",) if fmt == _NVFP4 else ("U8", "F8_E8M0")
            expected = {
                "weight": ExpectedTensor((n, k // 2), ("U8",)),
                "weight_scale": ExpectedTensor((rows, groups), scale_type),
            }
            if fmt == _NVFP4:
                expected["weight_scale_2"] = ExpectedTensor(None, ("F32",))
            if f"{layer}.input_scale" in self.source.tensors:
                expected["input_scale"] = ExpectedTensor(None, ("F32",))
        else:
            expected = {
                "weight": ExpectedTensor((n, k), ("F8_E4M3",)),
                # The number of scales is checked by `read`: some versions keep axes of length one.
                "weight_scale": ExpectedTensor(None, ("F32",)),
            }
            if fmt.activation == FP8_PER_TENSOR:
                expected["input_scale"] = ExpectedTensor(None, ("F32",))
        return {f"{layer}.{suffix}": entry for suffix, entry in expected.items()}

    def read(
        self, layer: str, get: GetTensor, shape: tuple[int, int], dtype: Any
    ) -> QuantizedArray:
        """One layer with its stored codes and scales."""
        fmt = self.format(layer)
        codes = get(f"{layer}.weight")
        parts: dict[str, Any] = {}
        if fmt.bits == 4:
            codes = unpack(codes, 4, size=shape[0], axis=1).view(ml_dtypes.float4_e2m1fn)
        if fmt == _NVFP4:
            parts["global_scale"] = scalar(f"{layer}.weight_scale_2", get)
        if fmt.activation == FP8_PER_TENSOR:
            parts["act_scale"] = scalar(f"{layer}.input_scale", get)
        name = f"{layer}.weight_scale"
        scale: Any = kernel_scale(name, get(name), tile_counts(fmt, shape))
        kernel: Any = codes.T
        return QuantizedArray.make(kernel, scale, fmt, dtype=dtype, **parts)

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        """Names that belong to the KV cache."""
        return kv_scale_names(self.source.tensors, num_layers)

    def kv_scales(self, get: GetTensor, num_layers: int, num_kv_heads: int) -> KVScales | None:
        """Static KV cache scales, or None: also where the config has a ``kv_cache_quant_algo`` and
        no scales are stored, as in models exported without calibrating the cache. Nothing is
        assumed then, the cache is as the caller chooses it."""
        dtype = self.kv_dtype or "float8_e4m3fn"
        return read_kv_scales(self.source.tensors, get, num_layers, num_kv_heads, dtype=dtype)

    def _check(self, config: Mapping[str, Any], where: str) -> None:
        excluded = config.get("exclude_modules", config.get("ignore")) or []
        if not isinstance(excluded, list) or not all(isinstance(p, str) for p in excluded):
            raise CheckpointError(f"{where}: exclude_modules must be a list, it is {excluded!r}")
        some = False
        for name, info in self.source.tensors.items():
            layer, _, suffix = name.rpartition(".")
            if suffix == "pre_quant_scale":
                raise CheckpointError(
                    f"{where}: {name} scales activations before the product (an AWQ variant), "
                    "which is not supported"
                )
            if suffix == "weight" and self.is_quantized(layer):
                some = True
                if any(fnmatch.fnmatchcase(layer, pattern) for pattern in excluded):
                    raise CheckpointError(
                        f"{where}: {layer} is excluded from quantization but its weight is "
                        f"{info.dtype}; config and tensors do not belong together"
                    )
                if self.layers is not None and layer not in self.layers:
                    raise CheckpointError(
                        f"{where}: quantized_layers does not list {layer}, whose weight is "
                        f"{info.dtype}"
                    )
                packed = self.format(layer).bits == 4
                if packed != (info.dtype == "U8"):
                    raise CheckpointError(
                        f"{where}: {name} is {info.dtype}, which {self.algorithm} does not store"
                    )
            elif suffix in _SUFFIXES and not self.is_quantized(layer):
                raise CheckpointError(
                    f"{where}: there is {name} but {layer}.weight is missing or not quantized"
                )
        if not some and self.layers != {}:
            raise CheckpointError(f"{where}: no weight is quantized; the config says otherwise")


def _known(algorithm: Any, where: str) -> None:
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{where}: quant_algo={algorithm!r} is not supported; supported are "
            f"{', '.join(_ALGORITHMS)}"
        )


def _mixed(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: quantized_layers must be an object, it is {value!r}")
    layers: dict[str, str] = {}
    for layer, entry in value.items():
        algorithm = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
        _known(algorithm, f"{where}: quantized_layers.{layer}")
        layers[layer] = str(algorithm)
    return layers


def _kv_dtype(config: Mapping[str, Any], where: str) -> str | None:
    algorithm = config.get("kv_cache_quant_algo")
    if algorithm is None and isinstance(config.get("kv_cache_scheme"), Mapping):
        scheme = config["kv_cache_scheme"]
        found = (scheme.get("type"), scheme.get("num_bits"))
        algorithm = {str(("float", 8)): "FP8", str(("int", 8)): "INT8"}.get(str(found), str(found))
    if algorithm in (None, "", "none"):
        return None
    if not isinstance(algorithm, str) or algorithm not in _KV_DTYPES:
        raise CheckpointError(
            f"{where}: kv_cache_quant_algo={algorithm!r} is not supported; supported are "
            f"{', '.join(_KV_DTYPES)} (remove the key to use another cache)"
        )
    return _KV_DTYPES[algorithm]
