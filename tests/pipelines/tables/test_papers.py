"""Papers' tables: every cell is done once, goes on where it stopped, and says what is missing where it can't be done."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from jobs import tables as job
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.published import Published
from pipelines.published import deap as deap_numbers
from pipelines.published import lift as lift_numbers
from pipelines.published import vit_up as vit_up_numbers
from pipelines.published.lift import LIFT_CORRESPONDENCE, LIFT_DISCOVERY, LIFT_VIDEO
from pipelines.tables import deap, lift, paper_report, paper_run, vit_up
from pipelines.tables.figures import Results, figures_of
from pipelines.tables.paper_run import Order
from pipelines.tables.papers import PapersConfig
from pipelines.training.lift import X2Config
from pipelines.training.readout import ReadoutTraining
from pipelines.training.vit_up import ViTUpTraining
from pipelines.training.vitdet import ViTDetTraining
from storage.paths import Folder
from tests.pipelines.extraction.test_faults import ROOT, ended, family, kill

EVERYTHING = tuple(f"{name}=/there/{name}" for name in ("spair", "davis", "voc07", "voc12", "coco20k", "coco", "photos"))

DEBUG = job.PAPERS["debug"]


def debug(out: Path, *tables: str, **changes: object) -> PapersConfig:
    return DEBUG.changed(out=str(out), table=tables, **changes)


def printed(config: PapersConfig) -> str:
    return "\n".join(paper_report.main(lift.plan, config))


def test_a_table_is_the_same_whenever_its_run_was_killed(demo, tmp_path, monkeypatch):
    """Killed five times, before it writes some object that is drawn: of a training, of an evaluation, at the end of either."""
    config, killed = debug(tmp_path / "whole", "8"), debug(tmp_path / "killed", "8")
    writes, write, at = [], Folder.write, [0]

    class Killed(BaseException):
        """As by `kill -9`, nothing is tidied up."""

    def counted(folder: Folder, name: str, *args: object, **more: object) -> object:
        writes.append(name)
        if len(writes) == at[0]:
            raise Killed
        return write(folder, name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "write", counted)
    printed(config)
    draw, all_of_it = random.Random(24), len(writes)
    for at[0] in (draw.randint(2, all_of_it // 3) for _ in range(5)):
        writes.clear()
        with pytest.raises(Killed):
            printed(killed)
    at[0] = 0
    printed(killed)

    assert (tmp_path / "killed/tables.md").read_bytes() == (tmp_path / "whole/tables.md").read_bytes()
    (table,) = json.loads((tmp_path / "whole/tables.json").read_text())["tables"]
    assert [each["difference"] for each in table["figures"]] == [None] * 3  # the paper has nothing at 64 px
    assert [bool(each["interval"]) for each in table["figures"]] == [True, False, False]


def test_what_is_done_is_not_done_again_and_cells_are_shared(demo, tmp_path, monkeypatch):
    printed(debug(tmp_path, "5"))
    done: list[str] = []
    real = paper_run.run_cell

    def run_cell(order: Order) -> paper_run.Outcome:
        done.append(order.cell.name)
        return real(order)

    monkeypatch.setattr(paper_run, "run_cell", run_cell)
    text = printed(debug(tmp_path, "5", "8"))

    assert done == ["correspondence-dino-s16-lift-dino-s16-twice"]  # of the LiFT that Table 5 has trained
    assert "| DINO, LiFT twice" in text
    printed(debug(tmp_path, "8", limit=3))
    assert done[1:] == ["correspondence-dino-s16-lift-dino-s16-twice"]  # of other pairs, beside the first


def test_a_figure_is_drawn_and_operations_are_counted(demo, tmp_path):
    text = printed(debug(tmp_path, "fig3"))

    assert (tmp_path / "pictures/fig3.png").read_bytes()[:4] == b"\x89PNG"
    assert "![Figure 3](pictures/fig3.png)" in text
    assert "LiFT at another stride than the patch's" in text


def test_a_cell_that_fails_ends_no_other_one_and_the_program_with_1(demo, tmp_path, capsys):
    (nothing := tmp_path / "nothing").mkdir()
    out = tmp_path / "out"
    args = ["--out", str(out), "--table", "8", "--data", f"spair={nothing}"]

    assert job.run(["lift", "debug", *args]) == 1
    text = (out / "tables.md").read_text()
    assert "missing, DINO, LiFT twice: DatasetError" in text
    assert json.loads((out / "tables.json").read_text())["cells"]["train-lift-dino-s16"]["error"] == ""


# --- the whole paper --------------------------------------------------------------------------------------------------


def test_the_plan_of_all_of_lift_names_what_is_missing(tmp_path):
    config = PapersConfig(out=str(tmp_path), plan=True, data=EVERYTHING)

    text = printed(config)

    assert not list(tmp_path.iterdir())
    for number in ("1", "2", "3", "4", "5", "6", "7", "8", "fig3", "fig4", "fig5", "fig6", "s1", "s2", "s3", "s4", "s5"):
        assert lift.plan(config).only([number]).cells
    assert "Leopart's weights: give --weights leopart=URL" in text
    assert "or a trained detector: --weights cascade=URL" in text
    assert re.search(r"detection-cascade-lift +detection .* missing: it needs train-vitdet-cascade: MAE's weights", text)
    assert re.search(r"missing +Leopart's weights: give --weights leopart=URL .* \(\d+ cells\)", text)
    assert "GPU hours" in text
    assert "train-lift-dino-s16                               lift                8.00 GPU h  to do" in text


def test_data_and_weights_that_are_given_are_not_missing(tmp_path):
    bare, given = PapersConfig(out=str(tmp_path)), PapersConfig(
        out=str(tmp_path), data=EVERYTHING, weights=("leopart=a.pth", "selfpatch=b.pth", "moco=c.pth")
    )  # fmt: skip
    for number in ("1", "2", "3", "s3", "s4", "s5"):
        assert all(cell.missing for cell in lift.plan(bare).only([number]).cells.values())
        assert not any(cell.missing for cell in lift.plan(given).only([number]).cells.values())


def test_published_numbers_stand_beside_their_cells(tmp_path):
    plan = lift.plan(PapersConfig(out=str(tmp_path), data=EVERYTHING))
    tables = {table.number: {(each.row, each.column): each for each in table.wanted} for table in plan.tables}

    assert tables["1"]["+ LiFT", "PCK@0.05, 112 px"].published == LIFT_CORRESPONDENCE.values("lift", "112")["PCK@0.05"] == 6.29
    assert tables["2"]["+ JBU", "J&F, 448 px"].published == LIFT_VIDEO.values("jbu", "448")["J&F"] == 54.5
    assert tables["3"]["DINO", "coco20k, 56 px"].published == LIFT_DISCOVERY["coco20k"].values("backbone", "56")["CorLoc"]
    assert tables["s5"]["Leopart", "voc12, 224 px"].published == 55.74
    assert tables["5"]["448 px, stride 8, LiFT", "J&F"].published == 69.7
    assert tables["4"]["Cascade R-CNN, LiFT", "mask AP75"].published == 44.45
    assert tables["s3"]["MoCo v3, LiFT", "PCK@0.01, 448 px"].published == 0.73
    assert {each.line for each in tables["8"].values()} == {"lift x4"}


def floats(value: object) -> Iterator[float]:
    """All that a table of pipelines/published/ holds."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping | Sequence | Published):
        within = value.rows if isinstance(value, Published) else value
        for each in within.values() if isinstance(within, Mapping) else () if isinstance(value, str) else within:
            yield from floats(each)


