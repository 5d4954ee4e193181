"""What tests share."""

import signal

import pytest
import torch

from curvlab.grid import processes

# Shells ignore Ctrl-C for what they start in the background, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give a test the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_server():
    """Let the runs of a module's tests share the process that starts cells: it takes seconds to import torch."""
    close = processes.close
    processes.close = lambda: None
    yield
    processes.close = close
    close()
