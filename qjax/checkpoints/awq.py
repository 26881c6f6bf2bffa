"""AutoAWQ checkpoints: 4 bits, layouts "gemm" (read and written) and "gemv" (read).

For a kernel ``(K, N)`` in groups of ``g`` rows, ``G = K / g``:

=========  =======  ==================  ==========================================
tensor     type     gemm                gemv, ``width`` >= ceil(G/8) padded words
=========  =======  ==================  ==========================================
qweight    int32    ``(K, N/8)``        ``(N, K/8)``
qzeros     int32    ``(G, N/8)``        ``(N, width)``
scales     float    ``(G, N)``          ``(N, 8 * width)``
=========  =======  ==================  ==========================================

Codes and zero points are unsigned and stored as they are: ``w = (q - z) * s``. "gemv" packs nibbles
in order along the last axis. "gemm" packs along N and shuffles: the nibble at bits ``4i`` of word
``c`` belongs to column ``8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``.

References:
  AutoAWQ ``awq/modules/linear/{gemm,gemv}.py``, ``awq/utils/packing_utils.py``. AWQ: Lin et al.,
  arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.checkpoints import bitpack
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import CheckpointSource, ExpectedTensor, GetTensor, KVScales
from qjax.formats import QuantFormat
from qjax.quantized_array import QuantizedArray

SCALE_DTYPES = ("F16", "BF16", "F32")
GEMM, GEMV = "gemm", "gemv"

_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of the eight in a word, whose code stands at bits ``4i``."""

# What else `version` and `format` may be, so that the message can say what it is.
_REFUSED = {
    "gemv_fast": "int16 words in another order",
    "marlin": "weights shuffled for the Marlin kernel",
    "exllama": "weights shuffled for the ExLlama kernel",
    "exllamav2": "weights shuffled for the ExLlama kernel",
    "ipex": "weights shuffled for the IPEX kernel",
    "llm-awq": "int16 words in the order of the original llm-awq",
}


@dataclass(frozen=True)
class AwqConfig:
    """A parsed quantization config.

    Attributes:
      version: ``"gemm"`` or ``"gemv"``.
      group_size: Rows per scale; None is one group over all rows (``-1`` in files).
      zero_point: False if every zero point is 8.
      excluded: ``modules_to_not_convert``: a layer is not quantized if its name contains one.
    """

    version: str
    group_size: int | None
    zero_point: bool
    excluded: tuple[str, ...]

    @classmethod
    def parse(cls, values: Mapping[str, Any], file: str = "config.json") -> AwqConfig:
        """From the config as JSON gives it.

        Raises:
          CheckpointError: If something is not supported or makes no sense: file, key and value.
        """
        version = GEMM
        # GPTQModel writes AWQ files with `format`; AutoAWQ and AutoRound with `version`.
        for key in ("version", "format", "checkpoint_format"):
            if values.get(key) is not None:
                version = _layout(values[key], key, file)
                break
        backend = values.get("backend")
        if backend is not None and str(backend).lower() in _REFUSED:
            _layout(backend, "backend", file)
        _, bits = _either(values, "bits", "w_bit", file)
        if type(bits) is not int or bits != 4:
            raise CheckpointError(
                f"{file}: awq key 'bits' is {bits!r}, which is not supported; only 4 bits are"
            )
        key, group_size = _either(values, "group_size", "q_group_size", file)
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise CheckpointError(
                f"{file}: awq key {key!r} is {group_size!r}; it must be positive, or -1 for one "
                "group over all rows"
            )
        zero_point = values.get("zero_point")
        if zero_point is None:
            zero_point = not values.get("sym", False)
        if not isinstance(zero_point, bool):
            raise CheckpointError(f"{file}: awq key 'zero_point' is {zero_point!r}, not a boolean")
        excluded = values.get("modules_to_not_convert") or []
        if not isinstance(excluded, list) or not all(isinstance(e, str) and e for e in excluded):
            raise CheckpointError(
                f"{file}: awq key 'modules_to_not_convert' must be a list of names, it is "
                f"{excluded!r}"
            )
        return cls(
            version=version,
            group_size=None if group_size == -1 else group_size,
            zero_point=zero_point,
            excluded=tuple(excluded),
        )

    def format(self, scale_dtype: str) -> QuantFormat:
        """The format of a layer's ``QuantizedArray``."""
        return QuantFormat(
            "int4",
            "channel" if self.group_size is None else "group",
            group_size=self.group_size,
            symmetric=not self.zero_point,
            scale_dtype=scale_dtype,
        )

    def excludes(self, layer: str) -> bool:
        """Whether the config says that a layer is not quantized."""
        return any(part in layer for part in self.excluded)


