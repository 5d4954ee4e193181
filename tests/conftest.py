"""Shared fixtures.

Torch is imported in the fixtures only, since the process that distributes the tests imports this file too.
"""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Starter

# Shells ignore Ctrl-C for background processes, and some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give a test the same random numbers independent of the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_server():
    """Let the tests of a module share the process that starts runs, since importing torch takes seconds."""
    from curvlab.grid import processes

    close = processes.close
    processes.close = lambda: None
    yield
    processes.close = close
    close()


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """A starter of programs that tests stop, without the seconds that the import of torch takes."""
    starter = Starter()
    yield starter
    starter.close()


class _Exchange:
    """Stand-in for the connection of a run's process: it holds the request, and then the answer."""

    def __init__(self, request: bytes) -> None:
        self.request, self.answer = request, None

    def recv_bytes(self) -> bytes:
        return self.request

    def send_bytes(self, answer: bytes) -> None:
        self.answer = answer


@pytest.fixture
def with_figures(monkeypatch) -> None:
    """Use this fixture in a test of a module with ``no_figures`` that examines the figures of a run.

    They are drawn as usual, and written with a lower resolution, which saves most of the time.
    """
    from matplotlib.figure import Figure

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *given, **options: savefig(*given, **options | {"dpi": 50}))


@pytest.fixture
def no_figures(request, monkeypatch) -> None:
    """Let a run write empty files for its figures, which take most of the time of a small run."""
    from matplotlib.figure import Figure

    if "with_figures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture
def in_processes() -> None:
    """Use this fixture in a test of a module with ``runs_here`` whose runs must be processes."""


@pytest.fixture
def runs_here(request, monkeypatch) -> None:
    """Execute runs in this process, one after another, since a process costs more than a small run."""
    if "in_processes" in request.fixturenames:
        return
    import torch

    from curvlab.grid import processes, run_process

    one_at_a_time = threading.Lock()

    def run(function, threads, code, given, file, timeout, wanted):
        with one_at_a_time:
            if not wanted():
                return processes.ProcessEnd(None, 0, None, 0.0, "unwanted")
            exchange = _Exchange(given)
            with torch.random.fork_rng():
                run_process.execute_request(exchange, 1)
        return processes.ProcessEnd(exchange.answer, 0, 1, 0.0)

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(run_process, "_lock_folder", lambda folder: Path(folder).mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(run_process, "_redirect", lambda output: None)
