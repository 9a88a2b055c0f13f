"""Segmentation, depth and instance scores against public libraries and released code; losses that add up over micro-batches."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from operators.metrics.depth import (
    DepthMetrics,
    SquaredError,
    average,
    eigen_crop,
    pooled_rmse,
    scale_and_shift,
    score_depth,
)
from operators.metrics.instances import cluster_pixels, instance_ari
from operators.metrics.segmentation import Segmentation, class_pairs, matrix_of
from operators.objectives.dense import (
    LossSum,
    boundary_loss,
    cross_entropy,
    deap_depth_loss,
    gradient_loss,
    instance_loss,
    sig_loss,
    vit_up_depth_loss,
)
from storage.datasets.classes import COARSE_OF_FINE
from tests.goldens import Allocations
from tests.goldens import evaluation_golden as golden


def nyu(name: str) -> np.ndarray:
    """The golden file's NYU maps at 480 x 640, float32 [3, H, W]; they are stored at a twentieth."""
    return golden("depth")[f"nyu_coarse_{name}"].repeat(20, axis=1).repeat(20, axis=2)


def depth_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions [4, 1, H, W] and depths [4, H, W] that the golden file's losses are of."""
    file = golden("depth")
    gt, predicted = torch.from_numpy(file["gt"]), torch.from_numpy(file["pred"])
    pair = torch.stack([gt, gt.flip(-1) * 1.1])
    return torch.stack([predicted, predicted.flip(-1)] * 2)[:, None], torch.cat([pair, 0.9 * pair])


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    return matrix_of(class_pairs(predicted, labels, classes).tolist(), classes)


# --- segmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_segmentation_scores_are_those_of_torchmetrics(case):
    file = {key.removeprefix(f"{case}_"): value for key, value in golden("miou").items()}
    classes = int(file["num_classes"])

    matrix = sum(confusion(*pair, classes) for pair in zip(file["pred"], file["gt"], strict=True))
    scores = Segmentation.of(matrix)

    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, file["confusion_rows_gt"])
    np.testing.assert_allclose(scores.iou, file["per_class_iou_nan_if_absent"], rtol=0, atol=1e-6)
    assert scores.mean_iou == pytest.approx(float(file["miou"]), abs=1e-6)
    assert scores.pixel_accuracy == pytest.approx(float(file["pixel_acc"]), abs=1e-6)


def test_mean_accuracy_is_that_of_torchmetrics_where_all_predicted_classes_are_labelled():
    file = golden("miou")
    scores = Segmentation.of(file["c1_confusion_rows_gt"])
    assert scores.mean_accuracy == pytest.approx(float(file["c1_macro_acc_for_contrast"]), abs=1e-6)


def test_a_class_only_predicted_counts_as_zero_and_an_absent_one_not_at_all():
    labels, predicted = np.array([[0, 0, 1, 1]]), np.array([[0, 2, 1, 1]])

    scores = Segmentation.of(confusion(predicted, labels, 4))

    np.testing.assert_array_equal(scores.iou, [0.5, 1, 0, np.nan])
    assert scores.mean_iou == 0.5
    assert scores.pixel_accuracy == 0.75
    assert scores.mean_accuracy == 0.75  # of the two labelled classes: 1/2 and 1


