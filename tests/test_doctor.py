"""Tests of ``doctor``: findings, agreement with ``estimate``, predictions, and that it changes nothing."""

import math
import sys
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from models_under_test import case
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab import doctor, estimate
from curvlab.doctor import cost
from curvlab.doctor import probe as probe_module
from curvlab.errors import CurvlabError
from curvlab.estimators import BACKENDS
from curvlab.estimators.memory import measure_peak
from curvlab.problem import Problem
from curvlab.structures import STRUCTURES

MODULE = sys.modules["curvlab.doctor"]  # the function of that name hides it

X, Y = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3


@pytest.fixture(autouse=True)
def without_measurements(monkeypatch):
    """Switch measurements off; only tests of predictions need them."""
    monkeypatch.setattr(probe_module, "_PATIENCE", 0.0)


@pytest.fixture
def measured(monkeypatch):
    """Measure everything once, independent of the load of the machine."""
    monkeypatch.setattr(cost, "_QUICK", 0.0)
    monkeypatch.setattr(probe_module, "_PATIENCE", float("inf"))


@pytest.fixture
def two_backends(monkeypatch):
    """Use two backends only, for tests that are not about backends."""
    for module in (MODULE, probe_module):
        monkeypatch.setattr(module, "BACKENDS", {name: BACKENDS[name] for name in ("hooks", "torch")})


def problem(*layers: nn.Module, train: bool = False) -> Problem:
    return Problem(nn.Sequential(*layers).train(train), "cross_entropy", (X, Y))


def mlp() -> Problem:
    return problem(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def find_row(diagnosis, **wanted):
    table = diagnosis.combinations
    for key, value in wanted.items():
        table = table[table[key] == value]
    (record,) = table.to_dict("records")
    return record


# Findings.


@pytest.mark.usefixtures("two_backends")
class TestFindings:
    def test_nothing_unusual(self):
        diagnosis = doctor(mlp(), "empirical_fisher")
        assert diagnosis.findings == ()
        assert diagnosis.summary.startswith("Sequential of 43 parameters in float32, cross_entropy, 9 samples in one b")

    @pytest.mark.parametrize(
        ("layers", "finding"),
        [
            (
                [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)],
                "1 (BatchNorm1d), 2 (Dropout) are in train mode, where a sample's output is random or depends on its "
                "batch: call model.eval()",
            ),
            (
                [nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)],
                "0 (BatchNorm1d) is without running statistics, so a sample's output always depends on its batch: "
                "use track_running_stats=True",
            ),
        ],
    )
    def test_modules_that_mix_samples(self, layers, finding):
        diagnosis = doctor(problem(*layers, train=True))
        assert diagnosis.findings == (finding,)
        assert set(diagnosis.combinations.supported) == {"no"}
        assert len(diagnosis.combinations) == 2 * len(STRUCTURES)
        assert str(diagnosis).endswith("\nNothing can be computed until this is corrected.")

    def test_weights_that_are_not_finite(self):
        subject = mlp()
        with torch.no_grad():
            subject.model[0].weight[0, 1:3] = torch.nan
            subject.model[2].bias[0] = torch.inf
        assert doctor(subject).findings == (
            "the model's 0.weight holds 2 NaN or infinite values",
            "the model's 2.bias holds 1 NaN or infinite values",
        )

    def test_a_mask_of_minus_infinity_is_not_a_fault(self):
        assert not [f for f in doctor(case("attention").problem, "empirical_fisher").findings if "infinite" in f]

    def test_targets_that_do_not_fit(self):
        diagnosis = doctor(Problem(mlp().model, "cross_entropy", (X, Y + 1)))
        (finding,) = diagnosis.findings
        assert finding.startswith("a label is 3, but the model has 3 outputs")
        assert set(diagnosis.combinations.obstacle) == {finding}

    def test_tied_frozen_in_place_and_without_factors(self):
        tied, *without = doctor(case("tied").problem, "empirical_fisher").findings
        assert tied == "tied: first.weight is also second.weight; it is counted once"
        assert all(finding.startswith("no Kronecker factors for ") for finding in without)
        assert {"first.weight", "second.bias"} <= set(" ".join(without).replace(",", "").replace(":", "").split())
        assert doctor(case("frozen").problem, "empirical_fisher").findings == (
            "in place: 1 (ReLU), 3 (ReLU)",
            "frozen (requires_grad=False) and left out: 0.weight, 2.weight, 2.bias",
        )
        assert doctor(case("group norm, layer norm").problem, "empirical_fisher", params=["2.*"]).findings == (
            "no Kronecker factors for 2.weight, 2.bias: each belongs to GroupNorm (2)",
        )

    def test_a_wrong_request_is_raised(self):
        with pytest.raises(CurvlabError, match="did you mean 'fisher'"):
            doctor(mlp(), "fihser")
        with pytest.raises(CurvlabError, match="no trainable parameter matches 'fc'"):
            doctor(mlp(), params="fc")


