"""Judges cells in processes of their own: one that dies or hangs takes its cell with it, and not the run."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from time import monotonic

import torch

from .cells import Cell
from .judge import Verdict, judge

_SECONDS = 60.0  # that a cell may take
_CONTEXT = multiprocessing.get_context("fork")  # torch is imported once


class Worker:
    """A process that judges one cell after another."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, cell: Cell) -> None:
        """Start on a cell."""
        self.cell, self.deadline = cell, monotonic() + _SECONDS
        self.connection.send(cell)

    def take(self) -> Verdict:
        """Wait for the verdict. A process that died, or has not answered in time, is replaced."""
        told = f"no answer after {_SECONDS:.0f} s"
        if self.connection.poll(max(0.0, self.deadline - monotonic())):
            try:
                return self.connection.recv()
            except EOFError:
                self.process.join()
                told = f"the process dies: exit code {self.process.exitcode}"
        self.stop()
        self._start()
        return Verdict("raw", told)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def verdicts(cells: Iterator[Cell], jobs: int) -> Iterator[tuple[Cell, Verdict]]:
    """Yield cells with their verdicts, as they come."""
    workers = [Worker() for _ in range(jobs)]
    try:
        for worker, cell in zip(workers, cells, strict=False):
            worker.give(cell)
        while True:
            left = min(worker.deadline for worker in workers) - monotonic()
            ready = wait([worker.connection for worker in workers], max(0.0, left))
            for worker in workers:
                if worker.connection in ready or worker.deadline < monotonic():
                    cell, verdict = worker.cell, worker.take()
                    worker.give(next(cells))
                    yield cell, verdict
    finally:
        for worker in workers:
            worker.stop()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            cell = connection.recv()
        except EOFError:  # the run is over
            return
        connection.send(judge(cell))
