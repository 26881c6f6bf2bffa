"""Results on standard output, in the order of the prompts."""

from __future__ import annotations

import os
import signal
import sys

from tqdm import tqdm

from qjax.serving.results import Result


class Printer:
    """Prints results in input order, each as soon as all before it are done."""

    def __init__(self, count: int, streaming: bool) -> None:
        self.count, self.streaming = count, streaming
        self.ready: dict[int, Result] = {}
        self.next = 0

    def start(self, prompt: str) -> None:
        """With one prompt only: print it, its text follows piece by piece."""
        if self.streaming:
            print(prompt, end="", flush=True)

    def text(self, piece: str) -> None:
        """A new piece of text."""
        if self.streaming:
            print(piece, end="", flush=True)

    def add(self, index: int, result: Result) -> None:
        """A finished result."""
        if self.streaming:
            print(flush=True)
            return
        self.ready[index] = result
        while self.next in self.ready:
            self._print(self.next, self.ready.pop(self.next))
            self.next += 1

    def rest(self) -> None:
        """After an interruption: what is finished, though something before it is not."""
        if self.streaming:
            print(flush=True)
        for index in sorted(self.ready):
            self._print(index, self.ready[index])

    def _print(self, index: int, result: Result) -> None:
        head = f"--- {index + 1}/{self.count}: {len(result.token_ids)} tokens"
        tqdm.write(f"{head}, {result.finish_reason}\n{result.prompt}{result.text}")


def hang_up() -> int:
    """Exit code for when whoever reads the results, such as ``head``, has had enough.

    Nothing more is written to standard output, not even what waits for it until the exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
