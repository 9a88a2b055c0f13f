"""Whole detectors against the official code, stage by stage (vitdet_*, README_vitdet.md)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.vitdet.checkpoint import build, described
from operators.vitdet.detector import BilinearNet, Detections, Detector, placed
from operators.vitdet.heads import Found
from operators.vitdet.input import padded
from operators.vitdet.settings import DetectorError, DetectorSettings
from tests.goldens import tensor_golden, under
from tests.pretended_gpu import pretended_gpu
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


@pytest.mark.parametrize("name", [*SMALL, "vitdet_lift"])
def test_on_a_gpu_all_is_computed_there(name):
    tensors, config = tensor_golden(name)
    detector = detector_of(tensors, config)
    names = ["image_0", "image_1"] if name in SMALL else ["image"]
    outputs = [tuple(size) for size in config.get("output_sizes", [config.get("output")])]
    images, sizes = padded(inputs(tensors, *names), detector.settings)

    with pretended_gpu() as gpu:
        detections = detector.cuda().detect(images.cuda(), sizes, outputs)
        assert all(each.is_cuda for found in detections for each in found)
        found = [Detections(*(each.cpu() for each in one)) for one in detections]
        # Boxes of at most so many detections, whose places in the output are asked for, and these results.
        beforehand = gpu.to_host[: -4 * len(found)]

    assert max(map(math.prod, beforehand)) <= 4 * detector.settings.topk
    for one, prefix in zip(found, ["out/final_0/", "out/final_1/"] if name in SMALL else ["out/final/"], strict=True):
        require_detections(one, under(tensors, prefix))


def random_detector(**changes: object) -> Detector:
    """One that finds much of its first class, or nothing where `score_threshold` is 1."""
    settings = DetectorSettings(
        square_pad=64, image_size=64, pretrain_size=32, dim=16, depth=2, heads=2, window=2, global_blocks=(1,), channels=8, fc=12,
        classes=3, anchor_sizes=((8,), (16,), (32,), (64,), (128,)), canonical_size=32, topk=7, **changes,
    )  # fmt: skip
    detector = build(described(settings)).eval()
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias[0] += 5
    return detector


def test_nothing_found_is_no_detection_of_each_image():
    detector = random_detector(score_threshold=1.0)
    for found in detector.detect(torch.randn(2, 3, 64, 64), [(64, 40), (3, 64)], [(70, 50), (5, 9)]):
        assert [len(each) for each in found] == [0, 0, 0, 0]
    assert found.masks_NHW.shape == (0, 5, 9)


def test_under_autocast_boxes_and_scores_are_float32():
    detector, images = random_detector(), torch.randn(1, 3, 64, 64)
    plain = detector.detect(images, [(64, 64)], [(64, 64)])[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = detector.detect(images, [(64, 64)], [(64, 64)])[0]
    assert len(found.boxes_N4) == len(plain.boxes_N4) == 7
    assert {each.dtype for each in found} == {torch.float32, torch.int64, torch.bool}
    close(found.scores_N, plain.scores_N, 0.01)


def test_inference_leaves_out_what_is_not_finite_and_training_ends():
    detector = random_detector()
    levels = detector.maps(torch.randn(1, 3, 64, 64))
    predicted = detector.predict(levels)
    predicted.deltas[1][0, :5] = math.nan
    predicted.logits[1][0, :5] = 9.0  # the best of their level
    propose = detector.proposal_generator.proposals

    kept = propose(predicted, [(64, 64)])[0]

    assert kept.boxes_N4.isfinite().all()
    assert 9.0 not in kept.logits_N
    with pytest.raises(DetectorError, match="proposals are NaN or infinite"):
        propose(predicted, [(64, 64)], training=True)


def test_training_takes_other_numbers_of_proposals():
    detector = random_detector(pre_topk=(300, 20), post_topk=(40, 11), proposal_nms=1.0)
    predicted = detector.predict(detector.maps(torch.randn(1, 3, 64, 64)))
    counts = [
        len(detector.proposal_generator.proposals(predicted, [(64, 64)], training=train)[0].boxes_N4) for train in (True, False)
    ]
    assert counts == [40, 11]


def test_the_bilinear_row_has_no_weights_of_its_own():
    detector, images = random_detector(), torch.randn(1, 3, 64, 64)
    names = detector.state_dict().keys()
    maps = detector.features(images)
    detector.lift = BilinearNet()
    assert detector.state_dict().keys() == names
    assert detector.in_frame([(64, 40)]) == [(128, 80)]
    close(detector.enlarged(images, maps), F.interpolate(maps, size=(8, 8), mode="bilinear"))
