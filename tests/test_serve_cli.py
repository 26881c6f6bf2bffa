from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qjax.serving.results import Result, ResultFile
from scripts import serve
from tests.serving_model import write_model

ROOT = pathlib.Path(serve.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random model of one layer with a tokenizer and a chat template, in the usual files."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of the same shapes share their compiled programs, as the help text advises users."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def serve_main(model: pathlib.Path, *flags: Any) -> int:
    return serve.main(["--model", str(model), "--max-running-requests", "2", *map(str, flags)])


def write_lines(path: pathlib.Path, *lines: Any) -> pathlib.Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_in_input_order_with_every_field(model, tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.txt", "the cat", "", "the dog ran \u2028 to", "on the mat")
    output = tmp_path / "out.jsonl"
    common = ("--prompts", prompts, "--output", output, "--max-new-tokens", 9)
    assert serve_main(model, *common, "--preset", "throughput") == 0
    rows = read_lines(output)
    assert [row["prompt"] for row in rows] == ["the cat", "the dog ran \u2028 to", "on the mat"]
    for row in rows:
        assert set(row) == {"prompt", "text", "token_ids", "prompt_tokens", "finish_reason"}
        assert row["finish_reason"] in ("stop", "length") and row["prompt_tokens"] > 1
        assert len(row["token_ids"]) == 9 or row["token_ids"][-1] == 0
    assert not list(tmp_path.glob("*.partial"))
    captured = capsys.readouterr()
    for word in ("prefill", "decode", "compiling", "fp8; ", "fp8_e4m3-tracked", "in bf16"):
        assert word in captured.err
    assert captured.out == ""
    assert serve_main(model, *common) == 2
    assert "out.jsonl exists; name another file, or give --overwrite" in capsys.readouterr().err
    # Explicit flags win over the preset.
    flags = ("--preset", "throughput", "--quantization", "none", "--kv-cache-dtype", "auto")
    assert serve_main(model, *common, *flags, "--overwrite") == 0
    message = capsys.readouterr().err
    assert "none; " in message and "f32; " in message
    assert serve_main(model, *common, "--overwrite", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_settings_per_line_and_conversations(model, tmp_path):
    prompts = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "the cat", "max_new_tokens": 3, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "the dog"}], "ignore_eos": True},
        {"prompt": "the cat", "temperature": 5, "seed": 1, "ignore_eos": True},
        {"prompt": "the cat", "temperature": 5, "seed": 1, "ignore_eos": True},
        {"prompt": "the cat", "temperature": 5, "seed": 2, "ignore_eos": True},
    )
    output = tmp_path / "out.jsonl"
    flags = ("--prompts", prompts, "--output", output, "--max-new-tokens", 12, "--quiet")
    assert serve_main(model, *flags) == 0
    rows = read_lines(output)
    assert [len(row["token_ids"]) for row in rows] == [3, 12, 12, 12, 12]
    assert rows[1]["prompt"] == "user: the dog bot:"
    assert rows[2] == rows[3] != rows[4]
    assert serve_main(model, *flags[:-1], "--chat", "--overwrite", "--quiet") == 0
    assert read_lines(output)[0]["prompt"] == "user: the cat bot:"


def test_printed_results(model, capsys):
    flags = ("--max-new-tokens", 5, "--ignore-eos")
    assert serve_main(model, "--prompt", "the cat", *flags, "--quiet") == 0
    alone = capsys.readouterr().out
    assert alone.startswith("the cat") and len(alone) > len("the cat\n")
    assert serve_main(model, "--prompt", "the dog", "--prompt", "the cat", *flags) == 0
    captured = capsys.readouterr()
    assert captured.out.index("--- 1/2: 5 tokens, length\nthe dog") < captured.out.index(
        "--- 2/2: 5 tokens, length\n" + alone
    )
    assert "prefill" in captured.err


def first_stats_row(err: str) -> list[str]:
    """The words of the first row under the header; threads of other tests may log above it."""
    lines = err.splitlines()
    (header,) = (i for i, line in enumerate(lines) if line.startswith("layer "))
    return lines[header + 1].split()


