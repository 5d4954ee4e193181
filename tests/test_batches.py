"""Batches of any nesting: each form gives the same matrix as tensors, on the models of Hugging Face as they are."""

from collections import UserDict
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curvlab import Problem, as_module, diagonality, doctor, estimate, top_eigenvalues
from curvlab.batches import make_batch
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.likelihoods import CrossEntropy

N, C = 7, 3
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Z, Y = numbers(N, 4), numbers(N, 2, seed=1), torch.arange(N) % C


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Linear(4, 3), nn.Linear(2, 3), nn.Linear(3, C)
        self.double()

    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        return self.out((self.one(x) + scale * self.two(z)).tanh())


class OneArgument(TwoInputs):
    def forward(self, batch: Any) -> Any:  # type: ignore[override]
        if isinstance(batch, (tuple, list)):
            return super().forward(*batch)
        if isinstance(batch, (Inputs, Named)):
            return super().forward(batch.x, batch.z)
        return SimpleNamespace(logits=super().forward(batch["x"], batch["z"]))


@dataclass
class Inputs:
    x: Tensor
    z: Tensor
    name: str = "a constant"


class Named(NamedTuple):
    x: Tensor
    z: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """As the batches of tokenizers: a mapping with attributes."""

    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]  # type: ignore[no-any-return]


FORMS = {
    "tuple": lambda x, z: (x, z),
    "list": lambda x, z: [x, z],
    "dict": lambda x, z: {"x": x, "z": z},
    "dict with a constant": lambda x, z: {"x": x, "z": z, "scale": 1.0},
    "arrays": lambda x, z: {"x": x.numpy(), "z": z.numpy()},
    "dataclass": Inputs,
    "named tuple": Named,
    "mapping": lambda x, z: Encoding(x=x, z=z),
}


@cache
def reference() -> Tensor:
    problem = Problem(TwoInputs(), "cross_entropy", ((X, Z), Y), forward=lambda m, b: m(*b[0]))
    return estimate(problem, "fisher", "dense", backend="torch").to_dense()


@pytest.mark.parametrize("model", [TwoInputs, OneArgument])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, model: type[TwoInputs]) -> None:
    if model is TwoInputs and form == "dataclass":
        pytest.skip("a dataclass is one argument")
    make = FORMS[form]
    split = [(make(X[:3], Z[:3]), Y[:3]), (make(X[3:], Z[3:]), Y[3:])]
    for data in ((make(X, Z), Y), split):
        problem = Problem(model(), "cross_entropy", data)
        for structure in ("dense", "block_diag", "kfac"):
            for backend in ("hooks", "torch"):
                found = estimate(problem, "fisher", structure, backend=backend)
                if structure == "dense":
                    assert torch.allclose(found.to_dense(), reference(), **EXACT)
        vectors = numbers(problem.space.total, 2, seed=3)
        assert torch.allclose(estimate(problem, "fisher", "implicit") @ vectors, reference() @ vectors, **EXACT)
        assert torch.allclose(
            estimate(problem, "fisher", "diag", batch_size=2).diagonal(), reference().diagonal(), **EXACT
        )


def test_labels_in_a_mapping() -> None:
    samples = [{"x": X[i], "z": Z[i], "labels": Y[i]} for i in range(N)]
    for data in ({"x": X, "z": Z, "labels": Y}, DataLoader(samples, batch_size=3), Encoding(x=X, z=Z, labels=Y)):  # type: ignore[arg-type]
        found = estimate(Problem(TwoInputs(), "cross_entropy", data), "fisher", "dense")
        assert torch.allclose(found.to_dense(), reference(), **EXACT)


def test_functions_of_the_user() -> None:
    problem = Problem(
        TwoInputs(),
        "cross_entropy",
        DataLoader([(X[i], Z[i], Y[i]) for i in range(N)], batch_size=4),  # type: ignore[arg-type]
        forward=lambda model, batch: model(batch[0], batch[1]),
        targets=lambda batch: batch[2],
    )
    assert torch.allclose(estimate(problem, "fisher", "dense").to_dense(), reference(), **EXACT)
    top = top_eigenvalues(estimate(problem, "fisher", "implicit"), tol=1e-8)
    assert float(top.values) == pytest.approx(float(torch.linalg.eigvalsh(reference())[-1]), rel=1e-6)
    table = diagonality(problem, "fisher")
    assert table.diag_sum.sum() == pytest.approx(float(reference().trace()), rel=1e-8)
    assert "TwoInputs" in str(doctor(problem))


