"""A forward pass that keeps what it has computed: in attributes it is taken back, and elsewhere it is refused."""

from collections import deque
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import Problem, diagonality, estimate
from curvlab.errors import UnsupportedError


class Keeping(nn.Module):
    """Computes a weight once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.kept = {"list": [], "dict": {}, "nested": {"w": []}, "namespace": SimpleNamespace(), "none": None}.get(
            kind
        )
        self.kind = kind
        self.log: list[int] = []
        self.recent: deque[int] = deque(maxlen=3)
        self.seen: set[int] = set()
        self.computed = lru_cache(lambda: self.a.weight / self.a.weight.norm())

    def weight(self) -> Tensor:
        new = self.a.weight / self.a.weight.norm()
        if self.kind == "list":
            if not self.kept:
                self.kept.append(new)
            out: Tensor = self.kept[0]
            return out
        if self.kind == "dict":
            return self.kept.setdefault("w", new)
        if self.kind == "nested":
            if not self.kept["w"]:
                self.kept["w"].append(new)
            return self.kept["w"][0]
        if self.kind == "namespace":
            if not hasattr(self.kept, "w"):
                self.kept.w = new
            return self.kept.w
        return self.computed() if self.kind == "lru_cache" else new

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(len(x))
        self.recent.append(len(x))
        self.seen.add(len(x))
        out: Tensor = self.b(F.linear(x, self.weight(), self.a.bias).tanh())
        return out


def problem(kind: str) -> Problem:
    torch.manual_seed(0)
    model = Keeping(kind).double()
    return Problem(model, "cross_entropy", (torch.randn(11, 4).double(), torch.arange(11) % 3))


@pytest.mark.parametrize("kind", ["list", "dict", "nested", "namespace"])
def test_a_weight_that_is_computed_once_and_kept_in_an_attribute(kind: str) -> None:
    of, plain = problem(kind), problem("none")
    for quantity in ("empirical_fisher", "fisher", "hessian"):
        right = estimate(plain, quantity, "dense", backend="torch").to_dense()
        for backend in ("auto", "torch"):
            for structure in ("diag", "dense", "implicit"):
                matrix = estimate(of, quantity, structure, backend=backend)
                vector = torch.ones(len(right)).double()
                expected = right.diagonal() if structure == "diag" else right @ vector
                torch.testing.assert_close(matrix @ vector, expected, rtol=1e-10, atol=1e-12)
    table, expected_table = diagonality(of), diagonality(plain)
    torch.testing.assert_close(torch.tensor(table.diag_sum), torch.tensor(expected_table.diag_sum), rtol=1e-10, atol=0)
    of.model(torch.randn(2, 4).double()).sum().backward()
    assert of.model.a.weight.grad is not None


def test_a_weight_that_is_computed_once_and_kept_elsewhere_is_refused() -> None:
    for backend in ("auto", "torch"):
        for structure in ("diag", "dense", "implicit"):
            with pytest.raises(UnsupportedError, match=r"caches a tensor that an earlier forward pass .* a.weight"):
                estimate(problem("lru_cache"), "empirical_fisher", structure, backend=backend)
    with pytest.raises(UnsupportedError, match="caches a tensor"):
        diagonality(problem("lru_cache"))


KEPT: dict[bytes, Tensor] = {}


class Memo(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        key = x.detach().numpy().tobytes()
        if key not in KEPT:
            KEPT[key] = super().forward(x)
        return KEPT[key]


def test_outputs_that_are_kept_by_their_inputs_are_refused() -> None:
    torch.manual_seed(0)
    data = torch.randn(11, 4).double(), torch.arange(11) % 3
    with pytest.raises(UnsupportedError, match="caches a tensor"):
        estimate(Problem(Memo("none").double(), "cross_entropy", data), "empirical_fisher", "diag")


def test_what_a_forward_pass_notes_is_taken_back() -> None:
    of = problem("none")
    of.model.log.append(7)
    log, recent, seen = of.model.log, of.model.recent, of.model.seen
    estimate(of, "fisher", "diag")
    estimate(of, "fisher", "kfac:rest=diag")
    diagonality(of)
    assert (log, list(recent), seen) == ([7], [], set())
    assert of.model.log is log
