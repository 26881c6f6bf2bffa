"""A set of prompts, from text to results: what ``scripts/serve.py`` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from qjax.sampling import SamplingParams
from qjax.serving.engine import Completion, Engine
from qjax.serving.prompts import Prompt
from qjax.serving.results import Result
from qjax.serving.scheduler import Request
from qjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt made ready.

    Attributes:
      where: Where it came from, for messages.
      text: What the model sees.
      request: Its tokens and settings.
    """

    where: str
    text: str
    request: Request


def prepare(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, defaults: SamplingParams, *, chat: bool
) -> list[Job]:
    """Tokenize prompts and settle their sampling settings.

    Args:
      prompts: The prompts.
      tokenizer: The model's tokenizer.
      defaults: Settings of prompts that bring none of their own; prompt ``i`` gets seed
        ``defaults.seed + i``, so that equal prompts get different samples.
      chat: Treat plain prompts as one user message of the model's chat template.

    Raises:
      ValueError: If a prompt cannot be used (names its place), or ``defaults`` restrict the choice
        of tokens where every prompt is greedy.
    """
    jobs = []
    for index, prompt in enumerate(prompts):
        text, ids = prompt.encode(tokenizer, chat=chat)
        request = Request(tuple(ids), prompt.sampling(defaults, index))
        jobs.append(Job(prompt.where, text, request))
    if jobs and all(job.request.params.temperature == 0 for job in jobs):
        for name, neutral in (("top_p", 1.0), ("top_k", 0)):
            if getattr(defaults, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(defaults, name)} has no use at temperature 0, which takes "
                    "the most likely token; give a temperature above 0, such as 0.7"
                )
    return jobs


def run(
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Sequence[tuple[int, Job]],
    *,
    on_result: Callable[[int, Result], None],
    on_text: Callable[[int, str, int], None] | None = None,
) -> None:
    """Generate for all jobs; results are handed over as they finish.

    Args:
      engine: The engine.
      tokenizer: The model's tokenizer.
      jobs: Index and job; the index is only passed through.
      on_result: Called with every index and its result.
      on_text: Called with an index, new text (possibly empty) and the number of new tokens,
        whenever a job has got some.
    """
    streams = [tokenizer.stream(job.request.prompt) for _, job in jobs]
    texts: list[list[str]] = [[] for _ in jobs]

    def new_tokens(request_id: int, tokens: list[int], reason: str | None) -> None:
        at = request_id - start
        piece = streams[at].push(tokens)
        if reason is not None:
            piece += streams[at].flush()
        texts[at].append(piece)
        if on_text is not None:
            on_text(jobs[at][0], piece, len(tokens))

    def finished(completion: Completion) -> None:
        at = completion.request_id - start
        index, job = jobs[at]
        result = Result(
            prompt=job.text,
            text="".join(texts[at]),
            token_ids=completion.token_ids,
            prompt_tokens=completion.prompt_tokens,
            finish_reason=completion.finish_reason,
        )
        on_result(index, result)

    start = engine.next_id
    engine.generate([job.request for _, job in jobs], on_tokens=new_tokens, on_finish=finished)
