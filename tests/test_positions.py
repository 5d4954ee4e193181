"""Tests of layers as one matrix at many positions: all methods for moments and gradients, against explicit patches."""

import pytest
import torch
from torch import Tensor, nn

from curvlab import Problem, estimate
from curvlab.estimators import grams, hooks
from curvlab.estimators import positions as module
from curvlab.estimators.grams import add_gram_, add_squares_, mirror_
from curvlab.estimators.layers import Layer
from curvlab.estimators.positions import ConvPositions, ReducedPositions, call_positions
from curvlab.estimators.verification import Verification

N, OUTPUTS = 5, 3
CONVOLUTIONS = {
    "1d": (lambda c: nn.Conv1d(c, OUTPUTS, 3, stride=2, padding=1), (9,)),
    "2d": (lambda c: nn.Conv2d(c, OUTPUTS, (3, 2), padding=(1, 0)), (5, 4)),
    "2d stride, dilation": (lambda c: nn.Conv2d(c, OUTPUTS, 3, stride=(2, 1), padding=2, dilation=(2, 3)), (6, 7)),
    "2d same": (lambda c: nn.Conv2d(c, OUTPUTS, (2, 3), padding="same"), (4, 5)),
    "2d circular": (lambda c: nn.Conv2d(c, OUTPUTS, 3, padding=1, padding_mode="circular"), (4, 4)),
    "2d reflect": (lambda c: nn.Conv2d(c, OUTPUTS, 3, padding=(1, 2), padding_mode="reflect"), (5, 6)),
    "2d one entry": (lambda c: nn.Conv2d(c, OUTPUTS, 1, stride=(2, 1), padding=(0, 1)), (4, 3)),
    "2d one position": (lambda c: nn.Conv2d(c, OUTPUTS, 4), (4, 4)),
    "3d": (lambda c: nn.Conv3d(c, OUTPUTS, 2, stride=(1, 2, 1), padding=(1, 0, 1)), (3, 4, 3)),
}


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the vectors at each position, ``(N, T, d)``, with the one for the bias: the layer with unit weights."""
    weight, bias = layer.weight, layer.bias
    columns = []
    for i in range(weight[0].numel() + 1):
        unit = torch.zeros(weight[0].numel() + 1, dtype=weight.dtype)
        unit[i] = 1
        with torch.no_grad():
            weight.copy_(unit[:-1].view_as(weight[:1]).expand_as(weight))
            bias.fill_(float(unit[-1]))
            outputs = layer(inputs)
        columns.append(outputs[:, 0].flatten(1) if not isinstance(layer, nn.Linear) else outputs[..., 0].view(N, -1))
    return torch.stack(columns, dim=2)


def given(layer: nn.Module, inputs: Tensor, has: str) -> tuple[Layer, Tensor, Tensor, Tensor]:
    """Return a layer with some parameters, its rows ``a``, its gradients ``g`` ``(N, T, o)``, and ``g`` unreshaped."""
    with torch.no_grad():
        gradient = torch.randn_like(layer(inputs))
    a = rows_of(layer, inputs)
    a = {"both": a, "weight": a[..., :-1], "bias": a[..., -1:]}[has]
    g = gradient.reshape(N, -1, OUTPUTS) if isinstance(layer, nn.Linear) else gradient.flatten(2).mT
    names = {"both": ("weight", "bias"), "weight": ("weight", None), "bias": (None, "bias")}[has]
    return Layer("", layer, *names), a, g, gradient


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-11, atol=1e-12)


def agree(layer: nn.Module, inputs: Tensor, has: str) -> None:
    description, a, g, gradient = given(layer, inputs, has)
    here = call_positions(description, inputs)
    weights = torch.rand(N, dtype=a.dtype)
    gradients = torch.einsum("nto,ntd->nod", g, a)
    assert here.count == a.shape[1]
    for w in (None, weights):
        by = torch.ones(N, dtype=a.dtype) if w is None else w
        moment, slopes = (
            torch.zeros(2, a.shape[2], a.shape[2], dtype=a.dtype),
            torch.zeros(2, OUTPUTS, OUTPUTS, dtype=a.dtype),
        )
        for total in moment:  # twice: it adds to what is there
            here.add_moment_(total, w)
            here.add_moment_(total, w)
        here.add_gradient_moment_(slopes[0], gradient, w)
        assert close(mirror_(moment[0]), 2 * torch.einsum("n,ntd,nte->de", by, a, a) / here.count)
        assert close(mirror_(slopes[0]), torch.einsum("n,nto,ntp->op", by, g, g))
    assert close(here.input_rows(), a)
    assert close(here.gradient_rows(gradient), g)
    assert close(here.means(), a.mean(dim=1))
    assert close(here.squared_norms(), a.square().sum(dim=(1, 2)) / here.count)
    assert close(here.gradient_norms(gradient), g.square().sum(dim=(1, 2)))
    assert close(here.gradient_sums(gradient), g.sum(dim=1))
    assert close(torch.cat(list(here.sample_gradients(gradient))), gradients)
    squares = torch.zeros(OUTPUTS, a.shape[2], dtype=a.dtype)
    for _ in range(2):
        here.add_squares_(squares, gradient)
    assert close(squares, 2 * gradients.square().sum(dim=0))
    assert here.squared_gradients(gradient) == pytest.approx(float(gradients.square().sum()), rel=1e-11)
    reduced, total = ReducedPositions(here), torch.zeros(a.shape[2], a.shape[2], dtype=a.dtype)
    reduced.add_moment_(total)
    assert close(mirror_(total), a.mean(dim=1).mT @ a.mean(dim=1))
    assert close(torch.cat(list(reduced.sample_gradients(gradient))), gradients)


@pytest.mark.parametrize("has", ["both", "weight", "bias"])
@pytest.mark.parametrize(("channels", "piece"), [(2, 2000), (6, 2000), (2, 1)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, channels: int, piece: int, has: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATCH_BYTES", piece)
    monkeypatch.setattr(module, "_BYTES", 2000)  # some samples at a time
    torch.manual_seed(0)
    make, size = CONVOLUTIONS[name]
    agree(make(channels).double(), torch.randn(N, channels, *size, dtype=torch.float64), has)


@pytest.mark.parametrize("unfolds", [True, False])
@pytest.mark.parametrize("has", ["both", "weight"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_convolutions_either_way(
    name: str, has: str, unfolds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both methods for the per-sample gradients, independent of the default choice."""
    monkeypatch.setattr(ConvPositions, "_unfolds", lambda *_: unfolds)
    monkeypatch.setattr(module, "_BYTES", 2000)
    torch.manual_seed(0)
    make, size = CONVOLUTIONS[name]
    layer, inputs = make(6).double(), torch.randn(N, 6, *size, dtype=torch.float64)
    description, a, g, gradient = given(layer, inputs, has)
    found = torch.cat(list(call_positions(description, inputs).sample_gradients(gradient)))
    assert close(found, torch.einsum("nto,ntd->nod", g, a))


