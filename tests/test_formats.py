"""QuantFormat: presets, free composition, refusals."""

from __future__ import annotations

import pytest

import qjax
from qjax.formats import FORMATS, QuantFormat, parse_format


@pytest.mark.parametrize(
    ("qtype", "bits", "bound"),
    [
        ("int2", 2, 1),
        ("int3", 3, 3),
        ("int4", 4, 7),
        ("int8", 8, 127),
        ("float8_e4m3fn", 8, 448),
        ("float8_e5m2", 8, 57344),
        ("float4_e2m1fn", 4, 6),
    ],
)
def test_bits_and_bounds(qtype: str, bits: int, bound: float) -> None:
    fmt = QuantFormat(qtype)
    assert (fmt.bits, fmt.bound, fmt.qmax, fmt.qmin) == (bits, bound, bound, -bound)


def test_asymmetric_uses_every_code() -> None:
    assert (qjax.INT4_G128_ASYM.qmin, qjax.INT4_G128_ASYM.qmax) == (-8, 7)


def test_names_are_unique_and_parse() -> None:
    formats = [fmt for name, fmt in FORMATS.items() if fmt is not None and name != "int4_g128"]
    assert len({fmt.name for fmt in formats}) == len(formats)
    assert parse_format("int4") is qjax.INT4_G128 and parse_format("none") is None
    with pytest.raises(ValueError, match="unknown format 'int5'; choose one of none, bf16, fp8"):
        parse_format("int5")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qtype": "int9"}, "unknown qtype='int9'"),
        ({"qtype": "int8", "granularity": "row"}, "unknown granularity='row'"),
        ({"qtype": "int8", "granularity": "group"}, "'group' needs a group_size"),
        ({"qtype": "int8", "group_size": 32}, "'group' needs a group_size"),
        ({"qtype": "int8", "granularity": "group", "group_size": -1}, "use 'channel' for -1"),
        ({"qtype": "int8", "granularity": "block"}, "'block' needs a"),
        ({"qtype": "int8", "granularity": "block", "block": (0, 128)}, "must be positive"),
        ({"qtype": "float8_e5m2", "symmetric": False}, "has no zero point"),
        ({"qtype": "int8", "scale_dtype": "int8"}, "unknown scale_dtype='int8'"),
        ({"qtype": "int8", "activation": qjax.W8A8_INT8}, "cannot itself have an activation"),
    ],
)
def test_meaningless_combinations_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantFormat(**fields)


@pytest.mark.parametrize(
    ("fmt", "axis", "tiles"),
    [
        (qjax.INT8_TENSOR, -2, (1, 256, 64)),
        (qjax.INT8_CHANNEL, -2, (1, 256, 1)),
        (qjax.INT4_G128, -2, (1, 128, 1)),
        (qjax.FP8_E4M3_BLOCK128, -2, (1, 128, 64)),
        (qjax.FP8_PER_TOKEN, -1, (1, 1, 64)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_tiles(fmt: QuantFormat, axis: int, tiles: tuple[int, ...]) -> None:
    assert fmt.tiles((3, 256, 64), axis) == tiles


def test_tiles_refuse_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="scalar"):
        qjax.INT8_CHANNEL.tiles((), 0)
    with pytest.raises(ValueError, match="axis=2 is out of range"):
        qjax.INT8_CHANNEL.tiles((4, 4), 2)
    with pytest.raises(ValueError, match="among the last two"):
        qjax.INT8_TENSOR.tiles((4, 4, 4), 0)
    with pytest.raises(ValueError, match="a 2-D block needs a matrix"):
        qjax.FP8_E4M3_BLOCK128.tiles((4,), 0)
