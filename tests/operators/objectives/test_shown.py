"""Losses and batch statistics of the part of squares that shows an image: those of that part cut out."""

import pytest
import torch
from torch import nn

from operators.objectives.lift import LOSSES, multi_scale_loss
from operators.objectives.shown import Shown, ShownBatchNorm2d, count_shown, counting, loss_of

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cells_that_hold_any_of_an_image_are_shown():
    shown = Shown(sizes=((64, 48), (64, 33), (1, 64)), side=64)

    assert shown.cells((4, 4)) == [(4, 3), (4, 3), (1, 4)]
    assert shown.cells((2, 2)) == [(2, 2), (2, 2), (1, 2)]
    assert shown.mask((4, 4), torch.device("cpu")).sum(dim=(1, 2, 3)).tolist() == [12, 12, 4]


def test_pixels_beside_an_image_become_zero():
    images = noise(2, 3, 8, 8)

    blanked = Shown(sizes=((8, 5), (3, 8)), side=8).blanked(images)

    torch.testing.assert_close(blanked[0, :, :, :5], images[0, :, :, :5])
    torch.testing.assert_close(blanked[1, :, :3], images[1, :, :3])
    assert blanked[0, :, :, 5:].eq(0).all()
    assert blanked[1, :, 3:].eq(0).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_the_mean_of_those_of_the_images_cut_out(kind):
    predicted, target = noise(2, 5, 4, 4), noise(2, 5, 4, 4, seed=1)
    shown = Shown(sizes=((64, 40), (20, 64)), side=64)

    found = loss_of(LOSSES[kind], predicted, target, shown)

    parts = (LOSSES[kind](predicted[:1, :, :, :3], target[:1, :, :, :3]), LOSSES[kind](predicted[1:, :, :2], target[1:, :, :2]))
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    whole = Shown(sizes=((64, 64),) * 2, side=64)
    torch.testing.assert_close(loss_of(LOSSES[kind], predicted, target, whole), LOSSES[kind](predicted, target))


def test_what_lies_beside_images_changes_no_loss_of_lift():
    """The network here looks at one cell only."""
    net = lambda images, maps: maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # noqa: E731
    shown = Shown(sizes=((64, 32), (32, 64)), side=64)
    images, maps = noise(2, 3, 64, 64), [noise(2, 5, side, side, seed=side) for side in (4, 2)]
    others = [torch.where(shown.mask((side, side), images.device), each, 9.0) for side, each in zip((4, 2), maps, strict=True)]

    found, again = (multi_scale_loss(net, images, each, shown=shown) for each in (maps, others))

    assert found == again
    assert multi_scale_loss(net, images, maps) != multi_scale_loss(net, images, others)


def norms(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Networks of one BatchNorm with the same weights, the second one's statistics being of what is shown."""
    plain = nn.Sequential(nn.BatchNorm2d(3))
    with torch.no_grad():
        plain[0].weight.copy_(noise(3, seed=seed))
        plain[0].bias.copy_(noise(3, seed=seed + 1))
    counted = nn.Sequential(nn.BatchNorm2d(3))
    counted.load_state_dict(plain.state_dict())
    return plain, count_shown(counted)


def test_batch_statistics_are_those_of_the_images_cut_out():
    plain, counted = norms()
    maps = noise(2, 3, 4, 4).requires_grad_()
    rows = torch.cat([maps[0, :, :, :3].flatten(1), maps[1, :, :2].flatten(1)], dim=1).detach()[None, :, :, None].requires_grad_()
    weights = noise(*rows.shape, seed=7)

    expected = plain(rows)
    with counting(counted, Shown(sizes=((64, 40), (20, 64)), side=64)):
        out = counted(maps)
    found = torch.cat([out[0, :, :, :3].flatten(1), out[1, :, :2].flatten(1)], dim=1)[None, :, :, None]

    torch.testing.assert_close(found, expected, **CLOSE)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(counted.state_dict()[name], value, **CLOSE)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    shown = Shown(sizes=((64, 40), (20, 64)), side=64).mask((4, 4), maps.device)
    torch.testing.assert_close(maps.grad.masked_select(~shown).abs().max(), torch.tensor(0.0))
    gradient = torch.cat([maps.grad[0, :, :, :3].flatten(1), maps.grad[1, :, :2].flatten(1)], dim=1)[None, :, :, None]
    torch.testing.assert_close(gradient, rows.grad, rtol=1e-4, atol=1e-5)


def test_without_word_of_what_is_shown_a_batchnorm_is_that_of_torch():
    plain, counted = norms()
    maps = noise(2, 3, 4, 4)

    torch.testing.assert_close(counted(maps), plain(maps))
    with counting(counted.eval(), Shown(sizes=((1, 1),) * 2, side=4)):
        torch.testing.assert_close(counted(maps), plain.eval()(maps))
    assert isinstance(counted[0], ShownBatchNorm2d)
    assert counted[0].shown is None
