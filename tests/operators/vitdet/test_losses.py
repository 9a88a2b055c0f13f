"""Training losses, held against detectron2's; what is sampled, and stochastic depth, as functions of their generators alone."""

import json

import numpy as np
import pytest
import torch

from operators.vitdet.backbone import kept_paths
from operators.vitdet.detector import Detector
from operators.vitdet.groups import parameter_groups
from operators.vitdet.input import padded
from operators.vitdet.losses import Labelled, Sampling, Truth, box_losses, detector_losses, proposal_losses, sampled
from operators.vitdet.masks import ObjectMasks
from operators.vitdet.settings import DetectorSettings
from tests.goldens import golden_file, tensor_golden, under

NAMES = {
    "square_pad": "img", "image_size": "img", "dim": "dim", "depth": "depth", "heads": "heads", "window": "window",
    "global_blocks": "glob", "channels": "ch", "fc": "fc", "classes": "K", "pretrain_size": "pre", "anchor_sizes": "sizes",
    "pre_topk": "pre_topk", "post_topk": "post_topk", "canonical_size": "canon", "cascade": "cascade", "drop_path": "drop_path",
    "pixel_mean": "pixel_mean", "pixel_std": "pixel_std",
}  # fmt: skip
"""Settings by what the goldens call them."""


@pytest.fixture(scope="module", params=["mask_rcnn", "cascade"])
def published(request):
    """A detector, images, what is annotated, and the official losses with their gradients."""
    given, config = tensor_golden(f"vitdet_losses_{request.param}")
    net = Detector(DetectorSettings.parse({ours: config[theirs] for ours, theirs in NAMES.items()}))
    net.load_state_dict(under(given, "sd/"))
    images, sizes = padded([given[f"in/image_{i}"].permute(1, 2, 0) for i in range(3)], net.settings)
    truths = []
    for i, (_, width) in enumerate(sizes):
        masks = np.unpackbits(given[f"in/gt_masks_packed_{i}"].numpy(), axis=-1)[..., :width].astype(bool)
        boxes, classes = given[f"in/gt_boxes_{i}"], given[f"in/gt_classes_{i}"]
        truths.append(Truth(boxes_G4=boxes, classes_G=classes, masks=ObjectMasks(outlines=[*masks])))
    sampling = Sampling(anchors=config["rpn_batch_size_per_image"], proposals=config["roi_batch_size_per_image"])
    return net, images, sizes, truths, sampling, given


def test_losses_and_gradients_are_the_published_ones(published):
    net, images, sizes, truths, sampling, given = published
    net.train()
    net.zero_grad()

    losses = detector_losses(net, net.maps(images), sizes, truths, sampling)
    torch.stack([*losses.values()]).sum().backward()

    expected = {name: value for name, value in under(given, "out/").items() if name.startswith("loss_")}
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    parameters = dict(net.named_parameters())
    norm = torch.stack([each.grad.norm() for each in parameters.values() if each.grad is not None]).norm()
    assert norm.item() == pytest.approx(given["out/grad_norm"].item(), rel=1e-4)
    for name, gradient in under(given, "grad/").items():
        of_backbone = name.startswith("backbone.")
        difference = (parameters[name].grad - gradient).abs().max() / gradient.abs().max()
        assert difference < (1e-2 if of_backbone else 1e-4), name


def test_anchors_are_labelled_as_published(published):
    net, images, sizes, truths, sampling, given = published
    with torch.no_grad():
        predicted = net.predict(net.maps(images))
        found = net.proposal_generator.proposals(predicted, net.in_frame(sizes), training=True)
        alone = [proposal_losses(type(predicted)(*_of_image(predicted, i)), [truths[i]], sampling) for i in range(3)]
        together = proposal_losses(predicted, truths, sampling)

    for i, each in enumerate(found):
        assert torch.allclose(each.boxes_N4, given[f"mid/proposals_{i}"], atol=2e-3)
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(each[name].item() for each in alone) / 3, rel=1e-5)


def _of_image(predicted, i):
    return predicted.anchors, [each[i : i + 1] for each in predicted.logits], [each[i : i + 1] for each in predicted.deltas]


