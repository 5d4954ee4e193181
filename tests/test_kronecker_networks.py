"""Kronecker factors of the networks of today: without options, what each parameter got, and against the definitions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

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
    layers = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.")
    assert factors.space.names == tuple(
        f"blocks.{i}.{layer}{key}" for i in range(2) for layer in layers for key in ("weight", "bias")
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
        "no Kronecker factors for blocks.0.norm1.weight, blocks.0.norm1.bias, blocks.0.norm2.weight and 5 more: "
        "each belongs to LayerNorm",
        "no Kronecker factors for head.bias: it belongs to the same layer as wte.weight, which is shared with head "
        "(a tied weight)",
    ]
    sizes = [part.space.total for part in matrix.parts]
    assert f"P={sum(sizes)} (kfac {sizes[0]} + diag {sizes[1]})" in repr(matrix)


def test_doctor_says_it_too() -> None:
    problem = of(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), 5, 4)
    assert (
        "no Kronecker factors for 1.weight, 1.bias: each belongs to LayerNorm (1)"
        in curvlab.doctor(problem, "empirical_fisher").findings
    )


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


# Layers that are called several times --------------------------------------------------------------------------------


class Rnn(nn.Module):
    """One cell, three steps; its last output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for step in x.split(3, dim=1):
            h = self.cell(torch.cat([step, h], dim=1)).tanh()
        self.cell(torch.cat([step, h], dim=1))
        return self.out(h)


class Siamese(nn.Module):
    """One encoder for two images of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.PReLU(2)
        self.out = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :9].view(-1, 1, 3, 3), x[:, 9:].view(-1, 1, 3, 4)
        one, two = (self.act(self.norm(self.conv(image))).flatten(2).mean(dim=2) for image in (first, second))
        return self.out(one) - self.out(two).tanh()


class Shared(nn.Module):
    """One block on all tokens, then on their mean: two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm, self.out = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.block(x.unflatten(1, (3, 3))).tanh())
        return self.out(self.norm(self.block(h.mean(dim=1)).tanh()))


SEVERAL: dict[str, tuple[type[nn.Module], int, dict[str, int]]] = {
    "rnn": (Rnn, 9, {"cell": 4, "out": 1}),
    "siamese": (Siamese, 21, {"conv": 2, "out": 2}),
    "shared": (Shared, 9, {"block": 2, "out": 1}),
}


def several(kind: str, loss: str = "cross_entropy") -> Problem:
    make, features, _ = SEVERAL[kind]
    torch.manual_seed(0)
    return of(make(), 7, features, loss=loss)


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "fisher:samples=2,seed=1"])
def test_layers_that_are_called_several_times(kind: str, quantity: str) -> None:
    problem = several(kind, "squared_error" if quantity == "fisher" else "cross_entropy")
    diagonal = estimate(problem, quantity, "diag", backend="hooks")
    assert diagonal.info.rejected == ()
    assert close(diagonal.diagonal(), diagonals(problem, list(problem.space.names), quantity))
    forms = ("kfac", "kfac:sharing=reduce", "tkfac", "tkfac:sharing=reduce", "tkfac:variant=rescaled", "ekfac")
    for structure in forms:
        ours = estimate(problem, quantity, structure)
        theirs = estimate(problem, quantity, structure, backend="torch")
        assert {part.info.backend for part in getattr(ours, "parts", [ours])} == {"hooks"}
        assert close(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("kind", SEVERAL)
def test_uses_are_further_positions(kind: str) -> None:
    """A is the mean over positions of all uses, S the sum; recorded sample by sample with hooks."""
    problem = several(kind)
    names = SEVERAL[kind][2]
    matrix = estimate(problem, "empirical_fisher", "kfac:rest=none", params=[f"{name}.*" for name in names])
    for name, calls in names.items():
        module = problem.model.get_submodule(name)
        a_total, s_total = 0.0, 0.0
        for x, y in ((xs[n : n + 1], ys[n : n + 1]) for xs, ys in problem.batches() for n in range(len(xs))):
            seen: list[tuple[Tensor, Tensor]] = []
            handle = module.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given[0], out)))
            value = nn.functional.cross_entropy(problem.model(x), y)
            handle.remove()
            assert len(seen) == calls
            slopes = torch.autograd.grad(value, [out for _, out in seen], allow_unused=True, materialize_grads=True)
            if isinstance(module, nn.Conv2d):
                a = torch.cat([nn.functional.unfold(given, 2)[0].mT for given, _ in seen])
                g = torch.cat([slope[0].flatten(1).mT for slope in slopes])
            else:
                a = torch.cat([given.reshape(-1, module.in_features) for given, _ in seen])
                g = torch.cat([slope.reshape(-1, module.out_features) for slope in slopes])
            if module.bias is not None:
                a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
            a_total = a_total + a.mT @ a / len(a) / 7
            s_total = s_total + g.mT @ g / 7
        assert close(matrix.factors[name].A[0].detach(), a_total.detach())
        assert close(matrix.factors[name].S[0], s_total)


class Unordered(nn.Module):
    """The second call has the samples in another order, and its output is put back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x).tanh()
        return self.out(self.fc(h.flip(0)).flip(0))


@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_calls_with_samples_in_another_order_have_no_rule(size: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(14, 4, dtype=torch.float64), torch.arange(14) % 3
    problem = Problem(Unordered().double(), "cross_entropy", list(zip(x.split(size), y.split(size), strict=True)))
    plain = Problem(problem.model, "cross_entropy", list(zip(x.split(1), y.split(1), strict=True)))
    diagonal = estimate(problem, "empirical_fisher", "diag", backend="hooks")
    assert close(diagonal.diagonal(), estimate(plain, "empirical_fisher", "diag", backend="torch").diagonal())
    assert "fc.weight belongs to Linear fc, w" in diagonal.info.rejected[0]
    factors = estimate(problem, "empirical_fisher", "kfac").parts[0]
    assert factors.space.names == ("out.weight", "out.bias")


class Growing(nn.Module):
    """As many calls as there are tokens, which differ between the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = self.cell(h + x[:, t]).tanh()
        return self.out(h)


