"""Extraction with learned upsamplers: where their weights come from, what they are held against, what is stored.

test_vit at 64 px: 4 x 4 cells, 64 channels, 2 heads. The networks have random weights and BatchNorms that do something.
"""

import base64
import io
import json
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import s3fs
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from jobs.extract import run
from jobs.show import run as show
from operators.backbone import BackboneError, TimmBackbone, normalise
from operators.timm_models import create_model, state_arrays, weights_digest
from operators.upsamplers import UpsamplerError, build_net, create_upsampler, find_method, learned_upsampler
from pipelines.config import ConfigError
from pipelines.demo_datasets import write_demo
from pipelines.evaluation import correspondence
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.run import evaluate
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.features.levels import LevelChoice
from pipelines.features.photos import read_photos
from pipelines.features.upsamplers import load_upsampler
from storage.paths import Folder
from storage.spec import FingerprintMismatch
from storage.store import FeatureStore
from tests.operators.test_backbone import described
from tests.pipelines.extraction.test_s3 import same_but_sources, tree
from tests.stops import dying_at_task

LIFT = {"method": "lift", "channels": 64, "patch": 16}
OFFICIAL = {**LIFT, "heads": 2}
MODEL = ["--model", "test_vit.r160_in1k", "--weights", "random", "--size", "64", "--precision", "fp32"]


def make_net(settings: dict = LIFT, seed: int = 0) -> nn.Module:
    net = build_net(settings, seed).eval()
    generator = torch.Generator().manual_seed(seed + 100)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2.0, generator=generator)
            module.bias.data.normal_(0.0, 0.3, generator=generator)
            module.running_mean.normal_(0.0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net


def official_file(path: Path, seed: int = 0, settings: dict = LIFT) -> str:
    """A file as the authors' training writes it: a DataParallel state dict, no settings."""
    torch.save({f"module.{key}": value for key, value in make_net(settings, seed).state_dict().items()}, path)
    return str(path)


def lightning_file(path: Path) -> str:
    """One that holds objects beside its tensors."""
    torch.save({"state_dict": {}, "hyper_parameters": Folder(str(path))}, path)
    return str(path)


def trained_on(**changes: object) -> dict[str, object]:
    """What `tiny`'s backbone with `--facet key` is, in the terms of a checkpoint."""
    model = create_model("test_vit.r160_in1k", (64, 64), None, 0)
    facts = {"model": "test_vit.r160_in1k", "weights": weights_digest(state_arrays(model)), "layers": [5]}
    return {**facts, "facet": "key", "norm": False, **changes}


def checkpoint(url: Path | str, settings: dict = OFFICIAL, backbone: dict | None = None, seed: int = 0, **options) -> str:
    """A folder with config.json and model.safetensors."""
    folder = Folder(str(url), options)
    folder.write("model.safetensors", safetensors.torch.save(make_net(settings, seed).state_dict()))
    config = {"upsampler": settings, "backbone": backbone or trained_on()}
    folder.write("config.json", json.dumps(config).encode())
    return str(url)


@pytest.fixture
def keys(make_tars, tiny):
    """Configs of six images' keys, in two tasks."""
    return partial(tiny, make_tars(count=1, each=6), facet="key")


def arguments(data: tuple[str, ...], out: Path, *more: str) -> list[str]:
    return ["--data", *data, "--out", str(out), "--executor", "inline", "--facet", "key", *MODEL, *more]


def head_minor(maps: torch.Tensor, heads: int = 2) -> torch.Tensor:
    """Channel (head, dimension) to (dimension, head)."""
    return maps.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2)


def head_major(maps: torch.Tensor, heads: int = 2) -> torch.Tensor:
    return maps.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)


def read_maps(store: FeatureStore, level: str) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(store.read(np.arange(len(store)), level)))).float().permute(0, 3, 1, 2)


def images_of(store: FeatureStore) -> torch.Tensor:
    photos = np.stack(read_photos(store, np.arange(len(store))))
    return normalise(torch.from_numpy(photos), store.spec.mean, store.spec.std)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_official_file_gives_what_the_official_code_gives_on_head_minor_keys(keys, tmp_path):
    url = official_file(tmp_path / "lift.pth")

    extract(keys(levels=("x1", f"x2=lift:{url}", f"x4=lift:{url}"), encoding="float32"), InlineExecutor())

    store, net = FeatureStore.open(str(tmp_path / "out.zarr")), make_net()
    images, given = images_of(store), head_minor(read_maps(store, "x1"))
    with torch.inference_mode():
        once = net(images, given)
        twice = net(F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False), once)
    # Folded BatchNorms round otherwise; features are of order 1.
    torch.testing.assert_close(read_maps(store, "x2"), head_major(once), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read_maps(store, "x4"), head_major(twice), rtol=1e-4, atol=1e-4)
    assert (once - net(images, read_maps(store, "x1"))).abs().max() > 0.01


