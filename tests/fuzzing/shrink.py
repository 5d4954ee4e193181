"""Reduction of a failing case, and a script that reproduces it."""

import inspect
from collections.abc import Callable

from . import oracle
from .cases import Case, make_smaller
from .judge import Verdict, judge
from .source import source


def shrink(
    case: Case, verdict: Verdict, judge: Callable[[Case], Verdict] = judge, effort: int = 80
) -> tuple[Case, Verdict]:
    """Return a smaller case that fails with the same outcome, and its verdict, after at most ``effort`` trials."""
    again = True
    while again:
        again = False
        for candidate in make_smaller(case):
            if effort == 0:
                return case, verdict
            effort -= 1
            found = judge(candidate)
            if found.outcome == verdict.outcome and (found.outcome != "error" or found.reason == verdict.reason):
                case, verdict, again = candidate, found, True
                break
    return case, verdict


def script(case: Case, verdict: Verdict) -> str:
    """Return a script that reproduces a case and needs only torch and curvlab."""
    lines = [f"# case {case.seed}, {verdict.outcome}: {verdict.reason}", source(case)]
    compared = verdict.outcome == "wrong" and not case.refusal and case.structure != "diagonality"
    if compared and case.quantity.startswith("fisher:"):
        options = case.quantity.partition(":")[2].replace(",", "), int(").replace("samples=", "").replace("seed=", "")
        lines += [
            "import numpy as np",
            f"k, seed = int({options})",
            "model, (x, y) = make(), samples()",
            "outputs = torch.cat([model(x[n : n + 1].clone()) for n in range(len(x))]).detach()",
            f"drawn = LOSSES[{case.loss!r}].sample(outputs, k, np.random.default_rng(seed))",
        ]
    elif compared:
        lines.append("drawn = None")
    if compared:
        lines += [
            inspect.getsource(oracle).partition('"""\n\n')[2],
            f"right = curvature(make(), {case.quantity!r}, {case.loss!r}, *samples(), drawn)",
        ]
    lines += ["answer = ask(make(), data())", "print(answer)"]
    if compared:
        lines += [
            "sizes = {name: p.numel() for name, p in make().named_parameters() if p.requires_grad}",
            "asked = torch.cat([torch.full((n,), name in answer.space.names) for name, n in sizes.items()])",
            "print('diagonal, curvlab', answer.to_dense().diagonal())",
            "print('diagonal, right  ', right.diagonal()[asked])",
        ]
    if case.damping:
        lines += [
            "size = answer.space.total",
            f"print(answer.solve(torch.ones(size).double(), damping={case.damping}))",
        ]
    return "\n".join(lines) + "\n"
