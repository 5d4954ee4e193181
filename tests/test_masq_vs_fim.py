"""The analysis ``masq_vs_fim``: the closed form, the ways to the FIM, records, claims both ways, figures."""

from itertools import permutations

import numpy as np
import pytest
import torch

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.workspace import Workspace
from curvlab.analyze.masq import comparison, costs
from curvlab.analyze.masq import masq_vs_fim as analysis
from curvlab.analyze.masq.masq_vs_fim import ANALYSIS
from curvlab.analyze.masq.masq_vs_fim_options import PRESETS, MasqVsFimConfig
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.estimators.masq import expected_masq
from curvlab.grid import Place
from curvlab.models import mlp
from curvlab.plots import Panel, draw_panels
from curvlab.quantities import MaSQ

MNIST = Subject("mnist", (1, 28, 28), 10, 20_000, 2000)


@pytest.fixture
def problem():
    data = (torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 3)
    return Problem(mlp(4, (3,), 3).double(), "cross_entropy", data)


# The library ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("norm", ["mean", "sumsq", "scaled"])
def test_the_closed_form_is_the_mean_over_all_partitions(problem, size, norm):
    x, y = problem.data
    names = [name for name, _ in problem.model.named_parameters()]

    def losses(*values):
        outputs = torch.func.functional_call(problem.model, dict(zip(names, values, strict=True)), (x,))
        return torch.nn.functional.cross_entropy(outputs, y, reduction="none")

    found = torch.autograd.functional.jacobian(losses, tuple(problem.model.parameters()))
    rows = torch.cat([gradients.flatten(1) for gradients in found], dim=1)  # (N, P)
    orders = list(permutations(range(6)))
    sums = torch.stack([rows[list(order)].view(6 // size, size, -1).sum(dim=1) for order in orders])
    mean = ((sums / size) ** 2).mean(dim=(0, 1))
    expected = {"mean": mean, "sumsq": mean * size, "scaled": mean / size}[norm]
    closed = expected_masq((rows**2).mean(0), rows.mean(0), 6, MaSQ(size, norm))
    assert torch.allclose(closed, expected, rtol=1e-10, atol=1e-16)
    ours = [
        estimate(Problem(problem.model, "cross_entropy", (x[list(o)], y[list(o)])), MaSQ(size, norm), "diag").diagonal()
        for o in orders[::40]
    ]
    picked = {"sumsq": (sums[::40] ** 2).sum(1) / 6, "mean": ((sums[::40] / size) ** 2).mean(1)}
    picked["scaled"] = ((sums[::40] / size) ** 2).sum(1) / 6
    assert torch.allclose(torch.stack(ours), picked[norm], rtol=1e-10, atol=1e-16)


def test_a_last_batch_that_is_smaller_is_refused():
    with pytest.raises(CurvlabError, match="a multiple of the batch size 4; there are 6"):
        expected_masq(torch.ones(1), torch.ones(1), 6, MaSQ(4))


@pytest.mark.parametrize("method", [*costs.METHODS, "masq"])
def test_every_way_to_the_diagonal_is_that_of_the_reference(problem, method):
    quantity = MaSQ(2) if method == "masq" else "empirical_fisher"
    expected = estimate(problem, quantity, "diag", backend="torch").diagonal()
    assert torch.allclose(costs.compute(method, problem, 4, 2), expected, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in problem.model.parameters())


def test_duplicated_weights_take_more_memory():
    wide = Problem(mlp(200, (300,), 10), "cross_entropy", (torch.rand(400, 200), torch.arange(400) % 10))
    peaks = {method: costs.measure_cost(method, wide, 100, 200)[1] for method in ("masq", "duplicated_weights")}
    if peaks["masq"] is None:
        pytest.skip("this system does not tell the peak of memory")
    copies = 100 * 4 * sum(p.numel() for p in wide.model.parameters())
    assert peaks["duplicated_weights"] > copies > 5 * peaks["masq"]


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    config = MasqVsFimConfig(
        hidden=(5,),
        steps=6,
        streams=("D5-5",),
        seeds=(1,),
        parts=("values",),
        points=(0, 3, 9),
        masq_batch_size=20,
        samples=100,
        batch_sizes=(1, 10, 50),
        partition_samples=50,
        dtype="float64",
    )
    data = ANALYSIS.load(config, RunOptions())
    return list(analysis.measure(config, data, Workspace(Place(tmp_path_factory.mktemp("run")))))


def test_the_records_of_a_run(records):
    tensors = [r for r in records if "fim_max" in r]
    assert [r["parameter"] for r in tensors] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    for record in tensors:  # of equal batches
        assert record["masq_max_sumsq"] == pytest.approx(20 * record["masq_max_mean"])
        assert record["masq_max_mean"] == pytest.approx(20 * record["masq_max_scaled"])
        parts = comparison.ratios(record)
        assert parts["ratio"] == pytest.approx(parts["gradient_part"] * parts["noise_part"])
        assert record["gradient_excess"] <= 1e-12
    ends = [r for r in records if r.get("batch_size") in (1, 50)]
    assert [r["relative"] for r in ends] == pytest.approx([0, 0], abs=1e-10)
    (between,) = [r for r in records if r.get("batch_size") == 10]
    assert abs(between["z"]) < 5
    assert [r["step"] for r in records if "spearman" in r] == [0, 3, 6]
    assert all(-1 <= r["spearman"] <= 1 and -1 <= r["pearson"] <= 1 for r in records if "spearman" in r)
    (cancelling,) = [r for r in records if "zero_share" in r]
    assert 0 <= cancelling["zero_share"] <= 1


def test_batches_that_do_not_divide_are_refused():
    config = MasqVsFimConfig(batch_sizes=(3,))
    with pytest.raises(CurvlabError, match=r"batch_sizes divide partition_samples \(500\); 3 does not"):
        ANALYSIS.check(config, ANALYSIS.load(config, RunOptions()))


# The report -----------------------------------------------------------------------------------------------------------


def synthetic(seeds=3, **changed):
    """Return records with which every claim is reproduced, but for what is changed in the last seed."""
    usual = {
        "masq_max_sumsq": 2.0,
        "masq_max_mean": 0.05,
        "pearson": 0.5,
        "spearman": 0.5,
        "fim": 3.0,
        "duplicated_weights": 9.0,
        "increase": 0.1,
    }
    found = {kind: [] for kind in ANALYSIS.kinds}
    for seed in range(seeds):
        now = usual | (changed if seed == seeds - 1 else {})
        names = {"stream": "D5-5", "seed": seed}
        maxima = {key: now[key] for key in ("masq_max_sumsq", "masq_max_mean")}
        tensor = {
            "fim_max": 1.0,
            "gradient_max": 0.1,
            "gradient_excess": -0.1,
            "expected_max": 1.5,
            "masq_max_scaled": 1e-4,
            **maxima,
        }
        found["table"] += [{**names, "parameter": name, **tensor} for name in ("fc1.weight", "fc1.bias")]
        batch = {"expected": 1.0, "measured": 1.1, "standard_error": 0.1, "z": 1.0, "relative": 0.1}
        found["batches"] += [{**names, "batch_size": size, **batch} for size in (1, 10, 1000)]
        point = {"pearson": now["pearson"], "spearman": now["spearman"], "trace_ratio": 1.0, "gradient_share": 0.1}
        found["training"] += [{**names, "step": 0, **point, "pearson": 0.0}, {**names, "step": 2000, **point}]
        for method in ("masq", "fim", "sample_gradients", "duplicated_weights"):
            cost = now.get(method, 1.0)
            found["costs"].append({**names, "method": method, "seconds": cost, "peak_mb": cost})
        share = {"zero_share": 0.5, "zero_share_large": 0.5, "increase": now["increase"], "increase_others": 0.1}
        found["cancelling"].append({**names, **share})
    return found


def report(found, data=MNIST, **changed):
    config = PRESETS["cpu"].config.model_copy(update={"streams": ("D5-5",), **changed})
    return ANALYSIS.report(Results(config, data, found))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, set()),
        ({"masq_max_sumsq": 1.2}, {0, 1}),
        ({"masq_max_sumsq": 0.4}, set()),  # a factor is one in either direction
        ({"masq_max_sumsq": 40.0}, {0, 1, 2}),
        ({"masq_max_mean": 0.2}, {3}),
        ({"pearson": 0.95}, {4}),
        ({"spearman": 0.95}, {5}),
        ({"duplicated_weights": 0.9}, {6, 7}),
        ({"fim": 1.5}, {8}),
        ({"increase": 0.2}, {9}),
    ],
)
def test_every_claim_goes_either_way(changed, missed):
    claims = report(synthetic(**changed)).claims
    assert len(claims) == 10
    assert {place for place, claim in enumerate(claims) if claim.verdict == "not reproduced"} == missed
    assert {claim.verdict for claim in claims} <= {"reproduced", "not reproduced"}


