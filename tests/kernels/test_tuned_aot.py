"""Every config of the tables that ship, compiled ahead of time for sm_90a: no spills."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qjax.ops.gated import gated_form
from qjax.pallas_kernels import dequantize, tuned, w4a8, w8a8, weight_only, weight_only_large
from tests.kernels.test_aot import _missing
from tests.kernels.test_aot_w8a8 import compile_all

# The module that compiles each kernel, and the kernel's own.
KERNELS: dict[str, tuple[str, Any]] = {
    "dequantize": ("aot_dequantize", dequantize),
    "w4a8": ("aot_w4a8", w4a8),
    "w8a8": ("aot_w8a8", w8a8),
    "weight_only": ("aot", weight_only),
    "weight_only_large": ("aot_large", weight_only_large),
}


@pytest.fixture(autouse=True)
def _needs_compiler() -> None:
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)


def _shipped(name: str) -> Iterator[tuple[Any, Any]]:
    """The distinct programs of a kernel: sizes and the order of tiles only change loop bounds."""
    kernel, seen = KERNELS[name][1], set()
    for path in tuned.table_path("any").parent.glob("*.json"):
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            if entry["kernel"] != name:
                continue
            measured = kernel.Problem(**entry["problem"]), kernel.Config(**entry["config"])
            for problem, config in (measured, *_gated(*measured)):
                free: dict[str, Any] = {"k": 0, "n": 0}
                if name != "weight_only":  # whose tiles have the number of rows
                    free["m"] = 0
                same: dict[str, Any] = {"raster": 1} if hasattr(config, "raster") else {}
                if getattr(config, "splits", 1) > 1:
                    same["splits"] = 2
                key = dataclasses.replace(problem, **free), dataclasses.replace(config, **same)
                if key not in seen:
                    seen.add(key)
                    yield problem, config


def _gated(problem: Any, config: Any) -> Iterator[tuple[Any, Any]]:
    """The same for gate and up, if it is their shape."""
    if isinstance(problem, weight_only.Problem) and problem.compute != "int8":
        form = gated_form(problem, config) if problem.n >= 4 * problem.k else None
        if form is not None:
            yield dataclasses.replace(problem, gated=True), form


def _measured() -> list[str]:
    """The kernels that tables name; one that was never the fastest has no entry."""
    paths = tuned.table_path("any").parent.glob("*.json")
    tables = [json.loads(path.read_text(encoding="utf-8"))["entries"] for path in paths]
    return sorted({entry["kernel"] for entries in tables for entry in entries})


@pytest.mark.parametrize("name", _measured())
def test_every_measured_config(name: str) -> None:
    programs = list(_shipped(name))
    assert programs
    assert not compile_all(f"tests.kernels.{KERNELS[name][0]}", programs)
