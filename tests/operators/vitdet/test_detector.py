"""Whole detectors against the official code, stage by stage (vitdet_*, README_vitdet.md)."""

import numpy as np
import pytest
import torch
from torch import Tensor

from operators.vitdet.detector import Detections, placed
from operators.vitdet.heads import Found
from operators.vitdet.input import padded
from tests.goldens import tensor_golden, under
from tests.vitdet_goldens import detector_of

SMALL = ["vitdet_mask_rcnn_small", "vitdet_cascade_small"]


def close(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def require_found(found: Found, expected: dict[str, Tensor]) -> None:
    close(found.boxes_N4, expected["boxes"], 2e-3)
    close(found.scores_N, expected["scores"])
    assert found.classes_N.tolist() == expected["classes"].tolist()
    # Boxes may be 2e-3 px off, which random weights make more of.
    close(found.masks_NSS, expected["mask_probs"], 1e-3)


def require_detections(found: Detections, expected: dict[str, Tensor]) -> None:
    close(found.boxes_N4, expected["boxes"], 2e-3)
    close(found.scores_N, expected["scores"])
    assert found.classes_N.tolist() == expected["classes"].tolist()
    masks = np.unpackbits(expected["masks_packed"].numpy(), axis=-1)[..., : found.masks_NHW.shape[-1]]
    assert (found.masks_NHW.numpy() != masks).mean() <= 1e-3
    assert (found.masks_NHW.sum(dim=(1, 2)) - expected["mask_area"]).abs().max() <= 1e-3 * masks[0].size


def inputs(tensors: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [tensors[f"in/{name}"].permute(1, 2, 0) for name in names]


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_detector_stage_by_stage(name):
    tensors, config = tensor_golden(name)
    detector = detector_of(tensors, config)
    images, sizes = padded(inputs(tensors, "image_0", "image_1"), detector.settings)
    close(images[:1, :, ::8, ::8], tensors["mid/padded_image"])

    levels = detector.maps(images)
    for level, found in zip(["p2_0", "p3_0", "p4", "p5", "p6"], levels, strict=True):
        expected = tensors[f"mid/{level}"]
        close(found[: len(expected), : expected.shape[1]], expected)
    logits, deltas = detector.proposal_generator.rpn_head(levels[2])
    close(logits, tensors["mid/rpn_logits_p4"])
    close(deltas, tensors["mid/rpn_deltas_p4"])

    proposals = detector.propose(levels, sizes)
    for i, found in enumerate(proposals):
        close(found.boxes_N4, tensors[f"mid/proposals_{i}"], 2e-3)
        close(found.logits_N, tensors[f"mid/proposal_logits_{i}"])
    for i, found in enumerate(detector.find(levels, proposals, sizes)):
        require_found(found, under(tensors, f"out/raw_{i}/"))
        size = tuple(config["output_sizes"][i])
        require_detections(placed(found, sizes[i], size), under(tensors, f"out/final_{i}/"))


@pytest.mark.parametrize("name", SMALL)
def test_images_are_detected_in_together_or_alone(name):
    tensors, config = tensor_golden(name)
    detector = detector_of(tensors, config)
    outputs = [tuple(size) for size in config["output_sizes"]]
    images, sizes = padded(inputs(tensors, "image_0", "image_1"), detector.settings)

    alone = [detector.detect(images[i : i + 1], sizes[i : i + 1], outputs[i : i + 1])[0] for i in range(2)]

    for i, (one, of_both) in enumerate(zip(alone, detector.detect(images, sizes, outputs), strict=True)):
        require_detections(one, under(tensors, f"out/final_{i}/"))
        require_detections(of_both, under(tensors, f"out/final_{i}/"))


@torch.inference_mode()
def test_with_lift_everything_after_it_is_in_a_frame_of_twice_the_pixels():
    tensors, config = tensor_golden("vitdet_lift")
    detector = detector_of(tensors, config)
    images, sizes = padded(inputs(tensors, "image"), detector.settings)
    frame, output = detector.in_frame(sizes), tuple(config["output"])

    features = detector.features(images)
    enlarged = detector.enlarged(images, features)
    levels = detector.pyramid(enlarged)
    proposals = detector.propose(levels, frame)
    found = detector.find(levels, proposals, frame)

    assert frame == [tuple(config["doubled_image"])]
    close(features, tensors["mid/vit"])
    close(enlarged, tensors["mid/lift"])
    for number, level in enumerate(levels[1:], start=3):
        close(level, tensors[f"mid/p{number}"])
    close(proposals[0].boxes_N4, tensors["mid/proposals"], 2e-3)
    close(proposals[0].logits_N, tensors["mid/proposal_logits"])
    require_found(found[0], under(tensors, "out/raw_doubled/"))
    require_detections(detector.detect(images, sizes, [output])[0], under(tensors, "out/final/"))
