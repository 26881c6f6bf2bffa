"""autotune.py: order of work, processes that fail, and the table after every product."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qjax.evaluation import pool, tuning
from qjax.pallas_kernels import weight_only
from scripts import autotune

WORKER = """
import json, runpy, sys, time

pool = runpy.run_path(sys.argv[2])  # the package takes seconds to import
turn, work_through = pool["turn"], pool["work_through"]

def do(task):
    yield {"doubled": 2 * task}
    if task == 3:
        sys.exit("three is too many")
    with turn(sys.argv[1]):
        time.sleep(60 if task == 5 else 0)
    yield {"doubled": 2 * task}
    time.sleep(60 if task == 7 else 0)

work_through(json.load(sys.stdin), do)
"""


def test_the_most_important_products_come_first() -> None:
    tasks = tuning.plan(["a", "b", "c"], ["int4", "fp8"], [16, 64], 2)
    assert tasks[0][:3] == [("a", "int4", 16), ("c", "int4", 16), ("b", "fp8", 16)]
    assert tasks[1][0] == ("b", "int4", 16) and tasks[1][-1] == ("c", "fp8", 64)
    assert len({task for part in tasks for task in part}) == 12
    # A weight belongs to one worker.
    assert not {task[:2] for task in tasks[0]} & {task[:2] for task in tasks[1]}


def test_a_process_that_fails_or_hangs_costs_one_task(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path / "lock"), str(pool.__file__)]
    found = {}
    tasks = [[3, 1], [5, 2], []]
    for task, results, error in pool.run_pool(command, tasks, time_limit=60.0, hold_limit=0.5):
        found[task] = [result["doubled"] for result in results], error
    assert found == {
        1: ([2, 2], None),
        2: ([4, 4], None),
        3: ([6], "three is too many"),
        5: ([10], "kept the device for more than 0.5 s"),
    }
    # What is not finished in time does not appear; the pool ends all the same.
    late = list(pool.run_pool(command, [[1, 7]], time_limit=2.0, hold_limit=60.0))
    assert [task for task, _, _ in late] in ([1], [])


def test_a_worker_that_cannot_start_fails_all_its_tasks() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no device')"]
    found = list(pool.run_pool(command, [[1, 2]], time_limit=30.0, hold_limit=1.0))
    assert found == [(1, [], "no device"), (2, [], "no device")]


class _FakeTuner(tuning.Tuner):
    """Without a GPU: products by XLA, times by the config."""

    def _unsupported_reason(self, x: jax.Array, w: Any) -> str | None:
        return None

    def _product(self, x: jax.Array, w: Any, config: weight_only.Config) -> jax.Array:
        out = jnp.dot(x, w.dequantize(x.dtype))
        out = out * jnp.bfloat16(7) if config.stages == 6 else out
        parts = [out.astype(jnp.float32)] + [jnp.zeros(out.shape)] * (config.splits - 1)
        return jnp.stack(parts) if config.splits > 1 else out


def _tuner(times: list[float]) -> _FakeTuner:
    def seconds(calls: Any, launches: int) -> tuple[list[list[float]], str]:
        assert launches == 5 and len(calls) == 1
        if len(times) == 1:
            raise RuntimeError("no time\nleft")
        return [[times[0], 1e-6], [9.0], [times.pop(0), 1e-6]], "fake"

    return _FakeTuner(
        contextlib.nullcontext, search=4, launches=5, rotate_bytes=1e6, seconds=seconds
    )


def test_configs_are_checked_and_timed() -> None:
    rows = list(_tuner([3e-6, 2e-6, 4e-6, 0.0]).tune(("256x64", "int4", 3)))
    timed = autotune.measured(rows)
    assert [round(row["us"], 3) for row in timed] == [4.0, 3.0, 5.0]
    problem = weight_only.Problem(3, 256, 64, "int4", 128, compute="bfloat16")
    entry = json.loads(timed[0]["details"])
    assert weight_only.Problem(**entry["problem"]) == problem
    assert weight_only.Config(**entry["config"]) == weight_only.heuristic_config(problem)
    assert "weight_only: heuristic" in rows[0]["config"]
    errors = [row["error"] for row in rows if "error" in row]
    assert any("wrong: relative error" in error for error in errors)
    assert any(error == "RuntimeError: no time" for error in errors)
    (refused,) = _tuner([]).tune(("128x96", "w8a8_int8", 3))
    assert "must be multiples of (128, 64)" in refused["error"]


def test_the_table_is_written_after_every_product(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, sizes = tmp_path / "table.json", []
    details = [
        json.dumps({"kernel": "w8a8", "problem": {"m": m}, "config": {"stages": 4}})
        for m in (16, 64)
    ]

    def run(command: Any, tasks: Any, **limits: float) -> Any:
        assert "--lock" in command and limits == {"time_limit": 240.0, "hold_limit": 40.0}
        assert sum(map(len, tasks)) == 4
        base = {"device": "Test GPU", "jax": "0.11.2"}
        for task, text in zip((tasks[0][0], tasks[0][1]), details, strict=True):
            rows = [{**base, "us": us, "details": text, "config": f"{us}"} for us in (2.0, 1.0)]
            yield task, [*rows, {**base, "error": "spilled"}], None
            sizes.append(len(json.loads(table.read_text())["entries"]))
        row = {**base, "us": 0.5, "details": details[0], "config": "unfinished"}
        yield tasks[0][2], [row], "killed"

    monkeypatch.setattr(autotune, "run_pool", run)
    flags = ["--shapes", "8b_o,8b_qkv", "--formats", "int4", "--rows", "16,64", "--workers", "1"]
    flags += ["--time-limit", "240", "--output", str(table)]
    assert autotune.main(flags) == 0
    assert sizes == [1, 2]
    assert {entry["us"] for entry in json.loads(table.read_text())["entries"]} == {1.0}
    out = capsys.readouterr().out
    assert "8b_o int4 m=16: 1.00 us, 1.0 of 2; spilled" in out
    assert "2 of 4 products, 3 with errors; 2 entries in" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "int5"], "unknown format 'int5'"),
        (["--shapes", "9b_o"], "unknown shape '9b_o'"),
        (["--rows", "1,x"], "--rows '1,x' must be numbers"),
        (["--workers", "0"], "--workers and --launches must be at least 1"),
        (["--from", "rows.jsonl", "--rows", "16"], "--rows is about measuring"),
        (["--from", "/no/such/rows.jsonl"], "--from /no/such/rows.jsonl: no such file"),
        (["--output", "/no/such/table.json"], "--output /no/such/table.json: no such folder"),
        (["--hold-limit", "nan"], "--hold-limit nan must be 0 or more"),
    ],
)
def test_bad_arguments(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert autotune.main(flags) == 1
    assert message in capsys.readouterr().err
