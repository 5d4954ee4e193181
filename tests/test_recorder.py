"""The recorder of eigenvalues: correct at every point, without side effects, cheap, and resumable bitwise."""

import gc
import os
import re
import signal
import weakref
from pathlib import Path
from statistics import median
from typing import get_type_hints

import numpy as np
import pytest
import torch
from programs import Starter
from torch import Tensor, nn

from curvlab import CurvlabError, Problem, UnsupportedError, estimate
from curvlab import recorder as module
from curvlab.data import load
from curvlab.models import mlp
from curvlab.recorder import EigenvalueChanges, EigenvalueOptions, EigenvalueRecorder
from curvlab.spectrum import top_eigenvalues
from curvlab.spectrum.density import spectral_density
from curvlab.training import fit


def blobs(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    return (3 * torch.eye(3, 6))[labels] + torch.randn(count, 6, generator=generator), labels


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def eigenvalues(model: nn.Module, quantity: str, params: str | None = None) -> Tensor:
    """Return all eigenvalues of the dense matrix in float64, ascending."""
    return estimate(Problem(model, "cross_entropy", blobs()), quantity, "dense", params=params).eigenvalues()


class Reference:
    """Observer that records all eigenvalues of the dense matrices."""

    def __init__(self, every: int) -> None:
        self.every, self.values = every, {}

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def __call__(self, step: int, model: nn.Module) -> None:
        assert not model.training
        for quantity in ("fisher", "hessian"):
            self.values[step, quantity, "network"] = eigenvalues(model, quantity)
            for layer in ("0", "1", "4"):
                self.values[step, quantity, layer] = eigenvalues(model, quantity, f"{layer}.*")

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, states: object, /) -> None:
        pass


LEARNING = {"steps": 17, "batch_size": 16, "lr": 0.03}


@pytest.fixture(scope="module")
def reference() -> dict[tuple[int, str, str], Tensor]:
    """Return all eigenvalues at every fifth step of a training without a recorder."""
    reference = Reference(5)
    fit(network().double(), blobs(), observers=[reference], **LEARNING)
    return reference.values


@pytest.mark.parametrize(("which", "per"), [("LA", "network"), ("LA", "layer"), ("LM", "network"), ("SA", "layer")])
def test_values_are_those_of_the_dense_matrix(
    which: str, per: str, reference: dict[tuple[int, str, str], Tensor]
) -> None:
    recorder = EigenvalueRecorder(blobs(), k=2, which=which, every=5, per=per, tol=1e-6)
    fit(network().double(), blobs(), observers=[recorder], **LEARNING)
    layers = ["network"] if per == "network" else ["0", "1", "4"]
    assert [(r["step"], r["quantity"], r["layer"], r["index"]) for r in recorder.records] == [
        (step, quantity, layer, index)
        for step in (0, 5, 10, 15, 17)
        for quantity in ("fisher", "hessian")
        for layer in layers
        for index in (0, 1)
    ]
    for record in recorder.records:
        all_values = reference[record["step"], record["quantity"], record["layer"]]
        order = {"LA": -all_values, "SA": all_values, "LM": -all_values.abs()}[which].argsort()
        expected = float(all_values[order[record["index"]]])
        scale = float(all_values.abs().max())
        assert record["converged"]
        assert record["value"] == pytest.approx(expected, rel=2e-6, abs=1e-9 * scale)
        assert float((all_values - record["value"]).abs().min()) <= record["residual"] + 1e-12 * scale
        assert record["matvecs"] > 0
        assert record["seconds"] > 0