def test_56_pixels_at_patch_16_crop_the_borders_of_what_the_convolutions_see(keys, tmp_path):
    """The papers' smallest column: 3 x 3 cells, and the image branch is given the middle 52 x 52 pixels (specs A6)."""
    url = official_file(tmp_path / "lift.pth")
    levels = ("x1", f"x2=lift:{url}")

    extract(keys(size="56", ragged=True, levels=levels, encoding="float32"), InlineExecutor())

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    with torch.inference_mode():
        expected = make_net()(images_of(store)[..., 2:-2, 2:-2], head_minor(read_maps(store, "x1")))
    assert expected.shape[-2:] == (6, 6)
    torch.testing.assert_close(read_maps(store, "x2"), head_major(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(BackboneError, match="--ragged"):
        extract(keys(size="56", levels=levels, out=str(tmp_path / "refused.zarr")), InlineExecutor())


def test_official_file_for_tokens_keeps_their_channels(keys, tmp_path):
    url = official_file(tmp_path / "lift.pth")

    extract(keys(facet="token", levels=("x1", f"x2=lift:{url}"), encoding="float32"), InlineExecutor())

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    with torch.inference_mode():
        expected = make_net()(images_of(store), read_maps(store, "x1"))
    torch.testing.assert_close(read_maps(store, "x2"), expected, rtol=1e-4, atol=1e-4)


def test_folder_with_the_same_settings_gives_the_bytes_of_the_file(keys, tmp_path):
    file, folder = official_file(tmp_path / "lift.pth"), checkpoint(tmp_path / "lift")
    one = keys(levels=("x1", f"x2=lift:{file}"), out=str(tmp_path / "file.zarr"))
    other = keys(levels=("x1", f"x2=lift:{folder}"), out=str(tmp_path / "folder.zarr"))

    extract(one, InlineExecutor())
    extract(other, InlineExecutor())

    levels = [FeatureStore.open(config.out).level("x2") for config in (one, other)]
    assert levels[0] == levels[1]
    shard = "x2/features/c/0/0/0/0"
    assert Folder(one.out).read(shard) == Folder(other.out).read(shard)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "resize_conv", "channels": 64, "patch": 16, "kernel": 3},
        {"method": "jbu", "channels": 64, "patch": 16, "radius": 2, "stages": 2},
        {**LIFT, "image_branch": False},
    ],
)
def test_every_method_runs_from_a_folder(keys, tmp_path, settings):
    url = checkpoint(tmp_path / "ckpt", settings)

    extract(keys(levels=("x1", f"x4={settings['method']}:{url}"), encoding="float32"), InlineExecutor())

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    upsampler = learned_upsampler(settings, make_net(settings).state_dict())
    model = create_model("test_vit.r160_in1k", (64, 64), None, 0)
    images = images_of(store)
    with torch.inference_mode():
        expected = upsampler(images, TimmBackbone(model, facet="key")(images, (5,)), (5,), (16, 16))
    assert store.level("x4").method == settings["method"]
    torch.testing.assert_close(read_maps(store, "x4"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_taken(keys, tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in make_net().state_dict().items()}
    torch.save(state, tmp_path / "half.pth")

    extract(keys(levels=("x1", f"x2=lift:{tmp_path / 'half.pth'}")), InlineExecutor())

    assert torch.isfinite(read_maps(FeatureStore.open(str(tmp_path / "out.zarr")), "x2")).all()


def test_weights_saved_as_parameters_are_taken(keys, tmp_path):
    net = make_net()
    torch.save({**dict(net.named_buffers()), **dict(net.named_parameters())}, tmp_path / "parameters.pth")

    extract(keys(levels=("x1", f"x2=lift:{tmp_path / 'parameters.pth'}")), InlineExecutor())

    assert torch.isfinite(read_maps(FeatureStore.open(str(tmp_path / "out.zarr")), "x2")).all()


def test_overlapping_patches_are_upsampled(keys, tmp_path):
    url = official_file(tmp_path / "lift.pth")

    extract(keys(stride=8, levels=("x1", f"x2=lift:{url}")), InlineExecutor())

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    assert (store.level("x1").grid, store.level("x2").grid) == ((7, 7), (14, 14))
    assert store.level("x2").start == (6.0, 6.0)
    assert torch.isfinite(read_maps(store, "x2")).all()


def test_encodings_of_a_learned_level(keys, tmp_path):
    url = official_file(tmp_path / "lift.pth")
    levels = ("x1", f"x2=lift:{url}@float32", f"8x8=lift:{url}@int8")

    extract(keys(levels=levels, out=str(tmp_path / "a.zarr")), InlineExecutor())
    extract(keys(levels=("x1", f"x2=lift:{url}"), out=str(tmp_path / "b.zarr")), InlineExecutor())

    store = FeatureStore.open(str(tmp_path / "a.zarr"))
    exact, small = read_maps(store, "x2"), read_maps(store, "8x8")
    half = read_maps(FeatureStore.open(str(tmp_path / "b.zarr")), "x2")
    assert [level.dtype for level in store.spec.levels] == ["float16", "float32", "int8"]
    torch.testing.assert_close(half, exact.half().float(), rtol=0, atol=0)
    # int8 has a scale per channel and image: at most half a step of 1/127 of the channel's largest value.
    step = exact.abs().amax(dim=(2, 3), keepdim=True) / 127
    assert ((small - exact).abs() <= 0.51 * step + 1e-6).all()
    assert not torch.equal(small, exact)


# --- where checkpoints are --------------------------------------------------------------------------------------------


def test_checkpoint_and_store_on_s3_give_the_local_bytes(keys, tiny, tmp_path, s3_options):
    bucket, options = s3_options["bucket"], s3_options["options"]
    s3fs.S3FileSystem(**options).pipe_file(f"{bucket}/in/s-000.tar", (tmp_path / "in/s-000.tar").read_bytes())
    checkpoint(f"s3://{bucket}/ckpt/lift", **options)
    local = keys(levels=("x1", f"x2=lift:{checkpoint(tmp_path / 'lift')}"))
    remote = tiny(
        f"s3://{bucket}/in/s-000.tar",
        facet="key",
        out=f"s3://{bucket}/feats.zarr",
        levels=("x1", f"x2=lift:s3://{bucket}/ckpt/lift"),
        storage_options=json.dumps({"s3": options}),
    )

    extract(local, InlineExecutor())
    extract(remote, InlineExecutor())

    written = tree(Folder(remote.out, remote.options))
    a, b = ({n: d for n, d in files.items() if n != "zarr.json"} for files in (tree(Folder(local.out)), written))
    assert same_but_sources(a, b)
    runs = Folder(remote.out, remote.options)
    [run_id] = runs.folders("runs")
    saved = {name: runs.read(f"runs/{run_id}/{name}") for name in runs.sizes(f"runs/{run_id}")}
    assert f"x2=lift:s3://{bucket}/ckpt/lift".encode() in saved["run.json"]
    for data in (*written.values(), *saved.values()):
        assert b"test-secret-value" not in data
        assert b"test-access" not in data


@pytest.fixture
def guarded_server(tmp_path):
    """An HTTP server that gives `lift.pth` to user `reader` with password `hunter2hunter2`; yields host:port."""
    data = Path(official_file(tmp_path / "served.pth")).read_bytes()
    accepted = "Basic " + base64.b64encode(b"reader:hunter2hunter2").decode()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            code = 401 if self.headers.get("Authorization") != accepted else 200 if "lift.pth" in self.path else 404
            self.send_response(code)
            body = data if code == 200 else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_credentials_in_a_levels_url_are_used_and_shown_nowhere(keys, tmp_path, guarded_server, capfd, caplog):
    url = f"http://reader:hunter2hunter2@{guarded_server}/lift.pth"
    config = keys(levels=("x1", f"x2=lift:{url}"))

    assert run(arguments(config.data, tmp_path / "out.zarr", "--levels", *config.features.levels)) == 0
    missing = url.replace("lift.pth", "other.pth")
    assert run(arguments(config.data, tmp_path / "b.zarr", "--levels", "x1", f"x2=lift:{missing}")) == 2
    assert run(arguments(config.data, tmp_path / "b.zarr", "--levels", "x1", f"x2=bilinear:{url}")) == 2
    assert run(arguments(config.data, tmp_path / "b.zarr", "--levels", "x1", f"xx=lift:{url}")) == 2
    assert run(arguments(config.data, tmp_path / "b.zarr", "--levels", "x1", f"x2=lift:{url}@int9")) == 2

    files = [path for path in (tmp_path / "out.zarr").rglob("*") if path.is_file()]
    displayed = "".join(capfd.readouterr()) + caplog.text
    saved = json.loads(next(path for path in files if path.name == "run.json").read_text())["config"]["levels"]
    assert saved == ["x1", f"x2=lift:http://***@{guarded_server}/lift.pth"]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    assert f"no weights at http://***@{guarded_server}/other.pth" in displayed
    assert "hunter2" not in displayed


def test_signed_url_of_a_file_is_read_as_a_file(keys, tmp_path, s3_options):
    fs = s3fs.S3FileSystem(**s3_options["options"])
    fs.pipe_file(f"{s3_options['bucket']}/lift.pth", Path(official_file(tmp_path / "lift.pth")).read_bytes())
    url = fs.sign(f"{s3_options['bucket']}/lift.pth")
    config = keys(levels=("x1", f"x2=lift:{url}"))

    extract(config, InlineExecutor())

    assert "***" in json.dumps(config.public()["levels"])
    assert not [p for p in Path(config.out).rglob("*.json") if url.rpartition("Signature=")[2].split("&")[0] in p.read_text()]


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_digest_covers_weights_and_settings_and_is_part_of_the_fingerprint(keys, tmp_path):
    first = keys(levels=("x1", f"x2=lift:{checkpoint(tmp_path / 'a')}"))
    extract(first, InlineExecutor())
    stored = FeatureStore.open(first.out).level("x2")
    assert len(stored.digest) == 64
    assert Path(first.out, "zarr.json").read_text().count(stored.digest) == 1

    with pytest.raises(FingerprintMismatch, match=r"x2\.digest"):
        extract(keys(levels=("x1", f"x2=lift:{checkpoint(tmp_path / 'b', seed=1)}")), InlineExecutor())
    with pytest.raises(FingerprintMismatch, match=r"x2\.digest"):
        extract(keys(levels=("x1", f"x2=lift:{checkpoint(tmp_path / 'c', LIFT)}")), InlineExecutor())

    spelled_out = checkpoint(tmp_path / "d", {**OFFICIAL, "wide": False, "image_branch": True})
    again = extract(keys(levels=("x1", f"x2=lift:{spelled_out}")), InlineExecutor())
    assert (again.ok, again.this_run) == (6, 0)


def test_interrupted_run_continues_with_the_same_bytes(keys, tmp_path):
    url = official_file(tmp_path / "lift.pth")
    config = keys(levels=("x1", f"x2=lift:{url}"))
    whole = keys(levels=config.features.levels, out=str(tmp_path / "whole.zarr"))
    extract(whole, InlineExecutor())
    with dying_at_task(1):
        extract(config, InlineExecutor())

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.this_run) == (6, 2)
    assert tree(Folder(config.out)) == tree(Folder(whole.out))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "other", "here"),
    [
        ("model", "vit_small_patch16_224.dino", "test_vit.r160_in1k"),
        ("weights", "0" * 64, "sha256 of the weights"),
        ("layers", [2], [5]),
        ("facet", "token", "key"),
        ("norm", True, False),
        ("stride", 8, 16),
        ("pos_embed", "dino", "timm"),
        ("model_args", {"num_heads": 4}, {}),
        ("mean", [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        ("std", [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]),
    ],
)
def test_checkpoint_of_another_backbone_is_refused_unless_forced(keys, tmp_path, capfd, caplog, field, other, here):
    url, data = checkpoint(tmp_path / "ckpt", backbone=trained_on(**{field: other})), keys().data
    here = trained_on()["weights"] if field == "weights" else here
    other, here = (f"'{each[:12]}…'" if field == "weights" else repr(each) for each in (other, here))
    args = arguments(data, tmp_path / "out.zarr", "--levels", "x1", f"x2=lift:{url}")

    assert run(args) == 2

    message = capfd.readouterr().err
    assert "UpsamplerError" in message
    assert "--force-upsampler" in message
    [line] = [line for line in message.splitlines() if line.startswith("  ")]
    assert line.split() == f"{field} trained on {other}   used with {here}".split()
    assert not (tmp_path / "out.zarr").exists()
    with caplog.at_level(logging.WARNING):
        assert run([*args, "--force-upsampler"]) == 0
    assert f"trained on {other}   used with {here}" in caplog.text
    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    assert len(store) == 6
    # Whoever reads the features is told, too.
    [note] = store.root.notes
    assert note == f"x2: its upsampler was trained on other features (--force-upsampler): {field} then {other}, here {here}"


def test_what_an_older_checkpoint_does_not_say_is_said(keys, tmp_path, caplog):
    url = checkpoint(tmp_path / "ckpt", backbone=trained_on(stride=16, mean=[0.5, 0.5, 0.5]))

    with caplog.at_level(logging.WARNING):
        assert run(arguments(keys().data, tmp_path / "out.zarr", "--levels", "x1", f"x2=lift:{url}")) == 0

    assert f"{url} doesn't say pos_embed, std of what it was trained on" in caplog.text


@pytest.mark.parametrize(
    ("size", "used", "known"),
    [
        (128, 64, True),  # its halves are what is enlarged
        (64, 64, True),
        (256, 64, True),
        (128, 96, False),
        (32, 64, False),
        (128, 192, False),
        (None, 96, True),  # nothing is said
    ],
)
def test_a_size_that_the_upsampler_was_not_trained_on_is_said_everywhere(keys, tmp_path, capsys, caplog, size, used, known):
    url = checkpoint(tmp_path / "ckpt", backbone=trained_on(**({} if size is None else {"size": size})))
    args = [*arguments(keys().data, tmp_path / "out.zarr", "--levels", "x1", f"x2=lift:{url}"), "--size", str(used)]
    here = f"here it is given {used} x {used} px ({used // 16} x {used // 16} cells)"

    with caplog.at_level(logging.WARNING):
        assert run([*args, "--plan"]) == run(args) == 0

    plan = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    notes = FeatureStore.open(str(tmp_path / "out.zarr")).attributes.get("notes", [])
    assert show(["status", str(tmp_path / "out.zarr")]) == 0
    status = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(plan) == len(notes) == len(status) == (not known)
    if known:
        assert "was trained on images of" not in caplog.text
    else:
        trained = f"x2: its upsampler was trained on images of {size} x {size} px ({size // 16} x {size // 16} cells)"
        assert all(trained in text and here in text for text in (*plan, *notes, *status, caplog.text))


def test_an_evaluation_says_it_of_each_size_live_and_from_a_store(tiny, tmp_path):
    write_demo(tmp_path / "sets")
    url = checkpoint(tmp_path / "ckpt", backbone=trained_on(size=64))
    settings = {"data": str(tmp_path / "sets/SPair-71k"), "limit": 1, "pictures": 0, "executor": "inline"}
    model = {"model": "test_vit.r160_in1k", "weights": "random", "precision": "fp32", "facet": "key"}
    live = CorrespondenceConfig.of(
        **settings, **model, sizes=(32, 64, 96), levels=("x1", f"x2=lift:{url}"), out=str(tmp_path / "live")
    )
    images = tiny(f"{settings['data']}/JPEGImages", size="96", geometry="pad", facet="key", levels=live.features.levels)
    extract(images, InlineExecutor())
    assert len(FeatureStore.open(images.out).attributes["notes"]) == 1
    stored = CorrespondenceConfig.of(**settings, stores=(images.out,), sizes=(96,), out=str(tmp_path / "stored"))

    for config in (live, stored):
        evaluate("correspondence", correspondence, config)
        choices = json.loads((Path(config.out) / "results.json").read_text())["choices"]
        assert "here it is given 96 x 96 px (6 x 6 cells)" in choices["upsamplers"]
        assert "given 64 x 64" not in choices["upsamplers"]
        assert "given 32 x 32" not in choices["upsamplers"]


@pytest.mark.parametrize("kind", ["forced", "unsaid"])
def test_an_evaluation_says_what_upsamplers_were_not_trained_on_live_and_from_a_store(tiny, tmp_path, kind):
    write_demo(tmp_path / "sets")
    if kind == "forced":
        url, text = checkpoint(tmp_path / "ckpt", backbone=trained_on(facet="token")), "facet then 'token', here 'key'"
    else:
        url, text = official_file(tmp_path / "lift.pth"), "file doesn't say what it was trained on; taken to be these features"
    levels, force = ("x1", f"x2=lift:{url}"), {"force_upsampler": kind == "forced"}
    settings = {"data": str(tmp_path / "sets/SPair-71k"), "limit": 1, "pictures": 0, "executor": "inline", "sizes": (64,)}
    model = {"model": "test_vit.r160_in1k", "weights": "random", "precision": "fp32", "facet": "key", **force}
    live = CorrespondenceConfig.of(**settings, **model, levels=levels, out=str(tmp_path / "live"))
    images = tiny(f"{settings['data']}/JPEGImages", geometry="pad", facet="key", levels=levels, **force)
    extract(images, InlineExecutor())
    stored = CorrespondenceConfig.of(**settings, stores=(images.out,), out=str(tmp_path / "stored"))

    for config in (live, stored):
        evaluate("correspondence", correspondence, config)
        said = json.loads((Path(config.out) / "results.json").read_text())["choices"]["upsamplers"]
        assert said.startswith("x2: its upsampler")
        assert text in said


def test_an_evaluation_says_which_step_of_a_training_run_a_level_is_of(tmp_path):
    write_demo(tmp_path / "sets")
    best = checkpoint(tmp_path / "run/steps/00000004", backbone=trained_on())
    pointers = {"last": "steps/00000009", "best": "steps/00000004", "best_loss": 0.5}
    (tmp_path / "run/checkpoints.json").write_text(json.dumps(pointers))
    settings = {"data": str(tmp_path / "sets/SPair-71k"), "limit": 1, "pictures": 0, "executor": "inline", "sizes": (64,)}
    settings |= {"model": "test_vit.r160_in1k", "weights": "random", "precision": "fp32", "facet": "key"}

    for url, said in (
        (str(tmp_path / "run"), "x2: step 4, the best by its held-out loss of a run that is at step 9"),
        (best, None),
    ):
        config = CorrespondenceConfig.of(**settings, levels=("x1", f"x2=lift:{url}"), out=str(tmp_path / f"out-{bool(said)}"))
        evaluate("correspondence", correspondence, config)
        assert json.loads((Path(config.out) / "results.json").read_text())["choices"].get("checkpoints") == said


def test_all_differences_are_named_at_once(keys, tmp_path, capfd):
    url = checkpoint(tmp_path / "ckpt", backbone=trained_on(facet="query", layers=[3]))

    assert run(arguments(keys().data, tmp_path / "out.zarr", "--levels", "x1", f"x2=lift:{url}")) == 2

    assert [line.split()[0] for line in capfd.readouterr().err.splitlines() if line.startswith("  ")] == ["layers", "facet"]


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:3000])
    return path


