"""Boundaries and objects as points: targets, losses, boxes, and their scores."""

import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from operators.metrics.boundaries import boundary_sums, merge
from operators.metrics.detection import CocoScores, class_agnostic_scores, coco_scores, coco_scores_by_class
from operators.objectives.targets import boundary_target, instance_ids
from operators.readouts.centernet import centernet_boxes, centernet_loss, centernet_targets
from tests.goldens import GOLDEN
from tests.goldens import evaluation_golden as golden
from tests.original_centernet import (
    gaussian_radius,
    l1_at_cells,
    penalty_reduced_focal,
    points_boxes,
    points_loss,
    points_targets,
)

# --- ids and boundaries -----------------------------------------------------------------------------------------------


def test_the_earlier_annotation_owns_shared_pixels():
    masks = np.zeros((4, 2, 4), bool)
    masks[0, :, :2] = masks[1, :, 1:3] = masks[2, :, 1] = masks[3, 1, 2:] = True

    ids = instance_ids(masks)

    assert ids.dtype == np.int32
    assert ids.tolist() == [[1, 1, 2, 0], [1, 1, 2, 4]]


def test_an_image_without_objects_has_no_ids_and_no_boundary():
    ids = instance_ids(np.zeros((0, 120, 130), bool))

    assert ids.shape == (120, 130)
    assert not ids.any()
    assert not boundary_target(ids).any()


@pytest.mark.parametrize("masks", [np.zeros((4, 4), bool), np.zeros((1, 4, 4), np.uint8)])
def test_masks_of_another_kind_are_refused(masks):
    with pytest.raises(ValueError, match=r"masks must be bool \[N, H, W\], got"):
        instance_ids(masks)


@pytest.mark.parametrize("case", ["c0", "c1"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_boundaries_are_those_of_scikit_image(case, dtype):
    stored = golden("deap_labels")

    boundary = boundary_target(stored[f"{case}_ids"].astype(dtype))

    assert boundary.dtype == bool
    np.testing.assert_array_equal(boundary, stored[f"{case}_boundary"])


@pytest.mark.parametrize(
    ("side", "columns"),
    [(99, {49, 50}), (199, {49, 50}), (200, {48, 49, 50}), (300, {48, 49, 50, 51}), (448, {47, 48, 49, 50, 51})],
)
def test_even_windows_reach_further_ahead(side, columns):
    ids = np.zeros((20, side), int)
    ids[:, 50:] = 7

    boundary = boundary_target(ids)

    assert set(np.flatnonzero(boundary[0]).tolist()) == columns
    assert (boundary == boundary[0]).all()


def test_touching_objects_have_a_boundary_between_them():
    ids = np.ones((9, 9), int)
    ids[4:, 4:] = 2

    boundary = boundary_target(ids)

    assert boundary[3, 3]  # by the corner only
    assert boundary[8, 3:5].all()
    assert not boundary[8, 5]
    assert not boundary[2].any()


def test_ids_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"ids must be whole numbers \[H, W\], got float64 \(4, 4\)"):
        boundary_target(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"got torch.float32 \(4, 4\)"):
        centernet_targets(torch.zeros(4, 4))


def test_boundary_scores_are_those_of_torchmetrics():
    stored = golden("miou")

    sums = boundary_sums(torch.from_numpy(stored["bin_logits"]), torch.from_numpy(stored["bin_target"]))

    assert sums.iou == pytest.approx(float(stored["bin_iou"]), abs=1e-6)
    assert sums.cross_entropy == pytest.approx(float(stored["bin_bce"]), abs=1e-6)
    assert sums.batches == 1


def test_boundary_sums_merge_to_the_last_digit_in_any_order():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 9, 7, generator=generator)
    target = torch.rand(12, 9, 7, generator=generator) > 0.7
    parts = [boundary_sums(logits[i : i + 2], target[i : i + 2]) for i in range(0, 12, 2)]

    merged = merge(parts)

    assert merged == merge(parts[::-1]) == merge(parts[3:] + parts[:3])
    # IoU is pooled; it isn't the batches' mean.
    assert merged.iou == boundary_sums(logits, target).iou
    assert merged.iou != np.mean([part.iou for part in parts])
    assert merged.cross_entropy == pytest.approx(np.mean([part.cross_entropy for part in parts]), rel=1e-12)
    assert merged.batches == 6


