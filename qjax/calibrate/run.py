"""The sequential driver: block by block, from a checkpoint folder to a quantized one.

One block at a time is read, quantized and stored; the calibration activations are then run through
the quantized block, so that the next one is calibrated on what it will really see. In memory are
one block and the activations, whatever the size of the model, and for a moment the block before,
which a thread stores. A run that was killed goes on behind the last stored block and ends with the
same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qjax._files import sole_run
from qjax.calibrate.block import BlockQuantized, LayerResult, quantize_block, round_kernel
from qjax.calibrate.clock import PhaseClock
from qjax.calibrate.linears import Batch, get_at, plain_weights, run_block
from qjax.calibrate.plan import block_sensitivities, plan_formats
from qjax.calibrate.report import Report, mean_ratio
from qjax.calibrate.settings import DEFAULT_RULE, Settings
from qjax.calibrate.source import EMBEDDING, NORM, ModelSource, insert
from qjax.calibrate.store import BlockStore, BlockWriter, fingerprint, to_device
from qjax.calibration.stats import init_hessian, output_error, update_hessian
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.export import EXPORT_FORMATS, save_model
from qjax.checkpoints.layout import HEAD, Leaf
from qjax.checkpoints.native import MANIFEST, save_native
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.safetensors_io import read_json
from qjax.checkpoints.writer import Linears
from qjax.formats import QuantFormat
from qjax.models.decoder import DecoderLayer
from qjax.nn import RMSNorm
from qjax.numerics import bound
from qjax.quantize import match_rules, quantize, quantized_nbytes
from qjax.quantized_array import QuantizedArray

Samples = tuple[np.ndarray, np.ndarray]
EXPORTS = ("native", *(name for name in EXPORT_FORMATS if name != "none"))


def calibrate_checkpoint(
    source: str | Path,
    output: str | Path,
    settings: Settings,
    samples: Samples | None,
    *,
    export: str = "compressed-tensors",
    batch_tokens: int = 8192,
    overwrite: bool = False,
    progress: bool = True,
    clock: PhaseClock | None = None,
) -> Report:
    """Quantize a checkpoint folder.

    Args:
      source: Folder of an unquantized Hugging Face checkpoint.
      output: Folder to write; finished blocks wait in ``.NAME.calibration`` beside it meanwhile.
      settings: Method, formats and options.
      samples: ``(tokens, valid)``, int32 and bool ``(samples, length)``; None if the settings need
        no data.
      export: ``"native"`` or a format of ``qjax.checkpoints.export``.
      batch_tokens: Tokens per forward pass.
      overwrite: Replace ``output``.
      progress: Show a progress bar on standard error.
      clock: Is told where the time goes.

    Returns:
      The report, which is also written into the folder.

    Raises:
      CheckpointError: If the source cannot be read, or the export format cannot hold the result;
        before any work.
      ValueError: If settings do not fit the model or each other, or ``output`` is or holds the
        source; if another run writes the same folder.
    """
    clock = PhaseClock() if clock is None else clock
    run = _Run(Path(source), settings, samples, batch_tokens, clock)
    output = Path(output).absolute()
    _check_target(run, output, export, overwrite)
    work = output.parent / f".{output.name}.calibration"
    # Beside the work, which is removed while the lock is held.
    with sole_run(work.with_name(f"{work.name}.lock"), output):
        _check_output(output, overwrite)  # another run may have made it meanwhile
        return _calibrate(run, output, work, export, progress)


def _calibrate(run: _Run, output: Path, work: Path, export: str, progress: bool) -> Report:
    """The work itself, of which no other process does any meanwhile."""
    settings, clock = run.settings, run.clock
    store = BlockStore(work, run.identity())
    if settings.target_bits is not None:
        run.plan(store, progress)
    pieces, layers, learned, kv_scales = run.blocks(store, progress)
    params = run.assemble(pieces)
    report = run.report(layers, learned, params)
    # Written beside the work and then renamed, so that the report is in place when the folder is.
    finished = work / "model"
    common: dict[str, Any] = {"source": run.folder, "kv_scales": kv_scales, "overwrite": True}
    with clock.phase("writing"):
        if export == "native":
            save_native(finished, run.config, to_device(params), **common)
        else:
            save_model(finished, run.config, params, export, progress=progress, **common)
    report.write(finished)
    if output.exists():
        # Two renames: a kill leaves the old folder or the new one, here or among the work.
        output.rename(work / "replaced")
    finished.rename(output)
    shutil.rmtree(work)
    return report


def _check_target(run: _Run, output: Path, export: str, overwrite: bool) -> None:
    if export not in EXPORTS:
        raise ValueError(f"unknown {export=}; choose one of {', '.join(EXPORTS)}")
    source = run.folder.resolve()
    if output.resolve() in (source, *source.parents):
        # Replacing it would delete the only copy of the original weights.
        raise ValueError(f"{output} is or holds the model {source} itself; choose another folder")
    _check_output(output, overwrite)
    factory = EXPORT_FORMATS.get(export)
    if factory is None:
        return
    heads = (np.ones((run.config.num_kv_heads,), np.float32),) * run.config.num_layers
    kv_dtype = run.settings.kv_dtype
    scales = None if kv_dtype is None else KVScales(heads, heads, kv_dtype)
    quantized, plain = {}, {}
    for leaf in run.leaves:
        fmt = run.formats.get(leaf.path)
        if fmt is not None:
            quantized[leaf.layer] = _placeholder(leaf, fmt, run.dtype)
        elif leaf.is_kernel:
            plain[leaf.layer] = leaf.shape
    factory(Linears(quantized, plain, scales))
    for fmt in run.settings.candidates:
        every = {leaf.layer: _placeholder(leaf, fmt, run.dtype) for leaf in run.open_layers()}
        factory(Linears(every, {}, scales))


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise CheckpointError(f"{output} exists and is not a folder; choose another name")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{output} exists and is not empty; choose another, or overwrite it"
            )
        if not (output / "config.json").exists() and not (output / MANIFEST).exists():
            raise CheckpointError(
                f"{output} holds no model (config.json), so it is not overwritten; remove it "
                "yourself, or choose another folder"
            )


def _placeholder(leaf: Leaf, fmt: QuantFormat, dtype: Any) -> QuantizedArray:
    """What the result will look like; its zeros take no memory until somebody reads them."""
    counts = tuple(
        -(-size // tile) for size, tile in zip(leaf.shape, fmt.tiles(leaf.shape, 0), strict=True)
    )
    static = fmt.activation is not None and not fmt.activation.dynamic
    host: list[Any] = [
        np.zeros(leaf.shape, fmt.storage_dtype),
        np.ones(counts, jnp.dtype(fmt.scale_dtype)),
        None if fmt.symmetric else np.zeros(counts, np.int8),
        np.float32(1) if static else None,
    ]
    return QuantizedArray(host[0], host[1], host[2], None, None, host[3], fmt, dtype)


class _Run:
    """One model with its settings and data."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        samples: Samples | None,
        batch_tokens: int,
        clock: PhaseClock,
    ):
        if samples is None and settings.needs_data:
            raise ValueError(f"method={settings.method!r} needs calibration text")
        self.folder, self.settings, self.samples = folder, settings, samples
        self.source = ModelSource(folder, rotated=settings.rotate)
        self.config, self.leaves = self.source.config, self.source.leaves
        kernels = [leaf.path for leaf in self.leaves if leaf.is_kernel]
        self.formats = match_rules(kernels, settings.ordered_rules())
        if not any(self.formats.values()):
            raise ValueError("no layer is left to quantize; give a format, or fewer rules")
        self.dtype = jnp.dtype(self.config.dtype)
        self.batch_tokens, self.clock = batch_tokens, clock
        if samples is not None and int(samples[0].max()) >= self.config.vocab_size:
            raise ValueError(
                f"token {int(samples[0].max())} is outside the vocabulary of "
                f"{self.config.vocab_size}; the tokenizer does not belong to this model"
            )

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result."""
        files = self.source.files
        values = {
            "settings": self.settings.to_json(),
            "model": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
            "config": read_json(self.folder / "config.json"),
            "batch_tokens": self.batch_tokens,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        if self.samples is not None:
            values["samples"] = fingerprint(*self.samples)
        return values

    def open_layers(self) -> list[Leaf]:
        """Kernels whose format no rule decides."""
        kernels = [leaf for leaf in self.leaves if leaf.is_kernel]
        decided = match_rules([leaf.path for leaf in kernels], dict(self.settings.rules))
        return [x for x in kernels if re.fullmatch(DEFAULT_RULE, x.path) and x.path not in decided]

    def plan(self, store: BlockStore, progress: bool) -> None:
        """Mixed precision: measure every candidate in the original model, then choose formats."""
        candidates, target = self.settings.candidates, self.settings.target_bits
        assert target is not None
        leaves = {leaf.path: leaf for leaf in self.open_layers()}

        def measure() -> dict[str, Any]:
            batches, errors = self.embed(), {}
            label = f"measuring {self.folder.name}"
            blocks = range(self.config.num_layers)
            for index in tqdm(blocks, desc=label, disable=not progress, unit="block"):
                params, module = self.block_params(index), self.module(index)
                found = block_sensitivities(module, params, batches, candidates)
                errors |= {f"model/layers_{index}/{path}": e for path, e in found.items()}
                batches = self.advance(index, params, params, batches)[0]
            return errors

        errors = {p: e for p, e in store.record("sensitivity", measure).items() if p in leaves}
        shapes = {path: (leaf.shape[0], leaf.shape[1]) for path, leaf in leaves.items()}
        self.formats |= plan_formats(errors, shapes, candidates, target)

    def block_params(self, index: int) -> dict[str, Any]:
        with self.clock.phase("reading"):
            return self.clock.wait(self.source.block(index, self.wide()))

    def wide(self) -> set[str]:
        """Kernels that will be quantized."""
        return {path for path, fmt in self.formats.items() if fmt is not None}

    def module(self, index: int) -> DecoderLayer:
        # Without a cache the index decides the window only: blocks with the same one share a
        # compilation.
        windows = self.config.layer_windows
        return DecoderLayer(self.config, windows.index(windows[index]), self.dtype)

    def blocks(
        self, store: BlockStore, progress: bool
    ) -> tuple[dict[str, Any], list[LayerResult], list[Any], KVScales | None]:
        """Quantize all blocks, or take finished ones from the store.

        Returns:
          Parameters by block, the results of all layers, what each block learned, and the KV cache
          scales if asked for.
        """
        batches = self.embed() if self.samples is not None else []
        names: dict[str, str] = {}
        keys, values = [], []
        label = f"{self.settings.method} {self.folder.name}"
        blocks = range(self.config.num_layers)
        with (
            BlockWriter(store) as writer,
            tqdm(total=len(blocks), desc=label, disable=not progress, unit="block") as bar,
        ):
            for index in blocks:
                path = f"model/layers_{index}"
                names[path] = f"block-{index:05d}"
                with self.clock.block():
                    original = self.block_params(index)
                    make = functools.partial(
                        self.quantize_block, index, f"{path}/", original, batches
                    )
                    params, layers = self.piece(writer, store, names[path], path, make)
                    if batches:
                        batches, top = self.advance(index, params, original, batches)
                        keys.append(top[0])
                        values.append(top[1])
                ratio = mean_ratio(layers)
                bar.set_postfix_str("" if ratio is None else f"error {ratio:.2f} of RTN")
                bar.update()
            if self.formats.get(HEAD) is not None:
                names["lm_head"] = "lm_head"
                make = functools.partial(self.quantize_head, batches)
                self.piece(writer, store, "lm_head", "lm_head", make)
        # All of it as it was stored, so that a resumed run has the same.
        pieces: dict[str, Any] = {}
        results: list[LayerResult] = []
        learned: list[Any] = []
        for path, name in names.items():
            pieces[path], record = self.stored(store, name, path)
            results += [LayerResult(**x) for x in record["layers"]]
            if path != "lm_head":
                learned.append(record["learned"])
        return pieces, results, learned, self.kv_scales(keys, values)

    def piece(
        self,
        writer: BlockWriter,
        store: BlockStore,
        name: str,
        path: str,
        make: Callable[[], BlockQuantized],
    ) -> tuple[Any, list[LayerResult]]:
        """A piece on the device: made, which begins to store it, or stored by an earlier run.

        What comes back from the store equals what was made, so the blocks behind it do not depend
        on which it was.
        """
        if store.has(name):
            params, record = self.stored(store, name, path)
            return to_device(params), [LayerResult(**x) for x in record["layers"]]
        made = make()
        record = {"layers": [dataclasses.asdict(x) for x in made.layers], "learned": made.learned}
        with self.clock.phase("storing"):
            writer.save(name, made.params, record)
        return made.params, made.layers

    def stored(
        self, store: BlockStore, name: str, path: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A stored piece and its record; host arrays."""
        formats = {
            leaf.removeprefix(f"{path}/"): fmt
            for leaf, fmt in self.formats.items()
            if leaf.startswith(f"{path}/")
        }
        return store.load(name, formats, self.dtype)

    def quantize_block(
        self, index: int, prefix: str, params: dict[str, Any], batches: list[Batch]
    ) -> BlockQuantized:
        formats = {p.removeprefix(prefix): f for p, f in self.formats.items()}
        if batches:
            module = self.module(index)
            return quantize_block(
                module, params, batches, formats, self.settings, prefix=prefix, clock=self.clock
            )
        results = []
        for leaf in self.leaves:
            path = leaf.path.removeprefix(prefix)
            if not leaf.is_kernel or path == leaf.path:
                continue
            fmt = formats.get(path)
            results.append(LayerResult(leaf.path, None if fmt is None else fmt.name))
            if fmt is not None:
                insert(params, path, quantize(get_at(params, path), fmt, dtype=self.dtype))
        return BlockQuantized(params, results, [])

    def embed(self) -> list[Batch]:
        """Embedded samples in batches of one shape."""
        assert self.samples is not None
        tokens, valid = self.samples
        table = self.source.outer(EMBEDDING)
        rows = max(1, min(self.batch_tokens // tokens.shape[1], len(tokens)))
        spare = -len(tokens) % rows
        tokens = np.pad(tokens, ((0, spare), (0, 0)))
        valid = np.pad(valid, ((0, spare), (0, 0)))
        batches = []
        for i in range(0, len(tokens), rows):
            x = jnp.take(table, jnp.asarray(tokens[i : i + rows]), axis=0).astype(self.dtype)
            original = x if self.settings.corrects else None
            batches.append(Batch(x, jnp.asarray(valid[i : i + rows]), original))
        return batches

    def advance(
        self, index: int, params: Any, original: Any, batches: list[Batch]
    ) -> tuple[list[Batch], tuple[np.ndarray, np.ndarray]]:
        """Run all batches through a block; also the largest keys and values per head."""
        module, moved = self.module(index), []
        heads = jnp.zeros((self.config.num_kv_heads,), jnp.float32)
        top = (heads, heads)
        # Weights that only save memory stand dequantized: one structure for both models, so one
        # compilation, and large batches are what dequantizing once pays for.
        params = plain_weights(params)
        with self.clock.phase("forward"):
            for batch in batches:
                x, keys, values = run_block(module, params, batch.x, batch.valid)
                top = (jnp.maximum(top[0], keys), jnp.maximum(top[1], values))
                before = batch.original
                if before is not None:
                    before = run_block(module, original, before, batch.valid)[0]
                moved.append(Batch(x, batch.valid, before))
            self.clock.wait(moved)
        return moved, (np.asarray(top[0]), np.asarray(top[1]))

    def quantize_head(self, batches: list[Batch]) -> BlockQuantized:
        """The output projection, on the final norm's output."""
        fmt = self.formats[HEAD]
        assert fmt is not None
        weight = self.source.outer(HEAD, self.wide())
        if not batches:
            value = quantize(weight, fmt, dtype=self.dtype)
            return BlockQuantized({"kernel": value}, [LayerResult(HEAD, fmt.name)], [])
        norm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        variables = {"params": {"weight": self.source.outer(NORM)}}
        stats = init_hessian(weight.shape[0])
        for batch in batches:
            x = norm.apply(variables, batch.x)
            stats = update_hessian(stats, jnp.asarray(x), batch.valid)
        value, damping = round_kernel(weight, stats, fmt, self.settings, self.clock)
        result = LayerResult(
            HEAD,
            fmt.name,
            error_rtn=float(output_error(weight, quantize(weight, fmt).dequantize(), stats)),
            error=float(output_error(weight, value.dequantize(jnp.float32), stats)),
            damping=damping,
            tokens=int(stats.count),
        )
        return BlockQuantized({"kernel": value.astype(self.dtype)}, [result], [])

    def kv_scales(self, keys: list[np.ndarray], values: list[np.ndarray]) -> KVScales | None:
        name = self.settings.kv_dtype
        if name is None:
            return None

        def scale(layer: int, kind: str, absmax: np.ndarray) -> np.ndarray:
            # A head that only saw zeros gets its layer's largest scale; there is no default.
            if not absmax.max() > 0:
                raise ValueError(
                    f"layer {layer}: the calibration text gave only zeros as {kind}; use other "
                    "text, or leave --kv-cache-dtype out"
                )
            return (np.where(absmax > 0, absmax, absmax.max()) / bound(name)).astype(np.float32)

        return KVScales(
            tuple(scale(i, "keys", x) for i, x in enumerate(keys)),
            tuple(scale(i, "values", x) for i, x in enumerate(values)),
            name,
        )

    def assemble(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        """The whole parameter tree: finished pieces, and what no piece holds from the source."""
        params: dict[str, Any] = {}
        for path, piece in pieces.items():
            insert(params, path, piece)
        for leaf in self.leaves:
            if not any(leaf.path.startswith(f"{path}/") for path in pieces):
                insert(params, leaf.path, self.source.outer_view(leaf.path))
        return params

    def report(self, layers: list[LayerResult], learned: list[Any], params: Any) -> Report:
        fmt = self.settings.fmt
        valid = None if self.samples is None else self.samples[1]
        return Report(
            model=self.folder.name,
            method=self.settings.method + (" after rotation" if self.settings.rotate else ""),
            format=None if fmt is None else fmt.name,
            samples=0 if valid is None else len(valid),
            tokens=0 if valid is None else int(valid.sum()),
            layers=layers,
            learned=learned,
            bytes_before=self.source.nbytes,
            bytes_after=quantized_nbytes(params),
        )
