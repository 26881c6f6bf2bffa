"""The quantization config of a checkpoint that has lost it, told by its tensors.

Only where they leave no choice: GPTQ (bits and groups follow from ``g_idx``, ``qweight`` and
``scales``), AWQ gemm, and fp8 in 128 x 128 blocks. Groups are taken to divide the rows; if they do
not, the values of ``g_idx`` contradict, and the reader refuses them. GPTQ files are taken to be
symmetric and of version 1, which the reader finds out from the zero points: versions 1 and 2 of an
asymmetric file look alike and mean different weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.checkpoints.safetensors_io import TensorInfo

Config = dict[str, Any]
_BLOCK = 128
_FP8 = {"activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}


def config_from_tensors(tensors: Mapping[str, TensorInfo]) -> Config | None:
    """A config under which a reader takes all quantized layers; None if tensors do not tell one."""
    configs: list[Config] = []
    groups: set[int] = set()
    longest = 0
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix not in ("qweight", "weight_scale_inv"):
            continue
        if suffix == "weight_scale_inv":
            found = _fp8(layer, tensors)
        else:
            found = _gptq(layer, tensors) or _awq(layer, tensors)
        if found is None:
            return None
        config, k, count = found
        configs.append(config)
        if count == 1:  # one group may be cut short, or stand for the whole column
            longest = max(longest, k)
        else:
            groups.add(k // count)
    if not configs or any(config != configs[0] for config in configs) or len(groups) > 1:
        return None
    group_size = groups.pop() if groups else -1
    if group_size != -1 and longest > group_size:
        return None
    return {**configs[0], "group_size": group_size}


def _shapes(
    layer: str, suffixes: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> list[tuple[int, ...]]:
    infos = (tensors.get(f"{layer}.{suffix}") for suffix in suffixes)
    return [() if info is None else info.shape for info in infos]


def _gptq(layer: str, tensors: Mapping[str, TensorInfo]) -> tuple[Config, int, int] | None:
    """Config without groups, in features and number of groups."""
    qweight, qzeros, scales, g_idx = _shapes(
        layer, ("qweight", "qzeros", "scales", "g_idx"), tensors
    )
    if len(g_idx) != 1 or not (len(qweight) == len(qzeros) == len(scales) == 2):
        return None
    k, count = g_idx[0], scales[0]
    bits = qweight[0] * 32 // k if k else 0
    if bits * k != qweight[0] * 32 or qweight[1] != scales[1] or not 0 < count <= k:
        return None
    if k % count:
        return None
    return {"quant_method": "gptq", "bits": bits, "sym": True}, k, count


def _awq(layer: str, tensors: Mapping[str, TensorInfo]) -> tuple[Config, int, int] | None:
    qweight, qzeros, scales = _shapes(layer, ("qweight", "qzeros", "scales"), tensors)
    if not (len(qweight) == len(qzeros) == len(scales) == 2) or f"{layer}.g_idx" in tensors:
        return None
    k, count = qweight[0], scales[0]
    if not count or k % count or qweight[1] * 8 != scales[1] or qzeros != (count, qweight[1]):
        return None
    return {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}, k, count


def _fp8(layer: str, tensors: Mapping[str, TensorInfo]) -> tuple[Config, int, int] | None:
    weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale_inv")
    if weight is None or scale is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        return None
    if scale.shape != tuple(-(-size // _BLOCK) for size in weight.shape):
        return None
    return {"quant_method": "fp8", **_FP8}, 0, 1
