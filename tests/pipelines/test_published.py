"""The papers' numbers: each table as it is laid out where our notes copy it, and what holds between numbers wherever they are."""

import itertools
import re
from collections.abc import Mapping, Sequence

import pytest

from pipelines.published.deap import DEAP_ABLATED, DEAP_ABLATIONS, DEAP_PARAMETERS, DEAP_RESULTS, DEAP_TASKS, deap_values
from pipelines.published.lift import (
    LIFT_ABLATIONS,
    LIFT_BACKBONES,
    LIFT_COMPUTE,
    LIFT_CORRESPONDENCE,
    LIFT_CROSSED,
    LIFT_DETECTION,
    LIFT_DISCOVERY,
    LIFT_EPOCHS,
    LIFT_OPERATIONS,
    LIFT_RIVALS,
    LIFT_SIDES,
    LIFT_VIDEO,
)
from pipelines.published.recipes import RECIPES
from pipelines.published.vit_up import (
    VIT_UP_CORRESPONDENCE,
    VIT_UP_DEPTH,
    VIT_UP_LARGER,
    VIT_UP_NAVI,
    VIT_UP_PROBES,
    VIT_UP_RUNTIME,
    VIT_UP_SEGMENTATION,
)

ALPHAS = ("PCK@0.1", "PCK@0.05", "PCK@0.01")


@pytest.fixture(scope="session")
def notes(shared_data) -> str:
    """The chapter of our notes with the tables as the papers print them."""
    path = shared_data.parent / "specs/evaluation.md"
    if not path.exists():
        pytest.skip("../shared/specs is not here")
    text = path.read_text()
    return text[text.index("## 16. ") : text.index("## 17. ")]


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"\d*\.?\d+", text)]