@pytest.mark.parametrize("late", [False, True])
def test_another_number_of_calls_in_some_batch_is_refused(late: bool) -> None:
    torch.manual_seed(0)
    # If it is late, the samples of the verification do not show it.
    lengths = [2, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2] if late else [2, 3, 4]
    batches = [(torch.randn(3, t, 4, dtype=torch.float64), torch.arange(3)) for t in lengths]
    problem = Problem(Growing().double(), "cross_entropy", batches)
    assert late == ({x.shape[1] for x, _ in problem.probe()} == {2})
    diagonal = estimate(problem, "empirical_fisher", "diag")
    assert close(diagonal.diagonal(), diagonals(problem, list(problem.space.names)))
    assert "cell.weight belongs to Linear cell, which is called" in diagonal.info.rejected[0]
    if late:
        for backend in ("auto", "hooks", "torch"):
            with pytest.raises(UnsupportedError, match=r"called [23] times"):
                estimate(problem, "empirical_fisher", "kfac", backend=backend)
    else:
        matrix = estimate(problem, "empirical_fisher", "kfac")
        assert matrix.parts[0].space.names == ("out.weight", "out.bias")
        with pytest.raises(UnsupportedError, match=r"called 2 times for some samples and \d for others"):
            estimate(problem, "empirical_fisher", "kfac:rest=none")
    assert estimate(problem, "empirical_fisher", "kfac", params="out.*").kind == "kfac"


# Weight and bias as blocks of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("structure", ["kfac", "kfac:sharing=reduce", "tkfac", "tkfac:variant=rescaled", "ekfac"])
def test_separate_blocks_for_weight_and_bias(kind: str, structure: str, tmp_path: Path) -> None:
    problem = several(kind)
    names = [f"{name}.*" for name in SEVERAL[kind][2]]
    form = structure + ("," if ":" in structure else ":") + "bias=separate"
    separate = estimate(problem, "empirical_fisher", form, params=names)
    assert separate.info.backend == "hooks"
    assert close(
        separate.to_dense(), estimate(problem, "empirical_fisher", form, params=names, backend="torch").to_dense()
    )
    # As if only one parameter were selected.
    joint = estimate(problem, "empirical_fisher", structure, params=names)
    space, dense = separate.space, separate.to_dense()
    for parameter, part in space.slices.items():
        alone = estimate(problem, "empirical_fisher", structure, params=[parameter])
        assert close(dense[part, part], alone.to_dense())
        if structure.startswith("kfac"):
            assert close(dense[part, part], joint.to_dense()[part, part])
        dense[part, part] = 0
    assert not dense.any()
    assert set(separate.layers) == set(space.names)
    separate.save(tmp_path / "m.safetensors")
    loaded = curvlab.load(tmp_path / "m.safetensors")
    assert close(loaded.to_dense(), separate.to_dense(), rtol=1e-14)
    vector = torch.randn(space.total, dtype=torch.float64)
    damped = separate.to_dense() + 0.1 * torch.eye(space.total, dtype=torch.float64)
    assert close(separate.solve(vector, damping=0.1), torch.linalg.solve(damped, vector))


def test_separate_blocks_with_one_damping_each() -> None:
    """One damping for the weight and another one for the bias, which joint blocks refuse."""
    problem = several("rnn")
    matrix = estimate(problem, "fisher", "kfac:bias=separate")
    damping = {name: 0.1 * (i + 1) for i, name in enumerate(matrix.space.names)}
    sizes = zip(damping.values(), matrix.space.sizes, strict=True)
    shift = torch.cat([torch.full((size,), number, dtype=torch.float64) for number, size in sizes])
    vector = torch.randn(matrix.space.total, dtype=torch.float64)
    assert close(matrix.solve(vector, damping=damping), torch.linalg.solve(matrix.to_dense() + shift.diag(), vector))


def test_separate_blocks_are_not_of_the_libraries() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    problem = Problem(nn.Sequential(nn.Linear(4, 3)).double(), "cross_entropy", (x, y))
    for backend in ("curvlinops", "nngeometry", "backpack"):
        with pytest.raises(UnsupportedError, match=r"it has one pair of full factors per module, not a block 0.weight"):
            estimate(problem, "empirical_fisher", "kfac:bias=separate", backend=backend)
    with pytest.raises(curvlab.errors.CurvlabError, match="bias of kfac must be joint or separate, not 'both'"):
        estimate(problem, "empirical_fisher", "kfac:bias=both")


# Forward only --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("options", ["", ",sharing=reduce", ",bias=separate"])
def test_factors_of_the_inputs_only(kind: str, options: str) -> None:
    problem = several(kind)
    names = [f"{name}.*" for name in SEVERAL[kind][2]]
    form = f"kfac:factors=inputs{options}"
    matrix = estimate(problem, "empirical_fisher", form, params=names)
    both = estimate(problem, "empirical_fisher", f"kfac:rest=none{options}", params=names)
    for key, (a, s) in matrix.factors.items():
        assert close(a, both.factors[key].A)
        assert torch.equal(s[0], torch.eye(len(s[0]), dtype=torch.float64))
    for quantity, backend in (("fisher", "hooks"), ("empirical_fisher", "torch"), ("ggn", "torch")):
        other = estimate(problem, quantity, form, params=names, backend=backend)
        assert close(other.to_dense(), matrix.to_dense())


