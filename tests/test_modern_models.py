"""Networks of today as they are written: every structure against autograd, or refused."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from curvlab import Problem, estimate
from curvlab.errors import UnsupportedError
from curvlab.likelihoods import BinaryCrossEntropy, CrossEntropy, FromFunction, Likelihood, SquaredError

EXACT = {"rtol": 1e-8, "atol": 1e-11}
N, L, V = 4, 5, 11
LENGTHS = torch.tensor([5, 3, 4, 2])
MASK = (torch.arange(L) < LENGTHS[:, None]).long()
TOKENS = torch.randint(1, V, (N, L), generator=torch.Generator().manual_seed(0)) * MASK


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
    )
    return transformers.BertForTokenClassification(config), tokens_with(torch.where(MASK == 1, TOKENS % 3, -100))


def tokens_with(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "labels": labels}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config), tokens_with(torch.where(MASK == 1, TOKENS, -100))


def lora() -> tuple[nn.Module, dict[str, Tensor]]:
    peft = pytest.importorskip("peft")
    model, batch = bert()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)  # as after training: at first they are zero
    return adapted, batch


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double(),
        "labels": torch.tensor([0, 1, 2, 1]),
    }


class UNet(nn.Module):
    """Down, up, and a skip connection; a shared normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.up, self.norm, self.out = nn.ConvTranspose2d(3, 2, 2, stride=2), nn.GroupNorm(1, 2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.down(x).tanh()).tanh()
        return self.out(torch.cat([x, self.norm(self.up(low))], dim=1))


class PackedTagger(nn.Module):
    """A recurrent tagger on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(V, 3), nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return self.out(states)


class AutoEncoder(nn.Module):
    """Reconstruction and code: a loss of two terms."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode(x)
        return torch.cat([self.decode(code.tanh()), code], dim=1)


def two_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    reconstruction = (outputs[:, :4] - targets).square().sum(dim=1) / 2
    return reconstruction + 0.1 * outputs[:, 4:].square().sum(dim=1) / 2


def images(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(2)).double()


LABELS = torch.where(MASK == 1, TOKENS % 3, -100)
PIXELS = torch.randint(3, (N, 4, 4), generator=torch.Generator().manual_seed(3))

Make = Callable[[], tuple[nn.Module, Likelihood, Any, dict[str, Any]]]


