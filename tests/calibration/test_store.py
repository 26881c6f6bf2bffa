"""Finished blocks on disk: what comes back, and what the thread that stores them promises."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate import Settings, calibrate_checkpoint
from qjax.calibrate.source import ModelSource
from qjax.calibrate.store import BlockStore, BlockWriter, to_device
from qjax.formats import QuantFormat, parse_format
from qjax.quantize import is_quantized, quantize
from qjax.quantized_array import QuantizedArray
from tests.calibration.tiny import write_model

FORMATS = {
    "int4": parse_format("int4_g32_asym"),
    "int3": QuantFormat("int3", "group", group_size=32),
    "fp8": parse_format("fp8"),
    "mxfp4": QuantFormat("float4_e2m1fn", "group", group_size=32, scale_dtype="float8_e8m0fnu"),
    "w8a8": QuantFormat("int8", "channel", activation=QuantFormat("int8", "tensor", dynamic=False)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_back_is_what_was_stored(name: str, tmp_path: pathlib.Path) -> None:
    """To the type that jax sees: the blocks behind compute the same in the same program."""
    fmt = FORMATS[name]
    assert fmt is not None
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    made = quantize(weight, fmt, dtype=jnp.bfloat16)
    if fmt.activation is not None:
        made = dataclasses.replace(made, act_scale=jnp.float32(0.25))
    params = {"a": {"kernel": made, "bias": jnp.ones((8,), jnp.bfloat16)}, "norm": weight[0]}
    store = BlockStore(tmp_path / "work", {})
    store.save("x", params, {"layers": []})
    stored, record = store.load("x", {"a/kernel": fmt}, jnp.bfloat16)
    assert record == {"layers": []}
    back = to_device(stored)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for left, right in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert left.aval == right.aval  # with weak_type
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    kernels = [x for x in jax.tree.leaves(back, is_leaf=is_quantized) if is_quantized(x)]
    assert len(kernels) == 1 and isinstance(kernels[0], QuantizedArray)
    assert (kernels[0].fmt, kernels[0].dtype) == (made.fmt, made.dtype)


class _Slow(BlockStore):
    """Waits to be let go, and fails where it is told to."""

    def __init__(self, folder: pathlib.Path, failing: str = ""):
        super().__init__(folder, {})
        self.go, self.failing = threading.Event(), failing

    def save(self, name: str, params, record) -> None:
        assert self.go.wait(60)
        if name == self.failing:
            raise OSError("no space left")
        super().save(name, params, record)


def test_a_thread_stores_one_piece_at_a_time(tmp_path: pathlib.Path) -> None:
    store, params = _Slow(tmp_path / "work"), {"x": np.ones(3, np.float32)}
    with BlockWriter(store) as writer:
        writer.save("a", params, {})
        assert not store.has("a")  # the caller goes on meanwhile
        threading.Timer(0.05, store.go.set).start()
        writer.save("b", params, {})
        assert store.has("a")
    assert store.has("b")
    assert not [x for x in threading.enumerate() if x.name.startswith("qjax-store")]


def test_what_the_thread_could_not_store_is_told(tmp_path: pathlib.Path) -> None:
    params = {"x": np.ones(3, np.float32)}
    store = _Slow(tmp_path / "work", failing="a")
    store.go.set()
    with pytest.raises(OSError, match="no space left") as caught, BlockWriter(store) as writer:
        writer.save("a", params, {})
        writer.save("b", params, {})
    assert not hasattr(caught.value, "__notes__")
    assert [path.name for path in store.folder.iterdir()] == ["run.json"]
    # The last piece: nobody comes with another.
    with pytest.raises(OSError, match="no space left"), BlockWriter(store) as writer:
        writer.save("a", params, {})


def test_what_was_begun_is_stored_when_the_caller_fails(tmp_path: pathlib.Path) -> None:
    params = {"x": np.ones(3, np.float32)}
    store = _Slow(tmp_path / "work", failing="b")
    with pytest.raises(KeyboardInterrupt), BlockWriter(store) as writer:
        writer.save("a", params, {})
        store.go.set()
        raise KeyboardInterrupt
    assert store.has("a")
    with pytest.raises(KeyboardInterrupt) as caught, BlockWriter(store) as writer:
        writer.save("b", params, {})
        raise KeyboardInterrupt
    assert "no space left" in caught.value.__notes__[0]
    assert not store.has("b")


@pytest.mark.parametrize("failing", ["block-00000", "block-00001"])
def test_a_run_that_cannot_store_a_block_fails_and_goes_on_later(
    failing: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", layers=2)
    settings = Settings(parse_format("int4_g32"), "rtn")
    save = BlockStore.save

    def full(self: BlockStore, name: str, params, record) -> None:
        if name == failing:
            raise OSError("no space left")
        save(self, name, params, record)

    monkeypatch.setattr(BlockStore, "save", full)
    run = functools.partial(
        calibrate_checkpoint, tmp_path / "model", settings=settings, samples=None, progress=False
    )
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The block before is kept; the one behind was not begun.
    left = {path.name for path in (tmp_path / ".out.calibration").iterdir()}
    assert left == {"run.json", "block-00000"} - {failing}
    monkeypatch.setattr(BlockStore, "save", save)
    run(tmp_path / "out")
    run(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_ctrl_c_keeps_the_block_that_is_being_stored(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", layers=2)
    interrupted, save = threading.Event(), BlockStore.save

    def slow(self: BlockStore, *args) -> None:
        assert interrupted.wait(60)
        save(self, *args)

    def interrupt(self: ModelSource, index: int, *args) -> dict:
        if index == 1:
            interrupted.set()
            raise KeyboardInterrupt
        return block(self, index, *args)

    block = ModelSource.block
    monkeypatch.setattr(BlockStore, "save", slow)
    monkeypatch.setattr(ModelSource, "block", interrupt)
    settings = Settings(parse_format("int4_g32"), "rtn")
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(tmp_path / "model", tmp_path / "out", settings, None, progress=False)
    left = {path.name for path in (tmp_path / ".out.calibration").iterdir()}
    assert left == {"run.json", "block-00000"}
