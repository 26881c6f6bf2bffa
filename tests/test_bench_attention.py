from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_format import KVFormat
from qjax.ops.kv import read
from scripts import bench_attention
from scripts.bench_attention import Row, case_of, format_of, in_parts, ratios, table

ROOT = pathlib.Path(bench_attention.__file__).resolve().parent.parent
SMALL = ["--q-heads", "4", "--kv-heads", "2", "--head-dim", "32", "--page-size", "16"]


def parsed(*flags: str) -> argparse.Namespace:
    return bench_attention.build_parser().parse_args([*SMALL, *flags])


@pytest.mark.parametrize("name", ["int8", "int8-dynamic-unbiased"])
def test_rows_of_a_tiny_case(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "rows.jsonl"
    flags = ["--cases", "40x2", "--formats", name, "--backends", "xla", "--launches", "2"]
    assert bench_attention.main([*SMALL, *flags, "--output", str(output)]) == 0
    (row,) = (Row(**json.loads(line)) for line in output.read_text().splitlines())
    assert (row.context, row.batch, row.error, row.skipped) == (40, 2, None, None)
    assert row.us is not None and row.tb_per_s is not None and row.megabytes is not None
    assert row.megabytes == pytest.approx(2 * 2 * 40 * 2 * (32 + 4) / 1e6)
    assert row.tb_per_s == pytest.approx(row.megabytes / row.us)
    assert row.relative_error is not None and 0 < row.relative_error < 5e-3
    assert f"| 40 | 2 | {name} | xla |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3-static", "int4-dynamic"])
def test_pages_are_random_and_every_table_gives_others(name):
    args = parsed("--rotate-mb", "0.05")
    fmt = format_of(name)
    cache, tables = bench_attention.random_cache(args, fmt, 40, 2, rotate=True)
    pages = np.concatenate([np.asarray(t).reshape(-1) for t in tables])
    assert len(tables) > 1 and sorted(pages) == list(range(cache.num_pages))
    keys, values = (np.asarray(x) for x in read(cache, 0, jnp.arange(2, dtype=jnp.int32), 40))
    for x in (keys, values):
        assert 0.9 < x.std() < 1.1 and np.abs(x.mean()) < 0.1
    assert not (keys == values).all()


def test_wrong_results_are_found_and_not_timed(monkeypatch):
    def attend(q, *_, **__):
        return q

    monkeypatch.setattr(bench_attention, "paged_attention", attend)
    (row,) = bench_attention.measure(parsed(), Row(40, 1, "bf16", "xla"))
    assert row.us is None and "wrong: relative error" in (row.error or "")


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="on a GPU the kernel would run")
def test_what_cannot_run_is_skipped_with_its_reason():
    (row,) = bench_attention.measure(parsed(), Row(40, 1, "bf16", "mosaic_gpu"))
    assert row.error is None and "head_dim=32" in (row.skipped or "")


def test_limits(capsys):
    flags = ["--cases", "40x1", "--formats", "bf16", "--backends", "xla"]
    assert bench_attention.main([*SMALL, *flags, "--time-limit", "0.01"]) == 1
    assert "not finished within 0.01 s" in capsys.readouterr().out
    assert bench_attention.main([*SMALL, *flags, "--total-limit", "0"]) == 1
    assert "not finished within -" in capsys.readouterr().out


def test_ratios_and_plot(tmp_path):
    def done(batch: int, name: str, backend: str, us: float) -> Row:
        return Row(
            8192, batch, name, backend, us=us, tb_per_s=2.0, relative_error=1e-3, floor_us=5.0
        )

    rows = [
        done(64, "bf16", "mosaic_gpu", 20.0),
        done(64, "int8", "mosaic_gpu", 10.0),
        done(64, "int8", "xla", 50.0),
        Row(8192, 64, "int4", "xla", error="no"),
    ]
    assert ratios(rows) == {rows[0]: (1.0, None), rows[1]: (2.0, 5.0), rows[2]: (None, 1.0)}
    lines = table(rows)
    assert "| - | 50.0% | 2.00 | 5.00 |" in lines[3] and "| no |" in lines[5]
    pytest.importorskip("matplotlib")
    bench_attention.plot(rows, str(tmp_path / "rates.png"))
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_names():
    assert case_of("8192x64") == (8192, 64)
    assert format_of("int8") == KVFormat("int8", "dynamic")
    assert format_of("fp8_e4m3-static") == KVFormat("float8_e4m3fn", "static")
    unbiased = KVFormat("float8_e4m3fn", "static", without_key_bias=True)
    assert format_of("fp8_e4m3-static-unbiased") == unbiased


def test_kernels_of_a_call():
    assert in_parts([[1e-6, 2e-5], [2e-6, 3e-5], [9e-6, 1e-5]]) == "2.0 + 20.0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "int5"], "format 'int5' is unknown"),
        (["--formats", "bf16-unbiased"], "only quantized keys gain"),
        (["--cases", "8192"], "case '8192' must be CONTEXTxBATCH"),
        (["--backends", "triton"], "unknown backend 'triton'"),
        (["--q-heads", "3"], "--q-heads 3 must be a multiple"),
        (["--launches", "0"], "--tokens must be at least 1"),
        (["--page-size", "0"], "--page-size 0 must be at least 1"),
        (["--window", "0"], "--window 0 must be at least 1"),
        (["--rate", "0"], "--rate 0.0 must be positive"),
        (["--search", "2", "--backends", "xla"], "no use without the backend mosaic_gpu"),
        (["--output", "/no/such/rows.jsonl"], "--output /no/such/rows.jsonl: no such folder"),
    ],
)
def test_bad_arguments_exit_with_2(flags, message, capsys):
    assert bench_attention.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
