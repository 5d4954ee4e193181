"""The fit loop: reproducible, resumable, and without side effects."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.training import Training, evaluate, fit
from curvlab.training import run as running
from curvlab.training.checkpoint import CheckpointFile
from curvlab.training.options import TrainingChanges


def blobs(count: int = 90, features: int = 6) -> tuple[Tensor, Tensor]:
    """Three well separated clusters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    centres = 3 * torch.eye(3, features)
    return centres[labels] + 0.3 * torch.randn(count, features, generator=generator), labels


def network(hidden: int = 8) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_learns_and_stops_at_the_target(optimizer: str) -> None:
    data = blobs()
    model = network()
    before = evaluate(model, *data)
    result = fit(model, data, optimizer=optimizer, lr=0.03, epochs=50, batch_size=20, evaluation=data, target=0.99)
    assert before.accuracy is not None
    assert before.accuracy < 0.9
    assert result.reached_target
    assert result.steps < 250
    assert result.evaluation == evaluate(model, *data)
    assert result.history[-1]["eval_accuracy"] >= 0.99
    assert all(record["eval_accuracy"] < 0.99 for record in result.history[:-1])


def test_one_plain_step_is_the_formula() -> None:
    x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0], [0.0]])
    model = nn.Linear(2, 1, bias=False)
    weight = model.weight.detach().clone()
    result = fit(model, (x, y), loss="squared_error", optimizer="sgd", lr=0.1, steps=1, batch_size=2)
    residual = x @ weight.T - y
    torch.testing.assert_close(model.weight.detach(), weight - 0.1 * (residual.T @ x) / 2)
    assert result.history == [
        {
            "step": 1,
            "train_loss": pytest.approx(0.25 * float(residual.square().sum())),
            "eval_loss": None,
            "eval_accuracy": None,
            "lr": 0.1,
        }
    ]


def test_every_epoch_goes_through_all_samples_in_a_new_order() -> None:
    seen: list[float] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.extend(x[:, 0].tolist())
            return x[:, :1] * self.weight

    x = torch.arange(7.0).unsqueeze(1)
    fit(Spy(), (x, torch.zeros(7, 1)), loss="squared_error", epochs=2, batch_size=3)
    first, second = seen[:7], seen[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.8536, 0.5, 0.1464])]
)
def test_schedules_fall_to_zero_after_the_last_step(schedule: str, rates: list[float]) -> None:
    result = fit(network(), blobs(), schedule=schedule, lr=1.0, optimizer="sgd", steps=4, evaluate_every=1)
    assert [record["lr"] for record in result.history] == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"schedule": "step"}, lambda step: 0.1 ** ((step >= 6) + (step >= 9))),
        (
            {"schedule": "step", "schedule_factor": 0.5, "schedule_drops": [1 / 3, 2 / 3, 0.75]},
            lambda step: 0.5 ** ((step >= 4) + (step >= 8) + (step >= 9)),
        ),
        ({"schedule": "step", "schedule_factor": 0.2, "schedule_drops": (0.99,)}, lambda step: 1.0),
        ({"schedule": "exponential"}, lambda step: 0.1 ** (step / 12)),
        ({"schedule": "exponential", "schedule_factor": 1e-3}, lambda step: 1e-3 ** (step / 12)),
    ],
)
def test_schedules_step_and_exponential(options: dict[str, Any], factor: Callable[[int], float]) -> None:
    result = fit(network(), blobs(), lr=0.2, steps=12, evaluate_every=1, **options)
    assert [record["lr"] for record in result.history] == [0.2 * factor(step) for step in range(12)]


def test_gradients_are_clipped() -> None:
    x, y = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0], [0.0]])
    model = nn.Linear(2, 1, bias=False)
    weight = model.weight.detach().clone()
    gradient = (x @ weight.T - y).T @ x / 2
    bound = float(gradient.norm()) / 4
    fit(model, (x, y), loss="squared_error", optimizer="sgd", lr=0.1, steps=1, batch_size=2, clip_norm=bound)
    torch.testing.assert_close(model.weight.detach(), weight - 0.1 * gradient / 4)


