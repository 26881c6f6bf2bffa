"""Checkpoints in memory, and an unpacker that shares no code with the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qjax.checkpoints.reader import CheckpointSource, QuantizedReader
from qjax.checkpoints.safetensors_io import DTYPES, TensorInfo
from qjax.quantized_array import QuantizedArray

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LAYER = "model.layers.0.mlp.up_proj"


def infos(tensors: Mapping[str, np.ndarray]) -> dict[str, TensorInfo]:
    """Headers of arrays."""
    return {name: TensorInfo(_NAMES[a.dtype], a.shape) for name, a in tensors.items()}


def source(
    tensors: Mapping[str, np.ndarray],
    quantization: Mapping[str, Any],
    file: str = "config.json",
) -> CheckpointSource:
    """What a reader is built from."""
    return CheckpointSource("model", {}, quantization, file, infos(tensors))


def named(parts: Mapping[str, np.ndarray], layer: str = LAYER) -> dict[str, np.ndarray]:
    """Tensors of one layer under their full names."""
    return {f"{layer}.{suffix}": array for suffix, array in parts.items()}


def read_layer(
    reader: QuantizedReader,
    tensors: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    layer: str = LAYER,
) -> QuantizedArray:
    """Check the headers as the loader does, then read one layer to float32."""
    assert reader.is_quantized(layer)
    expected = reader.expected(layer, shape)
    for name, want in expected.items():
        have = infos(tensors)[name]
        assert want.shape is None or have.shape == want.shape, (name, have, want)
        assert have.dtype in want.dtypes, (name, have, want)
    belongs = {name for name in tensors if name.startswith(f"{layer}.")}
    assert belongs == set(expected)
    asked: list[str] = []

    def get(name: str) -> np.ndarray:
        asked.append(name)
        return tensors[name]

    q = reader.read(layer, get, shape, np.float32)
    assert set(asked) <= set(expected)
    assert q.shape == shape
    return q


def pack_bits(codes: np.ndarray, bits: int, dtype: type = np.int32) -> np.ndarray:
    """Pack unsigned codes along the last axis, least significant bit first, bit by bit."""
    stream = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    stream = stream.reshape(*codes.shape[:-1], -1)
    width = np.dtype(dtype).itemsize * 8
    pad = [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % width)]
    return np.packbits(np.pad(stream, pad), axis=-1, bitorder="little").view(dtype)


def same(a: QuantizedArray, b: QuantizedArray) -> None:
    """Assert that two arrays are equal bit by bit, with equal formats."""
    assert a.fmt == b.fmt
    for name in ("qvalue", "scale", "zero_point", "perm", "global_scale", "act_scale"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            x, y = np.asarray(x), np.asarray(y)
            assert x.dtype == y.dtype and x.shape == y.shape, (name, x.dtype, y.dtype)
            if x.dtype == ml_dtypes.int4:  # jax leaves the upper half of the byte unset
                x, y = x.astype(np.int8), y.astype(np.int8)
            assert x.tobytes() == y.tobytes(), name


def value(q: QuantizedArray) -> np.ndarray:
    """``q.dequantize()`` in NumPy, which compiles nothing: float32, in original row order."""
    result = np.asarray(q.qvalue).astype(np.float32)
    scale = np.asarray(q.scale).astype(np.float32)
    if q.global_scale is not None:
        scale = scale * np.asarray(q.global_scale)
    for part, combine in ((q.zero_point, np.subtract), (scale, np.multiply)):
        if part is not None:
            part = np.asarray(part).astype(np.float32)
            for axis, tile in enumerate(q.tiles):
                if part.shape[axis] not in (1, q.shape[axis]):
                    part = np.repeat(part, tile, axis)
                    part = part.take(np.arange(q.shape[axis]), axis)
            result = combine(result, part)
    if q.perm is not None:
        result = result[np.argsort(np.asarray(q.perm))]
    return result