def with_config(folder: Path, config: object) -> str:
    """A checkpoint whose config.json holds `config`, bytes as they are; None: no such file."""
    checkpoint(folder)
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    return str(folder)


def with_settings(folder: Path, settings: dict) -> str:
    return with_config(folder, {"upsampler": settings, "backbone": trained_on()})


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "file": official_file,
    "folder": checkpoint,
    "cut.pth": lambda path: cut(Path(official_file(path))),
    "cut_folder": lambda path: cut(Path(checkpoint(path)) / "model.safetensors").parent,
    "rc_file": lambda path: official_file(path, settings={**LIFT, "method": "resize_conv"}),
    "no_config": lambda path: with_config(path, None),
    "not_json": lambda path: with_config(path, b'{"upsampler": '),
    "not_text": lambda path: with_config(path, b"\xff\xfe\x00\xd8 no text"),
    "a_list": lambda path: with_config(path, [1, 2]),
    "no_backbone": lambda path: with_config(path, {"upsampler": LIFT}),
    "list_backbone": lambda path: with_config(path, {"upsampler": LIFT, "backbone": [1]}),
    "number": lambda path: with_config(path, {"upsampler": 3, "backbone": trained_on()}),
    "no_method": lambda path: with_settings(path, {"channels": 64, "patch": 16}),
    "no_channels": lambda path: with_settings(path, {"method": "lift", "patch": 16}),
    "unknown_setting": lambda path: with_settings(path, {**LIFT, "colour": 1}),
    "text_channels": lambda path: with_settings(path, {**LIFT, "channels": "64"}),
    "wide": lambda path: with_settings(path, {**LIFT, "wide": True}),
    "foreign_file": lambda path: official_file(path, settings={**LIFT, "channels": 32}),
    "foreign_folder": lambda path: checkpoint(path, {**LIFT, "channels": 32}),
    "lightning_file": lightning_file,
    "jbu": lambda path: checkpoint(path, {"method": "jbu", "channels": 64, "patch": 16, "radius": 9}),
}


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("x2=lift:{nowhere.pth}", "WeightsUnavailable: no weights at .*nowhere.pth"),
        ("x2=lift:{nowhere}", "WeightsUnavailable: no weights at .*nowhere"),
        ("x2=lift:{cut.pth}", "WeightsUnavailable: .*cut.pth can't be read as plain tensors"),
        ("x2=featup:{lightning_file}", r"WeightsUnavailable: .*can't be read as plain tensors.*\['state_dict'\], 'weights.saf"),
        ("x2=featup:{file}", "UpsamplerError: .*looks like a file of lift, not of featup"),
        ("x2=lift:{cut_folder}", "WeightsUnavailable: .*cut_folder is no whole safetensors file"),
        ("x2=resize_conv:{folder}", "UpsamplerError: .*folder holds a lift, not a resize_conv"),
        ("x2=resize_conv:{file}", "UpsamplerError: .*looks like a file of lift, not of resize_conv"),
        ("x2=lift:{rc_file}", "UpsamplerError: .*weights without settings.*config.json and model.safetensors"),
        ("x2=lift:{no_config}", "WeightsUnavailable: .*no_config has weights but no config.json"),
        ("x2=lift:{not_json}", "WeightsUnavailable: .*not_json is no trained upsampler"),
        ("x2=lift:{not_text}", "WeightsUnavailable: .*not_text is no trained upsampler"),
        ("x2=lift:{a_list}", "WeightsUnavailable: .*a_list is no trained upsampler"),
        ("x2=lift:{no_backbone}", "WeightsUnavailable: .*no_backbone is no trained upsampler"),
        ("x2=lift:{list_backbone}", "WeightsUnavailable: .*list_backbone is no trained upsampler"),
        ("x2=lift:{number}", "WeightsUnavailable: .*number is no trained upsampler"),
        ("x2=lift:{no_method}", "(WeightsUnavailable|UpsamplerError): .*method"),
        ("x2=lift:{no_channels}", "UpsamplerError: .*the upsampler's settings lack channels"),
        ("x2=lift:{unknown_setting}", "UpsamplerError: .*no such upsampler settings: colour"),
        ("x2=lift:{text_channels}", "UpsamplerError: .*channels must be a whole number"),
        ("x2=lift:{wide}", "UpsamplerError: .*the weights don't fit the upsampler's settings"),
        ("x2=lift:{foreign_file}", "(Upsampler|Config)Error: .*(made for maps of 32 channels|32 channels.* 64)"),
        ("x2=lift:{foreign_folder}", "(Upsampler|Config)Error: .*(made for maps of 32 channels|32 channels.* 64)"),
        ("x3=lift:{file}", "UpsamplerError: lift gives 2, 4, 8, ... times the backbone's 4x4 cells, not 12x12"),
        ("same:x1=lift:{file}", "UpsamplerError: lift gives 2, 4, 8, ... times the backbone's 4x4 cells, not 4x4"),
        ("x1=lift:{file}", "ConfigError: --levels x1 x1: x1 and x1 have one name; give one of them a name of its own"),
        ("8x16=lift:{file}", "UpsamplerError: lift gives 2, 4, 8, ... times the backbone's 4x4 cells, not 8x16"),
        ("x4=jbu:{jbu}", "UpsamplerError: jbu of radius 9 needs more cells than 4x4"),
        ("pooled=lift:{file}", "ConfigError: --levels pooled=lift: use mean, or cls"),
        ("x2=lift", "ConfigError: --levels x2=lift: .*take the URL of a checkpoint"),
        ("x2=lift:", "ConfigError: --levels x2=lift:: .*take the URL of a checkpoint"),
        ("x2=bilinear:{file}", "ConfigError: --levels x2=bilinear:.*others take none"),
        ("x2=lfit:{file}", "ConfigError: --levels x2=lfit:.*lift, resize_conv, jbu"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(keys, tmp_path, capfd, level, message):
    data, name = keys().data, level.partition("{")[2].rstrip("}")
    made = CHECKPOINTS[name](tmp_path / (f"{name}.pth" if "file" in name else name)) if name in CHECKPOINTS else ""
    text = level.replace(f"{{{name}}}", str(made or tmp_path / name))

    code = run(arguments(data, tmp_path / "out.zarr", "--levels", "x1", text))

    displayed = capfd.readouterr().err
    assert code == 2
    assert "Traceback" not in displayed
    assert re.search(message, displayed), displayed
    assert not (tmp_path / "out.zarr").exists()


def test_file_for_one_layer_is_refused_for_two_stacked_ones(keys, tmp_path, capfd):
    url = official_file(tmp_path / "lift.pth")
    args = arguments(keys().data, tmp_path / "out.zarr", "--layers", "2", "5", "--levels", "x1", f"x2=lift:{url}")

    assert run(args) == 2

    displayed = capfd.readouterr().err
    assert "64 channels" in displayed
    assert "128" in displayed
    assert not (tmp_path / "out.zarr").exists()


def test_stacked_layers_take_a_checkpoint_made_for_them(keys, tmp_path):
    settings = {**LIFT, "channels": 128}
    url = checkpoint(tmp_path / "ckpt", settings, trained_on(layers=[2, 5]))

    extract(keys(layers=(2, 5), levels=("x1", f"x2=lift:{url}"), encoding="float32"), InlineExecutor())

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    with torch.inference_mode():
        expected = make_net(settings)(images_of(store), read_maps(store, "x1"))
    torch.testing.assert_close(read_maps(store, "x2"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "url", "dtype"),
    [
        ("x2=lift:/data/lift.pth", "/data/lift.pth", "float16"),
        ("x2=lift:/data/lift.pth@int8", "/data/lift.pth", "int8"),
        ("x2=lift:s3://key:pw@bucket/lift", "s3://key:pw@bucket/lift", "float16"),
        ("x2=lift:s3://key:pw@bucket/lift@float32", "s3://key:pw@bucket/lift", "float32"),
        ("x2=lift:https://host:8000/a=b/lift.pth?x=1", "https://host:8000/a=b/lift.pth?x=1", "float16"),
        ("x2=lift:lift@v2/lift.pth", "lift@v2/lift.pth", "float16"),
    ],
)
def test_url_of_a_level_is_taken_whole(text, url, dtype):
    choice = LevelChoice.parse(text, "float16")

    assert (choice.name, choice.method, choice.url, choice.dtype) == ("x2", "lift", url, dtype)


def test_level_error_shows_no_password():
    with pytest.raises(ConfigError) as caught:
        LevelChoice.parse("up=lift:s3://me:hunter2@bucket/lift", "float16")

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "asked", "usual"),
    [("anyup", {"natten": True}, {"natten": False}), ("naf", {"kernel_size": 3}, {"kernel_size": 9})],
)
def test_an_official_file_in_a_folder_may_be_given_other_settings(tmp_path, method, asked, usual):
    bundle, model = described((64, 64))
    backbone = model.backbone
    _, state = find_method(method).untrained(backbone, backbone.channels, 64, bundle.reload)
    folder, file = tmp_path / "folder", tmp_path / "official.pth"
    folder.mkdir()
    torch.save(state, file)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"upsampler": {"method": method, **asked}}))

    plain = load_upsampler(method, str(file), backbone, bundle.spec)
    found = load_upsampler(method, str(folder), backbone, bundle.spec)

    assert {name: plain.settings[name] for name in usual} == usual
    assert found.settings == {**plain.settings, **asked}
    assert found.digest != plain.digest
    assert found.remark == plain.remark
    (folder / "config.json").write_text(json.dumps({"upsampler": {"method": "jafar"}}))
    with pytest.raises(UpsamplerError, match="this looks like a file of .*, not of jafar"):
        load_upsampler("jafar", str(folder), backbone, bundle.spec)


