"""A model of the PTX that ``qjax.pallas_kernels._ptx`` writes: runs it on 128 threads at once.

It executes the very strings that are compiled, with memory as bytes. Written from the PTX ISA
reference; threads run in step, so it says nothing about missing barriers.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from qjax.pallas_kernels._ptx import Ptx

THREADS = 128
LANE = np.arange(THREADS) % 32
WARP = np.arange(THREADS) // 32
DTYPES: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


def halves(x: np.ndarray) -> np.ndarray:
    """uint32 ``[...]`` as uint16 ``[..., 2]``, the low half first."""
    return np.ascontiguousarray(x, np.uint32)[..., None].view(np.uint16)


def numbers(x: np.ndarray, dtype: str) -> np.ndarray:
    """Registers of pairs as float32 ``[..., 2]``."""
    return halves(x).view(DTYPES[dtype]).astype(np.float32)


def register(values: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of ``numbers``, rounding."""
    values = np.ascontiguousarray(np.asarray(values).astype(DTYPES[dtype]))
    return values.view(np.uint32)[..., 0]


class Model(Ptx):
    """Threads with shared memory and one array of global memory."""

    def __init__(self, shared: np.ndarray, memory: np.ndarray) -> None:
        self.shared, self.memory = shared, memory
        self.count: dict[str, int] = {}
        self.conflicts = 0

    def asm(self, text: str, out: str, *operands: Any, memory: bool = False) -> list[Any]:
        registers: dict[str, np.ndarray] = {}
        for i, operand in enumerate(operands):
            registers[f"${len(out) + i}"] = operand
        self.where = np.ones(THREADS, bool)
        for statement in filter(None, (s.strip() for s in re.split(r";|^\{|\}$", text.strip()))):
            if not statement.startswith(".reg"):
                self._statement(statement, registers)
        result = []
        for i, letter in enumerate(out):
            value = registers[f"${i}"]
            if letter == "f":
                value = value if value.dtype == np.float32 else value.view(np.float32)
            elif letter == "r":
                value = value if value.dtype == np.uint32 else value.view(np.uint32)
            assert value.shape == (THREADS,), text
            result.append(value)
        return result

    def _statement(self, statement: str, registers: dict[str, np.ndarray]) -> None:
        predicate = re.match(r"@(\w+) ", statement)
        if predicate:
            self.where = registers[predicate[1]]
            statement = statement[predicate.end() :]
        op, _, rest = statement.partition(" ")
        self.count[op.split(".")[0]] = self.count.get(op.split(".")[0], 0) + 1
        arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        getattr(self, "_" + op.split(".")[0])(op, arguments, registers)
        self.where = np.ones(THREADS, bool)

    @staticmethod
    def _value(name: str, registers: dict[str, np.ndarray], dtype: Any) -> np.ndarray:
        if name in registers:
            value = registers[name]
            return value if value.dtype == dtype else value.view(dtype)
        if name == "%tid.x":
            return np.arange(THREADS, dtype=np.uint32)
        if name.startswith("0f"):
            bits = np.uint32(int(name[2:], 16))
        else:
            bits = np.uint32(int(name, 0) & 0xFFFFFFFF)
        return np.full(THREADS, bits).view(dtype)

    def _get(self, names: list[str], registers: dict[str, np.ndarray], dtype: Any) -> list[Any]:
        return [self._value(name, registers, dtype) for name in names]

    # --- integers and moves -----------------------------------------------------------------------

    def _mov(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        if names[0].startswith("{"):
            both = halves(self._value(names[1], registers, np.uint32))
            for i, name in enumerate(names[0].strip("{}").split(", ")):
                registers[name] = both[:, i]
            return
        registers[names[0]] = self._value(names[1], registers, np.uint32)

    def _integer(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        base, kind = op.split(".")[0], op.split(".")[-1]
        dtype = {"f32": np.float32, "s64": np.uint64}.get(kind, np.uint32)
        if op == "max.s32":
            dtype = np.int32
        if kind == "s64":
            registers[names[0]] = registers[names[1]] + np.uint64(int(names[2]))
            return
        given = self._get(names[1:], registers, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            if kind == "f16x2":
                pairs = [numbers(x, "f16").astype(np.float64) for x in given]
                exact = pairs[0] + pairs[1] if base == "add" else pairs[0] * pairs[1] + pairs[2]
                registers[names[0]] = register(exact, "f16")
                return
            registers[names[0]] = {
                "add": lambda x, y: x + y,
                "sub": lambda x, y: x - y,
                "mul": lambda x, y: x * y,
                "shl": lambda x, y: x << y,
                "shr": lambda x, y: x >> y,
                "and": lambda x, y: x & y,
                "xor": lambda x, y: x ^ y,
                "min": np.fmin if kind == "f32" else np.minimum,
                "div": lambda x, y: (x.astype(np.float64) / y).astype(np.float32),
                "max": np.fmax if kind == "f32" else np.maximum,
                "fma": lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32),
            }[base](*given)

    _add = _sub = _mul = _shl = _shr = _and = _xor = _min = _max = _fma = _div = _integer

    def _mad(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        assert op == "mad.wide.u32"
        index, size = self._get(names[1:3], registers, np.uint32)
        registers[names[0]] = index.astype(np.uint64) * size + registers[names[3]]

    def _prmt(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        first, second, selector = self._get(names[1:], registers, np.uint32)
        pool = np.stack([first, second], axis=1).view(np.uint8)
        chosen = [selector[0] >> (4 * i) & 0xF for i in range(4)]
        assert max(chosen) < 8
        registers[names[0]] = np.ascontiguousarray(pool[:, chosen]).view(np.uint32)[:, 0]

    def _setp(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        dtype = np.float32 if op.endswith("f32") else np.uint32
        x, y = self._get(names[1:], registers, dtype)
        registers[names[0]] = x < y if ".lt." in op else x > y

    def _selp(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        dtype = np.float32 if op.endswith("f32") else np.uint32
        yes, no = self._get(names[1:3], registers, dtype)
        registers[names[0]] = np.where(registers[names[3]], yes, no)

    # --- floats -----------------------------------------------------------------------------------

    def _function(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        x = self._value(names[1], registers, np.float32).astype(np.float64)
        with np.errstate(all="ignore"):
            y = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal}[op.split(".")[0]](x)
            registers[names[0]] = y.astype(np.float32)

    _ex2 = _lg2 = _rcp = _function

    def _cvt(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        if op == "cvt.rn.f16x2.e4m3x2":
            codes = np.ascontiguousarray(registers[names[1]])[:, None].view(np.uint8)
            registers[names[0]] = register(codes.view(ml_dtypes.float8_e4m3fn).astype("f4"), "f16")
            return
        if op == "cvt.f32.f16":
            half = np.ascontiguousarray(registers[names[1]])
            registers[names[0]] = half.view(np.float16).astype(np.float32)
            return
        if op == "cvt.u32.u16":
            registers[names[0]] = registers[names[1]].astype(np.uint32)
            return
        if op == "cvt.rni.f32.f32":
            registers[names[0]] = np.rint(self._value(names[1], registers, np.float32))
            return
        if op == "cvt.rn.f32.s32":
            whole = self._value(names[1], registers, np.int32)
            registers[names[0]] = whole.astype(np.float32)
            return
        if op == "cvt.rni.s32.f32":
            x = self._value(names[1], registers, np.float32)
            registers[names[0]] = np.rint(x).astype(np.int32).view(np.uint32)
            return
        high, low = self._get(names[1:], registers, np.float32)
        if ".satfinite." in op:
            kind, top = {"e4": ("float8_e4m3fn", 448), "e5": ("float8_e5m2", 57344)}[op[17:19]]
            both = np.clip(np.stack([low, high], axis=1), -top, top).astype(np.dtype(kind))
            registers[names[0]] = np.ascontiguousarray(both).view(np.uint16)[:, 0]
            return
        dtype = op.removeprefix("cvt.rn.").removesuffix("x2.f32")
        registers[names[0]] = register(np.stack([low, high], axis=1), dtype)

    # --- across threads ---------------------------------------------------------------------------

    def _shfl(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        x = self._value(names[1], registers, np.uint32)
        lane = self._value(names[2], registers, np.uint32).astype(np.int64)
        registers[names[0]] = x[WARP * 32 + (LANE ^ lane if ".bfly." in op else lane)]

    def _movmatrix(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        matrix = halves(self._value(names[1], registers, np.uint32)).reshape(4, 8, 8)
        turned = np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(THREADS, 2)
        registers[names[0]] = turned.view(np.uint32)[:, 0]

    def _mma(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        dtype = op.split(".")[-2]
        d, a, b, c = ([n.strip() for n in group.strip("{}").split(",")] for group in names)
        left = np.zeros((4, 16, 16), np.float32)
        right = np.zeros((4, 16, 8), np.float32)
        acc = np.zeros((4, 16, 8), np.float32)
        group, pair = LANE // 4, LANE % 4
        for i, name in enumerate(a):
            values = numbers(self._value(name, registers, np.uint32), dtype)
            for e in (0, 1):
                left[WARP, group + 8 * (i % 2), 2 * pair + e + 8 * (i // 2)] = values[:, e]
        for i, name in enumerate(b):
            values = numbers(self._value(name, registers, np.uint32), dtype)
            for e in (0, 1):
                right[WARP, 2 * pair + e + 8 * i, group] = values[:, e]
        for i, name in enumerate(c):
            values = self._value(name, registers, np.float32)
            acc[WARP, group + 8 * (i // 2), 2 * pair + i % 2] = values
        acc = acc + left @ right
        for i, name in enumerate(d):
            registers[name] = acc[WARP, group + 8 * (i // 2), 2 * pair + i % 2]

    def _bar(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        assert op == "bar.sync" and names == ["0"]

    # --- memory -----------------------------------------------------------------------------------

    @staticmethod
    def _place(name: str, registers: dict[str, np.ndarray]) -> np.ndarray:
        base, _, offset = name.strip("[]").partition("+")
        return registers[base].astype(np.int64) + int(offset or 0)

    @staticmethod
    def _words(memory: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
        assert not (at % (4 * count)).any(), "misaligned"
        got = memory[at[:, None] + np.arange(4 * count)]
        return np.ascontiguousarray(got).view(np.uint32)

    def _ldmatrix(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        at = self._place(names[1], registers).reshape(4, 4, 8)  # warp, matrix, row
        assert not (at % 16).any(), "misaligned"
        for rows in at.reshape(-1, 8):
            self.conflicts += len(set(rows // 16 % 8)) != 8
        rows = self.shared[at[..., None] + np.arange(16)]
        units = np.ascontiguousarray(rows).view(np.uint16)  # [4, 4, 8, 8]
        if ".trans" in op:
            units = np.ascontiguousarray(units.swapaxes(2, 3))
        words = units.reshape(4, 4, 32, 2).view(np.uint32)[..., 0]
        for i, name in enumerate(names[0].strip("{}").split(", ")):
            registers[name] = words[:, i].reshape(THREADS)

    def _ld(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        memory = self.shared if ".shared" in op else self.memory
        targets = names[0].strip("{}").split(", ")
        words = self._words(memory, self._place(names[1], registers), len(targets))
        for i, name in enumerate(targets):
            registers[name] = words[:, i]

    def _st(self, op: str, names: list[str], registers: dict[str, np.ndarray]) -> None:
        memory = self.shared if ".shared" in op else self.memory
        at = self._place(names[0], registers)
        size = 2 if op.endswith("b16") else 4
        for i, name in enumerate(names[1].strip("{}").split(", ")):
            value = registers[name]
            data = np.ascontiguousarray(value)[:, None].view(np.uint8)[:, :size]
            for thread in np.flatnonzero(self.where):
                place = at[thread] + size * i
                memory[place : place + size] = data[thread]