@pytest.mark.parametrize(
    ("layer", "dtype", "unfolds"),
    [
        (nn.Conv2d(1, 16, 3), torch.float32, True),
        (nn.Conv2d(12, 16, 3), torch.float32, True),
        (nn.Conv2d(16, 10, 3), torch.float32, True),  # no blocks of outputs
        (nn.Conv2d(16, 32, 3), torch.float32, False),
        (nn.Conv2d(64, 128, 1), torch.float32, True),
        (nn.Conv2d(64, 128, 3), torch.float32, True),  # a large weight
        (nn.Conv2d(6, 16, 5), torch.float32, False),  # large patches
        (nn.Conv3d(1, 8, 3), torch.float32, False),
        (nn.Conv2d(3, 16, 3), torch.float64, False),
    ],
)
def test_the_way_of_a_convolution_follows_from_its_shapes(layer: nn.Conv2d, dtype: torch.dtype, unfolds: bool) -> None:
    inputs = torch.zeros(1, layer.in_channels, *[6] * len(layer.kernel_size), dtype=dtype)
    here = call_positions(Layer("", layer, "weight", None), inputs)
    assert isinstance(here, ConvPositions)
    assert here._unfolds(layer.out_channels) == unfolds


@pytest.mark.parametrize("has", ["both", "weight", "bias"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_linear_layers(shape: tuple[int, ...], has: str) -> None:
    torch.manual_seed(0)
    agree(nn.Linear(4, OUTPUTS).double(), torch.randn(N, *shape, dtype=torch.float64), has)


@pytest.mark.parametrize("positions", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("bytes_", [1, 100, 8 * 3 * 4, 8 * 3 * 4 * 4, 1e6])  # a column, some, a sample, some, all
def test_squares_in_pieces(positions: int, bytes_: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "_CACHE", bytes_)
    g, a = torch.randn(N, positions, 3, dtype=torch.float64), torch.randn(N, positions, 4, dtype=torch.float64)
    total = torch.ones(3, 4, dtype=torch.float64)
    kept = g.clone(), a.clone()
    add_squares_(total, g, a)
    assert close(total - 1, torch.einsum("nto,ntd->nod", g, a).square().sum(dim=0))
    assert torch.equal(kept[0], g)
    assert torch.equal(kept[1], a)


def test_squares_of_positions_that_cancel_are_not_negative() -> None:
    torch.manual_seed(0)
    g, a = torch.randn(50, 1, 30), torch.randn(50, 1, 40)
    total = torch.zeros(30, 40)
    add_squares_(total, torch.cat([g, -g / 3, -g / 3, -g / 3], 1), a.expand(-1, 4, -1))
    assert (float(total.min()) >= 0, float(total.max()) < 1e-4) == (True, True)


@pytest.mark.parametrize("size", [1, 255, 256, 512, 700, 2048])
def test_gram_matrices_in_panels(size: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, size, dtype=torch.float64)
    total = torch.zeros(size, size, dtype=torch.float64)
    for factor in (1.0, 0.5):
        add_gram_(total, rows, factor)
    assert close(mirror_(total), 1.5 * rows.mT @ rows)


def test_more_outputs_than_positions() -> None:
    """The other method for the moment of the gradients."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 300, 2).double()
    gradient = torch.randn(N, 300, 1, 2, dtype=torch.float64)
    total = torch.zeros(300, 300, dtype=torch.float64)
    call_positions(Layer("", layer, "weight", "bias"), torch.randn(N, 2, 2, 3).double()).add_gradient_moment_(
        total, gradient
    )
    rows = gradient.flatten(2).mT.flatten(0, 1)
    assert close(mirror_(total), rows.mT @ rows)


def test_a_basis_where_float32_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3, 20)
    factor, eigh = rows.mT @ rows, torch.linalg.eigh

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    basis = hooks._basis(factor)
    assert basis.dtype == torch.float32
    assert torch.allclose(basis.mT @ basis, torch.eye(20), atol=1e-5)
    rotated = basis.mT @ factor @ basis
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-4 * factor.abs().max()


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_pieces_are_the_batch(piece: int) -> None:
    batches = [(torch.arange(7), torch.arange(7) + 1), (torch.arange(2), torch.arange(2))]
    pieces = list(hooks._split_batches(batches, piece))
    assert max(len(x) for x, _ in pieces) <= piece
    assert piece > 3 or len(pieces[0][0]) == min(piece, 3)  # 3, 3 and 1 of seven
    for index in (0, 1):
        assert torch.equal(torch.cat([p[index] for p in pieces]), torch.cat([b[index] for b in batches]))


def test_pieces_are_equal_parts() -> None:
    pieces = hooks._split_batches([(torch.arange(250), torch.arange(250))], 79)
    assert [len(x) for x, _ in pieces] == [63, 63, 63, 61]


@pytest.mark.parametrize(
    ("sizes", "entries", "piece"),
    [
        ({"a": 6_000, "b": 100}, 0, 1000),  # small layers: as many as ever
        ({"a": 150_000, "b": 100_000}, 0, 106),  # what the largest one leaves room for
        ({"a": 100_000_000}, 0, 8),  # but some
        ({"a": 150_000, "b": 100_000}, 25_000_000, 400),  # and more where a large result is gone through for each
        ({"a": 0}, 0, 1000),
    ],
)
def test_the_size_of_a_piece(sizes: dict[str, int], entries: int, piece: int) -> None:
    problem = Problem(nn.Linear(2, 2), "squared_error", (torch.zeros(3, 2), torch.zeros(3, 2)))
    layers = {name: Layer(name, problem.model, "weight", "bias") for name in sizes}
    assert hooks._chunk_size(problem, Verification(layers, {}, (), (), sizes), entries) == piece


def test_what_is_taken_at_once_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 25, 3)]
    problem = Problem(nn.Sequential(*layers).double(), data=(torch.randn(23, 2, 5, 5), torch.arange(23) % 3))
    for quantity in ("empirical_fisher", "fisher", "fisher:samples=2"):
        for structure in ("diag", "kfac", "ekfac"):
            with monkeypatch.context() as patched:
                whole = estimate(problem, quantity, structure, backend="hooks")
                patched.setattr(hooks, "_chunk_size", lambda *_: 3)
                parts = estimate(problem, quantity, structure, backend="hooks")
            assert torch.allclose(parts.diagonal(), whole.diagonal(), rtol=1e-11, atol=1e-13)
