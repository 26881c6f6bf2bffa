from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.hf import load_model
from qjax.formats import parse_format
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.quantize import quantize_tree
from qjax.sampling import SamplingParams
from qjax.serving import Engine, EngineConfig, Request
from qjax.serving.pages import PageTable
from qjax.serving.scheduler import Scheduler, Task, chunk_length, rows_at

WEIGHTS = ("none", "fp8", "fp8_e5m2", "int8", "int4_g32", "w8a8_fp8", "w8a8_int8")
KV = ("bf16", "fp8_e5m2", "fp8_e4m3", "int8", "int4")
VOCAB = 96
ANNOUNCED: list[str] = []
SIZES = dict(max_running_requests=3, max_model_len=64, page_size=8, chunked_prefill_size=16)


def make_engine(
    weights: tuple[str, ...],
    kv: tuple[KVFormat, ...],
    on_compile: Callable[[str], None] | None = None,
    **sizes: Any,
) -> tuple[Engine, Any]:
    """An engine on a random model whose layer i has weights[i] and kv[i]; and its parameters."""
    model = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_layers=len(weights),
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_ids=(1, 2, 3),
    )
    module = Decoder(model, dtype=jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Large enough for tokens that differ from step to step; norm weights near one.
        spread = rng.normal(size=leaf.shape) * (0.15 if leaf.ndim == 2 else 0.1)
        return jnp.asarray(spread + (leaf.ndim == 1), jnp.float32)

    params = jax.tree.map(values, shapes["params"])
    rules = {f"model/layers_{i}/.*kernel": parse_format(w) for i, w in enumerate(weights)}
    params = quantize_tree(params, rules)
    config = EngineConfig(**{**SIZES, **sizes})
    return Engine(module, params, config, kv, on_compile=on_compile), params


def kv_of(*names: str) -> tuple[KVFormat, ...]:
    return tuple(parse_kv_format(name, model_dtype=jnp.float32) for name in names)


@functools.cache
def plain_engine() -> tuple[Engine, Any]:
    """Unquantized, and with pages for less than three longest sequences, so that requests wait."""
    return make_engine(("none", "none"), kv_of("auto", "auto"), ANNOUNCED.append, num_pages=12)


def requests(**settings: Any) -> list[Request]:
    """More prompts than slots; shorter and longer than a page and than a prefill chunk."""
    rng = np.random.default_rng(1)
    sizes = [(3, 20), (17, 12), (1, 30), (33, 9), (16, 1), (7, 25), (40, 24)]
    return [
        Request(
            tuple(rng.integers(4, VOCAB, n).tolist()),
            dataclasses.replace(SamplingParams(max_new_tokens=new, seed=n), **settings),
        )
        for n, new in sizes
    ]


def assert_independent_of_batch(engine: Engine, work: list[Request]) -> None:
    """Continuously batched, in reverse order, and one by one: the same tokens."""
    together = [c.token_ids for c in engine.generate(work)]
    reverse = [c.token_ids for c in engine.generate(work[::-1])]
    alone = [engine.generate([request])[0].token_ids for request in work]
    assert together == alone
    assert together == reverse[::-1]
    assert len({t for tokens in together for t in tokens}) > 10, (
        "a model that always says one thing"
    )


@pytest.mark.parametrize(
    "shift", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(KV)))]
)
def test_every_weight_format_and_kv_type_is_independent_of_the_batch(shift):
    """Another weight format and KV type in every layer; all shifts together make all pairs."""
    kv = kv_of(*(KV[(i + shift) % len(KV)] for i in range(len(WEIGHTS))))
    assert_independent_of_batch(make_engine(WEIGHTS, kv)[0], requests(ignore_eos=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_independent_of_the_batch_with_early_ends(temperature):
    assert_independent_of_batch(plain_engine()[0], requests(temperature=temperature, top_p=0.95))


def test_greedy_equals_the_forward_pass_without_a_cache():
    engine, params = plain_engine()
    module = Decoder(ModelConfig.from_hf(engine_config(engine)), dtype=jnp.float32)
    forward = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0])
    for request, completion in zip(requests(), engine.generate(requests()), strict=True):
        known = [*request.prompt, *completion.token_ids]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(known)] = known
        logits = np.asarray(forward(jnp.asarray(padded)))[0]
        start = len(request.prompt) - 1
        expected = logits[start : len(known) - 1].argmax(-1).tolist()
        assert list(completion.token_ids) == expected


def engine_config(engine: Engine) -> dict[str, Any]:
    return engine.module.config.to_hf()