def rows(text: str, start: str) -> dict[str, list[str]]:
    """The lines of the first table after `start`: cells by the first one."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), text[text.index(start) :].split("\n")[2:])
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in found}


def by_side(published: Mapping[str, Mapping[str, float]], column: str) -> list[float]:
    return [published[side][column] for side in LIFT_SIDES]


# --- as the papers lay them out ---------------------------------------------------------------------------------------


def test_lifts_methods_are_as_printed(notes):
    """A row a data set and measure, a column a method or other network, four sizes in each."""
    printed = rows(notes, "| task, metric |")
    tables = {
        **{f"SPair PCK@{each[4:].removeprefix('0')}": (LIFT_CORRESPONDENCE, each, each) for each in ALPHAS},
        **{f"DAVIS {each}": (LIFT_VIDEO, each, each) for each in ("J&F", "J", "F")},
        **{f"CorLoc {each.upper()}": (LIFT_DISCOVERY[each], "CorLoc", each) for each in ("voc07", "voc12")},
        "CorLoc COCO20k": (LIFT_DISCOVERY["coco20k"], "CorLoc", "coco20k"),
    }

    assert printed.keys() == tables.keys()
    for name, (table, column, of_rival) in tables.items():
        methods = [by_side(table.rows[each], column) for each in ("backbone", "bilinear", "resize_conv", "jbu", "lift")]
        rivals = [[*LIFT_RIVALS[each][of_rival]] for each in ("leopart", "selfpatch")]
        assert [numbers(cell) for cell in printed[name]] == [*methods, *rivals]


def line(notes: str, start: str) -> str:
    return next(each for each in notes.split("\n") if each.startswith(start))


_NAMES = {"B/16": "dino-b16", "S/8": "dino-s8", "B/8": "dino-b8", "MoCo": "moco", "ViT": "vit", "Leopart": "leopart"}


@pytest.mark.parametrize(
    ("start", "column"), [("Other backbones, PCK@.1", "PCK@0.1"), ("Same, PCK@.05", "PCK@0.05"), ("Same, PCK@.01", "PCK@0.01")]
)
def test_lifts_other_backbones_are_as_printed(notes, start, column):
    parts = line(notes, start).partition(": ")[2].split(";")
    for part in parts:
        name, _, values = part.strip().partition(" ")
        without, _, with_lift = values.partition("->")
        of = LIFT_BACKBONES[_NAMES[name]]
        assert numbers(without) == [*of.get("backbone", {}).get(column, ())]
        assert numbers(with_lift) == [*of["lift"][column]]
    assert len(parts) == len(_NAMES)


def test_lifts_ablations_are_as_printed(notes):
    text = line(notes, "Ablation DINO")
    ablations, _, epochs = text.partition("Training length")
    printed = dict(zip(LIFT_ABLATIONS, (numbers(part)[-4:] for part in ablations.split(";")), strict=True))
    assert printed == {name: [*values] for name, values in LIFT_ABLATIONS.items()}
    lengths = [tuple(numbers(part)) for part in epochs.partition(":")[2].partition("(")[0].replace(" ep ", " ").split(",")]
    assert lengths == [(epochs, *values) for epochs, values in LIFT_EPOCHS.items()]
    twice = [numbers(part) for part in line(notes, "SPair, LiFT twice").partition(": ")[2].split(";")]
    assert twice == [[*LIFT_BACKBONES[each]["lift twice"]["PCK@0.1"]] for each in ("dino-s16", "moco", "vit")]


def test_lifts_costs_and_detectors_are_as_printed(notes):
    printed = [[numbers(cell) for cell in cells] for cells in rows(notes, "| cost (Table 5) |").values()]
    expected = []
    for each in LIFT_OPERATIONS[:4]:
        plain, lift = (LIFT_COMPUTE[each.size, each.stride][method] for method in ("backbone", "lift"))
        expected.append([[each.alone, each.lift], *([a, b] for a, b in zip(plain, lift, strict=True))])
    larger = LIFT_BACKBONES["dino-b16"]["backbone"]["PCK@0.1"][LIFT_SIDES.index("224")]
    assert printed == [*expected, [[LIFT_OPERATIONS[4].alone], [larger], []]]
    text = line(notes, "COCO (box AP").partition(": ")[2]
    detectors = [numbers(each) for each in text.split(". ")]
    rows_of = [LIFT_DETECTION[head].values(method, "") for head in ("mask_rcnn", "cascade") for method in ("backbone", "lift")]
    assert detectors == [[*each.values()] for each in rows_of]


def test_vit_ups_tables_are_as_printed(notes):
    printed = rows(notes, "| method | COCO mIoU/acc |")
    names = dict(zip(printed, ("bilinear", "jafar", "anyup", "uplift", "naf", "vit_up"), strict=True))
    for label, name in names.items():
        probes: Sequence[Sequence[float]] = (
            [[*each.values()] for each in VIT_UP_PROBES.rows[name].values()]
            if name in VIT_UP_PROBES.rows
            else [*VIT_UP_SEGMENTATION[name].values()]
        )
        matches = [[*table.values(name, "448").values()] for table in (VIT_UP_CORRESPONDENCE, VIT_UP_NAVI)]
        assert [numbers(cell) for cell in printed[label]] == [*map(list, probes), [*VIT_UP_DEPTH[name]], *matches]
    larger = line(notes, "Table 4 (DINOv3-B)").rpartition(": ")[2].split(";")
    assert [numbers(each) for each in larger] == [[*values.values()] for values in VIT_UP_LARGER.values()]
    costs = [
        numbers(re.sub(r"\d+\^2|ViT-Up \(24.9M\)", "", each)) for each in line(notes, "Table 9").partition(": ")[2].split(";")
    ]
    for (row, found), figures in zip(VIT_UP_RUNTIME.rows.items(), costs, strict=True):
        assert figures == [found[grid][name] for name in ("ms", "peak MiB") for grid in found], row


def test_deaps_tables_are_as_printed(notes):
    """Rows are backbones; the columns ARI, boundaries' CE and IoU, AP, VOC's and COCO-Stuff's CE and IoU, RMSE."""
    printed = rows(notes, "| backbone | px |")
    expected = [[value for task in DEAP_TASKS for value in of[task].values()] for of in DEAP_RESULTS.rows.values()]
    assert [[float(cell) for cell in cells[2:]] for cells in printed.values()] == expected
    base, *ablations = re.split(r"\. (?=[a-z8])", line(notes, "Ablation (AP_lg").partition(": ")[2])
    for name, part in zip(DEAP_ABLATIONS.rows, ablations, strict=True):
        values = numbers(part.partition(" ")[2])
        assert values == [DEAP_ABLATIONS.values(name, task)[of] for task in ("detection", "voc", "depth") for of in DEAP_ABLATED]
    of_table3 = [[*deap_values(of, "deap", task).values()][-1] for task in ("detection", "voc", "depth") for of in DEAP_ABLATED]
    assert numbers(base) == pytest.approx(of_table3, abs=5e-4)  # RMSE has a digit more there


