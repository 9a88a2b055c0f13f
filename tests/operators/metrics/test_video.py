"""Label propagation and the J and F of DAVIS: official values, and exactness in tiles of any size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from operators.metrics.davis import (
    ObjectCurves,
    Statistics,
    boundary,
    boundary_f,
    region_j,
    score_clip,
    summarise,
    tolerance_pixels,
)
from operators.metrics.propagation import Propagation, Propagator, label_image, nearest, one_hot
from tests.goldens import Allocations
from tests.goldens import evaluation_golden as golden

DAVIS = golden("davis_jf")
MASKS = sorted(key.removesuffix("_J") for key in DAVIS if key[0] == "s" and key[1].isdigit() and key.endswith("_J"))


@pytest.mark.parametrize("case", MASKS)
def test_masks_score_as_in_the_official_evaluation(case):
    truth, predicted, void = DAVIS[f"{case}_gt"], DAVIS[f"{case}_pred"], DAVIS.get(f"{case}_void")

    assert tolerance_pixels(truth.shape) == DAVIS[f"{case}_bound_pix"]
    assert region_j(truth, predicted, void) == pytest.approx(float(DAVIS[f"{case}_J"]), abs=1e-9)
    assert boundary_f(truth, predicted, void) == pytest.approx(float(DAVIS[f"{case}_F"]), abs=1e-9)
    for name, mask in (("gt", truth), ("pred", predicted)):
        if f"{case}_bmap_{name}" in DAVIS:
            np.testing.assert_array_equal(boundary(mask), DAVIS[f"{case}_bmap_{name}"])


def test_all_official_cases_are_there():
    assert len(MASKS) == 36


@pytest.mark.parametrize(("measure", "name"), [(region_j, "J"), (boundary_f, "F")])
def test_statistics_over_frames_are_the_official_ones(measure, name):
    values = [measure(*pair) for pair in zip(DAVIS["stack_gt"], DAVIS["stack_pred"], strict=True)]

    np.testing.assert_allclose(values, DAVIS[f"stack_{name}"], atol=1e-9)
    found = dataclasses.astuple(Statistics.of(values))
    np.testing.assert_allclose(found, DAVIS[f"stack_{name}_stats"], atol=1e-9)


def test_whole_sequences_score_as_in_the_official_evaluation():
    curves = [
        curve for clip in ("alpha", "beta") for curve in score_clip(clip, DAVIS[f"seq_{clip}_gt"], DAVIS[f"seq_{clip}_pred"])
    ]

    assert [f"{curve.clip}_{curve.object_id}" for curve in curves] == DAVIS["seq_object_names"].tolist()
    for i, curve in enumerate(curves):
        for letter, values in (("J", curve.j), ("F", curve.f)):
            expected = [DAVIS[f"seq_{letter}_{name}"][i] for name in "MRD"]
            np.testing.assert_allclose(dataclasses.astuple(Statistics.of(values)), expected, atol=1e-9)
    summary = summarise(curves)
    assert summary.objects == 5
    assert summary.j_and_f == pytest.approx(float(DAVIS["seq_JandF_mean"]), abs=1e-9)
    assert summary.j.recall == pytest.approx(DAVIS["seq_J_R"].mean(), abs=1e-9)
    assert summary.f.decay == pytest.approx(DAVIS["seq_F_D"].mean(), abs=1e-9)
    assert summarise(curves[::-1]) == summary


def test_statistics_of_few_and_of_many_frames():
    assert Statistics.of([0.7]) == Statistics(mean=0.7, recall=1.0, decay=0.0)
    assert Statistics.of([0.5, 0.5]).recall == 0
    # Official indices wrap from 256 frames on; these don't.
    falling = np.linspace(1, 0, 401)
    assert Statistics.of(falling).decay == pytest.approx(0.75, abs=1e-12)
    with pytest.raises(ValueError, match="without scored frames"):
        Statistics.of([])


def test_masks_of_one_pixel_and_tolerances_in_pixels():
    one, none = np.ones((1, 1), bool), np.zeros((1, 1), bool)

    assert (region_j(one, one), region_j(none, none), region_j(one, none)) == (1, 1, 0)
    assert (boundary_f(one, one), boundary_f(one, none)) == (1, 1)  # neither has a boundary
    assert tolerance_pixels((480, 854)) == 8
    assert tolerance_pixels((480, 854), 3) == 3
    shifted = np.zeros((2, 40, 40), bool)
    shifted[0, 10:20, 10:20] = shifted[1, 10:20, 13:23] = True
    assert boundary_f(*shifted, tolerance=3) == 1
    assert boundary_f(*shifted, tolerance=2) < 1
    with pytest.raises(ValueError, match="one size"):
        region_j(one, np.ones((1, 2), bool))


def clip_of(*frames: int) -> np.ndarray:
    """Label images 4 x 4 whose upper half has the given ids."""
    clip = np.zeros((len(frames), 4, 4), np.uint8)
    clip[:, :2] = np.array(frames)[:, None, None]
    return clip


def test_void_is_background_and_lost_objects_score_nothing():
    truth = clip_of(2, 2, 1, 2, 2)
    truth[:, 3] = 255
    truth[0, 3, 0] = 1

    first, second = score_clip("clip", truth, np.where(truth == 255, 0, truth))
    assert first.j == second.j == (1, 1, 1)
    assert score_clip("clip", truth, np.zeros_like(truth))[1].j == (0, 1, 0)
    assert len(score_clip("clip", truth, np.where(truth == 255, 0, truth), ends=0)[0].j) == 5


def test_clips_that_cannot_be_scored():
    truth = clip_of(1, 1, 1)

    with pytest.raises(ValueError, match="clip a: 2 predicted frames for 3"):
        score_clip("a", truth, truth[:2])
    with pytest.raises(ValueError, match="2 frames, and 2 of them"):
        score_clip("a", truth[:2], truth[:2])
    with pytest.raises(ValueError, match="no object"):
        score_clip("a", clip_of(255, 1, 1), truth)
    with pytest.raises(ValueError, match="frame 1: the prediction has id 255, .* void"):
        score_clip("a", truth, clip_of(1, 255, 1))
    with pytest.raises(ValueError, match=r"frame 1: the prediction is \(4, 3\)"):
        score_clip("a", truth, truth[:, :, :3])
    with pytest.raises(ValueError, match="no object to average"):
        summarise([])
    curve = ObjectCurves(clip="a", object_id=1, j=(1.0,), f=(1.0,))
    with pytest.raises(ValueError, match="once"):
        summarise([curve, curve])


PROPAGATION = golden("label_propagation")


@pytest.mark.parametrize("max_bytes", [1, 50_000, 2**26])
@pytest.mark.parametrize("case", [str(name) for name in PROPAGATION["case_names"]])
def test_propagation_is_that_of_lifts_script(case, max_bytes):
    data = {key.removeprefix(f"{case}_"): value for key, value in PROPAGATION.items() if key.startswith(f"{case}_")}
    settings = json.loads(str(data["params"]))
    maps = torch.from_numpy(data["features"]).permute(0, 2, 3, 1)
    labels = one_hot(data["first_mask_full"], tuple(maps.shape[1:3]))
    propagator = Propagator(
        maps[0],
        labels,
        Propagation(
            context=settings["n_last_frames"],
            top_k=settings["topk"],
            radius=settings["size_mask_neighborhood"],
            temperature=settings["temperature"],
        ),
        max_bytes=max_bytes,
    )

    soft = [propagator.step(each) for each in maps[1:]]

    np.testing.assert_array_equal(labels, data["first_onehot"])
    np.testing.assert_allclose(torch.stack(soft), data["soft"], rtol=0, atol=1e-5)
    for each, expected in zip(soft, data["labels_full"][1:], strict=True):
        found = label_image(each, settings["upsample_factor"], expected.shape)
        assert (found == expected).mean() >= 0.999


def straightforward(maps: torch.Tensor, labels: torch.Tensor, settings: Propagation) -> torch.Tensor:
    """All affinities at once, float64, step by step as DINO's code has them."""
    _, h, w, _ = maps.shape
    unit = F.normalize(maps.double(), dim=-1).flatten(1, 2)
    y, x = (each.flatten() for each in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    near = ((y[:, None] - y).abs() <= settings.radius) & ((x[:, None] - x).abs() <= settings.radius)
    first, latest, out = (unit[0], labels.flatten(1).double()), [], []
    for target in unit[1:]:
        context = [first, *latest[len(latest) - min(settings.context, len(latest)) :]]
        affinity = torch.stack([(target @ source.t() / settings.temperature).exp() for source, _ in context], dim=1)
        affinity = (affinity * near[:, None] if settings.radius else affinity).flatten(1)
        kth = affinity.topk(min(settings.top_k, affinity.shape[1]), dim=1).values[:, -1:]
        affinity = affinity * (affinity >= kth)
        soft = torch.cat([known for _, known in context], dim=1) @ (affinity / affinity.sum(dim=1, keepdim=True)).t()
        latest.append((target, soft))
        out.append(soft.unflatten(1, (h, w)))
    return torch.stack(out)


@pytest.mark.parametrize("radius", [0, 1, 3, 20])
@pytest.mark.parametrize(("grid", "context", "top_k"), [((7, 11), 2, 5), ((1, 5), 3, 1), ((13, 6), 0, 4), ((9, 9), 1, 90)])
def test_tiles_of_any_size_give_what_all_affinities_give(grid, context, top_k, radius):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, *grid, 4, generator=generator) + 0.5 * torch.randn(5, *grid, 4, generator=generator)
    labels = F.one_hot(torch.randint(0, 3, grid, generator=generator)).permute(2, 0, 1).float()
    settings = Propagation(context=context, top_k=top_k, radius=radius)
    expected = straightforward(maps, labels, settings)

    for max_bytes in (1, 4000, 2**26):
        propagator = Propagator(maps[0], labels, settings, max_bytes=max_bytes)
        soft = torch.stack([propagator.step(each) for each in maps[1:]])
        torch.testing.assert_close(soft, expected.float(), rtol=0, atol=2e-5)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(4, *grid), rtol=0, atol=1e-5)


