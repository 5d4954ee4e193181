"""Joint training, linear probing, distillation and replay: against plain implementations of their definitions."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from test_continual_loop import CLASSES, blobs, equal, learn, network, order, two_by_two, values
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import linearize
from curvlab.continual import Strategy, Task, permuted, split_classes, split_data
from curvlab.continual.learner import Batch, Learner
from curvlab.continual.strategies import AGEM, DER, ER, Joint, LinearProbe, LwF, Naive, Oracle
from curvlab.continual.strategies import oracle as oracle_module
from curvlab.continual.strategies.agem import project_
from curvlab.data import load
from curvlab.errors import CurvlabError
from curvlab.models import build
from curvlab.training.state import derive_seed


def listening(strategy: Strategy, note: Callable[[Any, Learner, Batch], None]) -> Strategy:
    """Return the strategy, which calls ``note`` before each loss."""

    class Listens(type(strategy)):  # type: ignore[misc]
        def loss(self, learner: Learner, batch: Batch) -> Tensor:
            note(self, learner, batch)
            return super().loss(learner, batch)

    copied = deepcopy(strategy)
    copied.__class__ = Listens
    return copied


# What is naive fine-tuning in disguise --------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["single", "masked", "growing", "multi"])
@pytest.mark.parametrize(
    "strategy", [LwF(0.0), DER(10, alpha=0.0), DER(10, alpha=0.0, beta=0.0)], ids=["lwf", "der", "der++"]
)
def test_without_weight_it_is_naive_to_the_bit(strategy: Strategy, head: Any) -> None:
    models = [network(dropout=0.4, norm=True) for _ in range(2)]
    for model, method in zip(models, (strategy, Naive()), strict=True):
        learn(two_by_two(), model, method, head=head, epochs=2)
    assert equal(values(models[0]), values(models[1]))


def test_joint_training_of_one_task_is_naive_to_the_bit() -> None:
    models = [network(dropout=0.4) for _ in range(2)]
    for model, method in zip(models, (Joint(), Naive()), strict=True):
        learn(permuted(blobs(), tasks=1), model, method, epochs=2)
    assert equal(values(models[0]), values(models[1]))


# The oracle -----------------------------------------------------------------------------------------------------------


def test_the_oracle_of_one_task_is_naive_to_the_bit() -> None:
    models = [network(dropout=0.4) for _ in range(2)]
    for model, method in zip(models, (Oracle(), Naive()), strict=True):
        learn(permuted(blobs(), tasks=1), model, method, epochs=2)
    assert equal(values(models[0]), values(models[1]))


@pytest.mark.parametrize("head", ["masked", "growing"])
def test_the_oracle_takes_the_mean_loss_of_a_batch_of_each_task(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, drawn, losses = two_by_two(), [], []
    draw = oracle_module._draw

    def note(learner: Learner, task: int) -> Batch:
        drawn.append(draw(learner, task))
        return drawn[-1]

    monkeypatch.setattr(oracle_module, "_draw", note)

    class Checked(Oracle):
        def loss(self, learner: Learner, batch: Batch) -> Tensor:
            drawn.clear()
            loss = super().loss(learner, batch)
            batches = [batch, *drawn]
            assert [one.task for one in batches] == [learner.task, *range(learner.task)]
            assert all(len(one.x) == learner.batch_size for one in drawn)
            for one in drawn:  # they are samples of that task
                own = learner.batch(*stream[one.task].train, one.task)
                assert all((own.x == x).flatten(1).all(1).any() for x in one.x)
            expected = sum(learner.loss(learner.model(one.x), one.y, one.task) for one in batches) / len(batches)
            losses.append((loss.item(), expected.item()))
            return loss

    learn(stream, network(), Checked(), head=head, epochs=1)
    assert losses
    for loss, expected in losses:
        assert loss == pytest.approx(expected, rel=1e-6)


# Linear probing -------------------------------------------------------------------------------------------------------


def test_linear_probing_is_training_of_a_linear_model_on_features() -> None:
    stream = permuted(blobs(), tasks=3)
    model = network(dropout=0.4, norm=True).double()
    features, head = deepcopy(model[:-1]).eval(), deepcopy(model[-1])
    learn(stream, model, LinearProbe(), epochs=2, evaluate_every=4)
    for t, task in enumerate(stream):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        x, y = task.train[0].double(), task.train[1]
        for epoch in range(2):
            for index in order(0, t, epoch, len(x)).split(8):
                optimizer.zero_grad()
                with torch.no_grad():
                    inputs = features(x[index])
                F.cross_entropy(head(inputs), y[index]).backward()
                optimizer.step()
    assert torch.equal(model[-1].weight, head.weight)
    assert equal(values(model[:-1]), values(features))


class HeadFirst(nn.Module):
    """The order of registration does not determine the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.aside = nn.Linear(7, CLASSES), network()[:-1], nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        self.aside(features)
        outputs: Tensor = self.head(features)
        return outputs