def test_a_probability_of_a_half_is_no_boundary():
    sums = boundary_sums(torch.tensor([[[0.0, 1.0, -1.0, 1.0]]]), torch.tensor([[[True, True, True, False]]]))

    assert (sums.intersection, sums.union) == (1, 4)


def test_boundaries_without_a_score():
    nothing = boundary_sums(torch.full((1, 2, 2), -5.0), torch.zeros(1, 2, 2, dtype=torch.bool))

    assert nothing.iou == 0
    with pytest.raises(ValueError, match="no batch to average"):
        _ = merge([]).cross_entropy
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and boundaries \(1, 2, 3\)"):
        boundary_sums(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        boundary_sums(torch.full((1, 2, 2), torch.nan), torch.zeros(1, 2, 2, dtype=torch.bool))


# --- DeAP's objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_centres_and_sizes_are_the_reference_ones(case):
    stored = golden("deap_labels")

    targets = centernet_targets(torch.from_numpy(stored[f"{case}_ids"]))

    np.testing.assert_allclose(targets.heat_HW, stored[f"{case}_heatmap"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(targets.sizes_2HW, stored[f"{case}_size_map_wh"], rtol=0, atol=1e-7)


def test_later_objects_overwrite_sizes_and_heat_is_clipped():
    ids = torch.zeros(224, 224, dtype=torch.int32)
    ids[30:131, 10:151] = 3  # 101 x 141 pixels around (80, 80)
    ids[70:91, 60:101] = 8  # 21 x 41 around the same centre

    targets = centernet_targets(ids)

    assert targets.heat_HW.max() == targets.heat_HW[80, 80] == 1
    torch.testing.assert_close(targets.sizes_2HW[:, 80, 80], torch.tensor([40 / 224, 20 / 224]))
    assert (targets.sizes_2HW[0] > 0).sum() == 21  # pixels of a disc of radius 2.24
    # Two Gaussians add up.
    shares = torch.tensor([101 * 141 - 21 * 41, 21 * 41]) / 224**2
    expected = (-((20 / 224) ** 2) / (2 * (0.12 * shares.sqrt()) ** 2)).exp().sum()
    torch.testing.assert_close(targets.heat_HW[80, 100], expected)


def test_an_image_without_objects_has_empty_targets():
    targets = centernet_targets(torch.zeros(30, 40, dtype=torch.uint8))

    assert targets.heat_HW.shape == (30, 40)
    assert targets.sizes_2HW.shape == (2, 30, 40)
    assert not targets.heat_HW.any()
    assert not targets.sizes_2HW.any()


def test_one_pixel_has_a_centre_without_a_size():
    ids = torch.zeros(224, 224, dtype=torch.int64)
    ids[30, 200] = 1

    targets = centernet_targets(ids)

    assert targets.heat_HW[30, 200] == 1
    assert not targets.sizes_2HW.any()


def test_the_heats_loss_is_torchvisions():
    stored = golden("centernet")
    heat, logits = (torch.from_numpy(stored[name])[None] for name in ("heatmap", "logits"))
    sizes = torch.zeros(1, 2, 48, 48)

    loss = centernet_loss(logits[:, None], sizes, heat, sizes)

    expected = json.loads(str(stored["meta_json"]))["sigmoid_focal_mean_alpha.25_gamma2_soft_targets"]
    assert loss.heat.mean.item() == pytest.approx(expected, rel=1e-5)
    assert loss.mean == loss.heat.mean  # no size counts
    assert loss.sizes.weight == 0


def random_batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(3, 2, 8, 9, generator=generator)
    target = target * (target[:, :1] > torch.tensor([0.9, 0.5, 2.0])[:, None, None, None])
    shapes = ((3, 1, 8, 9), (3, 2, 8, 9), (3, 8, 9))
    logits, sizes, heat = (torch.rand(shape, generator=generator) for shape in shapes)
    return logits, sizes, heat, target


def test_sizes_are_learned_where_there_is_one():
    logits, sizes, heat, target = random_batch()
    sizes.requires_grad_()

    loss = centernet_loss(logits, sizes, heat, target)
    loss.sizes.mean.backward()

    torch.testing.assert_close(loss.sizes.mean, (sizes - target)[target > 0].abs().mean())
    torch.testing.assert_close(loss.mean, loss.heat.mean + loss.sizes.mean)
    assert ((sizes.grad != 0) == (target > 0)).all()


def test_micro_batches_give_the_loss_of_the_batch():
    batch = random_batch()

    parts = [centernet_loss(*(each[i : i + 1] for each in batch)) for i in range(3)]

    whole = centernet_loss(*batch)
    for name in ("heat", "sizes"):
        terms = [getattr(part, name) for part in parts]
        mean = sum(term.total for term in terms) / sum(term.weight for term in terms)
        torch.testing.assert_close(mean, getattr(whole, name).mean)


def test_losses_refuse_maps_of_other_sizes():
    logits, sizes, heat, target = random_batch()

    with pytest.raises(ValueError, match=r"heat: \(3, 8, 9\) doesn't go with \(3, 4, 9\)"):
        centernet_loss(logits, sizes, heat[:, :4], target)
    with pytest.raises(ValueError, match=r"sizes: \(3, 2, 8, 9\) doesn't go with"):
        centernet_loss(logits, sizes, heat, target[..., :4])


def test_boxes_are_the_reference_ones():
    stored = golden("centernet")
    logits, sizes = torch.from_numpy(stored["logits"])[None, None], torch.from_numpy(stored["wh_map"])[None] / 48

    (found,) = centernet_boxes(logits, sizes)

    assert found.boxes_N4.shape == (100, 4)
    np.testing.assert_allclose(found.boxes_N4, stored["deap_boxes"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.scores_N, stored["deap_scores"], rtol=0, atol=1e-6)


def test_boxes_are_found_where_targets_put_them():
    ids = torch.zeros(300, 300, dtype=torch.int32)
    ids[20:81, 30:131], ids[120:171, 160:281] = 1, 2
    targets = centernet_targets(ids)

    (found,) = centernet_boxes(targets.heat_HW.logit(eps=1e-6)[None, None], targets.sizes_2HW[None])

    assert len(found.boxes_N4) == 2
    expected = torch.tensor([[30.0, 20, 130, 80], [160, 120, 280, 170]])
    torch.testing.assert_close(found.boxes_N4[found.boxes_N4[:, 0].argsort()], expected, rtol=0, atol=1)


@pytest.mark.parametrize("overlap", [0.1, 0.5, 1.0])
def test_the_best_boxes_are_those_of_nms_over_all(overlap):
    generator = torch.Generator().manual_seed(2)
    # With four heats only, most peaks are ties.
    logits = torch.randint(-2, 2, (1, 1, 40, 50), generator=generator).float()
    sizes = torch.rand(1, 2, 40, 50, generator=generator) * 0.4

    (few,) = centernet_boxes(logits, sizes, best=3, overlap=overlap)
    (all_boxes,) = centernet_boxes(logits, sizes, best=10**6, overlap=overlap)

    assert len(few.boxes_N4) == 3
    assert len(all_boxes.boxes_N4) == len(nms(all_boxes.boxes_N4, all_boxes.scores_N, overlap))
    for a, b in zip(few, all_boxes, strict=True):
        assert torch.equal(a, b[:3])


def test_a_flat_map_gives_the_best_boxes_of_too_many_peaks():
    # All 100,000 pixels are peaks of one height.
    (found,) = centernet_boxes(torch.zeros(1, 1, 250, 400), torch.zeros(1, 2, 250, 400), best=20)

    assert found.boxes_N4[:, 0].tolist() == list(range(20))
    assert found.scores_N.tolist() == [0.5] * 20


def test_low_heat_gives_no_box_and_negative_sizes_count_as_none():
    logits = torch.full((2, 1, 5, 6), -9.0)
    logits[1, 0, 2, 3] = 4
    sizes = torch.full((2, 2, 5, 6), -0.5)

    nothing, one = centernet_boxes(logits, sizes)

    assert nothing.boxes_N4.shape == (0, 4)
    assert one.boxes_N4.tolist() == [[3, 2, 3, 2]]


# --- the original's ---------------------------------------------------------------------------------------------------


def meta() -> dict[str, object]:
    return json.loads(str(golden("centernet")["meta_json"]))


def test_radii_are_the_published_ones():
    for height, width, raw, whole, half in meta()["gaussian_radius_rows_h_w_raw_int_raw_at_overlap_0.5"]:
        assert gaussian_radius(height, width) == pytest.approx(raw, rel=1e-9)
        assert int(gaussian_radius(height, width)) == whole
        assert gaussian_radius(height, width, overlap=0.5) == pytest.approx(half, rel=1e-9)


def golden_points():
    objects = torch.tensor(meta()["objects_x_y_w_h_radius_cx_cy"], dtype=torch.float64)
    boxes = torch.cat([objects[:, :2], objects[:, :2] + objects[:, 2:4]], dim=1)
    return points_targets(boxes, torch.zeros(5, dtype=torch.int64), (48, 48))


def test_points_targets_are_the_published_ones():
    stored = golden("centernet")

    targets = golden_points()

    np.testing.assert_allclose(targets.heat_KHW[0], stored["heatmap"], rtol=0, atol=1e-6)
    assert targets.cells_N.tolist() == stored["centre_index"].tolist()
    np.testing.assert_allclose(targets.sizes_N2, stored["target_wh"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(targets.offsets_N2, stored["target_offset"], rtol=0, atol=1e-5)


def test_points_losses_are_the_published_ones():
    stored, expected = golden("centernet"), meta()
    logits, sizes, offsets = (torch.from_numpy(stored[name])[None] for name in ("logits", "wh_map", "offset_map"))

    loss = points_loss(logits[None], sizes, offsets, [golden_points()])

    assert loss.heat.mean.item() == pytest.approx(expected["penalty_reduced_focal_loss"], rel=1e-6)
    assert loss.sizes.mean.item() == pytest.approx(expected["wh_l1_at_centres"], rel=1e-6)
    assert loss.offsets.mean.item() == pytest.approx(expected["offset_l1_at_centres"], rel=1e-6)
    assert loss.mean.item() == pytest.approx(29.81490707 + 0.1 * 3.72701049 + 0.35257789, rel=1e-6)
    empty = penalty_reduced_focal(logits, torch.zeros_like(logits))
    assert empty.mean.item() == pytest.approx(expected["penalty_reduced_focal_loss_no_positive"], rel=1e-6)
    assert empty.weight == 0


def test_each_image_is_compared_at_its_own_cells():
    predicted = torch.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 4)

    loss = l1_at_cells(predicted, [torch.tensor([1]), torch.tensor([11, 0])], [torch.zeros(1, 2), torch.zeros(2, 2)])

    assert loss.total == (1 + 13) + (35 + 47) + (24 + 36)
    assert loss.weight == pytest.approx(6, abs=2e-4)


@pytest.mark.parametrize(("columns", "offsets"), [("decode_with_offset", True), ("decode_without_offset", False)])
def test_points_boxes_are_the_published_ones(columns, offsets):
    stored = golden("centernet")
    logits, sizes, offset_map = (torch.from_numpy(stored[name])[None] for name in ("logits", "wh_map", "offset_map"))

    (found,) = points_boxes(logits[None], sizes, offset_map if offsets else None, best=12)

    np.testing.assert_allclose(found.boxes_N4, stored[columns][:, :4], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.scores_N, stored[columns][:, 4], rtol=0, atol=1e-6)
    assert found.classes_N.tolist() == [0] * 12


def test_points_of_several_classes_come_back():
    boxes = torch.tensor([[2.0, 3, 10, 8], [20, 1, 30, 12], [4, 2, 11, 9], [5, 5, 5, 9]])
    targets = points_targets(boxes, torch.tensor([2, 0, 2, 1]), (16, 40), classes=3)
    sizes = torch.zeros(1, 2, 16 * 40)
    offsets = torch.zeros(1, 2, 16 * 40)
    sizes[0, :, targets.cells_N], offsets[0, :, targets.cells_N] = targets.sizes_N2.t(), targets.offsets_N2.t()
    maps = (each.view(1, 2, 16, 40) for each in (sizes, offsets))

    (found,) = points_boxes(targets.heat_KHW.logit(eps=1e-6)[None], *maps, best=3)

    assert len(targets.cells_N) == 3  # the last box has no extent
    assert not targets.heat_KHW[1].any()
    order = found.boxes_N4[:, 0].argsort()
    torch.testing.assert_close(found.boxes_N4[order], boxes[[0, 2, 1]])
    assert found.classes_N[order].tolist() == [2, 2, 0]


def test_boxes_are_cut_off_at_the_last_cell():
    targets = points_targets(torch.tensor([[-4.0, 2, 40, 30]]), torch.tensor([0]), (16, 20))

    assert targets.sizes_N2.tolist() == [[19, 13]]
    assert targets.heat_KHW[0, 8, 9] == 1


def test_points_of_no_class_are_refused():
    with pytest.raises(ValueError, match=r"classes must be 0 to 1, got \[0, 2\]"):
        points_targets(torch.zeros(2, 4), torch.tensor([0, 2]), (8, 8), classes=2)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2,\)"):
        points_targets(torch.zeros(2, 3), torch.tensor([0, 1]), (8, 8), classes=2)


# --- average precision ------------------------------------------------------------------------------------------------


def coco_golden() -> dict[str, object]:
    return json.loads((GOLDEN / "eval_coco_ap.json").read_text())


def golden_scores(overlap: str = "bbox", *, agnostic: bool = False, box_areas: bool = False, crowds: bool = True):
    stored = coco_golden()
    truth = [each for each in stored["ground_truth"]["annotations"] if crowds or not each["iscrowd"]]
    change = {"category_id": 1} if agnostic else {}
    left = {"area"} if box_areas else set()
    annotations, results = (
        [{name: value for name, value in {**each, **change}.items() if name not in left} for each in entries]
        for entries in (truth, stored["detections"])
    )
    return coco_scores(stored["ground_truth"]["images"], annotations, results, overlap)


@pytest.mark.parametrize(
    ("key", "protocol"),
    [
        ("bbox", {}),
        ("segm", {"overlap": "segm"}),
        ("bbox_class_agnostic", {"agnostic": True}),
        ("bbox_class_agnostic_area_from_box", {"agnostic": True, "box_areas": True}),
        ("bbox_relabelled_one_class_nocrowd_area_from_box", {"agnostic": True, "box_areas": True, "crowds": False}),
    ],
)
def test_scores_are_those_of_pycocotools(key, protocol):
    scores = golden_scores(**protocol)

    np.testing.assert_allclose(list(asdict(scores).values()), coco_golden()["expected"][key], rtol=0, atol=1e-6)


def test_deaps_protocol_is_that_of_the_golden_file():
    stored = coco_golden()
    images = [image["id"] for image in stored["ground_truth"]["images"]]
    noted = [each for each in stored["ground_truth"]["annotations"] if not each["iscrowd"]]
    truth, found = (
        [[each for each in entries if each["image_id"] == i] for i in images] for entries in (noted, stored["detections"])
    )

    scores = class_agnostic_scores(
        [corners(each) for each in truth],
        [corners(each) for each in found],
        [[entry["score"] for entry in each] for each in found],
    ).total

    expected = stored["expected"]["bbox_relabelled_one_class_nocrowd_area_from_box"]
    np.testing.assert_allclose(list(asdict(scores).values()), expected, rtol=0, atol=1e-6)


def corners(entries: list[dict[str, object]]) -> np.ndarray:
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def test_scores_carry_cocos_names_in_their_order():
    names = [name.upper().replace("_", "") for name in asdict(golden_scores())]
    assert names == [name.upper().replace("_", "") for name in coco_golden()["stat_names"]]


@pytest.mark.parametrize("overlap", ["bbox", "segm"])
def test_scores_of_a_category_are_those_of_its_objects_alone(overlap):
    stored = coco_golden()
    images, truth, found = stored["ground_truth"]["images"], stored["ground_truth"]["annotations"], stored["detections"]

    scores = coco_scores_by_class(images, truth, found, overlap)

    assert list(scores.by_category) == sorted({each["category_id"] for each in truth})
    for category, each in scores.by_category.items():
        of_it = [[entry for entry in entries if entry["category_id"] == category] for entries in (truth, found)]
        np.testing.assert_array_equal(list(asdict(each).values()), list(asdict(coco_scores(images, *of_it, overlap)).values()))
    np.testing.assert_allclose(scores.total.ap, np.mean([each.ap for each in scores.by_category.values()]))


TWELVE = tuple(field.name for field in fields(CocoScores))


@pytest.mark.parametrize("overlap", ["bbox", "segm"])
def test_draws_of_images_score_as_so_many_copies_of_them_do(overlap):
    """Also where a draw has no object of a category, and where it has every image once."""
    stored = coco_golden()
    images, truth, found = stored["ground_truth"]["images"], stored["ground_truth"]["annotations"], stored["detections"]
    rng = np.random.default_rng(0)
    draws = [np.ones(len(images), int), *(np.bincount(rng.integers(0, len(images), len(images)), minlength=len(images))
             for _ in range(8)), np.eye(len(images), dtype=int)[0] * 3]  # fmt: skip
    by_id = sorted(images, key=lambda each: each["id"])

    drawn = coco_scores_by_class(images, truth, found, overlap).drawn(TWELVE)(np.array(draws, float).T)

    for times, figures in zip(draws, drawn, strict=True):
        copies = [(image["id"], 1000 * n + copy) for n, image in enumerate(by_id) for copy in range(times[n])]
        sizes = {image["id"]: image for image in images}
        again = coco_scores(
            [{**sizes[old], "id": new} for old, new in copies],
            *([{**each, "image_id": new} for old, new in copies for each in entries if each["image_id"] == old]
              for entries in (truth, found)),
            overlap,
        )  # fmt: skip
        np.testing.assert_allclose(figures, [*asdict(again).values()], rtol=0, atol=1e-12)


def test_draws_of_nothing_have_no_score():
    scores = coco_scores_by_class([{"id": 1}, {"id": 2}], [], [])

    assert np.isnan(scores.drawn(TWELVE)(np.ones((2, 3)))).all()


def test_nothing_is_printed(capfd):
    golden_scores()

    assert capfd.readouterr() == ("", "")


def scores_of(truth: list[list[list[float]]], boxes: list[list[list[float]]], scores: list[list[float]]):
    as_boxes = ([np.array(each, np.float64).reshape(-1, 4) for each in images] for images in (truth, boxes))
    return class_agnostic_scores(*as_boxes, scores).total


def test_decoded_boxes_are_scored():
    truth, found = [[0, 0, 100, 100], [120, 0, 130, 10]], [[0, 0, 100, 100], [120, 0, 130, 6]]

    scores = scores_of([truth], [found], [[0.9, 0.8]])

    assert scores.ap_large == pytest.approx(1)
    assert scores.ap_small == pytest.approx(0.3)  # IoU 0.6 is enough for 0.5, 0.55 and 0.6
    assert math.isnan(scores.ap_medium)


def test_images_without_detections_or_objects():
    box = [[0, 0, 50, 50]]

    assert scores_of([box, []], [[], []], [[], []]).ap == 0
    assert scores_of([box, []], [box, []], [[0.5], []]).ap == pytest.approx(1)
    assert scores_of([box, []], [box, box], [[0.5], [0.6]]).ap == pytest.approx(0.5)
    assert math.isnan(scores_of([[]], [box], [[0.6]]).ap)
    with pytest.raises(ValueError, match="no image to score"):
        scores_of([], [], [])


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        ([[0, 0, 5, 5]], [0.5, 0.6], "image 0: 2 scores for 1 boxes"),
        ([[5, 0, 0, 5]], [0.5], r"image 0: .*x1 <= x2 and y1 <= y2, got \[\[5.0, 0.0, 0.0, 5.0\]\]"),
        ([[0, 0, 5, math.nan]], [0.5], "got .*nan"),
        ([[0, 0, 5, 5]], [math.nan], "scores hold NaN"),
    ],
)
def test_malformed_detections_are_refused(boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        scores_of([[[0, 0, 5, 5]]], [boxes], [scores])
