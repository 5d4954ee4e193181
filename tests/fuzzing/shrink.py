"""Makes a failing cell small, and a script of it."""

import inspect
from collections.abc import Callable

from . import oracle
from .cells import Cell, smaller
from .judge import Verdict, judge
from .source import source


def shrink(
    cell: Cell, verdict: Verdict, judge: Callable[[Cell], Verdict] = judge, effort: int = 80
) -> tuple[Cell, Verdict]:
    """Return a cell with less in it that still fails with the same word, and its verdict, after some tries at most."""
    again = True
    while again:
        again = False
        for candidate in smaller(cell):
            if effort == 0:
                return cell, verdict
            effort -= 1
            found = judge(candidate)
            if found.word == verdict.word and (found.word != "raw" or found.told == verdict.told):
                cell, verdict, again = candidate, found, True
                break
    return cell, verdict


def script(cell: Cell, verdict: Verdict) -> str:
    """Return a script that needs torch and curvlab alone and shows what came of a cell."""
    lines = [f"# cell {cell.seed}, {verdict.word}: {verdict.told}", source(cell)]
    compared = verdict.word == "wrong" and not cell.refusal and cell.structure != "diagonality"
    if compared and cell.quantity.startswith("fisher:"):
        options = cell.quantity.partition(":")[2].replace(",", "), int(").replace("samples=", "").replace("seed=", "")
        lines += [
            "import numpy as np",
            f"k, seed = int({options})",
            "model, (x, y) = make(), samples()",
            "outputs = torch.cat([model(x[n : n + 1].clone()) for n in range(len(x))]).detach()",
            f"drawn = LOSSES[{cell.loss!r}].sample(outputs, k, np.random.default_rng(seed))",
        ]
    elif compared:
        lines.append("drawn = None")
    if compared:
        lines += [
            inspect.getsource(oracle).partition('"""\n\n')[2],
            f"right = curvature(make(), {cell.quantity!r}, {cell.loss!r}, *samples(), drawn)",
        ]
    lines += ["answer = ask(make(), data())", "print(answer)"]
    if compared:
        lines += [
            "sizes = {name: p.numel() for name, p in make().named_parameters() if p.requires_grad}",
            "asked = torch.cat([torch.full((n,), name in answer.space.names) for name, n in sizes.items()])",
            "print('diagonal, curvlab', answer.to_dense().diagonal())",
            "print('diagonal, right  ', right.diagonal()[asked])",
        ]
    if cell.damping:
        lines += [
            "size = answer.space.total",
            f"print(answer.solve(torch.ones(size).double(), damping={cell.damping}))",
        ]
    return "\n".join(lines) + "\n"
