from __future__ import annotations

import argparse
import json

from qjax.evaluation.isolated import flags_from, print_rows, run_isolated


def test_rows_before_a_crash_count_and_the_reason_is_its_last_line(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        "import sys\n"
        "assert sys.argv[1:] == ['--worker', '--rows', '3']\n"
        "print('compiling')\nprint('{\"m\": 1}')\nprint('{\"m\":', flush=True)\n"
        "raise MemoryError('the last line')\n"
    )
    rows, reason = run_isolated(str(script), ["--rows", "3"], time_limit=60)
    assert rows == [{"m": 1}] and reason == "MemoryError: the last line"


def test_flags_are_passed_on_and_none_is_left_out():
    args = argparse.Namespace(batch_sizes="1,64", scales=None, limit=2.5)
    flags = flags_from(args, ("batch_sizes", "scales", "limit"))
    assert flags == ["--batch-sizes", "1,64", "--limit", "2.5"]


def test_rows_are_appended_as_they_arrive(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"

    def rows():
        yield {"m": 1}
        assert json.loads(path.read_text()) == {"m": 1}  # already there before the next is measured
        yield {"m": 2}

    print_rows(rows(), str(path))
    assert path.read_text() == capsys.readouterr().out == '{"m": 1}\n{"m": 2}\n'
