"""Continuous batching: prompts stream through a fixed number of slots.

::

    submit -> waiting -> [slot 0 | slot 1 | ... ] -> completion
                admit when a slot and all pages   \\ frees both at once
                the request can need are free

``step`` fills free slots, runs prefill passes until every admitted prompt is in the cache, then one
block of decode steps. All programs have fixed shapes: the batch is always ``max_running_requests``
rows, idle rows are masked, and prompts are cut into chunks by their own length alone. So what a
request gets does not depend on what else is in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qjax._compat import compile_lowered
from qjax._device import compiler_options
from qjax.generate import DecodeState, PrefillBatch, activation_qtype, decode, prefill
from qjax.kv_cache import QuantizedKVCache, StaticScales
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.sampling import SamplingArrays, SamplingParams
from qjax.serving.devices import Devices
from qjax.serving.pages import PageTable, pages_for
from qjax.serving.prefix import PrefixCache
from qjax.serving.scheduler import MIN_CHUNK, Request, Scheduler, Task, chunk_at, rows_at

OnTokens = Callable[[int, list[int], str | None], None]
"""Called with request id, new tokens, and the finish reason once there is one."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine, all fixed when it is built.

    Attributes:
      max_running_requests: Slots: sequences that run at the same time.
      max_model_len: Longest prompt plus continuation, in tokens.
      page_size: Tokens per KV cache page.
      num_pages: Pages of the pool; None for enough to fill all slots with longest sequences.
      chunked_prefill_size: Prompts are put into the cache in chunks of at most so many tokens.
      prefill_rows: Prompts of up to 16 tokens that share one prefill pass; longer chunks share it
        with proportionally fewer. None for 16 on GPUs, where a pass over few tokens costs what
        reading the weights costs, and 4 on CPUs, where every token costs time.
      decode_block: Decode steps between two looks of the host at the results.
      prefix_cache: Share the full pages of prompts that begin with the same tokens, also with
        requests that have ended, as long as nobody needs the room. Results are the same to the bit;
        time is saved chunk by chunk of ``chunked_prefill_size``.
      kv_counters: Keep the KV cache's counters and largest magnitudes. They are kept in any case
        where values can be clipped, which is where scales are static.

    Raises:
      ValueError: If a size is out of range.
    """

    max_running_requests: int = 8
    max_model_len: int = 2048
    page_size: int = 64
    num_pages: int | None = None
    chunked_prefill_size: int = 256
    prefill_rows: int | None = None
    decode_block: int = 16
    prefix_cache: bool = False
    kv_counters: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")
        if self.chunked_prefill_size < MIN_CHUNK:
            raise ValueError(
                f"chunked_prefill_size={self.chunked_prefill_size} must be at least {MIN_CHUNK}"
            )

    @property
    def pages_per_seq(self) -> int:
        """Pages of a longest sequence."""
        return pages_for(self.max_model_len, self.page_size)

    @property
    def total_pages(self) -> int:
        """Pages of the pool."""
        full = self.max_running_requests * self.pages_per_seq
        return full if self.num_pages is None else self.num_pages


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of a request.

    Attributes:
      request_id: Its number, in order of submission.
      token_ids: Generated tokens; the last is the end-of-sequence token if ``stop``.
      finish_reason: ``stop`` (end-of-sequence token), ``length`` (``max_new_tokens``) or ``error``.
      prompt_tokens: Tokens of the prompt.
      error: Why it could not go on, with ``error``.
    """

    request_id: int
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    error: str | None = None


