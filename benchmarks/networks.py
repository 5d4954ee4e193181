"""Estimators on networks that people use, as ratios to one plain forward and backward pass over the same batches.

    python benchmarks/networks.py [--nets minilm gpt resnet18] [--works empirical_diag kfac] [--rounds 5]

``minilm``: BERT of 6 layers, 384 features (22.6 million parameters), with random weights, on 32 sequences of 64 tokens.
``gpt``: a decoder of 4 layers, 256 features and 5,000 words, whose output layer is the embedding, on 16 sequences of 64
tokens. Another name is a network of torchvision, on 32 images of 64 x 64. All are in evaluation mode.

Every net and work is a process of its own, in which the plain pass and the work take turns. What is printed is the
median over rounds of the seconds of the processor, over the mean of the plain passes before and after it. One thread.
Prints a line of JSON for each net and work.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from measure import emit, in_own_process, machine
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import Problem, estimate, linearize

SAMPLES, TOKENS = 32, 64
Work = Callable[[], object]


class Block(nn.Module):
    """A layer of a decoder, before whose parts the norms are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(mask, float("-inf")).softmax(dim=-1) @ v
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """A small language model whose output layer is its embedding."""

    def __init__(self, words: int = 5000, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        self.words.weight.data.mul_(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class MiniLM(nn.Module):
    """A sentence encoder of ``transformers`` with the mean over tokens and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(384, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.encoder(input_ids=tokens).last_hidden_state.mean(dim=1))


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "gpt":
        tokens = torch.randint(5000, (SAMPLES // 2, TOKENS + 1))
        return GPT().eval(), tokens[:, :-1], tokens[:, 1:]
    if name == "minilm":
        return MiniLM().eval(), torch.randint(30_000, (SAMPLES, TOKENS)), torch.randint(10, (SAMPLES,))
    import torchvision

    make: Callable[..., nn.Module] = getattr(torchvision.models, name)
    return make(num_classes=10).eval(), torch.randn(SAMPLES, 3, 64, 64), torch.randint(10, (SAMPLES,))


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    outputs = model(x)
    F.cross_entropy(outputs.flatten(0, -2), y.flatten()).backward()


WORKS = (
    *("empirical_diag", "empirical_diag_layers", "mc_diag", "kfac", "ekfac"),
    *("ggn_first", "ggn", "hessian_first", "hessian", "solve", "linearized"),
)


def layers_only(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """Return a selection of the Linear and convolution layers, without tied weights."""
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))} - {"head"}
    return lambda name, _: name.rpartition(".")[0] in names


def make_work(work: str, model: nn.Module, x: Tensor, y: Tensor) -> Work:
    """Return what is timed; everything that is not is done before."""
    unit = "term" if y.ndim > 1 else "sample"

    def problem() -> Problem:
        return Problem(model, "cross_entropy", (x, y), unit=unit)

    if work.startswith("empirical_diag"):
        params = layers_only(model) if work.endswith("layers") else None
        return lambda: estimate(problem(), "empirical_fisher", "diag", params=params)
    if work == "mc_diag":
        return lambda: estimate(problem(), "fisher:samples=1", "diag")
    if work in ("kfac", "ekfac"):
        params = layers_only(model)
        return lambda: estimate(problem(), "fisher:samples=1", work, params=params)
    if work == "solve":
        matrix = estimate(problem(), "fisher:samples=1", "kfac", params=layers_only(model))
        vector = torch.randn(matrix.shape[0])
        return lambda: copy(matrix).solve(vector, damping=1e-3)
    if work == "linearized":
        linear = linearize(model)
        return lambda: plain(linear, x, y)
    quantity = work.removesuffix("_first")
    matrix = estimate(problem(), quantity, "implicit")
    vector = torch.randn(matrix.shape[0])
    if work.endswith("first"):
        return lambda: estimate(problem(), quantity, "implicit") @ vector
    matrix @ vector
    return lambda: matrix @ vector


def seconds(work: Work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def run_case(net: str, work: str, rounds: int) -> None:
    torch.set_num_threads(1)
    model, x, y = network(net)
    ours = make_work(work, model, x, y)
    plain(model, x, y)
    ours()
    ratios, plains = [], []
    for _ in range(rounds):
        before, taken, after = seconds(lambda: plain(model, x, y)), seconds(ours), seconds(lambda: plain(model, x, y))
        ratios.append(2 * taken / (before + after))
        plains.append((before + after) / 2)
    found: dict[str, Any] = {"r": round(statistics.median(ratios), 2), "plain_s": round(statistics.median(plains), 2)}
    emit(found | {"rounds": [round(ratio, 2) for ratio in ratios]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["minilm", "gpt", "resnet18"])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--net", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        warnings.simplefilter("ignore")
        run_case(given.net, given.case, given.rounds)
        return
    emit({"machine": machine(), "samples": SAMPLES, "tokens": TOKENS})
    for net in given.nets:
        for work in given.works:
            emit(
                {"net": net, "work": work} | in_own_process(__file__, work, "--net", net, "--rounds", str(given.rounds))
            )


if __name__ == "__main__":
    main()
