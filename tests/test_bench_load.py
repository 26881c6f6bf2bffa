from __future__ import annotations

import json
import pathlib

import pytest

from scripts import bench_load

SMALL = ["--shape", "tiny", "--layers", "1", "--repeats", "1"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(("stored", "name"), [("bf16", "int4"), ("gptq", "as stored")])
def test_a_child_measures_what_another_wrote(
    stored: str, name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, "--worker", "--model", str(tmp_path), "--stored", stored]
    for formats in ("write", name):
        assert bench_load.main([*flags, "--formats", formats]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = bench_load.Row(**values)
    assert (row.stored, row.format, row.error) == (stored, name, None)
    assert row.file_bytes is not None and row.result_bytes is not None and row.load_s
    assert row.load_gb_per_s == pytest.approx(row.file_bytes / row.load_s / 1e9)
    assert row.largest_tensor_bytes == 512 * 128 * 2
    # Embedding and output layer stay bf16, the rest has about 4.5 bits of 16.
    rest = row.result_bytes - 2 * row.largest_tensor_bytes
    assert 0.25 * 294_912 < rest < 0.35 * 294_912
    (line,) = bench_load.table([row])[2:]
    assert line.startswith(f"| {stored} | {name} | ") and line.count("|") == 10


def test_failures_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--formats", "int4", "--time-limit", "0.01"]
    assert bench_load.main([*SMALL, *flags]) == 1
    assert capsys.readouterr().out.count("not finished within --time-limit 0.01 s") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "int5"], "unknown format 'int5'"),
        (["--stored", "marlin"], "--stored 'marlin' is unknown"),
        (["--layers", "0"], "--layers must be at least 1"),
        (["--folder", "/no/such/place"], "--folder /no/such/place is no folder"),
        (["--output", "/no/such/rows.jsonl"], "--output /no/such/rows.jsonl: no such folder"),
    ],
)
def test_mistakes_are_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_load.main([*SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
