"""``python -m curvlab.analyze eigenvalues``: curves, claims, figures, what a run leaves, and how it continues."""

import json
import math
import shlex
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from killing import stopped_when_written
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from curvlab import CurvlabError, Problem, estimate
from curvlab.analyze import eigenvalues, subject
from curvlab.analyze.__main__ import main
from curvlab.analyze.command import RunOptions
from curvlab.analyze.eigenvalues import PRESETS, EigenvaluesConfig, claims, summarise
from curvlab.grid import Place, Store, folder_of, processes, reading
from curvlab.models import ResNet20, build, freeze_batch_norm, load_weights, shallow_cnn
from curvlab.results.curves import density_curves, eigenvalue_curves, layer_curves, normalised_curves

pytestmark = pytest.mark.usefixtures("one_server", "cells_here")

NAME = "eigenvalues"
TINY = "--hidden 4 --steps 6 --every 3 --ekfac-every 3 --samples 40 --seeds 0 1 --lr-squared-error 0.01 0.001"
FILES = {
    *("config.yaml", "learning_rates.json", "trainings.json", "claims.json", "provenance.json"),
    *(f"table.{kind}" for kind in ("json", "csv", "md", "tex")),
    *(f"{figure}.{kind}" for figure in ("eigenvalues", "normalised") for kind in ("png", "pdf")),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, without the machine's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(eigenvalues.__file__).parents[2]))


@pytest.fixture(autouse=True)
def _without_figures(request, monkeypatch):
    if "with_figures" not in request.fixturenames:
        monkeypatch.setattr(eigenvalues, "_figures", lambda *_: None)


@pytest.fixture
def call(capsys):
    """Return a function that runs the analysis and gives exit code, standard output and standard error."""

    def call(line):
        code = main([NAME, *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def tree(folder):
    """Return the files of a folder, those of its store left out."""
    found = (str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    return {name for name in found if not name.startswith("sweep.sqlite")}


def left_by_cells(folder):
    """Return the names of the files that the cells have left in their folders."""
    return sorted(path.name for path in Path(folder).glob("sweep.sqlite.cells/*/*"))


def contents(folder):
    return {name: Path(folder, name).read_bytes() for name in tree(folder)}


def trainings(folder):
    """Return what is known of a run's trainings, by seed and loss."""
    return {(t["seed"], t["loss"]): t for t in json.loads(Path(folder, "trainings.json").read_text())}


def results(folder):
    """Return what a run has measured, without the seconds that it took."""
    records = json.loads(Path(folder, "table.json").read_text()) + list(trainings(folder).values())
    return [{key: value for key, value in r.items() if not key.endswith("seconds")} for r in records]


# The numbers.


def test_every_point_is_the_dense_matrix_of_the_network_as_it_was(tmp_path, monkeypatch):
    """Each recorded eigenvalue against the dense matrix of a copy of the network taken at that step."""
    networks = {}
    real = eigenvalues._EkfacRecorder.__call__

    def keep(self, step, model):
        networks[self._loss, step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        real(self, step, model)

    monkeypatch.setattr(eigenvalues._EkfacRecorder, "__call__", keep)
    config = EigenvaluesConfig(
        hidden=(3,),
        steps=5,
        every=4,
        ekfac_every=4,
        samples=30,
        seeds=(3,),
        dtype="float64",
        tol=1e-10,
        lr_squared_error=(0.003,),
        per=("network", "layer"),
        alpha=7,
    )
    records = [record for record in eigenvalues.cell(config, Place(tmp_path)) if "step" in record]
    data, _ = eigenvalues._data(config, RunOptions())
    x, y = data.x_train[:30], data.y_train[:30]
    model = build("mlp", data.sample_shape, 10, hidden=(3,)).double()
    targets = {"cross_entropy": y, "squared_error": 7 * torch.eye(10)[y]}
    assert {record["step"] for record in records} == {0, 4, 5}
    assert {record["layer"] for record in records} == {"network", "fc1", "fc2"}
    assert {record["quantity"] for record in records} == {"fisher", "hessian", "ekfac"}
    assert len(records) == 2 * 3 * 3 * 3
    dense = {}
    for loss, step in networks:
        model.load_state_dict(networks[loss, step], strict=True)
        problem = Problem(model, loss, (x, targets[loss]))
        for quantity, structure in (("fisher", "dense"), ("hessian", "dense"), ("fisher", "ekfac")):
            key = (loss, step, "ekfac" if structure == "ekfac" else quantity)
            dense[key] = estimate(problem, quantity, structure, backend="torch").to_dense()
    first = sum(p.numel() for p in model.fc1.parameters())
    parts = {"network": slice(None), "fc1": slice(first), "fc2": slice(first, None)}
    for record in records:
        part = parts[record["layer"]]
        matrix = dense[record["loss"], record["step"], record["quantity"]][part, part]
        expected = float(torch.linalg.eigvalsh(matrix)[-1])
        assert record["value"] == pytest.approx(expected, rel=1e-8), record
    # Every value of EK-FAC is a Rayleigh quotient of the Fisher.
    keys = ("loss", "step", "layer")
    exact = {tuple(r[key] for key in keys): r["value"] for r in records if r["quantity"] == "fisher"}
    for record in records:
        if record["quantity"] == "ekfac":
            assert record["value"] <= exact[tuple(record[key] for key in keys)] * (1 + 1e-9)


def test_the_networks_are_trained_as_it_is_said(call):
    """The training by hand: plain PyTorch, the mean loss, momentum, a rate that falls to zero."""
    line = "--hidden 4 --steps 4 --every 2 --ekfac-every 2 --samples 20 --seeds 5 --dtype float64 --batch-size 2000"
    assert call(f"{line} --lr 0.05 --lr-squared-error 0.002 --validation 300 --train-samples 50 --out run")[0] == 0
    config = EigenvaluesConfig(validation=300, train_samples=50)
    data, _ = eigenvalues._data(config, RunOptions())
    x, y = data.x_train.double(), data.y_train
    assert len(x) == 50
    for loss, lr in (("cross_entropy", 0.05), ("squared_error", 0.002)):
        model = build("mlp", data.sample_shape, 10, hidden=(4,), seed=5).double()
        velocity = [torch.zeros_like(p) for p in model.parameters()]
        losses = []
        for step in range(4):
            out = model(x)
            if loss == "cross_entropy":
                value = F.cross_entropy(out, y)
            else:
                value = 0.5 * (15 * torch.eye(10, dtype=torch.float64)[y] - out).square().sum(dim=1).mean()
            losses.append(value.item())
            for p, v, g in zip(
                model.parameters(), velocity, torch.autograd.grad(value, list(model.parameters())), strict=True
            ):
                v.mul_(0.9).add_(g)
                p.data -= lr * (1 - step / 4) * v
        records = json.loads(Path("run/table.json").read_text())
        of_step = {record["step"]: record["train_loss"] for record in records if record["loss"] == loss}
        assert of_step[0] is None
        assert of_step[2] == pytest.approx(np.mean(losses[:2]), rel=1e-10)
        assert of_step[4] == pytest.approx(np.mean(losses[2:]), rel=1e-10)
        right = (model(data.x_test.double()).argmax(dim=1) == data.y_test).double().mean()
        training = trainings("run")[5, loss]
        assert training["test_accuracy"] == pytest.approx(float(right))
        assert training["lr"] == lr


def test_the_learning_rate_with_the_lowest_validation_loss_is_taken(call):
    line = "--hidden 4 --steps 30 --every 30 --ekfac-every 30 --samples 20 --seeds 0 --losses squared_error"
    assert call(f"{line} --lr-squared-error 1e20 0.01 0.0000001 --out run")[0] == 0
    rates = json.loads(Path("run/learning_rates.json").read_text())
    assert [rate["lr"] for rate in rates] == [1e20, 0.01, 1e-7]
    assert rates[0]["validation_loss"] is None
    assert "the training loss is" in rates[0]["note"]
    assert rates[1]["validation_loss"] < rates[2]["validation_loss"]
    assert trainings("run")[0, "squared_error"]["lr"] == 0.01
    # The network that was chosen on held-out samples has seen none of them.
    config = EigenvaluesConfig()
    data, held_out = eigenvalues._data(config, RunOptions())
    rows = {tuple(row) for row in data.x_train.flatten(1).tolist()}
    assert not any(tuple(row) in rows for row in held_out[0].flatten(1).tolist())
    assert len(data.x_train) + len(held_out[0]) == 1437


def test_the_learning_rate_is_that_of_the_first_seed(call, tmp_path):
    """Chosen once for all seeds; a cell with several takes the best for its own."""
    line = f"{TINY} --losses squared_error --lr-squared-error 0.01 0.0000001"
    assert call(f"{line} --seeds 1 0 --out run")[0] == 0
    rates = json.loads(Path("run/learning_rates.json").read_text())
    config = EigenvaluesConfig(
        hidden=(4,),
        steps=6,
        every=3,
        ekfac_every=3,
        samples=40,
        losses=("squared_error",),
        lr_squared_error=(1e-7, 0.01),
        seeds=(1,),
    )
    data, held_out = eigenvalues._data(config, RunOptions())
    assert rates == [eigenvalues._rate(config, data, held_out, lr) for lr in (0.01, 1e-7)]
    records = eigenvalues.cell(config, Place(tmp_path / "place"))
    values = {record["value"] for record in records if "step" in record}
    of_run = json.loads(Path("run/table.json").read_text())
    assert values == {record["value"] for record in of_run if record["seed"] == 1}


def test_no_learning_rate_will_do(call):
    code, out, err = call(f"{TINY} --steps 60 --lr-squared-error 1e20 1e10 --out run")
    assert (code, out) == (2, "")
    assert err.splitlines()[0].startswith(
        "error: the training with squared_error fails at every learning rate of 1e+20"
    )
    assert "lower ones with --lr-squared-error" in err


def test_samples_of_a_file_that_is_sorted_by_class(call):
    """The first ones would be of one class: what is held out, trained on and measured has all of them."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 100)
    x = rng.random((400, 6), np.float32)
    np.savez("sorted.npz", x_train=x, y_train=y, x_test=x[::10], y_test=y[::10])
    config = EigenvaluesConfig(data="sorted.npz", validation=60, train_samples=200, samples=60)
    data, held_out = eigenvalues._data(config, RunOptions())
    for labels in (held_out[1], data.y_train, subject.samples(config, data)[1]):
        assert torch.bincount(labels, minlength=4).min() >= 5
    assert call(f"{TINY} --data sorted.npz --validation 60 --train-samples 200 --out run")[0] == 0


# What is made of the curves.


def curve(loss, values, seed=0, quantity="fisher", layer="network", matvecs=5):
    keys = {"loss": loss, "seed": seed, "quantity": quantity, "layer": layer, "index": 0, "matvecs": matvecs}
    return [keys | {"step": 10 * i, "value": value} for i, value in enumerate(values)]


def test_summary():
    records = curve("cross_entropy", [1.0, 8.0, 2.0], matvecs=4) + curve("cross_entropy", [3.0, 2.0, 6.0], 1, matvecs=7)
    (row,) = summarise(records[::-1])  # in whatever order
    assert (row["start"], row["maximum"], row["maximum_step"], row["end"]) == (2.0, 7.0, 15.0, 4.0)
    assert row["end_of_maximum"] == pytest.approx((2 / 8 + 6 / 6) / 2)
    assert row["end_of_start"] == pytest.approx((2 / 1 + 6 / 3) / 2)
    assert row["end_std"] == pytest.approx(math.sqrt(8))
    assert row["matvecs"] == 5.5
    assert summarise(curve("cross_entropy", [-1.0, -2.0]))[0]["end_of_maximum"] is None


def verdicts(softmax, squared, seeds=3):
    records = []
    for seed in range(seeds):
        records += curve("cross_entropy", softmax[seed % len(softmax)], seed)
        records += curve("squared_error", squared[seed % len(squared)], seed)
    return [claim.verdict for claim in claims(records)]


@pytest.mark.parametrize(
    ("softmax", "squared", "expected"),
    [
        ([[1, 10, 1.9]], [[4, 8, 7]], ["reproduced", "reproduced", "reproduced"]),
        ([[1, 10, 2.1]], [[4, 8, 7]], ["not reproduced", "reproduced", "reproduced"]),
        ([[1, 10, 1.9]], [[4, 8, 1.9]], ["reproduced", "not reproduced", "not reproduced"]),
        ([[1, 10, 2]], [[4, 8, 2]], ["reproduced", "reproduced", "not reproduced"]),
        # One seed of three is enough to lose a claim.
        ([[1, 10, 1], [1, 10, 1], [1, 10, 3]], [[4, 8, 8]], ["not reproduced", "reproduced", "reproduced"]),
    ],
)
def test_verdicts(softmax, squared, expected):
    assert verdicts(softmax, squared) == expected
    assert verdicts(softmax, squared, seeds=2) == ["not tested"] * 3


def test_a_curve_with_fewer_points_has_no_maximum_to_be_judged_by():
    records = []
    for seed in range(3):
        for quantity, keep in (("fisher", {0, 10, 20}), ("ekfac", {0, 20})):
            for loss, values in (("cross_entropy", [1, 10, 1]), ("squared_error", [4, 8, 8])):
                records += [r for r in curve(loss, values, seed, quantity) if r["step"] in keep]
    found = {claim.text.partition(":")[0]: [] for claim in claims(records)}
    for claim in claims(records):
        found[claim.text.partition(":")[0]].append(claim.verdict)
    assert found["Fisher"] == ["reproduced"] * 3
    assert found["Fisher by EK-FAC"] == ["not tested", "reproduced", "not tested"]


def test_claims_need_both_losses_and_leave_layers_alone():
    records = [r for seed in range(3) for r in curve("cross_entropy", [1, 10, 1], seed)]
    records += [r for seed in range(3) for r in curve("cross_entropy", [1, 10, 10], seed, layer="fc1")]
    found = claims(records)
    assert [claim.verdict for claim in found] == ["reproduced", "not tested", "not tested"]
    assert [claim.ours for claim in found] == [pytest.approx(0.1), None, None]


# Figures.


def lines(axes):
    return {line.get_color(): line for line in axes.get_lines()}


def test_curves_have_means_and_bands():
    records = curve("cross_entropy", [1.0, 8.0, 2.0]) + curve("cross_entropy", [3.0, 4.0, 6.0], seed=1)
    records += curve("squared_error", [10.0, 20.0, 5.0]) + curve("squared_error", [10.0, 40.0, 20.0], seed=1)
    figure = eigenvalue_curves(records, "title")
    panels = figure.axes
    assert [axes.get_yscale() for axes in panels] == ["linear", "linear", "log", "log"]
    for axes in (panels[0], panels[2]):
        (line,) = axes.get_lines()
        assert list(line.get_xdata()) == [0, 10, 20]
        assert list(line.get_ydata()) == [2.0, 6.0, 4.0]
        (band,) = axes.collections
        corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
        assert {(10, 4.0), (10, 8.0), (20, 2.0), (20, 6.0), (0, 1.0), (0, 3.0)} <= corners
    assert [axes.get_title() for axes in panels[:2]] == ["softmax cross-entropy", "squared error"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"Fisher", "mean and range of 2 seeds"}

    (linear, log) = normalised_curves(records, "title").axes
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    softmax, squared = linear.get_lines()
    assert list(softmax.get_ydata()) == pytest.approx([(1 / 8 + 3 / 6) / 2, (1 + 4 / 6) / 2, (2 / 8 + 1) / 2])
    assert list(squared.get_ydata()) == pytest.approx([(0.5 + 0.25) / 2, 1.0, (0.25 + 0.5) / 2])


def test_a_negative_eigenvalue_is_left_out_of_a_logarithmic_axis_only():
    linear, log = eigenvalue_curves(curve("cross_entropy", [-1.0, 2.0, 3.0]), "title").axes
    assert list(linear.get_lines()[0].get_ydata()) == [-1.0, 2.0, 3.0]
    assert linear.get_ylim()[0] <= -1
    assert np.isnan(log.get_lines()[0].get_ydata()[0])


def test_layers_and_densities_have_a_row_a_quantity_and_a_column_a_loss():
    records = [
        record
        for loss in ("cross_entropy", "squared_error")
        for quantity in ("fisher", "hessian", "ekfac")
        for layer in ("fc1", "fc2")
        for record in curve(loss, [1.0, 2.0], quantity=quantity, layer=layer)
    ]
    figure = layer_curves(records, "title")
    assert len(figure.axes) == 6
    assert all(len(axes.get_lines()) == 2 for axes in figure.axes)
    grid = np.linspace(0, 1, 5)
    densities = [
        {"loss": "cross_entropy", "quantity": "hessian", "step": step, "grid": grid, "density": grid + step}
        for step in (0, 1000)
    ]
    (axes,) = density_curves(densities, "title").axes
    assert len(axes.get_lines()) == 2
    assert axes.get_xlabel() == "eigenvalue of the Hessian (nats)"


# The networks.


def test_shallow_cnn_is_that_of_the_paper():
    model = build("shallow_cnn", (1, 28, 28), 10)
    assert [tuple(p.shape) for p in model.parameters()][::2] == [(32, 1, 3, 3), (100, 5408), (10, 100)]
    x = torch.randn(3, 1, 28, 28)
    p = dict(model.named_parameters())
    h = F.max_pool2d(F.conv2d(x, p["conv1.weight"], p["conv1.bias"]).relu(), 2).flatten(1)
    h = (h @ p["fc1.weight"].T + p["fc1.bias"]).relu()
    torch.testing.assert_close(model(x), h @ p["fc2.weight"].T + p["fc2.bias"])
    assert build("shallow_cnn", (3, 7, 5), 4)(torch.randn(2, 3, 7, 5)).shape == (2, 4)
    with pytest.raises(CurvlabError, match="shallow_cnn takes images"):
        shallow_cnn((64,), 10)


def test_a_new_head_and_frozen_batch_norm():
    torch.save(ResNet20(10).state_dict(), "ten.pt")
    with pytest.raises(CurvlabError, match=r"linear\.weight of shape"):
        build("resnet20", (3, 32, 32), 100, weights=Path("ten.pt"))
    model = build("resnet20", (3, 32, 32), 100, weights=Path("ten.pt"), new_head=True)
    fresh = build("resnet20", (3, 32, 32), 100)
    saved = torch.load("ten.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh.state_dict() if name.startswith("linear.") else saved)[name])

    freeze_batch_norm(model)
    model.train()
    assert model.training
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if "bn" in name
    }
    x = torch.randn(4, 3, 32, 32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = model(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(outputs, model.eval()(x))


def test_a_new_head_is_checked_like_the_rest():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    torch.save(model.state_dict(), "conv.pt")
    with pytest.raises(CurvlabError, match="no linear layer that could be a new head"):
        load_weights(model, "conv.pt", new_head=True)
    mlp = build("mlp", (4,), 3, hidden=(5,))
    torch.save({"fc2.weight": torch.zeros(3, 5), "fc2.bias": torch.zeros(3)}, "head.pt")
    with pytest.raises(CurvlabError, match=r"it has no fc1\.weight, no fc1\.bias"):
        load_weights(mlp, "head.pt", new_head=True)


def test_fine_tuning(call, monkeypatch):
    """A network for other classes, its weights below the data root, inputs with ImageNet's normalisation."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 5
    np.savez("images.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    Path("root/weights").mkdir(parents=True)
    torch.save(ResNet20(10).state_dict(), "root/weights/ten.pt")
    line = "--preset cpu-resnet20 --data images.npz --weights weights/ten.pt --data-root root --validation 10 "
    line += "--train-samples 20 --samples 8 --steps 2 --every 2 --batch-size 8 --seeds 0 --lr-squared-error 0.001"
    code, _, err = call(f"{line} --losses cross_entropy --quantities fisher --out run")
    assert (code, err) == (0, "")
    assert yaml.safe_load(Path("run/config.yaml").read_text())["weights"] == "weights/ten.pt"
    before = torch.load("root/weights/ten.pt", weights_only=True)
    (checkpoint,) = Path("run").rglob("cross_entropy.pt")
    trained = torch.load(checkpoint, weights_only=True)["model"]
    assert torch.equal(trained["buffer bn1.running_mean"], before["bn1.running_mean"])
    assert torch.equal(trained["parameter bn1.weight"], before["bn1.weight"])
    assert not torch.equal(trained["parameter conv1.weight"], before["conv1.weight"])
    config = PRESETS["cpu-resnet20"].model_copy(update={"data": "images.npz", "validation": 10, "train_samples": None})
    data, _ = eigenvalues._data(config, RunOptions())
    raw, _ = eigenvalues._data(config.model_copy(update={"normalize": "none"}), RunOptions())
    torch.testing.assert_close(data.x_test[:, 2], (raw.x_test[:, 2] - 0.406) / 0.225)
    code, _, err = call(f"{line} --weights weights/gone.pt --out other")
    assert code == 2
    assert "weights/gone.pt: there is no such file of weights, here or in the data root root" in err


# Bad input: one sentence, exit code 2, nothing written.


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--lose squared_error", "there is no option --lose; the nearest is --losses "),
        ("--losses", "losses needs one value or several different ones, not []"),
        ("--losses squared_error squared_error", "losses needs one value or several different ones"),
        ("--losses hinge", "--losses should be 'cross_entropy' or 'squared_error', not 'hinge'"),
        ("--alpha 0", "--alpha should be greater than 0, not '0'"),
        ("--alpha nan", "--alpha should be a finite number"),
        ("--lr-squared-error", "lr_squared_error needs one value or several different ones"),
        ("--lr-squared-error 0.1 0.1", "lr_squared_error needs one value or several different ones"),
        ("--lr-squared-error 0", "--lr-squared-error should be greater than 0"),
        ("--validation 0", "a learning rate is chosen on held-out samples: set validation"),
        ("--validation 1437", "cannot hold out 1437"),
        ("--train-samples 1238", "train_samples is 1,238, but there are 1,237 training samples"),
        ("--train-samples 50", "samples is 1,000, but there are 50 training samples"),
        ("--samples 1238", "samples is 1,238, but there are 1,237 training samples"),
        ("--samples 0", "--samples should be greater than or equal to 1"),
        ("--steps 0", "--steps should be greater than or equal to 1"),
        ("--every 0", "--every should be greater than or equal to 1"),
        ("--ekfac-every 0", "--ekfac-every should be greater than or equal to 1"),
        ("--quantities fihser", "did you mean 'fisher'"),
        ("--quantities", "quantities needs one value or several different ones"),
        ("--quantities hessian hessian", "quantities needs one value or several different ones"),
        ("--per layers", "--per should be 'network' or 'layer'"),
        ("--per layer layer", "per needs one value or several different ones"),
        ("--densities-at 2001", "densities_at has 2001, but there are 2000 steps"),
        ("--densities-at 5 5", "densities_at needs one value or several different ones"),
        ("--densities-at -1", "--densities-at should be greater than or equal to 0"),
        ("--tol 0", "--tol should be greater than 0"),
        ("--seeds 1 1", "seeds needs one value or several different ones"),
        ("--optimizer adam", "momentum belongs to sgd"),
        ("--fine-tune", "fine_tune is for weights from a file: set weights"),
        ("--normalize imagenet", "normalize=imagenet is for images with three channels"),
        ("--normalize cifar", "--normalize should be 'none' or 'imagenet'"),
        ("--weights gone.pt", "gone.pt: there is no such file of weights"),
        ("--model resnet20", "resnet20 takes images of shape (3, 32, 32)"),
        ("--model shallow", "the nearest name is 'shallow_cnn'"),
        ("--data mnist --offline", "mnist is not whole on disk"),
        ("--device cuda:99", "there is no GPU"),
        ("--out /dev/null/x", "cannot write /dev/null/x"),
    ],
)
def test_bad_value(call, tmp_path, line, fragment):
    code, out, err = call(line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert tree(tmp_path) == set()


def test_presets_are_whole(call):
    for preset in PRESETS:
        code, out, _ = call(f"--preset {preset} --print-config")
        assert code == 0
        Path("config.yaml").write_text(out)
        assert call("--config config.yaml --print-config")[1] == out
    cpu = PRESETS["cpu"]
    assert (cpu.model, cpu.optimizer, cpu.lr, cpu.momentum, cpu.schedule) == (
        "shallow_cnn",
        "sgd",
        0.01,
        0.9,
        "constant",
    )
    paper = PRESETS["paper"]
    assert (paper.steps, paper.every, paper.batch_size, paper.alpha) == (10000, 200, 128, 15.0)
    assert (paper.model, paper.lr, paper.momentum, paper.schedule) == ("shallow_cnn", 0.01, 0.9, "linear")
    cifar = PRESETS["paper-cifar100"]
    assert (cifar.steps, cifar.every, cifar.lr, cifar.schedule) == (16000, 500, 1e-4, "cosine")


# The run directory, stopping and continuing.


def test_a_run_and_the_same_again(call, with_figures):
    code, out, err = call(f"{TINY} --out run")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "Saved in run: " in out
    assert "taken" in out
    assert tree("run") == FILES
    assert left_by_cells("run") == ["cross_entropy.pt"] * 2 + ["squared_error.pt"] * 2
    with reading(Path("run/sweep.sqlite")) as store:
        assert store.tally() == {"done": 2 + 4, "failed": 0, "absent": 0, "earlier": 0}
    records = json.loads(Path("run/table.json").read_text(), parse_constant=pytest.fail)
    assert len(records) == len(pd.read_csv("run/table.csv")) == 2 * 2 * 3 * 3
    wanted = "loss seed step quantity layer index value residual matvecs converged seconds train_loss"
    assert set(records[0]) == set(wanted.split())
    assert Path("run/table.tex").read_text().isascii()
    provenance = json.loads(Path("run/provenance.json").read_text())
    assert set(provenance["seconds"]) == {"data", "learning rate", "cells", "figures"}
    assert provenance["continued"] is False
    assert {claim["verdict"] for claim in json.loads(Path("run/claims.json").read_text())} == {"not tested"}

    before = contents("run")
    code, again, _ = call(f"{TINY} --jobs 3 --out run")
    assert (code, again) == (0, out)
    assert contents("run") == before
    code, _, err = call(f"{TINY} --alpha 3 --out run")
    assert code == 2
    assert "run holds a run with another configuration (alpha is 15.0 there and 3.0 here)" in err


def test_the_same_seeds_give_the_same_numbers(call):
    assert call(f"{TINY} --out one")[0] == call(f"{TINY} --out two")[0] == 0
    assert results("one") == results("two")


def test_layers_and_densities_on_request(call, with_figures, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # that they are there is enough
    line = "--hidden 3 --steps 4 --every 2 --samples 30 --seeds 0 --lr-squared-error 0.001 --ekfac-every none"
    assert call(f"{line} --per network layer --densities-at 0 4 --quantities hessian --out run")[0] == 0
    figures = {f"{name}.{kind}" for name in ("layers", "densities") for kind in ("png", "pdf")}
    assert figures <= tree("run")
    records = [r for r in json.loads(Path("run/table.json").read_text()) if r["loss"] == "cross_entropy"]
    files = [json.loads(path.read_text()) for path in Path("run").rglob("densities.json")]
    (densities,) = [of_loss for of_loss in files if of_loss[0]["loss"] == "cross_entropy"]
    assert [(density["step"], density["quantity"]) for density in densities] == [(0, "hessian"), (4, "hessian")]
    (first, last) = densities
    # Of a small network the density is all eigenvalues, and the top one is that of the curve.
    assert first["density"]["exact"]
    tops = [r["value"] for r in records if r["layer"] == "network" and r["step"] in (0, 4)]
    assert [max(density["density"]["nodes"][0]) for density in (first, last)] == pytest.approx(tops, rel=1e-2)
    before, after = eigenvalues._drawn(densities)
    assert before["grid"] == after["grid"]
    for density in (before, after):
        assert np.trapezoid(density["density"], density["grid"]) == pytest.approx(1, abs=0.01)
    assert {r["quantity"] for r in records} == {"hessian"}
    assert call(f"{line} --per layer --quantities hessian --out layers")[0] == 0
    assert {"layers.png", "eigenvalues.png"} & tree("layers") == {"layers.png"}


@pytest.mark.parametrize("cells", [1, 3])
def test_interrupted_and_continued(call, monkeypatch, cells):
    """Ctrl-C while the learning rate is chosen, which takes two cells, and after it."""
    assert call(f"{TINY} --out undisturbed")[0] == 0
    real, left = Store.finish, [cells]

    def interrupted(self, outcome):
        real(self, outcome)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(Store, "finish", interrupted)
        code, out, err = call(f"{TINY} --jobs 1 --out run")
    assert (code, out) == (130, "")
    assert err == f"interrupted\ncells done in run: {cells}; the same command with --out run continues there\n"
    code, _, err = call(f"{TINY} --out run")
    assert (code, err) == (0, "")
    assert results("run") == results("undisturbed")
    assert tree("run") == tree("undisturbed")
    assert json.loads(Path("run/provenance.json").read_text())["continued"] is True


def test_a_cell_stopped_within_a_training(tmp_path, monkeypatch):
    """Between two points: the training goes on at its checkpoint, the curve without a gap or a point twice."""
    config = EigenvaluesConfig(
        hidden=(4,), steps=6, every=3, ekfac_every=3, samples=40, seeds=(1,), lr_squared_error=(0.01,)
    )

    def measured(folder):
        records = eigenvalues.cell(config, Place(tmp_path / folder))
        return [{key: value for key, value in r.items() if not key.endswith("seconds")} for r in records]

    undisturbed = measured("whole")
    real, steps = eigenvalues._EkfacRecorder.__call__, []

    def interrupted(self, step, model):
        steps.append((self._loss, step))
        if steps[-1] == ("squared_error", 6) and len(steps) == 6:
            raise KeyboardInterrupt
        real(self, step, model)

    monkeypatch.setattr(eigenvalues._EkfacRecorder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured("stopped")
    assert measured("stopped") == undisturbed
    assert steps[6:] == [("squared_error", 6)]


def test_killed_and_continued(call, starter):
    """In the first cell, at the first checkpoint of the second training."""
    line = "--hidden 4 --steps 6 --every 3 --ekfac-every 3 --samples 40 --seeds 0 --lr-squared-error 0.003 --jobs 1"
    assert call(f"{line} --out undisturbed")[0] == 0
    command = ["curvlab.analyze", NAME, *shlex.split(line), "--out", "run"]
    assert stopped_when_written(starter, command, "run", "squared_error.pt")[0] == -signal.SIGKILL
    assert not Path("run/table.json").exists()
    assert call(f"{line} --out run")[0] == 0
    assert results("run") == results("undisturbed")
    assert tree("run") == tree("undisturbed")


def test_a_cell_that_fails_is_told(call):
    """Three trainings of six fail, and whatever they are needed for is not tested."""
    line = f"{TINY} --seeds 0 1 2 --lr 1e30 --steps 60 --lr-squared-error 0.001 --out run"
    code, out, err = call(line)
    assert code == 1
    assert err.startswith("error: 3 of 6 cells have failed, the first (seed 0) so: the training loss is")
    assert "cells done in run: 3; the same command with --out run --retry-failed continues there" in err
    assert out.count("losses=") == 3
    assert {(r["loss"], r["seed"]) for r in results("run")} == {("squared_error", seed) for seed in range(3)}
    verdicts = {claim["text"]: claim["verdict"] for claim in json.loads(Path("run/claims.json").read_text())}
    assert {verdict for text, verdict in verdicts.items() if "squared error's does not" not in text} == {"not tested"}


def test_one_seed_of_a_loss_fails(call):
    """The title does not say of all rows how many seeds there are."""
    config = EigenvaluesConfig(
        hidden=(4,), steps=6, every=3, ekfac_every=None, samples=40, seeds=(0,), losses=("cross_entropy",)
    )
    (one,) = eigenvalues.ANALYSIS.cells([config])
    folder = folder_of(Path("run/sweep.sqlite"), one.key)
    folder.parent.mkdir(parents=True)
    folder.write_text("where the folder of the cell belongs")
    line = "--hidden 4 --steps 6 --every 3 --ekfac-every none --samples 40 --seeds 0 1 --losses cross_entropy --out run"
    Path("run/config.yaml").write_text(call(f"{line} --print-config")[1])
    code, out, _ = call(line)
    assert code == 1
    assert "standard deviation over the seeds that did not fail" in " ".join(out.split())
    assert "┃ seeds" in out


def test_no_cell_is_done(call):
    line = f"{TINY} --lr 1e30 --losses cross_entropy --steps 60 --out run"
    code, out, err = call(line)
    assert (code, out) == (1, "")
    assert err.startswith("error: 2 of 2 cells have failed, the first (seed 0) so: the training loss is")
    assert not Path("run/table.json").exists()


def test_a_learning_rate_that_is_not_known(call, monkeypatch):
    """A candidate that was not brought to its end may be the best: no other is taken."""
    monkeypatch.setattr(processes, "run", lambda *_: processes.Ended(None, 0, None, 0.05, "timeout"))
    code, out, err = call(f"{TINY} --losses squared_error --cell-timeout 0.05 --out run")
    assert (code, out) == (1, "")
    assert "not done after 0.05 seconds" in err
    assert not Path("run/learning_rates.json").exists()


def test_a_learning_rate_of_which_one_is_not_known(call, monkeypatch):
    rates = [{"lr": 0.1, "validation_loss": 1.0}], [{"error": "killed"}]
    monkeypatch.setattr(eigenvalues.gridded, "run", lambda *_: rates)
    code, out, err = call(f"{TINY} --out run")
    assert (code, out) == (1, "")
    assert err == "error: the best hyper-parameters are not known: a cell has failed: killed\n"
    assert not Path("run").exists()


def test_a_cell_refuses_what_the_run_refuses(tmp_path):
    with pytest.raises(CurvlabError, match="samples is 1,238, but there are 1,237"):
        eigenvalues.cell(EigenvaluesConfig(samples=1238, seeds=(0,)), Place(tmp_path))


def test_figure_and_analysis_scripts(call, monkeypatch, capsys):
    root = Path(eigenvalues.__file__).parents[2]
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    assert call(f"{TINY} --out run")[0] == 0
    scripts = {}
    for folder in ("figures", "analyses"):
        path = root / folder / "dlcft_curvature.py"
        if not path.exists():
            pytest.skip("the scripts are not installed with the package")
        scripts[folder] = {"__name__": "script"}
        exec(compile(path.read_text(), path, "exec"), scripts[folder])
    assert scripts["figures"]["main"](Path("run")) == 0
    assert {f"dlcft_curvature{name}.{kind}" for name in ("", "-normalised") for kind in ("png", "pdf")} <= tree("run")
    assert scripts["analyses"]["OUT"] == "runs/dlcft_curvature"


def test_the_seconds_are_the_recorders_and_the_trainings(call):
    assert call(f"{TINY} --out run")[0] == 0
    records = [
        r for r in json.loads(Path("run/table.json").read_text()) if (r["seed"], r["loss"]) == (0, "cross_entropy")
    ]
    of_points = {(r["step"], r["quantity"]): r["seconds"] for r in records}
    training = trainings("run")[0, "cross_entropy"]
    assert training["training_seconds"] > 0
    assert sum(of_points.values()) <= training["observer_seconds"]
