"""What tests of ViTDet share: a tiny detector's settings, and those and the weights of golden files (README_vitdet.md)."""

import torch

from operators.upsamplers.lift import Lift, LiftSettings
from operators.vitdet.detector import Detector
from operators.vitdet.settings import DetectorSettings
from tests.goldens import under

TINY = DetectorSettings(
    square_pad=64, image_size=64, pretrain_size=32, dim=16, depth=2, heads=2, window=2, global_blocks=(1,), channels=8, fc=8,
    classes=3,
)  # fmt: skip
"""The smallest detector that has all parts."""


def settings_of(config: dict) -> DetectorSettings:
    """Of a detector's `config`; with LiFT, its backbone's are in an object of their own."""
    vit = config.get("vit", config)
    return DetectorSettings(
        square_pad=config["square_pad"],
        image_size=vit.get("img_size", config["img"]),
        pretrain_size=vit.get("pretrain", config.get("pre")),
        dim=config["dim"],
        depth=vit["depth"],
        heads=vit["heads"],
        window=vit["window"],
        global_blocks=tuple(vit["glob"]),
        channels=config["ch"],
        fc=config["fc"],
        classes=config["K"],
        anchor_sizes=tuple(map(tuple, config["sizes"])),
        pre_topk=tuple(config["pre_topk"]),
        post_topk=tuple(config["post_topk"]),
        proposal_nms=config.get("rpn_nms", 0.7),
        canonical_size=config["canon"],
        score_threshold=config.get("score_thresh", 0.05),
        nms=config.get("nms", 0.5),
        topk=config.get("topk", 20),
        cascade=config["cascade"],
    )


def detector_of(tensors: dict[str, torch.Tensor], config: dict) -> Detector:
    """A golden file's detector in eval mode, with its LiFT where it has one."""
    state = under(tensors, "sd/")
    has_lift = any(name.startswith("lift.") for name in state)
    lift = Lift("lift").network(LiftSettings(channels=config["dim"], patch=16)) if has_lift else None
    detector = Detector(settings_of(config), lift)
    detector.load_state_dict(state)
    return detector.eval()