def test_factors_of_the_inputs_have_no_unit() -> None:
    """A is a mean over positions, and S does not depend on the loss."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 5, 4).double(), torch.arange(30).view(6, 5) % 3
    matrices = [
        estimate(Problem(model, "cross_entropy", (x, y), unit=unit), "fisher", "kfac:factors=inputs").to_dense()
        for unit in ("term", "sample")
    ]
    rows = torch.cat([x.flatten(0, 1), torch.ones(30, 1, dtype=torch.float64)], dim=1)
    expected = torch.kron(torch.eye(3, dtype=torch.float64), rows.mT @ rows / 30)
    order = torch.cat([torch.arange(15).view(3, 5)[:, :4].flatten(), torch.arange(15).view(3, 5)[:, 4]])
    assert all(close(matrix, expected[order][:, order]) for matrix in matrices)


def test_factors_of_the_inputs_need_no_backward_pass() -> None:
    class Counted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, slope: Tensor) -> Tensor:
            Counted.calls += 1
            return slope

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Counted.apply(x)

    torch.manual_seed(0)
    problem = of(nn.Sequential(nn.Linear(4, 5), Counting(), nn.Linear(5, 3)), 60, 4)
    numbers = []
    for structure in ("kfac", "kfac:factors=inputs"):
        Counted.calls = 0
        estimate(problem, "empirical_fisher", structure, backend="hooks")
        numbers.append(Counted.calls)
    assert numbers[0] - numbers[1] == 20  # one per batch; the verification has some, too


def test_factors_of_the_inputs_against_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    problem = of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 7, 4)
    operator = curvlinops.KFACLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(problem.model.parameters()),
        list(problem.batches()),
        fisher_type="forward-only",
        separate_weight_and_bias=False,
    )
    theirs = operator @ torch.eye(problem.space.total, dtype=torch.float64)
    ours = estimate(problem, "fisher", "kfac:factors=inputs").to_dense()
    assert close(ours, theirs)
    with pytest.raises(UnsupportedError, match="it computes the factors of the gradients, too"):
        estimate(problem, "fisher", "kfac:factors=inputs", backend="curvlinops")
    with pytest.raises(curvlab.errors.CurvlabError, match="factors of kfac must be both or inputs, not 'outputs'"):
        estimate(problem, "fisher", "kfac:factors=outputs")


# Embeddings, and weights (inputs, outputs) ---------------------------------------------------------------------------


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as it is written in ``transformers``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 2), nn.Parameter(torch.randn(nf) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Untransposed(nn.Linear):
    """A class with the same name that computes something else."""


Untransposed.__name__ = "Conv1D"


class Language(nn.Module):
    """An embedding that is used twice, and square and other layers with transposed weights."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4, **options)
        self.attn, self.up, self.out = Conv1D(4, 4), Conv1D(5, 4), Conv1D(3, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.attn(self.wte(tokens)).tanh()
        return self.out(self.up(h).tanh().mean(dim=1) + self.wte(tokens[:, 0]).sum(dim=1, keepdim=True))


@pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher", "fisher:samples=2,seed=1"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"sparse": True}], ids=str)
def test_a_small_gpt(options: dict[str, object], quantity: str) -> None:
    torch.manual_seed(0)
    problem = of(Language(**options), 7, 3, tokens=6)
    diagonal = estimate(problem, quantity, "diag", backend="hooks")
    assert diagonal.info.rejected == ()
    assert close(diagonal.diagonal(), diagonals(problem, list(problem.space.names), quantity))
    for structure in ("kfac", "tkfac", "tkfac:variant=rescaled", "ekfac"):
        ours = estimate(problem, quantity, structure)
        assert (ours.kind, ours.info.backend) == (structure.partition(":")[0], "hooks")
        theirs = estimate(problem, quantity, structure, backend="torch")
        assert ours.tensors().keys() == theirs.tensors().keys()
        assert close(ours.to_dense(), theirs.to_dense())
        if structure != "kfac":  # their trace is exact
            assert close(ours.trace(), diagonal.trace())


def rows_of(problem: Problem) -> dict[str, Tensor]:
    """Return the per-sample gradients of the loss by parameter, with plain torch."""
    found: dict[str, list[Tensor]] = {name: [] for name in problem.space.names}
    for x, y in ((xs[n : n + 1], ys[n : n + 1]) for xs, ys in problem.batches() for n in range(len(xs))):
        value = nn.functional.cross_entropy(problem.model(x), y)
        for name, p in problem.model.named_parameters():
            found[name].append(torch.autograd.grad(value, p, retain_graph=True)[0])
    return {name: torch.stack(rows) for name, rows in found.items()}


def test_factors_of_embeddings_and_transposed_weights_by_hand() -> None:
    torch.manual_seed(0)
    problem = of(Language(), 7, 3, tokens=6)
    matrix = estimate(problem, "empirical_fisher", "kfac", params=["wte.*", "up.*"])
    assert set(matrix.tensors()) == {"wte/embedding|A", "wte/embedding|S", "up/transposed|A", "up/transposed|S"}
    tokens = torch.cat([x for x, _ in problem.batches()])
    used = torch.cat([tokens, tokens[:, :1]], dim=1)  # of the two calls
    counts = torch.stack([(used == v).double().sum() for v in range(6)]) / used.numel()
    assert close(matrix.factors["wte/embedding"].A, counts.unsqueeze(0))
    a, s = matrix.factors["up/transposed"]
    vector = torch.randn(problem.space.restrict(["up.weight", "up.bias"]).total, dtype=torch.float64)
    homogeneous = torch.cat([vector[:20].view(4, 5), vector[20:].view(1, 5)])  # (inputs, outputs)
    product = a[0] @ homogeneous @ s[0]
    whole = torch.cat([torch.zeros(24), vector])
    assert close((matrix @ whole)[24:], torch.cat([product[:4].flatten(), product[4]]))
    # EK-FAC's eigenvalues are the second moments of the gradients in its basis.
    ekfac = estimate(problem, "empirical_fisher", "ekfac", params=["wte.*", "up.*"])
    rows = rows_of(problem)
    basis = ekfac.bases["wte/embedding"]
    assert torch.equal(basis.U_A, torch.ones(6).double())
    assert close(basis.values, (rows["wte.weight"] @ basis.U_S).square().mean(dim=0).mT)
    basis = ekfac.bases["up/transposed"]
    joined = torch.cat([rows["up.weight"], rows["up.bias"].unsqueeze(1)], dim=1)
    assert close(basis.values, (basis.U_A.mT @ joined @ basis.U_S).square().mean(dim=0).mT)


@pytest.mark.parametrize("structure", KRONECKER)
def test_the_algebra_with_a_diagonal_factor_and_transposed_weights(structure: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problem = of(Language(), 7, 3, tokens=6)
    one = estimate(problem, "empirical_fisher", structure)
    total = one + 0.5 * one if structure == "ekfac" else one + 0.5 * estimate(problem, "fisher", structure)
    for matrix in (one, total):
        dense, size = matrix.to_dense(), problem.space.total
        vector = torch.randn(size, dtype=torch.float64)
        damped = dense + 0.1 * torch.eye(size, dtype=torch.float64)
        assert close(dense, dense.mT)
        assert close(matrix.diagonal(), dense.diagonal())
        assert close(matrix.trace(), dense.trace())
        assert close(matrix.frobenius_norm(), torch.linalg.matrix_norm(dense))
        assert close(matrix.solve(vector, damping=0.1), torch.linalg.solve(damped, vector))
        assert close(matrix.logdet(damping=0.1), torch.logdet(damped))
        assert close(matrix.eigenvalues().sort().values, torch.linalg.eigvalsh(dense), rtol=1e-9)
        assert close(matrix.quadratic_form(vector), vector @ dense @ vector)
        named = problem.space.unflatten(vector)
        outputs = {name: torch.ones_like(v) for name, v in named.items()}
        matrix.add_product_(outputs, named, 2.0)
        assert close(problem.space.flatten(outputs), 1 + 2 * dense @ vector)
        matrix.save(tmp_path / "m.safetensors")
        assert close(curvlab.load(tmp_path / "m.safetensors").to_dense(), dense, rtol=1e-14)
    if structure != "ekfac":
        for merged in (total.nearest(), total.average_factors()):
            assert all(len(factors.A) == 1 for factors in merged.factors.values())
            assert close(merged.to_dense(), merged.to_dense().mT)


def test_an_embedding_is_exact_with_one_token_per_sample() -> None:
    """The Fisher is then block-diagonal in the tokens, and with a squared error S does not depend on the token."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(3, 2))
    problem = of(model, 9, 1, tokens=5, outputs=2, loss="squared_error")
    exact = estimate(problem, "fisher", "dense", params="0.*", backend="torch").to_dense()
    for structure in KRONECKER:
        assert close(estimate(problem, "fisher", structure, params="0.*").to_dense(), exact)


def test_a_large_vocabulary_has_no_square_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50_000, 2), nn.Flatten(), nn.Linear(6, 2))
    tokens = torch.randint(50_000, (4, 3))
    problem = Problem(model, "cross_entropy", (tokens, torch.arange(4) % 2))
    matrix = estimate(problem, "empirical_fisher", "kfac")
    a, s = matrix.factors["0/embedding"]
    assert (a.shape, s.shape) == ((1, 50_000), (1, 2, 2))
    assert a[0].nonzero().flatten().tolist() == sorted(set(tokens.flatten().tolist()))
    assert matrix.solve(matrix.diagonal(), damping=0.1).shape == (100_014,)
    values = estimate(problem, "empirical_fisher", "ekfac").bases["0/embedding"].values
    diagonal = estimate(problem, "empirical_fisher", "diag").diagonal()[:100_000]
    torch.testing.assert_close(values.sum(), diagonal.sum())


def test_an_embedding_with_a_limited_norm_is_refused() -> None:
    """Its forward changes the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(9, 3))
    for structure in ("diag", "kfac"):
        with pytest.raises(UnsupportedError, match=r"parameter 0.weight \(Embedding\).*max_norm to None"):
            estimate(of(model, 7, 3, tokens=5), "empirical_fisher", structure)


def test_reduce_gives_an_embedding_its_diagonal() -> None:
    torch.manual_seed(0)
    problem = of(Language(), 7, 3, tokens=6)
    matrix = estimate(problem, "empirical_fisher", "kfac:sharing=reduce")
    assert matrix.parts[1].space.names == ("wte.weight",)
    assert "whose input factor is not diagonal with sharing=reduce" in matrix.info.rejected[0]
    assert close(
        matrix.to_dense(), estimate(problem, "empirical_fisher", "kfac:sharing=reduce", backend="torch").to_dense()
    )


def test_a_module_that_is_only_named_like_gpts_has_no_factors() -> None:
    torch.manual_seed(0)
    problem = of(nn.Sequential(Untransposed(4, 4), nn.Linear(4, 3)), 7, 4)
    matrix = estimate(problem, "empirical_fisher", "kfac")
    assert matrix.parts[0].space.names == ("1.weight", "1.bias")
    wrong = "its gradient does not follow from its inputs and the gradient of its output"
    assert matrix.info.rejected[:2] == (
        f"no Kronecker factors for 0.weight: it belongs to Conv1D 0: {wrong}",
        "no Kronecker factors for 0.bias: it belongs to the same layer as 0.weight, which belongs to Conv1D 0: "
        f"{wrong}",
    )
    diagonal = estimate(problem, "empirical_fisher", "diag").diagonal()
    assert close(diagonal, diagonals(problem, list(problem.space.names)))


# Attention -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """An attention of a kind, whose keys and values are other tensors than the queries."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.kind = kind
        self.att = nn.MultiheadAttention(4, 2, **options, **({"kdim": 3, "vdim": 5} if kind == "sizes" else {}))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.att.batch_first else x.transpose(0, 1)
        if self.kind == "self":
            y = self.att(h, h, h, need_weights=False)[0]
        elif self.kind == "cross":
            memory = h.tanh().narrow(int(self.att.batch_first), 0, 2)
            y = self.att(query=h, key=memory, value=memory)[0]
        elif self.kind == "different":
            y = self.att(h, h.tanh(), h.sin())[0]
        elif self.kind == "sizes":
            y = self.att(h, h[..., :3], torch.cat([h, h[..., :1]], dim=-1))[0]
        else:  # twice, once of each kind
            y = self.att(self.att(h, h, h)[0], h, h)[0]
        return self.out((y if self.att.batch_first else y.transpose(0, 1)).tanh().mean(dim=1))


def attention(kind: str, **options: object) -> Problem:
    torch.manual_seed(0)
    return of(Attention(kind, **options), 7, 3, 4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, marks=[pytest.mark.slow] if options and kind != "self" else [])
        for kind in ("self", "cross", "different", "sizes", "twice")
        for options in ({}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True})
    ],
    ids=str,
)
def test_attention(kind: str, options: dict[str, bool]) -> None:
    problem = attention(kind, **options)
    extra = ["att.bias_k", "att.bias_v"] if "add_bias_kv" in options else []
    diagonal = estimate(problem, "empirical_fisher", "diag")
    assert diagonal.info.backend == "hooks"
    assert [reason.partition(" ")[0] for reason in diagonal.info.rejected] == extra
    assert close(diagonal.diagonal(), diagonals(problem, list(problem.space.names)))
    for structure in ("kfac", "kfac:sharing=reduce", "kfac:bias=separate", "tkfac", "ekfac", "ekfac:bias=separate"):
        ours = estimate(problem, "empirical_fisher", structure)
        assert [name for part in getattr(ours, "parts", [])[1:] for name in part.space.names] == extra
        theirs = estimate(problem, "empirical_fisher", structure, backend="torch")
        assert close(ours.to_dense(), theirs.to_dense())
        if structure.startswith(("tkfac", "ekfac")):
            assert close(ours.trace(), diagonal.trace())
    assert "forward" not in vars(problem.model.att)