def test_void_pixels_do_not_count_whatever_is_predicted_there():
    labels, predicted = np.array([[255, 1], [0, 255]], np.uint8), np.array([[0, 1], [1, 255]], np.uint8)
    np.testing.assert_array_equal(confusion(predicted, labels, 2), [[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("predicted", "label", "says"),
    [
        (0, 3, "label 3 is none of the 3 classes"),
        (0, -1, "label -1"),
        (255, 0, "prediction 255"),
        (-2, 0, "prediction -2"),
    ],
)
def test_what_is_no_class_is_named(predicted, label, says):
    with pytest.raises(ValueError, match=says):
        confusion(np.array([[0, predicted]]), np.array([[1, label]]), 3)


def test_confusion_refuses_what_it_cannot_count():
    ids = np.zeros((2, 2), np.int64)
    with pytest.raises(ValueError, match="void 255 is one of the 300 classes"):
        confusion(ids, ids, 300)
    with pytest.raises(ValueError, match="float64"):
        confusion(ids.astype(float), ids, 3)
    with pytest.raises(ValueError, match="one shape"):
        confusion(ids[:1], ids, 3)
    with pytest.raises(ValueError, match="no pixel was scored"):
        Segmentation.of(confusion(ids, np.full((2, 2), 255), 3))


def test_coarse_groups_of_cocostuff():
    # tv, microwave, banana, chair, book, bottle, backpack, bird, traffic light, person, frisbee, bicycle
    things = [71, 77, 51, 61, 83, 43, 26, 15, 9, 0, 33, 1]
    # ceiling, tiled floor, fruit, desk, cardboard, banner, brick wall, window, building, gravel, tree, sky, hill, fence, sea
    stuff = [101, 117, 121, 111, 99, 91, 170, 180, 95, 124, 168, 156, 126, 112, 154]

    assert COARSE_OF_FINE[things + stuff].tolist() == [*range(27)]
    assert COARSE_OF_FINE[[14, 24, 25, 90, 181, 255]].tolist() == [8, 7, 6, 4, 24, 255]
    assert np.bincount(COARSE_OF_FINE[:91]).tolist() == [6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8]
    assert COARSE_OF_FINE.dtype == np.uint8
    assert np.flatnonzero(COARSE_OF_FINE == 255).tolist() == list(range(182, 256))


def test_binary_iou_is_that_of_torchmetrics():
    file = golden("miou")
    matrix = confusion(file["bin_logits"] > 0, file["bin_target"], 2)
    assert Segmentation.of(matrix).iou[1] == pytest.approx(float(file["bin_iou"]), abs=1e-6)


# --- depth scores -----------------------------------------------------------------------------------------------------


def test_depth_metrics_are_those_of_vit_ups_code():
    file = golden("depth")
    names = {field.name: field.name for field in dataclasses.fields(DepthMetrics)} | {"log10": "log_10"}

    metrics = score_depth(file["pred"], file["gt"])

    for ours, theirs in names.items():
        assert getattr(metrics, ours) == pytest.approx(float(file[f"vitup_{theirs}"]), rel=1e-6), ours


@pytest.mark.parametrize(("fit", "prefix"), [(False, "probe3d_sd"), (True, "probe3d_si")])
def test_depth_metrics_with_and_without_fit_are_those_of_probe3d(fit, prefix):
    file = golden("depth")
    metrics = score_depth(file["pred"], file["gt"], fit=fit)
    for name in ("d1", "d2", "d3", "rmse"):
        assert getattr(metrics, name) == pytest.approx(float(file[f"{prefix}_{name}"][0]), rel=1e-6)


def test_depth_metrics_on_the_eigen_crop_are_those_of_probe3d():
    file = golden("depth")
    images = [score_depth(*map(eigen_crop, pair)) for pair in zip(nyu("pred"), nyu("gt"), strict=True)]
    for name in ("d1", "d2", "d3", "rmse"):
        found = [getattr(image, name) for image in images]
        np.testing.assert_allclose(found, file[f"nyu_crop_probe3d_per_image_{name}"], rtol=1e-6)


def test_rmse_is_pooled_over_the_pixels_of_all_images():
    file = golden("depth")
    pairs = list(zip(nyu("pred"), nyu("gt"), strict=True))

    cropped = [SquaredError.of(*map(eigen_crop, pair)) for pair in pairs]
    whole = [SquaredError.of(*pair) for pair in pairs]

    assert pooled_rmse(cropped) == pytest.approx(float(file["nyu_pooled_rmse_deap"]), rel=1e-6)
    assert pooled_rmse(whole) == pytest.approx(float(file["nyu_pooled_rmse_nocrop_for_contrast"]), rel=1e-6)
    assert pooled_rmse(cropped[::-1]) == pooled_rmse(cropped)


def test_averages_do_not_depend_on_the_order_of_images():
    rng = np.random.default_rng(0)
    images = [score_depth(*rng.uniform(0.5, 9, (2, 5, 5))) for _ in range(40)]
    mean = average(images)
    assert average(images[::-1]) == mean
    assert mean.rmse == pytest.approx(np.mean([image.rmse for image in images]), rel=1e-12)


def test_only_depths_between_the_bounds_count():
    depth = np.array([[0.0, 0.001, np.nan, 10.0, 2.0]])
    predicted = np.array([[np.nan, 7, 7, 7, 3.0]])

    assert score_depth(predicted, depth).rmse == 1
    assert SquaredError.of(predicted, depth) == SquaredError(squares=1.0, pixels=1)
    assert score_depth(predicted[:, :4], depth[:, :4]) is None
    assert SquaredError.of(predicted[:, :4], depth[:, :4]).pixels == 0


def test_a_negative_prediction_is_wrong_and_not_close():
    metrics = score_depth(np.array([[-2.0, 2.0]]), np.array([[2.0, 2.0]]))
    assert metrics.d3 == 0.5
    assert metrics.log10 == pytest.approx(math.log10(2 / 0.001) / 2)


def test_the_fit_finds_scale_and_shift():
    predicted = np.array([1.0, 2, 5])
    assert scale_and_shift(predicted, 3 * predicted - 0.5) == pytest.approx((3, -0.5))
    assert scale_and_shift(np.full(3, 7.0), predicted) == (0, pytest.approx(8 / 3))


def test_depth_scores_refuse_what_they_cannot_score():
    ones = np.ones((4, 4))
    with pytest.raises(ValueError, match="1 predicted depths are NaN"):
        score_depth(np.where(np.eye(4) * np.arange(4) == 3, np.nan, ones), ones)
    with pytest.raises(ValueError, match="one shape"):
        SquaredError.of(ones[:2], ones)
    with pytest.raises(ValueError, match=r"\(480, 640\) pixels, got \(4, 4\)"):
        eigen_crop(ones)
    with pytest.raises(ValueError, match="no pixel"):
        pooled_rmse([SquaredError(squares=0.0, pixels=0)])
    with pytest.raises(ValueError, match="no image"):
        average([])


# --- instances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_k_means_finds_the_instances_of_the_golden_embeddings(case):
    file = golden("ari")
    latents, ids = file[f"{case}_embedding"].transpose(2, 0, 1), file[f"{case}_ids"]
    assert instance_ari(latents, ids) == pytest.approx(float(file[f"{case}_kmeans_ari_fg"]), abs=1e-9)


def test_only_the_foreground_is_clustered():
    ids = np.array([[0, 0, 0, 5, 5, 9]])
    latents = np.array([[[-100.0, 50, 100, 1, 1, 2]]])  # background would take all clusters
    assert instance_ari(latents, ids) == 1
    assert instance_ari(latents, np.zeros_like(ids)) is None


def test_latents_that_are_all_alike_score_zero():
    assert instance_ari(np.zeros((4, 3, 6)), np.arange(18).reshape(3, 6) % 3 + 1) == 0


def test_instance_scores_refuse_what_they_cannot_cluster():
    ids = np.ones((2, 3), np.int64)
    with pytest.raises(ValueError, match="finite latents"):
        instance_ari(np.full((4, 2, 3), np.nan), ids)
    with pytest.raises(ValueError, match=r"\(4, 3, 2\) and \(2, 3\)"):
        instance_ari(np.zeros((4, 3, 2)), ids)
    with pytest.raises(ValueError, match="at least 3 pixels"):
        cluster_pixels(np.zeros((2, 4)), 3)


# --- losses over pixels -----------------------------------------------------------------------------------------------


def merged(*parts: LossSum) -> float:
    return float(sum(part.total for part in parts) / sum(part.weight for part in parts))


def class_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of three images: with some void pixels, with none, with nothing else."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 6, 5, generator=generator)
    labels = torch.randint(0, 7, (3, 6, 5), generator=generator)
    labels[0, :4] = 255
    labels[2] = 255
    return logits, labels


def test_cross_entropy_is_the_mean_over_valid_pixels_however_the_batch_is_split():
    logits, labels = class_batch()
    expected = float(F.cross_entropy(logits, labels, ignore_index=255))

    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(3)]

    assert cross_entropy(logits, labels).mean.item() == pytest.approx(expected, rel=1e-6)
    assert merged(*parts) == pytest.approx(expected, rel=1e-6)
    assert [part.weight for part in parts] == [10, 30, 0]
    assert cross_entropy(logits, labels.byte()).mean.item() == pytest.approx(expected, rel=1e-6)


def test_an_image_of_void_gives_no_loss_and_no_gradient():
    logits, labels = class_batch()
    logits = logits[2:].requires_grad_()
    loss = cross_entropy(logits, labels[2:])
    loss.mean.backward()
    assert (loss.mean.item(), loss.weight) == (0, 0)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("label", [7, -1, 254])
def test_a_label_without_a_logit_is_named(label):
    logits, labels = class_batch()
    labels[1, 2, 3] = label
    with pytest.raises(ValueError, match=f"label {label} is none of the 7 classes"):
        cross_entropy(logits, labels)


def test_losses_refuse_other_shapes():
    logits, labels = class_batch()
    with pytest.raises(ValueError, match="resize one"):
        cross_entropy(logits, labels[:, :3])
    with pytest.raises(ValueError, match=r"\(3, 7, 6, 5\) must be \[B, 1, H, W\]"):
        boundary_loss(logits, labels)
    with pytest.raises(ValueError, match="resize one"):
        sig_loss(logits[:, :1], labels[:2], warm=False)
    with pytest.raises(ValueError, match="void 3 is one of the 7 classes"):
        cross_entropy(logits, labels, void=3)


def test_boundary_loss_is_that_of_the_golden_file_however_the_batch_is_split():
    file = golden("miou")
    logits, target = torch.from_numpy(file["bin_logits"])[:, None], torch.from_numpy(file["bin_target"])
    assert boundary_loss(logits, target).mean.item() == pytest.approx(float(file["bin_bce"]), rel=1e-6)
    parts = [boundary_loss(logits[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert merged(*parts) == pytest.approx(float(file["bin_bce"]), rel=1e-6)


# --- losses of depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warm", "key"), [(True, "siglogloss_first_100_calls"), (False, "siglogloss_after_warmup")])
def test_sig_loss_is_that_of_vit_ups_code(warm, key):
    predicted, depth = depth_batch()
    # Small where large logarithms cancel: their rounding, not its own, is what the warm value has.
    assert sig_loss(predicted[:2], depth[:2], warm=warm).mean.item() == pytest.approx(
        float(golden("depth")[key]), abs=2e-8
    )


def test_deap_depth_loss_is_that_of_the_golden_file():
    loss = deap_depth_loss(torch.from_numpy(nyu("pred"))[:, None], torch.from_numpy(nyu("gt")))
    assert loss.mean.item() == pytest.approx(float(golden("depth")["deap_sigloss_lam0.15"]), rel=1e-6)


def test_gradient_losses_are_those_of_vit_ups_and_probe3ds_code():
    file, batch = golden("depth"), depth_batch()
    released = 0.5 * gradient_loss(*batch, form="released").mean.item()  # the official object holds the weight
    spatial = gradient_loss(*batch, form="spatial").mean.item()
    assert released == pytest.approx(float(file["gradientloss_as_released_B4"]), rel=1e-6)
    assert spatial == pytest.approx(float(file["gradientloss_spatial_probe3d_B4_weight1"]), rel=1e-6)


@pytest.mark.parametrize("form", ["released", "spatial"])
def test_vit_ups_loss_is_sig_loss_and_half_the_gradient_loss(form):
    batch = depth_batch()
    total = vit_up_depth_loss(*batch, warm=False, form=form)
    parts = sig_loss(*batch, warm=False).mean.item() + 0.5 * gradient_loss(*batch, form=form).mean.item()
    assert total.mean.item() == pytest.approx(parts, rel=1e-6)
    assert total.weight == 4


def test_the_released_gradient_loss_compares_images_and_the_spatial_one_pixels():
    predicted, depth = (each[:1] for each in depth_batch())
    depth = depth.where(depth > 0, 1)
    alike = predicted.expand(4, -1, -1, -1), depth.expand(4, -1, -1)
    scales = torch.tensor([1.0, 1, 2, 2]).view(4, 1, 1)
    flat = (scales * alike[1])[:, None], alike[1]

    assert [gradient_loss(*batch, form="released").mean.item() for batch in (alike, flat)] == [
        0,
        pytest.approx(4 / 2 * math.log(2), rel=1e-3),  # four scales, and two differences for four images
    ]
    assert gradient_loss(*alike, form="spatial").mean.item() > 1
    assert gradient_loss(*flat, form="spatial").mean.item() < 1e-2
    assert gradient_loss(*(each[1:3] for each in flat), form="released").mean.item() == 0  # none is two images on


LOSSES_OF_DEPTH = [
    deap_depth_loss,
    lambda *batch: sig_loss(*batch, warm=True),
    lambda *batch: sig_loss(*batch, warm=False),
    lambda *batch: gradient_loss(*batch, form="released"),
    lambda *batch: vit_up_depth_loss(*batch, warm=False, form="spatial"),
]


@pytest.mark.parametrize("loss", LOSSES_OF_DEPTH)
def test_depth_that_is_missing_has_no_loss(loss):
    predicted, depth = depth_batch()
    empty = torch.zeros_like(depth)
    empty[1:] = torch.nan
    predicted.requires_grad_()

    of_none, of_zeros = loss(predicted, empty), loss(predicted, depth)
    of_nans = loss(predicted, depth.where(depth > 0, torch.nan))
    of_none.mean.backward()

    assert (of_none.mean.item(), of_none.weight) == (0, 0)
    assert (predicted.grad == 0).all()
    assert of_nans.mean.item() == of_zeros.mean.item() > 0


@pytest.mark.parametrize("loss", LOSSES_OF_DEPTH)
@pytest.mark.parametrize("make", [lambda depth: depth.clone(), torch.zeros_like, lambda depth: -depth])
def test_gradients_of_depth_losses_are_finite_for_perfect_and_for_negative_predictions(loss, make):
    depth = depth_batch()[1].clamp(max=10)
    predicted = make(depth)[:, None].requires_grad_()
    value = loss(predicted, depth).mean
    value.backward()
    assert value.isfinite()
    assert predicted.grad.isfinite().all()


def test_a_perfect_prediction_has_next_to_no_loss():
    depth = depth_batch()[1]
    assert vit_up_depth_loss(depth[:, None], depth, warm=False, form="spatial").mean.item() < 2e-6


def test_depth_losses_of_micro_batches_are_averaged_over_images():
    predicted, depth = depth_batch()
    parts = [sig_loss(predicted[:1], depth[:1], warm=False), sig_loss(predicted[1:], depth[1:], warm=False)]
    one, three = (part.mean.item() for part in parts)
    assert [part.weight for part in parts] == [1, 3]
    assert merged(*parts) == pytest.approx((one + 3 * three) / 4, rel=1e-6)


def test_deap_leaves_out_depths_up_to_a_millimetre_and_vit_up_does_not():
    depth = torch.tensor([[[0.0005, 2.0, 3.0]]])
    predicted = torch.tensor([[[[5.0, 2.5, 3.0]]]])
    without = sig_loss(predicted[..., 1:], depth[..., 1:], warm=False).mean.item()
    assert deap_depth_loss(predicted, depth).mean.item() == pytest.approx(without, rel=1e-6)
    assert sig_loss(predicted, depth, warm=False).mean.item() > 10 * without


# --- the loss of instances --------------------------------------------------------------------------------------------


def instance_batch(classes: int) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 8, 6, 5, generator=generator).requires_grad_()
    classifier = nn.Linear(8, classes)
    nn.init.normal_(classifier.weight, generator=generator)
    nn.init.normal_(classifier.bias, generator=generator)
    return latents, torch.randint(0, classes, (2, 6, 5), generator=generator), classifier


@pytest.mark.parametrize("max_bytes", [1, 16 * 40 * 7, 2**28])
def test_instance_loss_of_all_pixels_is_cross_entropy_with_its_exact_gradients(max_bytes):
    latents, ids, classifier = instance_batch(40)
    inputs = [latents, classifier.weight, classifier.bias]
    logits = F.conv2d(latents, classifier.weight[:, :, None, None], classifier.bias)
    dense = F.cross_entropy(logits, ids)
    expected = torch.autograd.grad(dense, inputs)

    loss = instance_loss(latents, ids, classifier, 10**6, torch.Generator(), max_bytes=max_bytes)

    assert loss.weight == 60
    torch.testing.assert_close(loss.mean, dense)
    for found, right in zip(torch.autograd.grad(loss.mean, inputs), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_logits_of_sixty_thousand_instances_stay_below_the_bound():
    latents, ids, classifier = instance_batch(60_000)
    bound = 2**23

    with Allocations() as seen:
        loss = instance_loss(latents, ids, classifier, 20, torch.Generator().manual_seed(1), max_bytes=bound)
        loss.mean.backward()

    assert loss.weight == 40
    assert seen.largest <= bound / 4  # of four such tensors at a time; all pixels' logits would be 9.6 MB each
    assert latents.grad.flatten(2).abs().sum(1).count_nonzero(dim=1).tolist() == [20, 20]


def test_sampled_pixels_are_drawn_from_the_generator_without_repeats():
    latents, ids, classifier = instance_batch(40)

    def value(seed: int) -> float:
        return instance_loss(latents, ids, classifier, 7, torch.Generator().manual_seed(seed)).mean.item()

    assert value(3) == value(3) != value(4)
    grads = torch.autograd.grad(
        instance_loss(latents, ids, classifier, 29, torch.Generator().manual_seed(0)).total, latents
    )[0]
    assert grads.abs().sum(1).flatten(1).count_nonzero(dim=1).tolist() == [29, 29]


def test_the_mean_over_draws_of_sampled_losses_is_the_loss_of_all_pixels():
    latents, ids, classifier = instance_batch(40)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([instance_loss(latents, ids, classifier, 10, generator).mean for _ in range(300)])
        every = instance_loss(latents, ids, classifier, 30, generator).mean
    assert abs(float(draws.mean() - every)) < 4 * float(draws.std()) / 300**0.5


def test_instance_loss_refuses_ids_without_a_logit():
    latents, ids, classifier = instance_batch(40)
    ids[1, 0, 0] = 40
    with pytest.raises(ValueError, match="instance id 40 is none of the 40 classes"):
        instance_loss(latents, ids, classifier, 10, torch.Generator())
    with pytest.raises(ValueError, match="samples_per_image"):
        instance_loss(latents, ids, classifier, 0, torch.Generator())


def test_losses_are_float32_under_bfloat16_autocast():
    logits, labels = class_batch()
    predicted, depth = depth_batch()
    latents, ids, classifier = instance_batch(40)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            cross_entropy(logits.bfloat16(), labels),
            boundary_loss(logits[:, :1].bfloat16(), labels == 1),
            vit_up_depth_loss(predicted.bfloat16(), depth, warm=False),
            instance_loss(latents, ids, classifier, 10, torch.Generator().manual_seed(0)),
        ]
        losses[-1].mean.backward()
    assert {loss.total.dtype for loss in losses} == {torch.float32}
    assert classifier.weight.grad.dtype == torch.float32
    exact = instance_loss(latents, ids, classifier, 10, torch.Generator().manual_seed(0))
    assert losses[-1].mean.item() == pytest.approx(exact.mean.item(), rel=0.01)
