"""Grids, their tables and their picture."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from pipeline.engine.candidates import Candidate, find_candidates
from pipeline.engine.curves import choose_x, draw_sweep, make_series
from pipeline.engine.sweeps import describe_fixed, make_grid, parse_axis, parse_ema, shown_columns
from pipeline.engine.tables import make_csv, make_markdown, make_table
from pipeline.errors import UserError
from tests.pipeline.test_models import PARAMS, make_model


@pytest.fixture
def model(tmp_path: Path) -> Candidate:
    make_model(tmp_path / "m", ("cat", "dog"))
    return find_candidates(str(tmp_path / "m"), tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("SAMPLER", "dimm", "SAMPLER: 'dimm' is unknown; known: ddim, ddpm, dpm_solver, heun"),
        ("SPACING", "even", "SPACING: 'even' is unknown; known: trailing"),
        ("STEPS", "5,,10", "STEPS: '' is no whole number of at least 1"),
        ("STEPS", "0", "STEPS: '0' is no whole number"),
        ("STEPS", "2.5", "STEPS: '2.5' is no whole number"),
        ("N", "1", "N: '1' is no whole number of at least 2"),
        ("GUIDANCE", "nan", "GUIDANCE: 'nan' is no number"),
        ("GUIDANCE", "two", "GUIDANCE: 'two' is no number"),
        ("SEED", "-1", "SEED: '-1' is no whole number from 0"),
        ("SEED", str(2**32), "is no whole number from 0"),
        ("ETA", "1.5", "ETA: '1.5' is no number from 0 to 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_axis(name, text)
    assert message in str(error.value)


def test_averages_go_by_name_or_width() -> None:
    assert parse_ema("network,average,4000,0.05") == ["network", "average", "4000", "0.05"]
    for text in ("best", "0", "-3", ""):
        with pytest.raises(UserError, match=r"known: average, network, a half-life in images"):
            parse_ema(text)


def test_a_grid_is_every_combination_and_what_no_axis_says_is_as_in_params(model: Candidate) -> None:
    axes = {"SAMPLER": ["ddim", "heun"], "STEPS": [5, 10], "GUIDANCE": [1.0, 2.0]}
    points = make_grid([model], ["average"], PARAMS.sample, axes)
    asked = [(p.sample.sampler, p.sample.steps, p.sample.guidance) for p in points]
    assert len(set(asked)) == 8
    assert asked[:3] == [("ddim", 5, 1.0), ("ddim", 5, 2.0), ("ddim", 10, 1.0)]
    assert {(p.sample.num_samples, p.sample.seed, p.sample.spacing) for p in points} == {
        (PARAMS.sample.num_samples, PARAMS.sample.seed, PARAMS.sample.spacing)
    }
    assert points[3].command().startswith("make eval CKPT=")
    assert "STEPS=10 SPACING=trailing" in points[3].command()


def test_a_grid_that_can_not_be_is_refused_before_anything_runs(model: Candidate, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="STEPS is 1001, more than the 1000 of"):
        make_grid([model], ["average"], PARAMS.sample, {"STEPS": [10, 1001]})
    both = PARAMS.sample.model_copy(update={"autoguidance": 2.0})
    with pytest.raises(UserError, match="autoguidance and guidance are both on"):
        make_grid([model], ["average"], both, {"GUIDANCE": [1.0, 3.0]})
    make_model(tmp_path / "none", ())
    without = find_candidates(str(tmp_path / "none"), tmp_path)
    with pytest.raises(UserError, match=r"GUIDANCE is 2, but .* has no classes"):
        make_grid(without, ["average"], PARAMS.sample, {"GUIDANCE": [2.0]})


def make_rows(**axes: list) -> list[dict]:
    first = {"checkpoint": "m", "images_seen": 64, "ema": "average", "sampler": "ddim", "steps": 5,
             "spacing": "trailing", "eta": 0.0, "guidance": 1.0, "num_samples": 100, "seed": 0}  # fmt: skip
    rows: list[dict] = [first]
    for name, values in axes.items():
        rows = [{**row, name: value} for row in rows for value in values]
    for place, row in enumerate(rows):
        row |= {"network_calls": float(row["steps"]), "images_per_second": None, "fd": 10.0 + place, "kid": None}
    return rows


def test_tables_show_what_differs_and_hold_everything(tmp_path: Path) -> None:
    rows = make_rows(sampler=["ddim", "heun"], steps=[5, 10])
    columns = shown_columns(rows, "fd")
    assert columns == ["sampler", "steps", "network_calls", "images_per_second", "fd"]  # kid has no value
    assert describe_fixed(rows).endswith("guidance 1, num_samples 100, seed 0")
    assert "sampler" not in describe_fixed(rows)
    lines = make_table(rows, columns).splitlines()
    assert lines[0].split() == columns
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines}) == 1  # right-aligned
    assert make_markdown(rows, columns).splitlines()[2] == "| ddim | 5 | 5 | - | 10 |"
    (tmp_path / "t.csv").write_text(make_csv(rows))
    with open(tmp_path / "t.csv", newline="") as file:
        assert [(row["sampler"], float(row["fd"]), row["kid"]) for row in csv.DictReader(file)] == [
            ("ddim", 10.0, ""), ("ddim", 11.0, ""), ("heun", 12.0, ""), ("heun", 13.0, "")
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("axes", "x", "lines"),
    [
        ({"sampler": ["ddim", "heun"], "steps": [5, 10]}, "network_calls", {"ddim": [5, 10], "heun": [5, 10]}),
        ({"steps": [5, 10], "guidance": [1.0, 2.0]}, "network_calls",
         {"guidance 1": [5, 10], "guidance 2": [5, 10]}),
        ({"guidance": [1.0, 2.0, 3.0]}, "guidance", {"": [1, 2, 3]}),
        ({"steps": [5, 10], "seed": [0, 1]}, "network_calls", {"": [5, 10]}),
    ],
)  # fmt: skip
def test_a_line_is_what_rows_share_but_for_the_axis_and_the_seed(axes, x, lines) -> None:
    rows = make_rows(**axes)
    assert choose_x(rows) == x
    series = make_series(rows, x, "fd")
    assert {name: [at for at, _ in points] for name, points in series.items()} == lines
    assert sum(len(values) for points in series.values() for _, values in points) == len(rows)


def test_checkpoints_of_a_training_are_a_curve_over_it() -> None:
    rows = [row | {"checkpoint": f"k@{n}", "images_seen": n} for n in (64, 128) for row in make_rows(ema=["a", "b"])]
    assert choose_x(rows) == "images_seen"
    assert make_series(rows, "images_seen", "fd") == {
        "a": [(64.0, [10.0]), (128.0, [10.0])], "b": [(64.0, [11.0]), (128.0, [11.0])]
    }  # fmt: skip


def test_the_picture_is_a_picture_and_the_same_each_time(tmp_path: Path) -> None:
    rows = make_rows(sampler=["ddim", "heun"], steps=[5, 10, 50], seed=[0, 1])
    for name in "ab":
        assert draw_sweep(tmp_path / name, rows, "fd", "a protocol") == "network_calls"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with Image.open(tmp_path / "a") as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
        assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= {c for _, c in image.convert("RGB").getcolors(1 << 24)}
    assert draw_sweep(tmp_path / "c", [row | {"fd": None} for row in rows], "fd", "") is None
    assert not (tmp_path / "c").exists()