def test_nothing_is_changed_and_dropout_is_off() -> None:
    model = network().train()
    model[1].eval()
    model[0].weight.grad = gradient = torch.ones_like(model[0].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    recorder = EigenvalueRecorder(blobs())
    recorder(0, model)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert recorder.records[0]["value"] == pytest.approx(float(eigenvalues(model.eval(), "fisher")[-1]), rel=1e-3)


class Two(nn.Module):
    """Model with two independent blocks of parameters, whose eigenvalues can cross."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 1, bias=False), nn.Linear(inputs, 1, bias=False)
        self.register_buffer("scale", torch.tensor([1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=1) * self.scale


def crossing(warm: bool, points: int = 12, **options: object) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 20, generator=generator) * torch.linspace(2.0, 0.2, 20)
    model = Two(20)
    recorder = EigenvalueRecorder((x, torch.zeros(40, 2)), "squared_error", every=1, warm=warm, **options)
    for step in range(points):
        model.scale[1] = 0.85 + 0.05 * step  # the second overtakes the first at step 3
        recorder(step, model)
    return recorder.records


def test_a_new_top_eigenvector_is_seen() -> None:
    cold = crossing(False)
    warm = crossing(True)
    first = [record["value"] for record in cold if record["step"] < 3]
    assert first == pytest.approx([first[0]] * 6, rel=1e-3)  # the eigenvalue of the first block, which is constant
    assert warm[-1]["value"] > 1.9 * warm[0]["value"]
    for ours, theirs in zip(warm, cold, strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=2e-3), ours["step"]


def test_an_eigenvector_missed_by_warm_starts_is_found_by_a_random_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlab.spectrum.eigenvalues._RANDOM_PART", 1e-4)
    monkeypatch.setattr(module, "_RANDOM_START_EVERY", 6)
    cold, warm = crossing(False, quantities=["fisher"]), crossing(True, quantities=["fisher"])
    off = [w["value"] != pytest.approx(c["value"], rel=2e-3) for w, c in zip(warm, cold, strict=True)]
    assert any(off[:6])  # shows that the random part is needed, and that this test can fail
    assert not any(off[6:])


def test_at_most_six_products_a_point() -> None:
    digits = load("digits")
    data = digits.x_train[:500], digits.y_train[:500]
    torch.manual_seed(0)
    options = {"optimizer": "sgd", "lr": 1e-2, "momentum": 0.9, "steps": 300, "batch_size": 50}
    recorder, cold = EigenvalueRecorder(data, every=30), EigenvalueRecorder(data, every=30, warm=False)
    sharp = EigenvalueRecorder(data, every=30, tol=1e-8, warm=False)
    result = fit(mlp(64, (50,), 10), (digits.x_train, digits.y_train), observers=[recorder, cold, sharp], **options)
    assert median(record["matvecs"] for record in recorder.records) <= 6
    assert median(record["matvecs"] for record in cold.records) > 6
    for ours, exact in zip(recorder.records, sharp.records, strict=True):
        assert ours["value"] == pytest.approx(exact["value"], rel=1e-3)
    inside = sum(record["seconds"] for record in recorder.records + cold.records + sharp.records)
    assert inside <= result.observer_seconds <= result.seconds


def test_nothing_of_the_model_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices: list[weakref.ref[object]] = []
    alive: list[int] = []

    def remember(*arguments: object, **options: object) -> object:
        alive.append(sum(ref() is not None for ref in matrices))
        matrix = estimate(*arguments, **options)
        matrices.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(module, "estimate", remember)
    model = network()
    recorder = EigenvalueRecorder(blobs(), densities_at=[0], density_probes=2, density_steps=5)
    gc.collect()
    before = {id(tensor) for tensor in tensors()}
    gc.disable()  # graphs must be freed without the garbage collector
    try:
        recorder(0, model)
        assert alive == [0, 0]
        assert all(ref() is None for ref in matrices)
        assert not any(t.grad_fn is not None for t in tensors() if id(t) not in before)
    finally:
        gc.enable()
    gc.collect()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors() if id(t) not in before}
    # One eigenvector of the first quantity, and nodes and weights of two densities.
    assert sum(kept.values()) == 4 * sum(p.numel() for p in model.parameters()) + 2 * 2 * 8 * 2 * 5


def tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def test_densities_at_chosen_steps() -> None:
    model = network()
    recorder = EigenvalueRecorder(
        blobs(), every=10, densities_at=(0, 7), density_probes=3, density_steps=8, quantities=["hessian"], seed=4
    )
    seen = {}

    class Spy(Reference):
        def __call__(self, step: int, model: nn.Module) -> None:
            matrix = estimate(Problem(model, "cross_entropy", blobs()), "hessian", "implicit")
            seen[step] = spectral_density(matrix, probes=3, steps=8, seed=4)

    fit(model, blobs(), steps=20, batch_size=16, observers=[recorder, Spy(7)])
    assert [(d["step"], d["quantity"], d["layer"]) for d in recorder.densities] == [
        (0, "hessian", "network"),
        (7, "hessian", "network"),
    ]
    assert [r["step"] for r in recorder.records] == [0, 7, 10, 20]
    for record in recorder.densities:
        torch.testing.assert_close(record["density"].nodes, seen[record["step"]].nodes)
        assert record["seconds"] > 0


OPTIONS = {"steps": 30, "batch_size": 16, "lr": 0.01, "checkpoint_every": 7}


def recorder_of_run(**changes: object) -> EigenvalueRecorder:
    plain: dict[str, object] = {"every": 5, "densities_at": (0, 12), "density_probes": 2, "density_steps": 6}
    return EigenvalueRecorder(blobs(), **(plain | changes))


def without_seconds(records: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in record.items() if key not in ("seconds", "density")} for record in records]


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], EigenvalueRecorder]:
    model, recorder = network(), recorder_of_run()
    fit(model, blobs(), observers=[recorder], **OPTIONS)
    return model.state_dict(), recorder


def assert_same(
    model: nn.Module, recorder: EigenvalueRecorder, whole: tuple[dict[str, Tensor], EigenvalueRecorder]
) -> None:
    weights, expected = whole
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert without_seconds(recorder.records) == without_seconds(expected.records)
    assert without_seconds(recorder.densities) == without_seconds(expected.densities)
    for ours, theirs in zip(recorder.densities, expected.densities, strict=True):
        assert torch.equal(ours["density"].nodes, theirs["density"].nodes)
        assert torch.equal(ours["density"].weights, theirs["density"].weights)


def test_weights_are_the_same_bits_without_it(whole: tuple[dict[str, Tensor], EigenvalueRecorder]) -> None:
    model = network()
    fit(model, blobs(), **OPTIONS)
    assert all(torch.equal(tensor, whole[0][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stop_at", [3, 24])
def test_killed_run_goes_on_to_the_same_records(
    tmp_path: Path, whole: tuple[dict[str, Tensor], EigenvalueRecorder], stop_at: int, starter: Starter
) -> None:
    """The process is killed by SIGKILL and continued from the file."""
    file = tmp_path / "run.pt"
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_recorder import OPTIONS, blobs, network, recorder_of_run
from curvlab.training import fit
from curvlab.training.run import Run
torch.set_num_threads({torch.get_num_threads()})
real = Run.train_step
def step(run, *batch):
    if run.step == {stop_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(run, *batch)
Run.train_step = step
fit(network(), blobs(), checkpoint={str(file)!r}, observers=[recorder_of_run()], **OPTIONS)
"""
    code, _, err = starter.start(["-c", script]).wait()
    assert code == -signal.SIGKILL, err
    model, recorder = network(), recorder_of_run()
    result = fit(model, blobs(), checkpoint=file, observers=[recorder], **OPTIONS)
    assert result.resumed_at == stop_at // 7 * 7
    assert_same(model, recorder, whole)
    # A finished run is only read.
    again = recorder_of_run()
    fit(network(), blobs(), checkpoint=file, observers=[again], **OPTIONS)
    assert without_seconds(again.records) == without_seconds(recorder.records)


def test_ctrl_c_within_a_point_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[dict[str, Tensor], EigenvalueRecorder]
) -> None:
    file = tmp_path / "run.pt"
    real, calls = module.top_eigenvalues, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(0)
        if len(calls) == 10:  # the second quantity at the fifth point
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "top_eigenvalues", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), blobs(), checkpoint=file, observers=[recorder_of_run()], **OPTIONS)
    assert "training stopped after step 15 of 30, saved in" in caught.value.__notes__[-1]
    monkeypatch.undo()
    model, recorder = network(), recorder_of_run()
    assert fit(model, blobs(), checkpoint=file, observers=[recorder], **OPTIONS).resumed_at == 15
    assert_same(model, recorder, whole)


