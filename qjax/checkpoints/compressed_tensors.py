"""compressed-tensors checkpoints (llm-compressor, neuralmagic, Red Hat AI).

=====================  ========================  =================================================
format                 tensors of a layer        meaning
=====================  ========================  =================================================
``pack-quantized``     ``weight_packed`` I32     ``(N, ceil(K*b/32))``, codes + 2**(b-1) packed
                                                 along K
                       ``weight_shape`` I64      ``[N, K]``
                       ``weight_zero_point``     asymmetric: I32 ``(ceil(N*b/32), G)``, packed
                                                 along N with the same offset
                       ``weight_g_idx`` I32      activation order: group of every column, ``(K,)``
``int-quantized``      ``weight`` I8             ``(N, K)``
``float-quantized``    ``weight`` F8_E4M3        ``(N, K)``
``naive-quantized``    ``weight``                either of the two
``mxfp8-quantized``    ``weight`` F8_E4M3        ``(N, K)``, scales as exponent bytes
``nvfp4-pack-...``     ``weight_packed`` U8      ``(N, K/2)``, even k in the low half;
                       ``weight_global_scale``   F32, a *divisor* of the scales
``mxfp4-pack-...``     ``weight_packed`` U8      the same with exponent bytes and no global scale
all                    ``weight_scale``          ``(1,)``, ``(N, 1)``, ``(N, G)`` or N x K blocks
static activations     ``input_scale``           ``(1,)``
=====================  ========================  =================================================

``w = (code - zero_point) * weight_scale``. Scales keep the type they are stored in; where they
are whole multiples of a step per column, the format says so (``QuantFormat.scale_steps``). Codes
fill their words without gaps; older versions left the bits unused that do not hold a whole code
(3, 5, 6 and 7 bits), which shows in the number of words. ``quantization_status`` is not looked at:
there are compressed checkpoints which say "frozen", and the tensors tell what is stored.

Dynamic int8 activations are scaled by ``absmax / 127``, as vLLM's kernel for these checkpoints does
(``csrc/quantization/compressed_tensors/int8_quant_kernels.cu``); compressed-tensors itself divides
by 127.5 in its simulation and uses -128. Files do not say which. Of a 656K model with int8 weights
and activations the logits differ by 2.2 % of their norm between the two, either is 2.0 % from
unquantized activations, and perplexities are 21.295 and 21.304 (float32: 21.260).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qjax.checkpoints.bitpack import packed_size, to_signed, unpack
from qjax.checkpoints.ct_config import CTConfig, Scheme, parse_config
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.kv_scales import kv_scale_names, read_kv_scales
from qjax.checkpoints.reader import CheckpointSource, ExpectedTensor, GetTensor, KVScales
from qjax.checkpoints.scales import (
    FLOAT_DTYPES,
    kernel_scale,
    legal_scale_shapes,
    only_zeros,
    scalar,
    scale_dtype,
    tile_counts,
    with_scale_steps,
)
from qjax.formats import QuantFormat
from qjax.quantized_array import QuantizedArray

# Tensors by which a layer shows that it is quantized.
_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
_CODES = {"int": "I8", "float": "F8_E4M3"}


@dataclass(frozen=True)
class CompressedTensorsReader:
    """Reader of one compressed-tensors checkpoint."""

    source: CheckpointSource
    config: CTConfig

    @classmethod
    def from_source(cls, source: CheckpointSource) -> CompressedTensorsReader | None:
        """The reader if the config says ``compressed-tensors``.

        Raises:
          CheckpointError: If an option is not supported or config and tensors contradict.
        """
        if source.quantization.get("quant_method") != "compressed-tensors":
            return None
        where = f"{source.location}/{source.quantization_file}: compressed-tensors"
        reader = cls(source, parse_config(source.quantization, where))
        for name, info in source.tensors.items():
            layer, _, suffix = name.rpartition(".")
            codes = suffix == "weight" and info.dtype in _CODES.values()
            if (codes or suffix in _SUFFIXES) and not reader.is_quantized(layer):
                raise CheckpointError(
                    f"{where}: the checkpoint holds {name} ({info.dtype}), but no config group "
                    f"targets {layer}, or it is ignored; config and tensors do not belong together"
                )
        return reader

    @property
    def name(self) -> str:
        """Method and variants."""
        schemes = [s for s in self.config.schemes.values() if s is not None]
        variants = dict.fromkeys(f"{s.storage} {s.fmt.name}" for s in schemes)
        return f"compressed-tensors ({', '.join(variants)})"

    def is_quantized(self, layer: str) -> bool:
        """Whether a config group targets the layer."""
        return self.config.scheme(layer) is not None

    def format(self, layer: str) -> QuantFormat:
        """The format of one layer, with the type of its scales."""
        scheme = self._scheme(layer)
        name = f"{layer}.weight_scale"
        return scheme.fmt.replace(
            scale_dtype=scale_dtype(name, self.source.tensors, _scale_types(scheme))
        )

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        """Tensors of one layer of kernel shape ``(K, N)``."""
        scheme, (k, n) = self._scheme(layer), shape
        fmt, tensors = scheme.fmt, self.source.tensors
        legal = legal_scale_shapes(fmt, shape)
        found = tensors.get(f"{layer}.weight_scale")
        scale_shape = found.shape if found is not None and found.shape in legal else legal[0]
        expected = {"weight_scale": ExpectedTensor(scale_shape, _scale_types(scheme))}
        words_of = padded_size if self._has_gaps(layer, k, fmt.bits) else packed_size
        if scheme.storage == "pack-quantized":
            words = words_of(k, fmt.bits)
            expected["weight_packed"] = ExpectedTensor((n, words), ("I32",))
            expected["weight_shape"] = ExpectedTensor((2,), ("I64", "I32"))
        elif fmt.bits == 4 and fmt.is_float:
            if k % 2:
                raise CheckpointError(f"{layer}: {scheme.storage} needs an even size, K is {k}")
            expected["weight_packed"] = ExpectedTensor((n, k // 2), ("U8",))
        else:
            code = _CODES["float" if fmt.is_float else "int"]
            expected["weight"] = ExpectedTensor((n, k), (code,))
        if not fmt.symmetric:
            if _packs_zero_points(scheme):
                rows = words_of(n, fmt.bits)
                groups = tile_counts(fmt, shape)[1]
                expected["weight_zero_point"] = ExpectedTensor((rows, groups), ("I32",))
            else:
                expected["weight_zero_point"] = ExpectedTensor(scale_shape, ("I8",))
        if scheme.act_order:
            expected["weight_g_idx"] = ExpectedTensor((k,), ("I32",))
        if scheme.storage == "nvfp4-pack-quantized":
            expected["weight_global_scale"] = ExpectedTensor(None, ("F32",))
        if fmt.activation is not None and not fmt.activation.dynamic:
            expected["input_scale"] = ExpectedTensor(None, FLOAT_DTYPES)
        for suffix, entry in self._redundant(layer, scheme).items():
            expected.setdefault(suffix, entry)
        return {f"{layer}.{suffix}": entry for suffix, entry in expected.items()}

    def read(
        self, layer: str, get: GetTensor, shape: tuple[int, int], dtype: Any
    ) -> QuantizedArray:
        """One layer; codes stored one per element stay a view of the file."""
        scheme, fmt = self._scheme(layer), self.format(layer)
        counts = tile_counts(fmt, shape)
        name = f"{layer}.weight_scale"
        scale = kernel_scale(name, get(name), counts)
        fmt = with_scale_steps(fmt, scale)
        codes = self._codes(layer, scheme, get, shape)
        zero_point = None
        if not fmt.symmetric:
            zero_point = self._zero_point(layer, scheme, get, shape[0], counts)
        perm = None
        if scheme.act_order:
            perm = permutation(f"{layer}.weight_g_idx", get, shape[0], fmt)
        if perm is not None:
            codes = codes[:, perm]
        parts: dict[str, Any] = {"zero_point": zero_point, "perm": perm}
        if scheme.storage == "nvfp4-pack-quantized":
            divisor = scalar(f"{layer}.weight_global_scale", get)
            parts["global_scale"] = np.asarray(np.float32(1) / divisor)
        if fmt.activation is not None and not fmt.activation.dynamic:
            parts["act_scale"] = scalar(f"{layer}.input_scale", get)
        redundant = [s for s in self._redundant(layer, scheme) if s.endswith("zero_point")]
        only_zeros((f"{layer}.{suffix}" for suffix in redundant), get)
        kernel: Any = codes.T
        kernel_scales: Any = scale
        return QuantizedArray.make(kernel, kernel_scales, fmt, dtype=dtype, **parts)

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        """Names that belong to the KV cache."""
        return kv_scale_names(self.source.tensors, num_layers)

    def kv_scales(self, get: GetTensor, num_layers: int, num_kv_heads: int) -> KVScales | None:
        """Static KV cache scales, or None."""
        dtype = self.config.kv_dtype
        return read_kv_scales(
            self.source.tensors,
            get,
            num_layers,
            num_kv_heads,
            dtype=dtype or "float8_e4m3fn",
            declared=None if dtype is None else "kv_cache_scheme",
        )

    def _scheme(self, layer: str) -> Scheme:
        scheme = self.config.scheme(layer)
        if scheme is None:
            raise ValueError(f"{layer} is not quantized; ask is_quantized first")
        return scheme

    def _has_gaps(self, layer: str, k: int, bits: int) -> bool:
        """Whether a layer is packed in the older way, where the two differ in size."""
        info = self.source.tensors.get(f"{layer}.weight_packed")
        padded = padded_size(k, bits)
        return info is not None and info.shape[-1:] == (padded,) != (packed_size(k, bits),)

    def _redundant(self, layer: str, scheme: Scheme) -> dict[str, ExpectedTensor]:
        """Tensors that some versions write and that change nothing, as far as they are there.

        Zero points of symmetric formats must be zeros, which ``read`` checks. The input scale of
        NVFP4 has nothing to multiply, its activations stay in 16 bits.
        """
        suffixes = ["input_zero_point"]
        if scheme.fmt.symmetric:
            suffixes.append("weight_zero_point")
        if scheme.storage == "nvfp4-pack-quantized":
            suffixes.append("input_global_scale")
        tensors = self.source.tensors
        return {
            suffix: ExpectedTensor(None, (*FLOAT_DTYPES, "F8_E4M3", "I8", "U8", "I32"))
            for suffix in suffixes
            if f"{layer}.{suffix}" in tensors
        }

    def _codes(
        self, layer: str, scheme: Scheme, get: GetTensor, shape: tuple[int, int]
    ) -> np.ndarray:
        """``(N, K)`` codes in their storage type."""
        fmt, (k, n) = scheme.fmt, shape
        if scheme.storage == "pack-quantized":
            stored = tuple(int(v) for v in get(f"{layer}.weight_shape"))
            if stored != (n, k):
                raise CheckpointError(
                    f"{layer}.weight_shape says {stored}, the model needs {(n, k)}"
                )
            words, gaps = get(f"{layer}.weight_packed"), self._has_gaps(layer, k, fmt.bits)
            return to_signed(unpack_words(words, fmt.bits, k, axis=1, gaps=gaps), fmt.bits)
        if fmt.bits == 4 and fmt.is_float:
            codes = unpack(get(f"{layer}.weight_packed"), 4, size=k, axis=1)
            return codes.view(ml_dtypes.float4_e2m1fn)
        codes = get(f"{layer}.weight")
        if fmt.is_int and fmt.bits < 8:
            limit = 2 ** (fmt.bits - 1)
            if codes.size and not (-limit <= codes.min() and codes.max() < limit):
                raise CheckpointError(
                    f"{layer}.weight has codes in [{codes.min()}, {codes.max()}], the config says "
                    f"{fmt.bits} bits"
                )
        return codes.view(fmt.storage_dtype)

    def _zero_point(
        self, layer: str, scheme: Scheme, get: GetTensor, k: int, counts: tuple[int, int]
    ) -> np.ndarray:
        """int8 ``(K tiles, N tiles)``."""
        stored = get(f"{layer}.weight_zero_point")
        if _packs_zero_points(scheme):
            bits = scheme.fmt.bits
            gaps = self._has_gaps(layer, k, bits)
            codes = unpack_words(stored, bits, counts[0], axis=0, gaps=gaps)
            stored = to_signed(codes, bits).astype(np.int8)
        return stored.reshape(counts).T


def padded_size(size: int, bits: int) -> int:
    """Words that ``size`` codes took before codes were split across words."""
    return -(-size // (32 // bits))


def unpack_words(
    words: np.ndarray, bits: int, size: int, *, axis: int, gaps: bool = False
) -> np.ndarray:
    """Unsigned codes, ``size`` along ``axis``, of int32 words in either packing."""
    if gaps:
        rows = np.moveaxis(words, axis, -1).view(np.uint32)
        shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        codes = (rows[..., None] >> shifts) & np.uint32(2**bits - 1)
        codes = codes.astype(np.uint8).reshape(*rows.shape[:-1], -1)[..., :size]
        return np.ascontiguousarray(np.moveaxis(codes, -1, axis))
    if axis == 1 and 8 % bits == 0 and words.flags.c_contiguous:
        # As bytes: fewer and longer passes. The file is little-endian, as are words of memory.
        words = words.view(np.uint8)[:, : packed_size(size, bits, 8)]
    return unpack(words, bits, size=size, axis=axis)


def permutation(name: str, get: GetTensor, size: int, fmt: QuantFormat) -> np.ndarray | None:
    """The order that brings the columns of each group together; None if there is no order.

    Raises:
      CheckpointError: If the groups are not those of ``fmt``.
    """
    groups = get(name)
    if (groups == -1).all():  # written by upstream for layers it did not reorder
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    tile = size if fmt.group_size is None else fmt.group_size
    if not np.array_equal(groups[order], np.arange(size, dtype=np.int32) // tile):
        raise CheckpointError(
            f"{name} does not divide {size} columns into groups of {tile}; the checkpoint is "
            "damaged or its group_size is wrong"
        )
    return order


def _packs_zero_points(scheme: Scheme) -> bool:
    packed = scheme.storage == "pack-quantized"
    return packed and scheme.fmt.granularity in ("group", "channel")


def _scale_types(scheme: Scheme) -> tuple[str, ...]:
    if scheme.fmt.scale_dtype == "float8_e8m0fnu":
        return ("U8", "F8_E8M0")
    return ("F8_E4M3",) if scheme.fmt.scale_dtype == "float8_e4m3fn" else FLOAT_DTYPES
