"""From packed words to the register operand of ``wgmma``: inline PTX, and its twin in jnp.

Both compute what ``_codes`` describes: ``code_bits * multiplier + offset`` with one rounding, where
the multiplier is a group's scale in float16 and a constant in bfloat16. The twin
is what the Pallas interpreter runs, which has neither inline assembly nor ``wgmma`` with an operand
in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from qjax.pallas_kernels import _codes, _layout
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

# Which two of a word's four bytes go into the two halves of a register (operand of `prmt`, whose
# second source is zero): into the lower byte of each half, or into the upper one.
_LOW_BYTES = ("0x4140", "0x4342")
_HIGH_BYTES = ("0x1404", "0x3424")


def unpack(
    words: Array,
    scales: Sequence[Array],
    offsets: Sequence[Array],
    *,
    kind: str,
    compute: str,
    parts: int = 1,
    interpret: bool,
) -> list[Array]:
    """Weights of one tile, ready for ``wgmma``.

    Args:
      words: int32 ``(bits, 256)``, or the half ``(bits / 2, 256)`` of a tile, loaded with
        ``words_layout``.
      scales: Stored scales of their groups to multiply by, each ``(64,)``; empty for a
        constant multiplier. float16 only.
      offsets: What to add for zero points, one per group in ``_codes.stored_dtype(compute)``; empty
        without zero points.
      kind: A key of ``_codes.CODES``.
      compute: ``"float16"`` or ``"bfloat16"``.
      parts: Into how many arrays they are cut along the contraction.
      interpret: Use jnp instead of PTX.

    Returns:
      ``parts`` arrays ``(64, 128 / parts)``, or half as wide, in the compute type; output features
      in rows.
    """
    if interpret:
        return jnp.split(_unpack_jnp(words, scales, offsets, kind, compute), parts, axis=1)
    return _unpack_ptx(words, scales, offsets, kind, compute, parts)


def unpack_int8(words: Array, multiples: Sequence[Array] = (), *, interpret: bool) -> Array:
    """int4 codes as int8 numbers, times 16 or times whole multiples: what W4A8 multiplies.

    A word holds, for the 16 columns of its step, two rows of four codes. The codes of either row
    become four bytes, byte ``2 e + c`` that of column ``8 c + 2 q + e`` for the lanes whose number
    is ``q`` modulo 4; ``wgmma`` reads them as columns ``4 q`` to ``4 q + 3``. So the contraction is
    put in another order within each 16 before it is packed: ``_layout.int8_order``.

    Times 16 takes three instructions for eight codes, times a multiple seven: one multiplication
    and addition serves four codes at once, as their bytes, moved up by 128, stay positive.

    Args:
      words: int32 ``(4, 256)``, loaded with ``words_layout``.
      multiples: Of each group of the tile one per row, bfloat16 ``(64,)``, whole and from 1 to 16;
        empty for 16.
      interpret: Use jnp instead of PTX.

    Returns:
      int8 ``(64, 128)``; output features in rows.
    """
    shape = (_layout.BLOCK_N, _layout.BLOCK_K)
    if interpret:
        codes = _layout.unpack_words(words[None, None], 4).T  # (64, 128)
        codes = codes.reshape(shape[0], -1, 2, 4, 2).transpose(0, 1, 3, 4, 2).reshape(shape)
        factor = jnp.int16(16)
        if multiples:
            each = jnp.stack(multiples, axis=1).astype(jnp.int16)  # (64, groups)
            factor = jnp.repeat(each, shape[1] // each.shape[1], axis=1)
        return ((codes.astype(jnp.int16) - 8) * factor).astype(jnp.int8)

    @plgpu.inline_mgpu(
        arg_types=(words_layout(4), *(plgpu.Layout.WGMMA.reduce(1) for _ in multiples)),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def emit(_: Any, packed: Any, *rows: Any) -> Any:
        quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape(shape), dtype=object)
        flat = [_element(vec, i) for vec in packed.registers.flat for i in range(4)]
        if rows:
            factors = [_byte_factors(row) for row in rows]
            per_group = len(flat) // len(factors)
            halves = [
                _times_multiple(source, *factors[index // per_group][half])
                for index, word in enumerate(flat)
                for half, source in enumerate((word, _asm("shr.b32 $0, $1, 4;", word)))
            ]
        else:
            # The code's bias of 8 is the sign bit of the byte. Both row halves of a word in turn.
            text = "{ .reg .b32 m; and.b32 m, $1, 0xF0F0F0F0; xor.b32 $0, m, 0x80808080; }"
            halves = [
                _asm(text, source)
                for word in flat
                for source in (_asm("shl.b32 $0, $1, 4;", word), word)
            ]
        for index, register in zip(np.ndindex(registers.shape), halves, strict=True):
            registers[index] = mgpu.utils.bitcast(register, quad)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True
        )

    return emit(words, *multiples)


def _byte_factors(rows: Any) -> list[tuple[Any, Any]]:
    """Per row half: the multiple ``m``, and ``128 - 8 m`` in every byte."""
    i16 = ir.IntegerType.get_signless(16)
    factors = []
    for register in rows.registers.flat:
        stored = mgpu.utils.bitcast(register, i16)
        # bfloat16 is the upper half of a float32.
        text = (
            "{ .reg .b16 z; .reg .f32 w; mov.b16 z, 0; mov.b32 w, {z, $1}; cvt.rni.s32.f32 $0, w; }"
        )
        multiple = _asm(text, stored, constraints="=r,h")
        factors.append((multiple, _byte_offset(multiple)))
    assert len(factors) == 2, len(factors)
    return factors


def _byte_offset(multiple: Any) -> Any:
    text = "{ .reg .s32 d; mad.lo.s32 d, $1, -8, 128; mul.lo.s32 $0, d, 0x01010101; }"
    return _asm(text, multiple)


def _times_multiple(word: Any, multiple: Any, offset: Any) -> Any:
    """Four codes in the lower halves of bytes, times a multiple, as int8."""
    text = (
        "{ .reg .b32 c; and.b32 c, $1, 0x0F0F0F0F; mad.lo.s32 c, c, $2, $3; "
        "xor.b32 $0, c, 0x80808080; }"
    )
    return _asm(text, word, multiple, offset)


def words_layout(rows: int) -> Any:
    """Register layout of ``(rows, 256)`` packed words: four consecutive words per load."""
    return plgpu.Layout.WG_STRIDED((rows, 256), vec_size=4)


def _unpack_jnp(
    words: Array, scales: Sequence[Array], offsets: Sequence[Array], kind: str, compute: str
) -> Array:
    codes = _codes.CODES[kind]
    width = _layout.BLOCK_K * words.shape[0] // codes.bits
    tile = jnp.pad(words, ((0, codes.bits - words.shape[0]), (0, 0)))
    bits = _layout.unpack_words(tile[None, None], codes.bits).T[:, :width]
    values = _codes.from_unsigned(bits, kind).astype(jnp.float32)
    dtype = jnp.dtype(compute)

    def spread(parts: Sequence[Array]) -> Array:
        repeats = width // len(parts)
        return jnp.repeat(jnp.stack(parts, axis=1).astype(jnp.float32), repeats, axis=1)

    if not scales:
        _, rest = _codes.constant_multiplier(kind, compute)
        if offsets:
            return ((values + codes.bias) * 2.0**rest + spread(offsets)).astype(dtype)
        return (values * 2.0**rest).astype(dtype)
    scale = spread(scales)
    scale = _codes.times_power_of_two(scale, jnp.full_like(scale, codes.unit[compute], jnp.int32))
    if offsets:
        return ((values + codes.bias) * scale + spread(offsets)).astype(dtype)
    return (values * scale).astype(dtype)


def _unpack_ptx(
    words: Array,
    scales: Sequence[Array],
    offsets: Sequence[Array],
    kind: str,
    compute: str,
    parts: int,
) -> list[Array]:
    width = _layout.BLOCK_K * words.shape[0] // _codes.CODES[kind].bits
    shape = (_layout.BLOCK_N, width // parts)
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    part_type = plgpu.ShapeDtypeStruct(shape, jnp.dtype(compute), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(words_layout(words.shape[0]), *(row_layout for _ in (*scales, *offsets))),
        return_type=[part_type] * parts,
    )
    def emit(_: Any, packed: Any, *rows: Any) -> list[Any]:
        element = ir.F16Type.get() if compute == "float16" else ir.BF16Type.get()
        pair = ir.VectorType.get((2,), element)
        flat = [_element(vec, i) for vec in packed.registers.flat for i in range(4)]
        factors = _factors(rows[: len(scales)], rows[len(scales) :], kind, compute)
        words_per_group = len(flat) // len(factors)
        out = []
        for index, word in enumerate(flat):
            out += _emit_word(word, factors[index // words_per_group], kind, compute)
        arrays = []
        for part in np.split(np.asarray(out, dtype=object), parts):
            registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
            for index, register in zip(np.ndindex(registers.shape), part, strict=True):
                registers[index] = mgpu.utils.bitcast(register, pair)
            arrays.append(
                mgpu.FragmentedArray(
                    _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
                )
            )
        return arrays

    return emit(words, *scales, *offsets)


def _element(vec: Any, i: int) -> Any:
    position = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(vec, dynamic_position=[], static_position=position)


def _asm(text: str, *operands: Any, constraints: str | None = None) -> Any:
    """One 32-bit result of inline PTX; ``$0`` is the result and ``$1``... the operands."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] + ["r"] * len(operands)) if constraints is None else constraints
    return llvm.inline_asm(i32, list(operands), text, constraints)