def test_checkpoint_of_another_recorder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    fit(network(), blobs(), checkpoint=file, observers=[recorder_of_run()], **OPTIONS)
    x, y = blobs()
    for other, message in (
        (recorder_of_run(tol=1e-2), r"had tol 0\.001, this one has 0\.01"),
        (recorder_of_run(quantities=["ggn"]), "had quantities fisher, hessian, this one has ggn"),
        (EigenvalueRecorder((x + 1, y), every=5), "had data tensors .*, this one has tensors"),
    ):
        with pytest.raises(CurvlabError, match=message):
            fit(network(), blobs(), checkpoint=file, observers=[other], **OPTIONS)
    with pytest.raises(CurvlabError, match="observers is EigenvalueRecorder there and absent here"):
        fit(network(), blobs(), checkpoint=file, **OPTIONS)


def test_a_recorder_belongs_to_one_run() -> None:
    recorder = EigenvalueRecorder(blobs(), every=5)
    fit(network(), blobs(), steps=5, observers=[recorder])
    with pytest.raises(CurvlabError, match="has a point at step 5 and is called at step 0: create a new recorder"):
        fit(network(), blobs(), steps=5, observers=[recorder])


def test_a_training_that_diverges_says_so() -> None:
    recorder = EigenvalueRecorder(blobs(), every=1)
    x, y = blobs()
    with pytest.raises(CurvlabError, match=r"parameter weight holds NaN or infinite values after step 1: lower lr"):
        fit(nn.Linear(6, 3), (1e3 * x, y), optimizer="sgd", lr=1e38, steps=20, batch_size=30, observers=[recorder])
    assert {record["step"] for record in recorder.records} == {0}
    # The weights are still finite, but the curvature is not.
    with pytest.raises(CurvlabError, match="is not finite") as caught:
        fit(network(), blobs(), optimizer="sgd", lr=1e38, steps=20, observers=[EigenvalueRecorder(blobs(), every=1)])
    assert caught.value.__notes__ == ["in EigenvalueRecorder, called after step 1 of the training"]


