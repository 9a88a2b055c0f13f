"""FeatUp's training: jitters, downsamplers and losses as released, with what is drawn given; and what is drawn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from operators.objectives.featup import (
    AttentionDownsampler,
    Crf,
    Jitter,
    SimpleDownsampler,
    Uncertainty,
    patches,
    projection,
    sampled_pixels,
    total_variation,
    uncertain_l2,
)
from tests.goldens import tensor_golden, under


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return tensor_golden("jbu_training_pieces")[0]


# --- the released pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zoom", "nozoom"])
def test_jitters_are_the_released_ones(golden, kind):
    zoom, top, left, flip, pad = golden[f"jitter.{kind}.zoom_x_y_flip_pad"].tolist()
    jitter = Jitter(zoom=zoom, top=int(top), left=int(left), flip=bool(flip), pad=int(pad))

    torch.testing.assert_close(jitter(golden["jitter.in"]), golden[f"jitter.{kind}.out"], rtol=0, atol=1e-6)


def test_the_attention_downsampler_is_the_released_one(golden):
    grid = tuple(golden["down.out"].shape[-2:])
    net = AttentionDownsampler(golden["down.in"].shape[1], len(golden["down.w.w"])).eval()
    net.load_state_dict(under(golden, "down.w."))

    found = net(golden["down.in"], grid, golden["down.keep_mask"][..., 0])

    torch.testing.assert_close(found, golden["down.out"], rtol=0, atol=1e-6)
    assert not torch.allclose(net(golden["down.in"], grid), found, atol=1e-3)  # all places are kept in inference


def test_the_simple_downsampler_is_the_released_one(golden):
    net = SimpleDownsampler(len(golden["simple_down.kernel_params"]))
    net.load_state_dict({"kernel_params": golden["simple_down.kernel_params"]})

    found = net(golden["down.in"], tuple(golden["simple_down.out"].shape[-2:]))

    torch.testing.assert_close(found, golden["simple_down.out"], rtol=0, atol=2e-6)


def test_the_crf_and_total_variation_are_the_released_ones(golden):
    loss = Crf().loss(golden["crf.guidance"], golden["crf.features"], golden["crf.coords_hw"])

    torch.testing.assert_close(loss[None], golden["crf.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        total_variation(golden["crf.features"])[None], golden["tv.loss_on_crf_features"], rtol=1e-6, atol=0
    )


# --- what follows from the definitions ----------------------------------------------------------------------------------------


def test_the_crf_is_the_mean_over_pairs_whose_shift_takes_off(golden):
    guidance, maps = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6)
    pixels = sampled_pixels(np.random.default_rng(0), (5, 6), 7)
    crf = Crf(alpha=0.2, beta=0.3, gamma=0.1, w1=2.0, w2=1.0, shift=0.5)

    expected = []
    for b in range(2):
        for i in range(7):
            for j in range(7):
                (y, x), (v, u) = pixels[:, i].tolist(), pixels[:, j].tolist()
                near = ((y - v) / 5) ** 2 + ((x - u) / 6) ** 2
                colour = float((guidance[b, :, y, x] - guidance[b, :, v, u]).square().sum())
                like = 2 * math.exp(-near / 0.4 - colour / 0.6) + math.exp(-near / 0.2) - 0.5
                expected.append(like * float((maps[b, :, y, x] - maps[b, :, v, u]).square().sum()))

    assert float(crf.loss(guidance, maps, pixels)) == pytest.approx(np.mean(expected), rel=1e-4)
    with pytest.raises(ValueError, match="one size"):
        crf.loss(guidance, maps[..., :5], pixels)


def test_downsamplers_go_over_maps_of_any_shape():
    maps = torch.randn(2, 3, 24, 40)

    cells = patches(maps, 8, (3, 5))
    assert torch.equal(cells[:, :, 1, 2], maps[:, :, 8:16, 16:24])
    assert torch.equal(patches(maps, 6, (3, 3))[:, :, 2, 1], maps[:, :, 18:24, 17:23])  # strides 9 and 17
    assert patches(maps, 24, (1, 1)).shape == (2, 3, 1, 1, 24, 24)
    means = SimpleDownsampler(8)(maps, (3, 5))
    torch.testing.assert_close(means, F.avg_pool2d(maps, 8))
    for kernel, grid in ((25, (1, 1)), (8, (18, 5))):
        with pytest.raises(ValueError, match="too few"):
            patches(maps, kernel, grid)


def test_an_attention_downsamplers_cells_are_means_of_their_pixels():
    net = AttentionDownsampler(3, 8).eval()
    flat = torch.arange(3.0)[:, None, None].expand(1, 3, 24, 24)

    torch.testing.assert_close(net(flat, (3, 3)), flat[..., :3, :3])


def test_places_are_dropped_in_training_alone():
    net = AttentionDownsampler(3, 8)
    maps = torch.randn(1, 3, 24, 24)

    assert not torch.equal(net.train()(maps, (3, 3)), net(maps, (3, 3)))
    assert torch.equal(net.eval()(maps, (3, 3)), net(maps, (3, 3)))


def test_jitters_that_are_drawn_show_all_of_the_image_that_they_may():
    rng = np.random.default_rng(0)
    drawn = [Jitter.draw(rng, (32, 48), pad=6) for _ in range(400)]
    maps = torch.randn(1, 2, 32, 48)

    assert all(jitter(maps).shape == maps.shape for jitter in drawn)
    zooms = np.array([jitter.zoom for jitter in drawn])
    assert np.mean(zooms == 1) == pytest.approx(0.5, abs=0.08)
    assert 1.9 < zooms.max() < 2
    plain = [jitter for jitter in drawn if jitter.zoom == 1]
    assert ({jitter.top for jitter in plain}, {jitter.left for jitter in plain}) == (set(range(13)), set(range(13)))
    assert np.mean([jitter.flip for jitter in drawn]) == pytest.approx(0.5, abs=0.08)


def test_a_jitter_moves_an_image_and_its_map_alike():
    """What a map is of stays where the image shows it."""
    image = torch.randn(1, 3, 40, 40)
    jitter = Jitter(zoom=1.5, top=11, left=3, flip=True, pad=4)

    torch.testing.assert_close(jitter(image.sum(dim=1, keepdim=True)), jitter(image).sum(dim=1, keepdim=True), rtol=0, atol=1e-4)
    unmoved = Jitter(zoom=1.0, top=4, left=4, flip=False, pad=4)
    assert torch.equal(unmoved(image), image)


def test_projections_have_columns_of_length_one():
    found = projection(np.random.default_rng(0), 12, 5)

    assert found.shape == (12, 5)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(5))


def test_uncertain_errors_count_as_a_gaussians():
    predicted, target = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    scale, matrix = torch.rand(2, 1, 3, 3) + 0.5, torch.randn(4, 6)

    found = uncertain_l2(predicted, target, scale, matrix)

    errors = torch.einsum("bcnm,cp->bpnm", predicted, matrix) - torch.einsum("bcnm,cp->bpnm", target, matrix)
    density = torch.distributions.Normal(0.0, scale.expand_as(errors)).log_prob(errors)
    assert float(found) == pytest.approx(float(-density.mean() - 0.5 * math.log(2 * math.pi)), rel=1e-5)


def test_uncertainty_begins_nearly_flat_and_stays_above_nothing():
    net = Uncertainty(8)
    target = torch.randn(3, 8, 4, 4)

    with torch.no_grad():
        assert float((net(target) - math.exp(0.1)).abs().max()) < 0.5
    torch.nn.init.constant_(net.net.bias, -100.0)
    assert torch.equal(net(target), torch.full((3, 1, 4, 4), 1e-4))
