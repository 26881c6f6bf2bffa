"""The files of a training run: Hugging Face export, settings, loss history and its picture."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from qjax._files import replacing, sole_run, write_text_atomic
from qjax.checkpoints.layout import model_leaves
from qjax.models.config import ModelConfig
from qjax.training.loop import TrainingConfig


def export_hf(params: Any, config: ModelConfig, directory: str | Path) -> None:
    """Writes ``config.json``, ``generation_config.json`` and ``model.safetensors`` (bfloat16).

    The folder loads unchanged in ``transformers`` and with ``qjax.checkpoints.hf.load_model``; add
    the tokenizer with ``save_tokenizer``.

    Args:
      params: Unquantized parameters of ``Decoder(config)``.
      config: Its configuration.
      directory: Created if missing; files of these names are replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    tensors = {}
    for leaf in model_leaves(config):
        value = np.asarray(jax.device_get(flat[leaf.path].astype(jnp.bfloat16)))
        value = value.T if leaf.is_kernel else value
        tensors[leaf.name] = np.ascontiguousarray(value, ml_dtypes.bfloat16)
    with replacing(directory / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": None,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    generation = {k: v for k, v in generation.items() if v is not None}
    write_json(directory / "config.json", config.to_hf())
    write_json(directory / "generation_config.json", generation)


def copy_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Copies the tokenizer of one model folder, with its chat template, into another."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
        for path in Path(source).glob(pattern):
            shutil.copyfile(path, Path(directory) / path.name)


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


def plot_losses(
    history: Sequence[tuple[int, float]], path: str | Path, *, smooth: int = 50
) -> None:
    """Draws loss over tokens, each point the mean of ``smooth`` updates.

    Raises:
      ImportError: If matplotlib is not installed; says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'qjax[plot]'") from error
    tokens, losses = (np.asarray(column, np.float64) for column in zip(*history, strict=True))
    smooth = max(1, min(smooth, len(losses) // 10))
    count = len(losses) // smooth
    mean = losses[: count * smooth].reshape(count, smooth).mean(1)
    at = tokens[: count * smooth].reshape(count, smooth).mean(1)
    # The object interface: no global figure, no display needed.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(at / 1e6, mean)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


class RunFolder:
    """What a run keeps beside its model: settings, loss history, encoded text, checkpoints."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.run = self.directory / "run"

    def sole_run(self) -> AbstractContextManager[None]:
        """Inside, no other process trains in this folder.

        Raises:
          ValueError: If another one does; says which.
        """
        return sole_run(self.directory / ".run.lock", self.directory)

    def check_settings(self, model: dict[str, Any], training: TrainingConfig) -> None:
        """Keeps the settings of a new run; compares those of a resumed one.

        Budgets may change: the learning rate then goes on from the fraction of the new one.

        Raises:
          ValueError: If the run in this folder was started with other settings, naming them, or
            the folder holds a model and no run.
        """
        settings = {**model, "training": dataclasses.asdict(training)}
        for budget in ("max_steps", "max_seconds"):
            del settings["training"][budget]
        settings = json.loads(json.dumps(settings))
        path = self.run / "settings.json"
        if not path.exists():
            # Such as that of --init-from or --teacher, which the new model would replace.
            if any(self.directory.glob("*.safetensors")):
                raise ValueError(
                    f"{str(self.directory)!r} holds a model and no run to resume; use another "
                    "output directory"
                )
            write_json(path, settings)
            return
        before = flatten_dict(json.loads(path.read_text(encoding="utf-8")), sep=".")
        now = flatten_dict(settings, sep=".")
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"the run in {str(self.directory)!r} was started with other settings "
                f"({'; '.join(changed)}); use the same ones to resume it, or "
                "another output directory"
            )

    def load_history(self, step: int) -> list[tuple[int, float]]:
        """``(tokens seen, loss)`` of the first ``step`` updates."""
        path = self.directory / "history.json"
        if step == 0 or not path.exists():
            return []
        return [(tokens, loss) for tokens, loss in json.loads(path.read_text())[:step]]

    def save_history(self, history: Sequence[tuple[int, float]]) -> None:
        """Writes the history as a JSON list of pairs, atomically."""
        rounded = [[tokens, round(loss, 4)] for tokens, loss in history]
        write_text_atomic(self.directory / "history.json", json.dumps(rounded) + "\n")
