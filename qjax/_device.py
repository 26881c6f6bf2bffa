"""What the device under jax can do: its peak rates, and which low-precision dots it runs natively.

Peak rates are data-sheet figures, kept with their source. Whether a dot is native is not looked up
but probed: a small one is compiled and the program XLA made of it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from typing import NoReturn

import jax
import jax.numpy as jnp

from qjax import _compat
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Data-sheet rates of one accelerator, dense (without structured sparsity).

    Attributes:
      bytes_per_s: Memory bandwidth.
      bf16_flops: 16-bit matrix rate, FLOP/s.
      fp8_flops: FP8 matrix rate, or None without FP8 units.
      int8_ops: INT8 matrix rate, or None.
      source: Where the figures come from.
    """

    bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    int8_ops: float | None
    source: str


# First key contained in the device kind wins, so "H100 PCIe" stands before "H100".
_PEAKS: dict[str, Peaks] = {
    "B200": Peaks(8.0e12, 2250e12, 4500e12, 4500e12, "NVIDIA DGX B200 data sheet, per GPU"),
    "H200": Peaks(4.8e12, 989e12, 1979e12, 1979e12, "NVIDIA H200 data sheet, SXM"),
    "H100 PCIe": Peaks(2.0e12, 756e12, 1513e12, 1513e12, "NVIDIA H100 data sheet, PCIe"),
    "H100 NVL": Peaks(3.9e12, 835e12, 1671e12, 1671e12, "NVIDIA H100 data sheet, NVL"),
    "H100": Peaks(3.35e12, 989e12, 1979e12, 1979e12, "NVIDIA H100 data sheet, SXM"),
    "A100-SXM4-80GB": Peaks(2.039e12, 312e12, None, 624e12, "NVIDIA A100 data sheet, SXM 80 GB"),
    "A100": Peaks(1.555e12, 312e12, None, 624e12, "NVIDIA A100 data sheet, 40 GB"),
    "L40S": Peaks(0.864e12, 362e12, 733e12, 733e12, "NVIDIA L40S data sheet"),
    "L4": Peaks(0.3e12, 121e12, 242e12, 242e12, "NVIDIA L4 data sheet"),
}


@dataclasses.dataclass(frozen=True)
class DeviceInfo:
    """The device that computations run on.

    Attributes:
      platform: ``cpu``, ``gpu`` or ``tpu``.
      kind: The name the driver gives, such as ``NVIDIA H200``.
      architecture: ``sm_90`` and the like on NVIDIA GPUs, else None.
      core_count: Streaming multiprocessors, or None where jax does not say.
      memory_bytes: Memory that jax may use, or None.
      count: Number of such devices in this process.
      peaks: Data-sheet rates, or None for a device that is not in the table.
    """

    platform: str
    kind: str
    architecture: str | None
    core_count: int | None
    memory_bytes: int | None
    count: int
    peaks: Peaks | None


def peaks_of(kind: str) -> Peaks | None:
    """Data-sheet rates of a device kind, such as ``NVIDIA H100 80GB HBM3``; None if unknown."""
    words = kind.replace("-", " ").split()
    for key, peaks in _PEAKS.items():
        # Whole words: "L4" must not match "L40".
        parts = key.replace("-", " ").split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return peaks
    return None


def device_info() -> DeviceInfo:
    """Describe the default device."""
    device = jax.devices()[0]
    platform, kind = device.platform, device.device_kind
    capability = getattr(device, "compute_capability", None)
    on_gpu = platform == "gpu"
    stats = device.memory_stats() or {}
    return DeviceInfo(
        platform=platform,
        kind=kind,
        architecture="sm_" + str(capability).replace(".", "") if on_gpu and capability else None,
        core_count=getattr(device, "core_count", None) if on_gpu else None,
        memory_bytes=stats.get("bytes_limit"),
        count=sum(d.platform == platform for d in jax.local_devices()),
        peaks=peaks_of(kind),
    )


@dataclasses.dataclass(frozen=True)
class DotSupport:
    """How one pair of operand types is multiplied.

    Attributes:
      lhs: Type of the left operand.
      rhs: Type of the right operand.
      accumulator: Type of the result.
      native: Whether the multiplication itself reads both operands in their own types.
      how: One line: the library call or the types that are multiplied instead, or the error.
    """

    lhs: str
    rhs: str
    accumulator: str
    native: bool
    how: str


_HLO_TYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "s8": "int8",
    "s4": "int4",
    "s32": "int32",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}


def compiler_options(activation_qtype: str | None, platform: str | None = None) -> dict | None:
    """XLA options that a program with W8A8 dots needs; for ``jax.jit(compiler_options=...)``.

    With XLA's default flags the scaled product of two fp8 matrices is dequantized and multiplied in
    bf16 on Hopper (1329 us instead of 598 us for 4096 x 28672 x 4096 on an H200, jax 0.11.2).
    Without XLA's Triton matmuls it becomes the fp8 matmul of cuBLASLt.

    Args:
      activation_qtype: Type of quantized activations (``QuantFormat.activation.qtype``), or None.
      platform: ``cpu`` or ``gpu``; that of the default device if None.

    Returns:
      A dictionary, or None where no option is needed.
    """
    platform = jax.devices()[0].platform if platform is None else platform
    if platform == "gpu" and activation_qtype is not None and activation_qtype.startswith("float8"):
        return {"xla_gpu_enable_triton_gemm": False}
    return None


