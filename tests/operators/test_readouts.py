"""Readouts: DeAP's numbers and published sizes; what its switches change; what every readout promises."""

import itertools
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures, TimmBackbone, normalise
from operators.readouts import READOUTS, Readout, ReadoutConfig, ReadoutError, build_readout
from operators.readouts.deap import DeAP, coordinates, squared_distances
from operators.readouts.readout import position_code
from operators.upsamplers import find_method
from pipelines.costs.readouts import featup_counts, published_counts
from tests.goldens import evaluation_golden, tensor_golden, under

# README_eval.md suggests 1e-4; float32 noise against the golden file is 5e-7.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}
CASES = ("c0", "c1", "c2", "c3")
COUNTS = published_counts()
ABLATIONS = {"base": {}, "no-indiv-sigma": {"shared_sigma": True}, "no-sigma": {"mask": "none"}, "only-mask": {"only_mask": True}}


def golden(case: str) -> dict[str, np.ndarray]:
    stored = evaluation_golden("deap_readout")
    return {key.removeprefix(f"{case}_"): value for key, value in stored.items() if key.startswith(f"{case}_")}


def golden_readout(case: str, **changes: object) -> tuple[DeAP, dict[str, Tensor]]:
    """The readout of a golden case with its weights, and the case's numbers."""
    data = golden(case)
    given = json.loads(str(data.pop("config")))
    readout = build_readout(
        {
            "method": "deap",
            "channels": given["d_in"],
            "outputs": given["d_out"],
            "dim": given["D"],
            "heads": given["heads"],
            "output": [8 * cells for cells in given["query_grid"]],
            **ABLATIONS[given["mode"]],
            **changes,
        }
    )
    values = {key: torch.from_numpy(np.asarray(value)) for key, value in data.items()}
    weights = {ours(key.removeprefix("w_")): value for key, value in values.items() if key.startswith("w_")}
    readout.load_state_dict(weights)
    return readout.eval(), values


def ours(name: str) -> str:
    """The golden file's name of a weight as ours."""
    for theirs, here in (("ff1.", "ffn.0."), ("ff2.", "ffn.2."), ("ff_norm.", "ffn.3.")):
        name = name.replace(theirs, here)
    return f"decoder.{name}" if name.startswith(("cnn.", "skip.")) else name


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deap(**settings: object) -> DeAP:
    return build_readout({"method": "deap", "channels": 12, "outputs": 2, "output": 32, **settings})


# DeAP against the golden file