class Unpacked(nn.Module):
    """The same as ``nn.MultiheadAttention``, with a Linear layer for each projection."""

    def __init__(self, att: nn.MultiheadAttention, out: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v, self.last = (nn.Linear(4, 4).double() for _ in range(4))
        self.out = out
        with torch.no_grad():
            for i, layer in enumerate((self.q, self.k, self.v)):
                layer.weight.copy_(att.in_proj_weight.unflatten(0, (3, 4))[i])
                layer.bias.copy_(att.in_proj_bias.unflatten(0, (3, 4))[i])
        self.last.load_state_dict(att.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.last(heads).tanh().mean(dim=1))


@pytest.mark.parametrize("structure", KRONECKER)
def test_the_projections_of_an_attention_are_linear_layers(structure: str, tmp_path: Path) -> None:
    packed = attention("self", batch_first=True)
    with torch.no_grad():
        for parameter in packed.model.parameters():  # torch initialises the biases with zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    unpacked = Problem(Unpacked(packed.model.att, packed.model.out), "cross_entropy", list(packed.batches()))
    one, other = (estimate(problem, "empirical_fisher", structure) for problem in (packed, unpacked))
    keys = {f"att.in_proj/group={i}of3": name for i, name in enumerate("qkv")} | {"att.out_proj": "last", "out": "out"}
    assert {keys[key] for key in one.layers} == set(other.layers)
    weight, bias, rest = torch.arange(packed.space.total).split([48, 12, packed.space.total - 60])
    parts = zip(weight.view(3, -1), bias.view(3, -1), strict=True)
    order = torch.cat([*(part for pair in parts for part in pair), rest])
    dense = one.to_dense()
    assert close(dense[order][:, order], other.to_dense())
    assert close(one.diagonal(), dense.diagonal())
    vector = torch.randn(len(dense), dtype=torch.float64)
    damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    assert close(one.solve(vector, damping=0.1), torch.linalg.solve(damped, vector))
    one.save(tmp_path / "m.safetensors")
    assert close(curvlab.load(tmp_path / "m.safetensors").to_dense(), dense, rtol=1e-14)


class Halved(nn.MultiheadAttention):
    """A subclass with another forward."""

    def forward(self, *arguments: Tensor, **keywords: object) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(*arguments, **keywords)
        return out / 2, weights


def inherited(problem: Problem) -> None:
    problem.model.att = Halved(4, 2).double()


def replaced(problem: Problem) -> None:
    forward = problem.model.att.forward
    problem.model.att.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)


