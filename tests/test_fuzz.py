"""The fuzzer with fixed seeds, and tests that the fuzzer detects failures."""

import os
from random import Random
from threading import Event

import pytest
import torch
from fuzzing import factors, oracle, workers
from fuzzing.cases import Case, draw
from fuzzing.decorations import DECORATIONS
from fuzzing.draft import Draft, Step, UnfitError
from fuzzing.judge import Truth, UnfitCaseError, Verdict, _check_refusal, _solve, judge
from fuzzing.layers import LAYERS, ODD
from fuzzing.shrink import script, shrink
from fuzzing.source import source
from torch import Tensor
from torch.nn import functional as F

from curvlab import estimate
from curvlab.estimators import hooks
from curvlab.matrices import Diagonal
from curvlab.problem import Problem

_SHAPES = ((4,), (3, 4), (4, 2, 2), (2, 4, 4))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_fixed_seeds(first: int) -> None:
    for seed in range(first, first + 20):
        verdict = judge(draw(seed))
        assert not verdict.failed, script(draw(seed), verdict) + verdict.details


def plain(**changes: object) -> Case:
    """Return a case: the diagonal of the empirical Fisher of a Linear layer on three samples."""
    case = Case(
        seed=0,
        shape=(3,),
        whole=False,
        steps=(Step("linear", 0, 0), Step("activation", 1, 0)),
        classes=2,
        count=3,
        repeats=1,
        loss="squared_error",
        quantity="empirical_fisher",
        structure="diag",
        backend="auto",
        data="(x, y)",
        batch_size=None,
        params=None,
        dtype="float64",
        around="",
        damping="",
    )
    return Case(**{**vars(case), **changes})


