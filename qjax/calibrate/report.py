"""What a calibration run reports: JSON for programs, Markdown and a picture for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax._files import replacing, write_text_atomic
from qjax.calibrate.block import LayerResult

JSON_NAME = "calibration_report.json"
MARKDOWN_NAME = "calibration_report.md"
PNG_NAME = "calibration_report.png"


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a run, without anything that differs between two equal runs.

    Attributes:
      model: Name of the source folder.
      method: The method.
      format: Name of the main format, or None.
      samples: Calibration sequences.
      tokens: Tokens in them.
      layers: One entry for each linear layer.
      learned: Of each block, the relative error of its output before and behind every stage of
        learning; empty lists if nothing was learned.
      bytes_before: Size of the unquantized weights.
      bytes_after: Size of all weights now, with scales.
    """

    model: str
    method: str
    format: str | None
    samples: int
    tokens: int
    layers: Sequence[LayerResult]
    learned: Sequence[Sequence[Sequence[float]]]
    bytes_before: int
    bytes_after: int

    def mean_ratio(self) -> float | None:
        """Mean of error / RTN error over the layers where both were measured."""
        return mean_ratio(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(x) for x in self.layers]}

    def to_markdown(self) -> str:
        """A table of all layers under a summary."""
        lines = [
            f"# Calibration of {self.model}",
            "",
            f"Method {self.method}, format {self.format or 'by rules'}, {self.samples} samples, "
            f"{self.tokens} tokens. Weights {self.bytes_before / 1e6:.2f} MB before, "
            f"{self.bytes_after / 1e6:.2f} MB after.",
            "",
            "Errors are relative errors of a layer's output on the calibration text, from the "
            "weights alone: of rounding to nearest (RTN), and of what was written.",
            "",
        ]
        ratio = self.mean_ratio()
        if ratio is not None:
            lines += [f"Mean error relative to RTN: {ratio:.3f}.", ""]
        lines += ["| layer | format | RTN | chosen | ratio | damping | note |", "|" + "---|" * 7]
        for x in self.layers:
            name = x.path.removesuffix("/kernel")
            if x.format is None or x.error is None or x.error_rtn is None:
                lines.append(f"| {name} | {x.format or '-'} | - | - | - | - | {x.note} |")
                continue
            share = f"{x.error / x.error_rtn:.3f}" if x.error_rtn > 0 else "-"
            damping = f"{x.damping:g}" if x.damping else "-"
            notes = [x.note] if x.note else []
            if x.dead:
                notes.append(f"{x.dead} channels never active")
            lines.append(
                f"| {name} | {x.format} | {x.error_rtn:.4g} | {x.error:.4g} | {share} | {damping} "
                f"| {'; '.join(notes)} |"
            )
        alone = [x for x in self.layers if x.format is None]
        noted = [x for x in self.layers if x.format is not None and x.note]
        lines += ["", f"Left alone: {len(alone)} layers. Too few tokens: {len(noted)} layers."]
        if any(self.learned):
            lines += ["", "Relative error of the block's output before and behind learning:", ""]
            lines += ["| block | stages |", "|---|---|"]
            for index, stages in enumerate(self.learned):
                shown = "; ".join(f"{before:.4g} to {after:.4g}" for before, after in stages)
                lines.append(f"| {index} | {shown} |")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write JSON and Markdown into a folder and, where matplotlib is installed, a picture."""
        write_text_atomic(folder / JSON_NAME, json.dumps(self.to_json(), indent=2) + "\n")
        write_text_atomic(folder / MARKDOWN_NAME, self.to_markdown())
        plot_errors(self.layers, folder / PNG_NAME)


def plot_errors(layers: Sequence[LayerResult], path: Path) -> bool:
    """Errors of RTN and of what was chosen, layer by layer; False if there is nothing to plot with.

    That is without matplotlib (``pip install 'qjax[plot]'``), or if no error was measured.
    """
    measured = [x for x in layers if x.error is not None and x.error_rtn is not None]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not measured:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = dict.fromkeys(x.path.split("/")[-2] for x in measured)
    for index, kind in enumerate(kinds):
        places = [i for i, x in enumerate(measured) if x.path.split("/")[-2] == kind]
        for name, marker in (("error_rtn", "x"), ("error", "o")):
            heights = [getattr(measured[i], name) for i in places]
            label = kind if marker == "o" else None
            axes.plot(places, heights, marker, color=f"C{index}", markersize=4, label=label)
    axes.set_xlabel("layer in the order of the model")
    axes.set_ylabel("relative output error (x: RTN, o: chosen)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    with replacing(path) as temporary:
        # Without the version of matplotlib: equal runs write equal bytes.
        figure.savefig(temporary, dpi=120, metadata={"Software": None})
    return True


def mean_ratio(layers: Sequence[LayerResult]) -> float | None:
    """Mean of error / RTN error over the layers where both were measured; None if there is none."""
    ratios = [x.error / x.error_rtn for x in layers if x.error is not None and x.error_rtn]
    return sum(ratios) / len(ratios) if ratios else None
