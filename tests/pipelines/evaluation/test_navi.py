"""NAVI's geometric correspondence: views, partners, matches and recalls are those of the released code (README_navi.md)."""

import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jobs.evaluate import run
from operators.metrics.navi import Camera, Crop, NaviError, PairCounts, Recalls, angle, match
from pipelines.evaluation.navi import Drawing, draw_pairs, geometry, prepare_depth, prepare_photo
from pipelines.features.photos import upright_pixels
from storage.datasets.files import DatasetError, ItemLeftOut
from storage.datasets.images import ImageFile
from storage.datasets.navi import NaviView, load_navi
from storage.paths import Folder
from tests.goldens import golden_file, tensor_golden

SIDE = 448
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("navi")
    with tarfile.open(golden_file("navi_mini.tar")) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def views(data):
    return {view.name: view for each in load_navi(Folder(str(data))) for view in each}


def image_of(view: NaviView) -> Tensor:
    """As the model gets it, [3, S, S]."""
    pixels = torch.from_numpy(Drawing(view=view, side=SIDE)(upright_pixels(view.image)))
    return ((pixels.float() / 255 - MEAN) / STD).permute(2, 0, 1)


def test_the_test_split_are_the_wild_sets_of_objects_that_have_other_scenes_sorted(views):
    _, config = tensor_golden("navi_mini")

    assert list(views) == ["/".join(each) for each in config["instances_stride1"]]


def test_views_are_those_of_the_released_reader(views):
    expected, _ = tensor_golden("navi_mini")

    for name, view in views.items():
        crop, found = geometry(view, SIDE)
        torch.testing.assert_close(found.pose, expected[f"{name}/Rt"], rtol=0, atol=1e-6)
        torch.testing.assert_close(found.points_GG3[::2, ::2].permute(2, 0, 1), expected[f"{name}/xyz_56"], rtol=0, atol=1e-6)
        torch.testing.assert_close(image_of(view)[:, ::8, ::8], expected[f"{name}/image_8"], rtol=0, atol=1e-6)
        assert found.focal_length == pytest.approx(float(expected[f"{name}/intrinsics"][0, 0]), rel=1e-6)
        mask = crop(np.array(Image.open(f"{view.image.folder.url}/{view.object}/{view.scene}/masks/{view.id}.png")))
        assert ((mask[::4, ::4] > 127) == expected[f"{name}/mask_112"][0].bool().numpy()).all()


def test_partners_are_those_of_the_released_draw_of_which_every_fourth_is_taken(data):
    _, config = tensor_golden("navi_mini")
    objects = load_navi(Folder(str(data)))

    pairs, alone = draw_pairs(objects, 1)
    fourth, _ = draw_pairs(objects, 4)

    found = {pair.source.name: pair.target.id for pair in pairs}
    scenes = {(o, scene): ids for o, scenes in config["pairs"].items() for scene, ids in scenes.items()}
    assert found == {f"{o}/{scene}/{i}": partner for (o, scene), ids in scenes.items() for i, partner in ids.items()}
    assert [pair.source.name for pair in fourth] == ["/".join(each) for each in config["instances_stride4"]]
    assert not alone


def conv_features(view: NaviView, weight: Tensor) -> Tensor:
    return F.conv2d(image_of(view)[None], weight, stride=16)[0].permute(1, 2, 0)


def object_features(view: NaviView, _: Tensor) -> Tensor:
    """Where each point is on the object, times 10, and a constant: what perfect features would tell."""
    found = geometry(view, SIDE)[1]
    points, back = found.points_GG3.flatten(0, 1).double(), torch.linalg.inv(found.pose.double())
    places = (points @ back[:3, :3].T + back[:3, 3]) * (points[:, 2:] > 0)
    return torch.cat([10 * places, torch.ones(len(places), 1)], dim=1).float().unflatten(0, (112, 112))


