"""The instructions of the paged decode kernel, executed by a model of PTX, against NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from qjax.pallas_kernels import (
    _paged_finish,
    _paged_merge,
    _paged_queries,
    _paged_sizes,
    _paged_tile,
)
from qjax.pallas_kernels._paged_sizes import Tile
from qjax.pallas_kernels._paged_tile import State
from tests.kernels.ptx_model import THREADS, Model
from tests.tolerances import ATTENTION_BF16, ATTENTION_F16, relative_error

BASE = {"queries": 0, "key_scale": 1 << 16, "value_scale": 3 << 15, "out": 1 << 17, "lse": 1 << 18}
ROWS, ROW = 3, 1
SCALE = 0.003


def codes(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> tuple[Any, np.ndarray]:
    """Stored bytes ``[..., row_bytes]`` and the numbers they stand for ``[..., head_dim]``."""
    if kind in ("bfloat16", "float16"):
        stored = rng.normal(size=shape).astype(np.dtype(kind))
        return stored.view(np.uint8), stored.astype(np.float32)
    if kind == "int4":
        values = rng.integers(-8, 8, shape).astype(np.int8)
        low, high = np.split(values.view(np.uint8) & 15, 2, axis=-1)
        return low | high << 4, values.astype(np.float32)
    if kind == "int8":
        values = rng.integers(-128, 128, shape).astype(np.int8)
        return values.view(np.uint8), values.astype(np.float32)
    values = (rng.normal(size=shape) * 30).astype(np.dtype(kind))
    return values.view(np.uint8), values.astype(np.float32)


def put_tile(tile: Tile, rows: np.ndarray) -> np.ndarray:
    """Rows ``[tokens, row_bytes]`` as TMA writes them with tiling (8, swizzle) and swizzle."""
    size = tile.row_bytes * tile.per_row
    if tile.swizzle is None:
        return rows.reshape(-1)
    swizzle = tile.swizzle
    tiled = rows.reshape(tile.tokens // tile.per_row // 8, 8, size // swizzle, swizzle).transpose(
        0, 2, 1, 3
    )
    flat = np.ascontiguousarray(tiled).reshape(-1, 16)  # chunks of 16 bytes
    at = np.arange(len(flat)) * 16
    # The address bits from 4 are xored with those from 7: three, two or one of them.
    moved = at ^ ((at >> 7 & (swizzle // 16 - 1)) << 4)
    out = np.empty_like(flat)
    out[moved // 16] = flat
    return out.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Case:
    tile: Tile
    start: int
    stop: int
    out: str = "float32"
    head_scale: bool = False


CASES = {
    "e4m3": Case(Tile("float8_e4m3fn", "bfloat16", 128, 4, 64, 3), 0, 150, "bfloat16", True),
    "e4m3_token": Case(Tile("float8_e4m3fn", "float16", 64, 8, 64, 3, True), 70, 130, "float16"),
    "e5m2": Case(Tile("float8_e5m2", "bfloat16", 64, 1, 64, 3), 0, 65, "float32", True),
    "e5m2_token_cap": Case(
        Tile("float8_e5m2", "bfloat16", 128, 2, 64, 2, True, soft_cap=30.0), 0, 100
    ),
    "int8": Case(Tile("int8", "bfloat16", 128, 16, 64, 3), 5, 64),
    "int8_96": Case(Tile("int8", "bfloat16", 96, 3, 64, 3, True), 0, 129, "bfloat16"),
    "int4_256_16": Case(Tile("int4", "bfloat16", 256, 16, 64, 2, True), 0, 100, "bfloat16"),
    "int8_256": Case(Tile("int8", "bfloat16", 256, 2, 64, 2, True), 0, 129, "bfloat16"),
    "int4": Case(Tile("int4", "bfloat16", 128, 4, 128, 2, True), 0, 300, "bfloat16"),
    "int4_64": Case(Tile("int4", "float16", 64, 12, 128, 2), 100, 300, "float32", True),
    "int4_96": Case(Tile("int4", "bfloat16", 96, 4, 64, 4, True), 0, 70),
    "bf16": Case(Tile("bfloat16", "bfloat16", 128, 4, 64, 3), 0, 150, "bfloat16"),
    "bf16_cap": Case(Tile("bfloat16", "bfloat16", 64, 9, 64, 3, soft_cap=5.0), 64, 66),
    "f16_96": Case(Tile("float16", "float16", 96, 1, 64, 2), 0, 1, "float16"),
    "f16_256": Case(Tile("float16", "float16", 256, 6, 64, 2), 0, 77),
    "int4_two_per_row": Case(Tile("int4", "bfloat16", 128, 4, 128, 2, True, 2), 0, 300, "bfloat16"),
    "int4_two_of_64": Case(
        Tile("int4", "bfloat16", 128, 3, 64, 4, False, 2), 10, 100, "float32", True
    ),
    "int4_four_per_row": Case(Tile("int4", "bfloat16", 64, 4, 128, 4, True, 4), 0, 300, "float16"),
    "int4_four_of_64": Case(Tile("int4", "bfloat16", 64, 4, 64, 4, True, 4), 3, 200, "float16"),
    "int8_two_per_row": Case(Tile("int8", "bfloat16", 64, 5, 64, 3, True, 2), 0, 129),
    "e4m3_added": Case(
        Tile("float8_e4m3fn", "bfloat16", 128, 7, 64, 3, logit_bias=True), 0, 150, "float16", True
    ),
    "int8_added_token": Case(
        Tile("int8", "bfloat16", 64, 1, 128, 3, True, logit_bias=True), 5, 140, "float16"
    ),
    "int4_added_cap": Case(
        Tile("int4", "bfloat16", 128, 12, 128, 2, True, 2, soft_cap=30.0, logit_bias=True), 0, 200
    ),
    "empty": Case(Tile("int8", "bfloat16", 128, 4, 64, 2), 0, 0),
}


def run(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Result, expected result, log-sum-exp, expected one."""
    tile = dataclasses.replace(
        case.tile, factor=_paged_sizes.logit_factor(SCALE, case.tile.soft_cap)
    )
    span = -(-max(case.stop, 1) // tile.tokens) * tile.tokens
    dim = tile.head_dim
    # Heads of very different size; all logits of a few units.
    q = rng.normal(size=(ROWS, tile.ratio, dim)) / (SCALE * dim**0.5 * (30 if tile.narrow else 1))
    q = (q * 2 * rng.uniform(0.3, 1, (ROWS, tile.ratio, 1))).astype(np.dtype(tile.query))
    stored, numbers = zip(*(codes(rng, tile.kind, (span, dim)) for _ in range(2)), strict=True)
    scales = np.exp(rng.normal(size=(2, span))).astype(np.float32)
    scales[:, case.stop :] = 0  # never written
    added = rng.normal(size=(tile.ratio, span)).astype(np.float32) * 2000  # times the factor
    key_scale, value_scale = np.array([[0.81], [0.37]], np.float32)

    memory = np.zeros(1 << 19, np.uint8)
    for name, array in (("queries", q), ("key_scale", key_scale), ("value_scale", value_scale)):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory[BASE[name] : BASE[name] + data.size] = data
    stage = 2 * tile.tile_bytes + 8 * tile.tokens + tile.added_bytes
    shared = np.zeros(-(-max(stage, tile.stages * tile.tile_bytes) // 1024) * 1024 + 1024, np.uint8)
    p = Model(shared, memory)

    def address(name: str) -> np.ndarray:
        return np.full(THREADS, BASE[name], np.uint64)

    def scale_of(name: str) -> np.ndarray | None:
        return p.load_global(address(name), out="f") if case.head_scale else None

    row = p.integer(ROW)
    queries, factors = _paged_queries.load_queries(
        p, tile, address("queries"), row, scale_of("key_scale")
    )
    state = State.start(p, tile)
    tiles = range(case.start // tile.tokens, -(-case.stop // tile.tokens))
    for index in tiles:
        rows = slice(index * tile.tokens, (index + 1) * tile.tokens)
        parts = [put_tile(tile, stored[i][rows]) for i in (0, 1)]
        parts += [scales[i, rows].view(np.uint8) for i in (0, 1)]
        if tile.logit_bias:
            term = np.float32(tile.factor) * added[:, rows]
            parts.append(np.ascontiguousarray(term).reshape(-1).view(np.uint8))
        places = np.cumsum([0, *(part.size for part in parts)])
        for place, part in zip(places, parts, strict=False):
            shared[place : place + part.size] = part
        buffers = [p.integer(int(place)) for place in places[: 4 if tile.token_scales else 2]]
        buffers += [p.integer(int(places[4]))] * tile.logit_bias
        bounds = (p.integer(index * tile.tokens), p.integer(case.start), p.integer(case.stop))
        state = _paged_tile.step(p, tile, state, queries, factors, buffers, *bounds)
        state = State.of(tile, state.registers())
    assert p.conflicts == 0, "bank conflicts"
    out_dtype = np.dtype(case.out)
    _paged_finish.finish(
        p,
        tile,
        state,
        scratch=p.integer(0),
        scratch_bytes=tile.stages * tile.tile_bytes,
        merge=p.integer(shared.size - 1024),
        out=address("out"),
        out_bits=out_dtype.itemsize * 8,
        out_dtype="bf16" if case.out == "bfloat16" else "f16",
        row=row,
        value_scale=scale_of("value_scale"),
        lse=address("lse"),
    )
    size = tile.ratio * dim * out_dtype.itemsize
    begin = BASE["out"] + ROW * size
    out = memory[begin : begin + size].view(out_dtype).reshape(tile.ratio, dim)
    assert not memory[begin + size : BASE["lse"]].any(), "written beyond the row"
    begin = BASE["lse"] + ROW * 4 * tile.ratio
    lse = memory[begin : begin + 4 * tile.ratio].view(np.float32)

    seen = slice(case.start, case.stop)
    k, v = (x[seen].astype(np.float64) for x in numbers)
    x = q[ROW].astype(np.float64) @ k.T * SCALE
    if case.head_scale:
        x = x * key_scale
    if tile.token_scales:
        x = x * scales[0, seen]
    if tile.logit_bias:
        x = x + added[:, seen].astype(np.float64) * SCALE
    if tile.soft_cap is not None:
        x = tile.soft_cap * np.tanh(x / tile.soft_cap)
    x = x * np.log2(np.e)
    if case.stop == case.start:
        return out, np.zeros(out.shape), lse, np.full(tile.ratio, -np.inf)
    top = x.max(axis=1, keepdims=True)
    weights = np.exp2(x - top)
    total = weights.sum(axis=1, keepdims=True)
    if tile.token_scales:
        weights = weights * scales[1, seen]
    expected = weights @ v / total * (value_scale if case.head_scale else 1)
    return out, expected, lse, (top + np.log2(total))[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_result_and_log_sum(name: str) -> None:
    case = CASES[name]
    out, expected, lse, expected_lse = run(case, np.random.default_rng(len(name)))
    low = "bfloat16" in (case.out, case.tile.kind)
    assert relative_error(out, expected) < (ATTENTION_BF16 if low else ATTENTION_F16)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("splits", "dim"), [(2, 64), (33, 128), (7, 96), (64, 256), (128, 64)])
def test_merge_of_splits(splits: int, dim: int) -> None:
    rng = np.random.default_rng(splits)
    parts = rng.normal(size=(splits, ROWS, dim)).astype(np.float32)
    logs = (rng.normal(size=(splits, ROWS)) * 9).astype(np.float32)
    logs[::2, 1], parts[::2, 1] = -np.inf, 0  # splits that saw nothing
    logs[:, 2], parts[:, 2] = -np.inf, 0
    memory = np.zeros(1 << 19, np.uint8)
    memory[: parts.nbytes] = parts.reshape(-1).view(np.uint8)
    memory[1 << 18 : (1 << 18) + logs.nbytes] = logs.reshape(-1).view(np.uint8)
    at_parts, at_logs, at_out = (np.full(THREADS, at, np.uint64) for at in (0, 1 << 18, 3 << 17))
    for row in range(ROWS):
        p = Model(np.zeros(16 * dim + 64, np.uint8), memory)
        _paged_merge.merge(
            p,
            at_parts,
            at_logs,
            at_out,
            p.integer(0),
            p.integer(row),
            splits=splits,
            rows=ROWS,
            head_dim=dim,
            dtype="f16",
        )
    out = memory[3 << 17 : (3 << 17) + 2 * ROWS * dim].view(np.float16).reshape(ROWS, dim)
    weights = np.exp2(logs.astype(np.float64) - np.where(logs.max(0) == -np.inf, 0, logs.max(0)))
    weights /= np.maximum(weights.sum(0), 1e-300)
    want = np.einsum("sr,srd->rd", weights, parts.astype(np.float64))
    assert relative_error(out, want) < ATTENTION_F16
    assert not out[2].any()