def layer_shapes(
    config: AwqConfig, shape: tuple[int, int], layer: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of the three tensors of a layer.

    Args:
      config: Layout and group size.
      shape: Kernel shape ``(K, N)``.
      layer: Name, for messages.

    Raises:
      CheckpointError: If the layout cannot hold such a kernel.
    """
    k, n = shape
    group_size = config.group_size or k
    if k % group_size:
        raise CheckpointError(
            f"{layer}: awq needs whole groups, but {k} in features are not a multiple of "
            f"{group_size=}; choose one that divides them, or leave this layer unquantized"
        )
    if n % 8:
        raise CheckpointError(
            f"{layer}: awq packs 8 codes into a word, but {n} out features are not a multiple of "
            "8; leave this layer unquantized"
        )
    groups = k // group_size
    if config.version == GEMM:
        return {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}
    if k % 8:
        raise CheckpointError(f"{layer}: awq gemv packs along {k} in features, no multiple of 8")
    if group_size < 128 and group_size not in (32, 64):
        raise CheckpointError(
            f"{layer}: awq gemv has no layout for {group_size=}; only 32, 64 and 128 or more"
        )
    # Its kernel loads scales in pieces that cover 1,024 rows.
    multiple = 8 if group_size >= 128 else 8 * 128 // group_size
    width = -(-groups // multiple) * multiple // 8
    return {"qweight": (n, k // 8), "qzeros": (n, width), "scales": (n, 8 * width)}


def unpack_gemm(words: np.ndarray) -> np.ndarray:
    """uint8 codes ``(rows, 8 * columns)`` of int32 words ``(rows, columns)``."""
    rows, columns = words.shape
    words = words.view(np.uint32)
    codes = np.empty((rows, columns, 8), np.uint8)
    for i, column in enumerate(_GEMM_ORDER):
        codes[:, :, column] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return codes.reshape(rows, 8 * columns)


def pack_gemm(codes: np.ndarray) -> np.ndarray:
    """The inverse of ``unpack_gemm``; codes must lie in ``[0, 16)``."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, column in enumerate(_GEMM_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def unpack_layer(
    tensors: Mapping[str, np.ndarray],
    config: AwqConfig,
    *,
    layer: str = "layer",
    dtype: Any = np.float32,
) -> QuantizedArray:
    """One layer's tensors as a ``QuantizedArray``; codes and scales unchanged.

    Args:
      tensors: ``qweight``, ``qzeros`` and ``scales``.
      config: Layout, group size and symmetry.
      layer: Name, for messages.
      dtype: Result type of ``dequantize``.

    Returns:
      Kernel ``(K, N)`` on the host.

    Raises:
      CheckpointError: If tensors and config contradict each other.
    """
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    gemm = config.version == GEMM
    shape = (qweight.shape[0], qweight.shape[1] * 8)
    k, n = shape if gemm else shape[::-1]
    for suffix, want in layer_shapes(config, (k, n), layer).items():
        if tensors[suffix].shape != want:
            raise CheckpointError(
                f"{layer}.{suffix} has shape {tensors[suffix].shape}; bits=4 and "
                f"group_size={config.group_size or -1} need {want}"
            )
    if gemm:
        codes, zeros, scales = unpack_gemm(qweight), unpack_gemm(qzeros), np.array(scales)
    else:
        groups = k // (config.group_size or k)
        # Words are transposed, not codes: an eighth of the memory traffic.
        codes = bitpack.unpack(np.ascontiguousarray(qweight.T), 4, size=k, axis=0)
        zeros = bitpack.unpack(qzeros, 4, size=8 * qzeros.shape[1], axis=1)[:, :groups].T
        scales = scales[:, :groups].T.copy()
    if not np.isfinite(scales.astype(np.float32)).all():
        raise CheckpointError(f"{layer}.scales holds values that are not finite; download it again")
    zero_point = None
    if config.zero_point:
        zero_point = zeros.astype(np.int8) - np.int8(8)
    elif (zeros != 8).any():
        raise CheckpointError(
            f"{layer}.qzeros holds zero points {zeros.min()} to {zeros.max()}, but zero_point is "
            "false in the config, which means 8 throughout; set it to true if the tensor is right"
        )
    # Host arrays: the loader moves them to a device, sharded or not.
    parts: dict[str, Any] = {
        "qvalue": bitpack.to_signed(codes, 4),
        "scale": scales,
        "zero_point": zero_point,
    }
    return QuantizedArray.make(fmt=config.format(str(scales.dtype)), dtype=dtype, **parts)