def _constant(bits: int) -> Any:
    return _asm(f"mov.b32 $0, 0x{bits:08X};")


def _factors(scales: Sequence[Any], offsets: Sequence[Any], kind: str, compute: str) -> list[Any]:
    """Per group and row half: registers ``(multiplier, addend)``, both halves of each equal."""
    codes = _codes.CODES[kind]
    # The two row halves of a thread lie in different nibbles; the odd one is worth 16 times more.
    nibble = (1.0, 2.0**-4) if codes.bits == 4 else (1.0, 1.0)
    if not scales:
        exponent, rest = _codes.constant_multiplier(kind, compute)
        if exponent == 0:
            return [[(None, None)] * 2]
        multipliers = [
            _constant(_codes.half_bits(2.0**exponent * factor, compute)) for factor in nibble
        ]
        if offsets:
            return [list(zip(multipliers, _twice(offset), strict=True)) for offset in offsets]
        addend = _constant(_codes.half_bits(-codes.bias * 2.0**rest, compute))
        return [[(multiplier, addend) for multiplier in multipliers]]
    groups = []
    for g, scale in enumerate(scales):
        halves = []
        for half, stored in enumerate(_twice(scale)):
            if offsets:
                addend = _twice(offsets[g])[half]
            elif codes.bias:
                # -bias as a subnormal (-bias * 2**unit), times the stored scale.
                bias = 0x8000 | codes.bias
                addend = _multiply(stored, bias << 16 | bias, compute)
            else:
                addend = None
            factor = nibble[half]
            multiplier = (
                stored
                if factor == 1
                else _multiply(stored, _codes.half_bits(factor, compute), compute)
            )
            halves.append((multiplier, addend))
        groups.append(halves)
    return groups


