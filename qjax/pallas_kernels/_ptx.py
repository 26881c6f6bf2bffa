"""PTX instructions of one thread, written one by one from Python.

``Ptx`` writes each as inline assembly into the kernel that is being built. The tests replace its
one method ``asm`` by a model that executes the same strings on 128 threads at once, so what is
compiled is also run without a GPU. Register values are opaque: ``ir.Value`` here, arrays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

Value = Any
"""A 32-bit integer or float32 register, or a 64-bit address."""

_TYPES = {"r": "i32", "f": "f32", "l": "i64"}
_CONSTRAINTS = {name: letter for letter, name in _TYPES.items()}


def float_bits_of(x: float) -> int:
    """Bits of the nearest float32."""
    return int(np.float32(x).view(np.uint32))


class Ptx:
    """Emits instructions at the current place of the kernel."""

    def asm(self, text: str, out: str, *operands: Value, memory: bool = False) -> list[Value]:
        """One piece of inline PTX.

        Args:
          text: The instructions; ``$0`` ... are the results, then the operands.
          out: One letter per result: ``r`` 32-bit integer, ``f`` float32, ``l`` 64-bit integer.
          operands: Registers.
          memory: Whether memory is read or written, or threads wait for each other: kept in order.

        Returns:
          The results.
        """
        types = [ir.Type.parse(_TYPES[letter]) for letter in out]
        letters = [f"={letter}" for letter in out]
        letters += [_CONSTRAINTS[str(operand.type)] for operand in operands]
        if memory:
            letters.append("~{memory}")
        if not types:
            result_type = ir.Type.parse("!llvm.void")
        elif len(types) == 1:
            result_type = types[0]
        else:
            result_type = ir.Type.parse(f"!llvm.struct<({', '.join(map(str, types))})>")
        result: Any = llvm.inline_asm(
            result_type, list(operands), text, ",".join(letters), has_side_effects=memory
        )
        if len(types) < 2:
            return [result] if types else []
        return [
            llvm.extractvalue(kind, result, ir.DenseI64ArrayAttr.get([i]))
            for i, kind in enumerate(types)
        ]

    def _one(self, text: str, *operands: Value, out: str = "r", memory: bool = False) -> Value:
        return self.asm(text, out, *operands, memory=memory)[0]

    # --- integers ---------------------------------------------------------------------------------

    def thread(self) -> Value:
        """Index of this thread in its block."""
        return self._one("mov.u32 $0, %tid.x;")

    def integer(self, value: int) -> Value:
        return self._one(f"mov.b32 $0, {value & 0xFFFFFFFF:#x};")

    def add(self, x: Value, y: Value | int) -> Value:
        if isinstance(y, int):
            return x if y == 0 else self._one(f"add.s32 $0, $1, {y};", x)
        return self._one("add.s32 $0, $1, $2;", x, y)

    def sub(self, x: Value, y: Value) -> Value:
        return self._one("sub.s32 $0, $1, $2;", x, y)

    def mul(self, x: Value, y: int) -> Value:
        return self._one(f"mul.lo.s32 $0, $1, {y};", x)

    def minimum(self, x: Value, y: int) -> Value:
        return self._one(f"min.u32 $0, $1, {y};", x)

    def maximum(self, x: Value, y: Value | int) -> Value:
        if isinstance(y, int):
            return self._one(f"max.u32 $0, $1, {y};", x)
        return self._one("max.u32 $0, $1, $2;", x, y)

    def shift_left(self, x: Value, n: int) -> Value:
        return self._one(f"shl.b32 $0, $1, {n};", x)

    def shift_right(self, x: Value, n: int) -> Value:
        return self._one(f"shr.u32 $0, $1, {n};", x)

    def bits_and(self, x: Value, mask: int) -> Value:
        return self._one(f"and.b32 $0, $1, {mask:#x};", x)

    def bits_xor(self, x: Value, y: Value | int) -> Value:
        if isinstance(y, int):
            return x if y == 0 else self._one(f"xor.b32 $0, $1, {y:#x};", x)
        return self._one("xor.b32 $0, $1, $2;", x, y)

    def permute(self, x: Value, other: int, selector: int) -> Value:
        """``prmt``: four bytes chosen from those of ``x`` (0 to 3) and of a constant (4 to 7)."""
        return self._one(f"prmt.b32 $0, $1, {other:#x}, {selector:#x};", x)

    def permute_both(self, x: Value, y: Value, selector: int) -> Value:
        """``prmt``: four bytes chosen from those of ``x`` (0 to 3) and of ``y`` (4 to 7)."""
        return self._one(f"prmt.b32 $0, $1, $2, {selector:#x};", x, y)

    def select_below(self, x: Value, limit: Value, yes: Value, no: Value) -> Value:
        """float32 ``yes if x < limit else no``; the integers are compared without sign."""
        text = "{ .reg .pred p; setp.lt.u32 p, $1, $2; selp.f32 $0, $3, $4, p; }"
        return self._one(text, x, limit, yes, no, out="f")

    def choose_below(self, x: Value, limit: Value | int, yes: Value, no: Value) -> Value:
        """Integer ``yes if x < limit else no``; compared without sign."""
        text = "{ .reg .pred p; setp.lt.u32 p, $1, LIMIT; selp.b32 $0, $2, $3, p; }"
        if isinstance(limit, int):
            return self._one(text.replace("LIMIT", f"{limit:#x}"), x, yes, no)
        return self._one(text.replace("LIMIT", "$4"), x, yes, no, limit)

    def max_signed(self, x: Value, y: Value) -> Value:
        return self._one("max.s32 $0, $1, $2;", x, y)

    # --- floats -----------------------------------------------------------------------------------

    def number(self, bits: int) -> Value:
        """The float32 with these bits."""
        return self._one(f"mov.b32 $0, {bits:#010x};", out="f")

    def float_bits(self, x: Value) -> Value:
        return self._one("mov.b32 $0, $1;", x)

    def bits_float(self, x: Value) -> Value:
        return self._one("mov.b32 $0, $1;", x, out="f")

    def fadd(self, x: Value, y: Value) -> Value:
        return self._one("add.f32 $0, $1, $2;", x, y, out="f")

    def fsub(self, x: Value, y: Value) -> Value:
        return self._one("sub.f32 $0, $1, $2;", x, y, out="f")

    def fmul(self, x: Value, y: Value) -> Value:
        return self._one("mul.f32 $0, $1, $2;", x, y, out="f")

    def divide(self, x: Value, y: Value) -> Value:
        """Rounded to the nearest."""
        return self._one("div.rn.f32 $0, $1, $2;", x, y, out="f")

    def clamp(self, x: Value, limit: float, lowest: float | None = None) -> Value:
        """``x`` between ``lowest`` (``-limit`` by default) and ``limit``."""
        lowest = -limit if lowest is None else lowest
        low, high = self.number(float_bits_of(lowest)), self.number(float_bits_of(limit))
        return self._one("min.f32 $0, $1, $2;", self.fmax(x, low), high, out="f")

    def round(self, x: Value) -> Value:
        return self._one("cvt.rni.f32.f32 $0, $1;", x, out="f")

    def to_float(self, x: Value) -> Value:
        return self._one("cvt.rn.f32.s32 $0, $1;", x, out="f")

    def to_integer(self, x: Value) -> Value:
        """The nearest integer, ties to even."""
        return self._one("cvt.rni.s32.f32 $0, $1;", x)

    def to_f8(self, low: Value, high: Value, kind: str) -> Value:
        """Two float32 as ``"e4m3"`` or ``"e5m2"``, saturating, in the low half of a register."""
        text = f"{{ .reg .b16 h; cvt.rn.satfinite.{kind}x2.f32 h, $2, $1; cvt.u32.u16 $0, h; }}"
        return self._one(text, low, high)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return self._one("fma.rn.f32 $0, $1, $2, $3;", x, y, z, out="f")

    def fmax(self, x: Value, y: Value) -> Value:
        return self._one("max.f32 $0, $1, $2;", x, y, out="f")

    def exp2(self, x: Value) -> Value:
        return self._one("ex2.approx.ftz.f32 $0, $1;", x, out="f")

    def log2(self, x: Value) -> Value:
        return self._one("lg2.approx.ftz.f32 $0, $1;", x, out="f")

    def reciprocal(self, x: Value) -> Value:
        return self._one("rcp.approx.ftz.f32 $0, $1;", x, out="f")

    def reciprocal_or_zero(self, x: Value) -> Value:
        """``1 / x``, and 0 for 0."""
        text = (
            "{ .reg .pred p; .reg .f32 y; rcp.approx.ftz.f32 y, $1; setp.gt.f32 p, $1, 0f00000000; "
            "selp.f32 $0, y, 0f00000000, p; }"
        )
        return self._one(text, x, out="f")

    def pack(self, low: Value, high: Value, dtype: str) -> Value:
        """Two float32 rounded to 16 bits in one register."""
        return self._one(f"cvt.rn.{dtype}x2.f32 $0, $2, $1;", low, high)

    def add_halves(self, x: Value, constant: int) -> Value:
        """Adds the same float16, given by its bits, to both halves of a register."""
        text = f"{{ .reg .b32 c; mov.b32 c, {constant * 0x10001:#x}; add.f16x2 $0, $1, c; }}"
        return self._one(text, x)

    def fma_halves(self, x: Value, factor: int, constant: int) -> Value:
        text = (
            f"{{ .reg .b32 a, c; mov.b32 a, {factor * 0x10001:#x}; "
            f"mov.b32 c, {constant * 0x10001:#x}; fma.rn.f16x2 $0, $1, a, c; }}"
        )
        return self._one(text, x)

    def f16_to_floats(self, x: Value) -> list[Value]:
        """The two float16 of a register as float32."""
        text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        return self.asm(text, "ff", x)

    def e4m3_to_f16(self, x: Value, half: int) -> Value:
        """The two fp8_e4m3 in half of a register as float16."""
        text = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, H; }"
        return self._one(text.replace("H", "lh"[half]), x)

    # --- across threads ---------------------------------------------------------------------------

    def shuffle_xor(self, x: Value, mask: int, *, out: str = "f") -> Value:
        """The value of the lane whose number differs in the bits of ``mask``."""
        text = f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;"
        return self._one(text, x, out=out)

    def shuffle_from(self, x: Value, lane: Value, *, out: str = "r") -> Value:
        """The value of another lane."""
        return self._one("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", x, lane, out=out)

    def transpose(self, x: Value) -> Value:
        """Transposes an 8 x 8 matrix of 16-bit values: ``movmatrix``."""
        return self._one("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", x)

    def mma(
        self, acc: Sequence[Value], a: Sequence[Value], b: Sequence[Value], dtype: str
    ) -> list[Value]:
        """``acc + a @ b`` of 16 x 16 and 16 x 8: ``mma.m16n8k16`` with float32 accumulation."""
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return self.asm(text, "ffff", *a, *b, *acc)

    def barrier(self) -> None:
        """Waits for all threads of the block."""
        self.asm("bar.sync 0;", "", memory=True)

    # --- memory -----------------------------------------------------------------------------------

    def load_matrices(self, address: Value, offset: int, *, transposed: bool) -> list[Value]:
        """Four 8 x 8 matrices of 16-bit values; lane ``8 i + j`` has the address of row j of i."""
        trans = ".trans" if transposed else ""
        text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"
        return self.asm(text, "rrrr", address, memory=True)

    def load_shared(self, address: Value, offset: int = 0) -> Value:
        return self._one(f"ld.shared.f32 $0, [$1+{offset}];", address, out="f", memory=True)

    def load_shared4(self, address: Value, offset: int = 0) -> list[Value]:
        text = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];"
        return self.asm(text, "ffff", address, memory=True)

    def store_shared4(self, address: Value, values: Sequence[Value], offset: int = 0) -> None:
        text = f"st.shared.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};"
        self.asm(text, "", address, *values, memory=True)

    def store_shared(self, address: Value, value: Value, offset: int = 0) -> None:
        self.asm(f"st.shared.f32 [$0+{offset}], $1;", "", address, value, memory=True)

    def address(self, base: Value, index: Value, size: int) -> Value:
        """``base + index * size``, 64 bits."""
        return self._one(f"mad.wide.u32 $0, $1, {size}, $2;", index, base, out="l")

    def offset(self, address: Value, count: int) -> Value:
        return address if count == 0 else self._one(f"add.s64 $0, $1, {count};", address, out="l")

    def load_global(self, address: Value, offset: int = 0, *, out: str = "r") -> Value:
        """A 32-bit value that nothing writes while the kernel runs."""
        return self._one(f"ld.global.nc.b32 $0, [$1+{offset}];", address, out=out, memory=True)

    def load_global_now(self, address: Value) -> Value:
        """A 32-bit integer that this kernel may write."""
        return self._one("ld.global.b32 $0, [$1];", address, memory=True)

    def load_global2(self, address: Value, offset: int = 0) -> list[Value]:
        """Two neighbouring ones."""
        text = f"ld.global.nc.v2.b32 {{$0, $1}}, [$2+{offset}];"
        return self.asm(text, "rr", address, memory=True)

    def load_floats(self, address: Value, count: int, offset: int = 0) -> list[Value]:
        """Neighbouring float32, two or a multiple of four, that nothing writes meanwhile."""
        result = []
        for begin in range(0, count, 4):
            n = min(count - begin, 4)
            registers = ", ".join(f"${i}" for i in range(n))
            text = f"ld.global.nc.v{n}.b32 {{{registers}}}, [${n}+{offset + 4 * begin}];"
            result += self.asm(text, "f" * n, address, memory=True)
        return result

    def store_global(
        self, address: Value, value: Value, bits: int, x: Value, limit: Value | int
    ) -> None:
        """Stores the low bits of a register where ``x < limit``, compared without sign."""
        text = f"{{ .reg .pred p; setp.lt.u32 p, $2, LIMIT; @p st.global.b{bits} [$0], $1; }}"
        if isinstance(limit, int):
            self.asm(text.replace("LIMIT", str(limit)), "", address, value, x, memory=True)
        else:
            self.asm(text.replace("LIMIT", "$3"), "", address, value, x, limit, memory=True)


def shared_address(ref: Any) -> Value:
    """Address of a buffer in shared memory, 32 bits."""
    pointer = mgpu.utils.memref_ptr(ref)
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)


def global_address(ref: Any) -> Value:
    """Address of a buffer in global memory, 64 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))
