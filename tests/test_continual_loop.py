"""The training loop: bitwise equal to plain PyTorch, resumable after a kill, without side effects."""

import random
import re
import textwrap
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from programs import Starter
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import linearize
from curvlab.continual import Regime, Result, Strategy, Task, disjoint, permuted, run, split_classes, split_data
from curvlab.continual.learner import Batch, Learner
from curvlab.continual.outputs import Outputs, mean_loss
from curvlab.continual.strategies import AGEM, DER, ER, EWC, IMM, SI, Joint, LinearProbe, LwF, Naive, Oracle
from curvlab.data import Dataset, load
from curvlab.errors import CurvlabError
from curvlab.training import Training
from curvlab.training.state import derive_seed

CLASSES = 6


# What the tests are made of -------------------------------------------------------------------------------------------


def blobs(classes: int = CLASSES, count: int = 60, test: int = 30, seed: int = 0) -> Dataset:
    """Return a data set of slightly overlapping clusters in random order."""
    generator = torch.Generator().manual_seed(seed)
    x, y = [], []
    for size in (count, test):
        y.append(torch.randint(classes, (size,), generator=generator))
        x.append(2 * torch.eye(classes, 8)[y[-1]] + torch.randn(size, 8, generator=generator))
    return Dataset("blobs", x[0], y[0], x[1], y[1], classes=tuple(map(str, range(classes))))


def network(outputs: int = CLASSES, dropout: float = 0.0, norm: bool = False, seed: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(8, 7), nn.BatchNorm1d(7) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(7, outputs))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def learn(stream: Sequence[Task], model: nn.Module, strategy: Strategy | None = None, **options: Any) -> Result:
    return run(stream, model, strategy or Naive(), **{"batch_size": 8, "progress": False} | options)


def order(seed: int, task: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, task, 0, epoch)))


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def plain_results(result: Result) -> dict[str, Any]:
    """Return all numbers of a result except the times."""
    records = [{k: v for k, v in record.items() if "seconds" not in k} for record in result.tasks]
    return {"tasks": records, "curves": result.curves}


class Stop(BaseException):  # like KeyboardInterrupt
    pass


def stop_at(model: nn.Module, call: int, error: BaseException | None = None) -> list[int]:
    """Make the model raise at a given call; return a list that counts the calls."""
    calls = [0]

    def hook(*_: object) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error or Stop

    model.register_forward_hook(hook)
    return calls