@pytest.mark.parametrize(
    ("forward", "targets", "told"),
    [
        (lambda m, b: m(b[0]), lambda b: b[2], "TwoInputs raises an error on the first samples.*missing.*'z'"),
        (lambda m, b: m(b[0], b[1]), lambda b: b[9], r"targets\(batch\) raises an error on batch 0: IndexError"),
        (lambda m, b: m(b[0], b[1])[:1], lambda b: b[2], r"it returned \(1, 3\): give forward=lambda"),
        (lambda m, b: (m(b[0], b[1]),), lambda b: b[2], r"forward\(model, batch\) of TwoInputs must return one tensor"),
        (lambda m, b: m(b[0], b[1]), lambda b: b[2][:2], "batch 0 has 7 inputs but 2 targets"),
        (lambda m, b: m(b[0], b[1]), lambda b: object(), "targets of batch 0 are a object, from which no tensor"),
        (lambda m, b: m(b[0], b[1]).detach(), lambda b: b[2], "do not depend on its trainable parameters"),
        (lambda m, b: m(b[0], b[1] - b[1].mean(0)), lambda b: b[2], "random or depends on the other samples"),
    ],
)
def test_functions_that_are_wrong_are_refused(forward: Any, targets: Any, told: str) -> None:
    with pytest.raises(CurvlabError, match=told) as caught:
        Problem(TwoInputs(), "cross_entropy", [(X, Z, Y)], forward=forward, targets=targets).check()
    assert "\n" not in str(caught.value)


def test_a_batch_keeps_its_form() -> None:
    value = {"a": (X, [Z, 3, None]), "b": Named(X, Z), "c": Encoding(y=Y)}
    batch = make_batch(value, "batch 0")
    assert batch.names == ("['a'][0]", "['a'][1][0]", "['b'][0]", "['b'][1]", "['c']['y']")
    part = batch[2:5].value
    assert isinstance(part["b"], Named)
    assert isinstance(part["c"], Encoding)
    assert part["a"][1][1:] == [3, None]
    assert torch.equal(part["c"].y, Y[2:5])
    assert torch.equal(torch.cat([b.value["a"][0] for b in batch.split(3)]), X)


# Models of Hugging Face ----------------------------------------------------------------------------------------------


