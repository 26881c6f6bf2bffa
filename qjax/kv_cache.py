"""Paged KV cache as a frozen pytree: pages, scales, running statistics, counters of what was lost.

Every layer has its own page arrays, so that a model with unrolled layers updates a donated cache in
place. A page holds ``page_size`` tokens of one sequence; ``page_table[slot, i]`` is the page of
tokens ``i * page_size ...`` of the sequence in that slot. A page belongs to one slot at a time,
unless the cache is made with ``share_pages``: then full pages, which nobody writes to any more, may
stand in the rows of several sequences that begin with the same tokens.

The functions that write and read tokens are in ``qjax.ops.kv``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.kv_format import KVFormat
from qjax.typing import Array, ArrayLike

StaticScales = Sequence[tuple[ArrayLike, ArrayLike] | None]
"""Per layer ``(key scale, value scale)``, scalars or ``[kv_heads]``; None for other layers."""


def _static() -> dict[str, bool]:
    return {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKVCache:
    """Keys and values of all layers and sequences. Build with ``init``.

    Attributes:
      keys: Per layer ``[num_pages, kv_heads, page_size, head_dim]`` in
        ``formats[layer].storage_dtype``: the plain types and int8 as they are; fp8 as its bits in
        uint8; int4 two codes per uint8, ``[..., head_dim // 2]``, the first half of the head in the
        low nibbles and the second half in the high ones.
      values: Likewise.
      key_scales: Per layer: None (plain types), float32 ``[kv_heads]`` (static), or float32
        ``[num_pages, kv_heads, page_size]`` (dynamic, tracked): the scale with which that token was
        written. It is never rewritten, so stored tokens keep their meaning. Of int4 keys it may be
        negative.
      value_scales: Likewise.
      running: Per layer: None, or float32 ``[2, max_seqs, kv_heads]`` (tracked): decayed running
        absmax of keys and values of the sequence in each slot. Per slot, so that a sequence's
        result never depends on the rest of the batch.
      page_running: Per layer: None, or float32 ``[num_pages, 2, kv_heads]`` (tracked, with
        ``share_pages``): ``running`` after the last token of each full page, from which a sequence
        that takes over the page goes on.
      layer_absmax: Per layer float32 ``[2, kv_heads]``: largest finite magnitude of keys and values
        ever written.
      layer_saturated: Per layer int32 ``[2]``: key and value elements that were clipped or were not
        finite. Stops at the int32 maximum. What int4 clips because it pays is not counted.
      layer_underflowed: Per layer int32 ``[2]``: key and value elements that were not 0 and are
        stored as 0. Stops at the int32 maximum. Where the heads are cut over devices that count on
        their own, this and the counter above hold the counts of all, ``[2 * devices]``.
      page_table: int32 ``[max_seqs, pages_per_seq]``. Unused entries hold ``num_pages``; writes
        there are dropped.
      formats: Static. Format per layer.
      page_size: Static. Tokens per page.
      share_pages: Static. Whether sequences may share full pages.
      counted: Static. Whether ``append`` keeps ``layer_absmax``, ``layer_saturated`` and
        ``layer_underflowed``. Small reductions, but a kernel or two per layer and step.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    key_scales: tuple[Array | None, ...]
    value_scales: tuple[Array | None, ...]
    running: tuple[Array | None, ...]
    page_running: tuple[Array | None, ...]
    layer_absmax: tuple[Array, ...]
    layer_saturated: tuple[Array, ...]
    layer_underflowed: tuple[Array, ...]
    page_table: Array
    formats: tuple[KVFormat, ...] = dataclasses.field(metadata=_static())
    page_size: int = dataclasses.field(metadata=_static())
    share_pages: bool = dataclasses.field(default=False, metadata=_static())
    counted: bool = dataclasses.field(default=True, metadata=_static())

    @classmethod
    def init(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        max_seqs: int,
        pages_per_seq: int,
        fmt: KVFormat | Sequence[KVFormat],
        static_scales: StaticScales | None = None,
        share_pages: bool = False,
        counted: bool = True,
    ) -> QuantizedKVCache:
        """An empty cache with an unassigned page table.

        Args:
          num_layers: Layers of the model.
          num_kv_heads: KV heads.
          head_dim: Elements per head; even for int4.
          num_pages: Pages of the pool, shared by all sequences.
          page_size: Tokens per page.
          max_seqs: Sequence slots.
          pages_per_seq: Pages a sequence can have; its longest length is this times ``page_size``.
          fmt: One format for all layers, or one per layer.
          static_scales: Per layer ``(key scale, value scale)`` for layers in mode ``static`` (a
            scalar for granularity ``tensor``, ``[kv_heads]`` for ``head``) and None for the others.
          share_pages: Let sequences share full pages.
          counted: Keep the largest magnitudes and the counters.

        Returns:
          The cache. No page is assigned: give it a table with ``with_page_table``.

        Raises:
          ValueError: If a size is not positive, formats and layers disagree in number, or static
            scales are missing, superfluous, not finite, not positive or of the wrong shape.
        """
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "num_pages": num_pages,
            "page_size": page_size,
            "max_seqs": max_seqs,
            "pages_per_seq": pages_per_seq,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        formats = (fmt,) * num_layers if isinstance(fmt, KVFormat) else tuple(fmt)
        if len(formats) != num_layers:
            raise ValueError(
                f"{len(formats)} formats for {num_layers=}; give one, or one per layer"
            )
        if head_dim % 2 and any(f.packed for f in formats):
            raise ValueError(f"{head_dim=} must be even for int4; use int8 or fp8")
        scales = _check_static_scales(static_scales, formats, num_kv_heads)

        def pages(f: KVFormat) -> Array:
            stored = head_dim // 2 if f.packed else head_dim
            return jnp.zeros((num_pages, num_kv_heads, page_size, stored), f.storage_dtype)

        def page_scales(f: KVFormat, given: np.ndarray | None) -> Array | None:
            if given is not None:
                return jnp.array(given)
            if f.stores_scales:
                return jnp.zeros((num_pages, num_kv_heads, page_size), jnp.float32)
            return None

        return cls(
            keys=tuple(pages(f) for f in formats),
            values=tuple(pages(f) for f in formats),
            key_scales=tuple(page_scales(f, s[0]) for f, s in zip(formats, scales, strict=True)),
            value_scales=tuple(page_scales(f, s[1]) for f, s in zip(formats, scales, strict=True)),
            running=tuple(
                jnp.zeros((2, max_seqs, num_kv_heads), jnp.float32) if f.mode == "tracked" else None
                for f in formats
            ),
            page_running=tuple(
                jnp.zeros((num_pages, 2, num_kv_heads), jnp.float32)
                if f.mode == "tracked" and share_pages
                else None
                for f in formats
            ),
            layer_absmax=tuple(jnp.zeros((2, num_kv_heads), jnp.float32) for _ in formats),
            layer_saturated=tuple(jnp.zeros((2,), jnp.int32) for _ in formats),
            layer_underflowed=tuple(jnp.zeros((2,), jnp.int32) for _ in formats),
            page_table=jnp.full((max_seqs, pages_per_seq), num_pages, jnp.int32),
            formats=formats,
            page_size=page_size,
            share_pages=share_pages,
            counted=counted,
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.formats)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.keys[0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.keys[0].shape[1]

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.keys[0].shape[3] * (2 if self.formats[0].packed else 1)

    @property
    def max_seqs(self) -> int:
        """Sequence slots."""
        return self.page_table.shape[0]

    @property
    def pages_per_seq(self) -> int:
        """Pages a sequence can have."""
        return self.page_table.shape[1]

    @property
    def absmax(self) -> Array:
        """float32 ``[layers, 2, kv_heads]``: largest finite key and value magnitudes so far."""
        return jnp.stack(self.layer_absmax)

    @property
    def saturated(self) -> Array:
        """int32 ``[layers, 2]``: key and value elements clipped or not finite since ``init``."""
        return _total(self.layer_saturated)

    @property
    def underflowed(self) -> Array:
        """int32 ``[layers, 2]``: key and value elements that became 0 since ``init``."""
        return _total(self.layer_underflowed)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: pages, scales, statistics and page table."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers: keys, values and the scales stored with them."""
        total = 0
        for f in self.formats:
            total += 2 * self.num_kv_heads * (self.head_dim * f.bits // 8 + 4 * f.stores_scales)
        return total

    def with_page_table(self, table: ArrayLike) -> QuantizedKVCache:
        """The same cache with another page table.

        Args:
          table: Integers ``[max_seqs, pages_per_seq]``; ``num_pages`` marks an unused entry.

        Returns:
          The cache; pages, scales and statistics are unchanged.

        Raises:
          ValueError: If the shape differs, or (checked for NumPy tables only, since a device array
            would have to be waited for) an entry is out of range, or a page is given twice: at all
            without ``share_pages``, to one sequence with it.
        """
        if tuple(table.shape) != self.page_table.shape:
            raise ValueError(
                f"page table of shape {tuple(table.shape)} must be {self.page_table.shape}, "
                "(max_seqs, pages_per_seq)"
            )
        if isinstance(table, np.ndarray):
            if table.size and (table.min() < 0 or table.max() > self.num_pages):
                raise ValueError(
                    f"page table entries span {table.min()}..{table.max()}; they must be in "
                    f"0..{self.num_pages - 1}, or {self.num_pages} for an unused entry"
                )
            for part in table if self.share_pages else [table]:
                pages, counts = np.unique(part[part < self.num_pages], return_counts=True)
                if (counts > 1).any():
                    raise ValueError(
                        f"page {pages[counts > 1][0]} is in the page table {counts.max()} times; "
                        "a page belongs to one sequence: give each its own"
                    )
        return dataclasses.replace(self, page_table=jnp.asarray(table, dtype=jnp.int32))

    def reset_slots(self, mask: ArrayLike, lengths: ArrayLike | None = None) -> QuantizedKVCache:
        """Forget the running statistics of slots that a new sequence takes over.

        Pages need no clearing: attention reads no further than a sequence's length. ``absmax``,
        ``saturated`` and ``underflowed`` describe all sequences ever seen and stay.

        Args:
          mask: Bool ``[max_seqs]``, True for slots to reset.
          lengths: int32 ``[max_seqs]``, tokens that the new sequences take over in full pages of
            their rows of the page table, which others have written; multiples of ``page_size``.
            None where there are none.

        Returns:
          The cache where these slots have the statistics of a sequence of this length: zeros for 0.

        Raises:
          ValueError: If an argument has another shape, or there are lengths without
            ``share_pages``.
        """
        for name, array in (("mask", mask), ("lengths", lengths)):
            if array is not None and tuple(array.shape) != (self.max_seqs,):
                raise ValueError(f"{name} of shape {tuple(array.shape)} must be ({self.max_seqs},)")
        if lengths is not None and not self.share_pages:
            raise ValueError("lengths need a cache that is made with share_pages=True")
        chosen = jnp.asarray(mask, dtype=bool)[None, :, None]
        entry = None
        if lengths is not None:
            # One page per slot: the last that is taken over; -1 becomes an unused entry.
            last = jnp.asarray(lengths, dtype=jnp.int32) // self.page_size - 1
            entry = jnp.take_along_axis(self.page_table, jnp.maximum(last, 0)[:, None], axis=1)
            entry = jnp.where(last < 0, self.num_pages, entry[:, 0])
        running = []
        for old, at_pages in zip(self.running, self.page_running, strict=True):
            if old is None:
                running.append(None)
                continue
            start = jnp.zeros_like(old)
            if at_pages is not None and entry is not None:
                start = at_pages.at[entry].get(mode="fill", fill_value=0).swapaxes(0, 1)
            running.append(jnp.where(chosen, start, old))
        return dataclasses.replace(self, running=tuple(running))


def _total(counters: Sequence[Array]) -> Array:
    """int32 ``[layers, 2]``, over all devices that count."""
    counts = jnp.stack(tuple(counters)).reshape(len(counters), -1, 2)
    total = counts[:, 0]
    for device in range(1, counts.shape[1]):
        more = total + counts[:, device]
        total = jnp.where(more < total, jnp.int32(np.iinfo(np.int32).max), more)  # wrapped around
    return total


def _check_static_scales(
    static_scales: StaticScales | None, formats: tuple[KVFormat, ...], num_kv_heads: int
) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Static scales as float32 ``[kv_heads]`` per layer, ``(None, None)`` for the other layers."""
    if static_scales is None:
        static_scales = (None,) * len(formats)
    if len(static_scales) != len(formats):
        raise ValueError(
            f"static_scales has {len(static_scales)} entries for {len(formats)} layers; give one "
            "(key scale, value scale) pair per layer, None for layers that are not static"
        )
    checked: list[tuple[np.ndarray | None, np.ndarray | None]] = []
    for layer, (f, pair) in enumerate(zip(formats, static_scales, strict=True)):
        if (f.mode == "static") != (pair is not None):
            raise ValueError(
                f"layer {layer} has format {f.name} and static_scales {pair}: mode 'static' needs "
                "calibrated scales (there is no default), the other modes take none"
            )
        if pair is None:
            checked.append((None, None))
            continue
        shapes = {"tensor": ((), (1,)), "head": ((num_kv_heads,),)}[str(f.granularity)]
        both = []
        for name, scale in zip(("key", "value"), pair, strict=True):
            scale = np.asarray(scale, np.float32)
            if scale.shape not in shapes:
                raise ValueError(
                    f"layer {layer}: {name} scale has shape {scale.shape}; granularity "
                    f"{f.granularity!r} needs {' or '.join(map(str, shapes))}"
                )
            # A subnormal scale would be flushed to zero by XLA and divide to infinity.
            if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
                raise ValueError(
                    f"layer {layer}: {name} scale {scale} must be positive and finite everywhere"
                )
            both.append(np.broadcast_to(scale, (num_kv_heads,)))
        checked.append((both[0], both[1]))
    return checked


def static_scales_from(
    cache: QuantizedKVCache, fmt: KVFormat | Sequence[KVFormat]
) -> tuple[tuple[np.ndarray, np.ndarray] | None, ...]:
    """Scales for mode ``static``, from the magnitudes a cache has seen.

    Args:
      cache: A cache of any format that calibration text has gone through.
      fmt: The static format the scales are for, one or one per layer; layers with a plain format
        get None.

    Returns:
      Per layer ``(key scale, value scale)`` = ``absmax / bound``, float32, scalars for granularity
      ``tensor`` and ``[kv_heads]`` for ``head``: what ``QuantizedKVCache.init`` takes. A head that
      only saw zeros gets its layer's largest scale.

    Raises:
      ValueError: If a quantized format is not static, or a layer has seen nothing but zeros.
    """
    formats = (fmt,) * cache.num_layers if isinstance(fmt, KVFormat) else tuple(fmt)
    if len(formats) != cache.num_layers:
        raise ValueError(f"{len(formats)} formats for {cache.num_layers} layers of the cache")
    result: list[tuple[np.ndarray, np.ndarray] | None] = []
    for layer, (f, seen) in enumerate(zip(formats, np.asarray(cache.absmax), strict=True)):
        if not f.quantized:
            result.append(None)
            continue
        if f.mode != "static":
            raise ValueError(
                f"layer {layer}: format {f.name} takes no static scales; use mode 'static'"
            )
        top = seen.max(axis=1, keepdims=True)
        scale = np.where(seen > 0, seen, top) / np.float32(f.bound)
        if not (scale >= np.finfo(np.float32).tiny).all():
            raise ValueError(
                f"layer {layer}: the largest magnitudes seen are {top[:, 0]} (keys, values); run "
                "calibration text through the cache first"
            )
        if f.granularity == "tensor":
            scale = scale.max(axis=1)
        result.append((scale[0], scale[1]))
    return tuple(result)
