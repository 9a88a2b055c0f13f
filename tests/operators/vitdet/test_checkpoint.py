"""Weights of detectors: pickles that hold arrays and those that do more, and weights of another network."""

import io
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from operators.upsamplers.lift import Lift, LiftSettings
from operators.vitdet.checkpoint import build, described, detector_tensors, load, load_backbone, settings_of, unpickled
from operators.vitdet.detector import Detector
from operators.vitdet.settings import DetectorError, DetectorSettings
from pipelines.features.weights import WeightsUnavailable, read_state_dict

SMALL = DetectorSettings(
    square_pad=64, image_size=128, pretrain_size=64, dim=16, depth=3, heads=2, window=2, global_blocks=(1,), channels=8, fc=12,
    classes=3,
)  # fmt: skip
LIFT = {"method": "lift", "channels": 16, "patch": 16}


def small(seed: int = 0, **changes: object) -> Detector:
    return build(described(replace(SMALL, **changes)), seed)


def arrays(detector: Detector) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in detector.state_dict().items()}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_are_read_in_all_protocols(protocol, tmp_path):
    detector = small(1)
    old = {"pixel_mean": np.zeros((3, 1, 1), np.float32), "proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4))}
    model = OrderedDict(arrays(detector)) | old
    model["backbone.net.pos_embed"] = np.asfortranarray(model["backbone.net.pos_embed"]).astype(">f4")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "third party"}, protocol=protocol))

    state = read_state_dict(str(tmp_path / "model.pkl"))
    loaded = small()
    load(loaded, state)

    require_same(loaded.state_dict(), detector.state_dict())
    assert state.keys() - detector.state_dict().keys() == old.keys()


def test_half_precision_becomes_float32():
    halves = {name: value.half() for name, value in small(1).state_dict().items()}
    loaded = small()
    load(loaded, halves)
    require_same(loaded.state_dict(), {name: value.float() for name, value in halves.items()})


def test_names_of_numpys_core_before_version_2_and_scalars():
    data = pickle.dumps({"a": np.arange(3), "b": np.float32(2)}, protocol=2)
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data
    assert {name: value.tolist() for name, value in unpickled(old).items()} == {"a": [0, 1, 2], "b": 2.0}


class Calling:
    def __init__(self, *called: object):
        self.called = called

    def __reduce__(self):
        return self.called[0], tuple(self.called[1:])


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("called", "named"),
    [((os.system, "true"), r"(posix|nt)\.system"), ((getattr, "x", "upper"), r"\w+\.getattr"), ((np.load, "x"), r"numpy\S*load")],
)
def test_a_pickle_that_calls_anything_else_is_not_run(called, named, protocol, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": Calling(*called)}}, protocol=protocol))
    with pytest.raises(WeightsUnavailable, match=rf"model\.pkl: this pickle isn't one of arrays alone.*: it asks for {named}$"):
        read_state_dict(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": np.array([{}, 1], dtype=object)}}, "a in this pickle is an array of object, not one of numbers"),
        ({"model": {"a": np.array(["x"])}}, "a in this pickle is an array of <U1"),
        ({"model": {"a": 3}}, "a in this pickle is a int"),
        ({"model": {}}, "holds no dict of arrays"),
        ([np.zeros(2)], "holds no dict of arrays"),
    ],
)
def test_other_contents_are_refused(content, message):
    with pytest.raises(DetectorError, match=re.escape(message)):
        unpickled(pickle.dumps(content))


def test_a_codec_other_than_that_of_bytes_is_refused():
    import _codecs

    with pytest.raises(DetectorError, match=r"it asks for _codecs\.encode to rot13"):
        unpickled(pickle.dumps({"a": Calling(_codecs.encode, "x", "rot13")}, protocol=2))


def test_a_pickle_that_is_cut_off_is_refused_wherever_that_is():
    data = pickle.dumps({"model": {"a": np.arange(50)}})
    for end in range(len(data)):
        with pytest.raises(DetectorError, match="this is no whole pickle of arrays"):
            unpickled(data[:end])


def test_a_torch_file_of_that_name_is_refused():
    file = io.BytesIO()
    torch.save({"model": {}}, file)
    with pytest.raises(DetectorError, match="this is no whole pickle of arrays"):
        unpickled(file.getvalue())


def test_training_checkpoints_hold_more_than_the_model(tmp_path):
    detector = small(1)
    saved = {
        "model": detector.state_dict(),
        "optimizer": {"state": {0: {"step": 3}}},
        "scheduler": {"last_epoch": 2},
        "iteration": 7,
    }
    torch.save(saved, tmp_path / "model_0000007.pth")
    loaded = small()
    load(loaded, read_state_dict(str(tmp_path / "model_0000007.pth")))
    require_same(loaded.state_dict(), detector.state_dict())