@pytest.mark.parametrize(("features", "of"), [("conv", conv_features), ("object", object_features)])
def test_recalls_are_those_of_the_released_matcher(features, of, data):
    expected, config = tensor_golden("navi_mini")
    weight, summary = expected["feature_conv_weight"], config[f"summary_{features}"]
    pairs, _ = draw_pairs(load_navi(Folder(str(data))), 1)
    counts = []

    for number, pair in enumerate(pairs):
        sides = [geometry(view, SIDE)[1] for view in (pair.source, pair.target)]
        found = match(*sides, (of(pair.source, weight), of(pair.target, weight)), config["num_corr"]).counts(config["num_corr"])
        recalls = torch.tensor(found.by_metres) / config["num_corr"]
        torch.testing.assert_close(recalls, expected[f"pair_{number}/{features}_recall_1_2_5cm"], rtol=0, atol=1e-6)
        counts.append(found)

    found = Recalls.of(counts)
    names = {"0.01m": 0.01, "0.02m": 0.02, "0.05m": 0.05}
    assert [100 * each for each in found.by_metres] == pytest.approx([summary[f"recall_{name}"] for name in names], abs=1e-4)
    assert [100 * each for each in found.by_pixels] == pytest.approx([summary[f"recall_{n}px"] for n in (5, 25, 50)], abs=1e-4)
    bins = [summary[f"recall_2cm_angle_{low}_{low + 30}"] for low in (0, 30, 60, 90)]
    bins = [np.nan if each is None else each for each in bins]
    assert [100 * each for each in found.by_degrees] == pytest.approx(bins, abs=1e-4, nan_ok=True)


def test_parts_of_the_product_give_the_same_matches(views):
    expected, _ = tensor_golden("navi_mini")
    first, second, *_ = views.values()
    sides = [geometry(view, SIDE)[1] for view in (first, second)]
    maps = tuple(conv_features(view, expected["feature_conv_weight"]) for view in (first, second))

    whole, parts = match(*sides, maps, 200), match(*sides, maps, 200, max_bytes=2**20)

    assert torch.equal(whole.source, parts.source)
    assert torch.equal(whole.target, parts.target)


def test_matches_that_lack_are_wrong():
    found = PairCounts(matches=200, found=50, by_metres=(50, 50, 50), by_pixels=(50, 50, 50), degrees=10)

    assert Recalls.of([found]).by_metres == (0.25, 0.25, 0.25)


def test_originals_are_made_smaller_as_the_released_script_does_it(data):
    """Its files beside the originals of the mini data set have a short side of 120 instead of 1,024 pixels."""
    for image in sorted(data.glob("navi_v1/*/*/images/[0-9]*.jpg")):
        prepared = image.with_name(f"downsampled_{image.name}")
        upright = np.array(Image.fromarray(upright_pixels(_file(image))))
        assert (prepare_photo(upright, 120) == np.array(Image.open(prepared))).all(), image
        depth = image.parent.parent / "depth" / f"{image.stem}.png"
        smaller = np.array(Image.open(depth.with_name(f"downsampled_{depth.name}")))
        assert (prepare_depth(np.array(Image.open(depth)), 120) == smaller).all(), depth


def _file(path):
    return ImageFile.at(Folder(str(path.parent)), path.name)


def test_a_view_may_be_turned_from_itself_by_rounding():
    """In single precision; so the released draw may pair it with itself."""
    quaternions = np.random.default_rng(0).normal(size=(64, 4)).tolist()
    poses = [Camera(quaternion=q, translation=(0, 0, 400), focal_length=8, image_size=(8, 8)).pose for q in quaternions]

    assert 0 < sum(angle(pose, pose) > 0 for pose in poses) < 64


# --- the job ----------------------------------------------------------------------------------------------------------

PROGRAM = [
    "--model",
    "test_vit.r160_in1k",
    "--weights",
    "random",
    "--precision",
    "fp32",
    "--executor",
    "inline",
    "--device",
    "cpu",
]


def evaluate(data, out, *more: str, side: int = 448) -> int:
    levels = ["--levels", "x1", f"{side // 4}x{side // 4}=bilinear", "--sizes", str(side), "--every", "1", "--matches", "200"]
    return run(["correspondence", "--protocol", "navi", "--data", str(data), "--out", str(out), *levels, *PROGRAM, *more])


def test_the_job_gives_recalls_by_row_with_pictures_and_every_choice(data, tmp_path, capsys):
    assert evaluate(data, tmp_path / "out", "--paper") == 0

    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {line["features"]: line["values"] for line in found["tables"][0]["lines"] if not line["published"]}
    assert set(rows) == {"low-res", "bilinear 112x112"}
    assert all(values[0] < values[1] < values[2] and values[-1] == 9 for values in rows.values())
    assert "ViT-Up Table 2, DINOv3-S+ is of other settings than this run" in said
    assert "over 9 pairs" in said
    assert found["choices"]["diamond variant"].startswith("left out")
    with Image.open(tmp_path / "out" / "pictures" / "matches.png") as picture:
        assert picture.width > 900


