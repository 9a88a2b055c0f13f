"""A separate program agrees with the store: Pillow and torchvision decode, timm runs in fp32, rows are compared by key.

This file uses nothing of the project to compute what is expected, only the store's files through zarr and pyarrow.
"""

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import zarr
from PIL import Image
from torchvision import transforms as T

from jobs.extract import run

INTERPOLATION = {"bicubic": T.InterpolationMode.BICUBIC, "bilinear": T.InterpolationMode.BILINEAR}


def photos(pattern: Path) -> dict[str, Image.Image]:
    found = {}
    for path in sorted(pattern.parent.glob(pattern.name)):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file
                    found[member.name[:-4]] = Image.open(io.BytesIO(file.read())).convert("RGB")
    return found


def transform(model: torch.nn.Module, size: int, geometry: str) -> T.Compose:
    config = timm.data.resolve_model_data_config(model)
    how = INTERPOLATION[config["interpolation"]]
    fit = [T.Resize(size, how), T.CenterCrop(size)] if geometry == "crop" else [T.Resize((size, size), how)]
    return T.Compose([*fit, T.ToTensor(), T.Normalize(config["mean"], config["std"])])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The lowest cosine over cells."""
    a, b = (torch.from_numpy(np.asarray(x, np.float64)).reshape(-1, x.shape[-1]) for x in (a, b))
    return float(F.cosine_similarity(a, b, dim=-1).min())


def expected_maps(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final-norm patch maps [B, h, w, C] and pooled vectors [B, C], from the model's own forward."""
    with torch.inference_mode():
        tokens = model.forward_features(images)
    if type(model).__name__ == "Hiera":
        with torch.inference_mode():
            maps = model.forward_intermediates(images, indices=1, intermediates_only=True)[0].permute(0, 2, 3, 1)
        return maps, maps.mean(dim=(1, 2))
    prefix = model.num_prefix_tokens
    side = math.isqrt(tokens.shape[1] - prefix)
    maps = tokens[:, prefix:].reshape(len(tokens), side, side, -1)
    return maps, tokens[:, 0] if prefix else maps.mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("name", "size", "geometry"),
    [
        ("vit_small_patch16_224.dino", 224, "crop"),
        ("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", 224, "squash"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 224, "crop"),
        ("hiera_tiny_224.mae", 224, "crop"),
        ("vit_base_patch16_siglip_224.webli", 224, "squash"),
        ("vit_small_patch16_dinov3.lvd1689m", 256, "crop"),
    ],
)
def test_random_weights_of_many_architectures(name, size, geometry, shared_data, tmp_path):
    torch.manual_seed(3)
    kwargs = {} if name.startswith("hiera") else {"dynamic_img_size": True}
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    tar = shared_data / "photos_open/photos-open-000001.tar"

    code = run(["--data", str(tar), "--out", str(tmp_path / "f.zarr"), "--model", name, "--limit", "3", "--size", str(size),
                "--weights", str(tmp_path / "w.safetensors"), "--geometry", geometry, "--precision", "fp32",
                "--levels", "x1", "x2", "pooled", "--executor", "inline"])  # fmt: skip

    assert code == 0
    check_store(tmp_path / "f.zarr", model, photos(tar), transform(model, size, geometry), rows=3)


def check_store(store: Path, model: torch.nn.Module, images: dict[str, Image.Image], prepare: T.Compose, rows: int) -> None:
    group = zarr.open_group(str(store), mode="r")
    ledger = pq.read_table(store / "ledger/samples/part-00000.parquet").to_pylist()
    assert len(ledger) == rows
    for start in range(0, rows, 8):
        part = ledger[start : start + 8]
        assert all(record["status"] == "ok" for record in part)
        maps, pooled = expected_maps(model, torch.stack([prepare(images[record["key"]]) for record in part]))
        doubled = F.interpolate(maps.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
        at = slice(part[0]["row"], part[-1]["row"] + 1)
        assert cosine(group["x1/features"][at], maps.numpy()) > 0.9999
        assert cosine(group["x2/features"][at], doubled.numpy()) > 0.9999
        assert cosine(group["pooled/features"][at], pooled.numpy()) > 0.9999


def test_pretrained_vit_tiny_and_its_own_head(shared_data, tmp_path):
    weights = shared_data / "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    tar = shared_data / "imagenet_sample/imagenet-sample-000000.tar"

    code = run(["--data", str(tar), "--out", str(tmp_path / "f.zarr"), "--model", weights.name, "--weights", str(weights),
                "--precision", "fp32", "--levels", "x1", "x2", "pooled=cls", "--carry", "cls", "--limit", "48",
                "--executor", "inline"])  # fmt: skip

    assert code == 0
    images = photos(tar)
    prepare = transform(model, 224, "crop")
    check_store(tmp_path / "f.zarr", model, images, prepare, rows=48)
    index = pq.read_table(tmp_path / "f.zarr/index/samples/part-00000.parquet")
    labels = torch.tensor([int(label) for label in index["cls"].to_pylist()])
    stored = torch.from_numpy(zarr.open_group(str(tmp_path / "f.zarr"), mode="r")["pooled/features"][:].astype(np.float32))
    with torch.inference_mode():
        ours = model.head(stored).argmax(dim=1)
        own = model(torch.stack([prepare(images[key]) for key in index["key"].to_pylist()])).argmax(dim=1)
    assert (ours == own).all()
    assert (own == labels).float().mean() > 0.7