def test_measured_kv_scales_are_exported_and_read_back(model, tmp_path, capsys):
    scales, output = tmp_path / "scales.json", tmp_path / "out.jsonl"
    flags = ("--prompt", "the cat", "--max-new-tokens", 5, "--ignore-eos", "--quiet")
    measure = (*flags, "--export-kv-scales", scales)
    assert serve_main(model, *measure, "--kv-stats") == 0
    assert first_stats_row(capsys.readouterr().err)[:4] == ["0", "f32", "0", "0"]
    values = json.loads(scales.read_text())
    assert values["dtype"] == "float8_e4m3fn" and list(values["layers"]) == ["0"]
    assert serve_main(model, *measure, "--overwrite", "--kv-cache-dtype", "int4") == 2
    assert "cannot be measured with a KV cache in int4" in capsys.readouterr().err
    assert serve_main(model, *measure) == 2
    assert "scales.json exists; name another file, or give --overwrite" in capsys.readouterr().err

    given = (*flags, "--output", output, "--kv-stats", "--quantization-param-path", scales)
    assert serve_main(model, *given) == 0
    row = first_stats_row(capsys.readouterr().err)
    assert row[:2] == ["0", "fp8_e4m3-static-head"]
    values["layers"]["0"]["v_scale"] = 1e-6  # so small that every value is clipped
    scales.write_text(json.dumps(values))
    assert serve_main(model, *given, "--overwrite") == 0
    clipped = first_stats_row(capsys.readouterr().err)
    tokens = read_lines(output)[0]["prompt_tokens"] + 4  # the last one generated is not stored
    assert clipped[2] == row[2] and int(clipped[3]) > 0.9 * 16 * tokens


def test_a_kv_scale_file_that_is_not_used_or_does_not_fit_is_an_error(model, tmp_path, capsys):
    layers = {"0": 0.1, "1": 0.1}
    ranks = {"dtype": "float8_e4m3fn", "scaling_factor": {"0": layers}}
    path = write_lines(tmp_path / "s.json", {"model_type": "llama", "kv_cache": ranks})
    flags = ("--prompt", "a", "--quantization-param-path", path)
    assert serve_main(model, *flags) == 2
    assert "kv_cache.scaling_factor[0] has layer '1'; there are 0 to 0" in capsys.readouterr().err
    del layers["1"]
    write_lines(path, {"model_type": "llama", "kv_cache": ranks})
    for more, message in (
        (("--kv-scale-mode", "dynamic"), "the scale mode 'dynamic' does not use"),
        (("--kv-cache-dtype", "bf16"), "float8_e4m3fn, but bfloat16 is asked for"),
        (("--kv-skip-layers", "0"), "no layer is left to use them"),
        (("--export-kv-scales", tmp_path / "t.txt"), "name the file .json"),
        (("--export-kv-scales", tmp_path / "no" / "t.json"), "does not exist; make it first"),
    ):
        assert serve_main(model, *flags, *more) == 2
        assert message in capsys.readouterr().err


def test_an_export_measures_all_prompts_or_nothing(model, tmp_path, capsys, monkeypatch):
    def interrupt(self: ResultFile, index: int, result: Result) -> None:
        add(self, index, result)
        raise KeyboardInterrupt

    add = ResultFile.add
    prompts = ("--prompt", "the cat", "--prompt", "the dog", "--max-new-tokens", 5)
    export = ("--export-kv-scales", tmp_path / "s.json")
    flags = (*prompts, "--ignore-eos", "--output", tmp_path / "out.jsonl", *export)
    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "add", interrupt)
        assert serve_main(model, *flags) == 130
    assert "; without --export-kv-scales, the same command goes on" in capsys.readouterr().err
    assert serve_main(model, *flags) == 2
    assert "so only the other prompts would be measured; delete it" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_interrupted_runs_go_on(model, tmp_path, capsys, monkeypatch):
    prompts = write_lines(tmp_path / "p.txt", "the cat", "the dog", "a mat", "the end")
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    flags = ("--prompts", prompts, "--max-new-tokens", 6, "--temperature", 1)
    assert serve_main(model, *flags, "--output", whole) == 0
    capsys.readouterr()

    def interrupt(self: ResultFile, index: int, result: Result) -> None:
        add(self, index, result)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    add = ResultFile.add
    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "add", interrupt)
        assert serve_main(model, *flags, "--output", output) == 130
    message = capsys.readouterr().err
    assert "interrupted; 2 of 4 results are in" in message and "goes on from there" in message
    assert not output.exists()
    partial = tmp_path / "out.jsonl.partial"
    assert len(read_lines(partial)) == 3

    assert serve_main(model, *flags, "--output", output, "--seed", 9) == 2
    message = capsys.readouterr().err
    assert "other settings (prompts:" in message and "delete it to start over" in message

    # A kill may leave half a line, which is generated again.
    with partial.open("a") as file:
        file.write('{"index": 3, "prom')
    assert serve_main(model, *flags, "--output", output) == 0
    assert "2 of 4 results found" in capsys.readouterr().err
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_two_runs_do_not_write_one_file(tmp_path):
    path, settings = tmp_path / "out.jsonl", {"a": 1}
    result = Result("p", "t", (1,), 1, "length")
    with ResultFile(path, 2, settings) as first:
        first.add(0, result)
        with pytest.raises(ValueError, match="out.jsonl.partial is being written by another"):
            ResultFile(path, 2, settings)
        first.add(1, result)
        first.finish()
    assert path.read_text().count("\n") == 2 and not first.partial.exists()