class Twice(nn.Module):
    """The output of the last layer is also used earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(self.layer(x))
        return outputs


@pytest.mark.parametrize("linear", [False, True])
def test_the_layer_that_is_probed_is_that_of_the_outputs(linear: bool) -> None:
    model: nn.Module = linearize(HeadFirst()) if linear else HeadFirst()
    before = values(model)
    learn(permuted(blobs(), tasks=2), model, LinearProbe())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_linear_probing_needs_a_last_linear_layer() -> None:
    stream = permuted(blobs(), tasks=2)
    convolution = nn.Sequential(nn.Linear(8, 7), nn.Unflatten(1, (7, 1)), nn.Conv1d(7, 6, 1), nn.Flatten())
    for model in (convolution, nn.Sequential(network(), nn.Sigmoid()), Twice()):
        with pytest.raises(CurvlabError, match=r"must be the outputs of an nn\.Linear, but those of (Seq|Twice)"):
            learn(stream, model, LinearProbe())
    frozen = network()
    frozen[-1].requires_grad_(False)
    with pytest.raises(CurvlabError, match="LinearProbe freezes all parameters"):
        learn(stream, frozen, LinearProbe())


# Learning without forgetting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("head", ["single", "masked", "growing", "multi"])
def test_lwf_is_distillation_written_out(head: Any, loss: Any) -> None:
    strength, temperature = 0.7, 3.0
    stream = two_by_two()
    groups: list[list[int]] = [[0, 1], [2, 3], [4, 5]] if head == "multi" else [list(t.classes or ()) for t in stream]
    model, plain = (network(dropout=0.3, norm=True).double() for _ in range(2))
    learn(stream, model, LwF(strength, temperature=temperature), head=head, loss=loss, lr=0.05)
    for t, task in enumerate(stream):
        torch.manual_seed(derive_seed(0, t, 1))
        old = deepcopy(plain).eval()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
        if head in ("masked", "multi"):
            here, distilled = groups[t], groups[:t]
        else:
            so_far = [k for group in groups[: t + 1] for k in group]
            here = sorted(so_far) if head == "growing" else list(range(CLASSES))
            distilled = [[k for group in groups[:t] for k in group]] if t else []
        x, labels = task.train[0].double(), task.train[1].tolist()
        outputs_of = {label: groups[t][(task.classes or ()).index(label)] for label in set(labels)}
        y = torch.tensor([here.index(outputs_of[label]) for label in labels])
        plain.train()
        for index in order(0, t, 0, len(x)).split(8):
            optimizer.zero_grad()
            z, z_old = plain(x[index]), old(x[index]).detach()
            if loss == "cross_entropy":
                value = F.cross_entropy(z[:, here], y[index])
                for columns in distilled:
                    p = F.softmax(z_old[:, columns] / temperature, dim=1)
                    log_q = F.log_softmax(z[:, columns] / temperature, dim=1)
                    value = value - strength * (p * log_q).sum(1).mean()
            else:
                value = (z[:, here] - F.one_hot(y[index], len(here))).square().sum(1).mean() / 2
                for columns in distilled:
                    value = value + strength * (z[:, columns] - z_old[:, columns]).square().sum(1).mean() / 2
            value.backward()
            optimizer.step()
    for left, right in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_lwf_distils_equal_outputs_once_and_nothing_at_first() -> None:
    """With a masked head that is the same for all tasks, the result equals that of a single head."""
    models = [network() for _ in range(2)]
    results = [
        learn(split_data(blobs(), tasks=3), model, LwF(1.0), head=head)
        for model, head in zip(models, ("masked", "single"), strict=True)
    ]
    assert equal(values(models[0]), values(models[1]))
    sizes = sum(p.numel() for p in models[0].parameters())
    assert [record["bytes"] for record in results[0].tasks] == [4 * sizes] * 3


# Replay ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["single", "masked", "growing", "multi"])
@pytest.mark.parametrize("buffer", ["reservoir", "ring"])
def test_er_is_the_mean_loss_of_both_batches(buffer: Any, head: Any) -> None:
    """The loss of a step is recomputed from the memory with the same draw."""
    stream = two_by_two()
    whole = {(t, tuple(x.tolist())) for t, task in enumerate(stream) for x in task.train[0].double()}
    checked = 0

    def note(self: Any, learner: Learner, batch: Batch) -> None:
        nonlocal checked
        copied, model = deepcopy(self), deepcopy(learner.model)
        generator = torch.Generator()
        generator.set_state(learner.generator.get_state())
        drawn = copied.memory.draw(5, generator)
        parts = [(batch.x, batch.y, batch.tasks)]
        if drawn:
            parts.append((drawn["x"], drawn["y"], drawn["task"]))
            assert len(drawn["y"]) == min(5, len(copied.memory))
            for x, task in zip(drawn["x"], drawn["task"].tolist(), strict=True):
                assert (task, tuple(x.tolist())) in whole
        losses = []
        for x, y, tasks in parts:
            for i in range(len(y)):
                active = learner.outputs.active_mask(int(tasks[i]), learner.task)
                columns = torch.arange(6) if active is None else active.nonzero()[:, 0]
                label = (columns == y[i]).nonzero()[:, 0]
                losses.append(F.cross_entropy(model(x[i : i + 1])[:, columns], label))
        before = learner.generator.get_state()
        found = ER.loss(copied, learner, batch)
        learner.generator.set_state(before)
        torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=0, atol=1e-10)
        checked += len(parts)

    learn(stream, network().double(), listening(ER(13, batch_size=5, buffer=buffer), note), head=head)
    assert checked > 10


@pytest.mark.parametrize("epochs", [1, 3])
def test_er_offers_each_sample_once(epochs: int) -> None:
    memories = []

    class Keeps(ER):
        def after_task(self, learner: Learner) -> None:
            memories.append((self.memory.seen, len({tuple(x.tolist()) for x in self.memory.rows["x"]})))  # type: ignore

    learn(permuted(blobs(), tasks=2), network(), Keeps(1000), epochs=epochs)
    assert [seen for seen, _ in memories] == [60, 120]
    assert memories[1][1] == 121  # and the empty places

    memories.clear()
    learn(permuted(blobs(), tasks=2), network(), Keeps(1000), steps=[3, 20])
    assert [seen for seen, _ in memories] == [24, 84]


def test_the_ring_of_er_is_shared_out_equally() -> None:
    held: dict[int, int] = {}

    class Keeps(ER):
        def after_task(self, learner: Learner) -> None:
            held[learner.task] = len(self.memory)

    stream = split_classes(load("digits"), tasks=5)
    learn(stream, build("mlp", (1, 8, 8), 10), Keeps(35, buffer="ring"), head="masked")
    assert held == {0: 6, 1: 12, 2: 18, 3: 24, 4: 30}  # 3 of 10 classes


@pytest.mark.parametrize("head", ["single", "masked", "growing", "multi"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_der_is_its_definition(alpha: float, beta: float, head: Any) -> None:
    """The loss of a step is recomputed; the stored outputs are those of the step in which a sample was added."""
    outputs_then: dict[tuple[int, tuple[float, ...]], list[Tensor]] = {}
    checked = 0

    def columns_of(learner: Learner, task: int, now: int) -> Tensor:
        active = learner.outputs.active_mask(task, now)
        return torch.arange(6) if active is None else active.nonzero()[:, 0]

    def note(self: Any, learner: Learner, batch: Batch) -> None:
        nonlocal checked
        copied, model = deepcopy(self), deepcopy(learner.model)
        generator = torch.Generator()
        generator.set_state(learner.generator.get_state())
        columns = columns_of(learner, learner.task, learner.task)
        labels = (columns == batch.y[:, None]).nonzero()[:, 1]
        outputs = model(batch.x)
        expected = F.cross_entropy(outputs[:, columns], labels)
        count = len(copied.memory)
        if alpha and count:
            drawn = copied.memory.draw(5, generator)
            distances = []
            for x, task, then in zip(drawn["x"], drawn["task"].tolist(), drawn["outputs"], strict=True):
                assert any(torch.equal(then, past) for past in outputs_then[task, tuple(x.tolist())])
                compared = columns_of(learner, task, task)
                distances.append((model(x[None])[0] - then)[compared].square().mean())
            expected = expected + alpha * torch.stack(distances).mean()
        if beta and count:
            drawn = copied.memory.draw(5, generator)
            losses = []
            for x, y, task in zip(drawn["x"], drawn["y"], drawn["task"].tolist(), strict=True):
                columns = columns_of(learner, task, learner.task)
                losses.append(F.cross_entropy(model(x[None])[:, columns], (columns == y).nonzero()[:, 0]))
            expected = expected + beta * torch.stack(losses).mean()
        before = learner.generator.get_state()
        found = DER.loss(copied, learner, batch)
        learner.generator.set_state(before)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        for x, z in zip(batch.x, outputs.detach(), strict=True):
            outputs_then.setdefault((learner.task, tuple(x.tolist())), []).append(z)
        checked += bool(count)

    strategy = listening(DER(13, alpha=alpha, beta=beta, batch_size=5), note)
    learn(two_by_two(), network().double(), strategy, head=head, epochs=2)
    assert checked > 10


# A-GEM ----------------------------------------------------------------------------------------------------------------


def test_a_projected_gradient_does_not_point_against_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)

    def parts() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 1, 3))]

    def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))

    against = 0
    for _ in range(50):
        gradient, reference = parts(), parts()
        before = [part.clone() for part in gradient]
        project_(gradient, reference)
        if dot(before, reference) >= 0:
            assert all(map(torch.equal, gradient, before))
            continue
        against += 1
        assert dot(gradient, reference) == pytest.approx(0, abs=1e-10)
        # The projection: the change is along the reference.
        change = [b - g for b, g in zip(before, gradient, strict=True)]
        share = dot(before, reference) / dot(reference, reference)
        for part, of_reference in zip(change, reference, strict=True):
            torch.testing.assert_close(part, share * of_reference, rtol=0, atol=1e-12)
    assert 10 < against < 40
    nothing = [torch.zeros(3, 4), torch.zeros(5), torch.zeros(2, 1, 3)]
    gradient = [part.float() for part in parts()]
    before = [part.clone() for part in gradient]
    project_(gradient, nothing)
    assert all(map(torch.equal, gradient, before))


@pytest.mark.parametrize("head", ["single", "masked", "growing", "multi"])
def test_steps_of_agem_do_not_raise_the_loss_of_past_samples(head: Any) -> None:
    products, plain_products, drawn_from = [], [], set()

    class Listens(AGEM):
        def after_backward(self, learner: Learner) -> None:
            past = self.memory.draw(1000, torch.Generator(), before=learner.task)
            plain = [p.grad.clone() for p in learner.parameters.values()]
            super().after_backward(learner)
            if not past:
                assert learner.task == 0
                assert all(torch.equal(p.grad, g) for p, g in zip(learner.parameters.values(), plain, strict=True))
                return
            drawn_from.update((learner.task, task) for task in past["task"].tolist())
            loss = learner.loss(learner.model(past["x"]), past["y"], past["task"])
            reference = torch.autograd.grad(loss, list(learner.parameters.values()))
            for kind, parts in ((products, [p.grad for p in learner.parameters.values()]), (plain_products, plain)):
                kind.append(float(sum((g * r).sum() for g, r in zip(parts, reference, strict=True))))

    learn(two_by_two(), network().double(), Listens(4, batch_size=1000), head=head, epochs=3)
    assert min(products) >= -1e-10
    assert drawn_from == {(1, 0), (2, 0), (2, 1)}
    assert min(plain_products) < -1e-3


def test_agem_leaves_parameters_alone_that_have_no_gradient() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = network(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    before = values(model.unused)
    learn(permuted(blobs(), tasks=2), model, AGEM(3), weight_decay=0.1)
    assert equal(values(model.unused), before)


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [Joint(), LwF(1.0), ER(200), ER(200, buffer="ring"), DER(200, alpha=0.5), DER(200, alpha=0.5, beta=0.5), AGEM(5)],
    ids=["joint", "lwf", "er", "er ring", "der", "der++", "a-gem"],
)
def test_they_forget_less_than_naive_fine_tuning(strategy: Strategy) -> None:
    assert on_digits(strategy) > naive_on_digits() + 0.03


def on_digits(strategy: Strategy) -> float:
    """Return the mean accuracy after three permutations of some of the digits."""
    stream: tuple[Task, ...] = permuted(load("digits"), tasks=3, samples=600)
    model = build("mlp", (1, 8, 8), 10, hidden=(64,))
    return float(learn(stream, model, strategy, epochs=4, batch_size=10, lr=0.1).accuracy[-1].mean())


@cache
def naive_on_digits() -> float:
    return on_digits(Naive())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LwF(-1.0), "strength must be a number of at least 0, not -1"),
        (lambda: LwF(temperature=0.0), "temperature must be a positive number, not 0"),
        (lambda: LwF(temperature="2"), "temperature must be a positive number, not '2'"),  # type: ignore[arg-type]
        (lambda: ER(0), "buffer_size must be a whole number from 1, not 0"),
        (lambda: ER(2.5), r"buffer_size must be a whole number from 1, not 2\.5"),  # type: ignore[arg-type]
        (lambda: ER(True), "buffer_size must be a whole number from 1, not True"),
        (lambda: ER(None), "buffer_size must be a whole number from 1, not None"),  # type: ignore[arg-type]
        (lambda: ER(5, batch_size=0), "batch_size must be a whole number from 1, not 0"),
        (lambda: ER(5, buffer="heap"), "buffer must be reservoir or ring, not 'heap'"),  # type: ignore[arg-type]
        (lambda: DER(0, alpha=0.1), "buffer_size must be a whole number from 1"),
        (lambda: DER(5, alpha=-0.1), "alpha must be a number of at least 0"),
        (lambda: DER(5, alpha=0.1, beta=float("nan")), "beta must be a number of at least 0"),
        (lambda: DER(5, alpha=0.1, batch_size=0), "batch_size must be a whole number from 1"),
        (lambda: AGEM(0), "per_class must be a whole number from 1"),
        (lambda: AGEM(batch_size=0), "batch_size must be a whole number from 1"),
    ],
)
def test_refusals(make: Callable[[], Strategy], said: str) -> None:
    with pytest.raises(CurvlabError, match=said):
        make()