def test_a_training_and_its_fields_as_keywords_are_one() -> None:
    fields = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.5, "schedule": "step", "batch_size": 16, "seed": 3}
    models = [network() for _ in range(3)]
    histories = [
        fit(models[0], blobs(), training=Training(**fields, epochs=2)).history,
        fit(models[1], blobs(), **fields, epochs=2).history,
        fit(models[2], blobs(), training=Training(**fields, steps=99), epochs=2).history,
    ]
    assert histories[0] == histories[1] == histories[2]
    assert equal(state(models[0]), state(models[1]))
    assert equal(state(models[0]), state(models[2]))
    assert fit(network(), blobs(), training=Training(epochs=9), steps=2).steps == 2


def test_the_keywords_of_a_training_are_its_fields() -> None:
    assert get_type_hints(TrainingChanges) == get_type_hints(Training)


def test_a_training_holds_plain_values_and_can_be_a_key() -> None:
    training = Training(lr=np.float32(0.5), seed=np.int64(3), batch_size=[np.int32(8), 4], schedule_drops=(0.5, 0.75))
    assert training == Training(lr=0.5, seed=3, batch_size=(8, 4))
    assert {training: 1}[Training(lr=0.5, seed=3, batch_size=[8, 4])] == 1
    assert [type(value) for value in (training.lr, training.seed, *training.batch_size)] == [float, int, int, int]
    with pytest.raises(FrozenInstanceError):
        training.lr = 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "lion"}, "no optimizer 'lion'; available: adam, adamw, sgd"),
        ({"schedule": "square"}, "no schedule 'square'; .* constant, linear, cosine, step, exponential"),
        ({"lr": "0.1"}, "lr must be a finite number above 0, not '0.1'"),
        ({"lr": float("inf")}, "lr must be a finite number above 0, not inf"),
        ({"lr_decay": 0}, "lr_decay must be a finite number above 0, not 0"),
        ({"min_lr": -1.0}, "min_lr must be a finite number of at least 0, not -1.0"),
        ({"momentum": 1, "optimizer": "sgd"}, "momentum must be at least 0 and below 1, not 1"),
        ({"weight_decay": None}, "weight_decay must be a finite number of at least 0, not None"),
        ({"clip_norm": 0}, "clip_norm must be a finite number above 0, not 0"),
        ({"schedule": "step", "schedule_factor": 1.5}, "schedule_factor must be above 0 and at most 1, not 1.5"),
        ({"schedule": "step", "schedule_drops": ()}, r"schedule_drops must be increasing fractions .*, not \(\)"),
        ({"schedule": "step", "schedule_drops": 0.5}, "schedule_drops must be increasing fractions .*, not 0.5"),
        ({"schedule": "step", "schedule_drops": [0.5, 0.5]}, "schedule_drops must be increasing"),
        ({"schedule": "step", "schedule_drops": [0.5, 1.0]}, "schedule_drops must be increasing .*, not 1.0"),
        ({"schedule_factor": 0.5}, "schedule_factor belongs to schedule step and exponential; leave it at 0.1"),
        (
            {"schedule": "exponential", "schedule_drops": [0.5]},
            r"schedule_drops belongs to schedule step; leave it at \(0.5, 0.75\)",
        ),
        ({"batch_size": True}, "batch_size must be a whole number from 1, not True"),
        ({"batch_size": [8, 1.5]}, "batch_size must be a whole number from 1, not 1.5"),
        ({"epochs": 0}, "epochs must be a whole number from 1, not 0"),
        ({"steps": 1.0}, "steps must be a whole number from 1, not 1.0"),
        ({"epochs": 1, "steps": 1}, "either epochs or steps, not both"),
        ({"seed": 0.5}, "seed must be a whole number from 0, not 0.5"),
    ],
)
def test_wrong_values_of_a_training_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvlabError, match=message):
        Training(**fields)


