"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give a test the same random numbers whatever ran before it."""
    torch.manual_seed(0)