def prefer_quick_compilation() -> None:
    """Make XLA take cuBLAS's first choice for matrix products instead of trying candidates.

    For programs whose products are large and are run a few times each: autotuning every shape takes
    longer than the work (more than a minute for one decoder block of the 8B shape on an H200). Sets
    ``XLA_FLAGS``, which XLA reads when it is first used: call this before the first array is made.
    Flags of the user have precedence.
    """
    mine = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    given = os.environ.get("XLA_FLAGS", "")
    if mine not in given:
        os.environ["XLA_FLAGS"] = f"{mine} {given}".strip()


def probe_dot(lhs: str, rhs: str, accumulator: str) -> DotSupport:
    """Compile a small ``lhs @ rhs`` for the default device and read how it is carried out.

    Args:
      lhs: Type name of the left operand.
      rhs: Type name of the right operand.
      accumulator: Type name of the result.
    """

    # 64 x 256 x 128 meets the alignment rules of every library that might take it.
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        dims = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.dtype(accumulator))

    options = compiler_options(lhs)
    shapes = jax.ShapeDtypeStruct((64, 256), lhs), jax.ShapeDtypeStruct((256, 128), rhs)
    try:
        compiled = jax.jit(product, compiler_options=options).lower(*shapes).compile()
    except Exception as error:  # XLA's exceptions have no public base class
        reason = str(error).strip().splitlines()[0]
        return DotSupport(lhs, rhs, accumulator, False, f"refused by XLA: {reason[:120]}")
    return _read_dot(compiled.as_text() or "", lhs, rhs, accumulator)


def _read_dot(hlo: str, lhs: str, rhs: str, accumulator: str) -> DotSupport:
    target = re.search(r'custom_call_target="(__[^"]*(?:matmul|gemm)[^"]*)"', hlo)
    mark = target.group(0) if target else " dot("
    line = next((row for row in hlo.splitlines() if mark in row), None)
    if line is None:
        return DotSupport(lhs, rhs, accumulator, False, "no dot found in the compiled program")
    # A library call may return a tuple, whose type has brackets of its own before the operands.
    operands = line.split("custom-call(" if target else " dot(", 1)[1]
    names = re.findall(r"%[\w.\-]+", operands)[:2]
    used = tuple(_operand_type(hlo, name) for name in names)
    call = target.group(1) if target else "XLA dot"
    if used == (lhs, rhs):
        return DotSupport(lhs, rhs, accumulator, True, f"{call} on {lhs} x {rhs}")
    how = f"operands are converted: {call} on {' x '.join(used)}"
    return DotSupport(lhs, rhs, accumulator, False, how)


def _operand_type(hlo: str, name: str) -> str:
    found = re.search(rf"^\s*{re.escape(name)} = (\w+)\[", hlo, re.MULTILINE)
    if found is None:
        return "?"
    return _HLO_TYPES.get(found.group(1), found.group(1))


def mosaic_gpu_unsupported_reason(info: DeviceInfo | None = None) -> str | None:
    """Why Pallas Mosaic GPU kernels cannot run here, or None if they can."""
    info = device_info() if info is None else info
    if info.platform != "gpu":
        return f"the default device is a {info.platform}; the kernels need an NVIDIA Hopper GPU"
    # sm_90 alone: the kernels use wgmma, which later architectures do not have.
    if info.architecture != "sm_90":
        return f"{info.kind} is {info.architecture}; the kernels need sm_90 (H100, H200)"
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        needed = ".".join(map(str, MOSAIC_GPU_MIN_JAX))
        return f"jax {jax.__version__} is older than {needed}; upgrade jax"
    return None


def cudnn_unsupported_reason(info: DeviceInfo | None = None) -> str | None:
    """Why prefill attention cannot be cuDNN's on this device; None if it can."""
    info = device_info() if info is None else info
    architecture = info.architecture or ""
    if info.platform != "gpu" or not architecture.startswith("sm_"):
        return f"the default device is a {info.kind}; cuDNN needs an NVIDIA GPU"
    if int(architecture.removeprefix("sm_")) < 80:
        return f"{info.kind} is {architecture}; cuDNN's flash attention needs sm_80 or later"
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        needed = ".".join(map(str, MOSAIC_GPU_MIN_JAX))
        return f"jax {jax.__version__} is older than {needed}; upgrade jax"
    return _compat.cudnn_unsupported_reason()


def end_process(status: int) -> NoReturn:
    """Ends a program whose work is over, with an exit status.

    After Ctrl-C the device may be at work that nobody waits for. The interpreter would take down
    what it uses, and now and then crash, so it is not asked to tidy up; the caller has.
    """
    if status == 130:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
                stream.flush()
        os._exit(status)
    sys.exit(status)