def test_problems_of_ones_own_data_loaders_and_parts() -> None:
    x, y = blobs()
    model = network()
    recorders = [
        EigenvalueRecorder((x, y)),
        EigenvalueRecorder(lambda model: Problem(model, "cross_entropy", (x, y))),
        EigenvalueRecorder([(x[:33], y[:33]), (x[33:], y[33:])]),
        EigenvalueRecorder((x, y), batch_size=7),
        EigenvalueRecorder((x, y), params="*"),
    ]
    for recorder in recorders:
        recorder(0, model)
    values = torch.tensor([[record["value"] for record in recorder.records] for recorder in recorders])
    torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-4, atol=0)
    part = EigenvalueRecorder((x, y), params=["4.*"], quantities=["hessian"])
    part(0, model)
    assert part.records[0]["value"] == pytest.approx(float(eigenvalues(model.eval(), "hessian", "4.*")[-1]), rel=1e-3)
    selections = (re.compile(r"4\..*"), lambda name, parameter: name.startswith("4."))
    others = [EigenvalueRecorder((x, y), params=params, quantities=["hessian"]) for params in (*selections, selections)]
    for other in others:
        other(0, model.train())
        assert without_seconds(other.records) == without_seconds(part.records)
    others[0].load_state_dict(EigenvalueRecorder((x, y), params=selections[0], quantities=["hessian"]).state_dict())
    for other, others_params in ((others[0], r"function .*lambda"), (others[1], r"\[.re\.compile.*function .*lambda")):
        with pytest.raises(CurvlabError, match=f"had params {others_params}"):
            other.load_state_dict(others[1 if other is others[0] else 2].state_dict())


