"""Inputs that were once silently wrong: labels of wrapped models, functions that mix terms, layouts of targets."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError
from curvlab.likelihoods import BinaryCrossEntropy, CrossEntropy, FromFunction, SquaredError


class Output(dict[str, Tensor]):
    """As the outputs of Hugging Face."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class NextToken(nn.Module):
    """A language model with a loss of its own, which shifts the labels by one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.tokens(input_ids).cumsum(dim=1))
        found = Output(logits=logits)
        if labels is not None:
            found["loss"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return found


class Wrapper(nn.Module):
    """A wrapper that passes keywords on, as PEFT's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **keywords: Tensor) -> Output:
        found: Output = self.model(**keywords)
        return found


def language() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(7, (3, 5))
    labels = ids.clone()
    labels[0, :2] = -100
    return NextToken().double(), {"input_ids": ids, "labels": labels}


def test_a_refusal_of_labels_lasts() -> None:
    model, batch = language()
    problem = Problem(model, CrossEntropy(label_smoothing=0.1), batch, unit="term")
    for _ in range(2):
        with pytest.raises(CurvlabError, match="computes from its labels"):
            problem.loss_value()
    with pytest.raises(CurvlabError, match="computes from its labels"):
        estimate(problem, "ggn", "diag")


def test_labels_of_a_wrapped_model_are_shifted_as_its_own_loss_does() -> None:
    model, batch = language()
    problem = Problem(Wrapper(model), "cross_entropy", batch, unit="term")
    assert problem.loss_value() == pytest.approx(model(**batch)["loss"].item(), rel=1e-12)
    assert problem.num_units == 11
    plain = estimate(Problem(model, "cross_entropy", batch, unit="term"), "ggn", "diag")
    torch.testing.assert_close(estimate(problem, "ggn", "diag").diagonal(), plain.diagonal())


class Keywords(nn.Module):
    """A model of any keywords without a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, *, x: Tensor, **other: Tensor) -> Tensor:
        assert not other
        output: Tensor = self.layer(x)
        return output


def test_a_model_of_any_keywords_without_a_loss() -> None:
    problem = Problem(Keywords(), "cross_entropy", {"x": torch.randn(4, 3), "labels": torch.tensor([0, 1, 0, 1])})
    assert estimate(problem, "fisher", "diag").shape == (8, 8)


def nll_of_pairs(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f @ f.T, torch.arange(len(f)), reduction="none") + 0 * y.sum()


@pytest.mark.parametrize(
    ("nll", "message"),
    [
        (lambda f, y: ((f - y) ** 2).sum(1), "among other terms"),
        (nll_of_pairs, "among other terms"),
        (lambda f, y: (f[:, 0] - f[:, 0].mean() - y) ** 2, "among other terms"),
        (lambda f, y: (f[:, 0] - y + torch.randn(len(f))) ** 2, "among other terms"),
        (lambda f, y: (f.detach()[:, 0] - y) ** 2, "does not depend on the outputs"),
        (lambda f, y: torch.from_numpy((f.detach().numpy()[:, 0] - y.numpy()) ** 2), "does not depend on the outputs"),
        (lambda f, y: f.sub_(y[:, None]).pow(2).sum(1), "writes into its arguments"),
    ],
    ids=["broadcast", "contrastive", "centred", "random", "detached", "numpy", "in place"],
)
@pytest.mark.parametrize("samples", [1, 6])
def test_a_function_of_the_user_that_is_no_sum_over_terms(nll: object, message: str, samples: int) -> None:
    torch.manual_seed(0)
    data = torch.randn(samples, 3).double(), torch.randn(samples).double()
    problem = Problem(nn.Linear(3, 1).double(), FromFunction(nll), data)  # type: ignore[arg-type]
    for compute in (problem.loss_value, lambda: estimate(problem, "empirical_fisher", "diag")):
        with pytest.raises(CurvlabError, match=message):
            compute()


@pytest.mark.parametrize("sizes", [(5, 5), (3, 5), (1, 5), (4, 4, 4), (2, 4, 3)])
@pytest.mark.parametrize("loss", [SquaredError(), BinaryCrossEntropy(), nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=str)
def test_targets_of_the_shape_of_the_outputs_have_their_layout(loss: object, sizes: tuple[int, ...]) -> None:
    """Moving the classes to the last dimension, in outputs and targets, changes nothing."""
    torch.manual_seed(0)
    model = (nn.Conv1d if len(sizes) == 2 else nn.Conv2d)(2, sizes[0], 3, padding=1).double()
    x, y = torch.randn(3, 2, *sizes[1:]).double(), torch.rand(3, *sizes).double()
    moved = Problem(model, loss, (x, y), class_dim=1)  # type: ignore[arg-type]
    plain = Problem(nn.Sequential(model, Last()), loss, (x, y.movedim(1, -1)))  # type: ignore[arg-type]
    assert moved.loss_value() == pytest.approx(plain.loss_value(), rel=1e-12)
    for quantity in ("empirical_fisher", "ggn"):
        expected = estimate(plain, quantity, "diag").diagonal()
        torch.testing.assert_close(estimate(moved, quantity, "diag").diagonal(), expected)


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


def test_soft_targets_with_classes_in_the_second_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(2, 5, 3, padding=1).double()
    x, y = torch.randn(3, 2, 4).double(), torch.rand(3, 5, 4).double().softmax(dim=1)
    problem = Problem(model, nn.CrossEntropyLoss(), (x, y), class_dim=1, unit="term")
    assert problem.loss_value() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)


class Norm(nn.Module):
    """A network whose norms are in a dtype of their own, as those of most language models are in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            given = x.to(self.dtype)
            x = x + layer((given * given.square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)).tanh()
        return self.head(x)


@pytest.mark.parametrize("structure", ["dense", "diag", "block_diag", "implicit"])
def test_the_hessian_of_a_model_that_rounds_inside(structure: str) -> None:
    x, y = torch.randn(5, 16).double(), torch.arange(5) % 3
    found, exact = (
        estimate(Problem(Norm(dtype), "cross_entropy", (x, y)), "hessian", structure)
        for dtype in (torch.float32, torch.float64)
    )
    vectors = torch.randn(found.shape[0], 3).double()
    assert torch.allclose(found @ vectors, exact @ vectors, rtol=1e-3, atol=1e-5)
