"""Tables of measured configs: which entry serves a product, and how autotune.py writes them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.ops import packed
from qjax.pallas_kernels import dequantize, tuned, w4a8, w8a8, weight_only, weight_only_large
from scripts import autotune

PROBLEM = w8a8.Problem(256, 4096, 4096, "float8_e4m3fn")
CONFIG = w8a8.Config(64, 128, 4)


def _row(problem: w8a8.Problem, config: w8a8.Config, us: float) -> dict[str, object]:
    details = {
        "kernel": "w8a8",
        "problem": dataclasses.asdict(problem),
        "config": dataclasses.asdict(config),
    }
    return {"device": "Test GPU", "jax": "0.11.2", "us": us, "details": json.dumps(details)}


def test_the_nearest_greater_number_of_rows_is_chosen() -> None:
    entries = [(rows, {"stages": rows}) for rows in (16, 64, 1024)]
    for m, rows in ((16, 16), (9, 16), (17, None), (33, 64), (64, 64), (65, None), (600, 1024)):
        assert tuned.choose(entries, m) == (None if rows is None else {"stages": rows})
    assert tuned.choose(entries, 2000) is None
    assert tuned.choose([(8, {"stages": 8})], 1) == {"stages": 8}
    assert tuned.choose([(4096, {"stages": 3})], 100_000) == {"stages": 3}


def test_autotune_merges_winners_and_products_use_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = CONFIG, dataclasses.replace(CONFIG, stages=6)
    other = dataclasses.replace(PROBLEM, m=512)
    rows = [_row(PROBLEM, slow, 9.0), _row(PROBLEM, fast, 7.0), _row(other, slow, 12.0)]
    failed = {"device": "Test GPU", "us": None, "details": rows[0]["details"]}
    source, table = tmp_path / "rows.jsonl", tmp_path / "table.json"
    source.write_text("\n".join(json.dumps(row) for row in [*rows, failed]) + "\n| a table |\n")
    flags = ["--from", str(source), "--output", str(table)]
    assert autotune.main(flags) == 0
    # Measured again and slower: the new time counts, the other entry stays.
    source.write_text(json.dumps(_row(PROBLEM, fast, 8.0)) + "\n")
    assert autotune.main(flags) == 0
    entries = json.loads(table.read_text())["entries"]
    assert sorted(entry["us"] for entry in entries) == [8.0, 12.0]

    monkeypatch.setattr(tuned, "table_path", lambda kind: table)
    tuned.load_table.cache_clear()
    try:
        assert tuned.tuned_config(w8a8, PROBLEM) == (fast, 256, 8.0)
        near = dataclasses.replace(PROBLEM, m=200, out_itemsize=4)
        assert tuned.tuned_config(w8a8, near) == (fast, 256, 8.0)
        assert tuned.tuned_config(w8a8, dataclasses.replace(PROBLEM, n=8192)) is None
        assert tuned.tuned_config(w8a8, dataclasses.replace(PROBLEM, m=16)) is None
        w = packed.pack_for_mosaic(
            qjax.quantize(jnp.ones((4096, 128)).repeat(32, axis=1), qjax.W8A8_FP8)
        )
        x: Any = jax.ShapeDtypeStruct((2, 128, 4096), jnp.bfloat16)
        assert packed.packed_config(x, w) == (fast, "tuned")
        x = jax.ShapeDtypeStruct((3, 4096), jnp.bfloat16)
        assert packed.packed_config(x, w)[1] == "heuristic"
    finally:
        tuned.load_table.cache_clear()


def test_autotune_needs_rows(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("nothing\n")
    assert autotune.main(["--from", str(source)]) == 1
    assert "need rows of one device" in capsys.readouterr().err


def test_every_entry_of_every_shipped_table_fits() -> None:
    modules: dict[str, Any] = {
        kernel.__name__.rsplit(".", 1)[-1]: kernel
        for kernel in (dequantize, w4a8, w8a8, weight_only, weight_only_large)
    }
    for path in tuned.table_path("any").parent.glob("*.json"):
        for entry in json.loads(path.read_text())["entries"]:
            kernel = modules[entry["kernel"]]
            problem = kernel.Problem(**entry["problem"])
            config = kernel.Config(**entry["config"])
            assert kernel.config_unsupported_reason(config, problem) is None, entry