# --- plan and show ----------------------------------------------------------------------------------------------------


def test_plan_counts_the_memory_of_a_learned_level(keys, tmp_path, capsys):
    url, data = official_file(tmp_path / "lift.pth"), keys().data

    def plan(*levels: str) -> dict:
        out = tmp_path / f"{len(levels)}.zarr"
        assert run(arguments(data, out, "--levels", *levels, "--plan", "--json", "--batch", "4", "--block-rows", "4")) == 0
        assert not list(out.glob("x*"))
        return json.loads(capsys.readouterr().out)

    with_lift, without = plan("x1", f"x4=lift:{url}"), plan("x1")

    upsampler = learned_upsampler(OFFICIAL, make_net().state_dict())
    rows = 4 * 16 * 16 * 64 * 2  # stay on the device until they are copied, while the next batch's are made
    assert with_lift["device_bytes"] - without["device_bytes"] == upsampler.peak_bytes(4, 64, (16, 16)) + 2 * rows
    assert [(level["images_at_once"], level["parts"]) for level in with_lift["levels"]] == [(0, 0), (4, 1)]
    assert [level["device_bytes"] for level in with_lift["levels"]] == [0, upsampler.peak_bytes(4, 64, (16, 16))]
    run(arguments(data, tmp_path / "said.zarr", "--levels", f"x4=lift:{url}", "--plan", "--batch", "4", "--block-rows", "4"))
    assert re.search(
        r"made by lift +[\d.]+ MB of the cpu's memory for 4 images: all at once, each grid whole\n", capsys.readouterr().out
    )
    weights = sum(value.nbytes for value in make_net().state_dict().values())
    block = 2 * 4 * 16 * 16 * 64 * 2
    assert with_lift["host_bytes"] - without["host_bytes"] == pytest.approx(block + weights, rel=0.05)
    assert [one["level"]["method"] for one in with_lift["levels"]] == ["backbone", "lift"]
    assert with_lift["stage_seconds"]["upsample"] > 0


