"""Anchors, the code of boxes, matching, pooling, selection and masks against the official code (vitdet_pieces)."""

import pytest
import torch
from torch import Tensor

from operators.vitdet.boxes import (
    PROPOSAL_CODER,
    STAGE_CODERS,
    anchors,
    cell_anchors,
    decoded,
    drawn,
    matched,
    paste,
    pooled,
    pooling_levels,
    select,
)
from operators.vitdet.settings import STRIDES, DetectorSettings
from tests.goldens import tensor_golden


@pytest.fixture(scope="module")
def pieces():
    return tensor_golden("vitdet_pieces")


def close(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_anchors_of_all_levels(pieces):
    tensors, config = pieces
    for i, sizes in enumerate(DetectorSettings().anchor_sizes):
        close(cell_anchors(sizes), tensors[f"out/cell_anchors_{i}"])
        if f"out/anchors_{i}" in tensors:
            close(anchors(tuple(config["anchor_grid"]), STRIDES[i], sizes), tensors[f"out/anchors_{i}"])


def test_several_sizes_of_anchors_at_a_cell_come_size_by_size():
    close(cell_anchors([8, 16]), torch.cat([cell_anchors([8]), cell_anchors([16])]), 0)


@pytest.mark.parametrize("coder", [PROPOSAL_CODER, *STAGE_CODERS], ids=lambda coder: int(coder.weights[0]))
def test_code_of_boxes_both_ways(pieces, coder):
    tensors, _ = pieces
    weight = int(coder.weights[0])
    boxes = tensors["in/coder_boxes"]
    close(decoded(coder, tensors["in/coder_deltas"], boxes), tensors[f"out/coder_decode_{weight}"], 1e-3)
    close(coder.encode_single(tensors["in/coder_targets"], boxes), tensors[f"out/coder_encode_{weight}"])


def test_matching_of_anchors_and_of_proposals(pieces):
    tensors, _ = pieces
    for name, bounds, best in (("rpn", (0.3, 0.7), True), ("roi", (0.5, 0.5), False)):
        found = matched(tensors["in/iou"], *bounds, best_for_each=best)
        assert found.indices_N.tolist() == tensors[f"out/match_idx_{name}"].tolist()
        assert found.labels_N.tolist() == tensors[f"out/match_label_{name}"].tolist()


def test_without_ground_truth_all_is_background():
    found = matched(torch.zeros(0, 3), 0.3, 0.7, best_for_each=True)
    assert found.labels_N.tolist() == found.indices_N.tolist() == [0, 0, 0]
    assert len(matched(torch.zeros(2, 0), 0.3, 0.7, best_for_each=True).labels_N) == 0


def test_pooling_takes_the_level_of_a_boxes_size(pieces):
    tensors, _ = pieces
    boxes = [tensors["in/boxes_0"], tensors["in/boxes_1"]]
    levels = [tensors[f"in/feat_p{number}"] for number in (2, 3, 4, 5)]
    for name in (name for name in tensors if name.startswith("out/levels_")):
        canonical = int(name.rpartition("_")[2])
        assert pooling_levels(torch.cat(boxes), canonical).tolist() == tensors[name].tolist()
        for side in (7, 14):
            expected = tensors.get(f"out/pooled_{side}_canon{canonical}")
            if expected is not None:
                close(pooled(levels, boxes, side, canonical), expected)


def test_images_without_boxes_pool_to_nothing(pieces):
    tensors, _ = pieces
    levels = [tensors[f"in/feat_p{number}"] for number in (2, 3, 4, 5)]
    none = torch.zeros(0, 4)
    assert pooled(levels, [none, none], 7, 224).shape == (0, 4, 7, 7)
    some = tensors["in/boxes_1"]
    close(pooled(levels, [none, some], 7, 224), tensors["out/pooled_7_canon224"][len(tensors["in/boxes_0"]) :])


def test_selection_by_class_leaves_out_what_is_not_finite(pieces):
    tensors, config = pieces
    det = config["det"]
    settings = DetectorSettings(score_threshold=det["score"], nms=det["nms"], topk=det["topk"])
    found = select(tensors["in/det_boxes"], tensors["in/det_scores"], tuple(det["image"]), settings)
    close(found.boxes_N4, tensors["out/det_boxes"])
    close(found.scores_N, tensors["out/det_scores"], 0)
    assert found.classes_N.tolist() == tensors["out/det_classes"].tolist()
    assert found.rois_N.tolist() == tensors["out/det_kept"].tolist()


def test_masks_are_drawn_where_boxes_are(pieces):
    tensors, config = pieces
    probabilities, boxes, size = tensors["in/paste_probs"], tensors["in/paste_boxes"], tuple(config["paste_image"])
    differing = paste(probabilities, boxes, size) != tensors["out/paste_bool"].bool()
    soft = torch.zeros(len(boxes), *size)
    for mask, (rows, columns, values) in zip(soft, drawn(probabilities, boxes, size), strict=True):
        mask[rows, columns] = values
    assert differing.sum(dim=(1, 2)).max() <= 1
    assert ((soft * 255).to(torch.uint8).int() - tensors["out/paste_soft_u8"].int()).abs().max() <= 1


def test_a_mask_outside_the_image_is_nowhere():
    assert not paste(torch.ones(2, 28, 28), torch.tensor([[50.0, 2, 60, 8], [-40, -40, -30, -30]]), (10, 20)).any()
