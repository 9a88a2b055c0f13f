"""DeAP's tables: every number has a cell, shared where tables share it, and figures show what they are said to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from operators.metrics.bootstrap import Estimate, Interval
from pipelines.config import ConfigError
from pipelines.costs import speed
from pipelines.executors import InlineExecutor
from pipelines.published.deap import DEAP_PARAMETERS, DEAP_RESULTS, DEAP_TASKS
from pipelines.published.others import IMAGENET_LINEAR, IMAGENET_ZERO_SHOT
from pipelines.results import Line, Table
from pipelines.tables import deap, measures, paper_report, paper_run
from pipelines.tables.backbones import BY_NAME
from pipelines.tables.drawings import draw, front, fronts
from pipelines.tables.figures import Figure, Results, figures_of, read_figure
from pipelines.tables.papers import Correlated, PaperPlan, PapersConfig, PaperTable, Wanted
from tests.conftest import squeezed
from tests.pipelines.tables.test_papers import DEBUG

DATA = tuple(f"{name}=/there/{name}" for name in ("voc", "coco", "coco_stuff", "nyu"))


def paper(**changes: object) -> PapersConfig:
    return PapersConfig.of(out="o", **{"data": DATA, **changes})


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_all_tables_have_cells_and_what_is_missing_is_named():
    plan = deap.plan(paper())

    assert [table.number for table in plan.tables] == ["3", "4", "5", "fig3", "fig4", "fig5", "fig6", "fig7"]
    assert {reason for cell in plan.cells.values() for reason in plan.reasons(cell)} == {
        deap.SAM2, deap.MOCO, "FeatUp's file for DINOv2 ViT-S/14: give --weights featup=URL"
    }  # fmt: skip
    given = deap.plan(paper(weights=("moco-v3=m.pth", "featup=f.ckpt")))
    assert {reason for cell in given.cells.values() for reason in given.reasons(cell)} == {deap.SAM2}
    bare = deap.plan(paper(data=()))
    assert all(
        "give --data" in bare.lacks(cell) for cell in bare.cells.values() if cell.job in ("readout", "probe") and cell.needs
    )
    assert not bare.only(["4"]).cells["counts"].missing


def test_published_numbers_stand_beside_their_cells():
    plan = deap.plan(paper())
    tables = {table.number: {(each.row, each.column): each for each in table.wanted} for table in plan.tables}

    for backbone, task in ((backbone, task) for backbone in DEAP_RESULTS.rows for task in DEAP_TASKS):
        label = BY_NAME[backbone].label
        columns = {
            f"{deap.DEAP_RECIPES[task].label} {head}": value for head, value in DEAP_RESULTS.values(backbone, task).items()
        }
        assert {column: tables["3"][label, column].published for column in columns} == columns
    assert len(tables["3"]) == 18 * 9
    assert tables["5"]["no mask", "depth RMSE, MAE"].published == 0.7360
    assert tables["5"]["DeAP", "VOC IoU, SigLIP 384"].published == 73.9
    assert {each.published for each in tables["4"].values()} == {value for values in DEAP_PARAMETERS.values() for value in values}
    assert not any(each.published for each in tables["fig4"].values())


def test_tables_share_cells_and_runs_are_the_papers():
    plan = deap.plan(paper())
    ablations, base = plan.only(["5"]).cells, plan.only(["3"]).cells

    assert len({name for name in ablations if name in base}) == 3 * 3 * 2  # DeAP itself, trained and judged
    assert plan.only(["3", "fig6"]).cells == base
    settings = plan.cells["readout-siglip-so-coco-stuff"].settings
    assert {name: settings[name] for name in ("model", "size", "ragged", "outputs", "width", "max_steps", "limit")} == {
        "model": "vit_so400m_patch14_siglip_384.webli", "size": 512, "ragged": True, "outputs": 200, "width": 32,
        "max_steps": 20_000, "limit": 100_000,
    }  # fmt: skip
    assert "width" not in plan.cells["readout-dinov2-b-coco-stuff-linear"].settings
    assert plan.cells["readout-untrained-voc"].settings["weights"] == "random"
    assert plan.cells["readout-dinov2-b-voc-8-dim"].settings["dim"] == 8


def test_a_backbone_of_ones_own_takes_the_place_of_the_papers():
    config = PapersConfig(
        out="o", scale="mini", root="/r", backbone=("mae=vit_base_patch16_224.mae",), weights=("mae=/w/mae",), sizes=(112,)
    )

    plan = deap.plan(config)

    cell = plan.cells["readout-mae-voc"]
    assert {name: cell.settings[name] for name in ("model", "weights", "size", "dataset", "data")} == {
        "model": "vit_base_patch16_224.mae", "weights": "/w/mae", "size": 112, "dataset": "photos_open", "data": "/r/photos_open",
    }  # fmt: skip
    assert not plan.lacks(cell)
    assert plan.lacks(plan.cells["readout-mae-depth"]) == "the data set nyu: give --data nyu=FOLDER"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": ("untrained=x",)}, "--weights untrained: there are aim2, clip-b"),
        ({"data": ("photos=x",)}, "--data photos: there are coco, coco_stuff, nyu, voc"),
        ({"backbone": ("vit=x",)}, "--backbone vit: there are aim2"),
        ({"sizes": (224,)}, "--sizes 224: each of DeAP's backbones has one side of its input, the paper's"),
    ],
)
def test_words_that_mean_nothing_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        deap.plan(paper(**changes))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_readouts_are_trained_judged_and_timed(demo, tmp_path):
    """Figure 7 of two backbones and one task, at a few pixels, and the counts of Table 4, which need no data."""
    config = DEBUG.changed(out=str(tmp_path), table=("4", "fig7"))
    plan = deap.plan(config).only(config.table)
    wanted = [
        each for each in plan.tables[1].wanted if each.row in ("DINOv2 B", "MAE") and each.column in (deap.SPEED, "VOC IoU")
    ]
    names = {each.cell for each in wanted}
    names |= {need for name in names for need in plan.cells[name].needs} | {"counts"}
    few = replace(
        plan, tables=(plan.tables[0], replace(plan.tables[1], wanted=tuple(wanted))), cells={n: plan.cells[n] for n in names}
    )

    outcomes = paper_run.run_papers_cells(config, few, InlineExecutor())
    text = paper_report.write_tables(config.folder, config, few, outcomes)

    assert {each.error for each in outcomes.values()} == {""}
    counts, figure = json.loads((tmp_path / "tables.json").read_text())["tables"]
    assert [each["measured"] for each in counts["figures"]] == pytest.approx(
        [each["published"] for each in counts["figures"]], abs=5e-4
    )
    assert all(each["measured"] > 0 for each in figure["figures"] if each["column"] == deap.SPEED)
    assert [bool(each["interval"]) for each in figure["figures"]] == [False, True] * 2
    assert (tmp_path / "pictures/fig7.png").read_bytes()[:4] == b"\x89PNG"
    assert "none is both faster and better in VOC IoU than" in text


def test_speeds_that_are_kept_are_not_measured_again(tmp_path, monkeypatch):
    settings = {
        "out": str(tmp_path), "storage_options": None, "device": "cpu", "executor": "inline",
        "backbones": {"a": ["test_vit.r160_in1k", 32], "b": ["test_vit.r160_in1k", 64]},
        "protocol": {**vars(speed.SpeedProtocol()), "reference": "test_vit.r160_in1k", "reference_size": 32, "batch": 1,
                     "batches": 1, "precision": "fp32"},
    }  # fmt: skip
    measures.measure_speeds(settings)
    first = json.loads((tmp_path / "results.json").read_text())["tables"]
    (tmp_path / "parts/b.json").unlink()
    measured = []
    real = speed.measure_speed
    monkeypatch.setattr(speed, "measure_speed", lambda *args: measured.append(args[2].size) or real(*args))

    measures.measure_speeds(settings)

    again = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert measured == [64]
    assert again[0]["lines"][0] == first[0]["lines"][0]
    assert [line["input_px"] for line in again[0]["lines"]] == ["32", "64"]


# --- figures ----------------------------------------------------------------------------------------------------------


def wanted(row: str, column: str, **changes: object) -> Wanted:
    return Wanted(**{"row": row, "column": column, "cell": row, "line": "", "value": column, **changes})


def results(**values: float) -> Results:
    """One table a cell, with one number called score."""
    line = Line(features="x1", input_px="64", stride=16, grid="4x4", values=())
    tables = {
        name: (Table(title="t", columns=("score",), lines=(replace(line, values=(f"{value:.4f}",)),)),)
        for name, value in values.items()
    }
    outcomes = {name: paper_run.Outcome(name=name) for name in values} | {"gone": paper_run.Outcome(name="gone", error="gone")}
    return Results(outcomes=outcomes, tables=tables, metrics={})


def correlated(*names: str, others: tuple[float, ...], published: tuple[float, ...]) -> Correlated:
    numbers = tuple(wanted(name, "score", published=value) for name, value in zip(names, published, strict=True))
    return Correlated(row="theirs", column="score", numbers=numbers, others=others, names=names)


def test_a_correlation_is_of_ranks_and_of_what_is_there():
    found = results(a=1.0, b=2.0, c=4.0)
    of = correlated("a", "b", "gone", "c", others=(10.0, 30.0, 50.0, 20.0), published=(4.0, 3.0, 2.0, 1.0))

    figure = found.correlation(of)

    assert figure.measured == 0.5
    assert figure.wanted.published == -0.4
    assert figure.points == ((10.0, 1.0, "a"), (30.0, 2.0, "b"), (20.0, 4.0, "c"))
    few = found.correlation(correlated("a", "b", "gone", others=(1.0, 2.0, 3.0), published=(1.0, 2.0, 3.0)))
    assert (few.measured, few.wanted.published) == (None, 1.0)
    assert "there are 2" in few.missing
    assert found.correlation(correlated("a", "b", "c", others=(1.0, 1.0, 1.0), published=(1.0, 2.0, 3.0))).measured is None


def known(low: float, high: float, apart: float, *ends: float) -> Estimate:
    between = Interval(low=ends[0], high=ends[1])
    return Estimate(interval=Interval(low=low, high=high), against="bilinear x2", difference=apart, difference_interval=between)


def judged(name: str, value: float, estimate: Estimate) -> tuple[Table, ...]:
    line = Line(features="lift x2", input_px="64", stride=8, grid="8x8", values=(value,), estimates=(estimate,))
    return (replace(results(**{name: value}).tables[name][0], lines=(line,)),)


def test_a_row_says_how_far_it_is_from_the_bilinear_one_and_whether_that_is_shown():
    tables = {
        "a": judged("a", 50.0, known(48.0, 52.0, 4.0, 3.0, 5.0)), "b": judged("b", 47.0, known(45.0, 49.0, 1.0, -1.0, 3.0)),
    }  # fmt: skip
    found = replace(results(a=50.0, b=47.0), tables=tables)
    one, other = (replace(wanted("LiFT", "score", published=40.0), cell=cell) for cell in ("a", "b"))
    table = PaperTable(number="1", title="t", wanted=(one, replace(other, row="again")))
    seeds = replace(table, wanted=(replace(one, again=("b",)), replace(one, row="in part", again=("gone",))))

    text, of_seeds = (
        squeezed(paper_report.report(PaperPlan(paper="P", tables=(each,), cells={}), {"1": figures_of(each, found)}, {}))
        for each in (table, seeds)
    )

    assert "| LiFT | 50.00 [48.00, 52.00] |" in text
    assert "| LiFT, less bilinear x2 | +4.00 [3.00, 5.00] |" in text
    assert "| LiFT, less published | +10.00 |" in text
    assert "| again, less bilinear x2 | +1.00 [-1.00, 3.00], no difference shown |" in text
    assert "In brackets: 95 % intervals" in text
    assert "Mean" not in text
    assert "| LiFT | 48.50 ± 2.12 |" in of_seeds
    assert "| LiFT, less bilinear x2 | +2.50 ± 2.12, shown by 1 of 2 |" in of_seeds
    assert "| LiFT, less published | +8.50 |" in of_seeds
    assert "| in part | 50.00 (1 of 2) |" in of_seeds
    assert "- missing, in part: gone" in of_seeds
    assert figures_of(seeds, found)[0].ends == pytest.approx((48.5 - 2.1213, 48.5 + 2.1213), abs=1e-3)


@pytest.mark.parametrize("cell", ["nan", "inf", "no number", None])
def test_what_is_no_number_is_missing(cell):
    line = Line(features="x1", input_px="64", stride=16, grid="4x4", values=(cell,))

    found = read_figure([Table(title="t", columns=("score",), lines=(line,))], wanted("a", "score", px=64))

    assert (found.measured, found.missing) == (None, "a has no score at 64 px")


def test_a_front_is_what_none_beats():
    points = [(1.0, 5.0, "slow"), (2.0, 5.0, "as good"), (3.0, 4.0, "fast"), (2.5, 1.0, "beaten"), (3.0, 4.0, "its twin")]

    assert [name for _, _, name in front(points)] == ["as good", "fast"]
    assert [name for _, _, name in front(points, falls=True)] == ["beaten", "fast"]


@pytest.mark.parametrize("drawing", ["scatter", "front", "lines", "bars"])
def test_figures_are_drawn_of_what_is_there(drawing):
    table = PaperTable(number="1", title="t", drawing=drawing)
    numbers = {("a", "x"): 1.0, ("a", "y"): 2.0, ("b", "x"): 2.0, ("b", "y"): None}
    found = [Figure(wanted=wanted(row, column, published=3.0), measured=value) for (row, column), value in numbers.items()]

    assert draw(table, found)[:4] == b"\x89PNG"
    assert fronts(table, found) == (["none is both faster and better in y than a, as measured"] if drawing == "front" else [])
    nothing = [replace(each, wanted=wanted("a", "x"), measured=None) for each in found]
    assert draw(table, nothing) is None


def test_correlations_are_drawn():
    of = correlated("a", "b", "c", others=(10.0, 30.0, 20.0), published=(4.0, 3.0, 2.0))
    table = PaperTable(number="1", title="t", drawing="pairs", correlated=(of,))

    assert draw(table, figures_of(table, results(a=1.0, b=2.0, c=4.0)))[:4] == b"\x89PNG"
    assert table.needs == ["a", "b", "c"]


def test_others_numbers_are_of_the_papers_backbones():
    assert {*IMAGENET_LINEAR, *IMAGENET_ZERO_SHOT} <= set(DEAP_RESULTS.rows)


def test_what_is_missing_is_no_failure(demo, tmp_path: Path):
    """Figure 4's FeatUp has no file: the tables name it, and the program ends well."""
    config = DEBUG.changed(out=str(tmp_path), table=("4",))
    list(paper_report.main(deap.plan, config))
    hindered = deap.plan(config).only(["fig4"])
    name = "probe-dinov2-b-voc-featup"
    few = replace(hindered, cells={each: hindered.cells[each] for each in (name, *hindered.cells[name].needs)})

    outcomes = paper_run.run_papers_cells(config, few, InlineExecutor())

    assert all(each.hindered for each in outcomes.values())
    assert outcomes[name].error == "FeatUp's file for DINOv2 ViT-S/14: give --weights featup=URL"
