"""The analysis ``adam_preconditioner``: Adam's moment and the diagonals by plain loops, claims, figures."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.adam_preconditioner import (
    ANALYSIS,
    LABELS,
    PRESETS,
    AdamPreconditionerConfig,
    compare,
    measure,
)
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.training.run import _order

CONFIG = AdamPreconditionerConfig(
    hidden=(3,), steps=5, every=2, batch_size=10, samples=25, seeds=(2,), dtype="float64", lr=0.01
)


def gradients(model, x, y):
    """Return the gradient of every sample's loss, ``(N, P)``."""
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(one[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_a_run_by_a_plain_loop(tmp_path):
    records = list(measure(CONFIG, ANALYSIS.load(CONFIG, RunOptions()), Workspace(Place(tmp_path))))
    assert [(r["step"], r["quantity"]) for r in records] == [(step, name) for step in (2, 4, 5) for name in LABELS]
    data = ANALYSIS.load(CONFIG, RunOptions())
    model = subject.network(CONFIG, data, 2)
    optimizer, moment = torch.optim.Adam(model.parameters(), lr=0.01), torch.tensor(0.0)
    x, y = data.x_train.double(), data.y_train
    for step in range(5):
        index = _order(len(x), 2, 0)[step * 10 : (step + 1) * 10]
        mean = gradients(model, x[index], y[index]).mean(0)
        moment = 0.999 * moment + 0.001 * mean**2
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    moment = (moment / (1 - 0.999**5)).numpy()
    x, y = x[:25], y[:25]
    rows = gradients(model, x, y)
    exact = torch.zeros(rows.shape[1], dtype=torch.float64)
    p = model(x).softmax(1).detach()
    for label in range(10):
        exact += (p[:, [label]] * gradients(model, x, torch.full_like(y, label)) ** 2).mean(0)
    batches = torch.stack([part.mean(0) for part in rows.split(10)])
    diagonals = {"masq": (batches**2).mean(0), "empirical_fisher": (rows**2).mean(0), "fisher": exact}
    entries = json.loads((tmp_path / "entries.json").read_text())
    drawn = torch.randperm(len(moment), generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(entries["second_moment"], moment[drawn], rtol=1e-8)
    for record in records[-3:]:
        diagonal = diagonals[record["quantity"]].numpy()
        np.testing.assert_allclose(entries[record["quantity"]], diagonal[drawn], rtol=1e-8, atol=1e-14)
        moved = moment > 0
        both = moved & (diagonal > 0)
        assert record["share"] == pytest.approx(moved.mean())
        assert record["rank_correlation"] == pytest.approx(spearmanr(moment[moved], diagonal[moved])[0], abs=1e-6)
        assert record["log_scale"] == pytest.approx(np.median(np.log10(moment[both] / diagonal[both])), abs=1e-8)


def test_compare():
    found = compare(np.array([0.0, 1.0, 10.0, 100.0]), np.array([5.0, 0.1, 1.0, 0.0]))
    assert (found["share"], found["log_scale"]) == (0.75, 1.0)
    assert found["rank_correlation"] == pytest.approx(-0.5)
    assert compare(np.zeros(3), np.ones(3)) == {"rank_correlation": None, "log_scale": None, "share": 0.0}


def test_a_network_without_gradients(tmp_path):
    data = ANALYSIS.load(CONFIG, RunOptions())
    config = CONFIG.model_copy(update={"lr": 1e-30})
    x = torch.zeros_like(data.x_train)
    constant = subject.SubjectData("c", x, torch.zeros_like(data.y_train), x, torch.zeros_like(data.y_train), ("only",))
    with pytest.raises(CurvlabError, match="Adam's second moment is zero"):
        list(measure(config, constant, Workspace(Place(tmp_path))))


def report(config=PRESETS["cpu"].config, data="mnist", seeds=3, artifacts=(), **changed):
    """Return the report of synthetic records; the last seed has the given values, by quantity."""
    usual = {"masq": (0.5, -0.5), "empirical_fisher": (0.9, -2.0), "fisher": (0.5, -0.6)}
    table = [
        {"seed": seed, "step": step, "quantity": name, "rank_correlation": rank, "log_scale": scale}
        | {"share": 1.0, "test_accuracy": 0.9}
        for seed in range(seeds)
        for step in (100, 200)
        for name, (rank, scale) in {**usual, **(changed if (seed, step) == (seeds - 1, 200) else {})}.items()
    ]
    records = {"table": table}
    return ANALYSIS.report(
        Results(config, Subject(data, (784,), 10, 60000, 10000), records, artifacts={"entries": artifacts})
    )


@pytest.mark.parametrize(
    ("place", "changed"),
    [(0, {"masq": (0.49, 0.1)}), (1, {"fisher": (0.49, -0.6)}), (2, {"masq": (0.9, 0.7)}), (2, {"fisher": (0.9, 0.4)})],
)
def test_verdicts(place, changed):
    assert [claim.verdict for claim in report().claims] == ["reproduced"] * 3
    verdicts = ["reproduced"] * 3
    verdicts[place] = "not reproduced"
    assert [claim.verdict for claim in report(**changed).claims] == verdicts
    assert {claim.verdict for claim in report(seeds=2).claims} == {"not tested"}
    assert report(masq=(None, None)).claims[0].reason == "a seed has no value"


def test_other_conditions_are_not_tested():
    assert report(data="cifar10").claims[0].reason == "data is cifar10, digits or mnist is needed"
    short = report(AdamPreconditionerConfig(steps=100))
    assert short.claims[2].reason == "steps is 100, at least 200 is needed"


def test_figures():
    entries = {name: [0.0, 1e-4, 1e-3] for name in ("second_moment", *LABELS)}
    figures = report(artifacts=[entries]).figures
    for figure in (figures["over_training"](), figures["entries"]()):
        assert figure.get_figwidth() == 6.8
    titles = [axes.get_title() for axes in figures["entries"]().axes]
    assert titles == list(LABELS.values())
    assert list(report().figures) == ["over_training"]