@pytest.mark.parametrize("cascade", [False, True])
def test_the_settings_are_told_from_the_tensors(cascade):
    state = small(cascade=cascade).state_dict()
    found = settings_of(state, square_pad=64)
    assert found == replace(SMALL, cascade=cascade)
    with torch.device("meta"):
        published = Detector(DetectorSettings.published("L", cascade=cascade)).state_dict()
    assert settings_of(published, drop_path=0.4) == DetectorSettings.published("L", cascade=cascade)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cascade": True}, "these are weights of a Cascade R-CNN; the detector is a Mask R-CNN"),
        ({"dim": 32}, "another ViTDet: 32 channels of the backbone, not 16"),
        ({"heads": 4}, "another ViTDet: 4 heads, not 2"),
        ({"depth": 4, "classes": 5}, "another ViTDet: 4 blocks, not 3; .*; 5 classes, not 3"),
        ({"window": 3}, r"\(3, 8, 3\) cells a side of the tables of relative positions, block by block, not \(2, 8, 2\)"),
        ({"image_size": 64}, r"another ViTDet: \(2, 4, 2\) cells a side of the tables"),
        ({"pretrain_size": 96}, "another ViTDet: 96 pixels a side in pre-training, not 64"),
        ({"channels": 4, "fc": 6}, "4 channels of the pyramid and the heads, not 8; 6 channels of the box head's layer, not 12"),
        ({"anchor_sizes": ((8, 9),) * 5}, r"of another shape: proposal_generator\.rpn_head\.objectness_logits\.weight"),
    ],
)  # fmt: skip
def test_weights_of_another_detector_are_refused_with_what_differs(changes, message):
    state = small(**changes).state_dict()
    with pytest.raises(DetectorError, match=message):
        load(small(), state)


def test_whole_numbers_are_no_weights():
    with pytest.raises(DetectorError, match=r"1 weights are whole numbers \(a\.weight\): quantised"):
        detector_tensors({"a.weight": torch.zeros(2, dtype=torch.int8), "lift.bn.num_batches_tracked": torch.tensor(3)})


def test_missing_and_foreign_tensors_are_refused():
    state = small().state_dict()
    with pytest.raises(DetectorError, match=r"1 missing: roi_heads\.mask_head\.deconv\.bias; 1 unexpected: more"):
        load(small(), {name: value for name, value in state.items() if "deconv.bias" not in name} | {"more": torch.zeros(1)})
    with pytest.raises(DetectorError, match="look like a ViT alone"):
        load(small(), small().backbone.net.state_dict())
    with pytest.raises(DetectorError, match="another backbone than a plain ViT"):
        load(small(), {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1)})
    with pytest.raises(DetectorError, match="there are none"):
        load(small(), {})


def test_with_and_without_an_upsampler_are_two_detectors():
    plain, lifted = small(), build(described(SMALL, LIFT))
    with pytest.raises(DetectorError, match=r"of a ViTDet with an upsampler \(lift\.\); the detector has none"):
        load(plain, lifted.state_dict())
    with pytest.raises(DetectorError, match="of a ViTDet without an upsampler; the detector has one"):
        load(lifted, plain.state_dict())


def test_a_checkpoint_of_ours_is_tensors_and_a_description():
    settings = LiftSettings(channels=16, patch=16)
    description = described(SMALL, Lift("lift").to_json(settings))
    saved = build(description, seed=3)
    loaded = build(described(DetectorSettings.parse(description["detector"]), description["upsampler"]))

    load(loaded, safetensors.torch.load(safetensors.torch.save(saved.state_dict())))

    require_same(loaded.state_dict(), saved.state_dict())
    require_same(build(description, seed=3).state_dict(), saved.state_dict())


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"detector": {"dims": 3}}, "no such detector settings: dims"),
        ({"detector": {"window": 0}}, "window must be a whole number of at least 1, got 0"),
        ({"detector": SMALL.to_json(), "lift": {}}, "no such entry of a detector: lift"),
        ({"upsampler": LIFT}, "a detector is described by"),
        (described(SMALL, {"method": "lifted"}), "no upsampler is called 'lifted'"),
        (described(SMALL, {"method": "bilinear"}), "bilinear can't stand in a detector"),
        (described(SMALL, LIFT | {"channels": 8}), "this lift is for maps of 8 channels; the backbone's have 16"),
        (described(SMALL, LIFT | {"heads": 2}), "this lift is for keys or queries of 2 heads"),
    ],
)
def test_descriptions_of_no_detector_are_refused(description, message):
    with pytest.raises(DetectorError, match=message):
        build(description)


def test_a_backbone_begins_with_mae():
    detector, mae = (
        small(),
        {f"{name}": value + 1 for name, value in small(2).backbone.net.state_dict().items() if ".rel_pos_" not in name},
    )
    beside = {
        "cls_token": torch.zeros(1, 1, 16),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.ones(16),
        "decoder_pred.bias": torch.ones(3),
    }
    before = {name: value.clone() for name, value in detector.state_dict().items()}

    load_backbone(detector, mae | beside)

    found = detector.state_dict()
    for name, value in before.items():
        own = mae.get(name.removeprefix("backbone.net."))
        assert torch.equal(found[name], value if own is None else own)


def test_backbones_that_are_no_mae_of_that_size_are_refused():
    mae = {name: value for name, value in small().backbone.net.state_dict().items() if ".rel_pos_" not in name}
    with pytest.raises(DetectorError, match=r"1 missing: patch_embed\.proj\.bias"):
        load_backbone(small(), {name: value for name, value in mae.items() if name != "patch_embed.proj.bias"})
    with pytest.raises(DetectorError, match=r"1 unexpected: blocks\.0\.ls1\.gamma"):
        load_backbone(small(), mae | {"blocks.0.ls1.gamma": torch.ones(16)})
    with pytest.raises(DetectorError, match=r"of another shape: pos_embed \(1, 17, 16\) instead of \(1, 37, 16\)"):
        load_backbone(small(pretrain_size=96), mae)
    with pytest.raises(DetectorError, match="of a whole detector, not of a ViT"):
        load_backbone(small(), small().state_dict())


def test_buffers_of_old_files_alone_are_left_out():
    assert detector_tensors({"pixel_std": torch.ones(3), "x.pixel_std": torch.ones(3)}).keys() == {"x.pixel_std"}