# Against plain loops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2},
        {"steps": 11},
        {"steps": [1, 9, 20]},
        {"epochs": (1, 3, 2), "momentum": 0.8, "weight_decay": 0.01, "clip_norm": 0.5, "schedule": "cosine"},
        {"epochs": 1, "optimizer": "adam", "lr": 0.01, "lr_decay": 0.5, "min_lr": 0.004},
        {"epochs": 1, "loss": "squared_error", "target_scale": 3.0},
        {"epochs": 2, "batch_size": [4, 60, 7]},
        {"steps": 9, "batch_size": (16, 5, 5), "schedule": "step", "schedule_factor": 0.5, "schedule_drops": [1 / 3]},
        {"epochs": [2, 1, 1], "schedule": "exponential", "schedule_factor": 0.02},
    ],
)
def test_naive_is_a_plain_loop_to_the_bit(options: dict[str, Any]) -> None:
    data, seed = blobs(), 5
    stream = permuted(data, tasks=3)
    model, plain = network(dropout=0.4, norm=True), network(dropout=0.4, norm=True)
    result = learn(stream, model, seed=seed, **options)

    accuracy = torch.full((3, 3), torch.nan, dtype=torch.float64)
    initial = [by_hand(plain, *task.test) for task in stream]
    for t, task in enumerate(stream):
        torch.manual_seed(derive_seed(seed, t, 1))
        lr = max(options.get("lr", 0.1) * options.get("lr_decay", 1.0) ** t, options.get("min_lr", 0.0))
        decay = options.get("weight_decay", 0.0)
        optimizer: torch.optim.Optimizer
        if options.get("optimizer") == "adam":
            optimizer = torch.optim.Adam(plain.parameters(), lr=lr, weight_decay=decay)
        else:
            momentum = options.get("momentum", 0.0)
            optimizer = torch.optim.SGD(plain.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
        x, y = task.train
        batch = options.get("batch_size", [8] * 3)[t]
        per_epoch = -(-len(x) // batch)
        length = options.get("steps", options.get("epochs"))
        length = length if isinstance(length, int) else length[t]
        steps = length if "steps" in options else length * per_epoch
        plain.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                if options.get("schedule") == "cosine":
                    group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
                elif options.get("schedule") == "step":
                    group["lr"] = lr * 0.5 if step >= 3 else lr
                elif options.get("schedule") == "exponential":
                    group["lr"] = lr * 0.02 ** (step / steps)
            epoch, position = divmod(step, per_epoch)
            index = order(seed, t, epoch, len(x))[position * batch : (position + 1) * batch]
            optimizer.zero_grad()
            outputs = plain(x[index])
            if options.get("loss") == "squared_error":
                loss = (outputs - 3.0 * F.one_hot(y[index], CLASSES)).square().sum() / (2 * len(index))
            else:
                loss = F.cross_entropy(outputs, y[index])
            loss.backward()
            if "clip_norm" in options:
                nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
            optimizer.step()
        for i in range(min(t + 2, 3)):
            accuracy[t, i] = by_hand(plain, *stream[i].test)
        assert result.tasks[t]["steps"] == steps
        assert result.tasks[t]["lr"] == lr
    assert equal(values(model), values(plain))
    assert same(result.accuracy, accuracy)
    assert result.initial.tolist() == initial


def test_a_training_and_its_fields_as_keywords_are_one() -> None:
    stream = permuted(blobs(), tasks=2)
    training = Training(optimizer="sgd", lr=0.05, lr_decay=0.5, batch_size=[8, 16], epochs=2, seed=4)
    models = [network(dropout=0.3) for _ in range(3)]
    run(stream, models[0], Naive(), training=training, progress=False)
    fields = {"lr": 0.05, "lr_decay": 0.5, "batch_size": [8, 16], "epochs": 2, "seed": 4}
    run(stream, models[1], Naive(), **fields, progress=False)
    run(stream, models[2], Naive(), training=replace(training, epochs=7), epochs=2, progress=False)
    assert equal(values(models[0]), values(models[1]))
    assert equal(values(models[0]), values(models[2]))
    assert run(stream, network(), Naive(), training=training, steps=3, progress=False).tasks[0]["steps"] == 3


def test_a_method_sees_the_batch_size_of_its_task() -> None:
    drawn: list[tuple[int, int]] = []

    class Listens(ER):
        def loss(self, learner: Learner, batch: Batch) -> Tensor:
            drawn.append((learner.batch_size, len(batch.y)))
            return super().loss(learner, batch)

    learn(permuted(blobs(), tasks=3), network(), Listens(20), batch_size=[20, 30, 60])
    assert drawn == [(20, 20)] * 3 + [(30, 30)] * 2 + [(60, 60)]
    drawn.clear()
    joint = type("Listens", (Listens, Joint), {"tasks": Joint.tasks, "loss": Listens.loss})
    learn(permuted(blobs(), tasks=3), network(), joint(20), batch_size=[20, 30, 60])
    assert drawn == [(60, 60)] * 3


def two_by_two(count: int = 60) -> tuple[Task, ...]:
    return disjoint(blobs(count=count), classes=[(4, 1), (0, 5), (2, 3)])


def test_multi_head_is_separate_linear_heads() -> None:
    stream = two_by_two()
    model = network().double()
    body, heads = deepcopy(model[:-1]), [nn.Linear(7, 2).double() for _ in range(3)]
    for i, head in enumerate(heads):
        head.weight.data.copy_(model[-1].weight[2 * i : 2 * i + 2])
        head.bias.data.copy_(model[-1].bias[2 * i : 2 * i + 2])
    result = learn(stream, model, head="multi", epochs=2)
    for t, task in enumerate(stream):
        x, y = task.train[0].double(), task.train[1]
        within = torch.tensor([task.classes.index(int(label)) for label in y])
        optimizer = torch.optim.SGD([*body.parameters(), *heads[t].parameters()], lr=0.1)
        for epoch in range(2):
            for index in order(0, t, epoch, len(x)).split(8):
                optimizer.zero_grad()
                F.cross_entropy(heads[t](body(x[index])), within[index]).backward()
                optimizer.step()
        for i, other in enumerate(stream[: t + 2]):
            labels = torch.tensor([other.classes.index(int(label)) for label in other.test[1]])
            found = by_hand(nn.Sequential(body, heads[i]), other.test[0].double(), labels)
            assert result.accuracy[t, i] == pytest.approx(found, abs=1e-12)
    torch.testing.assert_close(model[-1].weight, torch.cat([h.weight for h in heads]), rtol=0, atol=1e-12)
    torch.testing.assert_close(model[0].weight, body[0].weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("head", ["masked", "growing"])
def test_masked_and_growing_heads_are_columns_of_the_outputs(head: Any, loss: Any) -> None:
    stream = two_by_two()
    model, plain = network().double(), network().double()
    untouched = plain[-1].weight.detach().clone()
    result = learn(stream, model, head=head, loss=loss, lr=0.05, evaluate_every=3)
    so_far: list[int] = []
    for t, task in enumerate(stream):
        so_far += task.classes
        columns = sorted(so_far if head == "growing" else task.classes)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
        x, y = task.train[0].double(), torch.tensor([columns.index(int(label)) for label in task.train[1]])
        plain.train()
        for index in order(0, t, 0, len(x)).split(8):
            optimizer.zero_grad()
            outputs = plain(x[index])[:, columns]
            if loss == "cross_entropy":
                value = F.cross_entropy(outputs, y[index])
            else:
                value = (outputs - F.one_hot(y[index], len(columns))).square().sum(1).mean() / 2
            value.backward()
            optimizer.step()
        plain.eval()
        for i in range(t + 1 if head == "growing" else min(t + 2, 3)):
            hidden = torch.full((CLASSES,), -torch.inf, dtype=torch.float64)
            hidden[columns if head == "growing" else list(stream[i].classes)] = 0
            x, y = stream[i].test
            assert result.accuracy[t, i] == float(((plain(x.double()) + hidden).argmax(1) == y).double().mean())
        if head == "growing":
            assert result.accuracy[t, t + 1 :].isnan().all()
            rest = [k for k in range(CLASSES) if k not in so_far]
            assert torch.equal(plain[-1].weight[rest], untouched[rest])
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    assert result.initial.isnan().all() == (head == "growing")


def test_the_heads_of_one_task_are_one() -> None:
    found = {}
    for head in ("single", "masked", "growing", "multi"):
        model = network()
        learn(permuted(blobs(), tasks=1), model, head=head)
        found[head] = values(model)
    assert all(equal(found["single"], other) for other in found.values())


def test_accuracies_are_measured_where_they_should_be() -> None:
    result = learn(split_data(blobs(), tasks=4), network(), steps=2, evaluate_every=1)
    expected = torch.ones(4, 4).tril(1).bool()
    assert torch.equal(result.accuracy.isnan(), ~expected)
    # The test samples are the same, so they are evaluated once, and the numbers are equal.
    assert all(len(set(row[~row.isnan()].tolist())) == 1 for row in result.accuracy)
    assert result.accuracy.dtype == result.initial.dtype == torch.float64
    assert [(r["task"], r["step"], r["on"]) for r in result.curves] == [
        (t, s, i) for t in range(4) for s in (1, 2) for i in range(t + 1)
    ]
    for t in range(4):
        (end,) = [r["accuracy"] for r in result.curves if (r["task"], r["step"], r["on"]) == (t, 2, t)]
        assert end == result.accuracy[t, t]


def test_a_model_that_works_in_place_changes_no_data() -> None:
    stream = split_data(blobs(), tasks=2)
    before = stream[0].dataset.x_test.clone()
    learn(stream, nn.Sequential(nn.Hardtanh(-0.1, 0.1, inplace=True), nn.Linear(8, CLASSES)), steps=2)
    assert torch.equal(stream[0].dataset.x_test, before)


def test_tasks_with_the_same_samples_and_other_outputs_are_measured_each() -> None:
    stream = split_data(blobs(), tasks=3)
    model = network(3 * CLASSES)
    result = learn(stream, model, head="multi", epochs=3)
    model.eval()
    x, y = stream[0].test
    expected = [float((model(x)[:, CLASSES * i : CLASSES * (i + 1)].argmax(1) == y).double().mean()) for i in range(3)]
    assert result.accuracy[-1].tolist() == expected
    assert len(set(expected)) > 1


def test_curves_do_not_change_the_run() -> None:
    runs = [(network(dropout=0.3, norm=True), every) for every in (None, 3)]
    results = [learn(permuted(blobs(), tasks=2), model, ER(10), evaluate_every=every) for model, every in runs]
    assert equal(values(runs[0][0]), values(runs[1][0]))
    assert same(results[0].accuracy, results[1].accuracy)
    assert not results[0].curves
    assert [r["step"] for r in results[1].curves if r["task"] == 0] == [3, 6, 8]


def test_evaluation_on_held_out_samples() -> None:
    stream = permuted(blobs(), tasks=2, validation=20)
    model = network()
    result = learn(stream, model, evaluation="validation")
    assert result.accuracy[1].tolist() == [by_hand(model, *task.validation) for task in stream]


def test_observe_sees_the_model_as_it_is_evaluated() -> None:
    stream = permuted(blobs(), tasks=3)
    models = [network(dropout=0.5, norm=True) for _ in range(2)]

    def observe(learner: Learner) -> dict[str, Any]:
        assert not any(module.training for module in learner.model.modules())
        torch.rand(5)
        learner.model(learner.samples(limit=4).x).sum().backward()
        return {"norm": float(learner.model[0].weight.detach().norm()), "seen": learner.task}

    result = learn(stream, models[0], observe=observe)
    learn(stream, models[1])
    assert equal(values(models[0]), values(models[1]))
    assert [record["seen"] for record in result.tasks] == [0, 1, 2]
    assert result.tasks[-1]["norm"] == float(models[0][0].weight.detach().norm())

    def changes(learner: Learner) -> dict[str, Any]:
        with torch.no_grad():
            learner.model[0].weight.mul_(2)
        return {}

    with pytest.raises(CurvlabError, match=r"changed 0\.weight of the model"):
        learn(stream, network(), observe=changes)
    with pytest.raises(CurvlabError, match="must not return 'loss', a key of every record"):
        learn(stream, network(), observe=lambda _: {"loss": 0})


def test_the_records_of_tasks() -> None:
    result = learn(permuted(blobs(), tasks=2), network(), steps=130, lr=0.02)
    for t, record in enumerate(result.tasks):
        assert (record["task"], record["name"], record["steps"]) == (t, f"permuted {t + 1}", 130)
        assert record["bytes"] == 0
        assert min(record[name] for name in ("seconds", "strategy_seconds", "evaluation_seconds")) >= 0
    # The loss is the mean of the last hundred.
    losses: list[float] = []

    class Listens(Strategy):
        def loss(self, learner: Learner, batch: Batch) -> Tensor:
            loss = super().loss(learner, batch)
            losses.append(loss.item())
            return loss

    again = learn(permuted(blobs(), tasks=2), network(), Listens(), steps=130, lr=0.02)
    assert [r["loss"] for r in again.tasks] == [r["loss"] for r in result.tasks]
    assert result.tasks[0]["loss"] == pytest.approx(sum(losses[30:130]) / 100, rel=1e-12)
    assert result.tasks[1]["loss"] == pytest.approx(sum(losses[-100:]) / 100, rel=1e-12)


# Joint training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**24, 8 * 8, 1])
def test_joint_training_takes_every_sample_once_an_epoch(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlab.continual.source._TRANSFORM_AT_ONCE", at_once)
    stream = permuted(blobs(count=21), tasks=3)
    taken: list[Batch] = []

    class Listens(Joint):
        def loss(self, learner: Learner, batch: Batch) -> Tensor:
            taken.append(batch)
            assert (learner.steps, learner.epoch_steps) == (16, 8)
            return super().loss(learner, batch)

    result = learn(stream, network(), Listens(), epochs=2, lr_decay=0.5)
    samples = [(*task.train, torch.full((21,), t)) for t, task in enumerate(stream)]
    x, y, task = (torch.cat(part) for part in zip(*samples, strict=True))
    for epoch in range(2):
        mixed = order(0, 2, epoch, 63)
        for batch, index in zip(taken[8 * epoch :], mixed.split(8), strict=False):
            assert torch.equal(batch.x, x[index])
            assert torch.equal(batch.y, y[index])
            assert torch.equal(batch.task, task[index])
    assert len(taken) == 16
    assert result.accuracy[:2].isnan().all()
    assert not result.accuracy[2].isnan().any()
    assert [record["steps"] for record in result.tasks] == [0, 0, 16]
    assert result.tasks[-1]["lr"] == 0.1  # the initial rate
    assert result.tasks[0]["loss"] is None


def test_joint_training_with_several_heads_is_the_mean_of_their_losses() -> None:
    stream = two_by_two()
    model, plain = network().double(), network().double()
    learn(stream, model, Joint(), head="multi", steps=1, batch_size=1000)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    total = sum(
        F.cross_entropy(
            plain(task.train[0].double())[:, 2 * t : 2 * t + 2],
            torch.tensor([task.classes.index(int(label)) for label in task.train[1]]),
            reduction="sum",
        )
        for t, task in enumerate(stream)
    )
    (total / sum(task.sizes["train"] for task in stream)).backward()
    optimizer.step()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


# The same numbers again -----------------------------------------------------------------------------------------------

METHODS: dict[str, Strategy] = {
    "naive": Naive(),
    "joint": Joint(),
    "linear probe": LinearProbe(),
    "oracle": Oracle(),
    "lwf": LwF(),
    "er": ER(12),
    "er ring": ER(25, buffer="ring", batch_size=3),
    "der": DER(12, alpha=0.3),
    "der++": DER(12, alpha=0.3, beta=0.5),
    "a-gem": AGEM(2, batch_size=7),
    "ewc": EWC(10.0),
    "ewc online kfac": EWC(10.0, structure="kfac:rest=diag", mode="online", samples=20),
    "si": SI(1.0),
    "imm": IMM("mean"),
}


def test_same_seed_same_bits_and_another_seed_others() -> None:
    models = [network(dropout=0.3) for _ in range(3)]
    results = [
        learn(permuted(blobs(), tasks=3), model, ER(12), seed=s) for model, s in zip(models, (5, 5, 6), strict=True)
    ]
    assert equal(values(models[0]), values(models[1]))
    assert plain_results(results[0]) == plain_results(results[1])
    assert not equal(values(models[0]), values(models[2]))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_stopped_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    def go(model: nn.Module, path: Path | None = None) -> Result:
        def observe(learner: Learner) -> dict[str, Any]:
            return {"sum": float(learner.model[0].weight.detach().sum())}

        options = {"epochs": 2, "lr_decay": 0.9, "evaluate_every": 5, "observe": observe, "checkpoint": path}
        return learn(permuted(blobs(), tasks=4), model, METHODS[name], **options)

    def fresh() -> nn.Module:
        return network(dropout=0.3, norm=True)

    whole, path = fresh(), tmp_path / "folder" / "run.pt"
    calls = stop_at(whole, 0)
    expected = go(whole)
    stops = random.Random(name).sample(range(2, calls[0]), 4)
    for call in sorted(stops):
        model = fresh()
        stop_at(model, call)
        try:
            go(model, path)
        except Stop:
            assert model.training
    model = fresh()
    result = go(model, path)
    assert result.resumed_at > 0
    for _ in range(2):
        assert equal(values(model), values(whole))
        assert same(result.accuracy, expected.accuracy)
        assert same(result.initial, expected.initial)
        assert plain_results(result) == plain_results(expected)
        model = fresh()
        result = go(model, path)
        assert result.resumed_at == 4


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, starter: Starter) -> None:
    """The process is killed at three places, and continued to the end."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        sys.path.insert(0, sys.argv[1])
        from test_continual_loop import METHODS, blobs, learn, network, permuted

        folder = Path(sys.argv[2])

        def work(name, last):
            found, calls = {}, [0]

            def count(*_):
                calls[0] += 1
                if calls[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            for method in ("er", "ewc", "lwf"):
                model = network(dropout=0.3, norm=True)
                model.register_forward_hook(count)
                path = None if name == "whole" else folder / f"{method}.pt"
                options = {"epochs": 2, "evaluate_every": 5, "checkpoint": path}
                result = learn(permuted(blobs(), tasks=4), model, METHODS[method], **options)
                numbers = {"accuracy": result.accuracy, "resumed_at": torch.tensor(result.resumed_at)}
                found[method] = numbers | {f"model {n}": p.detach() for n, p in model.state_dict().items()}
            torch.save(found, folder / f"{name}.done")
            (folder / "calls").write_text(str(calls[0]))

        def attempt(name, last=0):
            pid = os.fork()
            if not pid:
                try:
                    work(name, last)
                    os._exit(0)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
            return os.waitpid(pid, 0)[1]

        learn(permuted(blobs(), tasks=1), network(), METHODS["ewc"])  # imports at first use are done
        assert attempt("whole") == 0
        calls = int((folder / "calls").read_text())
        killed = [attempt("killed", int(share * calls)) for share in (0.25, 0.2, 0.3)]
        print(killed.count(signal.SIGKILL), attempt("killed"))
        """
    )
    code, out, err = starter.start(["-c", script, str(Path(__file__).parent), str(tmp_path)]).wait()
    assert code == 0, err
    killed, last = map(int, out.split())
    assert killed == 3
    assert last == 0
    whole, continued = (torch.load(tmp_path / f"{name}.done") for name in ("whole", "killed"))
    assert sum(int(numbers["resumed_at"]) for numbers in continued.values()) > 0
    for method, numbers in whole.items():
        for name, value in numbers.items():
            if name != "resumed_at":
                assert same(value, continued[method][name]), (method, name)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    stream = permuted(blobs(), tasks=3)
    model = network()
    calls = stop_at(model, 0)
    learn(stream, model)
    for call, path, said in (
        (2, None, "before|nothing is saved; with checkpoint=PATH"),
        (8, tmp_path / "a.pt", r"task 0 of 3 .counted from 0., before the first save in .*a\.pt"),
        (
            calls[0] - 2,
            tmp_path / "a.pt",
            r"task 2 of 3 .*to continue after task 1, saved in .*a\.pt, repeat the call with the model",
        ),
    ):
        model = network()
        stop_at(model, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) as raised:
            learn(stream, model, checkpoint=path)
        assert len(raised.value.__notes__) == 1
        assert re.search(said, raised.value.__notes__[0])
    assert learn(stream, network(), checkpoint=tmp_path / "a.pt").resumed_at == 2


# What is not its own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["naive", "linear probe", "a-gem", "ewc", "lwf"])
def test_nothing_else_is_changed(name: str, fails: bool) -> None:
    model = network(dropout=0.3, norm=True).eval()
    model[2].train()
    model[1].bias.requires_grad_(False)
    frozen = model[1].bias.clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    data = blobs()
    inputs = data.x_train.clone()
    strategy = METHODS[name]
    options = {k: repr(v) for k, v in vars(strategy).items()}
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    if fails:
        stop_at(model, 22)
        with pytest.raises(Stop):
            learn(permuted(data, tasks=2), model, strategy)
    else:
        with torch.no_grad():
            learn(permuted(data, tasks=2), model, strategy)
            assert not torch.is_grad_enabled()
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert all(p.grad is gradients[n] and bool((p.grad == 7).all()) for n, p in model.named_parameters())
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(now[n] is tensor for n, tensor in tensors.items())
    assert torch.equal(model[1].bias, frozen)
    assert torch.equal(data.x_train, inputs)
    assert {k: repr(v) for k, v in vars(strategy).items()} == options


def test_a_strategy_is_used_again() -> None:
    strategy, models = ER(10), [network(), network()]
    for model in models:
        learn(permuted(blobs(), tasks=2), model, strategy)
    assert equal(values(models[0]), values(models[1]))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stream": ()}, "the stream has no tasks"),
        ({"stream": [1]}, "element 0 is int"),
        ({"strategy": Naive}, r"strategy must be an instance such as .*Naive\(\), not Naive"),
        ({"strategy": "ewc"}, "not str"),
        ({"head": "double"}, "head must be one of single, growing, masked, multi, not 'double'"),
        ({"head": "multi"}, "head 'multi' needs 12 outputs for these 2 tasks, but the model has 6: build it with 12"),
        ({"model": network(5)}, "head 'single' needs 6 outputs"),
        ({"model": network(5), "head": "growing"}, "head 'growing' needs 6 outputs"),
        ({"loss": "hinge"}, "loss must be cross_entropy or squared_error"),
        ({"target_scale": 15.0}, "target_scale belongs to the loss squared_error"),
        ({"loss": "squared_error", "target_scale": 0.0}, "target_scale must be a positive number"),
        ({"optimizer": "lion"}, "no optimizer 'lion'"),
        ({"schedule": "square"}, "no schedule 'square'"),
        ({"lr": -1.0}, "lr must be a finite number above 0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0"),
        ({"lr_decay": 0.0}, "lr_decay must be a finite number above 0"),
        ({"min_lr": -1e-3}, "min_lr must be a finite number of at least 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum belongs to sgd"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of at least 0"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0"),
        ({"batch_size": [8, 8, 8]}, "batch_size has 3 values for 2 tasks"),
        ({"batch_size": [8, 0]}, "batch_size must be a whole number from 1, not 0"),
        ({"training": {"lr": 0.1}}, r"training must be a curvlab\.training\.Training, not {'lr': 0.1}"),
        ({"learning_rate": 0.1}, "no training option 'learning_rate'"),
        ({"epochs": 1, "steps": 1}, "give either epochs or steps, not both"),
        ({"epochs": 0}, "epochs must be a whole number from 1, not 0"),
        ({"epochs": 1.5}, "epochs must be a whole number from 1, not 1.5"),
        ({"steps": [1, 2, 3]}, "steps has 3 values for 2 tasks"),
        ({"steps": "10"}, "steps must be a whole number from 1, not '10'"),
        ({"epochs": True}, "epochs must be a whole number from 1, not True"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, not 0"),
        ({"batch_size": 8.0}, "batch_size must be a whole number from 1, not 8.0"),
        ({"batch_size": None}, "batch_size must be a whole number from 1, not None"),
        ({"evaluate_every": 0}, "evaluate_every must be a whole number from 1, not 0"),
        ({"evaluate_every": 2.5}, "evaluate_every must be a whole number from 1, not 2.5"),
        ({"seed": -1}, "seed must be a whole number from 0, not -1"),
        ({"seed": 1.5}, "seed must be a whole number from 0, not 1.5"),
        ({"lr": "0.1"}, "lr must be a finite number above 0, not '0.1'"),
        ({"momentum": None}, "momentum must be at least 0 and below 1, not None"),
        ({"clip_norm": "1"}, "clip_norm must be a finite number above 0, not '1'"),
        ({"min_lr": None}, "min_lr must be a finite number of at least 0, not None"),
        (
            {"stream": blobs()},
            r"a stream must be a sequence of tasks, such as permuted\(dataset, .*not Dataset",
        ),
        ({"stream": permuted(blobs(), tasks=1)[0]}, "a stream must be a sequence of tasks, .*not Task"),
        (
            {"observe": lambda _: None},
            "observe must return a dictionary of plain values .it may be empty., not NoneT",
        ),
        ({"observe": 5}, "observe must be a function of the learner, not int"),
        ({"checkpoint": 5}, "5 is not a path of a file"),
        (
            {"model": network().to("meta")},
            "the parameter 0.weight of the model has no values: it is on the meta device",
        ),
        (
            {"model": nn.Sequential(nn.LazyLinear(6))},
            "the parameter 0.weight .* no shape yet: call the lazy model once",
        ),
        ({"evaluation": "train"}, "evaluation must be test or validation"),
        ({"evaluation": "validation"}, r"task 0 \(permuted 1\) has no validation samples: use validation=N for the"),
        ({"model": nn.Flatten()}, "the model has no trainable parameters"),
        ({"model": network().requires_grad_(False)}, "the model has no trainable parameters"),
        ({"model": nn.Linear(9, 6)}, "the model cannot take the samples: .*shapes"),
        (
            {"model": nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)))},
            r"of shape \(N, C\).*\(1, 2, 3\)",
        ),
        (
            {"batch_size": 59, "model": network(norm=True)},
            "task 0: batch normalisation needs more than one",
        ),
        ({"strategy": ER(11, buffer="ring")}, "11 samples is too small for the 12 classes of the tasks"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    given = {"stream": permuted(blobs(), tasks=2), "model": network(), "strategy": Naive()} | options
    with pytest.raises(CurvlabError, match=said) as raised:
        learn(**given)
    assert "\n" not in str(raised.value)


def test_weights_and_losses_that_are_not_finite_are_refused() -> None:
    model = network()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(CurvlabError, match=r"parameter 0\.weight holds NaN or infinite values at the start of the run"):
        learn(permuted(blobs(), tasks=2), model)
    with pytest.raises(CurvlabError, match=r"the training loss is \S+ at step \d+ of task 0: lower lr \(here 1e\+06\)"):
        learn(permuted(blobs(), tasks=2), network(), loss="squared_error", lr=1e6, steps=60)

    class Breaks(Strategy):
        def after_task(self, learner: Learner) -> None:
            learner.model[0].bias.data.fill_(torch.inf)

    with pytest.raises(
        CurvlabError, match=r"parameter 0\.bias holds NaN or infinite values after Breaks.after_task of"
    ):
        learn(permuted(blobs(), tasks=2), network(), Breaks())


@pytest.mark.parametrize("strategy", [Naive(), EWC(1.0), IMM("mode"), LwF()], ids=["naive", "ewc", "imm", "lwf"])
def test_a_last_step_that_diverges_is_noticed_before_the_method_consolidates(strategy: Strategy) -> None:
    """The loss of the last step, at the weights before it, is finite."""
    said = r"parameter 0\.weight holds NaN or infinite values after the last step of task 0: lower lr \(here 1e\+38\)"
    options = {"lr": 1e38, "steps": 1, "loss": "squared_error", "target_scale": 1e3}
    with pytest.raises(CurvlabError, match=said):
        learn(permuted(blobs(), tasks=2), network(), strategy, **options)


@pytest.mark.parametrize("hook", ["loss", "after_backward", "after_step"])
def test_the_model_is_not_blamed_for_the_faults_of_a_method(hook: str) -> None:
    def fails(*_: object) -> None:
        raise ValueError("the method's own")

    with pytest.raises((CurvlabError, ValueError), match="the method's own") as raised:
        learn(permuted(blobs(), tasks=2), network(), type("Broken", (Strategy,), {hook: fails})())
    assert "the model fails" not in str(raised.value)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        with pytest.raises(CurvlabError, match=r"a run needs gradients: call it outside of torch\.inference_mode"):
            learn(permuted(blobs(), tasks=2), network())
        model = network()
    with pytest.raises(CurvlabError, match=r"parameter 0\.weight .* was created in torch\.inference_mode"):
        learn(permuted(blobs(), tasks=2), model)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    options = {"lr": np.float32(0.5), "seed": np.int64(3), "batch_size": np.int32(8), "steps": 3}
    models = [network() for _ in range(3)]
    learn(permuted(blobs(), tasks=2), models[0], lr=0.5, seed=3, batch_size=8, steps=3)
    for model in models[1:]:
        learn(permuted(blobs(), tasks=2), model, checkpoint=tmp_path / "run.pt", **options)
        assert equal(values(model), values(models[0]))


@pytest.mark.parametrize(
    ("head", "classes", "said"),
    [
        ("masked", [range(5), [5]], r"task 1 \(class 5\) has a single active output .* use head='single' or"),
        (
            "multi",
            [range(5), [5]],
            r"task 1 \(class 5\) has a single active output .* head='growing', or use loss='squared_error'",
        ),
        (
            "growing",
            [[0], range(1, 6)],
            r"task 0 \(class 0\) has a single .*: start with a task of several classes, use",
        ),
    ],
)
def test_a_task_with_a_single_active_output_is_refused(head: Any, classes: Any, said: str) -> None:
    """Its cross-entropy is always zero, and its accuracy always 1."""
    stream = disjoint(blobs(), classes=classes)
    with pytest.raises(CurvlabError, match=said):
        learn(stream, network(), head=head)
    learn(stream, network(), head=head, loss="squared_error")
    learn(stream, network(), head="single")
    if head != "growing":
        learn(stream, network(), head="growing")


def test_samples_of_several_shapes_are_refused() -> None:
    x, y = torch.zeros(4, 9), torch.tensor([0, 1, 0, 1])
    other = Dataset("other", x, y, x, y, classes=("a", "b"))
    with pytest.raises(CurvlabError, match=r"the same shape, but those of task 1 \(second\) have \(9,\), not \(8,\)"):
        learn([Task("first", blobs()), Task("second", other)], network())


def test_labels_and_classes_that_do_not_fit_are_refused() -> None:
    data = blobs()
    with pytest.raises(CurvlabError, match="which is not in its classes"):
        Task("unseen", data, classes=(0, 1))
    with pytest.raises(CurvlabError, match="cannot be split equally into 7 tasks"):
        split_classes(data, tasks=7)


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    stream = permuted(blobs(), tasks=3)
    learn(stream, network(), ER(10), checkpoint=path)
    for options, said in (
        ({"stream": permuted(blobs(), tasks=3, seed=1)}, r"task 1 is permuted 2 \(.* there and permuted 2 \("),
        ({"stream": permuted(blobs(seed=1), tasks=3)}, "task 0 is permuted 1"),
        ({"stream": stream[:2]}, "task 2 is permuted 3 .* there and absent here"),
        ({"strategy": ER(11)}, r"strategy is ER\(buffer_size=10, .* there and ER\(buffer_size=11"),
        ({"strategy": Naive()}, r"strategy is ER\(.* there and Naive\(\) here"),
        ({"lr": 0.2}, "lr is 0.1 there and 0.2 here"),
        ({"epochs": 2}, r"epochs is \(1, 1, 1\) there and \(2, 2, 2\) here"),
        ({"batch_size": [8, 8, 9]}, r"batch_size is 8 there and \(8, 8, 9\) here"),
        ({"schedule": "exponential"}, "schedule is constant there and exponential here"),
        ({"steps": 8}, "epochs is .* there and absent here"),
        ({"head": "growing"}, "head is single there"),
        ({"model": network(norm=True)}, "belongs to another run"),
    ):
        given = {"stream": stream, "model": network(), "strategy": ER(10), "checkpoint": path} | options
        with pytest.raises(CurvlabError, match=said) as raised:
            learn(**given)
        assert len(str(raised.value)) < 800
    assert learn(stream, network(), ER(10), checkpoint=path, batch_size=[8, 8, 8]).resumed_at == 3
    for changed in (network(seed=4), network().requires_grad_(True)):
        if equal(values(changed), values(network())):
            changed[4].bias.data[1] += 1e-6
        with pytest.raises(CurvlabError, match=r"run\.pt started from other weights: pass the model with its initial"):
            learn(stream, changed, ER(10), checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CurvlabError, match="cannot be read"):
        learn(stream, network(), ER(10), checkpoint=path)
    with pytest.raises(CurvlabError, match="is a file, not a folder"):
        learn(stream, network(), checkpoint=path / "run.pt")


def test_a_checkpoint_describes_a_run_as_in_earlier_versions(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    learn(permuted(blobs(), tasks=2), network(), checkpoint=path, schedule="linear")
    described = torch.load(path)["fingerprint"]
    assert {name: value for name, value in described.items() if not name.startswith(("task", "parameter"))} == {
        "head": "single",
        "loss": "cross_entropy",
        "target_scale": 1.0,
        "optimizer": "sgd",
        "lr": 0.1,
        "lr_decay": 1.0,
        "min_lr": 0.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "linear",
        "clip_norm": None,
        "batch_size": 8,
        "seed": 0,
        "evaluation": "test",
        "evaluate_every": None,
        "epochs": (1, 1),
        "strategy": "Naive()",
    }


def test_a_checkpoint_began_at_a_point_of_linearization(tmp_path: Path) -> None:
    def linear(seed: int) -> nn.Module:
        model = linearize(network(seed=seed))
        for p, start in zip(model.parameters(), network().parameters(), strict=True):
            p.data.copy_(start)
        return model

    path, stream = tmp_path / "run.pt", permuted(blobs(), tasks=2)
    learn(stream, linear(1), checkpoint=path)
    assert learn(stream, linear(1), checkpoint=path).resumed_at == 2
    with pytest.raises(CurvlabError, match="started from other weights"):
        learn(stream, linear(2), checkpoint=path)


def test_types_that_a_checkpoint_cannot_store_are_refused(tmp_path: Path) -> None:
    class Holds(Strategy):
        def __init__(self, what: object) -> None:
            self.what = what

    for what in (object(), [1, {"a": np.float64(3)}], {1, 2}):
        learn(permuted(blobs(), tasks=2), network(), Holds(what))
        with pytest.raises(
            CurvlabError, match=r"what of Holds holds a value of type (object|float64|set), which a checkpoint cannot"
        ):
            learn(permuted(blobs(), tasks=2), network(), Holds(what), checkpoint=tmp_path / "run.pt")
    stream = permuted(blobs(), tasks=2)
    with pytest.raises(CurvlabError, match="mean of the record of a task holds a value of type float64"):
        learn(stream, network(), checkpoint=tmp_path / "run.pt", observe=lambda _: {"mean": np.float64(1)})
    assert not (tmp_path / "run.pt").exists()
    held = Holds([None, True, 1, 0.5, "a", (torch.ones(3), {"b": torch.ones(2).double()}), torch.float32])
    for _ in range(2):
        result = learn(permuted(blobs(), tasks=2), network(), held, checkpoint=tmp_path / "run.pt")
    assert result.resumed_at == 2
    assert result.tasks[-1]["bytes"] == 3 * 4 + 2 * 8


@pytest.mark.parametrize(
    "name", ["foo", "", "stable-drop", "stable+lr", "plastic-lr", "stableX", "stable-", "stable-rate"]
)
def test_unknown_regimes_are_refused(name: str) -> None:
    numbers = {"lr": 0.1, "decay": 0.5, "batch_size": 16, "dropout": 0.0}
    config = SimpleNamespace(**{f"{kind}_{key}": v for kind in ("stable", "plastic") for key, v in numbers.items()})
    assert Regime.of(config, "stable-lr") == Regime.of(config, "plastic+dropout") == Regime(**numbers)
    with pytest.raises(
        CurvlabError, match=r"is stable, plastic, stable-X or plastic.X, with X one of lr, decay, batch_size"
    ):
        Regime.of(config, name)


# What a strategy is given ---------------------------------------------------------------------------------------------


def test_the_learner_that_hooks_get() -> None:
    stream = two_by_two()
    seen: list[tuple[str, int, int, int]] = []

    class Listens(Strategy):
        def note(self, hook: str, learner: Learner) -> None:
            seen.append((hook, learner.task, learner.step, learner.epoch))
            assert learner.model.training

        def start(self, learner: Learner) -> None:
            seen.append(("start", learner.task, learner.step, learner.epoch))

        def before_task(self, learner: Learner) -> None:
            self.note("before_task", learner)
            assert all(p.grad is None for p in learner.model.parameters())
            samples = learner.samples()
            x, y = learner.stream[learner.task].train
            assert torch.equal(samples.x, x.double())
            assert torch.equal(samples.y, learner.outputs.map_labels(y, learner.task))
            assert len(learner.samples(limit=5).y) == 5
            assert torch.equal(learner.samples(0).x, stream[0].train[0].double())

        def loss(self, learner: Learner, batch: Batch) -> Tensor:
            self.note("loss", learner)
            assert batch.task == learner.task
            assert batch.tasks.tolist() == [learner.task] * len(batch.y)
            return super().loss(learner, batch)

        def after_backward(self, learner: Learner) -> None:
            self.note("after_backward", learner)

        def after_step(self, learner: Learner) -> None:
            self.note("after_step", learner)

        def after_task(self, learner: Learner) -> None:
            self.note("after_task", learner)
            with learner.problem() as problem:
                assert not any(module.training for module in learner.model.modules())
                outputs = learner.model(learner.samples().x)
                assert outputs.shape[1] == 2
                samples = learner.samples()
                total = torch.cat([problem.loss.values(learner.model(x), y) for x, y in problem.batches()]).mean()
            assert learner.model.training
            assert learner.model(samples.x).shape[1] == 6
            learner.model.eval()
            expected = learner.loss(learner.model(samples.x), samples.y, samples.task)
            torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)

    learn(stream, network(dropout=0.3).double(), Listens(), head="masked", steps=4, batch_size=8)
    per_step = ("loss", "after_backward", "after_step")
    expected = [("start", 0, 0)]
    for t, task in enumerate(stream):
        expected.append(("before_task", t, 0))
        expected += [(hook, t, step + (hook == "after_step")) for step in range(4) for hook in per_step]
        expected.append(("after_task", t, 4))
        per_epoch = -(-task.sizes["train"] // 8)
        assert all(epoch == step // per_epoch for _, on, step, epoch in seen if on == t and step)
    assert [entry[:3] for entry in seen] == expected


def test_outputs_of_all_heads() -> None:
    stream = two_by_two()
    y, tasks = torch.tensor([4, 1, 1]), torch.tensor([0, 2, 1])

    def rows(*columns: Iterable[int]) -> Tensor:
        return torch.tensor([[k in row for k in range(CLASSES)] for row in columns])

    single, growing, masked, multi = (
        Outputs(stream, head, CLASSES, torch.device("cpu")) for head in ("single", "growing", "masked", "multi")
    )
    for outputs in (single, growing, masked):
        assert outputs.map_labels(y, 0).tolist() == [4, 1, 1]
    assert multi.map_labels(y, 0).tolist() == [0, 1, 1]
    assert multi.map_labels(torch.tensor([3, 2]), 2).tolist() == [5, 4]
    assert single.active_mask(1, now=2) is single.active_mask(tasks, now=2) is growing.active_mask(0, now=2) is None
    assert torch.equal(growing.active_mask(2, now=1), rows((0, 1, 4, 5))[0])
    assert torch.equal(growing.active_mask(tasks, now=1), rows((0, 1, 4, 5))[0])
    assert torch.equal(growing.active_mask(tasks, now=None), rows((1, 4), range(6), (0, 1, 4, 5)))
    assert torch.equal(masked.active_mask(tasks, now=2), rows((1, 4), (2, 3), (0, 5)))
    assert torch.equal(multi.active_mask(tasks, now=2), rows((0, 1), (4, 5), (2, 3)))
    for outputs in (single, growing):
        assert torch.equal(outputs.past_masks(2), rows((0, 1, 4, 5)))
    assert {tuple(row) for row in masked.past_masks(2).tolist()} == {tuple(r) for r in rows((1, 4), (0, 5)).tolist()}
    assert len(single.past_masks(0)) == len(masked.past_masks(0)) == 0
    assert len(Outputs(permuted(blobs(), tasks=3), "masked", 6, torch.device("cpu")).past_masks(2)) == 1
    assert (single.classes, Outputs(permuted(blobs(), tasks=3), "single", 6, torch.device("cpu")).classes) == (6, 18)


@pytest.mark.parametrize("name", ["cross_entropy", "squared_error"])
def test_losses_of_mixed_tasks_are_means_over_their_samples(name: Any) -> None:
    outputs = torch.randn(5, CLASSES, dtype=torch.float64, requires_grad=True)
    y, active = torch.tensor([0, 1, 1, 4, 5]), torch.zeros(5, CLASSES, dtype=torch.bool)
    active[:3, :2] = active[3:, 3:] = True
    found = mean_loss(name, outputs, y, active, scale=2.0)
    parts = []
    for row, label, counts in zip(outputs, y, active, strict=True):
        columns = counts.nonzero()[:, 0].tolist()
        within = torch.tensor([columns.index(int(label))])
        if name == "cross_entropy":
            parts.append(F.cross_entropy(row[None, columns], within))
        else:
            parts.append((row[columns] - 2 * F.one_hot(within, len(columns))[0]).square().sum() / 2)
    torch.testing.assert_close(found, torch.stack(parts).mean(), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(found, outputs)
    assert torch.equal(gradient[~active], torch.zeros(5 * CLASSES - int(active.sum()), dtype=torch.float64))
    assert bool(gradient.isfinite().all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    for head in ("single", "growing"):
        models = [network(norm=True).double().to(device) for device in ("cuda", "cpu", "cuda")]
        results = [learn(two_by_two(), model, METHODS[name], head=head, epochs=2) for model in models[:2]]
        assert same(results[0].accuracy, results[1].accuracy)
        for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(left.cpu(), right, rtol=0, atol=1e-9)
    path = tmp_path / "run.pt"
    stopped = deepcopy(models[2])
    stop_at(stopped, 25)
    with pytest.raises(Stop):
        learn(two_by_two(), stopped, METHODS[name], head=head, epochs=2, checkpoint=path)
    result = learn(two_by_two(), models[2], METHODS[name], head=head, epochs=2, checkpoint=path)
    assert same(results[0].accuracy, result.accuracy)


@pytest.mark.parametrize("wrong", [None, nn.Linear, nn.Linear(2, 3).state_dict(), 3])
def test_other_types_than_models_are_refused(wrong: object) -> None:
    stream = permuted(load("digits"), tasks=2)
    with pytest.raises(CurvlabError, match=r"the model must be a torch.nn.Module, not"):
        run(stream, wrong, Naive(), steps=1)