def test_no_verdict_elsewhere():
    assert {claim.verdict for claim in report(synthetic(seeds=2)).claims} == {"not tested"}
    digits = report(synthetic(), Subject("digits", (1, 8, 8), 10, 1437, 360)).claims
    assert {claim.verdict for claim in digits} == {"not tested"}
    costs_alone = synthetic() | {"batches": [], "training": [], "cancelling": []}
    assert {claim.verdict for claim in report(costs_alone).claims[4:6]} == {"not tested"}


def test_tables_and_the_example():
    made = report(synthetic())
    rows = comparison.cost_rows(synthetic()["costs"])
    assert [(row["label"], row["seconds_ratio"]) for row in rows][-1] == ("FIM, duplicated weights", 9.0)
    assert len(made.tables) == 5
    assert made.identities[4].values == [0.0]
    assert comparison.cancelling_example(0.3)[1] != pytest.approx(comparison.cancelling_example(0.3)[2])


def test_the_figures():
    made = report(synthetic())
    maxima = made.figures["maxima"]()
    assert maxima.get_figwidth() == 3.3
    assert maxima.axes[0].get_yscale() == "log"
    assert [t.get_text() for t in maxima.legends[0].get_texts()] == [
        "FIM",
        "MaSQ, sums",
        "MaSQ, means",
        "MaSQ, means / B",
    ]
    lines = made.figures["batches_and_training"]()
    assert lines.get_figwidth() == 6.8
    assert [axes.get_xlabel() for axes in lines.axes] == ["batch size B"] * 2 + ["training step"] * 2


def test_panels_draw_means_and_leave_out_what_is_missing():
    records = [{"x": x, "s": s, "y": y} for x, s, y in ((0, "a", 1.0), (0, "a", 3.0), (10, "a", None), (100, "b", 5.0))]
    axes = draw_panels([Panel("t", records, "x", "y", "s", "x", "y", log="x")]).axes[0]
    a, b = (container.lines[0].get_xydata() for container in axes.containers)
    assert np.allclose(a, [[10 / 3, 2.0]])
    assert np.allclose(b, [[100.0, 5.0]])
    assert next(t.get_text() for t in axes.get_xticklabels()) == "0"
