"""The inline PTX that makes weights of packed words, executed by a small model of PTX.

Neither the interpreter nor a compiler shows whether those instructions compute what they should;
this does, for every kind of code, without a GPU. It runs the very strings that are compiled.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.pallas_kernels import _codes, _layout, _unpack

DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SUFFIX = {"f16x2": "float16", "bf16x2": "bfloat16"}


def _halves(register: int) -> tuple[int, int]:
    return register & 0xFFFF, register >> 16


def _numbers(register: int, compute: str) -> np.ndarray:
    return np.asarray(_halves(register), np.uint16).view(DTYPES[compute]).astype(np.float64)


def _register(values: np.ndarray, compute: str) -> int:
    low, high = np.asarray(values).astype(DTYPES[compute]).view(np.uint16)
    return int(high) << 16 | int(low)


def run_ptx(text: str, *operands: int, constraints: str | None = None) -> int:
    """Result of one inline-PTX block on integers that stand for 32-bit registers."""
    assert constraints is None
    names: dict[str, int] = {f"${i + 1}": value for i, value in enumerate(operands)}

    def value(name: str) -> int:
        return names[name] if name in names else int(name, 0)

    for statement in filter(None, (part.strip() for part in text.strip(" {}").split(";"))):
        if statement.startswith(".reg"):
            continue
        op, arguments = statement.split(" ", 1)
        split = re.fullmatch(r"\{(\w+), (\w+)\}, (\$1)", arguments)
        if op == "mov.b32" and split:
            names[split[1]], names[split[2]] = _halves(value(split[3]))
            continue
        target, *sources = [part.strip() for part in arguments.split(",")]
        given = [value(source) for source in sources]
        base, *modifiers = op.split(".")
        if base == "mov":
            result = given[0]
        elif base == "and":
            result = given[0] & given[1]
        elif base == "or":
            result = given[0] | given[1]
        elif base == "xor":
            result = given[0] ^ given[1]
        elif base in ("mad", "mul") and modifiers == ["lo", "s32"]:
            result = (given[0] * given[1] + (given[2] if base == "mad" else 0)) & 0xFFFFFFFF
        elif base == "shr":
            assert modifiers == ["b32"]
            result = given[0] >> given[1]
        elif base == "prmt":
            pool = (given[0] | given[1] << 32).to_bytes(8, "little")
            picked = [pool[given[2] >> (4 * i) & 7] for i in range(4)]
            assert not any(given[2] >> (4 * i) & 8 for i in range(4)), "sign replication"
            result = int.from_bytes(bytes(picked), "little")
        elif op == "cvt.rn.f16x2.e4m3x2":
            codes = np.asarray([given[0] & 0xFF, given[0] >> 8], np.uint8)
            result = _register(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64), "float16")
        elif base in ("fma", "mul"):
            compute = SUFFIX[modifiers[-1]]
            numbers = [_numbers(register, compute) for register in given]
            exact = numbers[0] * numbers[1] + (numbers[2] if base == "fma" else 0.0)
            result = _register(exact, compute)  # subnormals kept: no .ftz
        else:
            raise AssertionError(f"no model of {statement!r}")
        names[target] = result
    return names["$0"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unpack, "_asm", run_ptx)
    # A thread's two values, each in both halves of a register: what the real one does by `mov`.
    monkeypatch.setattr(_unpack, "_twice", list)


CASES = [
    (kind, group, compute, False)
    for kind in _codes.CODES
    for group in (None, 128, 32)
    for compute in _codes.COMPUTE_DTYPES
    if group != 32 or kind == "int4"
] + [("int4", group, compute, True) for group in (128, 32) for compute in _codes.COMPUTE_DTYPES]


def _finite_codes(rng: np.random.Generator, kind: str) -> np.ndarray:
    codes = rng.integers(0, 2 ** _codes.CODES[kind].bits, (128, 64), np.uint8)
    if kind.startswith("float8"):
        values = codes.view(np.dtype(kind)).astype(np.float32)
        codes = np.where(np.isfinite(values), codes, np.uint8(0x38))
    return codes


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(("kind", "group", "compute", "zero_point"), CASES)
def test_registers_hold_the_weights(
    kind: str, group: int | None, compute: str, zero_point: bool, rng: np.random.Generator
) -> None:
    """Thread by thread, in the order that ``wgmma`` reads registers, equal to the jnp twin."""
    codes = _finite_codes(rng, kind)
    words = _layout.pack_words(jnp.asarray(codes), _codes.CODES[kind].bits)[0, 0]
    groups = 0 if group is None else 128 // group
    scales, offsets = [], []
    if groups:
        real = np.exp2(rng.uniform(-6, 0, (groups, 64))).astype(np.float32)
        stored, _ = _codes.split_scale(jnp.asarray(real), kind, compute)
        scales = list(stored)
        if zero_point:
            zeros = jnp.asarray(rng.integers(-8, 9, (groups, 64)), jnp.int8)
            offsets = list(_codes.offset_of_zero_point(stored, zeros, kind, compute))
        if compute == "bfloat16":  # the kernel scales the sums of groups instead
            scales = []
    (twin,) = _unpack.unpack(words, scales, offsets, kind=kind, compute=compute, interpret=True)
    expected = np.asarray(twin).view(np.uint16)

    flat = np.asarray(words).view(np.uint32).reshape(-1, 128, 4)  # (load, thread, lane of load)
    for thread in rng.choice(128, 10, replace=False):
        warp, lane = divmod(int(thread), 32)
        rows = [16 * warp + lane // 4, 16 * warp + 8 + lane // 4]

        def twice(parts: list[Any], rows: list[int] = rows) -> list[list[int]]:
            bits = [np.asarray(part).astype(DTYPES[compute]).view(np.uint16) for part in parts]
            return [[int(part[row]) * 0x10001 for row in rows] for part in bits]

        factors = _unpack._factors(twice(scales), twice(offsets), kind, compute)
        mine = [int(word) for word in flat[:, thread].reshape(-1)]
        registers = []
        for index, word in enumerate(mine):
            part = factors[index // (len(mine) // len(factors))]
            registers += _unpack._emit_word(word, part, kind, compute)
        assert len(registers) == 32
        for index, register in enumerate(registers):
            column, half = divmod(index, 2)
            col = 8 * column + 2 * (lane % 4)
            want = expected[rows[half], col : col + 2]
            # +0 and -0 are the same weight.
            got = np.asarray(_halves(register), np.uint16)
            got, want = (np.where(bits == 0x8000, 0, bits) for bits in (got, want))
            np.testing.assert_array_equal(got, want, err_msg=f"{thread=} {index=}")


def test_register_order_is_that_of_the_fragment() -> None:
    """Column tiles outside, the two row halves inside, pairs of columns in one register."""
    from jax.experimental.mosaic import gpu as mgpu

    layout = mgpu.WGMMA_LAYOUT
    assert layout.registers_shape((64, 128)) == (1, 16, 1, 1, 2, 1, 1, 1, 1)
    assert tuple(layout.tiling.tiles) == ((64, 8), (16, 8), (8, 8), (2,))
    assert (layout.warp_dims, layout.lane_dims, layout.vector_dim) == ((-7,), (-3, -2), -1)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("multiple", range(1, 17))
def test_codes_times_a_whole_multiple(multiple: int) -> None:
    """All 16 codes, -8 among them, in every byte: what W4A8 with whole scales multiplies."""
    offset = _unpack._byte_offset(multiple)
    codes = np.arange(16, dtype=np.uint8)
    for first in range(16):
        lower = np.roll(codes, first)[:4]
        for upper in (0x00, 0xF0, 0x50):  # of the other row, to be ignored
            word = int.from_bytes((lower | np.uint8(upper)).tobytes(), "little")
            result = _unpack._times_multiple(word, multiple, offset)
            values = np.frombuffer(result.to_bytes(4, "little"), np.int8)
            np.testing.assert_array_equal(values, (lower.astype(int) - 8) * multiple)
