from __future__ import annotations

import json
import pathlib

import pytest

from scripts import bench_calibration as script


def test_blocks_behind_the_first_are_extrapolated() -> None:
    clock = script.PhaseClock()
    for seconds in (10.0, 1.0, 3.0):
        clock.blocks.append({"gptq": seconds, "reading": 0.5})
    clock.seconds = {"gptq": 14.0, "reading": 1.5, "writing": 0.75}
    total, phases = script.extrapolate(clock, 5)
    assert phases == {"gptq": 2.0, "reading": 0.5, "writing": 0.25}
    assert total == pytest.approx(10.5 + 0.25 + 4 * 2.75)


def test_a_small_run_tells_where_the_time_goes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    flags = ["--shape", "tiny", "--samples", "2", "--seq-len", "8", "--vocab-size", "32"]
    flags += ["--method", "rtn", "--no-sequential", "--output", str(output)]
    assert script.main(flags) == 0
    shown = capsys.readouterr()
    assert "2 blocks:" in shown.out and "block 2: reading" in shown.err
    found = json.loads(output.read_text())
    assert len(found["blocks"]) == 2 and {"statistics", "errors"} <= found["blocks"][1].keys()
    assert script.main([*flags, "--layers", "1"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format int5", "unknown format 'int5'"),
        ("--format none", "--format none does not quantize"),
        ("--samples 0", "--samples 0 must be at least 1"),
        ("--batch-tokens 0", "--batch-tokens 0 must be at least 1"),
        ("--sweeps -1", "sweeps=-1 must not be negative"),
        ("--sweeps 2 --method rtn", "--sweeps 2 has no use with --method rtn"),
        ("--time-limit 0", "--time-limit 0 leaves no time"),
        ("--work-dir /no/such/place", "--work-dir /no/such/place is no folder"),
        ("--output /no/such/figures.json", "no such folder"),
        ("--format int8 --method smoothquant", "formats that quantize activations"),
    ],
)
def test_mistakes_are_named(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--shape", "tiny", *flags.split()]) == 2
    assert message in capsys.readouterr().err