@pytest.mark.parametrize("case", CASES)
def test_deap_gives_the_golden_output(case):
    readout, data = golden_readout(case)

    with torch.no_grad():
        out = readout(data["input"], tuple(data["output"].shape[-2:]))

    torch.testing.assert_close(out, data["output"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_deap_with_the_mask_of_eq_2(case):
    no_mask = case == "c2"
    readout, data = golden_readout(case, **({} if no_mask else {"mask": "paper"}))
    expected = data["output_if_paper_eq2_mask"]

    with torch.no_grad():
        out = readout(data["input"], tuple(expected.shape[-2:]))

    torch.testing.assert_close(out[:, : expected.shape[1]], expected, **CLOSE)
    assert torch.allclose(out, data["output"], **CLOSE) == no_mask


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("positions", "name"), [("index", "integer_positions"), ("trained", "positions_times_half")])
def test_deap_at_twice_the_trained_size(case, positions, name):
    readout, data = golden_readout(case, positions=positions)
    expected = data[f"output_double_grid_{name}"]

    with torch.no_grad():
        out = readout(data["input"], tuple(expected.shape[-2:]))

    torch.testing.assert_close(out[:, : expected.shape[1]], expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_deap_positions_and_distances(case):
    readout, data = golden_readout(case)
    grid, tokens = readout.trained, tuple(data["input"].shape[-2:])

    squared = squared_distances(coordinates(grid), coordinates(tokens))

    torch.testing.assert_close(readout.query_code(grid), data["aux_pe_q"], **CLOSE)
    torch.testing.assert_close(position_code(tokens), data["aux_pe_f"], **CLOSE)
    torch.testing.assert_close(squared, data["aux_d2"], **CLOSE)


@pytest.mark.parametrize("case", ["c0", "c1", "c3"])
def test_deap_mask_of_each_head(case):
    readout, data = golden_readout(case)
    expected = data["aux_mask"]

    with torch.no_grad():
        mask = readout.masks(data["aux_d2"])

    torch.testing.assert_close(mask.expand_as(expected), expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_deap_attention_feed_forward_and_skip(case):
    readout, data = golden_readout(case)

    with torch.no_grad():
        gathered = readout.attend(data["input"], readout.trained)
        queries = readout.ffn(gathered)
        skipped = readout.decoder.skipped(queries.transpose(1, 2).unflatten(2, readout.trained))

    torch.testing.assert_close(gathered, data["aux_T"], **CLOSE)
    torch.testing.assert_close(queries, data["aux_T_ffn"], **CLOSE)
    torch.testing.assert_close(skipped[:, :2], data["aux_skip_first2"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_deap_golden_parameter_count(case):
    readout, data = golden_readout(case)

    assert readout.parameter_count() == int(data["n_params"])


# Published sizes


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row.backbones} {row.task}")
def test_published_parameter_count(row):
    assert round(row.ours / 1e6, 3) == row.published_millions


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (768, (53_352, 43_286, 86_594, 47_272, 87_704, 43_286)),
        (1024, (66_152, 56_086, 112_194, 60_072, 100_504, 56_086)),
        (256, (27_752, 17_686, 35_394, 21_672, 62_104, 17_686)),
        (896, (59_752, 49_686, 99_394, 53_672, 94_104, 49_686)),
        (1152, (72_552, 62_486, 124_994, 66_472, 106_904, 62_486)),
    ],
)
def test_exact_parameter_counts_of_the_published_tables(channels, expected):
    assert tuple(row.ours for row in COUNTS if row.channels == channels) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "deap", "dim": 8, "outputs": 1}, 21_392),
        ({"method": "deap", "dim": 8, "outputs": 3, "split": [1, 2]}, 42_796),
        ({"method": "deap", "dim": 8, "outputs": 21}, 25_304),
        ({"method": "deap", "outputs": 1, "unused_norm": False}, 43_286 - 2 * (768 + 8)),
        ({"method": "deap", "outputs": 1, "shared_sigma": True}, 43_286 - 7),
        ({"method": "deap", "outputs": 1, "mask": "none"}, 43_286 - 8),
        ({"method": "deap", "outputs": 1, "only_mask": True}, 43_286),
        ({"method": "bicubic", "outputs": 1}, 56_006),
        ({"method": "bicubic", "outputs": 21}, 57_246),
        ({"method": "bicubic", "outputs": 3, "split": [1, 2]}, 112_074),
        ({"method": "strided", "outputs": 1, "output": 448}, 79_092),
        # One 2x2 transposed convolution, and the bicubic baseline's 9,638 for drawing.
        ({"method": "transposed", "outputs": 1, "grid": 14}, 768 * 48 * 4 + 48 + 9_638),
        ({"method": "linear", "outputs": 21, "channels": 384}, 8_085),
        ({"method": "depth_bins", "outputs": 1}, 2 * 768 * 256 + 256),
    ],
    ids=str,
)
def test_parameter_count(settings, expected):
    assert build_readout({"channels": 768, **settings}).parameter_count() == expected


def test_the_papers_width_rule_contradicts_its_table():
    readout = build_readout({"method": "deap", "channels": 768, "outputs": 21, "width_rule": "paper"})

    assert readout.decoder.cnn[0].out_channels == 21
    assert round(readout.parameter_count() / 1e6, 3) == 0.059


# DeAP's switches