def test_a_checkpoint_describes_a_run_as_in_earlier_versions(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    fit(network(), blobs(), **options(file))
    described = torch.load(file)["fingerprint"]
    assert {k: v for k, v in described.items() if not k.startswith(("parameter", "buffer")) and "data" not in k} == {
        "loss": "cross_entropy",
        "optimizer": "adam",
        "lr": 0.01,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "steps": 30,
        "batch_size": 16,
        "seed": 0,
        "evaluate_every": 7,
        "target": None,
    }


def test_same_seed_same_bits_and_another_seed_others() -> None:
    models = [network() for _ in range(3)]
    histories = [
        fit(m, blobs(), steps=12, batch_size=16, seed=s).history for m, s in zip(models, (5, 5, 6), strict=True)
    ]
    assert equal(state(models[0]), state(models[1]))
    assert histories[0] == histories[1]
    assert not equal(state(models[0]), state(models[2]))


def test_modes_gradients_and_random_state_are_restored() -> None:
    model = network()
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    gradient = torch.ones_like(model[0].weight)
    model[0].weight.grad = gradient
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit(model, blobs(), steps=3, evaluation=blobs())
    evaluate(model, *blobs())
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert model[4].weight.grad is None
    with pytest.raises(CurvlabError):
        fit(model, blobs(), lr=1e30, optimizer="sgd", steps=50)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def options(checkpoint: Path | None, **changes: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "steps": 30,
        "batch_size": 16,
        "lr": 0.01,
        "schedule": "cosine",
        "evaluation": blobs(30),
        "evaluate_every": 7,
        "checkpoint": checkpoint,
        "checkpoint_every": 5,
    }
    return plain | changes


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    momentum = 0.9 if optimizer == "sgd" else 0.0
    undisturbed = network()
    whole = fit(undisturbed, blobs(), **options(None, optimizer=optimizer, momentum=momentum))

    file = tmp_path / "new" / "run.pt"
    real = running.Run.train_step

    def dies(run: running.Run, *batch: object) -> None:
        real(run, *batch)
        if run.step == 18:
            raise KeyboardInterrupt  # in the middle of a step, which must not be saved

    monkeypatch.setattr(running.Run, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), blobs(), **options(file, optimizer=optimizer, momentum=momentum))
    monkeypatch.undo()
    torch.manual_seed(99)
    model = network()
    rest = fit(model, blobs(), **options(file, optimizer=optimizer, momentum=momentum))
    assert rest.resumed_at == 15
    assert equal(state(model), state(undisturbed))
    assert rest.history == whole.history
    # A finished run is only read.
    again = network()
    assert fit(again, blobs(), **options(file, optimizer=optimizer, momentum=momentum)).history == whole.history
    assert equal(state(again), state(undisturbed))
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_ctrl_c_saves_the_last_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    undisturbed = network()
    whole = fit(undisturbed, blobs(), **options(None))
    file = tmp_path / "run.pt"
    handler = signal.getsignal(signal.SIGINT)
    real_step, real_measure = running.Run.train_step, running.measure

    def step(run: running.Run, *batch: object) -> None:
        if place == "step" and run.step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        real_step(run, *batch)

    def measure(*arguments: object) -> object:
        result = real_measure(*arguments)
        if place == "evaluation":
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(running.Run, "train_step", step)
    monkeypatch.setattr(running, "measure", measure)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), blobs(), **options(file))
    monkeypatch.undo()
    stopped = {"step": 13, "evaluation": 7}[place]
    assert caught.value.__notes__ == [f"training stopped after step {stopped} of 30, saved in {file}"]
    assert signal.getsignal(signal.SIGINT) is handler
    model = network()
    rest = fit(model, blobs(), **options(file))
    assert rest.resumed_at == stopped
    assert equal(state(model), state(undisturbed))
    assert rest.history == whole.history


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    fit(network(), blobs(), **options(file))
    content = file.read_bytes()
    for model, data, changes, difference in (
        (network(), blobs(), {"lr": 0.02}, "lr is 0.01 there and 0.02 here"),
        (network(), blobs(), {"steps": 31}, "steps is 30 there and 31 here"),
        (network(), blobs(), {"clip_norm": 1.0}, "clip_norm is absent there and 1.0 here"),
        (network(), blobs(), {"schedule": "step"}, "schedule is cosine there and step here, schedule_factor is absent"),
        (
            network(9),
            blobs(),
            {},
            r"parameter 0.weight is \(8, 6\) float32 cpu there and \(9, 6\) float32 cpu here",
        ),
        (network(), (blobs()[0] + 1, blobs()[1]), {}, "training data is"),
        (network(), blobs(), {"evaluation": blobs(33)}, "evaluation data is"),
    ):
        before = state(model)
        with pytest.raises(CurvlabError, match=rf"{file} belongs to another run: {difference}"):
            fit(model, data, **options(file, **changes))
        assert equal(state(model), before)
    assert file.read_bytes() == content


