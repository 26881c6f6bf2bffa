"""What a run cost: speed, and memory beside its bf16 size."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from qjax.kv_cache import QuantizedKVCache
from qjax.ops.packed import PackedWeight
from qjax.quantize import is_quantized, quantized_nbytes
from qjax.serving.devices import bytes_per_device
from qjax.serving.engine import Engine
from qjax.typing import PyTree


def bf16_nbytes(params: PyTree) -> int:
    """Bytes of a parameter tree if every logical element were bf16."""
    leaves = jax.tree.leaves(
        params, is_leaf=lambda leaf: is_quantized(leaf) or isinstance(leaf, PackedWeight)
    )
    return sum(2 * int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves)


def kv_bytes_per_token(cache: QuantizedKVCache) -> tuple[int, int]:
    """Bytes that a token takes in the cache, and what it would take in bf16."""
    bf16 = 2 * 2 * cache.num_layers * cache.num_kv_heads * cache.head_dim
    return cache.bytes_per_token(), bf16


def format_bytes(count: float) -> str:
    """``1.23 MB`` and the like, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a finished run.

    Attributes:
      prefill_tokens: Prompt tokens processed.
      reused_tokens: Prompt tokens that other prompts had put into the cache.
      prefill_rate: Prompt tokens per second, without compiling.
      decode_tokens: Tokens generated after each request's first.
      decode_rate: Of these per second, without compiling.
      compile_seconds: Time spent compiling.
      programs: Programs compiled.
      weight_bytes: Weights as they are held, scales included.
      weight_bf16_bytes: The same weights in bf16.
      kv_token_bytes: KV cache bytes per token, scales included.
      kv_token_bf16_bytes: The same in bf16.
      kv_pool_bytes: The whole KV cache.
      kv_pool_tokens: Tokens it can hold.
      saturated: KV elements that did not fit their scale, and were clipped, or were not finite.
      devices: Devices that the model is cut over, and their kind.
      device_weight_bytes: Weights on the device that holds most.
      device_kv_bytes: The KV cache on the device that holds most.
    """

    prefill_tokens: int
    reused_tokens: int
    prefill_rate: float
    decode_tokens: int
    decode_rate: float
    compile_seconds: float
    programs: int
    weight_bytes: int
    weight_bf16_bytes: int
    kv_token_bytes: int
    kv_token_bf16_bytes: int
    kv_pool_bytes: int
    kv_pool_tokens: int
    saturated: int
    devices: tuple[int, str]
    device_weight_bytes: int
    device_kv_bytes: int

    @classmethod
    def of(cls, engine: Engine) -> Summary:
        """Figures of an engine since it was built."""
        stats, cache = engine.stats, engine.cache
        token, token_bf16 = kv_bytes_per_token(cache)
        return cls(
            prefill_tokens=stats.prefill_tokens,
            reused_tokens=stats.reused_tokens,
            prefill_rate=stats.prefill_rate,
            decode_tokens=stats.decode_tokens,
            decode_rate=stats.decode_rate,
            compile_seconds=stats.compile_seconds,
            programs=stats.programs,
            weight_bytes=quantized_nbytes(engine.params),
            weight_bf16_bytes=bf16_nbytes(engine.params),
            kv_token_bytes=token,
            kv_token_bf16_bytes=token_bf16,
            kv_pool_bytes=cache.nbytes,
            kv_pool_tokens=cache.num_pages * cache.page_size,
            saturated=int(np.asarray(cache.saturated).sum()),
            devices=(engine.devices.count, jax.devices()[0].device_kind),
            device_weight_bytes=bytes_per_device(engine.params),
            device_kv_bytes=bytes_per_device(cache),
        )

    def lines(self, weights: str, kv_cache: str) -> list[str]:
        """Lines to print; the arguments name the formats."""
        size, kv = format_bytes(self.weight_bytes), format_bytes(self.kv_pool_bytes)
        ratio = self.weight_bytes / self.weight_bf16_bytes
        shared = f"; {self.reused_tokens:,} more shared" if self.reused_tokens else ""
        rows = [
            f"prefill    {self.prefill_rate:>10,.0f} tokens/s  ({self.prefill_tokens:,} tokens"
            f"{shared})",
            f"decode     {self.decode_rate:>10,.0f} tokens/s  ({self.decode_tokens:,} tokens)",
            f"compiling  {self.compile_seconds:>10.1f} s, not in these rates "
            f"({self.programs} programs)",
            f"weights    {size:>10}  {weights}; {ratio:.2f} of the "
            f"{format_bytes(self.weight_bf16_bytes)} they take in bf16",
            f"KV cache   {kv:>10}  {kv_cache}; room for {self.kv_pool_tokens:,} tokens of "
            f"{self.kv_token_bytes:,} B, {self.kv_token_bytes / self.kv_token_bf16_bytes:.2f} of "
            f"the {self.kv_token_bf16_bytes:,} B they take in bf16",
        ]
        count, kind = self.devices
        if count > 1:
            weights, kv = format_bytes(self.device_weight_bytes), format_bytes(self.device_kv_bytes)
            rows.append(
                f"devices    {count:>10}  {kind}; each with {weights} of weights, {kv} of KV cache"
            )
        if self.saturated:
            rows.append(
                f"warning: {self.saturated:,} KV cache values were clipped or not finite; the "
                "scales do not cover them: use tracked scales, or another type"
            )
        return rows