def pruned(problem: Problem) -> None:
    prune.l1_unstructured(problem.model.att, "in_proj_weight", 5)


def direct(problem: Problem) -> None:
    problem.model.att.register_forward_hook(lambda module, _, out: (module.out_proj(out[0]), out[1]))


@pytest.mark.parametrize(
    ("change", "without"),
    [
        (inherited, "att.in_proj_weight, att.in_proj_bias"),
        (replaced, "att.in_proj_weight, att.in_proj_bias"),
        (pruned, "att.in_proj_bias"),
        (direct, "att.out_proj.weight"),
    ],
)
def test_attention_with_other_code_has_its_diagonal(change: Callable[[Problem], None], without: str) -> None:
    before = attention("self")
    change(before)
    problem = Problem(before.model, "cross_entropy", list(before.batches()))
    matrix = estimate(problem, "empirical_fisher", "kfac")
    assert f"no Kronecker factors for {without}" in " ".join(matrix.info.rejected)
    rest = matrix.parts[1]
    assert close(rest.diagonal(), diagonals(problem, list(rest.space.names)))
    assert close(matrix.to_dense(), estimate(problem, "empirical_fisher", "kfac", backend="torch").to_dense())


# Convolutions with groups, and transposed ones -----------------------------------------------------------------------


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, (2, 3), groups=4, stride=2, padding_mode="circular", padding=1), (4, 4, 5)),
    "depthwise, several": (lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), (4, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 3, 2)),
    "transposed groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, stride=3, padding=4, output_padding=1),
        (4, 5),
    ),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(2, 2, (2, 1, 3), groups=2, stride=(1, 2, 2), bias=False),
        (2, 2, 2, 2),
    ),
}