def pack_layer(q: QuantizedArray) -> dict[str, np.ndarray]:
    """``qweight``, ``qzeros`` and ``scales`` of an int4 kernel, in the "gemm" layout."""
    scales = np.asarray(q.scale)
    if q.zero_point is None:
        zeros = np.full(scales.shape, 8, np.uint8)
    else:
        zeros = bitpack.to_unsigned(np.asarray(q.zero_point), 4)
    codes = bitpack.to_unsigned(np.asarray(q.qvalue), 4)
    return {"qweight": pack_gemm(codes), "qzeros": pack_gemm(zeros), "scales": scales}


class AwqReader:
    """Reader of one AutoAWQ checkpoint. Whether a layer is quantized is decided by its tensors: a
    layer stored as a plain ``weight`` is read as such, and one that config and tensors disagree on
    is an error.
    """

    def __init__(self, source: CheckpointSource):
        self._tensors = source.tensors
        where = f"{source.location}/{source.quantization_file}"
        self._config = AwqConfig.parse(source.quantization, where)
        layers = [t.removesuffix(".qweight") for t in source.tensors if t.endswith(".qweight")]
        if not layers:
            raise CheckpointError(
                f"{where} says awq, but no tensor is named *.qweight; if the weights are not "
                "quantized, remove the quantization config"
            )
        for layer in layers:
            if self._config.excludes(layer):
                raise CheckpointError(
                    f"{where}: awq key 'modules_to_not_convert' excludes {layer}, but tensor "
                    f"{layer}.qweight is there; config and weights do not belong together"
                )

    @classmethod
    def from_source(cls, source: CheckpointSource) -> AwqReader | None:
        """The reader if the config is one of AWQ.

        Raises:
          CheckpointError: If it is and something in it is not supported.
        """
        values = source.quantization
        method = values.get("quant_method")
        if method is None and ("w_bit" in values or {"zero_point", "version"} <= values.keys()):
            method = "awq"  # old files, which do not name their method
        return cls(source) if str(method).lower() == "awq" else None

    @property
    def name(self) -> str:
        """Method and variant."""
        group_size = self._config.group_size
        tile = "per channel" if group_size is None else f"g{group_size}"
        return f"awq 4 bit {tile} ({self._config.version})"

    def is_quantized(self, layer: str) -> bool:
        """Whether a layer has packed codes."""
        if f"{layer}.qweight" in self._tensors:
            return True
        if f"{layer}.weight" in self._tensors:
            return False
        # Neither: the loader will say which tensor is missing. AWQ never quantizes lm_head.
        return layer != "lm_head" and not self._config.excludes(layer)

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        """Tensors of one layer of kernel shape ``(K, N)``."""
        shapes = layer_shapes(self._config, shape, layer)
        for suffix, want in shapes.items():
            have = self._tensors.get(f"{layer}.{suffix}")
            if have is not None and have.shape != want:
                raise CheckpointError(
                    f"{layer}.{suffix} has shape {have.shape}; a {shape[0]} x {shape[1]} kernel "
                    f"with bits=4, group_size={self._config.group_size or -1} and "
                    f"version={self._config.version!r} needs {want}"
                )
        return {
            f"{layer}.{suffix}": ExpectedTensor(
                want, SCALE_DTYPES if suffix == "scales" else ("I32",)
            )
            for suffix, want in shapes.items()
        }

    def read(
        self, layer: str, get: GetTensor, shape: tuple[int, int], dtype: Any
    ) -> QuantizedArray:
        """Convert one layer."""
        tensors = {n.rpartition(".")[2]: get(n) for n in self.expected(layer, shape)}
        return unpack_layer(tensors, self._config, layer=layer, dtype=dtype)

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        """None: the format has no KV cache scales."""
        return frozenset()

    def kv_scales(self, get: GetTensor, num_layers: int, num_kv_heads: int) -> KVScales | None:
        """None: the format has no KV cache scales."""
        return None


def _layout(value: Any, key: str, file: str) -> str:
    name = str(value).lower()  # AutoAWQ wrote "GEMM" at first
    if name in (GEMM, GEMV):
        return name
    why = f" ({_REFUSED[name]})" if name in _REFUSED else ""
    raise CheckpointError(
        f"{file}: awq key {key!r} is {value!r}{why}, which is not supported; supported are 'gemm' "
        "and 'gemv'. Quantize the unquantized checkpoint here instead"
    )


def _either(values: Mapping[str, Any], new: str, old: str, file: str) -> tuple[str, Any]:
    """Value of a key that has two spellings, and the spelling used."""
    if new in values and old in values and values[new] != values[old]:
        raise CheckpointError(
            f"{file}: awq keys {new!r}={values[new]!r} and {old!r}={values[old]!r} contradict each "
            "other"
        )
    key = old if old in values else new
    return key, values.get(key)
