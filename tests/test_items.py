"""Every published item has an analysis, or a call of the library with a test."""

from pathlib import Path

import pytest

from curvlab.analyze import ANALYSES, ROOMS
from curvlab.analyze.frame import pages
from curvlab.analyze.frame.items import read_items
from curvlab.analyze.frame.pages import list_items

ROOT = Path(pages.__file__).parents[3]
ITEMS = read_items()


def test_items_are_numbered_in_order():
    assert [item.number for item in ITEMS] == list(range(1, 48))
    assert {item.paper for item in ITEMS} == set(ROOMS)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: str(item.number))
def test_every_item_has_a_command_or_a_call_with_a_test(item):
    assert item.analyses or item.call
    assert all(name in ANALYSES for name in item.analyses)
    assert bool(item.call) == bool(item.test)
    if item.call:
        module, _, name = item.call.rpartition(".")
        assert callable(getattr(__import__(module, fromlist=[name]), name))
        assert name in (ROOT / item.test).read_text()


def test_the_table_has_every_item_and_the_verdicts_of_kept_results(tmp_path: Path):
    rows = list_items(tmp_path)
    assert {row["number"] for row in rows} == {item.number for item in ITEMS}
    assert all(row["command"] for row in rows)
    if (ROOT / "analyses").is_dir():
        kept = [row for row in list_items(ROOT / "analyses") if row["number"] == 4 and row.get("preset") == "paper"]
        assert [row["command"] for row in kept] == ["fim_diagonality"]
        assert sum(kept[0][verdict] for verdict in ("reproduced", "not reproduced", "not tested")) > 0
