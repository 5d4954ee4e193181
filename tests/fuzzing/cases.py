"""Cases: a network, data, a loss and a combination of quantity, structure and backend, all drawn from one seed."""

from dataclasses import dataclass, replace
from random import Random

from curvlab.estimators import BACKENDS

from .decorations import DECORATIONS
from .draft import Draft, Step, UnfitError
from .layers import LAYERS, ODD

_STEPS = LAYERS | ODD | DECORATIONS
MOST_PARAMETERS = 300


@dataclass(frozen=True)
class Case:
    """A case.

    Attributes:
        seed: Seed from which it was drawn.
        shape: Shape of an input sample.
        whole: Whether inputs are indices.
        steps: Steps of the network.
        classes: Number of outputs.
        count: Number of samples.
        repeats: Number of times that the data repeat the samples.
        loss: Name of the loss.
        quantity: String form of the quantity.
        structure: String form of the structure; ``diagonality`` for the table of that name.
        backend: Name of the backend.
        data: Expression in ``x`` and ``y``.
        batch_size: Argument ``batch_size``.
        params: Argument ``params``: a pattern, or None.
        dtype: Name of the dtype.
        around: Context manager around the call; empty for none.
        damping: Expression in ``size``, the damping for ``solve``; empty if ``solve`` is not called.
    """

    seed: int
    shape: tuple[int, ...]
    whole: bool
    steps: tuple[Step, ...]
    classes: int
    count: int
    repeats: int
    loss: str
    quantity: str
    structure: str
    backend: str
    data: str
    batch_size: int | None
    params: str | None
    dtype: str
    around: str
    damping: str

    def draft(self) -> Draft:
        """Return the network's source."""
        draft = Draft(self.shape, self.whole)
        for step in self.steps:
            try:
                draft.take(step, _STEPS[step.kind])
            except UnfitError:
                continue
        return draft

    @property
    def refusal(self) -> str | None:
        """Reason why this must be refused; None if it need not be."""
        if self.data.startswith("Growing"):
            return "the passes differ"
        return self.draft().refusal

    def kinds(self) -> list[str]:
        """Return the kinds of the steps of the network."""
        return [step.kind for step in self.steps]


def draw(seed: int) -> Case:
    """Return the case of a seed."""
    r = Random(seed)
    whole = r.random() < 0.15
    sizes = {
        "flat": (r.randint(2, 5),),
        "tokens": (r.randint(2, 4), r.randint(2, 4)),
        "image": (r.randint(1, 4), r.randint(2, 4), r.randint(2, 4)),
        "volume": (r.randint(1, 2), 2, r.randint(2, 3), 2),
    }
    shape = (r.randint(1, 3),) if whole else sizes[r.choices(list(sizes), [4, 4, 3, 0.5])[0]]
    count = r.randint(2, 12)
    classes = r.choice([1, 2, 2, 3, 3, 4, count, count + 1])  # also as many outputs as samples
    steps = _draw_steps(r, shape, whole)
    loss = r.choices(["cross_entropy", "squared_error", "binary_cross_entropy", "poisson"], [5, 3, 2, 0.3])[0]
    dtype = r.choices(["float64", "float32", "bfloat16", "float16"], [9, 0.5, 0.4, 0.1])[0]
    backend = "auto" if r.random() < 0.75 else r.choice(list(BACKENDS))
    quantity, structure = _draw_combination(r, backend, count)
    if dtype != "float64":
        quantity = r.choice(["empirical_fisher", "fisher", "ggn"])
        structure, backend = r.choice(["diag", "diag", "dense", "block_diag"]), "auto"
    if loss == "poisson" and r.random() < 0.5:  # a loss that the reference does not know
        quantity, backend = "fisher", r.choice(["auto", "torch"])
    if quantity == "hessian":  # the oracle runs a backward pass over all samples for every parameter
        count = min(count, 4)
    # Sums that lose small terms are visible only with hundreds of terms.
    repeats = 400 // count if dtype in ("bfloat16", "float16") and r.random() < 0.25 else 1
    cut = r.randint(1, count - 1)
    order = f"generator=torch.Generator().manual_seed({r.randint(0, 99)})"
    data = r.choices(
        [
            "(x, y)",
            f"[(x[:{cut}], y[:{cut}]), (x[{cut}:], y[{cut}:])]",
            "list(zip(x.split(1), y.split(1)))",
            f"DataLoader(TensorDataset(x, y), batch_size={r.randint(1, 4)}, shuffle=True, {order})",
            f"DataLoader(TensorDataset(x, y), batch_size={r.randint(1, 2)}, drop_last=True)",
            "Growing([(x, y)])",
        ],
        [6, 3, 1, 0.6, 0.6, 0.1],
    )[0]
    if repeats > 1:
        data = f"list(zip(x.split({(cut + 1) // 2}), y.split({(cut + 1) // 2})))"
    around = r.choices(
        [
            "",
            "torch.no_grad()",
            "torch.inference_mode()",
            "parametrize.cached()",
            "torch.autocast('cpu', torch.bfloat16)",
        ],
        [20, 1, 0.3, 1, 0.3 if dtype == "float64" else 0],
    )[0]
    if any(kind in ODD for kind, _, _ in steps):
        data = "(x, y)"
    return Case(
        seed=seed,
        shape=shape,
        whole=whole,
        steps=tuple(steps),
        classes=classes,
        count=count,
        repeats=repeats,
        loss=loss,
        quantity=quantity,
        structure=structure,
        backend=backend,
        data=data,
        batch_size=r.choice([None, None, None, 1, 2, 3]),
        params=r.choice([None] * 6 + ["*weight*", "*.*"]),
        dtype=dtype,
        around=around,
        damping=r.choices(
            [
                "",
                "0.3",
                "torch.linspace(0.1, 1, size).double()",
                "float('nan')",
                "torch.full((size,), float('nan')).double()",
            ],
            [12, 1, 1, 0.2, 0.2],
        )[0],
    )