def test_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    fit(network(), blobs(), **options(file))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CurvlabError, match=rf"{file} cannot be read"):
        fit(network(), blobs(), **options(file))
    torch.save(network().state_dict(), file)
    with pytest.raises(CurvlabError, match=rf"{file} is not a curvlab training checkpoint"):
        fit(network(), blobs(), **options(file))


def test_unwritable_checkpoint_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = network()
    before = state(model)
    with pytest.raises(CurvlabError, match=f"{tmp_path / 'file'} is a file"):
        fit(model, blobs(), **options(tmp_path / "file" / "run.pt"))
    assert equal(state(model), before)


def test_checkpoint_holds_finite_weights_only(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    with pytest.raises(CurvlabError, match="lower lr"):
        fit(network(), blobs(), **options(file, optimizer="sgd", lr=1e30, schedule="constant"))
    assert not file.exists()


def test_loss_that_ceases_to_be_finite_is_named_with_its_step() -> None:
    x = torch.full((4, 1), 1e18)
    with pytest.raises(CurvlabError, match=r"training loss is (inf|nan) at step 2: lower lr \(here 10\)"):
        fit(nn.Linear(1, 1), (x, torch.zeros(4, 1)), loss="squared_error", optimizer="sgd", lr=10.0, steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
        ({"lr": 0.0}, "lr must be a finite number above 0, not 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0"),
        ({"optimizer": "lbfgs"}, "no optimizer 'lbfgs'"),
        ({"schedule": "square"}, "no schedule 'square'"),
        ({"momentum": 0.9}, "momentum belongs to sgd"),
        ({"epochs": 1}, "either epochs or steps, not both"),
        ({"steps": None}, "either epochs or steps"),
        ({"seed": -1}, "seed must be a whole number from 0, not -1"),
        ({"target": 0.9}, "target must be an accuracy .* with evaluation data"),
        ({"target": "0.9", "evaluation": blobs()}, "target must be a finite real number, not '0.9'"),
        ({"target": float("nan"), "evaluation": blobs()}, "target must be a finite real number, not nan"),
        ({"checkpoint": 3}, "3 is not a path of a file"),
        (
            {"observers": 3},
            r"observers must be a list of objects with the methods of curvlab\.training\.Observer, not 3",
        ),
        ({"observers": [print]}, "observers must be a list of objects with the methods"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"evaluate_every": 0}, "evaluate_every must be a whole number from 1, not 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number from 1, not 0"),
        ({"batch_size": [8]}, "batch_size must be one number here; a list .* is for continual.run"),
        ({"steps": [8]}, "steps must be one number here"),
        ({"lr_decay": 0.5}, "lr_decay is for the tasks of continual.run; leave it at 1.0"),
        ({"min_lr": 0.5}, "min_lr is for the tasks of continual.run"),
        ({"training": 0.1}, r"training must be a curvlab\.training\.Training, not 0.1"),
        ({"momentun": 0.9}, "no training option 'momentun'; did you mean 'momentum'"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CurvlabError, match=message):
        fit(network(), blobs(), **({"steps": 2} | changes))


@pytest.mark.parametrize("size", [0, -1, 1.5, None, float("nan"), "8", True])
def test_wrong_batch_sizes_of_an_evaluation_are_refused(size: Any) -> None:
    with pytest.raises(CurvlabError, match="batch_size must be a whole number from 1, not "):
        evaluate(network(), *blobs(), batch_size=size)


def test_wrong_data_and_weights_are_refused() -> None:
    x, y = blobs()
    broken = x.clone()
    broken[4, 2] = float("nan")
    for data, message in (
        ((x[:0], y[:0]), "no samples"),
        ((x, y[:-1]), "90 inputs but 89 targets"),
        ((broken, y), "training inputs hold NaN or infinite values, first in sample 4"),
        ((x[:, :5], y), "the model cannot take the training inputs: .*shapes"),
        ((x, y + 1), "a label is 3"),
        ((x, y.float()), "class indices"),
    ):
        with pytest.raises(CurvlabError, match=message):
            fit(network(), data, steps=1)
    with pytest.raises(CurvlabError, match="evaluation inputs hold NaN"):
        fit(network(), (x, y), steps=1, evaluation=(broken, y))
    model = network()
    with torch.no_grad():
        model[4].bias[1] = float("inf")
    with pytest.raises(CurvlabError, match=r"parameter 4\.bias holds NaN or infinite values at the start"):
        fit(model, (x, y), steps=1)
    with pytest.raises(CurvlabError, match="no trainable parameters"):
        fit(network().requires_grad_(False), (x, y), steps=1)
    # Batch normalisation cannot train on a last batch of one sample.
    with pytest.raises(CurvlabError, match="fails in step 2: batch normalisation needs more than one"):
        fit(network(), (x[:21], y[:21]), epochs=1, batch_size=20)


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = state(model)
    fit(model, blobs(), steps=5, weight_decay=0.1)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[4].weight, before["4.weight"])


