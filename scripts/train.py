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

The learning rate warms up, then follows a cosine to zero over the budget (steps or seconds), so the
model is finished when the budget is. Choose the budget first: stopping early wastes the decay.
Text is UTF-8, plain or .xz. The output folder holds the model, loss.png (needs matplotlib),
history.json, and under run/ the encoded text and the checkpoints, which may be deleted afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.training.bpe import BOS, EOS, load_or_encode, load_or_train_tokenizer, read_text
from qjax.training.folder import RunFolder, export_hf, plot_losses
from qjax.training.loop import (
    TrainingCheckpoints,
    TrainingConfig,
    init_state,
    make_train_step,
    mean_loss,
    train,
)


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
    add("--vocab-size", type=int, default=4096, help="tokenizer entries (default %(default)s)")
    add("--hidden-size", type=int, default=384, help="width (default %(default)s)")
    add("--intermediate-size", type=int, default=1024, help="MLP width (default %(default)s)")
    add("--num-layers", type=int, default=5, help="decoder layers (default %(default)s)")
    add("--num-heads", type=int, default=6, help="query heads (default %(default)s)")
    add("--num-kv-heads", type=int, default=2, help="key/value heads (default %(default)s)")
    add("--head-dim", type=int, default=64, help="features per head (default %(default)s)")
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
    add("--checkpoint-seconds", type=float, default=300.0, help="default %(default)s")
    return parser.parse_args(argv)


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
    config = ModelConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_layers=args.num_layers,
        num_q_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    # Every input is read before any work is done.
    text = read_text(args.text)
    valid_text = read_text(args.valid) if args.valid else None
    folder = RunFolder(args.output_dir)
    folder.check_settings({"model": config.to_hf(), "dtype": args.dtype}, training)

    out = Path(args.output_dir)
    tokenizer = load_or_train_tokenizer(out, text, args.vocab_size, model_max_length=args.seq_len)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    config = dataclasses.replace(config, bos_token_id=bos, eos_token_ids=(eos,))
    tokens = load_or_encode(folder.run / "train.npy", tokenizer, text)
    valid = None
    if valid_text is not None:
        valid = load_or_encode(folder.run / "valid.npy", tokenizer, valid_text)
    del text

    module = Decoder(config, dtype=jnp.dtype(args.dtype))

    def apply_fn(params, tokens, positions):
        return module.apply({"params": params}, tokens, positions)[0]

    checkpoints = TrainingCheckpoints(folder.run / "checkpoints")
    fresh = init_state(module, training)
    state = checkpoints.restore(fresh) or fresh
    history = folder.load_history(state.step)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
        f"{size / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M training tokens, "
        f"{jax.default_backend()}; starting after step {state.step}",
        file=sys.stderr,
    )

    step_fn = make_train_step(apply_fn, training)
    saved = time.monotonic()
    bar = tqdm(total=1000, bar_format="{l_bar}{bar}| {elapsed}{postfix}", file=sys.stderr)
    window_tokens, window_start, shown = 0, time.monotonic(), float("nan")
    updates = train(state, step_fn, tokens, training, bos_id=bos)
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
        if now - saved > args.checkpoint_seconds:
            checkpoints.save(state)
            folder.save_history(history)
            export_hf(state.params, config, out)  # the model so far can be tried
            saved = now
    bar.close()
    checkpoints.save(state)
    checkpoints.close()
    folder.save_history(history)

    export_hf(state.params, config, out)
    print(f"{state.step} updates in {state.elapsed:.0f} s; model written to {out}")
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
    except ValueError as error:
        sys.exit(f"error: {error}")