@pytest.mark.parametrize(
    ("make", "module", "count"),
    [(lift.plan, lift_numbers, 400), (vit_up.plan, vit_up_numbers, 100), (deap.plan, deap_numbers, 200)],
)
def test_every_published_number_stands_in_a_table(make, module, count):
    shown = {wanted.published for table in make(PapersConfig(out="o")).tables for wanted in table.wanted}
    recipes = re.compile("TRAINING|FOR_VITDET|HEADS|VIT_UP_PROBE$|RELEASED")
    printed = [*floats([value for name, value in vars(module).items() if name.isupper() and not recipes.search(name)])]

    assert len(printed) > count
    assert set(printed) <= shown


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_seeds_repeat_trainings_and_what_takes_from_them():
    plain = lift.plan(PapersConfig(out="o", data=EVERYTHING)).only(["1", "s2"])

    plan = plain.by_seeds((0, 3))

    assert {name: cell for name, cell in plan.cells.items() if name in plain.cells} == plain.cells  # what was done counts
    (judged,) = [each for each in plan.tables[0].wanted if (each.row, each.column) == ("+ LiFT", "PCK@0.1, 56 px")]
    assert judged.cells == ("correspondence-dino-s16-lift-dino-s16", "correspondence-dino-s16-lift-dino-s16-seed3")
    again = plan.cells[judged.cells[1]]
    assert again.needs == ("train-lift-dino-s16-seed3",)
    assert again.settings["levels"] == ("x1", "x2=lift:{train-lift-dino-s16-seed3}")
    trained = plan.cells["train-lift-dino-s16-seed3"].settings
    assert trained == {**plain.cells["train-lift-dino-s16"].settings, "seed": 3}
    assert plan.cells["train-lift-dino-s16-5-epochs-seed3"].settings["seed"] == 1 + 3  # another run than Table 1's
    assert "correspondence-leopart-seed3" not in plan.cells
    alone = plain.by_seeds((3,))
    assert len(alone.cells) == len(plain.cells)
    pictures = lift.plan(PapersConfig(out="o")).by_seeds((3, 4)).only(["fig4"])
    assert [each.pictures for each in pictures.tables] == [{"cka-dino-s16-lift-dino-s16-seed3": "pictures/cka.png"}]


