"""The output projection in a format of its own, from the command line to the kernels' layout."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.checkpoints.export import save_model
from qjax.checkpoints.hf import load_model
from qjax.checkpoints.native import save_native
from qjax.formats import INT4_G32, INT8_CHANNEL, W8A8_FP8, QuantFormat, parse_format
from qjax.models.sharding import placer, tensor_parallel_mesh
from qjax.ops.packed import PackedWeight
from qjax.quantize import is_quantized, quantize, quantize_tree
from qjax.serving.synthetic import SHAPES, random_params
from qjax.serving.weights import prepare_weights
from scripts import serve
from tests.checkpoint_models import assert_same_tree
from tests.serving_model import write_model

PROMPTS = ["--prompt", "the cat sat", "--prompt", "the dog"]
TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("model"), num_kv_heads=2, tied=False)


def test_greedy_tokens_are_those_of_the_dequantized_matrix(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one device and on two."""
    kernel = load_model(model, rules={"lm_head/kernel": INT8_CHANNEL}).params["lm_head"]["kernel"]
    same = tmp_path / "same"
    same.mkdir()
    for file in model.glob("*.json"):
        (same / file.name).write_text(file.read_text())
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = np.ascontiguousarray(np.asarray(kernel.dequantize(jnp.float32)).T)
    save_file(tensors, same / "model.safetensors")

    tokens, sizes = [], []
    for folder, flags in (
        (same, []),
        (model, ["--lm-head-format", "int8"]),
        (model, ["--lm-head-format", "int8", "--tp-size", "2"]),
    ):
        output = tmp_path / f"{len(tokens)}.jsonl"
        more = ["--max-new-tokens", "16", "--ignore-eos", "--output", str(output)]
        assert serve.main(["--model", str(folder), *PROMPTS, *flags, *more]) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        tokens.append([row["token_ids"] for row in rows])
        said = capsys.readouterr().err
        assert ("none, lm_head int8; " in said) == bool(flags)
        sizes.append(float(re.findall(r"weights +(\S+) kB", said)[0]))
    assert tokens[0] == tokens[1] == tokens[2] and len(set(tokens[0][0])) > 4
    saved = 32 * 288 * 3 - 288 * 4  # codes for float32, less the scales
    assert sizes[0] - sizes[1] == pytest.approx(saved / 1e3, abs=0.02)
    assert sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip-layers", ".*_proj/kernel"], "leaves nothing to skip, lm_head has its own"),
        (["--skip-layers", ".*", "--quantization", "int8"], "matches lm_head/kernel, which is to"),
        (["--skip-layers", "(", "--quantization", "int8"], "not a regular expression"),
        (["--tp-size", "4"], "num_kv_heads=2 cannot be cut over 4"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ["--lm-head-format", "int4"]
    assert serve.main(["--model", str(model), *PROMPTS, *head, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def quantized(
    folder: pathlib.Path, source: pathlib.Path, method: str, fmt: QuantFormat, **rules: QuantFormat
) -> pathlib.Path:
    """The model with its layers quantized, and ``lm_head`` too if ``head`` is given."""
    loaded = load_model(source, progress=False)
    formats = {"model/.*/kernel": fmt} | {f"lm_{name}/kernel": f for name, f in rules.items()}
    params = quantize_tree(loaded.params, formats)
    save_model(folder, loaded.config, params, method, source=source, progress=False)
    return folder


@pytest.mark.parametrize(
    ("method", "fmt"),
    [
        ("awq", INT4_G32.replace(symmetric=False)),
        ("compressed-tensors", INT4_G32),
        ("fp8", W8A8_FP8),
        ("gptq", INT4_G32),
    ],
)
def test_rules_for_what_a_quantized_checkpoint_stores_unquantized(
    method: str, fmt: QuantFormat, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = quantized(tmp_path / "quantized", model, method, fmt)
    as_stored = load_model(folder, progress=False).params
    loaded = load_model(folder, rules={"lm_head/kernel": INT8_CHANNEL}, progress=False).params
    wanted = dict(as_stored) | {
        "lm_head": {"kernel": quantize(as_stored["lm_head"]["kernel"], INT8_CHANNEL)}
    }
    assert_same_tree(loaded, wanted)
    mesh = tensor_parallel_mesh(2)
    cut = load_model(folder, rules={"lm_head/kernel": INT8_CHANNEL}, mesh=mesh, progress=False)
    assert_same_tree(cut.params, wanted)
    for pattern in (".*/kernel", ".*/down_proj/kernel"):
        with pytest.raises(ValueError, match="a rule matches model/layers_0/.*quantized already"):
            load_model(folder, rules={pattern: INT8_CHANNEL}, progress=False)


def test_greedy_tokens_of_a_quantized_checkpoint(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those of the checkpoint that stores this ``lm_head``."""
    body = quantized(tmp_path / "body", model, "compressed-tensors", INT4_G32)
    both = quantized(tmp_path / "both", model, "compressed-tensors", INT4_G32, head=INT8_CHANNEL)
    flags = ["--lm-head-format", "int8"]
    tokens, sizes = [], []
    for folder, more in ((both, []), (body, flags)):
        output = tmp_path / f"{len(tokens)}.jsonl"
        more = [*more, "--max-new-tokens", "16", "--ignore-eos", "--output", str(output)]
        assert serve.main(["--model", str(folder), *PROMPTS, *more]) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        tokens.append([row["token_ids"] for row in rows])
        said = capsys.readouterr().err
        assert (", lm_head int8; " in said) == (folder == body)
        sizes.append(re.findall(r"weights +(\S+) kB", said)[0])
    assert tokens[0] == tokens[1] and len(set(tokens[0][0])) > 4
    assert sizes[0] == sizes[1]

    assert serve.main(["--model", str(both), *PROMPTS, "--quiet", *flags]) == 2
    error = capsys.readouterr().err
    assert "a rule matches lm_head/kernel, which the checkpoint stores quantized" in error
    assert error.count("\n") == 1
    assert serve.main(["--model", str(body), *PROMPTS, *flags, "--quantization", "int8"]) == 2
    assert "load it without quantization, or" in capsys.readouterr().err


def test_native_checkpoints_keep_the_formats_they_were_saved_in(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(model, progress=False)
    save_native(tmp_path / "native", loaded.config, loaded.params, source=model)
    flags = ["--model", str(tmp_path / "native"), *PROMPTS, "--quiet", "--lm-head-format", "int8"]
    assert serve.main(flags) == 2
    error = capsys.readouterr().err
    assert "load it without rules for lm_head/kernel, or save it again" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["int8", "w8a8_fp8"])
def test_packed_for_kernels(name: str) -> None:
    head = parse_format(name)
    params = random_params(TINY, None, head=head)
    kernel = params["lm_head"]["kernel"]
    assert kernel.fmt == head
    packed, note = prepare_weights(dict(params), jnp.bfloat16, fuse=False, pack=True)
    assert note == "1 of 1 quantized matrices use Mosaic GPU kernels"
    assert isinstance(packed["lm_head"]["kernel"], PackedWeight)
    np.testing.assert_array_equal(packed["lm_head"]["kernel"].unpack().qvalue, kernel.qvalue)


def test_a_vocabulary_without_whole_tiles_is_left_to_xla() -> None:
    odd = dataclasses.replace(TINY, vocab_size=257)
    options: dict[str, Any] = {"fuse": False, "pack": True}
    params = random_params(odd, None, head=INT8_CHANNEL)
    params, note = prepare_weights(params, jnp.bfloat16, **options)
    assert is_quantized(params["lm_head"]["kernel"])
    assert note.startswith("0 of 1 quantized matrices") and "lm_head" in note and "257" in note
    # Each of two devices has 288 of 576 columns.
    halves, mesh = dataclasses.replace(TINY, vocab_size=576), tensor_parallel_mesh(2)
    place = placer(halves, mesh)
    params = random_params(halves, None, head=INT8_CHANNEL, place=place)
    params, note = prepare_weights(params, jnp.bfloat16, mesh=mesh, **options)
    assert "; XLA multiplies lm_head (" in note and "288" in note
