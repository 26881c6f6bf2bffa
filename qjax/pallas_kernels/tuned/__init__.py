"""Configs that were measured to be the fastest: one JSON table per kind of device.

``scripts/autotune.py`` writes ``nvidia_h200.json`` and the like beside this file::

  {"device": "NVIDIA H200", "jax": "0.11.2",
   "entries": [{"kernel": "w8a8", "problem": {...}, "config": {...}, "us": 12.3}, ...]}

where ``problem`` and ``config`` hold the fields of the kernel's own dataclasses, and ``us`` counts
what reading the parts of a split contraction costs the next kernel (``evaluation.tuning``). A
product takes the config of an entry that differs from it in nothing but the number of rows (and the
type of the result), if the numbers are near (``choose``); if several kernels have one, the fastest.
For all else, such as layers of another shape, the kernels' heuristics decide: what is best for one
shape may not even divide another.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax

Key = tuple[str, frozenset[tuple[str, Any]]]
Table = dict[Key, list[tuple[int, dict[str, Any]]]]  # rows and entry

# What a config does not depend on; whether it fits is checked.
_FREE = ("m", "out_itemsize")
_FEWEST_ROWS = 8
MANY_ROWS = 2048
"""From here on rows only add tiles: the entry with the most rows holds for any greater number."""


class Found(NamedTuple):
    """A measured config: for how many rows, and how long the product took then."""

    config: Any
    rows: int
    us: float


def table_path(device_kind: str) -> pathlib.Path:
    """Where the table of a kind of device is, or would be."""
    return pathlib.Path(__file__).parent / f"{device_kind.lower().replace(' ', '_')}.json"


def key_of(kernel: str, problem: dict[str, Any]) -> Key:
    """What an entry and a product must share."""
    return kernel, frozenset(item for item in problem.items() if item[0] not in _FREE)


@functools.cache
def load_table(device_kind: str) -> Table:
    """The table of a kind of device; empty if there is none."""
    path = table_path(device_kind)
    table: Table = {}
    if path.exists():
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            rows = table.setdefault(key_of(entry["kernel"], entry["problem"]), [])
            rows.append((entry["problem"]["m"], entry))
            rows.sort(key=lambda row: row[0])
    return table


def choose(entries: list[tuple[int, dict[str, Any]]], m: int) -> dict[str, Any] | None:
    """The entry for ``m`` rows: the least that is as many, if that is less than twice as many.

    Up to eight rows count as eight, which is what every kernel computes then.

    Args:
      entries: ``(rows, entry)`` in ascending order.
      m: Rows.

    Returns:
      The entry, or None if none is near.
    """
    for rows, entry in entries:
        if m <= rows:
            return entry if rows < 2 * max(m, _FEWEST_ROWS) else None
    last, entry = entries[-1]
    return entry if last >= MANY_ROWS else None


def tuned_config(kernel: Any, problem: Any) -> Found | None:
    """The measured config for a product on the default device.

    Args:
      kernel: A kernel's module, with ``Config`` and ``config_unsupported_reason``.
      problem: The product in its terms.

    Returns:
      A config that fits, or None if the table has none.
    """
    entries = load_table(jax.devices()[0].device_kind).get(
        key_of(kernel.__name__.rsplit(".", 1)[-1], dataclasses.asdict(problem))
    )
    entry = None if entries is None else choose(entries, problem.m)
    if entry is None:
        return None
    config = kernel.Config(**entry["config"])
    fits = kernel.config_unsupported_reason(config, problem) is None
    return Found(config, entry["problem"]["m"], entry["us"]) if fits else None