def test_a_trained_model_continues_as_transformers_does(shared_data):
    """Prompts cut from one greedy text at different places, all running at once."""
    folder = shared_data / "tinystories-656k-llama-hf"
    reference = np.load(folder / "reference_hf_transformers_fp32.npz")
    known, first = reference["greedy_ids"].tolist(), int(reference["prompt_len"])
    model = load_model(folder, dtype="float32", progress=False)
    sizes = EngineConfig(max_running_requests=3, max_model_len=192, chunked_prefill_size=16)
    engine = Engine(model.module, model.params, sizes, kv_of("auto")[0])
    cuts = [first, first + 1, 40, 77, 140]
    work = [Request(known[:n], SamplingParams(max_new_tokens=len(known) - n)) for n in cuts]
    for n, completion in zip(cuts, engine.generate(work), strict=True):
        assert list(completion.token_ids) == known[n:]


def test_finish_reasons_and_streaming():
    engine, _ = plain_engine()
    streamed: dict[int, list[int]] = {}
    reasons: dict[int, list[str | None]] = {}
    order = []

    def on_tokens(request_id: int, tokens: list[int], reason: str | None) -> None:
        streamed.setdefault(request_id, []).extend(tokens)
        reasons.setdefault(request_id, []).append(reason)

    work = requests()
    done = engine.generate(work, on_tokens=on_tokens, on_finish=lambda c: order.append(c))
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for request, completion in zip(work, done, strict=True):
        tokens = list(completion.token_ids)
        assert completion.prompt_tokens == len(request.prompt)
        assert streamed[completion.request_id] == tokens
        *before, last = reasons[completion.request_id]
        assert last == completion.finish_reason and set(before) <= {None}
        ended = tokens[-1] in (1, 2, 3)
        assert (completion.finish_reason == "stop") == ended
        assert not set(tokens[:-1]) & {1, 2, 3}
        if not ended:
            assert len(tokens) == request.params.max_new_tokens
    assert sorted(c.request_id for c in order) == [c.request_id for c in done]


def test_ignore_eos_goes_on():
    engine, _ = plain_engine()
    for request, completion in zip(
        requests(ignore_eos=True), engine.generate(requests(ignore_eos=True)), strict=True
    ):
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == request.params.max_new_tokens


def test_slots_and_pages_come_back_and_nothing_is_compiled_twice():
    engine, _ = plain_engine()
    engine.generate(requests())
    programs, free = engine.stats.programs, engine.free_pages
    assert free == engine.config.total_pages
    engine.generate(requests(temperature=0.5, top_k=7))
    assert (engine.stats.programs, engine.free_pages) == (programs, free)


def test_statistics_count_tokens():
    engine, _ = plain_engine()
    prefill, decoded = engine.stats.prefill_tokens, engine.stats.decode_tokens
    done = engine.generate(requests())
    assert engine.stats.prefill_tokens - prefill == sum(c.prompt_tokens for c in done)
    # The first token of each comes out of its prefill.
    assert engine.stats.decode_tokens - decoded == sum(len(c.token_ids) - 1 for c in done)
    assert engine.stats.prefill_rate > 0 and engine.stats.decode_rate > 0