# --- wherever they are ------------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_of_its_parts_and_looser_thresholds_find_more():
    for row, side in itertools.product(LIFT_VIDEO.rows, LIFT_SIDES):
        both, j, f = LIFT_VIDEO.values(row, side).values()
        assert both == pytest.approx((j + f) / 2, abs=0.06)
        assert sorted(LIFT_CORRESPONDENCE.values(row, side).values()) == [
            LIFT_CORRESPONDENCE.values(row, side)[each] for each in reversed(ALPHAS)
        ]
    for of in LIFT_RIVALS.values():
        assert [*of["J&F"]] == pytest.approx([(j + f) / 2 for j, f in zip(of["J"], of["F"], strict=True)], abs=0.06)
    for methods, method in itertools.product(LIFT_BACKBONES.values(), ("backbone", "lift")):
        if found := methods.get(method):
            assert all(a > b > c for a, b, c in zip(*(found[each] for each in ALPHAS), strict=True))
    for table, row in itertools.product(LIFT_DETECTION.values(), ("backbone", "lift")):
        values = table.values(row, "")
        for kind in ("box", "mask"):
            assert values[f"{kind} AP50"] > values[f"{kind} AP75"] > values[f"{kind} AP"]
    for row in VIT_UP_CORRESPONDENCE.rows:
        spair, navi = VIT_UP_CORRESPONDENCE.values(row, "448"), VIT_UP_NAVI.values(row, "448")
        assert [*spair.values()] == sorted(spair.values(), reverse=True)
        assert [*navi.values()] == sorted(navi.values(), reverse=True)


def test_lift_is_above_what_it_enlarges():
    for row, side in itertools.product(("backbone", "bilinear", "resize_conv", "jbu"), LIFT_SIDES):
        for table in (LIFT_CORRESPONDENCE, LIFT_VIDEO, *LIFT_DISCOVERY.values()):
            below, above = table.values(row, side), table.values("lift", side)
            assert all(above[column] > below[column] for column in above)
    assert all(own > without for without, own in LIFT_CROSSED.values())


def test_a_readout_learns_more_for_more_outputs_and_channels():
    """DeAP's counts: by tasks, COCO-Stuff above detection above VOC above boundaries, which are depth's; with channels, all."""
    for counts in DEAP_PARAMETERS.values():
        of = dict(zip(DEAP_TASKS, counts, strict=True))
        assert of["voc"] > of["boundaries"] == of["depth"]
        assert of["detection"] == pytest.approx(2 * of["boundaries"], abs=2e-3)
    widths = sorted(DEAP_PARAMETERS, key=lambda each: each[1])
    assert [DEAP_PARAMETERS[each] for each in widths] == sorted(DEAP_PARAMETERS.values())


def test_tasks_and_columns_are_the_recipes():
    assert [*DEAP_TASKS] == [name for name, each in RECIPES.items() if each.paper.name == "DeAP"]
    assert all(tuple(of) == DEAP_TASKS for of in DEAP_RESULTS.rows.values())
    assert all(row in RECIPES for of in VIT_UP_PROBES.rows.values() for row in of)
