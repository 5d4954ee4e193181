"""What the documentation says about Avalanche, against the package (the extra ``bench``)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from curvlab.continual import metrics
from curvlab.quantities import MaSQ

pytest.importorskip("avalanche")
pytestmark = pytest.mark.filterwarnings("ignore")


OWN_STRATEGY = Path(__file__).parents[1] / "docs" / "how-to" / "own-strategy.md"


def train(plugin: Any, tasks: int = 1) -> Any:
    """Return Avalanche's strategy after tasks that share a model: on the CPU, without shuffling."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    torch.manual_seed(0)
    experiences = []
    for _ in range(tasks):
        data = TensorDataset(torch.randn(48, 5), torch.randint(3, (48,)))
        data.targets = data.tensors[1].tolist()
        experiences.append(as_classification_dataset(data))
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=2,
        plugins=[plugin],
        evaluator=EvaluationPlugin(),
    )
    for experience in benchmark_from_datasets(train=experiences, test=experiences).train_stream:
        strategy.train(experience, shuffle=False)
    return strategy


class TestSynapticIntelligence:
    """The importances are 0 on the CPU, and the path integral has the gradient of the penalty in it."""

    def trained(self) -> tuple[Any, Any]:
        from avalanche.training.plugins import SynapticIntelligencePlugin

        plugin = SynapticIntelligencePlugin(si_lambda=1.0)
        return train(plugin), plugin

    def test_importances_are_zero_on_the_cpu(self) -> None:
        strategy, plugin = self.trained()
        assert {float(kept.data.abs().max()) for kept in plugin.ewc_data[1].values()} == {0.0}
        assert all(float(p.grad.abs().max()) > 0 for p in strategy.model.parameters())  # it did learn

    def test_path_integral_has_the_gradient_of_the_penalty(self) -> None:
        strategy, plugin = self.trained()
        model = strategy.model
        for kept in plugin.ewc_data[1].values():  # as they would be if they were not 0
            kept.data = torch.ones_like(kept.data)
        x, y = torch.randn(16, 5), torch.randint(3, (16,))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1

        def gradient(loss: Tensor) -> Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

        strategy.optimizer.zero_grad()
        strategy.loss = F.cross_entropy(model(x), y)
        plain = gradient(F.cross_entropy(model(x), y))
        plugin.before_backward(strategy)
        strategy.loss.backward()
        plugin.extract_grad(model, plugin.syn_data["grad"], set())
        kept = torch.cat([plugin.syn_data["grad"][name].data for name, _ in model.named_parameters()])
        assert torch.allclose(kept - plain, torch.full_like(plain, 0.1), atol=1e-6)  # 1/2 · 2 · 0.1


def test_plugin_of_the_docs_with_masq_is_their_ewc() -> None:
    """Their penalty has no factor 1/2: the same weights with twice the strength."""
    from avalanche.training.plugins import EWCPlugin

    code = re.search(r"```python\n(from avalanche.*?)```", OWN_STRATEGY.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    plugins = {
        "theirs": EWCPlugin(ewc_lambda=1.0),
        "ours": names["CurvaturePlugin"](2.0, MaSQ(16, norm="mean"), "diag"),
        "ours, too weak": names["CurvaturePlugin"](1.0, MaSQ(16, norm="mean"), "diag"),
    }
    weights = {
        name: torch.cat([p.detach().flatten() for p in train(plugin, tasks=3).model.parameters()])
        for name, plugin in plugins.items()
    }
    assert torch.allclose(weights["ours"], weights["theirs"], atol=1e-6)
    assert not torch.allclose(weights["ours, too weak"], weights["theirs"], atol=1e-6)


def test_forgetting_is_the_negative_backward_transfer() -> None:
    """Accuracies 0.6, 0.9, 0.5 of a task: 0.1, where the definition with the best accuracy so far gives 0.4."""
    from avalanche.evaluation.metrics import BWT, Forgetting

    forgetting, transfer = Forgetting(), BWT()
    for metric in (forgetting, transfer):
        metric.update("task", 0.6, initial=True)
        for accuracy in (0.9, 0.5):
            metric.update("task", accuracy)
    accuracy = torch.tensor([[0.6, 0.0, 0.0], [0.9, 0.5, 0.0], [0.5, 0.5, 0.5]]).double()
    ours = metrics.forgetting_per_task(accuracy)[0]
    assert forgetting.result_key("task") == pytest.approx(0.1)
    assert transfer.result_key("task") == pytest.approx(-0.1)
    assert float(ours) == pytest.approx(0.4)
