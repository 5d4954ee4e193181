"""The closed forms and the losses of tokens of hessian-eigenthings (``tests/``).

The losses of tokens are given there for logits alone; here the logits are the weight of an embedding, a row a token.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn, randn

from benchmarks.peers.cases import Case, classes

KRONECKER: tuple[tuple[str, str], ...] = ()

IGNORED = -100


def linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias=False)


def tanh(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def of_regression(_: nn.Module, batches: Any, vectors: Tensor) -> Tensor:
    x = torch.cat([inputs.double() for inputs, _ in batches])
    return 2 / len(x) * x.mT @ x @ vectors


def of_logistic_regression(model: nn.Module, batches: Any, vectors: Tensor) -> Tensor:
    x = torch.cat([inputs.double() for inputs, _ in batches])
    p = model(x).detach().sigmoid()
    return x.mT @ (p * (1 - p) * x) / len(x) @ vectors


def of_classification(model: nn.Module, batches: Any, vectors: Tensor) -> Tensor:
    x = torch.cat([inputs.double() for inputs, _ in batches])
    p = model(x).detach().softmax(dim=1)
    forms = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nij,na,nb->iajb", forms, x, x).reshape(p.shape[1] * x.shape[1], -1) / len(x) @ vectors


def of_logits(model: nn.Module, batches: Any, vectors: Tensor) -> Tensor:
    """Return the products of the Hessian of tokens that have a row of logits each."""
    ((_, labels),) = batches
    p = model.weight.detach().softmax(dim=1)
    counts = (labels.reshape(-1) != IGNORED).double()
    v = vectors.view(*p.shape, -1)
    products = p.unsqueeze(2) * (v - torch.einsum("tc,tck->tk", p, v).unsqueeze(1))
    return (counts.view(-1, 1, 1) * products / counts.sum()).view(vectors.shape)


def logits(tokens: int, vocabulary: int, make: Callable[[Tensor], None] | None = None) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        table = nn.Embedding(tokens, vocabulary)
        if make is not None:
            make(table.weight.data)
        return table

    return model


def confident(weight: Tensor) -> None:
    weight.zero_()[:, 0] = 50.0


def table(sequences: int, length: int, vocabulary: int, ignored: Callable[[Tensor], None]) -> Callable[[], Any]:
    def make() -> Any:
        labels = classes(sequences, length, number=vocabulary)
        ignored(labels)
        return [(torch.arange(sequences * length).view(sequences, length), labels)]

    return make


def a_tenth(labels: Tensor) -> None:
    labels[torch.rand(labels.shape) < 0.1] = IGNORED
    labels.view(-1)[0] = 0


def all_but_one(labels: Tensor) -> None:
    labels.view(-1)[:-1] = IGNORED


def by_token(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits as ``nn.CrossEntropyLoss`` takes them."""
    return model(batch[0]).transpose(1, 2), batch[1]


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits of all tokens but the last, and the labels of all but the first."""
    found = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return found[:, :-1].transpose(1, 2), batch["labels"][:, 1:]


def language_model() -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def texts() -> Any:
    def batch(size: int) -> dict[str, Tensor]:
        tokens, mask = classes(size, 6, number=13), torch.ones(size, 6, dtype=torch.int64)
        mask[0, 4:] = 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)}

    return [batch(2), batch(1)]


def tokens(name: str, model: Callable[[], nn.Module], data: Callable[[], Any]) -> Case:
    return Case(f"tokens, {name}", model, nn.CrossEntropyLoss, data, call=by_token, closed_form=of_logits)


def cases() -> Iterator[Case]:
    """Yield the cases."""
    pairs: dict[str, Any] = {
        "regression": (linear(5, 1), nn.MSELoss, lambda: [(randn(16, 5), randn(16, 1))], of_regression),
        "logistic regression": (
            linear(5, 1),
            nn.BCEWithLogitsLoss,
            lambda: [(randn(16, 5), (torch.rand(16, 1) > 0.5).float())],
            of_logistic_regression,
        ),
        "classification": (
            linear(4, 3),
            nn.CrossEntropyLoss,
            lambda: [(randn(12, 4), classes(12, number=3))],
            of_classification,
        ),
    }
    for name, (model, loss, data, form) in pairs.items():
        yield Case(f"linear, {name}", model, loss, data, closed_form=form)
    for sizes in ((6,), (3, 3)):
        of = "one batch" if len(sizes) == 1 else "two batches"
        yield Case(
            f"tanh, cross entropy, {of}",
            lambda: tanh(4),
            nn.CrossEntropyLoss,
            lambda sizes=sizes: [(randn(n, 3), classes(n, number=4)) for n in sizes],
        )
        yield Case(
            f"tanh, squared error, {of}",
            lambda: tanh(2),
            nn.MSELoss,
            lambda sizes=sizes: [(randn(n, 3), randn(n, 2)) for n in sizes],
        )
    for sequences, length, vocabulary in ((2, 4, 8), (2, 8, 32), (8, 1, 7), (2, 4, 100), (2, 2, 50257)):
        yield tokens(
            f"{sequences} x {length} of {vocabulary}",
            logits(sequences * length, vocabulary),
            table(sequences, length, vocabulary, a_tenth),
        )
    yield tokens("one of 16 counts", logits(16, 32), table(2, 8, 32, all_but_one))
    yield tokens("none counts", logits(8, 8), table(2, 4, 8, lambda labels: labels.fill_(IGNORED)))
    for name, make in (("confident", confident), ("uniform", lambda weight: weight.zero_())):
        yield tokens(name, logits(4, 32, make), table(2, 2, 32, lambda _: None))
    yield Case("GPT-2", language_model, nn.CrossEntropyLoss, texts, call=next_token)