@dataclasses.dataclass
class EngineStats:
    """Running totals. Times are the host's, around programs it waits for; compiling is apart.

    ``reused_tokens`` are prompt tokens that the prefix cache had; ``prefill_tokens`` the others.
    """

    prefill_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    prefill_passes: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_blocks: int = 0
    compile_seconds: float = 0.0
    programs: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second; each prompt's first token counts as prefill."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Engine:
    """Generates continuations for any number of requests.

    Attributes:
      config: Sizes.
      cache: The KV cache; its saturation counters can be read at any time between steps.
      stats: Totals since construction.
      module: The decoder.
      params: Its parameters.
      devices: What lies on which device.
      next_id: Id that the next submitted request gets.
    """

    def __init__(
        self,
        module: Any,
        params: Mapping[str, Any],
        config: EngineConfig,
        kv_format: KVFormat | Sequence[KVFormat],
        *,
        static_scales: StaticScales | None = None,
        eos_ids: Sequence[int] | None = None,
        on_compile: Callable[[str], None] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Allocate the cache. Programs are compiled when they are first needed.

        Args:
          module: A ``Decoder``.
          params: Its parameters; kernels may be quantized.
          config: Sizes.
          kv_format: Format of the KV cache, one or one per layer.
          static_scales: Scales of layers whose format is static.
          eos_ids: End-of-sequence tokens; those of the model's configuration if None.
          on_compile: Called with the name of a program that is about to be compiled, which may
            take many seconds.
          mesh: The devices over which ``load_model(mesh=...)`` cut the model, which compute
            together, each its part; see ``qjax.models.sharding``.

        Raises:
          ValueError: If ``max_model_len`` is longer than the model was made for, or sizes and
            formats do not fit together, or the model cannot be cut over the mesh.
        """
        model: ModelConfig = module.config
        if config.max_model_len > model.max_position_embeddings:
            raise ValueError(
                f"max_model_len={config.max_model_len} exceeds the model's "
                f"max_position_embeddings={model.max_position_embeddings}; lower it"
            )
        self.config = config
        self.stats = EngineStats()
        self.module = module
        self.params = params
        self._eos_ids = tuple(model.eos_token_ids if eos_ids is None else eos_ids)
        self._vocab_size = model.vocab_size
        slots = config.max_running_requests
        self._pages = PageTable(config.total_pages, config.page_size, slots, config.pages_per_seq)
        self._prefixes = PrefixCache(self._pages) if config.prefix_cache else None
        self._scheduler = Scheduler(self._pages, slots, config.chunked_prefill_size, self._prefixes)
        self.devices = devices = Devices(params, model, mesh)
        self.cache: QuantizedKVCache = devices.new_cache(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            num_pages=config.total_pages,
            page_size=config.page_size,
            max_seqs=slots,
            pages_per_seq=config.pages_per_seq,
            fmt=kv_format,
            static_scales=static_scales,
            share_pages=config.prefix_cache,
            counted=config.kv_counters or static_scales is not None,
        )
        self._state: DecodeState = devices.put(DecodeState.init(slots))
        self.next_id = 0
        self._on_gpu = on_gpu = jax.devices()[0].platform == "gpu"
        self._prefill_rows = config.prefill_rows or (16 if on_gpu else 4)
        self._on_compile = on_compile
        self._compiler_options = compiler_options(activation_qtype(params))
        self._compiled: dict[str, Callable[..., Any]] = {}
        apply = module.clone(parallel=devices.parallel).apply
        self._prefill = devices.program(
            functools.partial(prefill, apply, self._eos_ids), self.cache
        )
        self._decode = {
            greedy: devices.program(
                functools.partial(
                    decode, apply, self._eos_ids, config.decode_block, on_gpu, greedy
                ),
                self.cache,
            )
            for greedy in (False, True)
        }

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    @property
    def free_pages(self) -> int:
        """KV cache pages that no request holds."""
        idle = 0 if self._prefixes is None else self._prefixes.idle_pages
        return self._pages.free_pages + idle

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return sum(task is not None for task in self._scheduler.running)

    def check(self, request: Request) -> None:
        """Raise what ``submit`` would raise, without submitting.

        Raises:
          ValueError: If the request cannot run in this engine.
        """
        prompt, new = len(request.prompt), request.params.max_new_tokens
        if prompt == 0:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if request.total > self.config.max_model_len:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_new_tokens={new}: together more than "
                f"max_model_len={self.config.max_model_len}; shorten the prompt, lower "
                "max_new_tokens or raise max_model_len"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocab_size:
            raise ValueError(
                f"prompt tokens span {min(request.prompt)}..{max(request.prompt)}; the model's "
                f"vocabulary is 0..{self._vocab_size - 1}"
            )

    def submit(self, request: Request) -> int:
        """Put a request in the waiting line; returns its id.

        Raises:
          ValueError: If the request cannot run in this engine.
        """
        self.check(request)
        task = Task(self.next_id, request)
        self.next_id += 1
        self._scheduler.submit(task)
        return task.request_id

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_tokens: OnTokens | None = None,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Run requests to their end.

        Args:
          requests: The requests; all are checked before any runs.
          on_tokens: Called for new tokens, after every prefill pass and decode block.
          on_finish: Called with every completion, in the order in which they finish.

        Returns:
          Completions in the order of ``requests``.

        Raises:
          ValueError: If a request cannot run, with its index.
          FloatingPointError: If the model's logits stop being finite. Requests that have not ended
            are then lost, and the engine should be thrown away.
        """
        for index, request in enumerate(requests):
            try:
                self.check(request)
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from None
        ids = [self.submit(request) for request in requests]
        finished: dict[int, Completion] = {}
        while self.has_work:
            for completion in self.step(on_tokens):
                if completion.error is not None:
                    raise FloatingPointError(completion.error)
                finished[completion.request_id] = completion
                if on_finish is not None:
                    on_finish(completion)
        return [finished[i] for i in ids]

    def step(self, on_tokens: OnTokens | None = None) -> list[Completion]:
        """Fill free slots, prefill what was admitted, and run one decode block.

        Returns:
          Completions of the requests which ended. One whose logits stop being finite ends with
          ``error``; the others do not notice.
        """
        scheduler = self._scheduler
        finished: list[Completion] = []
        scheduler.admit()
        while True:
            length, tasks = scheduler.next_chunks(self._prefill_rows)
            if not tasks:
                break
            if scheduler.table_changed:
                cache = self.cache.with_page_table(self._pages.table)
                table = self.devices.put(cache.page_table)
                self.cache = dataclasses.replace(cache, page_table=table)
                scheduler.table_changed = False
            for task, token in self._run_prefill(length, tasks):
                self._record(task, [token], finished, on_tokens)
        running = [task for task in scheduler.running if task]
        if running:
            tokens = self._run_decode(scheduler.decode_steps(self.config.decode_block), running)
            for task in running:
                row = tokens[task.slot]
                self._record(task, row[row >= 0].tolist(), finished, on_tokens)
        return finished

    def _record(
        self,
        task: Task,
        tokens: list[int],
        finished: list[Completion],
        on_tokens: OnTokens | None,
    ) -> None:
        params = task.request.params
        reason = None
        if task.error is not None:
            tokens, reason = [], "error"
            self._deactivate(task)
        elif not params.ignore_eos and tokens[-1] in self._eos_ids:
            reason = "stop"
        elif task.remaining == len(tokens):
            reason = "length"
        task.tokens.extend(tokens)
        if reason is not None:
            self._scheduler.finish(task, reason)
            length = len(task.request.prompt)
            finished.append(
                Completion(task.request_id, tuple(task.tokens), reason, length, task.error)
            )
        if on_tokens is not None:
            on_tokens(task.request_id, tokens, reason)

    def cancel(self, request_id: int) -> bool:
        """Take a request out, between two steps: its slot and pages are free at once.

        Returns:
          Whether it was there; False if it has ended.
        """
        task = self._scheduler.find(request_id)
        if task is None:
            return False
        self._deactivate(task)
        self._scheduler.withdraw(task)
        return True

    def _deactivate(self, task: Task) -> None:
        """Tell the device that a slot generates no more, before its pages go to others."""
        if task.slot is not None:
            active = np.array(self._state.active)
            active[task.slot] = False
            self._state = dataclasses.replace(self._state, active=self.devices.put(active))

    def _run_prefill(self, length: int, tasks: list[Task]) -> list[tuple[Task, int]]:
        """One prefill pass; returns the tasks whose prompt is complete with their first token."""
        rows = rows_at(length, self._prefill_rows, self.config.max_running_requests)
        tokens = np.zeros((rows, length), np.int32)
        starts, counts, limits = (np.zeros(rows, np.int32) for _ in range(3))
        # Rows not needed name a slot that does not exist: each slot may occur only once.
        slots = np.full(rows, self.config.max_running_requests, np.int32)
        first, last, stops = (np.zeros(rows, bool) for _ in range(3))
        params = [task.request.params for task in tasks]
        for row, task in enumerate(tasks):
            assert task.slot is not None
            prompt, start = task.request.prompt, task.prefilled
            _, end = chunk_at(start, len(prompt), self.config.chunked_prefill_size)
            tokens[row, : end - start] = prompt[start:end]
            starts[row], counts[row] = start, end - start
            slots[row], limits[row] = task.slot, params[row].max_new_tokens
            first[row], last[row] = not task.started, end == len(prompt)
            stops[row] = not params[row].ignore_eos
        batch = PrefillBatch(
            tokens=jnp.asarray(tokens),
            starts=jnp.asarray(starts),
            counts=jnp.asarray(counts),
            slots=jnp.asarray(slots),
            first=jnp.asarray(first),
            last=jnp.asarray(last),
            limits=jnp.asarray(limits),
            stops=jnp.asarray(stops),
            sampling=SamplingArrays.of(params + [SamplingParams()] * (rows - len(tasks))),
        )
        chosen, seconds = self._call(
            f"prefill of {rows} x {length} tokens", self._prefill, batch, tasks
        )
        self.stats.reused_tokens += sum(task.reused for task in tasks if not task.started)
        for row, task in enumerate(tasks):
            self._scheduler.chunk_done(task, int(starts[row] + counts[row]))
        self.stats.prefill_seconds += seconds
        self.stats.prefill_tokens += int(counts.sum())
        self.stats.prefill_passes += 1
        return [(task, int(chosen[row])) for row, task in enumerate(tasks) if last[row]]

    def _run_decode(self, steps: int, running: list[Task]) -> np.ndarray:
        """One decode block; returns int32 ``(slots, block)``, -1 where nothing was generated."""
        # Elsewhere than on GPUs the program without sampling saves nothing, and costs compiling.
        greedy = self._on_gpu and all(t.request.params.temperature == 0 for t in running)
        name = "greedy decode" if greedy else "decode"
        tokens, seconds = self._call(name, self._decode[greedy], jnp.int32(steps), running)
        self.stats.decode_seconds += seconds
        self.stats.decode_tokens += int((tokens >= 0).sum())
        self.stats.decode_blocks += 1
        return tokens

    def _call(
        self, name: str, program: Any, argument: Any, tasks: list[Task]
    ) -> tuple[np.ndarray, float]:
        """Run a program on cache and state; returns its tokens and the seconds it took."""
        arguments = (self.params, self.cache, self._state, self.devices.put(argument))
        if name not in self._compiled:
            if self._on_compile is not None:
                self._on_compile(name)
            # Ahead of time, so that compiling is never counted as generating.
            start = time.perf_counter()
            lowered = program.lower(*arguments)
            self._compiled[name] = compile_lowered(lowered, self._compiler_options)
            self.stats.compile_seconds += time.perf_counter() - start
            self.stats.programs += 1
        start = time.perf_counter()
        self.cache, self._state, tokens, finite = self._compiled[name](*arguments)
        tokens, finite = jax.device_get((tokens, finite))
        seconds = time.perf_counter() - start
        for row, task in enumerate(tasks):
            if not finite[task.slot if "decode" in name else row]:
                task.error = (
                    f"request {task.request_id}: logits are not finite after "
                    f"{len(task.tokens)} new tokens; the weights or this dtype overflow: try "
                    "bfloat16 or float32, or less quantization"
                )
        return tokens, seconds