def test_plan_says_what_little_memory_makes_of_a_batch_and_of_a_grid(keys, tmp_path, capsys, monkeypatch):
    url, data = official_file(tmp_path / "lift.pth"), keys().data
    level = ["--levels", f"x4=lift:{url}", "--plan", "--block-rows", "4"]
    monkeypatch.setattr("pipelines.features.model.free_bytes", lambda *_: 0)
    monkeypatch.setattr(type(learned_upsampler(OFFICIAL, make_net().state_dict())), "parts", lambda *_: (1, 1234))

    assert (
        run(arguments(data, tmp_path / "a.zarr", *level))
        == run(arguments(data, tmp_path / "a.zarr", *level, "--batch", "4"))
        == 0
    )

    halved, given = (text.splitlines() for text in capsys.readouterr().out.split("drop --plan to start\n")[:2])
    assert any(line.endswith("for 1 images: all at once, each grid in 1,234 parts") for line in halved)
    assert any("for batches of 1, not of 4: too little is free" in line for line in halved)
    assert any(line.endswith("for 4 images: 1 at a time, each grid in 1,234 parts") for line in given)
    assert not any("too little is free" in line for line in given)


def test_store_with_a_learned_level_is_shown_beside_the_bilinear_map(keys, tmp_path, capsys):
    url = official_file(tmp_path / "lift.pth")
    config = keys(levels=("x1", f"x2=lift:{url}", "8x8=bilinear", "pooled"), encoding="float32")
    extract(config, InlineExecutor())

    assert show(["rows", config.out]) == 0
    assert show(["view", config.out, "--out", str(tmp_path / "view.png"), "--count", "2"]) == 0
    assert show(["similar", config.out, "--key", "00000", "--out", str(tmp_path / "similar.png")]) == 0
    assert show(["report", config.out, "--out", str(tmp_path / "report.html"), "--count", "2"]) == 0

    printed = capsys.readouterr().out
    assert "lift" in printed
    assert {"view.png", "similar.png", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    store = FeatureStore.open(config.out)
    images = images_of(store)
    model = create_model("test_vit.r160_in1k", (64, 64), None, 0)
    with torch.inference_mode():
        features = TimmBackbone(model, facet="key")(images, (5,))
        bilinear = create_upsampler("bilinear")(images, features, (5,), (8, 8))
    torch.testing.assert_close(read_maps(store, "8x8"), bilinear, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(read_maps(store, "x2"), bilinear, atol=0.1)


def test_similar_panel_names_every_level_and_adds_the_bilinear_map(keys, tmp_path):
    from pipelines.showing.choice import columns_of
    from pipelines.showing.views import similar_panel

    url = official_file(tmp_path / "lift.pth")
    config = keys(levels=("x1", f"x2=lift:{url}"))
    extract(config, InlineExecutor())

    panel = similar_panel(columns_of([FeatureStore.open(config.out)], [np.array([0, 1])]), None)

    titles = " ".join(panel.columns)
    assert "x2" in titles
    assert "lift" in titles
    assert "bilinear" in titles


def test_nothing_is_unpickled_from_a_checkpoint(keys, tmp_path, capfd):
    buffer = io.BytesIO()
    torch.save({"state_dict": {"outc.weight": torch.zeros(1)}, "args": Path("/tmp")}, buffer)
    (tmp_path / "evil.pth").write_bytes(buffer.getvalue())

    code = run(arguments(keys().data, tmp_path / "out.zarr", "--levels", "x1", f"x2=lift:{tmp_path / 'evil.pth'}"))

    assert code == 2
    assert "plain tensors (weights_only)" in capfd.readouterr().err