class Flat(nn.Module):
    """A convolution before a linear layer."""

    def __init__(self, conv: nn.Module, *shape: int) -> None:
        super().__init__()
        self.conv = conv
        self.out = nn.Linear(conv(torch.zeros(1, *shape)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).tanh().flatten(1))


def convolution(kind: str) -> Problem:
    make, shape = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    return of(Flat(make(), *shape), 7, *shape)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_with_groups_and_transposed_ones(kind: str, tmp_path: Path) -> None:
    problem = convolution(kind)
    diagonal = estimate(problem, "empirical_fisher", "diag")
    for structure in ("kfac", "kfac:sharing=reduce", "kfac:bias=separate", "tkfac", "tkfac:sharing=reduce", "ekfac"):
        ours = estimate(problem, "empirical_fisher", structure)
        assert (ours.kind, ours.info.backend) == (structure.partition(":")[0], "hooks")
        dense = ours.to_dense()
        assert close(dense, estimate(problem, "empirical_fisher", structure, backend="torch").to_dense())
        assert close(ours.diagonal(), dense.diagonal())
        if structure.startswith(("tkfac", "ekfac")):
            assert close(ours.trace(), diagonal.trace())
        vector = torch.randn(len(dense), dtype=torch.float64)
        damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
        assert close(ours.solve(vector, damping=0.1), torch.linalg.solve(damped, vector))
        ours.save(tmp_path / "m.safetensors")
        assert close(curvlab.load(tmp_path / "m.safetensors").to_dense(), dense, rtol=1e-14)