VIT_UP_DATA = tuple(f"{name}=/there/{name}" for name in ("coco", "voc", "ade20k", "cityscapes", "spair", "navi", "photos"))


def test_the_plan_of_all_of_vit_up_names_what_is_missing(tmp_path):
    config = PapersConfig(out=str(tmp_path), plan=True, data=VIT_UP_DATA)

    text = "\n".join(paper_report.main(vit_up.plan, config))

    plan = vit_up.plan(config)
    assert [table.number for table in plan.tables] == ["1", "2", "4", "5", "6", "7", "9", "fig4"]
    unknown = {"depth", "table-7", "table-fig4"}
    for name, cell in plan.cells.items():
        if cell.missing and name not in unknown:
            method = name.split("-")[-1]
            assert cell.missing == f"{vit_up.LABELS[method]}'s weights for this backbone: give --weights {method}=URL"
    assert "Depth Anything V2" in text
    given = config.changed(weights=tuple(f"{method}=/there/{method}" for method in vit_up.RIVALS))
    assert {name for name, cell in vit_up.plan(given).cells.items() if cell.missing} == unknown


def test_vit_ups_published_numbers_stand_beside_their_cells(tmp_path):
    plan = vit_up.plan(PapersConfig(out=str(tmp_path), data=VIT_UP_DATA))
    tables = {table.number: {(each.row, each.column): each for each in table.wanted} for table in plan.tables}

    assert tables["1"]["ViT-Up", "Cityscapes mIoU"].published == 65.41
    assert tables["1"]["NAF", "VOC acc"].published == 96.72
    assert tables["1"]["bilinear", "depth δ1"].published == 61.52
    assert tables["2"]["UPLiFT", "NAVI 2 cm"].published == 49.05
    assert tables["4"]["ViT-Up", "SPair PCK@0.01"].published == 7.93
    assert tables["9"]["vit_up, 112 x 112 at once", "ms, 224 x 224"].line == "vit_up x8, 112 x 112 at once"
    assert tables["9"]["naf", "peak MiB, 448 x 448"].published == 1780.5


def test_a_probe_of_vit_up_is_trained_and_judged(demo, tmp_path):
    config = debug(tmp_path, "1", data=("coco=/not/there",))
    plan = vit_up.plan(config).only(["1"])
    names = ("readout-voc-splus-vit_up", "probe-voc-splus-vit_up", "train-vit-up-splus")
    few = replace(plan, cells={name: plan.cells[name] for name in names})

    outcomes = paper_run.run_papers_cells(config, few, InlineExecutor())

    assert {each.error for each in outcomes.values()} == {""}
    table = replace(plan.tables[0], wanted=tuple(each for each in plan.tables[0].wanted if each.cell == names[1]))
    found = figures_of(table, Results.read(replace(few, tables=(table,)), outcomes, config.folder))
    assert [bool(each.interval) for each in found] == [True, True]
    assert [each.wanted.published for each in found] == [87.47, 97.14]


# --- detectors --------------------------------------------------------------------------------------------------------


