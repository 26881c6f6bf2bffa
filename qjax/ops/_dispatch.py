"""Choice of a backend: the same rules for every op."""

from __future__ import annotations

import jax

BACKENDS = ("xla", "mosaic_gpu")


def kernels_by_default() -> bool:
    """Whether kernels run without being asked for: in programs that are for one device each.

    Such are all in a process with one device, and what ``jax.shard_map`` runs on every device by
    itself (over all axes of its mesh; one device makes a mesh too). Otherwise XLA may have to
    divide the program between devices, which it can do with its own ops and not with a kernel, for
    which it would gather operands that lie on all of them.
    """
    if jax.device_count() == 1:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def choose_backend(op: str, backend: str | None, mosaic_gpu_reason: str | None) -> str:
    """The backend to run, or the error that says why it cannot.

    Args:
      op: Name of the op, for messages.
      backend: What the caller asked for; None chooses the fastest supported one, which is XLA
        where kernels do not run by default.
      mosaic_gpu_reason: Why the Mosaic GPU kernel cannot run on these arguments; None if it can.

    Returns:
      ``"xla"`` or ``"mosaic_gpu"``.

    Raises:
      ValueError: If the name is unknown.
      NotImplementedError: If the named backend cannot run; the message holds the reason.
    """
    if backend is None:
        chosen = mosaic_gpu_reason is None and kernels_by_default()
        return "mosaic_gpu" if chosen else "xla"
    if backend not in BACKENDS:
        raise ValueError(f"unknown {backend=}; choose one of {BACKENDS} or None for automatic")
    if backend == "mosaic_gpu" and mosaic_gpu_reason is not None:
        raise NotImplementedError(f"{op}: mosaic_gpu cannot run here: {mosaic_gpu_reason}")
    return backend
