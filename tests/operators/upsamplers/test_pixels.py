"""What JAFAR and AnyUp share: memory at sizes of real use, and strips of pixels."""

import pytest
import torch

from operators.backbone import PatchFeatures
from operators.upsamplers import find_method
from operators.upsamplers.anyup import Block
from operators.upsamplers.pixels import PixelRope, encode, encoder
from pipelines.costs.clocks import Live
from tests.contracts.upsampler import small_vit
from tests.pretended_gpu import shapes_on_a_gpu


@pytest.mark.parametrize(
    ("method", "settings", "base", "image", "grid"),
    [
        ("jafar", {"channels": 384}, (28, 28), (448, 448), (448, 448)),
        ("jafar", {"channels": 384}, (64, 64), (1024, 1024), (64, 80)),
        pytest.param("jafar", {"channels": 384}, (128, 128), (2048, 2048), (128, 160), marks=pytest.mark.soak),  # 35 s
        ("anyup", {}, (28, 28), (448, 448), (448, 448)),
        pytest.param("anyup", {}, (128, 128), (2048, 2048), (128, 160), marks=pytest.mark.soak),  # 26 s
        ("anyup", {"natten": True}, (32, 20), (448, 280), (210, 333)),
        ("anyup", {"window_ratio": 0.0}, (32, 20), (448, 280), (100, 130)),
    ],
)
def test_memory_stays_below_what_is_declared_at_sizes_of_real_use(method, settings, base, image, grid):
    found = find_method(method)
    parsed = found.parse({"patch": image[0] // base[0], **settings})
    upsampler = found.build(parsed, found.initialised(parsed).state_dict(), "fp32", lambda: small_vit(8))

    with shapes_on_a_gpu(80 * 2**30):
        maps, images = torch.empty(1, 384, *base, device="cuda"), torch.empty(1, 3, *image, device="cuda")
        features = PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(1, 0, 384)}, stride=image[0] // base[0])
        with Live() as live:
            upsampler(images, features, (0,), grid)

    bound = upsampler.call_bytes(1, 384, base, image, grid)
    assert 4 * 384 * grid[0] * grid[1] < live.peak <= bound
    assert live.peak > bound / 3, "the bound is much too high"


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 30])
def test_strips_give_what_the_modules_give(kernel, rows, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("operators.upsamplers.pixels._SMALL_STRIP", 1)
    layers, rope, images = encoder(3, 16, Block, kernel), PixelRope(16), torch.randn(2, 3, 11, 14) + 1
    rope.freqs.data += 0.1 * torch.randn(2, 16)
    at_once = 5 * 2 * 16 * 14 * rows
    expected = rope(layers(images), at_once)

    with torch.no_grad():
        found = rope(encode(layers, images, at_once), at_once)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
