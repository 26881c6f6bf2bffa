"""Work shared among processes that take turns on one device.

Lowering a kernel holds Python's lock, so threads would do it one after the other; processes do not.
Each works through tasks of its own and takes a file lock around what it does on the device, so that
nothing else runs while it measures. A process that dies, or holds the device for too long, costs
the task it was at; another goes on with the rest.

A worker reads a JSON list of tasks from standard input and writes JSON lines (``Line``): results of
the task at hand, when it has finished one, and when it takes and leaves the device.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

_REASON_LENGTH = 300
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def turn(path: str) -> Iterator[None]:
    """In a worker: the device is this process's inside. The system frees it if the process dies."""
    import fcntl  # not on Windows, where this module can be imported

    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _say({"holds": True})
        try:
            yield
        finally:
            _say({"holds": False})


def work_through(tasks: Iterable[Any], do: Callable[[Any], Iterator[dict[str, Any]]]) -> None:
    """In a worker: print what ``do`` yields for every task."""
    for task in tasks:
        for result in do(task):
            _say({"result": result})
        _say({"finished": True})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


class _Worker:
    """A process and what it is at."""

    def __init__(self, command: Sequence[str], number: int, tasks: list[Any], lines: Any) -> None:
        self.tasks = tasks
        self.results: list[Any] = []
        self.holds_since: float | None = None
        self.progress = False
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        # One that has ended already is found out by the reader.
        with contextlib.suppress(BrokenPipeError), self.process.stdin:
            self.process.stdin.write(json.dumps(tasks))
        arguments = (number, self, self.process.stdout, lines)
        self.reader = threading.Thread(target=_read, args=arguments, daemon=True)
        self.reader.start()

    def stop(self) -> str:
        """End the process; returns the last line that it wrote to standard error."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        self.errors.close()
        return lines[-1][:_REASON_LENGTH] if lines else "the process ended"


def _read(number: int, worker: _Worker, output: IO[str], lines: Any) -> None:
    with output:
        for line in output:
            # One that was cut short when the process was killed is no message.
            if line.startswith("{") and line.endswith("}\n"):
                lines.put((number, worker, line))
    lines.put((number, worker, None))


def run_pool(
    command: Sequence[str],
    tasks: Sequence[Sequence[Any]],
    *,
    time_limit: float,
    hold_limit: float,
) -> Iterator[tuple[Any, list[Any], str | None]]:
    """Run a worker per list of tasks until all are done or the time is up.

    Args:
      command: Of a worker.
      tasks: For every worker its tasks, JSON values, in order.
      time_limit: Seconds for all of them.
      hold_limit: Seconds that a worker may keep the device at a time.

    Yields:
      ``(task, results, error)`` when a task is finished, or has failed and why. Those that were not
      finished in time do not appear.
    """
    deadline = time.monotonic() + time_limit
    lines: queue.Queue[tuple[int, _Worker, str | None]] = queue.Queue()
    running = {i: _Worker(command, i, list(mine), lines) for i, mine in enumerate(tasks) if mine}
    try:
        while running and (left := deadline - time.monotonic()) > 0:
            for number, worker in list(running.items()):
                since = worker.holds_since
                if since is not None and time.monotonic() - since > hold_limit:
                    worker.stop()
                    reason = f"kept the device for more than {hold_limit:g} s"
                    yield from _failed(command, number, worker, reason, running, lines)
            try:
                number, worker, line = lines.get(timeout=min(left, _POLL_SECONDS))
            except queue.Empty:
                continue
            if running.get(number) is not worker:
                continue  # the last words of one that was stopped
            if line is None:
                reason = worker.stop()
                yield from _failed(command, number, worker, reason, running, lines)
                continue
            said = json.loads(line)
            worker.progress = True
            if "holds" in said:
                worker.holds_since = time.monotonic() if said["holds"] else None
            elif "result" in said:
                worker.results.append(said["result"])
            elif "finished" in said:
                yield worker.tasks.pop(0), worker.results, None
                worker.results = []
    finally:
        for worker in running.values():
            worker.stop()


def _failed(
    command: Sequence[str],
    number: int,
    worker: _Worker,
    reason: str,
    running: dict[int, _Worker],
    lines: Any,
) -> Iterator[tuple[Any, list[Any], str | None]]:
    """Report a stopped worker's task, and let another do the rest."""
    del running[number]
    # One that never got anywhere would not a second time.
    lost = worker.tasks[:1] if worker.progress else worker.tasks
    rest = worker.tasks[len(lost) :]
    if rest:
        running[number] = _Worker(command, number, rest, lines)
    for task in lost:
        yield task, worker.results, reason