class Parallel(nn.Module):
    """Convolutions of parts of the channels, side by side: a convolution with groups."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        transposed = isinstance(conv, nn.modules.conv._ConvTransposeNd)
        channels, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        names = ("stride", "padding", "dilation", "padding_mode", *(["output_padding"] if transposed else []))
        options = {name: getattr(conv, name) for name in names}
        self.parts = nn.ModuleList(
            type(conv)(channels, outputs, conv.kernel_size, bias=conv.bias is not None, **options)
            for _ in range(conv.groups)
        )
        for name, parameter in conv.named_parameters():
            for part, own in zip(self.parts, parameter.detach().unflatten(0, (conv.groups, -1)), strict=True):
                part.get_parameter(name).data = own.clone()

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.chunk(len(self.parts), dim=1)
        return torch.cat([part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)], dim=1)


@pytest.mark.parametrize("structure", KRONECKER)
@pytest.mark.parametrize("kind", [kind for kind in CONVOLUTIONS if kind != "transposed"])
def test_groups_are_convolutions_side_by_side(kind: str, structure: str) -> None:
    problem = convolution(kind)
    conv = problem.model.conv
    model = Flat.__new__(Flat)
    nn.Module.__init__(model)
    model.conv, model.out = Parallel(conv), problem.model.out
    apart = Problem(model, "cross_entropy", list(problem.batches()))
    one, other = (estimate(each, "empirical_fisher", structure, params="conv.*") for each in (problem, apart))
    numbers = one.space.unflatten(torch.arange(one.space.total))
    by_group = [number.flatten().view(conv.groups, -1) for number in numbers.values()]
    order = torch.cat([part[group] for group in range(conv.groups) for part in by_group])
    assert close(one.to_dense()[order][:, order], other.to_dense())


def test_a_transposed_convolution_without_a_stride_is_a_mirrored_convolution() -> None:
    torch.manual_seed(0)
    transposed, plain = nn.ConvTranspose2d(2, 3, (2, 3)), nn.Conv2d(2, 3, (2, 3), padding=(1, 2))
    with torch.no_grad():
        plain.weight.copy_(transposed.weight.transpose(0, 1).flip(2, 3))
        plain.bias.copy_(transposed.bias)
    model = Flat(transposed, 2, 3, 4)
    problem = of(model, 7, 2, 3, 4)
    one = estimate(problem, "empirical_fisher", "kfac", params="conv.*")
    model.conv = plain.double()
    other = estimate(problem.with_data(list(problem.batches())), "empirical_fisher", "kfac", params="conv.*")
    weight = torch.arange(36).view(2, 3, 2, 3).transpose(0, 1).flip(2, 3).flatten()
    order = torch.cat([weight, torch.arange(36, 39)])
    assert close(one.to_dense()[order][:, order], other.to_dense())


def test_an_output_size_at_the_call_gives_a_transposed_convolution_its_diagonal() -> None:
    class Sized(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x, output_size=(6, 4)).tanh().flatten(1))

    torch.manual_seed(0)
    model = Sized(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), 2, 3, 2)
    model.conv.output_padding = (0, 0)
    problem = of(model, 7, 2, 3, 2)
    matrix = estimate(problem, "empirical_fisher", "kfac")
    assert matrix.parts[1].space.names == ("conv.weight", "conv.bias")
    assert close(matrix.parts[1].diagonal(), diagonals(problem, ["conv.weight", "conv.bias"]))


# Experts -------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts: every token of the flattened batch goes to one of them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(4, experts)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        weights, chosen = self.gate(tokens).softmax(dim=1).max(dim=1)
        mixed = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            mixed = mixed.masked_scatter(mask.unsqueeze(1), weights[mask].unsqueeze(1) * expert(tokens[mask]))
        return self.out(mixed.view_as(x).tanh().mean(dim=1))


@pytest.mark.parametrize("structure", KRONECKER)
def test_experts_that_see_some_of_the_tokens_have_their_diagonal(structure: str) -> None:
    """Which sample a row belongs to cannot be seen from a call."""
    torch.manual_seed(0)
    problem = of(Experts(2), 7, 3, 4)
    matrix = estimate(problem, "empirical_fisher", structure)
    factors, rest = matrix.parts
    assert factors.space.names == ("out.weight", "out.bias")
    assert close(rest.diagonal(), diagonals(problem, list(rest.space.names)))
    assert close(matrix.to_dense(), estimate(problem, "empirical_fisher", structure, backend="torch").to_dense())
    said = " ".join(matrix.info.rejected)
    assert "experts.0.weight belongs to Linear experts.0, whose input does not have one row per sample: (" in said


@pytest.mark.parametrize("structure", ["diag", *KRONECKER])
def test_experts_that_see_all_samples_at_first(structure: str) -> None:
    """In the verification, the input of the first expert has one row per sample; in one batch it has not."""
    torch.manual_seed(0)
    model = Experts(2).double()
    with torch.no_grad():
        model.gate.weight.copy_(torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 0]]))
        model.gate.bias.zero_()
    x, y = torch.randn(20, 1, 4, dtype=torch.float64), torch.arange(20) % 3
    x[..., 0] = 1
    x[5, 0, 0] = -1
    problem = Problem(model, "cross_entropy", list(zip(x.split(4), y.split(4), strict=True)))
    found, right = (estimate(problem, "empirical_fisher", structure, backend=name) for name in ("auto", "torch"))
    assert close(found.to_dense(), right.to_dense())
    said = " ".join(found.info.rejected)
    assert "experts.0.weight belongs to Linear experts.0, whose input does not have one row per sample: (3, 4)" in said


class Routed(nn.Module):
    """Two tokens per sample, which the sign of their first entry sends to one of two experts."""

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positive, self.negative, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.by = by
        self.double()

    def _rows(self, wanted: Tensor) -> Tensor:
        if self.by == "mask":
            return wanted
        if self.by == "sort":
            return wanted.int().argsort(descending=True, stable=True)[: int(wanted.sum())]
        return wanted.int().topk(int(wanted.sum())).indices if self.by == "topk" else wanted.nonzero()[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        mixed = tokens.new_zeros(len(tokens), 5)
        for expert, wanted in ((self.positive, tokens[:, 0] > 0), (self.negative, tokens[:, 0] <= 0)):
            rows = self._rows(wanted)
            mixed[rows] = expert(tokens[rows])
        return self.out(mixed.view(len(x), 2, 5).sum(dim=1).tanh())


@pytest.mark.parametrize("by", ["mask", "sort", "topk", "nonzero"])
@pytest.mark.parametrize("structure", ["diag", "kfac"])
def test_experts_with_as_many_rows_as_samples(structure: str, by: str) -> None:
    """Every batch has a row per sample for each expert; in the verification, they are of these samples."""
    x, y = torch.randn(40, 2, 4, dtype=torch.float64), torch.arange(40) % 3
    x[:, 0, 0], x[:, 1, 0] = 1, -1
    x[[4, 9, 26], :, 0], x[[5, 8, 27], :, 0] = 1, -1  # two tokens of one sample, none of another
    problem = Problem(Routed(by), "cross_entropy", list(zip(x.split(10), y.split(10), strict=True)))
    for quantity in ("empirical_fisher", "fisher"):
        for size in (None, 4, 20):
            found = estimate(problem, quantity, structure, batch_size=size)
            right = estimate(problem, quantity, "diag", backend="torch").diagonal()
            if structure == "kfac":
                assert found.parts[0].space.names == ("out.weight", "out.bias")
            part = found if structure == "diag" else found.parts[1]
            assert close(part.diagonal(), right[: part.space.total])


# Padding -------------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A model of padded sequences: an embedding, torch's encoder, a shared block, and a pooled output.

    Args:
        pooling: ``first`` token, masked ``mean``, or ``all``: the mean over all positions, with the padding.
    """

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.wte, self.shared = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.shared(self.wte(input_ids)).tanh()
        h = self.shared(self.block(h, src_key_padding_mask=attention_mask == 0))
        if self.pooling == "first":
            return self.out(h[:, 0])
        weights = (attention_mask if self.pooling == "mean" else torch.ones_like(attention_mask)).to(h)
        return self.out((h * weights.unsqueeze(2)).sum(dim=1) / weights.sum(dim=1, keepdim=True))


LENGTHS = (1, 2, 3, 3, 2, 4, 1)


