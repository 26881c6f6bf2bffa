"""GPTQ checkpoints, v1 and v2: 2, 3, 4 and 8 bits, with and without zero points, activation order.

=========  ======  =========================================================================
tensor     type    layout, for a kernel ``(K, N)`` of ``b`` bits in ``G`` groups
=========  ======  =========================================================================
qweight    int32   ``(K*b/32, N)``: unsigned codes, packed along K (see ``bitpack``)
qzeros     int32   ``(G, N*b/32)``: zero points, packed along N; v1 stores them minus one
scales     float   ``(G, N)``; may be negative (AutoRound)
g_idx      int32   ``(K,)``: the group of each row
=========  ======  =========================================================================

``w[k, n] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])``. Rows stand in original order; with
activation order ``g_idx`` is not sorted, and the rows are sorted here so that groups are contiguous
(``QuantizedArray.perm``). Writing restores the order.

**The v1 minus one.** GPTQModel subtracts 1 from every field of 2, 4 and 8 bits at once, by
subtracting 0x55555555, 0x11111111 or 0x01010101 from the int32 word, so that a zero point of 0
borrows from its neighbours. Adding the same constant to the word is the exact inverse; adding 1 to
each field, as some engines do, is not. 3-bit fields are done one by one, modulo 8. A file written
here is therefore v1 only if no zero point is 0, where all readers agree, and v2 otherwise.

References:
  GPTQModel ``nn_modules/qlinear/__init__.py`` (pack_original, dequantize_weight) and
  ``utils/model.py`` (the v1/v2 conversion). GPTQ: Frantar et al., arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoints import bitpack
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.gptq_config import BITS, V1, GptqConfig, GptqLayer
from qjax.checkpoints.reader import CheckpointSource, ExpectedTensor, GetTensor, KVScales
from qjax.quantized_array import QuantizedArray

SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

_V1_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def layer_shapes(
    settings: GptqLayer, shape: tuple[int, int], layer: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of the four tensors of a layer.

    Args:
      settings: Bits and group size.
      shape: Kernel shape ``(K, N)``.
      layer: Name, for messages.

    Raises:
      CheckpointError: If the layout cannot hold such a kernel.
    """
    k, n = shape
    bits = settings.bits
    for axis, size in (("in", k), ("out", n)):
        if size * bits % 32:
            raise CheckpointError(
                f"{layer}: gptq packs {bits}-bit codes into whole int32 words, which {size} "
                f"{axis} features do not fill; leave this layer unquantized"
            )
    groups = 1 if settings.group_size is None else -(-k // settings.group_size)
    return {
        "qweight": (k * bits // 32, n),
        "qzeros": (groups, n * bits // 32),
        "scales": (groups, n),
        "g_idx": (k,),
    }


def decode_zeros(qzeros: np.ndarray, bits: int, n: int, checkpoint_format: str) -> np.ndarray:
    """Zero points ``(G, n)``, unsigned, uint8."""
    if checkpoint_format == V1 and bits in _V1_ONES:
        qzeros = qzeros.view(np.uint32) + np.uint32(_V1_ONES[bits])  # wraps
    zeros = bitpack.unpack(qzeros, bits, size=n, axis=1)
    if checkpoint_format == V1 and bits not in _V1_ONES:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return zeros


def encode_zeros(zeros: np.ndarray, bits: int, checkpoint_format: str) -> np.ndarray:
    """The inverse of ``decode_zeros``: int32 ``(G, n * bits / 32)``."""
    if checkpoint_format == V1 and bits not in _V1_ONES:
        zeros = (zeros - np.uint8(1)) & np.uint8(2**bits - 1)
    words = bitpack.pack(zeros, bits, axis=1)
    if checkpoint_format == V1 and bits in _V1_ONES:
        words = (words.view(np.uint32) - np.uint32(_V1_ONES[bits])).view(np.int32)
    return words


def group_order(g_idx: np.ndarray, group_size: int | None, name: str) -> np.ndarray | None:
    """The permutation that makes groups contiguous.

    Args:
      g_idx: Group of every row, ``(K,)``.
      group_size: Rows per group; None for one group.
      name: Tensor name, for messages.

    Returns:
      int32 ``(K,)``: sorted row ``i`` is row ``perm[i]`` of the file. None if they are sorted.

    Raises:
      CheckpointError: If some group does not have its nominal number of rows: such groups have no
        fixed length, which packed kernels need.
    """
    k = g_idx.shape[0]
    nominal = np.arange(k, dtype=np.int32) // (k if group_size is None else group_size)
    if np.array_equal(g_idx, nominal):
        return None
    groups = int(nominal[-1]) + 1
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{name} names groups {g_idx.min()} to {g_idx.max()}, but {k} rows with "
            f"group_size={-1 if group_size is None else group_size} have groups 0 to {groups - 1}"
        )
    found, wanted = np.bincount(g_idx, minlength=groups), np.bincount(nominal)
    if not np.array_equal(found, wanted):
        group = int(np.argmax(found != wanted))
        raise CheckpointError(
            f"{name} gives group {group} {found[group]} rows instead of {wanted[group]}: groups of "
            "unequal size are not supported; quantize the original checkpoint again with "
            "static_groups, or here"
        )
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def unpack_layer(
    tensors: Mapping[str, np.ndarray],
    settings: GptqLayer,
    checkpoint_format: str,
    *,
    layer: str = "layer",
    dtype: Any = np.float32,
) -> QuantizedArray:
    """One layer's tensors as a ``QuantizedArray``; codes and scales unchanged.

    Args:
      tensors: ``qweight``, ``qzeros``, ``scales`` and, where there is one, ``g_idx``.
      settings: Bits, group size and symmetry.
      checkpoint_format: ``"gptq"`` (v1) or ``"gptq_v2"``.
      layer: Name, for messages.
      dtype: Result type of ``dequantize``.

    Returns:
      Kernel ``(K, N)`` on the host.

    Raises:
      CheckpointError: If tensors and settings contradict each other.
    """
    qweight, scales = tensors["qweight"], np.array(tensors["scales"])
    bits = settings.bits
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    for suffix, want in layer_shapes(settings, (k, n), layer).items():
        have = tensors.get(suffix)
        if have is not None and have.shape != want:
            raise CheckpointError(
                f"{layer}.{suffix} has shape {have.shape}; {bits=} and "
                f"group_size={settings.group_size or -1} need {want}"
            )
    if not np.isfinite(scales.astype(np.float32)).all():
        raise CheckpointError(f"{layer}.scales holds values that are not finite; download it again")
    g_idx = tensors.get("g_idx")
    perm = None
    if g_idx is not None:
        perm = group_order(g_idx, settings.group_size, f"{layer}.g_idx")
        if perm is not None and settings.desc_act is False:
            raise CheckpointError(
                f"{layer}.g_idx is not sorted, but desc_act is false in the config: engines would "
                "disagree on the order of its rows; set desc_act to true if the tensor is right"
            )
    codes = bitpack.unpack(qweight, bits, size=k, axis=0)
    if perm is not None:
        codes = codes[perm]
    zeros = decode_zeros(tensors["qzeros"], bits, n, checkpoint_format)
    zero_point = None
    if settings.sym:
        _check_symmetric(zeros, bits, checkpoint_format, layer)
    else:
        zero_point = (zeros.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    # Host arrays: the loader moves them to a device, sharded or not.
    parts: dict[str, Any] = {
        "qvalue": bitpack.to_signed(codes, bits),
        "scale": scales,
        "zero_point": zero_point,
        "perm": perm,
    }
    return QuantizedArray.make(fmt=settings.format(str(scales.dtype)), dtype=dtype, **parts)


def pack_layer(q: QuantizedArray, checkpoint_format: str) -> dict[str, np.ndarray]:
    """The inverse of ``unpack_layer``, for an array that ``unwritable_reason`` has nothing against.

    Returns:
      ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.
    """
    bits, (k, n) = q.fmt.bits, q.shape
    codes = bitpack.to_unsigned(np.asarray(q.qvalue), bits)
    g_idx = np.arange(k, dtype=np.int32) // (q.fmt.group_size or k)
    if q.perm is not None:
        perm = np.asarray(q.perm)
        original_codes, original_g_idx = np.empty_like(codes), np.empty_like(g_idx)
        original_codes[perm], original_g_idx[perm] = codes, g_idx
        codes, g_idx = original_codes, original_g_idx
    scales = np.asarray(q.scale)
    if q.zero_point is None:
        zeros = np.full((scales.shape[0], n), 2 ** (bits - 1), np.uint8)
    else:
        zeros = bitpack.to_unsigned(np.asarray(q.zero_point), bits)
    return {
        "qweight": bitpack.pack(codes, bits, axis=0),
        "qzeros": encode_zeros(zeros, bits, checkpoint_format),
        "scales": scales,
        "g_idx": g_idx,
    }


class GptqReader:
    """Reader of one GPTQ checkpoint. Whether a layer is quantized is decided by its tensors: a
    layer stored as a plain ``weight`` is read as such, and one that config and tensors disagree on
    is an error.
    """

    def __init__(self, source: CheckpointSource):
        self._tensors = source.tensors
        where = f"{source.location}/{source.quantization_file}"
        self._config = GptqConfig(source.quantization, where)
        layers = [t.removesuffix(".qweight") for t in source.tensors if t.endswith(".qweight")]
        if not layers:
            raise CheckpointError(
                f"{where} says gptq, but no tensor is named *.qweight; if the weights are not "
                "quantized, remove the quantization config"
            )
        for layer in layers:
            if self._config.layer(layer) is None:
                raise CheckpointError(
                    f"{where}: gptq key 'dynamic' excludes {layer}, but tensor {layer}.qweight "
                    "is there; config and weights do not belong together"
                )

    @classmethod
    def from_source(cls, source: CheckpointSource) -> GptqReader | None:
        """The reader if the config is one of GPTQ.

        Raises:
          CheckpointError: If it is and something in it is not supported.
        """
        values = source.quantization
        method = values.get("quant_method")
        if method is None and source.quantization_file != "hf_quant_config.json":
            # AutoGPTQ's quantize_config.json does not name its method; AWQ's has other keys.
            g_idx = any(name.endswith(".g_idx") for name in source.tensors)
            if "bits" in values and "group_size" in values and (g_idx or "desc_act" in values):
                method = "gptq"
        return cls(source) if str(method).lower() == "gptq" else None

    @property
    def name(self) -> str:
        """Method and variant."""
        base = self._config.base
        tile = "per channel" if base.group_size is None else f"g{base.group_size}"
        version = "v1" if self._config.checkpoint_format == V1 else "v2"
        return f"gptq {base.bits} bit {tile} ({version})"

    def is_quantized(self, layer: str) -> bool:
        """Whether a layer has packed codes."""
        if f"{layer}.qweight" in self._tensors:
            return True
        if f"{layer}.weight" in self._tensors:
            return False
        # Neither: the loader will say which tensor is missing.
        return self._config.lm_head if layer == "lm_head" else self._config.layer(layer) is not None

    def expected(self, layer: str, shape: tuple[int, int]) -> Mapping[str, ExpectedTensor]:
        """Tensors of one layer of kernel shape ``(K, N)``."""
        settings = self._settings(layer)
        shapes = layer_shapes(settings, shape, layer)
        have = self._tensors.get(f"{layer}.qweight")
        if have is not None and have.shape != shapes["qweight"]:
            hint = ""
            for bits in BITS:
                if have.shape == (shape[0] * bits // 32, shape[1]):
                    hint = f", it looks like {bits} bits"
            raise CheckpointError(
                f"{layer}.qweight has shape {have.shape}; a {shape[0]} x {shape[1]} kernel with "
                f"bits={settings.bits} needs {shapes['qweight']}{hint}"
            )
        have = self._tensors.get(f"{layer}.scales")
        if have is not None and have.shape != shapes["scales"]:
            raise CheckpointError(
                f"{layer}.scales has shape {have.shape}; {shape[0]} in and {shape[1]} out features "
                f"with group_size={settings.group_size or -1} need {shapes['scales']}"
            )
        if f"{layer}.g_idx" not in self._tensors:
            if settings.desc_act and settings.group_size is not None:
                raise CheckpointError(
                    f"{layer}.g_idx is missing, and with desc_act=true nothing else tells the "
                    "group of a row"
                )
            del shapes["g_idx"]  # files older than AutoGPTQ have none
        return {
            f"{layer}.{suffix}": ExpectedTensor(
                want, tuple(SCALE_DTYPES) if suffix == "scales" else ("I32",)
            )
            for suffix, want in shapes.items()
        }

    def read(
        self, layer: str, get: GetTensor, shape: tuple[int, int], dtype: Any
    ) -> QuantizedArray:
        """Convert one layer."""
        names = self.expected(layer, shape)
        tensors = {name.rpartition(".")[2]: get(name) for name in names}
        settings = self._settings(layer)
        version = self._config.checkpoint_format
        return unpack_layer(tensors, settings, version, layer=layer, dtype=dtype)

    def kv_scale_names(self, num_layers: int) -> frozenset[str]:
        """None: the format has no KV cache scales."""
        return frozenset()

    def kv_scales(self, get: GetTensor, num_layers: int, num_kv_heads: int) -> KVScales | None:
        """None: the format has no KV cache scales."""
        return None

    def _settings(self, layer: str) -> GptqLayer:
        settings = self._config.layer(layer)
        if settings is None:
            raise CheckpointError(f"gptq key 'dynamic' excludes {layer}; it has no packed codes")
        return settings


def _check_symmetric(zeros: np.ndarray, bits: int, version: str, layer: str) -> None:
    middle = 2 ** (bits - 1)
    if (zeros == middle).all():
        return
    shift = 1 if version == V1 else -1
    hint = "set sym to false in the config if the tensor is right"
    if (zeros == middle + shift).all():
        other = "gptq_v2" if version == V1 else "gptq"
        hint = f"the file looks like checkpoint_format={other!r} instead of {version!r}"
    raise CheckpointError(
        f"{layer}.qzeros decodes to zero points {zeros.min()} to {zeros.max()}, but sym is true in "
        f"the config, which means {middle} throughout; {hint}"
    )