def hugging_face(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a small random model and a batch of its tokenizer's form, with padding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 12, "max_position_embeddings": 16}
    tokens = torch.randint(1, 11, (4, 6))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = mask[3, 2:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if kind == "bert":
        config = transformers.BertConfig(**sizes, **more, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
        batch["labels"] = torch.tensor([0, 2, 1, 1])
    elif kind == "tagger":
        config = transformers.BertConfig(**sizes, **more, num_labels=3)
        model = transformers.BertForTokenClassification(config)
        batch["labels"] = torch.where(mask == 1, tokens % 3, -100)
    else:
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
        batch["labels"] = torch.where(mask == 1, tokens, -100)
    return model.double().eval(), batch


@pytest.mark.parametrize("kind", ["bert", "tagger", "gpt2"])
def test_models_of_hugging_face_need_no_function(kind: str) -> None:
    model, batch = hugging_face(kind)
    problem = Problem(model, "cross_entropy", batch, unit="term")
    own = model(**batch).loss
    assert problem.loss_value() == pytest.approx(float(own), rel=1e-6)  # GPT-2 computes its loss in float32
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(own, list(named.values()), allow_unused=True, materialize_grads=True)]
    )
    assert torch.allclose(problem.gradient(), gradient, rtol=1e-4, atol=1e-7)
    shift = int(kind == "gpt2")
    by_hand = Problem(
        model,
        CrossEntropy(ignore_index=-100),
        [batch],
        unit="term",
        forward=lambda m, b: (
            m(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, : -shift or None]
            if kind != "bert"
            else m(b["input_ids"], attention_mask=b["attention_mask"]).logits
        ),
        targets=lambda b: b["labels"][:, shift:] if kind != "bert" else b["labels"],
    )
    params = ["*weight"] if kind == "bert" else ["*h.0*weight", "*query*", "*classifier*"]
    params = [p for p in params if any(__import__("fnmatch").fnmatchcase(n, p) for n in named)]
    for quantity in ("fisher:samples=2", "empirical_fisher", "ggn"):
        found, right = (
            estimate(one, quantity, "diag", params=params, backend=b).diagonal()
            for one, b in ((problem, "auto"), (by_hand, "torch"))
        )
        assert torch.allclose(found, right, rtol=1e-8, atol=1e-12)


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    tokens = torch.randint(1, 11, (4, 6))
    labels = torch.where(numbers(4, 5) > 1, -100, tokens[:, :5])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return transformers.T5ForConditionalGeneration(config).double().eval(), batch


def test_inputs_of_a_decoder_are_made_from_the_labels() -> None:
    model, batch = t5()
    problem = Problem(model, "cross_entropy", batch, unit="term")
    assert problem.loss_value() == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
    decoder: Any = model.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
    given = Problem(model, "cross_entropy", batch | {"decoder_input_ids": decoder}, unit="term")
    found, right = (
        estimate(one, "empirical_fisher", "diag", params="decoder.*.q.weight").diagonal() for one in (problem, given)
    )
    assert found.any()
    assert torch.equal(found, right)


def test_an_error_of_a_models_own_loss_is_a_sentence() -> None:
    model, batch = t5()
    batch["labels"] = batch["labels"].mT.contiguous().mT  # T5 wants them in rows
    with pytest.raises(UnsupportedError, match="raises an error on the first batch with its labels"):
        Problem(model, "cross_entropy", batch).loss_value()


def test_a_model_whose_own_loss_is_another_is_refused() -> None:
    model, batch = hugging_face("bert")
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # type: ignore[union-attr, operator]
    with pytest.raises(UnsupportedError, match=r"computes from its labels is .* but cross_entropy:label_smoothing=0.1"):
        Problem(model, CrossEntropy(label_smoothing=0.1), batch).check()


def test_a_function_of_parameters_as_the_model() -> None:
    net = TwoInputs()
    named = {name: p.detach() for name, p in net.named_parameters()}
    model = as_module(lambda p, batch: torch.func.functional_call(net, dict(p), tuple(batch)), named)
    assert [name for name, _ in model.named_parameters()] == list(named)
    problem = Problem(model, "cross_entropy", ((X, Z), Y), forward=lambda m, b: m(b[0]))
    assert torch.allclose(estimate(problem, "fisher", "dense").to_dense(), reference(), **EXACT)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((nn.Linear(2, 2), {}), "needs a function of parameters and inputs"),
        ((lambda p, x: x, [X]), "parameters as tensors by name"),
        ((lambda p, x: x, {"forward": X}), "'forward' cannot be the name of a parameter"),
        ((lambda p, x: x, {"a": 1.0}), "parameters as tensors by name"),
    ],
)
def test_functions_that_are_no_models(arguments: Any, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        as_module(*arguments)
    with pytest.raises(CurvlabError, match=r"not function: for a function .* curvlab.as_module"):
        Problem(lambda p, x: x, "cross_entropy", (X, Y))  # type: ignore[arg-type]


class Scaled(nn.Module):
    """A network with one number for a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x) * scale


def test_batches_with_other_constants_are_not_joined() -> None:
    x = numbers(N, 3)
    parts = [({"x": x[:2], "scale": 1.0}, Y[:2]), ({"x": x[2:], "scale": 3.0}, Y[2:])]
    model = Scaled()
    scaled = torch.cat([x[:2], x[2:] * 3])
    model.layer.bias.requires_grad_(False).zero_()
    right = estimate(Problem(model, "cross_entropy", (scaled, Y)), "fisher", "dense").to_dense()
    for size in (None, 1, 4, N):
        found = estimate(Problem(model, "cross_entropy", parts), "fisher", "dense", batch_size=size)
        assert torch.allclose(found.to_dense(), right, **EXACT)


@pytest.mark.parametrize("values", [list(range(N)), ["text"] * N, [None] * N])
def test_a_list_with_a_value_per_sample_is_refused(values: list[Any]) -> None:
    told = rf"\['scale'\] of the data is a list of {N} values, one per sample.*make it a tensor"
    with pytest.raises(CurvlabError, match=told):
        estimate(Problem(Scaled(), "cross_entropy", ({"x": numbers(N, 3), "scale": values}, Y)), "fisher", "diag")


def test_a_list_with_a_value_per_sample_in_a_dataclass_is_refused() -> None:
    with pytest.raises(CurvlabError, match=rf"\.z of batch 3 is a list of {N} values, one per sample"):
        make_batch(Inputs(X, list(range(N))), "batch 3")  # type: ignore[arg-type]