def _draw_steps(r: Random, shape: tuple[int, ...], whole: bool) -> list[Step]:
    draft, steps = Draft(shape, whole), []
    wanted = r.randint(1, 5)
    odd_at = r.randrange(wanted) if r.random() < 0.04 else None
    for _ in range(200):
        registry = ODD if len(steps) == odd_at else LAYERS
        if len(steps) >= wanted:
            break
        step = Step(registry.draw(r), len(steps), r.randrange(2**31))
        try:
            draft.take(step, registry[step.kind])
        except UnfitError:
            continue
        steps.append(step)
    for _ in range(r.choice([0, 0, 1, 1, 2, 3])):
        step = Step(DECORATIONS.draw(r), len(steps), r.randrange(2**31))
        try:
            draft.take(step, DECORATIONS[step.kind])
        except UnfitError:
            continue
        steps.append(step)
    return steps


def _draw_combination(r: Random, backend: str, count: int) -> tuple[str, str]:
    """Return a quantity and a structure that the backend has, or any backend for ``auto``."""
    if backend == "auto" and r.random() < 0.08:
        return r.choice(["fisher", "empirical_fisher", "ggn"]), "diagonality"
    backends = list(BACKENDS.values()) if backend == "auto" else [BACKENDS[backend]]
    structures_by_quantity: dict[str, set[str]] = {}
    for each in backends:
        for kind, structures in each.structures.items():
            structures_by_quantity.setdefault(kind.name, set()).update(structures)
    quantity = r.choice(sorted(structures_by_quantity))
    names = sorted(structures_by_quantity[quantity])
    structure = r.choices(names, [3 if name == "diag" else 1 for name in names])[0]
    if quantity == "fisher":
        quantity = r.choice(["fisher", f"fisher:samples={r.randint(1, 3)},seed={r.randint(0, 9)}"])
    if quantity == "masq":
        quantity = f"masq:batch_size={r.randint(1, count + 1)},norm={r.choice(['sumsq', 'mean', 'scaled'])}"
    if structure in ("kfac", "ekfac", "tkfac"):
        options = [r.choice(["", "rest=diag", "rest=diag", "rest=block_diag"]), r.choice(["", "", "sharing=reduce"])]
        options += [r.choice(["", "variant=rescaled"])] if structure == "tkfac" else []
        chosen = ",".join(option for option in options if option)
        structure += f":{chosen}" if chosen else ""
    return quantity, structure


def make_smaller(case: Case) -> list[Case]:
    """Return smaller variants of a case, those with fewer steps first."""
    fewer = [replace(case, steps=case.steps[:i] + case.steps[i + 1 :]) for i in range(len(case.steps))]
    plainer = [
        replace(case, **{key: value})
        for key, value in (
            ("around", ""),
            ("params", None),
            ("batch_size", None),
            ("damping", ""),
            ("data", "(x, y)"),
            ("repeats", 1),
            ("loss", "squared_error"),
            ("quantity", "empirical_fisher"),
            ("structure", "diag"),
            ("classes", 2),
            ("dtype", "float64"),
        )
        if getattr(case, key) != value
    ]
    less = [replace(case, count=n) for n in (2, case.count // 2) if 1 < n < case.count]
    return [*fewer, *plainer, *less]
