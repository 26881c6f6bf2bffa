from __future__ import annotations

import pathlib
import subprocess
import sys

import jax
import pytest

from qjax import _device, info
from qjax.formats import FORMATS


def test_report_names_versions_products_and_every_format():
    text = "\n".join(info.report())
    assert f"jax {jax.__version__}" in text and "Device" in text
    for name in FORMATS:
        assert name in text
    assert "int4 4" in text, "int4 takes half a byte"
    assert "native      bfloat16 x bfloat16 -> float32" in text
    if jax.devices()[0].platform == "cpu":
        assert (
            "falls back  float8_e4m3fn x float8_e4m3fn -> float32: operands are converted" in text
        )
        assert "not here: the default device is a cpu" in text
        assert "XLA's form: " in text.partition("Prefill attention")[2]
    assert max(map(len, text.splitlines())) <= 120


def test_module_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(info.__file__).resolve().parent.parent))
    done = subprocess.run([sys.executable, "-m", "qjax.info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Weight formats on the XLA backend" in done.stdout


def test_probe_says_what_xla_refuses():
    support = _device.probe_dot("int4", "float8_e4m3fn", "float32")
    assert not support.native and support.how


CUBLAS = """
ENTRY %main.1 (x.1: f8e4m3fn[64,256], y.1: f8e4m3fn[256,128]) -> f32[64,128] {
  %x.1 = f8e4m3fn[64,256]{1,0} parameter(0)
  %y.1 = f8e4m3fn[256,128]{1,0} parameter(1)
  %fusion = f8e4m3fn[128,256]{1,0} fusion(%y.1), kind=kInput, calls=%transpose
  %c = f32[] constant(1)
  %mm = (f32[64,128]{1,0}, s8[33554432]{0}) custom-call(%x.1, %fusion, %c, %c), \
custom_call_target="__cublas$lt$matmul$f8", backend_config={}
  ROOT %out = f32[64,128]{1,0} get-tuple-element(%mm), index=0
}
"""


def test_library_calls_are_recognised():
    fp8 = "float8_e4m3fn"
    support = _device._read_dot(CUBLAS, fp8, fp8, "float32")
    assert support.native and "__cublas$lt$matmul$f8" in support.how
    converted = CUBLAS.replace("%x.1 = f8e4m3fn", "%x.1 = bf16").replace("$f8", "")
    support = _device._read_dot(converted, fp8, fp8, "float32")
    assert not support.native and "bfloat16 x float8_e4m3fn" in support.how


@pytest.mark.parametrize(
    ("kind", "bytes_per_s"),
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA L4", 0.3e12),
        ("NVIDIA L40S", 0.864e12),
    ],
)
def test_peak_rates(kind, bytes_per_s):
    peaks = _device.peaks_of(kind)
    assert peaks is not None and peaks.bytes_per_s == bytes_per_s and peaks.source


def test_unknown_devices_have_no_peak_rates():
    assert _device.peaks_of("NVIDIA L40") is None and _device.peaks_of("cpu") is None


@pytest.mark.parametrize(
    ("platform", "qtype", "expected"),
    [
        ("gpu", "float8_e4m3fn", {"xla_gpu_enable_triton_gemm": False}),
        ("gpu", "int8", None),
        ("gpu", None, None),
        ("cpu", "float8_e4m3fn", None),
    ],
)
def test_compiler_options_only_where_they_are_needed(platform, qtype, expected):
    assert _device.compiler_options(qtype, platform) == expected


@pytest.mark.parametrize(
    ("platform", "architecture", "jax_version", "reason"),
    [
        ("cpu", None, (0, 11, 2), "default device is a cpu"),
        ("gpu", "sm_80", (0, 11, 2), "A is sm_80; the kernels need sm_90"),
        ("gpu", "sm_90", (0, 10, 2), "is older than 0.11.2"),
        ("gpu", "sm_90", (0, 11, 2), None),
    ],
)
def test_why_kernels_cannot_run(platform, architecture, jax_version, reason, monkeypatch):
    monkeypatch.setattr(_device, "JAX_VERSION", jax_version)
    device = _device.DeviceInfo(platform, "A", architecture, 132, None, 1, None)
    found = _device.mosaic_gpu_unsupported_reason(device)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and reason in found)
