from __future__ import annotations

import numpy as np
import pytest

from qjax.checkpoints.reader import KVScales
from qjax.kv_format import KVFormat
from qjax.serving.report import format_bytes
from qjax.serving.results import json_line
from qjax.serving.settings import kv_formats, parse_layers

ONES = tuple(np.ones(2, np.float32) for _ in range(3))
SCALES = KVScales(ONES, ONES, "float8_e4m3fn")
BF16 = KVFormat("bfloat16")


def formats(name, mode=None, skip=(), scales=None):
    return kv_formats(name, mode, skip, 3, "bfloat16", scales)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("auto",), BF16),
        (("bf16",), BF16),
        (("int8",), KVFormat("int8", "tracked")),
        (("int8", "dynamic"), KVFormat("int8", "dynamic")),
        (("auto", None, (), SCALES), KVFormat("float8_e4m3fn", "static")),
        (("auto", "tracked", (), SCALES), KVFormat("float8_e4m3fn", "tracked")),
        (("fp8_e4m3", None, (), SCALES), KVFormat("float8_e4m3fn", "static")),
        (("int8", None, (), SCALES), KVFormat("int8", "tracked")),
        (("bf16", None, (), SCALES), BF16),
    ],
)
def test_one_format_for_all_layers(arguments, expected):
    found, scales = formats(*arguments)
    assert found == (expected,) * 3
    assert (scales is not None) == (expected.mode == "static")


def test_skipped_layers_keep_the_model_type_and_have_no_scales():
    found, scales = formats("auto", None, (0, -1), SCALES)
    assert found == (BF16, KVFormat("float8_e4m3fn", "static"), BF16)
    assert scales is not None and [pair is None for pair in scales] == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int8", "static", (), SCALES), "int8 need a .* this one has scales for float8_e4m3fn"),
        (("auto", "static"), "a KV cache in bfloat16 has no scales"),
        (("int8", None, (3,)), "KV layer 3 does not exist; the model has layers 0 to 2"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        formats(*arguments)


def test_layer_lists():
    assert parse_layers("0, 2,-1") == [0, 2, -1] and parse_layers("") == []


def test_bytes_are_readable():
    sizes = (999, 1500, 2.5e6, 16.06e9, 3e13)
    assert [format_bytes(n) for n in sizes] == [
        "999 B",
        "1.50 kB",
        "2.50 MB",
        "16.06 GB",
        "30.00 TB",
    ]


def test_lines_stay_lines():
    line = json_line({"text": "a\u2028b\x85c\nd é"})
    assert line.splitlines() == [r'{"text": "a\u2028b\u0085c\nd é"}']
