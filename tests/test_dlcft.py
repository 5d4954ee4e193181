"""DLCFT: against joint training where it is exact, finite differences, and its component methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlab import linearize
from curvlab.continual import run
from curvlab.continual.learner import Learner
from curvlab.continual.loop import Result
from curvlab.continual.outputs import Head, Outputs
from curvlab.continual.strategies import DLCFT, OSLA
from curvlab.continual.tasks import Task
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.matrices import KFAC, Composite

SQUARED = {"loss": "squared_error", "target_scale": 3.0}


def task(seed: int, labels: Sequence[int], classes: int, of: tuple[int, ...] | None, size: int = 12) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(size, 4, generator=generator), torch.tensor(labels)[torch.arange(size) % len(labels)]
    return Task(f"task {seed}", Dataset(f"seed {seed}", x, y, x, y, tuple(map(str, range(classes)))), classes=of)


def by_data(count: int) -> tuple[Task, ...]:
    return tuple(task(seed, (0, 1, 2), 3, None) for seed in range(count))


def by_classes(count: int) -> tuple[Task, ...]:
    """Return tasks of two classes each."""
    return tuple(task(i, (2 * i, 2 * i + 1), 2 * count, (2 * i, 2 * i + 1)) for i in range(count))


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, outputs)).double()


def learner_of(
    model: nn.Module, stream: Sequence[Task], head: Head = "growing", loss: Any = "squared_error"
) -> Learner:
    outputs = Outputs(stream, head, len(list(model.parameters())[-1]), torch.device("cpu"))
    return Learner(model, stream, outputs, loss, 3.0, batch_size=12)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_loss(model: nn.Module, stream: Sequence[Task]) -> Tensor:
    learner = learner_of(model, stream, "single")
    batches = [learner.samples(i) for i in range(len(stream))]
    return torch.stack([learner.loss(model(b.x), b.y, b.task) for b in batches]).mean()


def learn(stream: Sequence[Task], model: nn.Module, strategy: Any, steps: int = 10, **options: Any) -> Result:
    return run(stream, model, strategy, progress=False, steps=steps, **{"lr": 0.01, "batch_size": 12, **options})


# Exactness ------------------------------------------------------------------------------------------------------------


def test_linearized_network_with_a_fixed_head_learns_in_sequence_what_is_learnt_jointly() -> None:
    torch.manual_seed(1)
    stream, model = by_data(3), nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.5), nn.Linear(3, 3)).double()
    model[2].requires_grad_(False)
    linear = linearize(model, head="2")
    trained = [p for p in linear.parameters() if p.requires_grad]
    at_start = torch.autograd.grad(mean_loss(linear, stream), trained)
    learn(stream, linear, DLCFT(structure="dense", merge="exact"), 400, **SQUARED, lr=2.0, momentum=0.9)
    at_end = torch.autograd.grad(mean_loss(linear, stream), trained)
    assert torch.cat([g.flatten() for g in at_end]).norm() < 1e-6 * torch.cat([g.flatten() for g in at_start]).norm()


@pytest.mark.parametrize(
    ("structure", "merge"), [("kfac", "average"), ("tkfac:variant=rescaled", "average"), ("tkfac", "exact")]
)
def test_factors_of_one_layer_are_exact(structure: str, merge: Any) -> None:
    stream, model = by_data(3), nn.Linear(4, 3).double()
    learn(stream, model, DLCFT(structure=structure, merge=merge), 300, **SQUARED, lr=1.0, momentum=0.9)
    homogeneous = torch.cat([torch.cat([t.train[0], torch.ones(12, 1)], dim=1) for t in stream]).double()
    targets = 3.0 * torch.nn.functional.one_hot(torch.cat([t.train[1] for t in stream]), 3).double()
    solution = torch.linalg.lstsq(homogeneous, targets).solution
    torch.testing.assert_close(torch.cat([model.weight.mT, model.bias[None]]).detach(), solution, rtol=1e-6, atol=1e-8)


# New outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["average", "exact"])
@pytest.mark.parametrize("structure", ["kfac", "tkfac:variant=rescaled", "kfac:rest=diag"])
@pytest.mark.parametrize("linear", [True, False])
def test_new_outputs_get_the_hessian_of_the_old_losses(structure: str, merge: Any, linear: bool) -> None:
    stream, model = by_classes(3), network(6)
    if structure == "kfac:rest=diag":
        model = nn.Sequential(*model[:2], nn.LayerNorm(5), model[2]).double()
    head = f"{len(model) - 1}"
    net: nn.Module = linearize(model, head=head) if linear else model
    learner, method = learner_of(net, stream), DLCFT(structure=structure, merge=merge)
    method.start(learner)
    layer = net.get_submodule(head)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for learner.task in range(2):
        method.before_task(learner)
        train_rows(layer, 2 * learner.task, 2 * learner.task + 2)
        method.after_task(learner)
        features: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs, found=features: found.extend(inputs))
        samples = learner.samples()
        net(samples.x)
        handle.remove()
        z = torch.cat([features[0].detach(), torch.ones(12, 1)], dim=1)
        # The new output has the target 0 for old samples, and its row starts at 0.
        expected += torch.func.hessian(lambda row, z=z: (z @ row).square().mean() / 2)(torch.zeros_like(z[0]))
    learner.task = 2
    method.before_task(learner)
    matrix = method.precision
    kronecker = matrix.parts[0] if isinstance(matrix, Composite) else matrix
    assert isinstance(kronecker, KFAC)
    block = sum(torch.einsum("oq,ij->oiqj", s, a) for a, s in kronecker.factors[head].pairs())
    assert isinstance(block, Tensor)
    for output in range(6):
        torch.testing.assert_close(block[output, :, output], expected, rtol=1e-10, atol=1e-10)
        assert not block[output].index_select(1, torch.tensor([o for o in range(6) if o != output])).any()


def train_rows(layer: nn.Module, first: int, end: int) -> None:
    """Set the rows of a task's outputs to random values."""
    generator = torch.Generator().manual_seed(first)
    with torch.no_grad():
        for p in layer.parameters():
            p[first:end] = torch.randn(p[first:end].shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("structure", ["kfac", "tkfac", "tkfac:variant=rescaled"])
def test_it_is_as_if_all_outputs_had_been_there_from_the_start(structure: str) -> None:
    stream, growing, single = by_classes(3), linearize(network(6), head="2"), linearize(network(6), head="2")
    with torch.no_grad():
        single.get_submodule("2").weight[2:] = 0.0
        single.get_submodule("2").bias[2:] = 0.0
    learn(stream, growing, DLCFT(structure=structure), head="growing", **SQUARED, lr=0.1)
    learn(stream, single, DLCFT(structure=structure, classifier_regularization=False), head="single", **SQUARED, lr=0.1)
    torch.testing.assert_close(flat(growing), flat(single), rtol=1e-10, atol=1e-10)
    off = linearize(network(6), head="2")
    method = DLCFT(structure=structure, classifier_regularization=False)
    learn(stream, off, method, head="growing", **SQUARED, lr=0.1)
    assert float((flat(off) - flat(growing)).abs().max()) > 1e-3


def test_without_its_own_it_is_online_laplace_at_the_mean_over_tasks() -> None:
    stream = by_data(2)
    one, other = network(), network()
    options = {**SQUARED, "batch_size": 5, "momentum": 0.5}
    learn(stream, one, DLCFT(2.0, structure="kfac"), 20, **options, lr_decay=2.0)
    learn(stream, other, OSLA(2.0, structure="kfac", merge="average"), 20, **options)
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", [None, "2"])
def test_rows_of_later_classes_are_zero_until_they_come(head: str | None) -> None:
    stream, model = by_classes(3), linearize(network(6), head=head)
    before = model.get_submodule("2").weight[:2].detach().clone()
    seen = []

    def observe(learner: Learner) -> dict[str, float]:
        rows = learner.model.get_submodule("2").weight
        outputs = learner.model(learner.samples().x)
        seen.append((rows[2:4].abs().max(), outputs[:, 4:].abs().max()))
        return {}

    learn(stream, model, DLCFT(structure="kfac"), head="growing", **SQUARED, weight_decay=0.1, observe=observe)
    assert seen[0] == (0, 0)
    assert seen[1][0] > 0 == seen[1][1]
    assert seen[2][1] > 0
    learner = learner_of(network(6), stream)
    DLCFT(structure="kfac").start(learner)
    assert torch.equal(learner.model[2].weight[:2], before)  # the rows of the first task do not change


# Replay ---------------------------------------------------------------------------------------------------------------


def test_replay_adds_the_loss_of_past_samples() -> None:
    stream, model = by_data(2), network()
    learner, method = learner_of(model, stream, "single"), DLCFT(structure="kfac", buffer_size=20)
    method.start(learner)
    batch = learner.samples(0)
    assert torch.equal(method.loss(learner, batch), learner.loss(model(batch.x), batch.y, 0))
    method.after_task(learner)
    assert method.memory is not None
    assert len(method.memory) == 12
    learner.task = 1
    batch = learner.samples(1)
    past = learner.samples(0)  # all of them are drawn
    by_hand = (learner.loss(model(batch.x), batch.y, 1) + learner.loss(model(past.x), past.y, 0)) / 2
    torch.testing.assert_close(method.loss(learner, batch), by_hand)
    method.after_task(learner)
    assert len(method.memory) == 20


def test_without_replay_no_sample_is_held() -> None:
    learner, method = learner_of(network(), by_data(2), "single"), DLCFT(structure="kfac")
    method.start(learner)
    method.after_task(learner)
    assert method.memory is None


# The loop -------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_continues_bit_for_bit(tmp_path: Path) -> None:
    stream = by_classes(3)
    options = {"head": "growing", **SQUARED, "optimizer": "adam", "batch_size": 5}

    def stop(learner: Learner) -> dict[str, float]:
        if learner.task == 2:
            raise KeyboardInterrupt
        return {}

    for structure in ("kfac", "tkfac:variant=rescaled"):
        method = DLCFT(structure=structure, buffer_size=8)
        whole, parts = linearize(network(6), head="2"), linearize(network(6), head="2")
        expected = learn(stream, whole, method, **options)
        file = tmp_path / f"{structure[:4]}.pt"
        with pytest.raises(KeyboardInterrupt):
            learn(stream, parts, method, **options, checkpoint=file, observe=stop)
        again = linearize(network(6), head="2")
        result = learn(stream, again, method, **options, checkpoint=file)
        assert result.resumed_at == 2
        assert torch.equal(flat(again), flat(whole))
        assert torch.equal(result.accuracy.nan_to_num(), expected.accuracy.nan_to_num())
        assert [r["bytes"] for r in result.tasks] == [r["bytes"] for r in expected.tasks]


@pytest.mark.parametrize(
    ("options", "loss", "message"),
    [
        ({"structure": "kfac"}, "cross_entropy", "squared_error"),
        ({"structure": "diag", "merge": "exact"}, "squared_error", "diag does not have"),
        ({"structure": "kfac", "params": "0.*"}, "squared_error", "not among the protected"),
    ],
)
def test_new_outputs_that_cannot_be_protected_are_refused(options: dict[str, Any], loss: str, message: str) -> None:
    stream = by_classes(2)
    with pytest.raises(CurvlabError, match=message):
        learn(stream, network(4), DLCFT(**options), head="growing", loss=loss)
    learn(stream, network(4), DLCFT(**options, classifier_regularization=False), 1, head="growing", loss=loss)


@pytest.mark.parametrize("form", ["plain", "linearized", "head outside"])
def test_the_rows_of_new_outputs_are_those_of_the_last_layer(form: str) -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.body, self.aside = nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            features = self.body(x).relu()
            self.aside(features)
            out: Tensor = self.fc(features)
            return out

    model: nn.Module = HeadFirst().double()
    if form != "plain":
        model = linearize(model, head="fc" if form == "head outside" else None)
    learner, method = learner_of(model, by_classes(2)), DLCFT(structure="kfac")
    learner.outputs = Outputs(learner.stream, "growing", 4, torch.device("cpu"))
    aside = model.aside.weight.detach().clone()
    method.start(learner)
    assert not model.fc.weight[2:].any()
    assert model.fc.weight[:2].all()
    assert torch.equal(model.aside.weight, aside)
    learn(by_classes(2), model, method, head="growing", **SQUARED)


def test_bad_options_are_refused() -> None:
    with pytest.raises(CurvlabError, match="strength"):
        DLCFT(-1.0)
    with pytest.raises(CurvlabError, match="merge"):
        DLCFT(structure="diag")
    with pytest.raises(CurvlabError, match="buffer_size"):
        DLCFT(buffer_size=0)
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 4), nn.Flatten()).double()
    for ending in (model, nn.Sequential(network(4), nn.Sigmoid())):
        with pytest.raises(CurvlabError, match=r"DLCFT .* must be the outputs of an nn\.Linear"):
            learn(by_classes(2), ending, DLCFT(structure="kfac"), head="growing", **SQUARED)