def sequences(more: int, size: int) -> list[dict[str, Tensor]]:
    """Return batches of sequences that are padded to the longest of all, and by some tokens more."""
    tokens = [torch.randint(7, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(LENGTHS)]
    width = max(LENGTHS) + more
    ids = torch.stack([nn.functional.pad(t, (0, width - len(t)), value=3) for t in tokens])
    mask = torch.stack([nn.functional.pad(torch.ones_like(t), (0, width - len(t))) for t in tokens])
    parts = zip(ids.split(size), mask.split(size), (torch.arange(len(ids)) % 3).split(size), strict=True)
    return [{"input_ids": x, "attention_mask": m, "labels": y} for x, m, y in parts]


def of_sequences(model: nn.Module, batches: list[dict[str, Tensor]], mask: str = "attention_mask") -> Problem:
    return Problem(
        model,
        "cross_entropy",
        batches,
        forward=lambda m, batch: m(batch["input_ids"], batch[mask]),
        targets=lambda batch: batch["labels"],
    )


def masked(pooling: str) -> nn.Module:
    torch.manual_seed(0)
    return Masked(pooling).double().eval()


FORMS = ("kfac", "kfac:sharing=reduce", "kfac:factors=inputs", "kfac:bias=separate", "tkfac", "tkfac:variant=rescaled")


@pytest.mark.parametrize("pooling", ["first", "mean", "all"])
@pytest.mark.parametrize("structure", [*FORMS, "ekfac"])
def test_padding_against_the_reference(structure: str, pooling: str) -> None:
    """With each of two quantities for half of the forms and poolings."""
    turn = [*FORMS, "ekfac"].index(structure) + ["first", "mean", "all"].index(pooling)
    quantity = ("empirical_fisher", "fisher")[turn % 2]
    problem = of_sequences(masked(pooling), sequences(2, 3))
    ours = estimate(problem, quantity, structure)
    theirs = estimate(problem, quantity, structure, backend="torch")
    assert [part.info.backend for part in ours.parts] == ["hooks", "hooks"]
    assert close(ours.to_dense(), theirs.to_dense(), rtol=1e-9)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("structure", [*FORMS, "ekfac"])
def test_more_padding_and_other_batches_change_nothing(structure: str, pooling: str) -> None:
    model = masked(pooling)
    expected = estimate(of_sequences(model, sequences(0, 7)), "empirical_fisher", structure).to_dense()
    for more, size in ((0, 2), (5, 3)):
        problem = of_sequences(model, sequences(more, size))
        for backend in ("hooks", "torch"):
            found = estimate(problem, "empirical_fisher", structure, backend=backend).to_dense()
            assert close(found, expected, rtol=1e-9)


@pytest.mark.parametrize("structure", ["kfac", "tkfac", "ekfac"])
def test_sequences_of_their_own_lengths_need_no_padding(structure: str) -> None:
    """The same as one batch per length, without padding."""
    model, (whole,) = masked("mean"), sequences(1, 7)
    apart = []
    for length in sorted(set(LENGTHS)):
        own = {name: tensor[whole["attention_mask"].sum(dim=1) == length] for name, tensor in whole.items()}
        apart.append({name: tensor[:, :length] if tensor.ndim > 1 else tensor for name, tensor in own.items()})
    one, other = (
        estimate(of_sequences(model, batches), "empirical_fisher", structure).to_dense() for batches in ([whole], apart)
    )
    assert close(one, other, rtol=1e-9)


def test_padding_that_has_a_gradient_counts() -> None:
    """In a model that averages over all positions, padding is like any other position."""
    model = masked("all")
    batches = sequences(2, 3)
    renamed = [{"other": batch["attention_mask"], **batch} for batch in batches]
    for batch in renamed:
        del batch["attention_mask"]
    problems = of_sequences(model, batches), of_sequences(model, renamed, "other")
    one, other = (estimate(problem, "empirical_fisher", "kfac", params="shared.*") for problem in problems)
    assert close(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("unit", ["sample", "term"])
@pytest.mark.parametrize("structure", ["kfac", "tkfac", "ekfac"])
def test_padding_of_models_of_hugging_face(structure: str, unit: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=7,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=6,
            max_position_embeddings=12,
            num_labels=3,
        )
        model = transformers.BertForTokenClassification(config)
    else:
        config = transformers.GPT2Config(vocab_size=7, n_positions=12, n_embd=4, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    matrices = []
    for more, size in ((0, 7), (4, 2)):
        batches = sequences(more, size)
        for batch in batches:
            batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
        problem = Problem(model.double().eval(), data=batches, unit=unit)
        params = [name for name in problem.space.names if "position" not in name and "wpe" not in name]
        matrices.append(estimate(problem, "empirical_fisher", structure, params=params))
        assert any("attn" in name or "attention" in name for name in matrices[-1].parts[0].space.names)
    assert close(matrices[0].to_dense(), matrices[1].to_dense(), rtol=1e-8)


class Named(nn.Linear):
    """A subclass with the forward of its base class, as torch's own ``NonDynamicallyQuantizableLinear``."""


def test_a_subclass_with_the_same_forward_has_factors() -> None:
    torch.manual_seed(0)
    problem = of(nn.Sequential(Named(4, 5), nn.Tanh(), nn.Linear(5, 3)), 7, 4)
    matrix = estimate(problem, "fisher", "kfac")
    assert not matrix.info.rejected
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain.load_state_dict(problem.model.state_dict())
    assert close(matrix.to_dense(), estimate(problem.with_model(plain), "fisher", "kfac").to_dense())


@pytest.mark.parametrize(("samples", "batch_size"), [(3, None), (3, 2), (7, None)])
def test_a_layer_that_is_also_called_on_a_table(samples: int, batch_size: int | None) -> None:
    """As DoRA calls its factors on an identity matrix, which may have as many rows as there are samples."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.first(5 * torch.eye(3, dtype=x.dtype)).norm().detach()
            return self.second((self.first(x) / norm).tanh())

    torch.manual_seed(0)
    x, y = torch.randn(samples, 3, dtype=torch.float64), torch.randint(3, (samples,))
    problem = Problem(Scaled().double(), "cross_entropy", (x, y))
    matrix = estimate(problem, "fisher", "kfac", batch_size=batch_size)
    own = slice(0, 12)  # of the first layer, which has no factors
    assert torch.allclose(matrix.diagonal()[own], estimate(problem, "fisher", "diag").diagonal()[own], rtol=1e-10)
    reason = "also called on rows that are not samples" if samples == 3 else "does not have one row per sample"
    assert any(reason in phrase for phrase in matrix.info.rejected)
