"""The benchmarks' files agree with one another. Whether a bar holds is measured, never asserted here."""

from __future__ import annotations

from typing import Any

import pytest

from bench.peers import NOT_RUN, PEERS
from bench.report import HIGHER_IS_BETTER, PAGE, Row, find_benchmarks, load_results, make_page

RESULTS = load_results()
ROWS = [pytest.param(row, id=f"{name}-{row.get('bar')}") for name, rows in RESULTS.items() for row in rows]
TYPES: dict[str, type | tuple[type, ...]] = {
    "bar": str,
    "ours": float,
    "peer": float,
    "peer_name": str,
    "unit": str,
    "ratio": float,
    "target": (float, type(None)),
    "holds": (bool, type(None)),
    "note": str,
    "machine": str,
}


def test_every_benchmark_has_results_and_the_other_way_round() -> None:
    assert {"train_step", "import_seconds"} <= set(find_benchmarks())
    assert set(RESULTS) == set(find_benchmarks())
    assert all(RESULTS.values())


def test_bars_are_named_once() -> None:
    bars = [row["bar"] for rows in RESULTS.values() for row in rows]
    assert len(bars) == len(set(bars))


@pytest.mark.parametrize("row", ROWS)
def test_rows_have_the_agreed_keys_and_types(row: dict[str, Any]) -> None:
    assert set(row) == set(TYPES)
    assert {key: row[key] for key, kind in TYPES.items() if not isinstance(row[key], kind)} == {}
    assert row["bar"].isidentifier()
    assert row["machine"]
    assert "load" in row["machine"]


@pytest.mark.parametrize("row", ROWS)
def test_ratio_and_verdict_follow_from_the_numbers(row: dict[str, Any]) -> None:
    ours, peer = row["ours"], row["peer"]
    ratio = ours / peer if HIGHER_IS_BETTER[row["unit"]] else peer / ours
    assert row["ratio"] == pytest.approx(ratio, abs=1e-3)
    assert row["holds"] == (None if row["target"] is None else row["ratio"] >= row["target"])


def test_the_page_is_made_from_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run python -m bench --docs"


def test_a_peer_is_run_or_excused_never_both() -> None:
    assert not {name.split()[0] for name in NOT_RUN} & set(PEERS)


@pytest.mark.parametrize(
    ("unit", "ours", "peer", "ratio", "holds"),
    [("images/s", 3.0, 2.0, 1.5, True), ("s", 3.0, 2.0, 0.667, False), ("s", 2.0, 3.0, 1.5, True)],
)
def test_above_one_is_better_for_rates_and_for_times(
    unit: str, ours: float, peer: float, ratio: float, holds: bool
) -> None:
    row = Row("bar", ours, peer, "peer 1.0", unit, target=0.95).to_json("a machine")
    assert (row["ratio"], row["holds"]) == (ratio, holds)
    assert Row("bar", ours, peer, "peer 1.0", unit).holds is None
