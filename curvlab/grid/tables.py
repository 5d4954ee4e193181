"""Tables of a store: one row per record, and means over the seeds."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from curvlab.errors import CurvlabError
from curvlab.grid.run_spec import canonical

if TYPE_CHECKING:
    import pandas as pd

#: Executes an SQL query with its parameters and returns the rows.
Query = Callable[..., list[Any]]


def varied_keys(query: Query) -> list[str]:
    """Return the keys whose values differ between the configurations of the sweep, except the key of the seed."""
    rows = query(
        "SELECT name FROM (SELECT entry.key AS name, count(*) AS number FROM runs, json_each(config) AS entry "
        "WHERE position IS NOT NULL AND entry.key <> seed_key GROUP BY entry.key, entry.type, entry.value) "
        "GROUP BY name HAVING count(*) > 1 "
        "OR sum(number) < (SELECT count(*) FROM runs WHERE position IS NOT NULL) ORDER BY name"
    )
    return [name for (name,) in rows]


def read_records(query: Query) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yield ``(key, status)`` of the run and the record, for each record in the order of the sweep."""
    rows = query(
        "SELECT runs.key, status, row, entries.name, type, value FROM entries JOIN runs ON runs.key = run "
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


def record_table(query: Query) -> "pd.DataFrame":
    """Return the table of ``Store.table``."""
    axes = varied_keys(query)
    columns = (
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
    runs = query(f"SELECT {', '.join(columns)} FROM runs WHERE position IS NOT NULL ORDER BY position")
    records: dict[str, list[dict[str, Any]]] = {}
    for (key, _), record in read_records(query):
        records.setdefault(key, []).append(record)
    rows = []
    for values in runs:
        run = dict(zip(columns, values, strict=True))
        config = json.loads(run.pop("config"))
        head = {"run": run.pop("key"), "status": run.pop("status"), "kind": run.pop("kind")}
        head |= {f"config.{name}": _to_text(config.get(name)) for name in axes} | {"config.seed": run.pop("seed")}
        tail = {f"run.{name}": value for name, value in run.items()}
        rows += [head | record | tail for record in records.get(head["run"], [{}])]
    number = {name: place for place, name in enumerate(dict.fromkeys(name for row in rows for name in row))}
    ordered = sorted(number, key=lambda name: (name.startswith("run."), number[name]))
    return _make_frame(rows, ordered)


def summary_table(query: Query, by: Sequence[str], values: Sequence[str] | None) -> "pd.DataFrame":
    """Return the table of ``Store.summary``.

    Args:
        query: Function that queries the store, on a connection with the aggregates of ``curvlab.grid.aggregates``.
        by: As for ``Store.summary``.
        values: As for ``Store.summary``.

    Raises:
        CurvlabError: As ``Store.summary``.
    """
    here = "runs.position IS NOT NULL AND runs.status = 'done'"
    rows = query(
        f"SELECT e.name, type, count(*) FROM entries AS e JOIN runs ON runs.key = run WHERE {here} "
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
            f"the records have {twice[0]}_std, which is also the name of the standard deviation of {twice[0]}; "
            "give with --values the keys to average, without one of the two"
        )
    joins = "".join(
        f" LEFT JOIN entries AS g{n} ON g{n}.run = e.run AND g{n}.row = e.row AND g{n}.name = ?"
        for n in range(len(groups))
    )
    keys = ", ".join(["point", *(f"g{n}.value" for n in range(len(groups)))])
    found = query(
        f"SELECT e.name, mean(e.value), std(e.value), count(*), count(DISTINCT e.run), {keys} "
        f"FROM entries AS e JOIN runs ON runs.key = e.run{joins} "
        f"WHERE {here} AND e.name IN (SELECT value FROM json_each(?)) "
        f"GROUP BY e.name, {keys} ORDER BY min(position), min(e.row), min(e.number)",
        (*groups, json.dumps(averaged)),
    )
    seeds = {
        tuple(group): count
        for count, *group in query(
            f"SELECT count(DISTINCT e.run), {keys} FROM entries AS e "
            f"JOIN runs ON runs.key = e.run{joins} WHERE {here} GROUP BY {keys}",
            groups,
        )
    }
    tables: dict[Any, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for name, mean, std, count, runs, point, *group in found:
        if count > runs:
            raise CurvlabError(
                f"a run has {count // runs} records in the same group; give the keys that distinguish them with "
                f"--by (one or several of {', '.join(n for n in known if n not in groups)})"
            )
        row = tables.setdefault(point, {}).setdefault(tuple(group), {"seeds": seeds[point, *group]})
        if runs < row["seeds"]:  # a run without the number counts as one with None
            mean = std = None
        row |= {name: mean, f"{name}_std": std}
    axes = varied_keys(query)
    points = query(
        "SELECT point, min(config), sum(status = 'done'), sum(status = 'failed'), sum(status = 'absent') "
        "FROM runs WHERE position IS NOT NULL GROUP BY point ORDER BY min(position)"
    )
    lines = []
    for point, config, done, failed, absent in points:
        whole = json.loads(config)
        head = {f"config.{name}": _to_text(whole.get(name)) for name in axes}
        for group, row in tables.get(point, {(): {"seeds": done}}).items():
            named = dict(zip(groups, group, strict=True)) if group else {}
            lines.append(head | named | {"seeds": row.pop("seeds"), "failed": failed, "absent": absent} | row)
    columns = [f"config.{name}" for name in axes] + groups + ["seeds", "failed", "absent"]
    columns += [name for value in averaged for name in (value, f"{value}_std")]
    return _make_frame(lines, columns)


def _make_frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> "pd.DataFrame":
    # As objects: a column of integers with a gap keeps integers, and NaN differs from a missing value, which is None.
    import pandas as pd

    return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=list(columns), dtype=object)


def _to_text(value: Any) -> Any:
    return canonical(value) if isinstance(value, list | dict) else value