def test_detectors_are_trained_with_and_without_lift_and_judged(demo, tmp_path):
    """Table 4's cells as they are, but that one kind of heads serves both rows here: the other's are the same code."""
    config = debug(tmp_path, "4")
    plan = lift.plan(config).only(["4"])
    of_one = {name: cell for name, cell in plan.cells.items() if "cascade" not in name}
    assert list(of_one) == [
        "train-vitdet-mask_rcnn", "detection-mask_rcnn", "train-lift-on-mask_rcnn", "train-vitdet-mask_rcnn-lift",
        "detection-mask_rcnn-lift",
    ]  # fmt: skip
    few = replace(plan, tables=(), cells=of_one)

    outcomes = paper_run.run_papers_cells(config, few, InlineExecutor())

    assert {each.error for each in outcomes.values()} == {""}
    table = replace(plan.tables[0], wanted=tuple(each for each in plan.tables[0].wanted if each.cell in of_one))
    found = figures_of(table, Results.read(replace(few, tables=(table,)), outcomes, config.folder))
    assert [each.missing for each in found] == [""] * 12
    assert found[6].wanted.line == "lift x2"


def test_a_detector_that_is_given_is_not_trained():
    given = PapersConfig(out="o", data=("coco=c",), weights=("mask_rcnn=b.pkl", "cascade=c.pkl", "cascade-lift=d"))

    plan = lift.plan(given).only(["4"])

    assert {name for name in plan.cells if name.startswith("train")} == {"train-lift-on-mask_rcnn", "train-vitdet-mask_rcnn-lift"}
    assert plan.cells["train-vitdet-mask_rcnn-lift"].settings["weights"] == "b.pkl"
    assert plan.cells["detection-cascade-lift"].settings["finetuned"] == ("d",)
    assert not any(plan.lacks(cell) for cell in plan.cells.values())


@pytest.mark.parametrize("scale", ["paper", "mini", "debug"])
@pytest.mark.parametrize("steps", [None, 3, 1_500])
def test_settings_of_every_training_go_together(scale, steps):
    """Also with as many steps as a user says."""
    kinds = {"lift": X2Config, "vit-up": ViTUpTraining, "readout": ReadoutTraining, "vitdet": ViTDetTraining}
    config = PapersConfig(out="o", scale=scale, steps=steps)

    for make in (lift.plan, vit_up.plan, deap.plan):
        for cell in make(config).cells.values():
            if cell.job in kinds:
                training = kinds[cell.job].of(**cell.settings)
                assert steps is None or training.max_steps in (steps, 1) or cell.name.endswith("-epochs"), cell.name


def test_mini_trains_by_short_recipes_and_says_so():
    """LiFT and ViT-Up start as the enlargement, but where an ablation is of a start at random, or can't start so."""
    plans = {make: make(PapersConfig(out="o", scale="mini")) for make in (lift.plan, vit_up.plan, deap.plan)}
    starts = {
        name: cell.settings.get("start") for plan in plans.values() for name, cell in plan.cells.items() if "train-" in name
    }

    assert (
        starts["train-lift-dino-s16"] == starts["train-lift-dino-s16-no-image"] == starts["train-vit-up-splus"] == "enlargement"
    )
    assert starts["train-lift-dino-s16-random"] == "drawn"
    assert {starts["train-jbu-dino-s16"], starts["train-vit-up-splus-without-cross-attention"]} == {None}
    for make, plan in plans.items():
        said = {
            table.number: [note for note in table.notes if "(--scale mini), trained by short recipes" in note]
            for table in plan.tables
        }
        assert {number for number, notes in said.items() if notes} == {
            table.number for table in plan.tables if table.wanted and (make, table.number) != (deap.plan, "4")
        }
        assert not any("--scale" in note for table in make(PapersConfig(out="o")).tables for note in table.notes)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a file", "below one"])
