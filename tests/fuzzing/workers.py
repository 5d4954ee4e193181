"""Worker processes that judge cases, so that a crash or a hang ends one case only."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from time import monotonic

import torch

from .cases import Case
from .judge import Verdict, judge

_SECONDS = 60.0  # time limit of a case
_CONTEXT = multiprocessing.get_context("fork")  # so that torch is imported only once


class Worker:
    """A process that judges one case after another."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, case: Case) -> None:
        """Send a case to the process."""
        self.case, self.deadline = case, monotonic() + _SECONDS
        self.connection.send(case)

    def take(self) -> Verdict:
        """Wait for the verdict; replace a process that has died or does not answer in time."""
        reason = f"no answer after {_SECONDS:.0f} s"
        if self.connection.poll(max(0.0, self.deadline - monotonic())):
            try:
                return self.connection.recv()
            except EOFError:
                self.process.join()
                reason = f"the process died with exit code {self.process.exitcode}"
        self.stop()
        self._start()
        return Verdict("error", reason)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def judge_all(cases: Iterator[Case], jobs: int) -> Iterator[tuple[Case, Verdict]]:
    """Yield cases with their verdicts, in the order of completion."""
    workers = [Worker() for _ in range(jobs)]
    try:
        for worker, case in zip(workers, cases, strict=False):
            worker.give(case)
        while True:
            left = min(worker.deadline for worker in workers) - monotonic()
            ready = wait([worker.connection for worker in workers], max(0.0, left))
            for worker in workers:
                if worker.connection in ready or worker.deadline < monotonic():
                    case, verdict = worker.case, worker.take()
                    worker.give(next(cases))
                    yield case, verdict
    finally:
        for worker in workers:
            worker.stop()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            case = connection.recv()
        except EOFError:  # the main process has ended
            return
        connection.send(judge(case))