def test_a_view_whose_depth_says_nothing_costs_its_pairs_alone(data, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    depth = broken / "navi_v1" / "ball_b" / "wild_set" / "depth" / "downsampled_000.png"
    Image.fromarray(np.zeros((120, 160), np.uint16)).save(depth)

    assert evaluate(broken, tmp_path / "out", side=112) == 0

    said = capsys.readouterr().out
    assert "over 8 pairs; 1 left out" in said
    assert "no pixel of its depth has a value" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "ball_b" / "multiview_00_pixel_5"), None),
        (lambda root: (root / "ball_b" / "wild_set" / "annotations.json").write_text("{"), "annotations.json is malformed"),
        (lambda root: (root / "ball_b" / "wild_set" / "annotations.json").write_text("[]"), "says nothing of 000.jpg .5 such"),
        (lambda root: (root / "ball_b" / "wild_set" / "depth" / "downsampled_001.png").unlink(), None),
        (lambda root: [shutil.rmtree(each / "wild_set") for each in root.iterdir() if (each / "wild_set").is_dir()], "no object"),
    ],
)
def test_what_is_missing_is_said(change, message, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    root = tmp_path / "data" / "navi_v1"

    change(root)

    if message:
        with pytest.raises(DatasetError, match=message):
            load_navi(Folder(str(tmp_path / "data")))
    else:
        assert load_navi(Folder(str(root)))


def changed(root, change) -> None:
    """The first view of ball_b's annotations."""
    path = root / "navi_v1/ball_b/wild_set/annotations.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(change(entries) or entries))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: {"views": entries}, "it is no list of views, each with its filename"),
        (lambda entries: entries[0].pop("filename") and None, "it is no list of views, each with its filename"),
        (lambda entries: entries.append(entries[0]), "000.jpg is there twice"),
        (lambda entries: entries[0]["camera"].update(q=[math.nan, 0, 0, 1]), "000.jpg: q .* are no rotation"),
        (lambda entries: entries[0]["camera"].update(t=[0, math.inf, 0]), "000.jpg: q .* are no rotation"),
        (lambda entries: entries[0]["camera"].update(focal_length=0), "000.jpg: the focal length is 0; it should be"),
        (lambda entries: entries[0]["camera"].update(focal_length="x"), "000.jpg: the focal length is x; it should be"),
        (lambda entries: entries[0].update(image_size=[0, 4]), r"000.jpg: its size is \[0, 4\]; it should be height, width"),
        (lambda entries: entries[0].update(image_size=[4]), r"000.jpg: its size is \[4\]; it should be height, width"),
    ],
)
def test_annotations_that_cannot_be_right_are_said(change, message, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    changed(tmp_path / "data", change)

    with pytest.raises(DatasetError, match=message):
        load_navi(Folder(str(tmp_path / "data")))


def test_views_without_an_image_are_counted(data, tmp_path, caplog):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/navi_v1/ball_b/wild_set/images/001.jpg").unlink()

    load_navi(Folder(str(tmp_path / "data")))

    assert "ball_b/wild_set/annotations.json: 1 views have no image and are left out, such as 001" in caplog.text


def test_a_depth_of_other_proportions_than_its_photograph_is_no_views(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    depth = tmp_path / "data/navi_v1/ball_b/wild_set/depth/downsampled_000.png"
    Image.fromarray(np.full((50, 50), 3000, np.uint16)).save(depth)
    (view, *_), *_ = load_navi(Folder(str(tmp_path / "data")))

    with pytest.raises(ItemLeftOut, match="its depth is of 50 x 50 pixels, and the photograph of .*: other proportions"):
        Drawing(view=view, side=SIDE)(upright_pixels(view.image))


def test_several_sizes_are_refused_as_one_is_used(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(data, tmp_path / "out", "--sizes", "224", "448")

    assert "--sizes 224 448: --protocol navi has one" in capsys.readouterr().err


def test_views_without_points_are_refused():
    with pytest.raises(NaviError, match="no pixel"):
        Crop.round_object(np.zeros((16, 16), np.float32), 8)