def test_requests_can_be_added_while_others_run():
    engine, _ = plain_engine()
    work = requests(ignore_eos=True)
    expected = [c.token_ids for c in engine.generate(work)]
    found = {}
    ids = []
    for request in work:
        ids.append(engine.submit(request))
        found.update({c.request_id: c.token_ids for c in engine.step()})
    while engine.has_work:
        found.update({c.request_id: c.token_ids for c in engine.step()})
    assert [found[i] for i in ids] == expected


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ((), 4, "request 1: the prompt is empty"),
        ((5,) * 61, 4, "61 tokens and max_new_tokens=4.*max_model_len=64"),
        ((5, VOCAB), 4, r"span 5\.\.96; the model's vocabulary is 0\.\.95"),
        ((5, -1), 4, r"span -1\.\.5"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(prompt, new, message):
    engine, _ = plain_engine()
    passes = engine.stats.prefill_passes
    good = Request((5, 6), SamplingParams(max_new_tokens=1))
    with pytest.raises(ValueError, match=message):
        engine.generate([good, Request(prompt, SamplingParams(max_new_tokens=new))])
    assert engine.stats.prefill_passes == passes and not engine.has_work


def test_compiling_is_announced_once():
    plain_engine()[0].generate(requests())
    assert ANNOUNCED == ["prefill of 3 x 16 tokens", "decode"]


def test_logits_that_are_not_finite_are_an_error():
    engine, params = plain_engine()
    bad = dict(params, model=dict(params["model"], norm={"weight": jnp.full((64,), jnp.nan)}))
    broken = Engine(engine.module, bad, engine.config, kv_of("auto", "auto"))
    broken._compiled = engine._compiled  # same shapes
    with pytest.raises(FloatingPointError, match="request 0: logits are not finite"):
        broken.generate(requests()[:1])


def test_only_the_request_with_logits_that_are_not_finite_fails():
    engine, params = plain_engine()
    model = dict(params["model"])
    table = model["embed_tokens"]["embedding"]
    model["embed_tokens"] = {"embedding": table.at[5].set(jnp.nan)}
    broken = Engine(engine.module, dict(params, model=model), engine.config, kv_of("auto", "auto"))
    broken._compiled = engine._compiled
    work = [Request([t for t in r.prompt if t != 5] or [6], r.params) for r in requests()]
    want = [c.token_ids for c in engine.generate(work)]
    bad = Request((8, 9, 5), SamplingParams(max_new_tokens=40))
    ids = [broken.submit(r) for r in (work[0], bad, *work[1:])]
    ended: dict[int, Any] = {}
    while broken.has_work:
        ended |= {c.request_id: c for c in broken.step()}
    failed = ended.pop(ids[1])
    assert failed.finish_reason == "error" and failed.token_ids == ()
    assert "logits are not finite after 0 new tokens" in failed.error
    for completion, tokens in zip((ended[i] for i in ids if i in ended), want, strict=True):
        if 5 in tokens[:-1]:  # it chose the broken token itself
            assert completion.finish_reason == "error"
        else:
            assert completion.token_ids == tokens
    assert sum(c.error is None for c in ended.values()) > 3
    assert broken.free_pages == 12


@pytest.mark.parametrize("sharing", [False, True])
def test_cancelled_requests_free_slot_and_pages_and_change_nothing(sharing):
    plain, params = plain_engine()
    config = dataclasses.replace(plain.config, prefix_cache=sharing)
    engine = Engine(plain.module, params, config, kv_of("auto", "auto"))
    if not sharing:
        engine._compiled = plain._compiled
    work = requests(ignore_eos=True)
    want = [c.token_ids for c in plain.generate(work)]
    long = Request((7,) * 20, SamplingParams(max_new_tokens=40, ignore_eos=True))
    ids = [engine.submit(r) for r in (long, work[0], long, *work[1:])]
    ended = {c.request_id: c.token_ids for c in engine.step()}
    running, waiting = engine.num_running, engine.num_waiting
    free = engine.free_pages
    assert running and waiting and ids[0] not in ended and ids[2] not in ended
    assert engine.cancel(ids[0]) and not engine.cancel(ids[0])
    assert (engine.num_running, engine.num_waiting) == (running - 1, waiting)
    assert engine.free_pages > free
    assert engine.cancel(ids[2]) and engine.cancel(ids[-1])
    assert not engine.cancel(99)
    while engine.has_work:
        ended |= {c.request_id: c.token_ids for c in engine.step()}
    assert [ended[i] for i in (ids[1], *ids[3:-1])] == want[:-1]
    assert len(ended) == len(work) - 1 and engine.free_pages == 12


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(max_model_len=256), "max_model_len=256 exceeds.*max_position_embeddings=128"),
        (dict(num_pages=7), "num_pages=7 must hold one longest sequence, pages_per_seq=8"),
        (dict(chunked_prefill_size=8), "chunked_prefill_size=8 must be at least 16"),
        (dict(max_running_requests=0), "max_running_requests=0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_engine(("none",), kv_of("auto"), **sizes)


def test_chunk_lengths_are_few_and_depend_on_the_prompt_alone():
    assert [chunk_length(n, 128) for n in (1, 16, 17, 64, 65, 500)] == [16, 16, 32, 64, 128, 128]
    assert chunk_length(40, 48) == 48
    assert [rows_at(length, 4, 8) for length in (16, 32, 64, 256)] == [4, 2, 1, 1]
    assert rows_at(16, 16, 8) == 8


def test_first_come_first_served():
    """A long request at the head is not overtaken by short ones that would fit."""
    pages = PageTable(num_pages=8, page_size=4, max_seqs=3, pages_per_seq=8)
    scheduler = Scheduler(pages, 3, 256)
    for i, new in enumerate([15, 27, 3]):
        scheduler.waiting.append(Task(i, Request((1,), SamplingParams(max_new_tokens=new))))
    (first,) = scheduler.admit()
    assert first.request_id == 0 and scheduler.admit() == []
    scheduler.finish(first, "stop")
    assert [t.request_id for t in scheduler.admit()] == [1, 2]
    assert pages.free_pages == 0


def test_page_table_gives_every_page_once():
    pages = PageTable(num_pages=6, page_size=4, max_seqs=3, pages_per_seq=4)
    pages.reserve(0, 9)
    pages.reserve(2, 4)
    held = pages.table[pages.table < 6]
    assert len(held) == len(set(held)) == 4 and pages.free_pages == 2
    assert not pages.fits(9) and pages.fits(8)
    with pytest.raises(ValueError, match="length=9 needs 3 pages, 0 of them shared; 2 are free"):
        pages.reserve(1, 9)
    with pytest.raises(ValueError, match="slot=0 still holds pages"):
        pages.reserve(0, 1)
    pages.release(0)
    assert pages.free_pages == 5 and (pages.table[0] == 6).all()
    pages.reserve(1, 16)
    assert sorted(pages.table[1]) != sorted(pages.table[2]) and pages.free_pages == 1