def _twice(rows: Any) -> list[Any]:
    """The values of a thread's two rows, each in both halves of a register.

    float32 values become bfloat16, in which they are exact.
    """
    i16 = ir.IntegerType.get_signless(16)
    registers = list(rows.registers.flat)
    assert len(registers) == 2, len(registers)
    if isinstance(rows.mlir_dtype, ir.F32Type):
        text = "cvt.rn.bf16x2.f32 $0, $1, $1;"
        return [_asm(text, register, constraints="=r,f") for register in registers]
    return [
        _asm("mov.b32 $0, {$1, $1};", mgpu.utils.bitcast(register, i16), constraints="=r,h")
        for register in registers
    ]


def _multiply(value: Any, constant: int, compute: str) -> Any:
    text = f"{{ .reg .b32 c; mov.b32 c, 0x{constant:08X}; mul.{_suffix(compute)} $0, $1, c; }}"
    return _asm(text, value)


def _suffix(compute: str) -> str:
    return "f16x2" if compute == "float16" else "bf16x2"


def _emit_word(word: Any, factors: Sequence[Any], kind: str, compute: str) -> list[Any]:
    """Registers of one word, in the order (column tile, row half)."""
    fma = f"fma.rn.{_suffix(compute)} $0, m, $2, $3; }}"
    if kind == "int4":
        shifted = _asm("shr.b32 $0, $1, 8;", word)
        masks = ("0x000F000F", "0x00F000F0")
        return [
            _asm(f"{{ .reg .b32 m; and.b32 m, $1, {masks[half]}; {fma}", source, *factors[half])
            for source in (word, shifted)
            for half in (0, 1)
        ]
    if kind == "int8":
        return [
            _asm(f"{{ .reg .b32 m; prmt.b32 m, $1, 0, {_LOW_BYTES[half]}; {fma}", word, *pair)
            for half, pair in enumerate(factors)
        ]
    emit = _emit_fp8_as_f16 if compute == "float16" else _emit_fp8_as_bf16
    return [emit(word, half, multiplier, kind) for half, (multiplier, _) in enumerate(factors)]


def _emit_fp8_as_f16(word: Any, half: int, multiplier: Any, kind: str) -> Any:
    if kind == "float8_e4m3fn":
        source = "lh"[half]
        convert = f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.rn.f16x2.e4m3x2 $0, {source}; }}"
    else:
        convert = f"prmt.b32 $0, $1, 0, {_HIGH_BYTES[half]};"
    value = _asm(convert, word)
    return value if multiplier is None else _asm("mul.f16x2 $0, $1, $2;", value, multiplier)


def _emit_fp8_as_bf16(word: Any, half: int, multiplier: Any, kind: str) -> Any:
    # The sign stays; exponent and mantissa move right to where bfloat16 has them, three exponent
    # bits (E5M2) or four (E4M3) further. The multiplier corrects the exponent's bias.
    shift = 4 if kind == "float8_e4m3fn" else 3
    return _asm(
        f"{{ .reg .b32 m, s; prmt.b32 m, $1, 0, {_HIGH_BYTES[half]}; and.b32 s, m, 0x80008000; "
        f"and.b32 m, m, 0x7F007F00; shr.b32 m, m, {shift}; or.b32 m, m, s; "
        "mul.bf16x2 $0, m, $2; }",
        word,
        multiplier,
    )