def test_only_masks_attention_is_blind_to_contents_and_trains_no_keys():
    readout = deap(only_mask=True)
    one, other = random(1, 12, 4, 4), random(1, 12, 4, 4, seed=1)

    trainable = {name for name, parameter in readout.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        both = readout.attend(one + other, (4, 4)) - readout.attend(one, (4, 4)) - readout.attend(other, (4, 4))
        nothing = readout.attend(torch.zeros(1, 12, 4, 4), (4, 4))

    assert not {"k.weight", "k.bias", "q_proj.weight", "q_proj.bias"} & trainable
    torch.testing.assert_close(both, -nothing, **CLOSE)


def test_a_sigma_at_or_below_zero_gives_finite_numbers_and_leaves_the_others_alone():
    readout, features = deap(), random(1, 12, 4, 4)
    with torch.no_grad():
        before = readout.masks(squared_distances(coordinates((4, 4)), coordinates((4, 4))))
        readout.sigma[:2] = torch.tensor([-0.05, 0.0])
        after = readout.masks(squared_distances(coordinates((4, 4)), coordinates((4, 4))))

    readout(features, (32, 32)).sum().backward()

    assert torch.isfinite(after).all()
    assert (after[:2] >= 0).all()
    assert all(torch.isfinite(p.grad).all() for p in readout.parameters() if p.grad is not None)
    torch.testing.assert_close(after[2:], before[2:], **EXACT)


def test_masks_begin_with_a_sigma_of_a_twentieth():
    peak = deap().masks(torch.zeros(1, 1))

    torch.testing.assert_close(peak, torch.full((8, 1, 1), 1 / (0.05 * math.sqrt(2 * math.pi))))


def test_output_bias_raises_the_initial_output_by_twice_as_much():
    plain, raised = deap(), deap(output_bias=1.0)

    out = raised(random(1, 12, 4, 4), (32, 32)) - plain(random(1, 12, 4, 4), (32, 32))

    torch.testing.assert_close(out, torch.full_like(out, 2.0), **CLOSE)


@pytest.mark.parametrize("settings", [{}, {"shared_sigma": True}, {"mask": "none"}, {"only_mask": True}], ids=str)
def test_chunks_of_queries_dont_change_the_result(settings, monkeypatch):
    readout, features = deap(**settings), random(2, 12, 5, 6)
    with torch.no_grad():
        whole = readout(features, (72, 56))
        monkeypatch.setattr(DeAP, "working_bytes", 1)
        one_by_one = readout(features, (72, 56))
        monkeypatch.setattr(DeAP, "working_bytes", 4 * 30 * 8 * 8 * 13)
        thirteens = readout(features, (72, 56))

    torch.testing.assert_close(one_by_one, whole, **CLOSE)
    torch.testing.assert_close(thirteens, whole, **CLOSE)


def test_attention_is_float32_under_autocast():
    readout, features = deap(), random(2, 12, 4, 4)

    with torch.autocast("cpu", torch.bfloat16):
        gathered = readout.attend(features, (4, 4))

    assert gathered.dtype == torch.float32
    torch.testing.assert_close(gathered, readout.attend(features, (4, 4)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("only_mask", [False, True])
def test_attention_stays_within_its_working_bytes(only_mask, monkeypatch):
    readout, features = deap(only_mask=only_mask), random(2, 12, 16, 16)
    monkeypatch.setattr(DeAP, "working_bytes", 2**20)
    tokens, queries = 2 * 4 * 256 * (20 + 20 + 3 * 48), 2 * 4 * 4096 * 32 * 3
    attention = 4 * 2 * 8 * 4096 * 256

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        readout.attend(features, (64, 64))

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(changes))
    assert 2**19 < peak < 2**20 + tokens + queries < attention / 10


def test_sizes_between_queries_are_drawn_larger_and_resized():
    readout, features = deap(), random(1, 12, 4, 4)

    out = readout(features, (30, 45))

    drawn = readout(features, (32, 48))
    torch.testing.assert_close(out, F.interpolate(drawn, size=(30, 45), mode="bilinear", align_corners=False), **CLOSE)


def test_detection_is_two_readouts_that_share_nothing():
    readout = build_readout({"method": "deap", "channels": 12, "outputs": 3, "split": [1, 2], "output": 32})
    features = random(1, 12, 4, 4)

    out = readout(features, (32, 32))

    centre, size = readout.parts
    assert torch.equal(out, torch.cat([centre(features, (32, 32)), size(features, (32, 32))], dim=1))
    assert not {id(p) for p in centre.parameters()} & {id(p) for p in size.parameters()}
    assert not torch.equal(centre.k.weight, size.k.weight)


# Baselines and probes


def test_bicubic_of_constant_maps_is_the_same_for_every_query():
    readout = build_readout({"method": "bicubic", "channels": 4, "outputs": 1})
    readout.decoder = torch.nn.Identity()

    queries = readout(torch.full((1, 4, 5, 3), 2.0), (64, 48))

    torch.testing.assert_close(queries, queries[..., :1, :1].expand_as(queries), **CLOSE)


def test_bicubic_sampling_meets_the_corner_cells():
    readout = build_readout({"method": "bicubic", "channels": 4, "outputs": 1})
    seen = []
    readout.ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features = random(1, 4, 5, 3)

    readout(features, (64, 48))

    projected = readout.proj(features)
    torch.testing.assert_close(seen[0][0, [0, 0, -1, -1], [0, -1, 0, -1]].T, projected[0, :, [0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize(
    ("grid", "output", "stride"), [(14, 224, (2, 2)), (37, 224, (1, 1)), (37, 448, (2, 2)), ((7, 14), 224, (4, 2))]
)
def test_transposed_convolution_reaches_the_query_grid(grid, output, stride):
    settings = {"method": "transposed", "channels": 4, "outputs": 1, "grid": grid, "output": output}

    assert build_readout(settings).up.stride == stride


@pytest.mark.parametrize(("grid", "stride"), [(37, (1, 1)), (64, (2, 2)), (8, (1, 1))])
def test_strided_convolution_is_as_large_as_grid_by_queries(grid, stride):
    readout = build_readout({"method": "strided", "channels": 16, "outputs": 1, "grid": grid})

    assert readout.down.kernel_size == readout.down.stride == stride


def test_strided_refuses_a_map_smaller_than_its_kernel():
    readout = build_readout({"method": "strided", "channels": 16, "outputs": 1, "output": 32, "grid": 16})

    with pytest.raises(ReadoutError, match="a map of 4x3 cells is smaller than this readout's strided convolution, 4x4"):
        readout(random(1, 16, 4, 3), (32, 32))


def test_strided_positions_begin_as_codes_and_are_resized_for_other_sizes():
    readout = build_readout({"method": "strided", "channels": 16, "outputs": 1, "output": [32, 16], "grid": 4})
    seen = []
    readout.query_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -8:]))

    readout(random(1, 16, 4, 4), (32, 16))
    readout(random(1, 16, 4, 4), (64, 32))

    torch.testing.assert_close(seen[0].flatten(1).T, position_code((4, 2)))
    torch.testing.assert_close(seen[1].reshape(8, 4, 2, 2, 2).mean(dim=(2, 4)), seen[0], rtol=0.2, atol=0.2)


def test_linear_readout_of_a_small_map_is_that_of_the_enlarged_map():
    readout, features = build_readout({"method": "linear", "channels": 6, "outputs": 3}), random(2, 6, 4, 5)
    large = F.interpolate(features, size=(32, 40), mode="bilinear", align_corners=False)

    torch.testing.assert_close(readout(features, (32, 40)), readout(large, (32, 40)), **CLOSE)


def test_linear_readout_can_repeat_cells():
    readout = build_readout({"method": "linear", "channels": 6, "outputs": 3, "resize": "nearest"})
    features = random(1, 6, 2, 2)

    out = readout(features, (4, 6))

    torch.testing.assert_close(out, readout.conv(features).repeat_interleave(2, 2).repeat_interleave(3, 3))


def test_depth_bins_are_the_expectation_of_a_convolution_of_cells_and_image():
    readout = build_readout({"method": "depth_bins", "channels": 6, "outputs": 1})
    features, pooled = random(2, 6, 4, 5), random(2, 6, seed=1)
    unit = pooled / pooled.square().sum(dim=1, keepdim=True).sqrt()
    joined = torch.cat([features, unit[..., None, None].expand(-1, -1, 4, 5)], dim=1)
    weights = readout.conv(joined).clamp(min=0) + 0.1
    depths = 0.001 + torch.arange(256) * (10 - 0.001) / 255
    expected = (weights / weights.sum(dim=1, keepdim=True) * depths[:, None, None]).sum(dim=1, keepdim=True)

    torch.testing.assert_close(readout(features, (4, 5), pooled), expected, **CLOSE)


def test_depth_bins_without_evidence_lie_in_the_middle():
    readout = build_readout({"method": "depth_bins", "channels": 6, "outputs": 1})
    torch.nn.init.constant_(readout.conv.bias, -1e3)

    depth = readout(random(1, 6, 4, 4), (8, 8), random(1, 6))

    torch.testing.assert_close(depth, torch.full((1, 1, 8, 8), (0.001 + 10) / 2))


@pytest.mark.parametrize("pooled", [None, torch.zeros(2, 5), torch.zeros(1, 6)])
def test_depth_bins_name_the_pooled_vector_they_need(pooled):
    readout = build_readout({"method": "depth_bins", "channels": 6, "outputs": 1})

    with pytest.raises(ReadoutError, match=r"needs the pooled \(CLS\) vector \[2, 6\], got"):
        readout(random(2, 6, 4, 4), (8, 8), pooled)


# FeatUp, as DeAP's release compares with it


def test_featup_gives_what_the_release_gives_from_the_image_to_the_loss():
    tensors, config = tensor_golden("deap_featup_readout")
    state = under(tensors, "sd/")
    decoder = {name: state.pop(name) for name in ("decoder.weight", "decoder.bias")}
    pixels = F.interpolate(tensors["in/image01"], size=config["input_size"], mode="nearest")
    image = normalise(pixels.permute(0, 2, 3, 1) * 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    maps = PatchFeatures(layers={0: tensors["in/backbone_map"]}, prefix={}, stride=config["patch"])
    featup = find_method("featup")
    given, stack = featup.official(state, TimmBackbone(timm.create_model("test_vit", patch_size=config["patch"])))
    upsampler = featup.build(featup.parse(given), stack, "fp32", lambda: None)
    readout = build_readout({"method": "featup", "channels": config["channels"], "outputs": config["outputs"]})
    readout.load_state_dict(decoder)

    enlarged = upsampler(image, maps, (0,), tuple(tensors["out/hr_features"].shape[-2:]))
    out = readout(enlarged, (config["input_size"],) * 2)

    torch.testing.assert_close(image, tensors["mid/normalised_image"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(enlarged, tensors["out/hr_features"], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(out, tensors["out/prediction"], rtol=2e-4, atol=2e-4)
    labels = F.interpolate(tensors["in/labels"][None].float(), size=out.shape[-2:], mode="nearest")[0].long()
    torch.testing.assert_close(F.cross_entropy(out, labels, ignore_index=255), tensors["out/cross_entropy"], rtol=1e-4, atol=1e-4)


def test_featup_learns_as_many_parameters_as_are_published():
    assert featup_counts() == {
        "VOC": 8_085, "boundaries": 385, "depth": 385, "COCO-Stuff": 77_000, "detection": 385 + 770, "instances": 32 * 385
    }  # fmt: skip


def test_featup_has_the_other_mode_of_the_release():
    readout = build_readout({"method": "featup", "channels": 16, "outputs": 3, "hidden": 32})
    maps = random(1, 16, 8, 8)

    out = readout(maps, (8, 8))

    first, _, last = readout.decoder
    torch.testing.assert_close(out, F.conv2d(F.relu(first(maps)), last.weight, last.bias, padding=1))
    assert readout.parameter_count() == 17 * 32 + (9 * 32 + 1) * 3


# What every readout promises

SMALL = {"channels": 16, "outputs": 3, "output": 32}
KINDS = {name: {**SMALL, "method": name} for name in READOUTS} | {
    "transposed": {**SMALL, "method": "transposed", "grid": 2},
    "strided": {**SMALL, "method": "strided", "grid": 8},
    "depth_bins": {**SMALL, "method": "depth_bins", "outputs": 1},
    "detection": {**SMALL, "method": "deap", "split": [1, 2]},
    "featup, two": {**SMALL, "method": "featup", "hidden": 8},
    "eq. 2": {**SMALL, "method": "deap", "mask": "paper"},
    "no-sigma": {**SMALL, "method": "deap", "mask": "none"},
    "no-indiv-sigma": {**SMALL, "method": "deap", "shared_sigma": True},
    "only-mask": {**SMALL, "method": "deap", "only_mask": True},
}


@pytest.mark.parametrize("name", KINDS)
class TestReadout:
    def build(self, name: str, seed: int = 0) -> Readout:
        return build_readout(KINDS[name], seed)

    @pytest.mark.parametrize("size", [(32, 32), (64, 24), (8, 8), (30, 45)])
    @pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
    def test_gives_the_asked_size_as_float32(self, name, size, grid):
        out = self.build(name)(random(2, 16, *grid), size, random(2, 16))

        assert out.shape == (2, KINDS[name]["outputs"], *size)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()

    def test_is_float32_under_autocast_and_near_its_numbers_without(self, name):
        readout, features = self.build(name), random(2, 16, 4, 4)
        expected = readout(features, (32, 32), random(2, 16))

        with torch.autocast("cpu", torch.bfloat16):
            out = readout(features.bfloat16(), (32, 32), random(2, 16))

        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)
        assert not torch.equal(out, expected)

    def test_takes_half_precision_maps(self, name):
        readout, features = self.build(name), random(2, 16, 4, 4).half()

        out = readout(features, (32, 32), random(2, 16).half())

        assert torch.equal(out, readout(features.float(), (32, 32), random(2, 16).half().float()))

    def test_does_not_depend_on_the_batch(self, name):
        readout, features, pooled = self.build(name), random(3, 16, 4, 6), random(3, 16)

        together = readout(features, (32, 48), pooled)

        alone = readout(features[1:2], (32, 48), pooled[1:2])
        torch.testing.assert_close(together[1:2], alone, **CLOSE)

    def test_depends_on_the_map(self, name):
        readout = self.build(name)

        one, other = (readout(random(1, 16, 4, 4, seed=seed), (32, 32), random(1, 16)) for seed in (0, 1))

        assert (one - other).abs().max() > 1e-3

    @pytest.mark.parametrize("features", [torch.zeros(1, 12, 4, 4), torch.zeros(12, 4, 4)])
    def test_refuses_other_channels(self, name, features):
        with pytest.raises(ReadoutError, match=r"maps of 16 channels, .*; got \[.*12, 4, 4\]"):
            self.build(name)(features, (32, 32), random(1, 16))

    def test_refuses_an_empty_size(self, name):
        with pytest.raises(ReadoutError, match="0x32 pixels is empty"):
            self.build(name)(random(1, 16, 4, 4), (0, 32), random(1, 16))

    def test_state_dict_comes_back(self, name):
        readout, other = self.build(name), self.build(name, seed=1)
        given = (random(1, 16, 4, 4), (32, 32), random(1, 16))
        before = other(*given)

        other.load_state_dict(readout.state_dict())

        assert torch.equal(other(*given), readout(*given))
        assert not torch.equal(before, readout(*given))

    def test_begins_the_same_for_a_seed_and_leaves_the_generator_alone(self, name):
        state = torch.random.get_rng_state()
        one, same = self.build(name).state_dict(), self.build(name).state_dict()

        assert all(torch.equal(one[key], same[key]) for key in one)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_gradients_reach_every_trainable_parameter(self, name):
        readout = self.build(name)

        readout(random(4, 16, 4, 4), (32, 32), random(4, 16)).square().mean().backward()

        trainable = {key: parameter.grad for key, parameter in readout.named_parameters() if parameter.requires_grad}
        # What is added to all keys changes no softmax: its gradient is zero but for rounding.
        unreached = [key for key, grad in trainable.items() if grad is None or not (grad.any() or "k.bias" in key)]
        assert trainable
        assert unreached == []

    def test_says_whether_it_needs_the_pooled_vector(self, name):
        readout, features = self.build(name), random(2, 16, 4, 4)
        one, other = (readout(features, (32, 32), random(2, 16, seed=seed)) for seed in (0, 1))

        assert readout.needs_pooled == (not torch.equal(one, other))


# Settings


def test_settings_come_from_json_with_published_defaults():
    config = ReadoutConfig.parse(json.loads('{"method": "deap", "channels": 768, "outputs": 1, "dim": null, "output": 448}'))

    assert config == ReadoutConfig(method="deap", channels=768, outputs=1, output=(448, 448))
    assert (config.query_channels, config.heads, config.mask, config.positions) == (16, 8, "released", "trained")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dpt"}, "no readout is called 'dpt'; there are: deap, bicubic, transposed, strided, linear, featup"),
        ({"chanels": 4}, "no such readout settings: chanels; there are: method, channels, outputs"),
        ({"outputs": None}, "the readout's settings lack outputs"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"heads": True}, "heads must be a whole number of at least 1, got True"),
        ({"width": 1.5}, r"width must be a whole number of at least 1, got 1\.5"),
        ({"output": [224]}, r"output must be two whole numbers of at least 1, got \(224,\)"),
        ({"split": [1, 0]}, r"split must be whole numbers of at least 1, got \(1, 0\)"),
        ({"mask": "gaussian"}, "mask must be one of released, paper, none, got 'gaussian'"),
        ({"only_mask": "yes"}, "only_mask must be true or false, got 'yes'"),
        ({"output_bias": math.inf}, "output_bias must be a finite number, got inf"),
        ({"method": "bicubic", "mask": "paper"}, "mask='paper' is no setting of bicubic"),
        ({"method": "linear", "width": 4}, "width=4 is no setting of linear"),
        ({"resize": "nearest"}, "resize='nearest' is no setting of deap"),
        ({"split": [1, 2]}, r"split \(1, 2\) makes 3 outputs, not 2"),
        ({"method": "depth_bins"}, "depth_bins has 1 output, not 2"),
        ({"dim": 12}, "dim must be a multiple of 8 for deap, and at least 4; got 12"),
        ({"method": "strided", "channels": 24}, "24 don't divide into them"),
        ({"only_mask": True, "mask": "none"}, "only_mask without a mask would see nothing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_settings_are_refused_with_a_reason(changes, message):
    with pytest.raises(ReadoutError, match=message):
        ReadoutConfig.parse({"method": "deap", "channels": 16, "outputs": 2, **changes})