def test_too_few_products_are_reported() -> None:
    recorder = EigenvalueRecorder(blobs(), max_matvecs=2)
    recorder(0, network())
    assert [(record["matvecs"], record["converged"]) for record in recorder.records] == [(2, False)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantities": []}, "quantities must be a list of at least one"),
        ({"quantities": "fisher"}, "quantities must be a list of at least one"),
        ({"quantities": ["fischer"]}, "fischer"),
        ({"every": 0}, "every must be at least 1, not 0"),
        ({"which": "LR"}, "LR"),
        ({"per": "tensor"}, "tensor"),
        ({"density_probes": 1}, "probes must be at least 2"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"tolerance": 1e-3}, "no option of the recorder 'tolerance'"),
        ({"options": {"k": 2}}, "options must be a curvlab.recorder.EigenvalueOptions, not {'k': 2}"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(CurvlabError, match=message):
        EigenvalueRecorder(blobs(), **options)


def test_keywords_change_the_options() -> None:
    assert get_type_hints(EigenvalueChanges) == get_type_hints(EigenvalueOptions)
    options = EigenvalueOptions(k=2, which="SA", params=["4.*"], seed=3)
    recorders = [
        EigenvalueRecorder(blobs(), options=options),
        EigenvalueRecorder(blobs(), k=2, which="SA", params=["4.*"], seed=3),
        EigenvalueRecorder(blobs(), options=EigenvalueOptions(k=2, params="*", which="SA"), params=["4.*"], seed=3),
    ]
    for recorder in recorders:
        recorder(0, network())
    assert len(recorders[0].records) == 4
    assert without_seconds(recorders[0].records) == without_seconds(recorders[1].records)
    assert without_seconds(recorders[0].records) == without_seconds(recorders[2].records)
    assert {options: 1}[EigenvalueOptions(k=np.int64(2), which="SA", params=("4.*",), seed=3)] == 1


def test_an_error_says_where_it_came_from() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(dim=0))

    with pytest.raises(UnsupportedError, match="depends on the other samples") as caught:
        fit(Mixes(), blobs(), steps=3, observers=[EigenvalueRecorder(blobs())])
    assert caught.value.__notes__ == ["in EigenvalueRecorder, called after step 0 of the training"]


def test_the_last_record_is_the_top_eigenvalue() -> None:
    """The last record is the eigenvalue of the model after ``fit``."""
    model = network()
    recorder = EigenvalueRecorder(blobs(), every=50)
    fit(model, blobs(), steps=60, observers=[recorder])
    top = top_eigenvalues(estimate(Problem(model.eval(), "cross_entropy", blobs()), "hessian", "implicit"))
    assert recorder.records[-1]["step"] == 60
    assert recorder.records[-1]["value"] == pytest.approx(float(top.values[0]), rel=2e-3)


def test_a_layer_that_is_unfrozen_between_points() -> None:
    model = network()
    first = next(model.parameters()).requires_grad_(False)
    recorder = EigenvalueRecorder(blobs(), quantities=["hessian"])
    recorder(0, model)
    first.requires_grad_()
    recorder(1, model)
    problem = Problem(model.eval(), "cross_entropy", blobs())
    exact = float(estimate(problem, "hessian", "dense").eigenvalues()[-1])
    assert recorder.records[1]["value"] == pytest.approx(exact, rel=1e-3)
