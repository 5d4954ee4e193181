"""The analysis ``eigenvalues``: curves, the learning rate, claims, figures."""

import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from curvlab import CurvlabError, Problem, estimate
from curvlab.analyze.__main__ import main
from curvlab.analyze.dlcft import eigenvalues
from curvlab.analyze.dlcft.eigenvalues import ANALYSIS
from curvlab.analyze.dlcft.eigenvalues_claims import claims, conditions, describe_early_peaks, deviations, summarise
from curvlab.analyze.dlcft.eigenvalues_options import PRESETS, EigenvaluesConfig
from curvlab.analyze.dlcft.eigenvalues_training import EkfacRecorder, smooth
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.driver import read_run
from curvlab.analyze.frame.search import choose, run_trial
from curvlab.analyze.frame.subject import Subject
from curvlab.commandline.options import RunOptions
from curvlab.grid import Place
from curvlab.models import ResNet20, build, freeze_batch_norm, load_weights, shallow_cnn
from curvlab.plots import density_curves, eigenvalue_curves, layer_curves, normalised_curves

pytestmark = pytest.mark.usefixtures("one_server", "runs_here")

TINY = {
    "hidden": (4,),
    "steps": 6,
    "every": 3,
    "ekfac_every": 3,
    "samples": 40,
    "seeds": (1,),
    "lr_squared_error": (0.01,),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, without the machine's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(eigenvalues.__file__).parents[3]))


@pytest.fixture
def call(capsys):
    """Return a function that runs the analysis and gives exit code, standard output and standard error."""

    def call(line):
        code = main(["eigenvalues", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def load(config):
    return subject.load_dataset(config, RunOptions())


def split(config, data):
    return subject.take(data, train=config.train_samples), data.held_out


def measure(config, folder):
    return list(eigenvalues.measure(config, load(config), Workspace(Place(folder))))


def without_seconds(records):
    return [{key: value for key, value in r.items() if not key.endswith("seconds")} for r in records]


# The numbers.


def test_every_point_is_the_dense_matrix_of_the_network_as_it_was(tmp_path, monkeypatch):
    """Each recorded eigenvalue against the dense matrix of a copy of the network taken at that step."""
    networks = {}
    real = EkfacRecorder.__call__

    def keep(self, step, model):
        networks[self._loss, step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        real(self, step, model)

    monkeypatch.setattr(EkfacRecorder, "__call__", keep)
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
    records = [record for record in measure(config, tmp_path) if "step" in record]
    data, _ = split(config, load(config))
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


def test_the_networks_are_trained_as_documented(tmp_path):
    """The training by hand: plain PyTorch, the mean loss, momentum, a rate that falls to zero."""
    config = EigenvaluesConfig(
        hidden=(4,),
        steps=4,
        every=2,
        ekfac_every=2,
        samples=20,
        seeds=(5,),
        dtype="float64",
        batch_size=2000,
        lr=0.05,
        lr_squared_error=(0.002,),
        validation=300,
        train_samples=50,
    )
    records = measure(config, tmp_path)
    trainings = {record["loss"]: record for record in records if "test_accuracy" in record}
    data, _ = split(config, load(config))
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
        of_step = {r["step"]: r["train_loss"] for r in records if r["loss"] == loss and "step" in r}
        assert of_step[0] is None
        assert of_step[2] == pytest.approx(np.mean(losses[:2]), rel=1e-10)
        assert of_step[4] == pytest.approx(np.mean(losses[2:]), rel=1e-10)
        right = (model(data.x_test.double()).argmax(dim=1) == data.y_test).double().mean()
        assert trainings[loss]["test_accuracy"] == pytest.approx(float(right))
        assert trainings[loss]["lr"] == lr


def try_rates(config, folder):
    search, dataset = ANALYSIS.search, load(config)
    return [
        run_trial(search, ANALYSIS.measure, trial, dataset, Workspace(Place(folder / str(number))))
        for number, trial in enumerate(search.trials(config))
    ]


def test_the_learning_rate_with_the_lowest_validation_loss_is_taken(tmp_path):
    config = EigenvaluesConfig(**{**TINY, "steps": 30, "seeds": (1, 0), "lr_squared_error": (1e20, 0.01, 1e-7)})
    trials = try_rates(config, tmp_path)
    assert [(trial["loss"], trial["lr"], trial["seed"]) for trial in trials] == [
        ("squared_error", rate, 1) for rate in (1e20, 0.01, 1e-7)
    ]
    assert trials[0]["validation_loss"] is None
    assert "the training loss is" in trials[0]["note"]
    assert trials[1]["validation_loss"] < trials[2]["validation_loss"]
    chosen = choose(ANALYSIS.search, config, trials)
    runs = ANALYSIS.search.runs(config, chosen)
    assert [(run.seeds, run.losses) for run in runs] == [
        ((seed,), (loss,)) for seed in (1, 0) for loss in ("cross_entropy", "squared_error")
    ]
    assert {run.lr_squared_error for run in runs if run.losses == ("squared_error",)} == {(0.01,)}


def test_the_validation_loss_is_of_samples_that_the_network_has_not_seen(tmp_path):
    config = EigenvaluesConfig(**{**TINY, "lr_squared_error": (0.01, 0.001), "dtype": "float64"})
    data, held_out = split(config, load(config))
    rows = {tuple(row) for row in data.x_train.flatten(1).tolist()}
    assert not any(tuple(row) in rows for row in held_out[0].flatten(1).tolist())
    assert (len(data.x_train), len(held_out[0])) == (1237, 200)
    torch.manual_seed(0)
    (first, _) = try_rates(config, tmp_path)
    measure(EigenvaluesConfig(**{**TINY, "losses": ("squared_error",), "dtype": "float64"}), tmp_path / "run")
    model = build("mlp", data.sample_shape, 10, hidden=(4,), seed=1).double()
    saved = torch.load(tmp_path / "run" / "squared_error.pt", weights_only=True)["model"]
    model.load_state_dict({name.removeprefix("parameter "): tensor for name, tensor in saved.items()})
    x, y = held_out[0].double(), 15 * torch.eye(10, dtype=torch.float64)[held_out[1]]
    expected = 0.5 * (model(x) - y).square().sum(dim=1).mean()
    assert first["validation_loss"] == pytest.approx(expected.item(), rel=1e-10)


def test_a_run_of_a_sweep_chooses_for_its_seed(tmp_path):
    config = EigenvaluesConfig(**{**TINY, "losses": ("squared_error",), "lr_squared_error": (1e-7, 0.01)})
    records = ANALYSIS.execute(config.model_dump(mode="json"), Place(tmp_path / "several"))
    one = config.model_copy(update={"lr_squared_error": (0.01,)})
    assert without_seconds(records) == without_seconds(measure(one, tmp_path / "one"))


def test_no_learning_rate_will_do(tmp_path):
    config = EigenvaluesConfig(**{**TINY, "steps": 60, "lr_squared_error": (1e20, 1e10)})
    with pytest.raises(CurvlabError, match=r"squared error fails with all of its 2.*lower ones with --lr"):
        choose(ANALYSIS.search, config, try_rates(config, tmp_path))


def test_samples_of_a_file_that_is_sorted_by_class():
    """The first ones would be of one class: what is held out, trained on and measured has all of them."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 100)
    x = rng.random((400, 6), np.float32)
    np.savez("sorted.npz", x_train=x, y_train=y, x_test=x[::10], y_test=y[::10])
    config = EigenvaluesConfig(data="sorted.npz", validation=60, train_samples=200, samples=60)
    data, held_out = split(config, load(config))
    for labels in (held_out[1], data.y_train, subject.samples(config, data)[1]):
        assert torch.bincount(labels, minlength=4).min() >= 5


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


def test_maxima_that_are_not_resolved_are_reported():
    late = curve("cross_entropy", [1, 2, 8, 4]) + curve("cross_entropy", [9, 2, 8, 4], layer="fc1")
    assert describe_early_peaks(late) == ""
    early = describe_early_peaks(late + curve("squared_error", [1, 9, 8, 4], quantity="ekfac"))
    assert early.endswith("in between (use a smaller --every to check): squared error (Fisher by EK-FAC).")


LEARNT = [{"test_accuracy": 0.95}]
MNIST = conditions(PRESETS["cpu"].config, Subject("mnist", (1, 28, 28), 10, 60000, 10000), LEARNT)
CIFAR = conditions(PRESETS["cpu-resnet20"].config, Subject("cifar100", (3, 32, 32), 100, 50000, 10000), LEARNT)


def judge(softmax, squared, seeds=3, ours=MNIST):
    records = []
    for seed in range(seeds):
        records += curve("cross_entropy", softmax[seed % len(softmax)], seed)
        records += curve("squared_error", squared[seed % len(squared)], seed)
    return claims(records, ours)


@pytest.mark.parametrize(
    ("softmax", "squared", "expected"),
    [
        ([[1, 10, 1.9]], [[4, 8, 7]], ["reproduced", "reproduced", "reproduced"]),
        ([[1, 10, 2.1]], [[4, 8, 7]], ["not reproduced", "reproduced", "reproduced"]),
        ([[1, 10, 1.9]], [[4, 8, 3.9]], ["reproduced", "not reproduced", "not reproduced"]),
        # Above its start, as softmax's own curve is, and yet fallen: the start is no yardstick.
        ([[1, 10, 2]], [[1, 10, 2]], ["reproduced", "not reproduced", "not reproduced"]),
        # One seed of three is enough to lose a claim.
        ([[1, 10, 1], [1, 10, 1], [1, 10, 3]], [[4, 8, 8]], ["not reproduced", "reproduced", "reproduced"]),
    ],
)
def test_verdicts(softmax, squared, expected):
    found = judge(softmax, squared)
    assert [claim.verdict for claim in found] == expected
    assert all(claim.scope.startswith("direction, at training samples 5,000") for claim in found)
    assert [claim.verdict for claim in judge(softmax, squared, seeds=2)] == ["not tested"] * 3


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        ({**MNIST, "data": "digits"}, "data is digits, published: mnist"),
        ({**MNIST, "network": "784-100-10 network"}, "network is 784-100-10 network, published: shallow_cnn"),
        ({**MNIST, "steps": 2000}, "steps is 2,000, at least 3,000 is needed"),
        ({**MNIST, "classes": [0, 1]}, "classes is 0 1, published: all"),
        ({**CIFAR, "fine-tuned": False}, "fine-tuned is False, published: True"),
    ],
)
def test_other_conditions_than_the_published_ones_are_not_tested(ours, reason):
    for claim in judge([[1, 10, 1.9]], [[4, 8, 7]], ours=ours):
        assert (claim.verdict, claim.reason) == ("not tested", reason)
    assert deviations(ours) == []


def test_conditions():
    assert "steps 3,000 (10,000)" in deviations(MNIST)[0]
    assert "data" not in deviations(MNIST)[0]
    assert "network resnet20 (ResNet-18); weights resnet20_cifar10-12fca82f (ImageNet32)" in deviations(CIFAR)[0]
    (one, *_) = judge([[1, 10, 1.9]], [[4, 8, 7]], ours=CIFAR)
    assert (one.verdict, one.source) == ("reproduced", "Shon et al. (2022), supplement, Fig. 7")
    paper = conditions(PRESETS["paper"].config, Subject("mnist", (1, 28, 28), 10, 60000, 10000), LEARNT)
    assert deviations(paper) == ["training samples 55,000 (60,000)."]
    subject = Subject("mnist", (1, 28, 28), 10, 60000, 10000)
    collapsed = conditions(PRESETS["cpu"].config, subject, [*LEARNT, {"test_accuracy": 0.1}])
    (one, *_) = judge([[1, 10, 1.9]], [[4, 8, 7]], ours=collapsed)
    assert (one.verdict, one.reason) == ("not tested", "test accuracy is 0.1, at least 0.9 is needed")


def test_a_curve_with_fewer_points_has_no_maximum_to_be_judged_by():
    records = []
    for seed in range(3):
        for quantity, keep in (("fisher", {0, 10, 20}), ("ekfac", {0, 20})):
            for loss, values in (("cross_entropy", [1, 10, 1]), ("squared_error", [4, 8, 8])):
                records += [r for r in curve(loss, values, seed, quantity) if r["step"] in keep]
    found = {}
    for claim in claims(records, MNIST):
        found.setdefault(claim.text.partition(":")[0], []).append(claim.verdict)
    assert found == {"Fisher": ["reproduced"] * 3, "Fisher by EK-FAC": ["not tested"] * 3}


def test_claims_need_both_losses_and_leave_layers_alone():
    records = [r for seed in range(3) for r in curve("cross_entropy", [1, 10, 1], seed)]
    records += [r for seed in range(3) for r in curve("cross_entropy", [1, 10, 10], seed, layer="fc1")]
    found = claims(records, MNIST)
    assert [claim.verdict for claim in found] == ["reproduced", "not tested", "not tested"]
    assert [claim.ours for claim in found] == [pytest.approx(0.1), None, None]
    assert found[1].reason == "the runs that the claim compares are missing"
    (one, *_) = claims([r for r in records if r["seed"] != 1 or r["layer"] != "network"], MNIST)
    assert (one.verdict, one.reason) == ("not tested", "2 of at least 3 seeds")


# Figures.


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
        band, circle = axes.collections
        assert circle.get_offsets().tolist() == [[10, 6.0]]
        corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
        assert {(10, 4.0), (10, 8.0), (20, 2.0), (20, 6.0), (0, 1.0), (0, 3.0)} <= corners
    # Half a squared error has no nats.
    titles = [axes.get_title() for axes in panels[:2]]
    assert titles == ["softmax cross-entropy (nats)", "squared error (squared outputs)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("Fisher", "mean and range of 2 seeds", "maximum in the first interval"),
    ]

    (linear, log) = normalised_curves(records, "title").axes
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    softmax, squared = linear.get_lines()
    assert list(softmax.get_ydata()) == pytest.approx([(1 / 8 + 3 / 6) / 2, (1 + 4 / 6) / 2, (2 / 8 + 1) / 2])
    assert list(squared.get_ydata()) == pytest.approx([(0.5 + 0.25) / 2, 1.0, (0.25 + 0.5) / 2])


def test_the_bands_of_several_quantities_can_be_told_apart():
    """The first is shaded, the others are between thin lines of their own colour and style."""
    records = [r for q in ("fisher", "hessian") for seed in (0, 1) for r in curve("cross_entropy", [1, 2, 9], seed, q)]
    axes = eigenvalue_curves(records, "title").axes[0]
    assert len(axes.collections) == 1
    first, second, low, high = axes.get_lines()
    assert first.get_color() != second.get_color()
    for edge in (low, high):
        assert (edge.get_color(), edge.get_linestyle()) == (second.get_color(), second.get_linestyle())
        assert edge.get_linewidth() < second.get_linewidth()


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
    with pytest.raises(CurvlabError, match="new_head needs a linear layer"):
        load_weights(model, "conv.pt", new_head=True)
    mlp = build("mlp", (4,), 3, hidden=(5,))
    torch.save({"fc2.weight": torch.zeros(3, 5), "fc2.bias": torch.zeros(3)}, "head.pt")
    with pytest.raises(CurvlabError, match=r"it has no fc1\.weight, no fc1\.bias"):
        load_weights(mlp, "head.pt", new_head=True)


def test_fine_tuning(call):
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
    config = PRESETS["cpu-resnet20"].config.model_copy(update={"data": "images.npz", "validation": 0})
    data, raw = load(config), load(config.model_copy(update={"normalize": "none"}))
    torch.testing.assert_close(data.x_test[:, 2], (raw.x_test[:, 2] - 0.406) / 0.225)
    code, _, err = call(f"{line} --weights weights/gone.pt --out other")
    assert code == 2
    assert "weights file weights/gone.pt not found, neither here nor in the data root root" in err


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"losses": ()}, "losses needs one or more different values"),
        ({"losses": ("squared_error", "squared_error")}, "losses needs one or more different values"),
        ({"lr_squared_error": ()}, "lr_squared_error needs one or more different values"),
        ({"lr_squared_error": (0.1, 0.1)}, "lr_squared_error needs one or more different values"),
        ({"validation": 0}, "the learning rate is chosen on held-out samples: set validation"),
        ({"validation": 1437}, "cannot hold out 1437"),
        ({"train_samples": 1238}, "1,238 training samples requested, but the data set has 1,237"),
        ({"train_samples": 50}, "samples is 1,000, but there are only 50 training samples"),
        ({"samples": 1238}, "samples is 1,238, but there are only 1,237 training samples"),
        ({"quantities": ("fihser",)}, "did you mean 'fisher'"),
        ({"quantities": ("hessian", "hessian")}, "quantities needs one or more different values"),
        ({"per": ("layer", "layer")}, "per needs one or more different values"),
        ({"densities_at": (2001,)}, "densities_at contains 2001, but the training has 2,000 steps"),
        ({"densities_at": (5,)}, "densities_at contains 5, which is not a multiple of every"),
        ({"densities_at": (100, 100)}, "densities_at needs one or more different values"),
        ({"optimizer": "adam"}, "momentum belongs to sgd"),
        ({"fine_tune": True}, "fine_tune needs weights from a file: set weights"),
        ({"model": "resnet20"}, r"resnet20 takes images of shape \(3, 32, 32\)"),
    ],
)
def test_what_cannot_be_done_is_refused(changed, fragment):
    config = EigenvaluesConfig(**changed)
    with pytest.raises(CurvlabError, match=fragment):
        eigenvalues.check(config, load(config))


def test_presets():
    cpu = PRESETS["cpu"].config
    assert (cpu.model, cpu.optimizer, cpu.lr, cpu.momentum, cpu.schedule) == (
        *("shallow_cnn", "sgd", 0.01, 0.9, "constant"),
    )
    paper = PRESETS["paper"].config
    assert (paper.steps, paper.every, paper.batch_size, paper.alpha) == (10000, 200, 128, 15.0)
    assert (paper.model, paper.lr, paper.momentum, paper.schedule) == ("shallow_cnn", 0.01, 0.9, "linear")
    cifar = PRESETS["paper-cifar100"].config
    assert (cifar.steps, cifar.every, cifar.lr, cifar.schedule) == (16000, 500, 1e-4, "cosine")


# Runs.


def test_a_run_with_layers_and_densities(call, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # that they are there is enough
    line = "--hidden 3 --steps 4 --every 2 --samples 30 --seeds 0 --lr-squared-error 0.001 0.002 --ekfac-every none"
    code, out, err = call(f"{line} --per network layer --densities-at 0 4 --quantities hessian --out run")
    assert (code, err) == (0, "")
    assert "Hyper-parameters, chosen on held-out samples" in out
    files = {path.name for path in Path("run").iterdir()}
    names = ("eigenvalues", "normalised", "layers", "densities")
    assert {f"{name}.{kind}" for name in names for kind in ("png", "pdf")} <= files
    assert {"selection.json", "trainings.json", "densities.json"} <= files
    run = read_run(ANALYSIS, Path("run"))
    records = [r for r in run.records["table"] if r["loss"] == "cross_entropy"]
    wanted = "loss seed step quantity layer index value residual matvecs converged seconds train_loss"
    assert set(records[0]) == set(wanted.split())
    assert {r["layer"] for r in records} == {"network", "fc1", "fc2"}
    (densities,) = [kept for kept in run.artifacts["densities"] if kept[0]["loss"] == "cross_entropy"]
    assert [(density["step"], density["quantity"]) for density in densities] == [(0, "hessian"), (4, "hessian")]
    # Of a small network the density is all eigenvalues, and the top one is that of the curve.
    assert densities[0]["density"]["exact"]
    tops = [r["value"] for r in records if r["layer"] == "network" and r["step"] in (0, 4)]
    assert [max(density["density"]["nodes"][0]) for density in densities] == pytest.approx(tops, rel=1e-2)
    before, after = smooth(densities)
    assert before["grid"] == after["grid"]
    for density in (before, after):
        assert np.trapezoid(density["density"], density["grid"]) == pytest.approx(1, abs=0.01)
    # The files are all that a report needs.
    assert list(ANALYSIS.report(run).figures) == list(names)
    only_layers = {**run.records, "table": [r for r in run.records["table"] if r["layer"] != "network"]}
    other = ANALYSIS.report(replace(run, records=only_layers, artifacts={"densities": []}))
    assert list(other.figures) == ["layers"]


def test_a_report_without_the_trainings_of_a_loss():
    records = {"table": curve("squared_error", [1.0, 2.0]), "trainings": []}
    config = EigenvaluesConfig(seeds=(0,))
    run = Results(config, Subject("digits", (64,), 10, 1437, 360), records, artifacts={"densities": []})
    report = ANALYSIS.report(run)
    assert report.summary.title.endswith("64-30-30-10 network on digits, 1,000 samples; one seed")
    assert [row["loss"] for row in report.summary.records] == ["squared error"]
    assert {claim.verdict for claim in report.claims} == {"not tested"}


def test_a_training_that_was_stopped(tmp_path, monkeypatch):
    """Between two points: the training goes on at its checkpoint, the curve without a gap or a point twice."""
    config = EigenvaluesConfig(**TINY)
    undisturbed = without_seconds(measure(config, tmp_path / "whole"))
    real, steps = EkfacRecorder.__call__, []

    def interrupted(self, step, model):
        steps.append((self._loss, step))
        if steps[-1] == ("squared_error", 6) and len(steps) == 6:
            raise KeyboardInterrupt
        real(self, step, model)

    monkeypatch.setattr(EkfacRecorder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(config, tmp_path / "stopped")
    assert without_seconds(measure(config, tmp_path / "stopped")) == undisturbed
    assert steps[6:] == [("squared_error", 6)]


def test_the_seconds_of_recorders_and_trainings(tmp_path):
    records = measure(EigenvaluesConfig(**TINY), tmp_path)
    (training,) = [r for r in records if "test_accuracy" in r and r["loss"] == "cross_entropy"]
    points = [r for r in records if "step" in r and r["loss"] == "cross_entropy"]
    assert training["training_seconds"] > 0
    seconds = {(r["step"], r["quantity"]): r["seconds"] for r in points}
    assert sum(seconds.values()) <= training["observer_seconds"]