def test_what_is_sampled_is_drawn_for_each_image_alone(published):
    net, images, sizes, truths, _, _ = published
    some = Sampling(anchors=16, proposals=24)

    def losses(rows, seed):
        seeded = [
            Truth(boxes_G4=each.boxes_G4, classes_G=each.classes_G, masks=each.masks, seed=(seed, row))
            for row, each in enumerate(truths)
        ]
        with torch.no_grad():
            found = detector_losses(net, net.maps(images[rows]), [sizes[r] for r in rows], [seeded[r] for r in rows], some)
        return found["loss_rpn_cls"].item()

    one_by_one = [losses([row], 5) for row in range(3)]
    assert losses([0, 1, 2], 5) == pytest.approx(sum(one_by_one) / 3, rel=1e-5)
    assert losses([2, 0, 1], 5) == pytest.approx(sum(one_by_one) / 3, rel=1e-5)
    assert losses([0, 1, 2], 6) != pytest.approx(sum(one_by_one) / 3, rel=1e-5)


def test_objects_are_sampled_up_to_their_part_and_background_fills_up():
    is_object = torch.arange(100) < 40
    objects, others = sampled(is_object, ~is_object, 32, 0.25, np.random.default_rng(0))
    assert (len(objects), len(others)) == (8, 24)
    assert (objects < 40).all()
    assert (others >= 40).all()
    assert len({*objects.tolist(), *others.tolist()}) == 32

    few, rest = sampled(is_object, torch.arange(100) >= 95, 64, 0.75, np.random.default_rng(0))
    assert (len(few), len(rest)) == (40, 5)


def test_images_without_any_box_have_losses_of_zero():
    none = Labelled(boxes_R4=torch.zeros(0, 4), classes_R=torch.zeros(0, dtype=int), objects_R=torch.zeros(0, dtype=int))
    logits, deltas = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 12, requires_grad=True)
    truth = Truth(boxes_G4=torch.zeros(0, 4), classes_G=torch.zeros(0, dtype=int), masks=ObjectMasks())

    entropy, distance = box_losses(logits, deltas, [none], [truth], coder=None)

    (entropy + distance).backward()
    assert (entropy.item(), distance.item()) == (0, 0)


# --- stochastic depth, groups -----------------------------------------------------------------------------------------


def test_stochastic_depth_keeps_the_mean_and_is_drawn_by_image():
    settings = DetectorSettings(depth=3, drop_path=0.5, global_blocks=(2,))
    kept = kept_paths(settings, [np.random.default_rng(seed) for seed in range(400)])

    assert kept.shape == (3, 2, 400)
    assert torch.equal(kept[0], torch.ones(2, 400))  # the first block is never left out
    assert sorted({*kept[1].flatten().tolist()}) == pytest.approx([0, 1 / 0.75])
    assert kept.mean(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.1)
    assert torch.equal(kept[..., 7:8], kept_paths(settings, [np.random.default_rng(7)]))


def test_a_branch_that_is_left_out_adds_nothing(published):
    net, images, *_ = published
    kept = torch.ones(net.settings.depth, 2, 3)
    kept[:, :, 1] = 0

    with torch.no_grad():
        plain, dropped, nothing = (net.features(images, each) for each in (None, kept, torch.zeros(net.settings.depth, 2, 3)))

    assert torch.allclose(dropped[[0, 2]], plain[[0, 2]], atol=1e-5)
    assert torch.allclose(dropped[1], nothing[1], atol=1e-5)
    assert not torch.allclose(dropped[1], plain[1], atol=1e-2)


def test_groups_are_the_published_ones():
    expected = json.loads(golden_file("vitdet_training_tables.json").read_text())["param_groups_mask_rcnn_vitdet_b"]
    with torch.device("meta"):
        net = Detector(DetectorSettings())

    groups = parameter_groups(net, dict(net.named_parameters()), weight_decay=0.1, layer_decay=0.7)

    found = {name: (1e-4 * kind.lr_scale, kind.weight_decay) for kind, group in groups.items() for name in group}
    assert found.keys() == expected.keys()
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(expected[name][0], abs=1e-9)
        assert decay == expected[name][1]
    kept = parameter_groups(net, dict(net.named_parameters()), weight_decay=0.1, decays_norms=True)
    assert [name for kind, group in kept.items() for name in group if not kind.weight_decay] == ["backbone.net.pos_embed"]