def test_affinities_equal_to_the_k_th_all_count():
    # Cells are one of three kinds, so that nearly all affinities are tied; and 40 columns make for groups of maxima.
    kinds = torch.arange(240).view(6, 40) % 3
    maps = F.one_hot(kinds, 3).float().expand(4, -1, -1, -1)
    labels = F.one_hot((torch.arange(240).view(6, 40) * 7 % 5 > 2).long()).permute(2, 0, 1).float()
    settings = Propagation(context=2, top_k=5, radius=0)

    propagator = Propagator(maps[0], labels, settings)
    soft = torch.stack([propagator.step(each) for each in maps[1:]])

    torch.testing.assert_close(soft, straightforward(maps, labels, settings).float(), rtol=0, atol=1e-5)
    # Every cell has the mean label of its kind, not that of five cells.
    torch.testing.assert_close(soft[0, 1][kinds == 1], labels[1][kinds == 1].mean().expand(80))


def test_labels_stay_with_their_objects():
    # One-hot object ids as features: an object that moves by 2 cells a frame keeps its label exactly.
    frames = torch.zeros(5, 20, 20, dtype=torch.int64)
    for t in range(5):
        frames[t, 3:9, 2 + 2 * t : 8 + 2 * t] = 1
        frames[t, 12:15, 10:16] = 2
    maps = F.one_hot(frames, 3).float()

    propagator = Propagator(maps[0], F.one_hot(frames[0], 3).permute(2, 0, 1), Propagation(), max_bytes=100_000)

    for t in range(1, 5):
        assert torch.equal(propagator.step(maps[t]).argmax(dim=0), frames[t])