def test_evaluate_does_not_depend_on_the_batch_size() -> None:
    x, y = blobs()
    model = network().double()
    whole, split = evaluate(model, x, y), evaluate(model, x, y, batch_size=7)
    assert split.accuracy == whole.accuracy
    assert split.loss == pytest.approx(whole.loss, rel=1e-12)
    with torch.no_grad():
        outputs = model.eval()(x.double())
    assert whole.loss == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-12)
    assert evaluate(model, x, outputs, loss="squared_error").accuracy is None


def test_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CheckpointFile(tmp_path / "run.pt", {"lr": 0.1})
    file.write({"step": 1})

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(CurvlabError, match=r"cannot write .*run\.pt: No space left on device"):
        file.write({"step": 2})
    monkeypatch.undo()
    assert file.read()["step"] == 1
    assert list(tmp_path.iterdir()) == [file.path]


class Counts:
    """An observer that changes modes and gradients, and draws from every random state."""

    def __init__(self, every: int = 4) -> None:
        self.every = every
        self.seen: list[tuple[int, float]] = []

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def __call__(self, step: int, model: nn.Module) -> None:
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
        outputs = model(blobs()[0])
        outputs.sum().backward()
        model.train(step % 8 == 0)
        self.seen.append((step, outputs.sum().item()))

    def state_dict(self) -> dict[str, object]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, states: dict[str, object], /) -> None:
        self.seen = list(states["seen"])


def test_observers_see_every_due_step_once_and_leave_no_trace() -> None:
    alone, watched = network(), network()
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    history = fit(alone, blobs(), **options(None)).history
    first, second = Counts(), Counts(7)
    result = fit(watched, blobs(), **options(None), observers=[first, second])
    assert equal(state(alone), state(watched))
    assert result.history == history
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
    assert [step for step, _ in first.seen] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert [step for step, _ in second.seen] == [0, 7, 14, 21, 28, 30]
    assert first.seen[-1] == second.seen[-1]
    assert first.seen[0][1] != first.seen[1][1]
    assert 0 < result.observer_seconds < result.seconds
    assert fit(network(), blobs(), **options(None)).observer_seconds == 0


def test_observers_see_the_step_that_reaches_the_target() -> None:
    observer = Counts(1000)
    data = blobs()
    result = fit(network(), data, lr=0.03, epochs=50, batch_size=20, evaluation=data, target=0.99, observers=[observer])
    assert result.steps < 250
    assert [step for step, _ in observer.seen] == [0, result.steps]


