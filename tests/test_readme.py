"""What the README shows works as it stands there."""

from __future__ import annotations

import pathlib
import re

import jax.numpy as jnp

from qjax.assets import bundled_model_path

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run() -> None:
    assert len(BLOCKS) == 2
    names: dict = {}
    exec(BLOCKS[0].replace("4096, 1024", "256, 64").replace("8, 4096", "8, 256"), names)
    assert names["y"].shape == (8, 64)
    names["tokens"] = jnp.ones((1, 4), jnp.int32)
    exec(BLOCKS[1].replace("PATH_OR_HUB_ID", str(bundled_model_path())), names)
    assert names["logits"].shape == (1, 4, names["model"].config.vocab_size)


def test_scripts_and_flags_exist() -> None:
    seen = 0
    for script, rest in re.findall(r"scripts/(\w+\.py)((?:[^`\n]|\\\n)*)", README):
        source = (ROOT / "scripts" / script).read_text(encoding="utf-8")
        if script == "serve.py":
            for flags in (ROOT / "qjax" / "serving").glob("*_flags.py"):
                source += flags.read_text(encoding="utf-8")
        for flag in re.findall(r"--[a-z][a-z-]+", rest):
            assert f'"{flag}"' in source, f"{script} has no {flag}"
            seen += 1
    assert seen > 10
