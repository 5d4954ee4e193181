"""Makes a failing cell small, and a script of it."""

import inspect

from . import oracle
from .cells import Cell, smaller
from .judge import Verdict, judge


def shrink(cell: Cell, verdict: Verdict, effort: int = 80) -> tuple[Cell, Verdict]:
    """Return a cell with less in it that still fails with the same word, and its verdict; after so many tries at most."""
    again = True
    while again and effort > 0:
        again = False
        for candidate in smaller(cell):
            effort -= 1
            try:
                found = judge(candidate)
            except Exception:  # a cell without that step may be none
                continue
            if found.word == verdict.word and (found.word != "raw" or found.signature == verdict.signature):
                cell, verdict, again = candidate, found, True
                break
            if effort <= 0:
                break
    return cell, verdict


def script(cell: Cell, verdict: Verdict) -> str:
    """Return a script that needs torch and curvlab alone and shows the failure."""
    lines = [f"# cell {cell.seed}, {verdict.word}: {verdict.told}", cell.source(), ""]
    plain = cell.structure in ("diag", "dense", "block_diag", "implicit")
    if verdict.word == "wrong" and plain and not cell.refusal and ":" not in cell.quantity:
        lines += [
            inspect.getsource(oracle).partition('"""\n\n')[2],
            "",
            f"right = curvature(make(), {cell.quantity!r}, {cell.loss!r}, *samples())",
            "matrix = ask(make(), data())",
            "print('right  ', right.diagonal())",
            "print('curvlab', matrix.to_dense().diagonal())",
        ]
    else:
        lines += ["model = make()", "answer = ask(model, data())", "print(answer)"]
        if cell.damping:
            lines += [
                "size = answer.space.total",
                f"print(answer.solve(torch.ones(size).double(), damping={cell.damping}))",
            ]
    return "\n".join(lines) + "\n"
