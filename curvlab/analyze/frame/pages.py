"""Pages generated from kept results: one README per paper, and one page that starts with the failed claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvlab.analyze import ANALYSES, ROOMS, load_analysis
from curvlab.analyze.frame.analysis import Preset, Record
from curvlab.analyze.frame.items import read_items
from curvlab.analyze.frame.results import KeptResult, read_results
from curvlab.results import Claim, Column, plus_minus
from curvlab.results.claims import format_published, sort_claims
from curvlab.results.tables import to_markdown

_MADE = "<!-- Made by `make papers` from results/*.json. -->"
_CLAIMS = (
    Column("text", "claim"),
    Column("source", "source"),
    Column("published", "published"),
    Column("ours", "ours"),
    Column("verdict", "verdict"),
)


def render_readme(root: Path, room: str) -> str:
    """Return the README of a paper: command, cost, claims and tables of each kept result.

    Args:
        root: The folder ``analyses`` of the repository.
        room: The room of the paper.
    """
    results = read_results(root, room)
    names = [name for name, entry in ANALYSES.items() if entry.room == room]
    parts = [f"# {ROOMS[room]}", _MADE]
    for name in names:
        parts.append(f"## {name}\n\n{ANALYSES[name].question}")
        mine = [result for result in results if result.name == name]
        if not mine:
            preset = " --preset cpu" if "cpu" in load_analysis(name).presets else ""
            parts.append(f"No result is kept yet. To compute one: `python -m curvlab.analyze {name}{preset}`.")
        parts += [_render_result(result) for result in mine]
    return "\n\n".join(parts) + "\n"


def _render_result(result: KeptResult) -> str:
    report, origin = result.report, result.origin
    machine = origin["machine"]
    device = machine["device_name"] or f"{machine['cores']} cores of {machine['cpu']}"
    command = f"python -m curvlab.analyze {result.name}" + (f" --preset {result.preset}" if result.preset else "")
    versions = ", ".join(f"{name} {origin['versions'][name]}" for name in ("curvlab", "torch"))
    parts = [
        f"### {result.preset or 'another configuration'}",
        f"`{command}`: {_describe_cost(result)} on {device} ({versions}).",
    ]
    if report.claims:
        parts.append(_table(report.claims))
    for table in report.tables or [report.summary]:
        parts.append(f"{table.title}\n\n{to_markdown(table.records, table.columns)}".rstrip())
    if report.identities:
        lines = [f"- {one.text}: {plus_minus(*one.mean_and_spread)}" for one in report.identities]
        parts.append("Identities and arithmetic, which no data can refute:\n\n" + "\n".join(lines))
    if report.deviations:
        lines = [f"- {line}" for line in report.deviations]
        parts.append("Differences from the published runs (published values in brackets):\n\n" + "\n".join(lines))
    parts += [str(note) for note in report.notes]
    pictures = sorted(result.file.parent.glob(f"{result.file.stem}.*.png"))
    parts += [f"![{file.stem.rpartition('.')[2]}](results/{file.name})" for file in pictures]
    return "\n\n".join(parts)


def _describe_cost(result: KeptResult) -> str:
    """Return the wall time of a result, with that of its preset, as other programs may have slowed the run down."""
    presets: Mapping[str, Preset[Any]] = load_analysis(result.name).presets
    preset = presets.get(result.preset)
    measured = f"this run took {result.minutes:.1f} min"
    return measured if preset is None or preset.minutes is None else f"about {preset.minutes:g} min; {measured}"


def _table(claims: Sequence[Claim]) -> str:
    """Return the claims as a Markdown table; those not reproduced come first."""
    ordered, reasons = sort_claims(claims)
    rows = [
        {
            "text": claim.text,
            "source": claim.source,
            "published": format_published(claim.published),
            "ours": plus_minus(claim.ours, claim.spread),
            "verdict": verdict,
        }
        for claim, verdict in ordered
    ]
    return "\n".join([to_markdown(rows, _CLAIMS), *(f"{reason}\n" for reason in reasons)]).rstrip()


def list_items(root: Path) -> list[Record]:
    """Return one record per item of the sources and kept result, in the order of the items.

    Keys: ``number``, ``room``, ``paper``, ``item``, ``command`` (the analysis, or the call of the library), ``test`` of
    a call, ``preset`` and ``minutes`` of the kept result, and the number of its claims for each verdict.

    Args:
        root: The folder ``analyses`` of the repository.
    """
    kept = [result for room in ROOMS for result in read_results(root, room)]
    rows: list[Record] = []
    for one in read_items():
        what = {"number": one.number, "room": one.paper, "paper": ROOMS[one.paper].partition(":")[0], "item": one.item}
        if one.call:
            rows.append({**what, "command": one.call, "test": one.test})
        for name in one.analyses:
            mine = [result for result in kept if result.name == name]
            rows += [{**what, "command": name, **_describe_kept(result)} for result in mine]
            if not mine:
                rows.append({**what, "command": name})
    return rows


def _describe_kept(result: KeptResult) -> Record:
    claims = result.report.claims
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS}
    return {"preset": result.preset or "another configuration", "minutes": result.minutes, **counts}


def render_index(root: Path) -> str:
    """Return the page of all papers: first the claims that were not reproduced, then one line per result.

    Args:
        root: The folder ``analyses`` of the repository.
    """
    failed, rows = [], []
    for room, citation in ROOMS.items():
        for result in read_results(root, room):
            claims = result.report.claims
            at = f"{result.name}, {result.preset or 'another configuration'}"
            failed += [
                {
                    "paper": citation.partition(":")[0],
                    "text": claim.text,
                    "published": format_published(claim.published),
                    "ours": plus_minus(claim.ours, claim.spread),
                    "seeds": claim.seeds or "none",
                    "at": at,
                }
                for claim in claims
                if claim.verdict == "not reproduced"
            ]
            rows.append({"paper": citation.partition(":")[0], "at": at, **_describe_kept(result)})
    claim_columns = (
        Column("paper", "paper"),
        Column("text", "claim"),
        Column("published", "published"),
        Column("ours", "ours"),
        Column("seeds", "holds for seeds"),
        Column("at", "analysis, preset"),
    )
    result_columns = (
        Column("paper", "paper"),
        Column("at", "analysis, preset"),
        Column("minutes", "minutes", format=lambda value: f"{value:.1f}"),
        *(Column(verdict, verdict) for verdict in VERDICTS),
    )
    item_columns = (
        Column("number", "no."),
        Column("paper", "paper"),
        Column("item", "item"),
        Column("command", "analysis, or call of the library"),
        Column("test", "test of the call"),
        Column("preset", "kept preset"),
        *result_columns[2:],
    )
    return (
        "\n\n".join(
            [
                "# Reproduction of the papers",
                "<!-- Made by `make papers` from analyses/*/results/*.json. -->",
                "## Claims that were not reproduced",
                "A claim is reproduced if it holds for every seed.",
                to_markdown(failed, claim_columns).rstrip() if failed else "None of the kept results.",
                "## All results",
                "`analyses/PAPER/README.md` has the claims, tables and deviations of each paper.",
                to_markdown(rows, result_columns).rstrip(),
                "## All items",
                "What the sources publish or state, with the analysis that regenerates it, or the call of the library "
                "and its test.",
                to_markdown(list_items(root), item_columns).rstrip(),
            ]
        )
        + "\n"
    )


VERDICTS = ("not reproduced", "reproduced", "not tested")


def write_pages(root: Path, docs: Path) -> list[Path]:
    """Write the README of every paper and the page of all papers; return the files.

    Args:
        root: The folder ``analyses`` of the repository.
        docs: The folder ``docs``.
    """
    pages = {root / room / "README.md": render_readme(root, room) for room in ROOMS if (root / room).is_dir()}
    pages[docs / "papers" / "index.md"] = render_index(root)
    for file, text in pages.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(pages)
