from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from qjax.evaluation.device_time import device_seconds
from qjax.pallas_kernels.weight_only import Config
from scripts import bench_matmul
from scripts.bench_matmul import Row, relative_error, shape_of, speedups, table

ROOT = pathlib.Path(bench_matmul.__file__).resolve().parent.parent


def test_rows_of_a_tiny_problem(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "rows.jsonl"
    flags = ["--shapes", "128x64", "--rows", "1,70", "--launches", "2", "--output", str(output)]
    assert bench_matmul.main([*flags, "--formats", "w8a8_int8", "--backends", "xla"]) == 0
    rows = [Row(**json.loads(line)) for line in output.read_text().splitlines()]
    assert [(row.k, row.n, row.m) for row in rows] == [(128, 64, 1), (128, 64, 70)]
    for row in rows:
        assert row.us is not None and row.tflop_per_s is not None and row.tb_per_s is not None
        assert row.tflop_per_s == pytest.approx(2 * row.m * 128 * 64 / row.us / 1e6)
        weights = 128 * 64 + 64 * 4
        assert row.tb_per_s == pytest.approx((weights + 2 * row.m * 192) / row.us / 1e6)
        assert row.relative_error is not None and 0 < row.relative_error < 3e-3
        assert row.error is None and row.skipped is None
    assert "| 128x64 | 70 | w8a8_int8 | xla |" in capsys.readouterr().out


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="on a GPU the kernel would run")
def test_what_has_no_kernel_is_skipped_with_its_reason(capsys):
    for shape, name, reason in (
        ("128x64", "int4", "NVIDIA Hopper GPU"),
        ("128x64", "w8a8_fp8", "NVIDIA Hopper GPU"),
        ("128x48", "w8a8_int8", "must be multiples of (128, 64)"),
    ):
        flags = ["--shapes", shape, "--rows", "1", "--formats", name]
        args = bench_matmul.build_parser().parse_args([*flags, "--backends", "mosaic_gpu"])
        bench_matmul.work(args)
        (line,) = capsys.readouterr().out.splitlines()
        row = Row(**json.loads(line))
        assert row.us is None and row.error is None and reason in (row.skipped or "")


def test_a_hanging_process_costs_only_its_own_rows(capsys):
    flags = ["--shapes", "128x64", "--rows", "1,2", "--formats", "int8", "--time-limit", "0.01"]
    assert bench_matmul.main([*flags, "--backends", "xla"]) == 1
    out = capsys.readouterr().out
    assert out.count("not finished within --time-limit 0.01 s") == 4  # 2 rows, as JSON and table


def test_wrong_results_are_found():
    x = jnp.ones((2, 128), jnp.bfloat16)
    w = jnp.ones((128, 64), jnp.bfloat16)
    assert relative_error(x @ w, x, w, None) == 0
    wrong = (x @ w).at[0].mul(jnp.bfloat16(1.1))
    assert relative_error(wrong, x, w, None) > bench_matmul.MAX_ERROR


def test_a_failing_config_does_not_stop_the_others(monkeypatch):
    def product(x: jax.Array, w: object, *, config: Config) -> jax.Array:
        if config.stages == 2:
            raise ValueError("two stages\nare too few")
        return jnp.ones((2, 64), jnp.bfloat16) * (128 if config.stages == 4 else 7)

    monkeypatch.setattr(bench_matmul.plain, "matmul", product)
    args = bench_matmul.build_parser().parse_args(["--launches", "1"])
    row = Row("128x64", 128, 64, 2, "bf16", "mosaic_gpu")
    x, w = jnp.ones((2, 128), jnp.bfloat16), jnp.ones((128, 64), jnp.bfloat16)
    done = {
        stages: bench_matmul.time_one(args, row, x, [w], Config(1, stages), "search")
        for stages in (2, 3, 4)
    }
    assert done[2].error == "ValueError: two stages" and "stages=2" in (done[2].config or "")
    assert "wrong: relative error" in (done[3].error or "") and done[3].us is None
    assert done[4].error is None and done[4].us is not None


def test_times_cycle_through_the_calls():
    calls = [0, 0]

    def call(i: int) -> jax.Array:
        calls[i] += 1
        return jnp.zeros(())

    seconds, timing = device_seconds([lambda: call(0), lambda: call(1)], 4)
    assert len(seconds) == 4 and timing == "wall" and calls == [3, 3]


def test_speedup_is_over_bf16_of_the_same_shape_and_rows(tmp_path):
    rows = [
        Row(
            "8b_o",
            4096,
            4096,
            1,
            "bf16",
            "xla",
            us=10.0,
            tb_per_s=3.0,
            tflop_per_s=1.0,
            relative_error=0.0,
            floor_us=5.0,
            config_source="xla",
        ),
        Row(
            "8b_o",
            4096,
            4096,
            1,
            "int4",
            "mosaic_gpu",
            us=4.0,
            tb_per_s=3.0,
            tflop_per_s=2.0,
            relative_error=0.0,
            config_source="heuristic",
        ),
        Row(
            "8b_o",
            4096,
            4096,
            2,
            "int4",
            "mosaic_gpu",
            us=4.0,
            tb_per_s=3.0,
            tflop_per_s=2.0,
            relative_error=0.0,
            config_source="search",
        ),
        Row("8b_o", 4096, 4096, 4, "int4", "mosaic_gpu", skipped="reasons"),
    ]
    assert speedups(rows) == {rows[0]: 1.0, rows[1]: 2.5}
    lines = table(rows)
    assert "| 50.0% | 1.00 |" in lines[2] and "| - | 2.50 |" in lines[3]
    assert "| - | - |" in lines[4] and "skipped: reasons" in lines[5]
    pytest.importorskip("matplotlib")
    bench_matmul.plot(rows, str(tmp_path / "speedup.png"))
    assert (tmp_path / "speedup.png").stat().st_size > 1000


def test_shapes():
    assert shape_of("8b_gate_up") == (4096, 28672) and shape_of("384x64") == (384, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "int5"], "unknown format 'int5'"),
        (["--shapes", "9b_o"], "unknown shape '9b_o'"),
        (["--shapes", "0x64"], "unknown shape '0x64'"),
        (["--backends", "triton"], "unknown backend 'triton'"),
        (["--rows", "1,x"], "--rows '1,x' must be numbers"),
        (["--launches", "0"], "--launches must be at least 1"),
        (["--every", "--backends", "xla"], "--every is about configs of kernels"),
        (["--search", "2", "--backends", "xla"], "--search is about configs of kernels"),
        (["--output", "/no/such/rows.jsonl"], "--output /no/such/rows.jsonl: no such folder"),
        (["--plot", "speed.doc"], "--plot speed.doc: name it .png"),
    ],
)
def test_bad_arguments_exit_with_2(flags, message, capsys):
    assert bench_matmul.main(flags) == 2
    assert message in capsys.readouterr().err