def by_labels(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> Make:
    return lambda: (*(lambda model, batch: (model, CrossEntropy(ignore_index=-100), batch))(*make()), {})


MODELS: dict[str, Make] = {
    "bert": by_labels(bert),
    "gpt2": by_labels(gpt2),
    "lora": by_labels(lora),
    "vit": by_labels(vit),
    "unet": lambda: (UNet(), CrossEntropy(label_smoothing=0.1), (images(2, 4, 4), PIXELS), {"class_dim": 1}),
    "unet, masks": lambda: (
        UNet(),
        BinaryCrossEntropy(ignore_value=-1),
        (images(2, 4, 4), nn.functional.one_hot(PIXELS, 3).double()),
        {"class_dim": 1},
    ),
    "packed tagger": lambda: (
        PackedTagger(),
        CrossEntropy(ignore_index=-100),
        [{"tokens": TOKENS, "lengths": LENGTHS, "tags": LABELS}],
        {"forward": lambda m, b: m(b["tokens"], b["lengths"]), "targets": lambda b: b["tags"]},
    ),
    "autoencoder": lambda: (AutoEncoder(), FromFunction(two_terms, natural=True), (images(4), images(4)), {}),
    "regression": lambda: (AutoEncoder(), SquaredError(variance=0.3), (images(4), images(6)), {}),
}


def problem_of(name: str, unit: Any, parts: int = 1) -> Problem:
    torch.manual_seed(0)
    model, likelihood, data, more = MODELS[name]()
    model.double().eval()
    if parts > 1:
        whole = data[0] if isinstance(data, list) else data
        if isinstance(whole, dict):
            data = [{key: value[i : i + 3] for key, value in whole.items()} for i in (0, 3)]
        else:
            data = [tuple(part[i : i + 3] for part in whole) for i in (0, 3)]
    return Problem(model, likelihood, data, unit=unit, **more)


def some(problem: Problem) -> list[str]:
    """Return names of parameters of every kind, not too many for the reference."""
    names = problem.space.names
    wanted = [
        "*0*attention*query*",
        "*lora*",
        "*classifier*weight",
        "*0*c_attn*",
        "*LayerNorm*0*",
        "*ln_1*",
        "*layernorm_before*",
    ]
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    return chosen or list(names)


@pytest.mark.parametrize("unit", ["sample", "term"])
@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher:samples=2", "ggn"])
@pytest.mark.parametrize("name", MODELS)
def test_against_the_reference(name: str, quantity: str, unit: Any) -> None:
    problem = problem_of(name, unit)
    if quantity == "fisher:samples=2" and name == "autoencoder":
        with pytest.raises(UnsupportedError, match="cannot draw targets: give draw_targets"):
            estimate(problem, quantity, "diag")
        return
    params = some(problem)
    right = estimate(problem, quantity, "diag", params=params, backend="torch").diagonal()
    scale = float(right.abs().max())
    for parts in (1, 2):
        split = problem_of(name, unit, parts)
        found = estimate(split, quantity, "diag", params=params).diagonal()
        assert torch.allclose(found, right, rtol=1e-8, atol=1e-9 * scale)
        implicit = estimate(split, quantity, "implicit", params=params)
        for index in (0, len(right) // 2):
            unit_vector = torch.zeros(len(right), dtype=torch.float64)
            unit_vector[index] = 1
            assert float((implicit @ unit_vector)[index]) == pytest.approx(
                float(right[index]), rel=1e-7, abs=1e-9 * scale
            )


@pytest.mark.parametrize("name", MODELS)
def test_gradient_and_hessian(name: str) -> None:
    problem = problem_of(name, "term")
    params = some(problem)
    leaves = {n: p for n, p in problem.model.named_parameters() if n in problem.space.names}
    total = (
        sum(
            problem.loss.values(problem.forward(leaves, x), y).sum()
            for x, y in problem.batches()  # type: ignore[arg-type]
        )
        / problem.num_units
    )
    gradient = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert torch.allclose(problem.gradient(), torch.cat([g.flatten() for g in gradient]), **EXACT)
    if name == "packed tagger":
        return  # torch differentiates the fused kernel once
    hessian = estimate(problem, "hessian", "implicit", params=params)
    vectors = torch.randn(hessian.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    products = hessian @ vectors
    assert float(vectors[:, 0] @ products[:, 1]) == pytest.approx(float(vectors[:, 1] @ products[:, 0]), rel=1e-7)


@pytest.mark.parametrize("name", ["bert", "lora", "vit", "unet", "packed tagger"])
def test_kronecker_factors(name: str) -> None:
    problem = problem_of(name, "term")
    params = some(problem)
    for structure in ("kfac:rest=diag", "ekfac:rest=diag"):
        found, right = (
            estimate(problem, "empirical_fisher", structure, params=params, backend=backend)
            for backend in ("auto", "torch")
        )
        assert float(found.trace()) == pytest.approx(float(right.trace()), rel=1e-8)
        vector = torch.randn(found.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        if structure.startswith("kfac"):
            assert torch.allclose(found @ vector, right @ vector, **EXACT)


def test_padding_changes_nothing() -> None:
    pytest.importorskip("transformers")
    for make in (bert, gpt2):
        torch.manual_seed(0)
        model, batch = make()
        model.double().eval()
        more = {k: nn.functional.pad(v, (0, 2), value=-100 if k == "labels" else 0) for k, v in batch.items()}
        for quantity in ("ggn", "empirical_fisher"):
            found, right = (
                estimate(Problem(model, "cross_entropy", data, unit="term"), quantity, "diag").diagonal()
                for data in (more, batch)
            )
            assert torch.allclose(found, right, rtol=1e-7, atol=1e-12)
