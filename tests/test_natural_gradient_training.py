"""The optimizer ``ngd``: its step by plain loops, in ``fit`` and in ``continual.run``, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.continual import permuted, run, split_classes
from curvlab.continual.strategies import ER, Joint, Naive
from curvlab.data import Dataset
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.training import Training, fit
from curvlab.training import run as running
from curvlab.training.run import _order
from curvlab.training.state import derive_seed


def blobs(count: int = 24) -> tuple[Tensor, Tensor]:
    generator, y = torch.Generator().manual_seed(0), torch.arange(count) % 4
    return torch.eye(4, 5)[y] + 0.5 * torch.randn(count, 5, generator=generator), y


def network(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 4)).to(dtype)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat(
        [part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
    )


def fisher(model: nn.Module, x: Tensor) -> Tensor:
    """Return the exact Fisher of a softmax, by a loop over samples and labels."""
    total: Any = 0.0
    model.eval()
    for sample in x:
        log_p = model(sample[None])[0].log_softmax(0)
        rows = [gradient(model, one) for one in log_p]
        total = total + sum(p * row[:, None] * row for p, row in zip(log_p.exp().detach(), rows, strict=True))
    model.train()
    return total / len(x)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def move(model: nn.Module, vector: Tensor) -> None:
    nn.utils.vector_to_parameters(vector, model.parameters())


@pytest.mark.parametrize("structure", ["dense", "diag", "implicit", "kfac"])
def test_a_step_is_the_formula(structure: str) -> None:
    x, y = blobs()
    x, model, lr, damping, decay = x.double(), network(), 0.3, 0.05, 0.01
    exact, before = fisher(model, x), flat(model)
    natural = gradient(model, F.cross_entropy(model(x), y))
    if structure == "kfac":
        hidden = model[:3](x).detach()
        p = model(x).softmax(1).detach()
        errors = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, C, C), of the last layer
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        inputs = torch.cat([hidden, ones], 1)
        damped = torch.kron(errors.mean(0), inputs.T @ inputs / len(x)) + damping * torch.eye(16, dtype=x.dtype)
        last = natural[-16:]
        rows = torch.cat([last[:12].view(4, 3), last[12:, None]], 1).flatten()
        solved = torch.linalg.solve(damped, rows).view(4, 4)
        expected = torch.cat([solved[:, :3].flatten(), solved[:, 3]])
    else:
        matrix = exact.diag().diag() if structure == "diag" else exact
        expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=x.dtype), natural)
    options: dict[str, Any] = {"optimizer": "ngd", "lr": lr, "weight_decay": decay, "structure": structure}
    fit(model, (x, y), steps=1, batch_size=len(x), damping=damping, progress=False, **options)
    after, close = before - lr * decay * before, 1e-4 if structure == "implicit" else 1e-8
    torch.testing.assert_close(
        flat(model)[-len(expected) :], (after[-len(expected) :] - lr * expected), atol=close, rtol=close
    )


def test_of_least_squares_the_error_shrinks_by_one_factor() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(20, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    model = nn.Linear(3, 2).double()
    ones = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    solution = torch.linalg.lstsq(ones, y).solution
    start = torch.cat([model.weight, model.bias[:, None]], 1).detach().T - solution
    training = Training(optimizer="ngd", lr=0.4, structure="dense", damping=0.0, steps=5, batch_size=20)
    fit(model, (x, y), loss="squared_error", training=training, progress=False)
    end = torch.cat([model.weight, model.bias[:, None]], 1).detach().T - solution
    torch.testing.assert_close(end, 0.6**5 * start)


def test_every_batch_has_a_fisher_of_its_own_and_dropout_is_in_the_gradient_alone() -> None:
    x, y = blobs()
    x, model, plain = x.double(), network(0.5), network(0.5)
    options: dict[str, Any] = {"optimizer": "ngd", "lr": 0.3, "structure": "dense", "damping": 0.1, "seed": 3}
    fit(model, (x, y), steps=4, batch_size=10, clip_norm=0.2, progress=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(3, 0))
        plain.train()
        for step in range(4):
            epoch, place = divmod(step, 3)
            index = _order(24, 3, epoch)[place * 10 : (place + 1) * 10]
            raw = gradient(plain, F.cross_entropy(plain(x[index]), y[index]))
            raw = raw * min(1.0, 0.2 / float(raw.norm() + 1e-6))
            damped = fisher(plain, x[index]) + 0.1 * torch.eye(len(raw), dtype=x.dtype)
            move(plain, flat(plain) - 0.3 * torch.linalg.solve(damped, raw))
    torch.testing.assert_close(flat(model), flat(plain), atol=1e-8, rtol=1e-8)
    assert model.training


def test_frozen_parameters_stay_and_have_no_part() -> None:
    x, y = blobs()
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, (x, y), optimizer="ngd", lr=0.1, steps=3, batch_size=10, progress=False)
    assert torch.equal(model[0].weight, before)
    assert model[3].weight.grad is None


@pytest.mark.parametrize("structure", ["kfac", "implicit"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: str
) -> None:
    options: dict[str, Any] = {"optimizer": "ngd", "lr": 0.1, "structure": structure, "damping": 0.1, "steps": 9}
    options |= {"batch_size": 7, "schedule": "cosine", "progress": False, "checkpoint_every": 2}
    whole = network(0.3, torch.float32)
    fit(whole, blobs(), **options)
    real = running.Run.train_step

    def dies(self: running.Run, *batch: Tensor) -> None:
        real(self, *batch)
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Run, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(network(0.3, torch.float32), blobs(), checkpoint=tmp_path / "run.pt", **options)
    monkeypatch.undo()
    model = network(0.3, torch.float32)
    assert fit(model, blobs(), checkpoint=tmp_path / "run.pt", **options).resumed_at == 4
    assert torch.equal(flat(model), flat(whole))
    with pytest.raises(CurvlabError, match=r"damping is 0\.1 there and 0\.2 here"):
        fit(network(0.3, torch.float32), blobs(), checkpoint=tmp_path / "run.pt", **{**options, "damping": 0.2})


# Over tasks -----------------------------------------------------------------------------------------------------------


def stream(head: str) -> Any:
    x, y = blobs(40)
    data = Dataset("blobs", x, y, x, y, tuple("abcd"))
    return permuted(data, tasks=2) if head == "single" else split_classes(data, tasks=2)


OPTIONS: dict[str, Any] = {
    "optimizer": "ngd",
    "lr": 0.2,
    "damping": 0.1,
    "batch_size": 8,
    "epochs": 1,
    "progress": False,
}


@pytest.mark.parametrize("head", ["single", "masked"])
def test_a_stream_by_a_plain_loop(head: str) -> None:
    tasks, model, plain = stream(head), network(), network()
    run(tasks, model, Naive(), head=head, structure="dense", **OPTIONS)
    for t, task in enumerate(tasks):
        x, y = task.train
        x, classes = x.double(), sorted(set(y.tolist()))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(derive_seed(0, t, 0, 0)))
        for index in order.split(8):
            part = nn.Sequential(plain, Columns(classes))
            labels = torch.tensor([classes.index(one) for one in y[index].tolist()])
            raw = gradient(plain, F.cross_entropy(part(x[index]), labels))
            matrix = fisher(part, x[index]) + 0.1 * torch.eye(len(raw), dtype=x.dtype)
            move(plain, flat(plain) - 0.2 * torch.linalg.solve(matrix, raw))
    torch.testing.assert_close(flat(model), flat(plain), atol=1e-8, rtol=1e-8)


class Columns(nn.Module):
    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.columns]


def test_a_stream_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    tasks, whole, model = stream("single"), network(0.3, torch.float32), network(0.3, torch.float32)
    run(tasks, whole, ER(4), **OPTIONS)
    stopped = []

    def stop(learner: Any) -> dict[str, Any]:
        if learner.task == 1 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tasks, network(0.3, torch.float32), ER(4), checkpoint=tmp_path / "run.pt", observe=stop, **OPTIONS)
    assert run(tasks, model, ER(4), checkpoint=tmp_path / "run.pt", observe=stop, **OPTIONS).resumed_at == 1
    assert torch.equal(flat(model), flat(whole))


def test_joint_training_needs_outputs_in_common() -> None:
    run(stream("single"), network(dtype=torch.float32), Joint(), **OPTIONS)
    with pytest.raises(UnsupportedError, match="the samples are of several tasks with different outputs"):
        run(stream("masked"), network(dtype=torch.float32), Joint(), head="masked", **OPTIONS)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structure": "diag"}, "structure belongs to ngd, not to adam; leave structure at kfac"),
        ({"damping": 0.1, "optimizer": "sgd"}, r"damping belongs to ngd, not to sgd; leave damping at 0\.001"),
        ({"optimizer": "ngd", "momentum": 0.9}, r"momentum belongs to sgd, not to ngd; leave momentum at 0\.0"),
        ({"optimizer": "ngd", "damping": -1.0}, "damping must be a finite number of at least 0, not -1"),
        ({"optimizer": "ngd", "damping": float("inf")}, "damping must be a finite number of at least 0, not inf"),
        ({"optimizer": "ngd", "structure": "kfca"}, "did you mean 'kfac'"),
        ({"optimizer": "ngd", "structure": 3}, "structure"),
    ],
)
def test_options_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvlabError, match=message):
        Training(**fields)


def test_a_network_without_the_structure_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    with pytest.raises(UnsupportedError, match="'kfac' without rest=none gives such parameters their diagonal"):
        fit(model, blobs(), optimizer="ngd", structure="kfac:rest=none", steps=1, progress=False)
    fit(model, blobs(), optimizer="ngd", lr=0.1, steps=2, progress=False)


def dead(bias: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4, bias=bias))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    return model


def test_a_network_without_any_gradient_says_so() -> None:
    with pytest.raises(
        UnsupportedError, match=r"gradient of every parameter is zero .*: the units of a layer may be dead"
    ):
        fit(dead(bias=False), blobs(), optimizer="ngd", structure="kfac:rest=none", steps=1, progress=False)


def test_a_dead_layer_is_named_though_a_penalty_pulls_it() -> None:
    """L2 pulls dead weights to those of the last task, so that their gradient is not zero."""

    class Pulled(Naive):
        def after_backward(self, learner: Any) -> None:
            for parameter in learner.parameters.values():
                parameter.grad = parameter.grad + 1

    with pytest.raises(UnsupportedError, match=r"the gradient of 0\.weight is zero .*: its units may be dead"):
        run(stream("single"), dead(bias=True), Pulled(), **OPTIONS | {"structure": "kfac:rest=none"})


@pytest.mark.parametrize("structure", ["kfac", "diag", "implicit"])
def test_a_gradient_that_overflows_is_not_the_fault_of_the_layers(structure: str) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().mul_(1e30)
    with pytest.raises(CurvlabError, match=r"gradient of 0\.weight is not finite: lower lr \(here at most 0\.5\)"):
        fit(model, blobs(), optimizer="ngd", structure=structure, lr=0.5, steps=2, progress=False)


def test_a_dead_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    data = torch.randn(20, 3), torch.arange(20) % 2
    training = Training(optimizer="ngd", structure="kfac:rest=none", damping=0.1, lr=0.1, steps=2)
    with pytest.raises(
        UnsupportedError, match=r"the gradient of 0\.weight is zero .*: its units may be dead .* lower lr"
    ):
        fit(model, data, training=training, progress=False)
    before = model[0].weight.detach().clone()
    for structure in ("diag", "kfac"):  # K-FAC gives it its diagonal, which is zero
        training = Training(optimizer="ngd", structure=structure, damping=0.1, lr=0.1, steps=2)
        fit(model, data, training=training, progress=False)
    assert torch.equal(model[0].weight, before)