def test_a_partial_file_without_results_binds_nobody(tmp_path):
    """Such as of a run that failed while it loaded its model."""
    with pytest.raises(ValueError, match="no such layer"):
        with ResultFile(tmp_path / "out.jsonl", 2, {"a": 1}):
            raise ValueError("no such layer")
    with pytest.raises(KeyboardInterrupt):
        with ResultFile(tmp_path / "out.jsonl", 2, {"a": 2}) as file:
            file.add(1, Result("p", "t", (1,), 1, "length"))
            raise KeyboardInterrupt
    with pytest.raises(ValueError, match="a: 2 then, 3 now"):
        ResultFile(tmp_path / "out.jsonl", 2, {"a": 3})


def test_a_damaged_partial_file_is_an_error(model, tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.txt", "the cat")
    write_lines(tmp_path / "out.jsonl.partial", "[]")
    assert serve_main(model, "--prompts", prompts, "--output", tmp_path / "out.jsonl") == 2
    assert "out.jsonl.partial:1 is damaged; delete the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        (None, (), "there is no prompt; give --prompt TEXT or --prompts FILE"),
        (["{"], (), "p.jsonl:1: not JSON"),
        (["3"], (), "p.jsonl:1: expected an object with 'prompt', got 3"),
        (['{"text": "a"}'], (), "p.jsonl:1: unknown key 'text'; known are prompt, messages"),
        (["", '{"top_k": 1}'], (), "p.jsonl:2: give either 'prompt' or 'messages'"),
        (['{"prompt": 5}'], (), "p.jsonl:1: 'prompt' must be a string, not 5"),
        (['{"messages": []}'], (), "p.jsonl:1: 'messages' must be a list of objects"),
        (['{"prompt": "a", "seed": "x"}'], (), "p.jsonl:1: 'seed' must be of type int, not 'x'"),
        (['{"prompt": "a", "top_p": 2}'], (), "p.jsonl:1: top_p=2.0 must lie in (0, 1]"),
        (['{"prompt": ""}'], (), "p.jsonl:1: the prompt is empty"),
        (["[" * 100_000], (), "p.jsonl:1: not JSON"),
        (['{"prompt": "a", "seed": ' + "1" * 5000 + "}"], (), "p.jsonl:1: not JSON"),
        (
            ['{"prompt": "a", "temperature": ' + "1" * 400 + "}"], (),
            "p.jsonl:1: 'temperature' is larger than any number",
        ),
        (['{"prompt": "a", "top_k": 2147483648}'], (), "p.jsonl:1: top_k=2147483648 is too large"),
        (['{"prompt": "a"}'], ("--top-p", 0.5), "top_p=0.5 has no use at temperature 0"),
        (['{"prompt": "a"}'], ("--top-k", 5), "top_k=5 has no use at temperature 0"),
        (['{"prompt": "a"}'], ("--overwrite",), "--overwrite has no use without --output"),
        (
            ['{"prompt": "a"}'], ("--calibration-cache", "c"),
            "--calibration-cache has no use with --quantization none",
        ),
        ([""], (), "p.jsonl holds no prompt"),
        (['{"prompt": "a"}'], ("--output", "o.txt"), "--output o.txt: results are JSON lines"),
        (['{"prompt": "a"}'], ("--max-new-tokens", 0), "max_new_tokens=0 must be at least 1"),
        (['{"prompt": "a"}'], ("--max-new-tokens", 500), "p.jsonl:1: the prompt has 1 tokens"),
        (['{"prompt": "a"}'], ("--max-model-len", 16), "max_model_len=16"),
        (['{"prompt": "a"}'], ("--max-model-len", 999), "max_model_len=999 exceeds the 128"),
        (['{"prompt": "a"}'], ("--kv-skip-layers", "x"), "'x' is no list of layer numbers"),
        (
            ['{"prompt": "a"}'],
            ("--kv-cache-dtype", "int8", "--kv-skip-layers", 5),
            "KV layer 5 does not exist; the model has layers 0 to 0",
        ),
        (['{"prompt": "a"}'], ("--kv-skip-layers", 0), "not quantized in any layer"),
        (
            ['{"prompt": "a"}'],
            ("--kv-cache-dtype", "fp8_e4m3", "--kv-scale-mode", "static"),
            "need a checkpoint calibrated for it; this one has none",
        ),
        (['{"prompt": "a"}'], ("--kv-scale-mode", "dynamic"), "has no scales"),
        (None, ("--quantization", "int5"), "unknown format 'int5'; choose one of none, bf16, fp8"),
        (['{"prompt": "a"}'], ("--lm-head-format", "int5"), "unknown format 'int5'; choose one of"),
        (
            ['{"prompt": "a"}'], ("--lm-head-format", "int8"),
            "lm_head cannot be quantized to int8_channel: this model has none of its own",
        ),
        (['{"prompt": "a"}'], ("--skip-layers", ".*/layers_0/.*"), "leaves nothing to skip"),
        (
            ['{"prompt": "a"}'],
            ("--skip-layers", "layer_0", "--quantization", "int8"),
            "match none of the 7 parameters",
        ),
        (['{"prompt": "a"}'], ("--max-total-tokens", 32), "must hold one longest request"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_code_2(lines, flags, message, model, tmp_path, capsys):
    if lines is not None:
        flags = ("--prompts", write_lines(tmp_path / "p.jsonl", *lines), *flags)
    assert serve_main(model, "--quiet", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("serve.py: error: ") and error.count("\n") == 1


def test_bytes_that_are_no_text_are_refused(model, tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfgood\nbad \xff\n")
    assert serve_main(model, "--prompts", tmp_path / "p.txt") == 2
    assert "p.txt:2: not UTF-8 (invalid start byte at byte 4)" in capsys.readouterr().err
    # As Python reads arguments that are not UTF-8.
    assert serve_main(model, "--prompt", "good", "--prompt", "bad \udcff") == 2
    assert "--prompt 2: the text is no Unicode at character 4" in capsys.readouterr().err


def test_missing_files_are_named(model, tmp_path, capsys):
    assert serve_main(model, "--prompts", tmp_path / "no.txt") == 2
    assert "no.txt: No such file or directory" in capsys.readouterr().err
    assert serve_main(tmp_path / "nowhere", "--prompt", "a") == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    # A variable that is not set in a shell, not a wish for the bundled model.
    assert serve.main(["--model", "", "--prompt", "a"]) == 2
    assert "the model's name is empty" in capsys.readouterr().err
    assert serve_main(tmp_path, "--prompts", tmp_path) == 2
    assert "prompts are read from .txt or .jsonl files" in capsys.readouterr().err


def test_a_missing_package_of_the_server_is_named(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "qjax.serving.http_app", raising=False)
    assert serve_main(model, "--port", 0) == 2
    message = "serving over HTTP needs uvicorn: pip install 'qjax[server]'"
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback(model):
    with pytest.raises(ValueError, match="there is no prompt"):
        serve_main(model, "--debug")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        serve.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("examples", "--preset throughput", "JAX_COMPILATION_CACHE_DIR", "finish_reason"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_ctrl_c_in_another_process(model, tmp_path):
    prompts = write_lines(tmp_path / "p.txt", *["the cat sat"] * 400)
    output = tmp_path / "out.jsonl"
    flags = ["--model", model, "--prompts", prompts, "--output", output, "--ignore-eos"]
    # Shells start background jobs (a CI run, say) with SIGINT ignored, and so run their children.
    launcher = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = ROOT / "scripts" / "serve.py"
    command = [sys.executable, "-c", launcher, script, *flags, "--max-new-tokens", "100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") > 4:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "of 400 results are in" in error and "Traceback" not in error
    assert len(read_lines(partial)) > 4 and not output.exists()


@pytest.mark.slow
def test_nobody_reads_the_results(model):
    script = ROOT / "scripts" / "serve.py"
    flags = ["--model", model, "--prompt", "the cat", "--max-new-tokens", "2", "--quiet"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *map(str, (script, *flags))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141, done.stderr
    assert "Broken pipe" not in done.stderr and "Traceback" not in done.stderr