def test_propagation_makes_nothing_larger_than_its_budget():
    maps = torch.randn(4, 32, 32, 8)
    propagator = Propagator(maps[0], torch.ones(1, 32, 32), Propagation(context=3), max_bytes=400_000)

    with Allocations() as made:
        for each in maps[1:]:
            propagator.step(each)

    # All affinities of the last frame are 12.6 MB.
    assert made.largest < 400_000


def test_propagation_refuses_what_does_not_fit():
    maps, labels = torch.randn(4, 5, 3), torch.ones(2, 4, 5)

    with pytest.raises(ValueError, match="don't fit"):
        Propagator(maps, labels[:, :3], Propagation())
    with pytest.raises(ValueError, match="NaN"):
        Propagator(maps / 0 * 0, labels, Propagation())
    propagator = Propagator(maps, labels, Propagation())
    with pytest.raises(ValueError, match=r"\(5, 4, 3\) follows one of \(4, 5, 3\)"):
        propagator.step(maps.transpose(0, 1))
    for wrong in ({"top_k": 0}, {"temperature": 0.0}, {"radius": -1}, {"context": -1}):
        with pytest.raises(ValueError, match="impossible"):
            Propagation(**wrong)


def test_one_cell_and_low_temperatures_keep_their_labels():
    maps = torch.tensor([[[[1.0, 2.0]]], [[[2.0, 1.0]]]])
    labels = torch.tensor([0.25, 0.75]).view(2, 1, 1)

    propagator = Propagator(maps[0], labels, Propagation(temperature=1e-4))

    assert torch.equal(propagator.step(maps[1]), labels)
    assert propagator.step(torch.zeros(1, 1, 2)).isfinite().all()


def test_small_objects_vanish_on_coarse_grids_as_in_the_official_code():
    labels = np.zeros((32, 32), np.uint8)
    labels[4:20, 4:20], labels[0, 0], labels[31, 31] = 2, 1, 3

    found = one_hot(labels, (4, 4))

    assert found.shape == (3, 4, 4)
    assert found[1].sum() == 0
    assert nearest(labels, (32, 32)).tolist() == labels.tolist()


def test_constant_maps_win_everywhere_as_nan_does_in_the_official_code():
    soft = torch.zeros(3, 2, 2)
    soft[1, 0, 0] = 1

    assert label_image(soft, 2, (4, 4))[0, 0] == 1
    assert label_image(soft, 2, (4, 4)).max() == 1  # object 2 is nowhere
    soft[2] = 0.3
    assert (label_image(soft, 2, (4, 4)) == 2).all()
    assert (label_image(torch.zeros(1, 1, 1), 3, (2, 5)) == 0).all()