def test_observers_of_a_killed_run_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Counts()
    fit(network(), blobs(), **options(None), observers=[whole])
    file = tmp_path / "run.pt"
    real = running.Run.train_step

    def dies(run: running.Run, *batch: object) -> None:
        real(run, *batch)
        if run.step == 23:
            raise KeyboardInterrupt

    monkeypatch.setattr(running.Run, "train_step", dies)
    lost = Counts()
    with pytest.raises(KeyboardInterrupt):
        fit(network(), blobs(), **options(file), observers=[lost])
    monkeypatch.undo()
    assert [step for step, _ in lost.seen] == [0, 4, 8, 12, 16, 20]
    rest = Counts()
    assert fit(network(), blobs(), **options(file), observers=[rest]).resumed_at == 20
    assert rest.seen == whole.seen
    again = Counts()
    fit(network(), blobs(), **options(file), observers=[again])
    assert again.seen == whole.seen
    with pytest.raises(CurvlabError, match="observers is Counts there and Counts, Counts here"):
        fit(network(), blobs(), **options(file), observers=[Counts(), Counts()])
    with pytest.raises(CurvlabError, match="observers is Counts there and absent here"):
        fit(network(), blobs(), **options(file))


def test_ctrl_c_in_an_observer_asks_it_again(tmp_path: Path) -> None:
    whole = Counts()
    model = network()
    fit(model, blobs(), **options(None), observers=[Counts(), whole])
    file = tmp_path / "run.pt"

    class Stops(Counts):
        def __call__(self, step: int, model: nn.Module) -> None:
            super().__call__(step, model)
            if step == 12:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), blobs(), **options(file), observers=[Counts(), Stops()])
    assert caught.value.__notes__ == [
        "in Stops, called after step 12 of the training",
        f"training stopped after step 12 of 30, saved in {file}",
    ]
    # The type must have the name in the checkpoint; this one does not stop.
    first, second = Counts(), type("Stops", (Counts,), {})()
    rest_model = network()
    assert fit(rest_model, blobs(), **options(file), observers=[first, second]).resumed_at == 12
    assert first.seen == second.seen == whole.seen
    assert equal(state(rest_model), state(model))


@pytest.mark.parametrize("change", ["write", "replace", "freeze", "buffer"])
def test_an_observer_that_changes_the_model_is_an_error(change: str) -> None:
    class Meddles(Counts):
        def __call__(self, step: int, model: nn.Module) -> None:
            if change == "write":
                with torch.no_grad():
                    model[0].weight.mul_(2)
            elif change == "replace":
                model[0].weight = nn.Parameter(model[0].weight.detach().clone())
            elif change == "freeze":
                model[0].weight.requires_grad_(False)
            else:
                model.train()(blobs()[0])

    name = {"buffer": "1.num_batches_tracked"}.get(change, "0.weight")
    with pytest.raises(CurvlabError, match=rf"an observer changed {name} of the model; let it work") as caught:
        fit(network(), blobs(), steps=3, observers=[Meddles()])
    assert caught.value.__notes__ == ["in Meddles, called after step 0 of the training"]


def test_a_diverged_training_is_named_before_an_observer_sees_it() -> None:
    observer = Counts(1)
    x, y = blobs()
    with pytest.raises(CurvlabError, match=r"parameter weight holds NaN or infinite values after step 1: lower lr"):
        fit(nn.Linear(6, 3), (1e3 * x, y), optimizer="sgd", lr=1e38, steps=3, batch_size=30, observers=[observer])
    assert [step for step, _ in observer.seen] == [0]


def test_other_types_than_models_and_data_are_refused() -> None:
    x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
    for wrong in (None, nn.Linear, nn.Linear(2, 3).state_dict()):
        for attempt in (
            lambda wrong=wrong: fit(wrong, (x, y), loss="cross_entropy", steps=1),
            lambda wrong=wrong: evaluate(wrong, x, y),
        ):
            with pytest.raises(CurvlabError, match=r"must be a torch.nn.Module, not"):
                attempt()
    for wrong in (None, 3, x, (x.numpy(), y.numpy()), (x, y, y)):
        with pytest.raises(CurvlabError, match="must be a pair of tensors"):
            fit(nn.Linear(2, 3), wrong, loss="cross_entropy", steps=1)