@pytest.mark.parametrize("words", [["lift", "debug"], ["deap", "debug", "--plan"], ["grid", "debug"]])
def test_an_output_that_is_a_file_is_refused_before_anything_is_done(demo, tmp_path, capsys, words, where):
    file = tmp_path / "file"
    file.write_bytes(b"mine")

    assert job.run([*words, "--out", str(file if where == "a file" else file / "tables")]) == 2

    said = "is a file" if where == "a file" else f"lies below {file}, which is a file"
    assert f"{said}; give a folder" in capsys.readouterr().err
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"table": ("9",)}, "--table 9: there are 1, 2, 3"),
        ({"data": ("imagenet=x",)}, "--data imagenet: there are coco, coco20k"),
        ({"weights": ("dino=x",)}, "--weights dino: there are cascade, cascade-lift, dino-b16"),
        ({"data": ("spair",)}, "--data spair: use DATASET=FOLDER"),
        ({"data": ("spair=a", "spair=b")}, "--data spair=b: spair is a already; give each once"),
        ({"seeds": (1, 1)}, "--seeds 1 1: must be different ones"),
        ({"seeds": ()}, "--seeds: give at least one"),
        ({"out": ""}, "no output: give --out"),
        ({"data": ("spair=nowhere",)}, "--data spair nowhere: there is no such folder"),
        ({"scale": "mini", "root": "nowhere"}, "--root nowhere: there is no such folder"),
    ],
)
def test_words_that_mean_nothing_are_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        printed(PapersConfig(out=str(tmp_path)).changed(**changes))


def test_a_root_is_minis(tmp_path):
    with pytest.raises(ConfigError, match="only mini's layout is known"):
        PapersConfig(root=str(tmp_path))
    cells = lift.plan(PapersConfig(out="o", scale="mini", root=str(tmp_path))).cells
    assert cells["video-dino-s16"].settings["data"] == f"{tmp_path}/labelled/davis/DAVIS"
    assert cells["train-lift-dino-s16"].settings["weights"] == f"{tmp_path}/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


# --- real processes ---------------------------------------------------------------------------------------------------


def mini(out: Path, root: Path, *more: str) -> subprocess.Popen[bytes]:
    """Table 1 of `tables lift mini`, as it is."""
    command = [sys.executable, "jobs/tables.py", "lift", "mini", "--table", "1", "--root", str(root), "--out", str(out), *more]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def objects(folder: Path) -> int:
    """That are below it."""
    return sum(len(files) for _, _, files in os.walk(folder))


def workers(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Those that do cells now."""
    found = []
    for each in family(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [each] if each.name().startswith("ray::_Actor") else []
    return found


def killed_again_and_again(out: Path, root: Path, kinds: list[str], moments: list[int]) -> int:
    """Start it, kill what `kinds` have once it has written so many objects, and let it end; gives the last exit code."""
    on_two = ["--executor", "ray", "--ray-address", "local", "--actors", "2", "--max-failures", "9"]
    for _ in range(2 * len(kinds) + 2):
        with ended(mini(out, root, *on_two)) as run:
            while kinds and run.poll() is None:
                kind = kinds[-1]
                while run.poll() is None and (objects(out) < moments[0] or (kind == "worker" and not workers(run))):
                    time.sleep(0.1)
                if run.poll() is not None:
                    break
                kinds.pop()
                moments.pop(0)
                kill(run, kind)
                if kind != "worker":
                    break
            code = run.wait(timeout=5400)
        if code == 0 and not kinds:
            break
    return code


def require_same_tables(out: Path, other: Path) -> None:
    """To the digit; with every number that mini's data has."""
    assert (out / "tables.md").read_bytes() == (other / "tables.md").read_bytes()
    tables = [json.loads((each / "tables.json").read_text())["tables"] for each in (other, out)]
    assert tables[0] == tables[1]
    assert sum(each["measured"] is not None for each in tables[0][0]["figures"]) == 30  # 5 rows, 3 thresholds, 2 sizes


@pytest.mark.soak
@pytest.mark.timeout(14_400)
def test_table_1_killed_five_times_on_two_workers_is_the_same_to_the_digit(shared_data, tmp_path):
    """kill -9 of a worker, of the driver, or of all of its Ray, whichever is drawn, at a random moment of its writing."""
    with ended(mini(tmp_path / "whole", shared_data, "--executor", "inline", "--device", "cpu")) as whole:
        assert whole.wait(timeout=5400) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    draw, out, kinds = random.Random(24), tmp_path / "killed", ["worker", "driver", "cluster", "worker", "driver"]
    draw.shuffle(kinds)
    moments = sorted(draw.sample(range(3, objects(tmp_path / "whole") - 8), len(kinds)))  # the tables' own come last

    code = killed_again_and_again(out, shared_data, kinds, moments)

    assert (code, kinds) == (0, []), out.with_suffix(".log").read_text()[-3000:]
    require_same_tables(out, tmp_path / "whole")
