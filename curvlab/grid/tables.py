"""Tables of what is in a store: its records, a row each, and their means over the seeds."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from curvlab.errors import CurvlabError
from curvlab.grid.cell import canonical

#: From SQL and its values to rows.
Query = Callable[..., list[Any]]


def varied_keys(query: Query) -> list[str]:
    """Return the keys whose values differ between the configurations of the sweep, the seed left out."""
    rows = query(
        "SELECT name FROM (SELECT entry.key AS name, count(*) AS number FROM cells, json_each(config) AS entry "
        "WHERE position IS NOT NULL AND entry.key <> seed_name GROUP BY entry.key, entry.type, entry.value) "
        "GROUP BY name HAVING count(*) > 1 "
        "OR sum(number) < (SELECT count(*) FROM cells WHERE position IS NOT NULL) ORDER BY name"
    )
    return [name for (name,) in rows]


def read_records(query: Query) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yield ``(key, status)`` and each record of the sweep, in its order."""
    rows = query(
        "SELECT cells.key, status, row, entries.name, type, value FROM entries JOIN cells ON cells.key = cell "
        "WHERE position IS NOT NULL ORDER BY position, row, number"
    )
    last, record = None, {}
    for key, status, row, name, kind, value in rows:
        if last is not None and last != (key, status, row):
            yield last[:2], record
            record = {}
        last = (key, status, row)
        record[name] = math.nan if kind == "float" and value is None else bool(value) if kind == "bool" else value
    if last is not None:
        yield last[:2], record


def record_table(query: Query) -> pd.DataFrame:
    """Return a row a record: the cell, its axes (``config.NAME``), the record, what it took, and how it failed.

    A cell without records, failed or absent, has a row too.
    """
    axes = varied_keys(query)
    described = (
        "key",
        "status",
        "kind",
        "error",
        "config",
        "seed",
        "seconds",
        "peak_bytes",
        "host",
        "threads",
        "software",
        "ended",
    )
    cells = query(f"SELECT {', '.join(described)} FROM cells WHERE position IS NOT NULL ORDER BY position")
    of_cell: dict[str, list[dict[str, Any]]] = {}
    for (key, _), record in read_records(query):
        of_cell.setdefault(key, []).append(record)
    rows = []
    for values in cells:
        cell = dict(zip(described, values, strict=True))
        config = json.loads(cell.pop("config"))
        head = {"cell": cell.pop("key"), "status": cell.pop("status"), "kind": cell.pop("kind")}
        head |= {f"config.{name}": _text(config.get(name)) for name in axes} | {"config.seed": cell.pop("seed")}
        tail = {f"cell.{name}": value for name, value in cell.items()}
        rows += [head | record | tail for record in of_cell.get(head["cell"], [{}])]
    number = {name: place for place, name in enumerate(dict.fromkeys(name for row in rows for name in row))}
    ordered = sorted(number, key=lambda name: (name.startswith("cell."), number[name]))
    return _frame(rows, ordered)


def summary_table(query: Query, by: Sequence[str], values: Sequence[str] | None) -> pd.DataFrame:
    """Return what ``curvlab.grid.store.Store.summary`` returns.

    Args:
        query: Asks the store, by a connection that has ``mean`` and ``std`` of ``curvlab.grid.aggregates``.
        by: The keys of the records that make a group; strings always do.
        values: The keys of the numbers to average; None for all but ``seed``.

    Raises:
        CurvlabError: As ``Store.summary``.
    """
    here = "cells.position IS NOT NULL AND cells.status = 'done'"
    rows = query(
        f"SELECT e.name, type, count(*) FROM entries AS e JOIN cells ON cells.key = cell WHERE {here} "
        "GROUP BY e.name, type ORDER BY min(number), e.name"
    )
    known = list(dict.fromkeys(name for name, _, _ in rows))
    texts = [name for name, kind, _ in rows if kind == "str"]
    numbers = [name for name, kind, _ in rows if kind in ("int", "float")]
    for name in (*by, *(values or ())):
        if known and name not in known:
            raise CurvlabError(f"no record has {name!r}; they have {', '.join(known)}")
    groups = list(dict.fromkeys([*texts, *by]))
    averaged = [n for n in dict.fromkeys(numbers) if n not in (*groups, "seed") and (values is None or n in values)]
    if twice := [name for name in averaged if f"{name}_std" in (*groups, *averaged)]:
        raise CurvlabError(
            f"the records have {twice[0]}_std, which is what the standard deviation of {twice[0]} is called here; "
            "name with --values those to average, without one of the two"
        )
    joins = "".join(
        f" LEFT JOIN entries AS g{n} ON g{n}.cell = e.cell AND g{n}.row = e.row AND g{n}.name = ?"
        for n in range(len(groups))
    )
    keys = ", ".join(["point", *(f"g{n}.value" for n in range(len(groups)))])
    found = query(
        f"SELECT e.name, mean(e.value), std(e.value), count(*), count(DISTINCT e.cell), {keys} "
        f"FROM entries AS e JOIN cells ON cells.key = e.cell{joins} "
        f"WHERE {here} AND e.name IN (SELECT value FROM json_each(?)) "
        f"GROUP BY e.name, {keys} ORDER BY min(position), min(e.row), min(e.number)",
        (*groups, json.dumps(averaged)),
    )
    seeds = {
        tuple(group): count
        for count, *group in query(
            f"SELECT count(DISTINCT e.cell), {keys} FROM entries AS e "
            f"JOIN cells ON cells.key = e.cell{joins} WHERE {here} GROUP BY {keys}",
            groups,
        )
    }
    tables: dict[Any, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for name, mean, std, count, cells, point, *group in found:
        if count > cells:
            raise CurvlabError(
                f"a cell has {count // cells} records of the same group; name what tells them apart with "
                f"--by (one or several of {', '.join(n for n in known if n not in groups)})"
            )
        row = tables.setdefault(point, {}).setdefault(tuple(group), {"seeds": seeds[point, *group]})
        if cells < row["seeds"]:  # a seed without the number: as one with None
            mean = std = None
        row |= {name: mean, f"{name}_std": std}
    axes = varied_keys(query)
    points = query(
        "SELECT point, min(config), sum(status = 'done'), sum(status = 'failed'), sum(status = 'absent') "
        "FROM cells WHERE position IS NOT NULL GROUP BY point ORDER BY min(position)"
    )
    lines = []
    for point, config, done, failed, absent in points:
        whole = json.loads(config)
        head = {f"config.{name}": _text(whole.get(name)) for name in axes}
        for group, row in tables.get(point, {(): {"seeds": done}}).items():
            named = dict(zip(groups, group, strict=True)) if group else {}
            lines.append(head | named | {"seeds": row.pop("seeds"), "failed": failed, "absent": absent} | row)
    columns = [f"config.{name}" for name in axes] + groups + ["seeds", "failed", "absent"]
    columns += [name for value in averaged for name in (value, f"{value}_std")]
    return _frame(lines, columns)


def _frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    # As objects: a column of integers with a gap stays one of integers, and NaN is told from nothing, which is None.
    return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=list(columns), dtype=object)


def _text(value: Any) -> Any:
    return canonical(value) if isinstance(value, list | dict) else value
