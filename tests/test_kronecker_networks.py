"""Kronecker factors of the networks of today: without options, what each parameter got, and against the definitions."""

import pytest
import torch
from torch import Tensor, nn

import curvlab
from curvlab import Problem, estimate
from curvlab.errors import UnsupportedError
from curvlab.matrices import Composite

KRONECKER = ("kfac", "ekfac", "tkfac")


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= rtol * expected.abs().max())


class Scaled(nn.Module):
    """A module of a user, with a parameter of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Transformer(nn.Module):
    """Two blocks of torch's encoder, and an output layer that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.gain = nn.Embedding(7, 4), Scaled(4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(4, 7)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.gain(self.wte(tokens))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(dim=1))


def of(model: nn.Module, *shape: int, tokens: int = 0, outputs: int = 3, loss: str = "cross_entropy") -> Problem:
    """Return a problem in float64 with uneven batches."""
    torch.manual_seed(1)
    x = torch.randint(tokens, shape) if tokens else torch.randn(shape, dtype=torch.float64)
    y = torch.randint(outputs, shape[:1])
    if loss != "cross_entropy":
        y = torch.randn(shape[0], outputs, dtype=torch.float64)
    return Problem(model.double().eval(), loss, list(zip(x.split(3), y.split(3), strict=True)))


def diagonals(problem: Problem, names: list[str], quantity: str = "empirical_fisher") -> Tensor:
    return estimate(problem, quantity, "diag", params=names, backend="torch").diagonal()


@pytest.mark.parametrize("structure", KRONECKER)
def test_a_transformer_needs_no_options(structure: str) -> None:
    torch.manual_seed(0)
    problem = of(Transformer(), 5, 3, tokens=7, outputs=7)
    matrix = estimate(problem, "empirical_fisher", structure)
    assert isinstance(matrix, Composite)
    assert matrix.info.structure == structure
    factors, rest = matrix.parts
    assert (factors.kind, rest.kind) == (structure, "diag")
    assert factors.space.names == tuple(
        f"blocks.{i}.linear{j}.{key}" for i in range(2) for j in (1, 2) for key in ("weight", "bias")
    )
    assert close(rest.diagonal(), diagonals(problem, list(rest.space.names)))
    assert close(
        factors.diagonal(), estimate(problem, "empirical_fisher", structure, backend="torch").parts[0].diagonal()
    )
    # The default, and what it was called before.
    assert close(matrix.diagonal(), estimate(problem, "empirical_fisher", f"{structure}:rest=diag").diagonal())
    blocks = estimate(problem, "empirical_fisher", f"{structure}:rest=block_diag", params="blocks.*")
    assert [part.kind for part in blocks.parts] == [structure, "block_diag"]
    assert blocks.info.structure == f"{structure}:rest=block_diag"


def test_info_says_what_each_parameter_got_in_a_few_phrases() -> None:
    torch.manual_seed(0)
    matrix = estimate(of(Transformer(), 5, 3, tokens=7, outputs=7), "empirical_fisher", "kfac")
    said = [reason for reason in matrix.info.rejected if reason.startswith("no Kronecker factors for ")]
    assert said == [
        "no Kronecker factors for wte.weight: it is shared with head (a tied weight)",
        "no Kronecker factors for gain.gain: it belongs to Scaled (gain)",
        "no Kronecker factors for blocks.0.self_attn.in_proj_weight, blocks.0.self_attn.in_proj_bias, "
        "blocks.1.self_attn.in_proj_weight and 1 more: each belongs to MultiheadAttention",
        "no Kronecker factors for blocks.0.self_attn.out_proj.weight, blocks.0.self_attn.out_proj.bias, "
        "blocks.1.self_attn.out_proj.weight and 1 more: each belongs to NonDynamicallyQuantizableLinear",
        "no Kronecker factors for blocks.0.norm1.weight, blocks.0.norm1.bias, blocks.0.norm2.weight and 5 more: "
        "each belongs to LayerNorm",
        "no Kronecker factors for head.bias: it belongs to the same layer as wte.weight, which is shared with head "
        "(a tied weight)",
    ]
    assert set(said) <= set(curvlab.doctor(of(Transformer(), 5, 3, tokens=7, outputs=7), "empirical_fisher").findings)
    sizes = [part.space.total for part in matrix.parts]
    assert f"P={sum(sizes)} (kfac {sizes[0]} + diag {sizes[1]})" in repr(matrix)


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def test_no_selected_parameter_has_factors() -> None:
    problem = of(norms(), 5, 4)
    for structure, kind in (("kfac", "diag"), ("ekfac:rest=block_diag", "block_diag")):
        matrix = estimate(problem, "fisher", structure, params="1.*")
        assert (matrix.kind, matrix.info.structure) == (kind, kind)
        assert matrix.info.rejected[0] == "no Kronecker factors for 1.weight, 1.bias: each belongs to LayerNorm (1)"


@pytest.mark.parametrize("params", [None, "1.*"])
@pytest.mark.parametrize("structure", [f"{name}:rest=none" for name in KRONECKER])
def test_rest_none_refuses(structure: str, params: str | None) -> None:
    problem = of(norms(), 5, 4)
    name = structure.partition(":")[0]
    with pytest.raises(
        UnsupportedError,
        match=rf"{structure} needs Kronecker factors for every parameter: 1.weight belongs to LayerNorm \(1\) .and 1 "
        rf"more.; '{name}' without rest=none gives such parameters their diagonal",
    ):
        estimate(problem, "fisher", structure, params=params)
    plain = estimate(problem, "fisher", structure, params=["0.*", "2.*"])
    assert plain.kind == name
