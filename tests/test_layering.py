"""The import direction of design, and other rules that hold for every file."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A module may import from the lines above its own and, within its line, from what stands before it.
LAYERS: list[tuple[str, ...]] = [
    ("_compat", "_files", "_device", "typing"),
    ("formats", "numerics", "quantized_array", "quantize", "kv_format", "kv_cache"),
    ("pallas_kernels",),
    ("ops",),
    ("calibration",),
    ("nn", "models", "tokenizer", "checkpoints", "assets"),
    ("sampling", "generate"),
    ("serving", "evaluation", "training", "info", "calibrate"),
]
ORDER = {name: (level, place) for level, row in enumerate(LAYERS) for place, name in enumerate(row)}
FLAX_FROM = ORDER["nn"][0]


def _modules() -> list[pathlib.Path]:
    return sorted((ROOT / "qjax").rglob("*.py"))


def _unit(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "qjax").parts[0].removesuffix(".py")


def _imports(path: pathlib.Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_place() -> None:
    units = {_unit(path) for path in _modules()} - {"__init__"}
    assert units <= set(ORDER), f"add {units - set(ORDER)} to LAYERS"


def test_imports_point_downwards() -> None:
    for path in _modules():
        unit = _unit(path)
        if unit == "__init__":
            continue
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "flax":
                assert ORDER[unit][0] >= FLAX_FROM, f"{path} imports flax below nn/"
            if parts[0] != "qjax" or parts[1] == unit:
                continue
            assert parts[1] in ORDER, f"{path} imports {name}: name the module, not the package"
            assert ORDER[parts[1]] < ORDER[unit], f"{path} imports {name}, which lies above it"


def test_kernels_see_plain_arrays_only() -> None:
    for path in (ROOT / "qjax" / "pallas_kernels").rglob("*.py"):
        for name in _imports(path):
            assert "QuantizedArray" not in name and "quantized_array" not in name, path


def test_private_jax_names_stay_in_compat() -> None:
    for path in _modules():
        if path.name != "_compat.py":
            assert not any("jax._src" in name for name in _imports(path)), path


@pytest.mark.parametrize("folder", ["qjax", "scripts", "tests"])
def test_files_are_small(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        lines = path.read_text().count("\n")
        assert lines <= 500, f"{path} has {lines} lines; split it"


def test_import_touches_no_device() -> None:
    """Importing must not start a backend: it would take a GPU's memory and break XLA_FLAGS."""
    code = (
        "import qjax, jax\n"
        "from jax.extend import backend\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge._backends, bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