# Combinations.


def refusal(subject, quantity, structure, backend):
    try:
        estimate(subject, quantity, structure, backend=backend)
    except CurvlabError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("mlp", "fisher:samples=2"),
        ("mlp", "hessian"),
        ("convolutions, eval batch norm, in-place relu", "fisher:samples=2"),
        ("residual", "hessian"),
        ("tied", "fisher:samples=2"),
        ("lstm", "fisher:samples=2"),
        ("lstm", "hessian"),
    ],
)
def test_obstacles_are_the_errors_of_estimate(name, quantity):
    subject = case(name).problem
    diagnosis = doctor(subject, quantity)
    assert list(diagnosis.combinations.backend) == [*BACKENDS] * (len(diagnosis.combinations) // len(BACKENDS))
    for row in diagnosis.combinations.to_dict("records"):
        message = refusal(subject, quantity, row["structure"], row["backend"])
        if row["supported"] == "absent":
            assert message.startswith((f"backend {row['backend']} does not compute", "no backend computes"))
        elif row["supported"] == "no":
            assert row["obstacle"] == message
        else:
            assert (row["supported"], message) == ("yes", None), row
    for structure, rows in diagnosis.combinations.groupby("structure"):
        try:
            chosen = estimate(subject, quantity, structure).info.backend.split(", ")
        except CurvlabError:
            chosen = []
        # For a structure with a rest, auto may use two backends if no single one supports both parts.
        assert set(rows[rows.auto].backend) <= set(chosen), structure
        assert len(chosen) > 1 or set(rows[rows.auto].backend) == set(chosen), structure


@pytest.mark.usefixtures("measured", "two_backends")
@pytest.mark.parametrize("quantity", ["fisher", "hessian"])
def test_all_costs_of_a_small_network_are_predicted(quantity):
    table = doctor(mlp(), quantity).combinations
    assert (table[table.supported == "yes"][["seconds", "passes", "peak_bytes"]] > 0).all(axis=None)


def test_parameters_without_factors_are_findings_and_supported(two_backends):
    diagnosis = doctor(case("group norm, layer norm").problem, "empirical_fisher")
    assert [finding for finding in diagnosis.findings if "no Kronecker factors" in finding] == [
        "no Kronecker factors for 2.weight, 2.bias: each belongs to GroupNorm (2)",
        "no Kronecker factors for 3.weight: it belongs to PReLU (3)",
        "no Kronecker factors for 5.weight, 5.bias: each belongs to LayerNorm (5)",
    ]
    assert find_row(diagnosis, structure="kfac", backend="hooks")["supported"] == "yes"
    assert set(diagnosis.combinations.structure) == set(STRUCTURES)


def test_an_exception_of_a_backend_is_reported(monkeypatch):
    def failing(*_, **__):
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(probe_module, "estimate", failing)
    assert find_row(doctor(mlp()), structure="diag", backend="hooks")["obstacle"] == (
        "backend hooks fails: ZeroDivisionError: by zero"
    )


@pytest.mark.usefixtures("measured", "two_backends")
def test_several_quantities_and_the_text():
    diagnosis = doctor(mlp(), [curvlab.EmpiricalFisher(), "hessian"])
    assert list(dict.fromkeys(diagnosis.combinations.quantity)) == ["empirical_fisher", "hessian"]
    lines = str(diagnosis).splitlines()
    columns = ["seconds", "passes", "peak", "matrix", "small", "medium", "large"]
    assert lines[lines.index("") + 1].split() == ["empirical_fisher", *columns]
    assert any(line.startswith("    hooks *  ") for line in lines)
    assert any(line.startswith("      check ") and "eigenvectors" in line for line in lines)
    table = diagnosis.combinations
    measured = table[table.auto & (table.quantity == "empirical_fisher") & (table.structure == "ekfac")].iloc[0]
    assert all(measured[name] >= 0 for name in ("check", "forward", "backward", "sums", "eigenvectors"))
    assert measured.small == measured.large > 0
    assert any(line.endswith(": does not compute this") for line in lines)
    assert max(map(len, lines)) <= 120


# Predictions.


@pytest.mark.parametrize(
    ("quantity", "structure", "passes"),
    [
        ("fisher", "diag", 2),
        ("ggn", "ekfac", 4),
        ("fisher:samples=2", "kfac", 2),
        ("empirical_fisher", "dense", 1),
        ("hessian", "diag", 43),
    ],
)
def test_backward_passes(two_backends, quantity, structure, passes):
    assert find_row(doctor(mlp(), quantity), structure=structure, backend="torch")["backward_passes"] == passes


@pytest.mark.parametrize("name", ["mlp", "conv1d, stride, dilation", "frozen", "transformer block"])
def test_size_of_the_matrix(name):
    subject = case(name).problem
    for row in doctor(subject, "empirical_fisher").combinations.to_dict("records"):
        if row["supported"] == "yes" and row["structure"] != "implicit":
            matrix = estimate(subject, "empirical_fisher", row["structure"], backend=row["backend"])
            assert row["matrix_bytes"] == sum(t.nbytes for t in matrix.tensors().values()), row


@pytest.mark.parametrize(
    ("fixed", "each", "batch", "reached"),
    [
        (0.02, 2e-4, 50, True),
        (0.0, 1e-3, 500, False),
        (0.0, 0.02, 100, False),
        (0.3, 1e-4, 100, False),
        (0.01, 2e-3, 2, True),
    ],
)
@pytest.mark.usefixtures("measured")
def test_seconds_and_peak_of_the_whole(monkeypatch, fixed, each, batch, reached):
    """Compare with a backend whose time is linear in the number of samples."""

    clock = [0.0]

    def timed(some, *_, **__):
        clock[0] += fixed + each * some.num_samples
        # A hundred bytes per sample, and more for large batches.
        return torch.zeros(25 * some.num_samples + 25 * (some.num_samples > 30))

    x, y = torch.randn(1000, 4), torch.arange(1000) % 3
    subject = Problem(mlp().model, "cross_entropy", DataLoader(TensorDataset(x, y), batch_size=batch))
    probe = probe_module.Probe(subject, None, {})
    monkeypatch.setattr(probe_module, "estimate", timed)
    for module in (probe_module, cost):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    costs = probe._costs(curvlab.EmpiricalFisher(), STRUCTURES["diag"](), "hooks", measured=True)
    assert costs["seconds"] == pytest.approx(fixed + each * 1000)
    assert costs["peak_bytes"] == 100 * batch + 100 * (reached and batch > 30)  # also if no rung is as large
    assert clock[0] < 4


def test_control_characters_in_names_are_escaped():
    table = doctor(mlp(), "hessian").combinations
    text = str(MODULE.Diagnosis("a\x1b[31m", ("b\tc\x9b",), table))
    assert "a\\x1b[31m\n- b c\\x9b\n" in text


# Duration.


def test_each_combination_is_tried_once_on_a_few_samples(monkeypatch):
    """Without time for measurements, ``supported`` is the same."""
    subject = Problem(Bert().eval(), "cross_entropy", (torch.arange(240).view(20, 12) % 40, torch.arange(20) % 3))
    tried = []

    def counted(some, quantity, structure, **options):
        tried.append((str(structure), options["backend"], some.num_samples))
        return estimate(some, quantity, structure, **options)

    monkeypatch.setattr(probe_module, "estimate", counted)
    monkeypatch.setattr(MODULE, "STRUCTURES", {name: STRUCTURES[name] for name in ("diag", "kfac", "implicit")})
    table = doctor(subject, "empirical_fisher", params=["pooler.*", "classifier.*"]).combinations
    existing = table[table.supported != "absent"]
    assert tried == [(row.structure, row.backend, 4) for row in existing.itertuples()]
    assert set(table[table.auto].backend) == {"hooks", "torch"}
    assert table[["seconds", "passes", "peak_bytes"]].isna().all(axis=None)
    assert (existing[existing.supported == "yes"].backward_passes[existing.structure != "implicit"] == 1).all()


class Bert(nn.Module):
    """Embeddings, an encoder layer and a pooled classifier: 3,147 parameters."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(40, 16), nn.Embedding(12, 16), nn.LayerNorm(16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", batch_first=True)
        self.pooler, self.classifier = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.norm(self.tokens(x) + self.positions(torch.arange(x.shape[1])))
        return self.classifier(self.pooler(self.encoder(h)[:, 0]).tanh())


@pytest.mark.parametrize("each", [0.001, 0.05, 0.5, 5.0])
def test_measuring_ends(monkeypatch, each):
    """A backend that is fast on few samples only does not use up the time of all other combinations."""
    clock = [0.0]

    def slow(some, _, structure, **__):
        n = some.num_samples
        clock[0] += each if n <= 8 else each * n / 8
        return torch.zeros(1)

    x, y = torch.randn(4000, 4), torch.arange(4000) % 3
    subject = Problem(mlp().model, "cross_entropy", DataLoader(TensorDataset(x, y), batch_size=2000))
    monkeypatch.setattr(probe_module, "_PATIENCE", 10.0)
    monkeypatch.setattr(cost, "_QUICK", 0.0)
    probe = probe_module.Probe(subject, None, {})
    monkeypatch.setattr(probe_module, "estimate", slow)
    for module in (probe_module, cost):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    costs = [probe._costs(curvlab.EmpiricalFisher(), STRUCTURES["diag"](), "hooks", measured=True) for _ in range(100)]
    assert clock[0] - 100 * each <= 10.0 + each
    assert ("seconds" in costs[0]) == (each < 5)
    assert "seconds" not in costs[-1]
    assert all("backward_passes" in cost for cost in costs)


def test_a_stored_hessian_is_tried_by_one_product(monkeypatch):
    tried = []

    def counted(some, quantity, structure, **options):
        tried.append((str(structure), options["backend"]))
        return estimate(some, quantity, structure, **options)

    monkeypatch.setattr(probe_module, "estimate", counted)
    diagnosis = doctor(mlp(), "hessian")
    for structure in ("dense", "block_diag", "diag"):
        row = find_row(diagnosis, structure=structure, backend="torch")
        assert (row["supported"], row["backward_passes"]) == ("yes", 43)
        assert math.isnan(row["seconds"])
    assert {structure for structure, backend in tried if backend == "torch"} == {"implicit"}
    assert find_row(diagnosis, structure="diag", backend="backpack")["auto"]
    assert find_row(diagnosis, structure="dense", backend="torch")["auto"]


@pytest.mark.parametrize(("loss", "rows"), [("cross_entropy", 1299), ("squared_error", 1300)])
def test_many_classes(two_backends, monkeypatch, loss, rows):
    monkeypatch.setattr(MODULE, "STRUCTURES", {"implicit": STRUCTURES["implicit"]})
    targets = Y if loss == "cross_entropy" else torch.zeros(9, 1300)
    subject = Problem(nn.Linear(4, 1300), loss, (X, targets))
    assert doctor(subject, ["fisher", "ggn", "fisher:samples=2", "empirical_fisher", "hessian"]).findings == (
        f"fisher needs {rows:,} backward passes per batch; fisher:samples=1, which is unbiased, needs one",
        f"ggn needs {rows:,} backward passes per batch; fisher:samples=1, which is unbiased, needs one",
    )


def test_a_line_through_the_last_two_points():
    assert cost.extrapolate([(4, 9.0), (10, 3.0), (20, 5.0)], 50) == 11.0
    assert cost.extrapolate([(10, 3.0), (20, 2.0)], 50) == 2.0  # a decrease is noise
    assert cost.extrapolate([(10, 1.0), (20, 5.0)], 40) == 10.0  # more than proportional is noise, too
    assert cost.extrapolate([(9, 3.0)], 9) == 3.0


def test_peak_of_memory():
    held = torch.ones(1000)

    def work():
        a = torch.zeros(1000) + held  # two, of which one stays
        b = a.view(10, 100).mT  # none
        c = torch.cat([b.flatten()] * 3)  # a copy, then three more
        return c.sum()

    assert measure_peak(work) == 4 * 5000
    assert measure_peak(lambda: held.view(-1)) == 0


def test_a_matrix_that_is_too_large_is_not_tried(monkeypatch):
    monkeypatch.setattr(probe_module, "_LARGEST", 43 * 43 * 4 - 1)
    diagnosis = doctor(mlp(), ["fisher", "hessian"])
    dense = find_row(diagnosis, quantity="fisher", structure="dense", backend="hooks")
    assert (dense["supported"], dense["matrix_bytes"]) == ("not tried", 43 * 43 * 4)
    assert dense["obstacle"].startswith("it needs 7.4 kB, too much to try")
    assert find_row(diagnosis, quantity="fisher", structure="diag", backend="hooks")["supported"] == "yes"
    # The reference forms the whole Hessian for every stored structure.
    assert find_row(diagnosis, quantity="hessian", structure="diag", backend="torch")["supported"] == "not tried"
    assert find_row(diagnosis, quantity="hessian", structure="implicit", backend="torch")["supported"] == "yes"


# State that must not change.


def state(model):
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()},
        "gradients": [p.grad for p in model.parameters()],
        "asked": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def pooled() -> Problem:
    """Return a network for whose pooling BackPACK creates layers with random weights."""
    pool = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return problem(*pool, nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("batch norm", False),
        ("batch norm", True),
        ("input changed in place", False),
        ("embedding", True),
        ("pooled", False),
    ],
)
def test_nothing_is_changed(name, train):
    subject = pooled() if name == "pooled" else case(name).problem
    subject.model.train(train)
    next(subject.model.parameters()).grad = torch.ones_like(next(subject.model.parameters()))
    inputs = subject.data[0].clone()
    before = deepcopy(state(subject.model))
    filters = list(warnings.filters)
    with torch.no_grad():
        doctor(subject, ["fisher:samples=1", "hessian"])
    after = state(subject.model)
    assert torch.equal(subject.data[0], inputs)
    assert warnings.filters == filters
    for key in ("asked", "modes", "hooks"):
        assert before[key] == after[key]
    assert torch.equal(before["random"], after["random"])
    assert all(torch.equal(before["tensors"][k], v) for k, v in after["tensors"].items())
    assert all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(before["gradients"], after["gradients"], strict=True)
    )


def test_random_numbers_of_a_library_leave_the_global_state(two_backends, monkeypatch):
    def drawing(*arguments, **options):
        torch.rand(1)
        warnings.simplefilter("once", FutureWarning)
        return estimate(*arguments, **options)

    monkeypatch.setattr(probe_module, "estimate", drawing)
    subject = mlp()
    random, filters = torch.get_rng_state(), list(warnings.filters)
    doctor(subject, "empirical_fisher")
    assert torch.equal(random, torch.get_rng_state())
    assert warnings.filters == filters


@pytest.mark.parametrize("batch", [1, 3, 9, 20])
@pytest.mark.usefixtures("measured")
def test_any_batches(two_backends, batch):
    loader = DataLoader(TensorDataset(X, Y), batch_size=batch)
    table = doctor(Problem(mlp().model, "cross_entropy", loader), "empirical_fisher").combinations
    assert table[table.supported == "yes"][["seconds", "peak_bytes"]].notna().all(axis=None)


def test_one_sample_and_one_class(two_backends):
    model = nn.Sequential(nn.Linear(4, 1))
    table = doctor(Problem(model, "cross_entropy", (X[:1], torch.zeros(1, dtype=torch.int64)))).combinations
    assert (table[table.structure == "diag"].supported != "no").all()


def test_invalid_problems_and_quantities() -> None:
    model = nn.Linear(2, 3)
    problem = Problem(model, "cross_entropy", (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])))
    for wrong in (model, None, (model, "cross_entropy")):
        with pytest.raises(CurvlabError, match=r"doctor needs a problem, such as Problem\(model"):
            doctor(wrong)
    for wrong in (None, 3, [], {"fisher"}):
        with pytest.raises(CurvlabError, match="quantity must be one quantity or several"):
            doctor(problem, wrong)
