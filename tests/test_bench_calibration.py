from __future__ import annotations

import json
import pathlib
import time

import pytest

from scripts import bench_calibration as script


def test_blocks_behind_the_first_are_extrapolated() -> None:
    clock = script.PhaseClock()
    for seconds in (10.0, 1.0, 3.0):
        clock.blocks.append({"gptq": seconds, "reading": 0.5})
    clock.seconds = {"gptq": 14.0, "reading": 1.5, "writing": 0.75}
    found = script.extrapolate(clock, 20.25, 5)
    assert found.phases == {"gptq": 2.0, "reading": 0.5, "writing": 0.25}
    assert found.once == pytest.approx(20.25 - 15.5 - 0.75) and found.first == 10.5
    assert found.total == pytest.approx(4.0 + 10.5 + 0.25 + 4 * 2.75)


def test_extrapolating_to_the_blocks_that_ran_gives_what_it_took() -> None:
    clock = script.PhaseClock()
    clock.blocks = [{"gptq": 9.0}, {"gptq": 2.0}, {"gptq": 1.0}]
    clock.seconds = {"gptq": 12.0, "writing": 1.5}
    runs = [script.extrapolate(clock, 16.0 + once, 3) for once in (0.0, 5.0)]
    assert [run.total for run in runs] == pytest.approx([16.0, 21.0])
    more = [script.extrapolate(clock, 16.0 + once, 30).total for once in (0.0, 5.0)]
    assert more[1] - more[0] == pytest.approx(5.0)  # not ten times that


def test_the_phases_of_a_block_are_its_time() -> None:
    clock = script.PhaseClock()
    started = time.perf_counter()
    with clock.block():
        with clock.phase("gptq"):
            time.sleep(0.01)
        time.sleep(0.01)
    took = time.perf_counter() - started
    assert clock.blocks[0].keys() == {"gptq", "other"}
    assert min(clock.blocks[0].values()) >= 0.009 and sum(clock.blocks[0].values()) <= took
    assert clock.seconds == clock.blocks[0]


def test_a_small_run_tells_where_the_time_goes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    flags = ["--shape", "tiny", "--samples", "2", "--seq-len", "8", "--vocab-size", "32"]
    flags += ["--method", "rtn", "--no-sequential", "--output", str(output)]
    assert script.main(flags) == 0
    shown = capsys.readouterr()
    assert "2 blocks:" in shown.out and "block 2: reading" in shown.err
    assert "once, however many blocks:" in shown.out
    found = json.loads(output.read_text())
    assert len(found["blocks"]) == 2 and {"statistics", "other"} <= found["blocks"][1].keys()
    # Nothing is forgotten: the run itself is what the sums say.
    total = found["once_seconds"] + sum(sum(block.values()) for block in found["blocks"])
    total += 2 * found["block_seconds"]["writing"]
    assert total == pytest.approx(found["wall_seconds"])
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