class TestVerdicts:
    @pytest.mark.parametrize("structure", ["diag", "dense", "kfac", "ekfac", "tkfac", "implicit", "diagonality"])
    @pytest.mark.parametrize("quantity", ["fisher", "empirical_fisher", "fisher:samples=2,seed=1"])
    @pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "binary_cross_entropy"])
    def test_right(self, loss: str, quantity: str, structure: str) -> None:
        assert judge(plain(loss=loss, quantity=quantity, structure=structure)).outcome == "right"

    @pytest.mark.parametrize("quantity", ["hessian", "ggn", "masq:batch_size=2,norm=mean"])
    def test_right_blocks(self, quantity: str) -> None:
        assert judge(plain(quantity=quantity, structure="block_diag")).outcome == "right"

    @pytest.mark.parametrize("structure", ["diag", "kfac", "diagonality"])
    def test_a_wrong_number(self, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Problem, "num_samples", 4)  # of three
        assert judge(plain(structure=structure)).outcome == "wrong"

    def test_an_uncaught_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise KeyError("x")

        monkeypatch.setattr(Problem, "check", fail)
        assert judge(plain()).outcome == "error"

    def test_changed_state(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def draw_numbers(*_: object) -> None:
            torch.rand(1)

        monkeypatch.setattr(Problem, "check", draw_numbers)
        assert judge(plain()).signature == ("changed", "torch's random state")

    def test_a_number_instead_of_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        odd = plain(steps=(Step("random", 0, 1),))
        monkeypatch.setattr(Problem, "check", lambda _: None)
        assert judge(odd).outcome == "wrong"


class TestNoFailure:
    """Cases in which the loops or torch are not accurate enough for a comparison."""

    def test_saturated_losses_are_accurate(self) -> None:
        for name, y in (("cross_entropy", torch.tensor([1])), ("binary_cross_entropy", torch.tensor([[0.0, 1.0]]))):
            f = torch.tensor([[-18.0, 20.0]]).double().requires_grad_()
            (slope,) = torch.autograd.grad(oracle.losses(name, f, y.double()).sum(), f)
            small = torch.tensor(-38.0 if name == "cross_entropy" else -20.0).double().sigmoid()
            assert abs(float(slope[0, 1] / -small) - 1) < 1e-14
            curvature = oracle.output_hessian(name, f.detach()[0])
            assert abs(float(curvature[1, 1] / (small * (1 - small))) - 1) < 1e-14

    def test_a_damped_matrix_that_is_nearly_singular(self) -> None:
        matrix = torch.nn.Linear(3, 2).double()
        x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
        ones = estimate(Problem(matrix, "squared_error", (x, y)), "ggn", "diag")
        almost = Diagonal(torch.full((8,), -0.3 + 1e-6).double(), ones.space, ones.info)
        assert _solve(plain(damping="0.3"), almost).outcome == "right"
        off = Diagonal(almost.entries * (1 + 1e-14), ones.space, ones.info)
        off.solve = lambda b, damping: almost.solve(b, damping=damping + 1e-11)  # type: ignore[method-assign]
        assert _solve(plain(damping="0.3"), off).outcome == "wrong"

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_mixed_samples_without_an_effect(self, dtype: str) -> None:
        class Mixing(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.cumsum(0).softmax(-1).sum(-1, keepdim=True) if centred else x.cumsum(0)

        case = plain(steps=(Step("mixing", 0, 1),), dtype=dtype)
        assert case.refusal == "it mixes samples"
        x = torch.randn(3, 4).to(getattr(torch, dtype))
        centred = True
        with pytest.raises(UnfitCaseError):
            _check_refusal(case, Mixing(), x)
        centred = False
        _check_refusal(case, Mixing(), x)

    def test_torch_is_wrong_for_a_batch_of_one(self) -> None:
        """The gradient of the instance norm is in channels-last memory."""

        class Network(torch.nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).permute(0, 2, 3, 1).contiguous().flatten(2).mean(2)

        torch.manual_seed(0)
        x = torch.randn(2, 3, 2, 2).double()
        code = {"data": lambda: (x, torch.randn(2, 2).double())}
        convolution, norm = torch.nn.Conv2d(3, 2, 1), torch.nn.InstanceNorm2d(2)
        assert Truth(plain(), code, Network(convolution).double()).matrix is not None
        with pytest.raises(UnfitCaseError, match="torch's gradients of a batch"):
            Truth(plain(), code, Network(convolution, norm).double())

    def test_layers_without_selected_parameters_are_not_changed(self) -> None:
        class Frozen(torch.nn.Module):
            """An in-place operation on the first layer's outputs is valid if they need no gradient."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.tied, self.out = (torch.nn.Linear(3, 3) for _ in range(3))
                self.tied.weight = self.first.weight
                self.first.requires_grad_(False)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.tied(F.elu_(self.first(x).tanh())).tanh())

        model, x, y = Frozen().double(), torch.randn(2, 3).double(), torch.randn(2, 3).double()
        names = ["tied.bias", "out.weight", "out.bias"]
        found = factors.samples(model, names, "empirical_fisher", "squared_error", x, y, None)
        assert {name: len(samples) for name, samples in found.items()} == {"tied": 2, "out": 2}


class TestWorkers:
    def ask(self) -> Verdict:
        worker = workers.Worker()
        try:
            worker.give(plain())
            return worker.take()
        finally:
            worker.stop()

    def test_a_verdict(self) -> None:
        assert self.ask().outcome == "right"

    def test_a_process_that_dies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "judge", lambda _: os._exit(3))
        assert self.ask() == Verdict("error", "the process died with exit code 3")

    def test_a_process_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "judge", lambda _: Event().wait())
        monkeypatch.setattr(workers, "_SECONDS", 0.1)
        assert self.ask().reason == "no answer after 0 s"


@pytest.mark.parametrize("kind", [*LAYERS, *ODD])
def test_torch_runs_a_network_with_each_kind_of_layer(kind: str) -> None:
    for seed in range(60):
        shape = _SHAPES[seed % len(_SHAPES)]
        whole = seed % 8 > 3
        before = [] if whole else [Step("linear", 0, 3)]
        draft = Draft(shape, whole)
        try:
            for step in (*before, Step(kind, 1, seed)):
                draft.take(step, (LAYERS | ODD)[step.kind])
        except UnfitError:
            continue
        if judge(plain(shape=shape, whole=whole, steps=(*before, Step(kind, 1, seed)))).outcome != "not run":
            return
    pytest.fail(f"{kind} never ran")


def test_a_case_is_its_seed() -> None:
    assert draw(5) == draw(5)
    assert source(draw(5)) == source(draw(5)) != source(draw(6))


def test_a_decoration_keeps_its_module_when_others_are_dropped() -> None:
    def hooked(layers: tuple[int, ...], seed: int) -> list[str]:
        draft = Draft((3,))
        for step in (*(Step("linear", i, 0) for i in layers), Step("forward_hook", 3, seed)):
            draft.take(step, (LAYERS | DECORATIONS)[step.kind])
        return draft.after

    for seed in range(10):
        (line,) = hooked((0, 1, 2), seed)
        (kept,) = (i for i in range(3) if f"model.m{i}a." in line)
        for dropped in {0, 1, 2} - {kept}:
            assert hooked(tuple({0, 1, 2} - {dropped}), seed) == [line]


def test_a_failure_is_reduced_and_its_script_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    diagonal = hooks._diagonal
    monkeypatch.setattr(hooks, "_diagonal", lambda *arguments: 1.01 * diagonal(*arguments))
    random = Random(0)
    steps = tuple(Step(kind, i, random.randrange(99)) for i, kind in enumerate(("linear", "activation", "linear")))
    case = plain(steps=steps, loss="cross_entropy", quantity="ggn", batch_size=2)
    small, verdict = shrink(case, judge(case))
    assert (small.steps, small.quantity, small.batch_size) == ((), "empirical_fisher", None)
    exec(script(small, verdict), {})
