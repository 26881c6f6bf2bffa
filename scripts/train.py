"""Train a small Llama-type language model from scratch and save it in Hugging Face layout.

What it does: learns a byte-level BPE tokenizer from the text, encodes the text once, trains (Muon
for the matrices, Adam for the rest) until the budget is spent, and writes config.json,
model.safetensors (bfloat16) and the tokenizer, which transformers and qjax load. Given again, the
same command continues an interrupted run from its last checkpoint.

Examples:
  # ten minutes on whatever device there is
  python scripts/train.py --text books.txt --output-dir runs/tiny --max-seconds 600

  # a fixed number of updates, a validation text, a chosen size
  python scripts/train.py --text train.txt.xz --valid valid.txt --output-dir runs/books \\
      --hidden-size 384 --intermediate-size 1024 --num-layers 5 --max-steps 5000

  # quantization-aware fine-tuning for INT4: from GPTQ's result, with the original as teacher
  python scripts/quantize.py --model runs/books --method gptq --format int4 --text books.txt \\
      --output runs/books-gptq
  python scripts/train.py --text books.txt --init-from runs/books-gptq --teacher runs/books \\
      --qat int4 --output-dir runs/books-int4 --max-steps 500 --optimizer adamw \\
      --learning-rate 1e-4 --weight-decay 0

The learning rate warms up, then follows a cosine to zero over the budget (steps or seconds), so the
model is finished when the budget is. Choose the budget first: stopping early wastes the decay. A
resumed run may be given another budget. Ctrl-C (or SIGTERM) ends the update at hand and writes a
checkpoint; pressed twice it stops at once, and what followed the last checkpoint is lost.

The result of --qat is a quantized checkpoint in the folder quantized of the output, in any layout
that scripts/quantize.py writes; training may begin with what that script wrote. Text is UTF-8,
plain or .xz. The output folder holds the model, loss.png (needs matplotlib), history.json, and
under run/ the encoded text and the checkpoints, which may be deleted afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from qjax._device import end_process
from qjax.checkpoints.export import EXPORT_FORMATS, check_storable, save_model
from qjax.checkpoints.hf import LoadedModel, load_model
from qjax.formats import QuantFormat, parse_format
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.training.bpe import (
    BOS,
    EOS,
    check_vocab_size,
    load_or_encode,
    load_or_train_tokenizer,
    read_text,
)
from qjax.training.folder import RunFolder, copy_tokenizer, export_hf, plot_losses
from qjax.training.interrupt import wish_to_stop
from qjax.training.loop import (
    Teacher,
    TrainingCheckpoints,
    TrainingConfig,
    budget_used,
    init_state,
    make_train_step,
    mean_loss,
    train,
)
from qjax.training.qat import add_scales, apply_fake_quantized, quantize_trained

KV_TYPES = {"none": None, "fp8_e4m3": "float8_e4m3fn", "int8": "int8", "int4": "int4"}
SIZES = {
    "vocab_size": (4096, "tokenizer entries"),
    "hidden_size": (384, "width"),
    "intermediate_size": (1024, "MLP width"),
    "num_layers": (5, "decoder layers"),
    "num_heads": (6, "query heads"),
    "num_kv_heads": (2, "key/value heads"),
    "head_dim": (64, "features per head"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", required=True, help="training text, .txt or .xz")
    add("--valid", help="validation text; its perplexity is reported at the end")
    add("--output-dir", required=True, help="where the model goes; give it again to resume")
    add("--max-steps", type=int, help="budget in updates (resuming is exact)")
    add("--max-seconds", type=float, help="budget in seconds of training, over all sessions")
    add("--init-from", help="start from this model folder or hub id: its sizes, its tokenizer")
    for name, (default, what) in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, help=f"{what} (default {default})")
    add("--seq-len", type=int, default=512, help="context in tokens (default %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences per update (default %(default)s)")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="default %(default)s")
    add("--learning-rate", type=float, default=4e-3, help="peak (default %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="on matrices (default %(default)s)")
    add("--seed", type=int, default=0, help="of parameters and batches (default %(default)s)")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="compute dtype; parameters and optimizer stay float32 (default %(default)s)",
    )
    add("--qat", metavar="FORMAT", help="train for this format, such as int4_g32, w8a8_int8")
    add(
        "--qat-scales",
        choices=["learned", "range"],
        help="with --qat: scales that are trained too, or that cover each tile's range (default "
        "learned)",
    )
    add(
        "--qat-kv",
        choices=list(KV_TYPES),
        default="none",
        help="with --qat: also train for a KV cache of this type (default %(default)s)",
    )
    add("--teacher", help="model folder or hub id: learn its predictions instead of the text")
    add(
        "--export",
        choices=[name for name in EXPORT_FORMATS if name != "none"],
        help="with --qat: layout of the quantized model (default compressed-tensors)",
    )
    add("--checkpoint-seconds", type=float, default=300.0, help="default %(default)s")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> QuantFormat | None:
    """The format of --qat; refuses what would be ignored, and fills in the rest."""
    qat = None if args.qat is None else parse_format(args.qat)
    if args.qat is not None and qat is None:
        raise ValueError(f"--qat {args.qat} does not quantize; leave it out, or give int4 or so")
    if qat is None:
        given = {"qat-scales": args.qat_scales, "qat-kv": KV_TYPES[args.qat_kv]}
        for name, value in (given | {"export": args.export}).items():
            if value is not None:
                raise ValueError(f"--{name} goes with --qat FORMAT; give both or leave it out")
    if not args.checkpoint_seconds >= 0:
        raise ValueError(f"--checkpoint-seconds {args.checkpoint_seconds} must be 0 or more")
    args.qat_scales = args.qat_scales or "learned"
    args.export = args.export or "compressed-tensors"
    return qat


def load_initial(args: argparse.Namespace) -> LoadedModel | None:
    """The model of --init-from, in float32."""
    if args.init_from is None:
        return None
    if given := [name for name in SIZES if getattr(args, name) is not None]:
        raise ValueError(f"--init-from takes its sizes from the model; leave out {given}")
    loaded = load_model(args.init_from, dtype=jnp.float32)
    loaded.require_tokenizer()
    if loaded.method is not None and not (args.qat and args.qat_scales == "learned"):
        raise ValueError(
            f"{args.init_from} is quantized ({loaded.method}); use the original, or go on with "
            "--qat and learned scales"
        )
    if loaded.config.bos_token_id is None:
        raise ValueError(f"{args.init_from} has no bos_token_id, with which every row begins")
    if args.seq_len > loaded.config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {args.seq_len} exceeds the {loaded.config.max_position_embeddings} "
            "positions of the model"
        )
    return loaded


def new_config(args: argparse.Namespace) -> ModelConfig:
    """A Llama-type model of the given sizes."""
    sizes = {k: d if getattr(args, k) is None else getattr(args, k) for k, (d, _) in SIZES.items()}
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_layers"],
        num_q_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def load_teacher(args: argparse.Namespace, config: ModelConfig) -> Teacher | None:
    """The model of --teacher, which computes in its own type."""
    if args.teacher is None:
        return None
    loaded = load_model(args.teacher)
    if loaded.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"--teacher {args.teacher} has {loaded.config.vocab_size} tokens, the model "
            f"{config.vocab_size}; both must have one tokenizer"
        )
    if args.seq_len > loaded.config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {args.seq_len} exceeds the {loaded.config.max_position_embeddings} "
            f"positions of --teacher {args.teacher}"
        )

    def apply_fn(params, tokens, positions):
        return loaded.module.apply({"params": params}, tokens, positions)[0]

    return Teacher(apply_fn, loaded.params)


def export_model(
    args: argparse.Namespace, params: Any, config: ModelConfig, qat: QuantFormat | None
) -> Path:
    """Write the model; the quantized one of --qat in a folder of its own. Returns where."""
    out = Path(args.output_dir)
    if qat is None:
        export_hf(params, config, out)
        return out
    folder = out / "quantized"
    # In the type that plain training exports, with the scales' own.
    narrow = dataclasses.replace(config, dtype="bfloat16")
    trained = quantize_trained(params, qat, jnp.bfloat16)
    save_model(folder, narrow, trained, args.export, source=None, overwrite=True, progress=False)
    copy_tokenizer(out, folder)
    return folder


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    training = TrainingConfig(
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        max_steps=args.max_steps,
        max_seconds=args.max_seconds,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
    )
    qat = check_args(args)
    folder = RunFolder(args.output_dir)
    with folder.sole_run():
        run(args, training, qat, folder)


def run(
    args: argparse.Namespace, training: TrainingConfig, qat: QuantFormat | None, folder: RunFolder
) -> None:
    """Train, in a folder that is this process's alone."""
    # Every input is read before any work is done.
    text = read_text(args.text)
    valid_text = read_text(args.valid) if args.valid else None
    initial = load_initial(args)
    config = new_config(args) if initial is None else initial.config
    teacher = load_teacher(args, config)
    start = None if initial is None else initial.params
    if qat is not None and args.qat_scales == "learned":
        if start is None:
            raise ValueError(
                "--qat with learned scales begins with a trained model: give --init-from, or use "
                "--qat-scales range"
            )
        start = add_scales(start, qat)
    if initial is None:
        check_vocab_size(config.vocab_size)  # before the settings bind the folder
    out = folder.directory
    settings = {"model": config.to_hf(), "dtype": args.dtype, "qat": args.qat}
    settings |= {"init_from": args.init_from, "text_crc32": zlib.crc32(text.encode())}
    if qat is not None:
        settings |= {"qat_scales": args.qat_scales, "qat_kv": args.qat_kv}
    if teacher is not None:
        settings |= {"teacher": args.teacher}
    folder.check_settings(settings, training)

    if initial is not None:
        copy_tokenizer(initial.folder, out)
    tokenizer = load_or_train_tokenizer(out, text, config.vocab_size, model_max_length=args.seq_len)
    if initial is None:
        bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        config = dataclasses.replace(config, bos_token_id=bos, eos_token_ids=(eos,))
    bos = config.bos_token_id
    assert bos is not None
    tokens = load_or_encode(folder.run, tokenizer, text)
    valid = None if valid_text is None else load_or_encode(folder.run, tokenizer, valid_text)
    del text
    # Now, and not after hours of training.
    for flag, ids in (("text", tokens), ("valid", valid)):
        if ids is not None and len(ids) < args.seq_len:
            raise ValueError(
                f"--{flag} {getattr(args, flag)} has {len(ids)} tokens, fewer than --seq-len "
                f"{args.seq_len}; give more text or shorter sequences"
            )

    module = Decoder(config, dtype=jnp.dtype(args.dtype))

    def apply_fn(params, tokens, positions):
        if qat is not None:
            kv = KV_TYPES[args.qat_kv]
            return apply_fake_quantized(module, params, qat, tokens, positions, kv_qtype=kv)[0]
        return module.apply({"params": params}, tokens, positions)[0]

    checkpoints = TrainingCheckpoints(folder.run / "checkpoints")
    fresh = init_state(module, training, start)
    if qat is not None:  # the same command with another --export goes on in this folder
        trained = quantize_trained(fresh.params, qat, jnp.bfloat16)
        check_storable(dataclasses.replace(config, dtype="bfloat16"), trained, args.export)
        del trained
    state = checkpoints.restore(fresh) or fresh
    history = folder.load_history(state.step)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
        f"{size / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M training tokens, "
        f"{jax.default_backend()}; starting after step {state.step}",
        file=sys.stderr,
    )

    step_fn = make_train_step(apply_fn, training, teacher)
    saved = time.monotonic()
    bar = tqdm(total=1000, bar_format="{l_bar}{bar}| {elapsed}{postfix}", file=sys.stderr)
    window_tokens, window_start, shown = 0, time.monotonic(), float("nan")
    updates = train(state, step_fn, tokens, training, bos_id=bos)
    with wish_to_stop() as stopping:
        for state, metrics in updates:
            history.append((metrics.step * metrics.tokens, metrics.loss))
            shown = metrics.loss if math.isnan(shown) else 0.95 * shown + 0.05 * metrics.loss
            window_tokens += metrics.tokens
            now = time.monotonic()
            if now - window_start > 5:
                rate = window_tokens / (now - window_start)
                window_tokens, window_start = 0, now
                bar.n = min(1000, int(1000 * metrics.progress))
                bar.set_postfix_str(f"step {metrics.step}, loss {shown:.3f}, {rate:,.0f} tokens/s")
            if stopping():
                break
            if now - saved > args.checkpoint_seconds:
                # History first: what it has beyond a checkpoint is cut off, a gap stays.
                folder.save_history(history)
                checkpoints.save(state)
                export_model(args, state.params, config, qat)  # the model so far can be tried
                saved = now
        interrupted = stopping() and budget_used(training, state.step, state.elapsed) < 1
    bar.close()
    folder.save_history(history)
    checkpoints.save(state)
    checkpoints.close()
    if interrupted:
        raise KeyboardInterrupt(
            f"interrupted after step {state.step}; the same command goes on from there"
        )

    where = export_model(args, state.params, config, qat)
    print(f"{state.step} updates in {state.elapsed:.0f} s; model written to {where}")
    if valid is not None:
        loss, count = mean_loss(apply_fn, state.params, valid, training, bos_id=bos)
        print(f"validation: {count} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    try:
        plot_losses(history, out / "loss.png")
    except ImportError as error:
        print(f"no loss.png: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as error:
        print(f"train.py: {error or 'interrupted; the last checkpoint stays'}", file=sys.stderr)
        end_process(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
