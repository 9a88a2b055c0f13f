"""What weights say of themselves: features equal those of timm's own loading of the folder, or the folder is refused."""

import json
import logging
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from jobs.extract import run
from operators.backbone import BackboneError
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.executors import InlineExecutor
from pipelines.features.bundle import load_bundle
from pipelines.features.config import FeatureConfig
from pipelines.features.sources import resolve_source
from pipelines.features.weights import WeightsChoice, WeightsUnavailable, load_model, read_description
from pipelines.training.lift import X2Config
from storage.paths import Folder
from storage.runs import read_run
from storage.spec import FeatureSpec
from storage.store import FeatureStore
from tests.conftest import write_tar

TINY = "test_vit.r160_in1k"
INPUT = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.5), "interpolation": "bilinear"}


def save(folder: Path, architecture: str = "test_vit", data_config: dict | None = None, **network: object) -> Path:
    """A folder as timm writes it, with weights that differ from their initial values everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = timm.create_model(architecture, num_classes=5, **network)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_for_hf(model, str(folder), safe_serialization=True, data_config=data_config)
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    return folder


def change(folder: Path, name: str = "config.json", **values: object) -> Path:
    """Top-level entries of a JSON file replaced; the file made where there is none."""
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))
    return folder


def change_input(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    return change(folder, pretrained_cfg={**config, **values})


def timms_own(folder: Path, pixels_HW3: np.ndarray) -> torch.Tensor:
    """Final patch tokens [N, C] of timm's own loading and preprocessing, the whole image in view."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**{**resolve_data_config(model=model), "crop_pct": 1.0})
    with torch.inference_mode():
        return model.forward_features(transform(Image.fromarray(pixels_HW3))[None])[0, model.num_prefix_tokens :]


def pixels(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def described(weights: Path | str, model: str = TINY, **settings: object):
    return load_bundle(FeatureConfig(model=model, weights=str(weights), precision="fp32", levels=("x1@float32",), **settings))


NETWORKS = {
    "statistics": ({"data_config": INPUT}, {}),
    "tokens": ({"class_token": False, "reg_tokens": 2, "global_pool": "avg", "init_values": 0.1}, None),
    "invisible in the weights": ({"num_heads": 4, "act_layer": "relu"}, {"num_heads": 4, "act_layer": "relu"}),
    "embeddings": ({"reg_tokens": 1, "no_embed_class": True, "dynamic_img_size": True}, None),
    "rectangular": (
        {"img_size": (64, 96), "patch_size": 8, "data_config": {"input_size": (3, 64, 96)}},
        {"img_size": [64, 96], "patch_size": 8},
    ),
    "fixed size": ({"architecture": "vit_tiny_patch16_224", "img_size": 96, "depth": 2}, {"img_size": [96, 96], "depth": 2}),
    "rotary": ({"architecture": "vit_small_patch16_dinov3", "img_size": 64, "depth": 1}, {"img_size": [64, 64], "depth": 1}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_features_are_those_of_timms_own_loading(tmp_path, kind):
    made, args = NETWORKS[kind]
    architecture = made.get("architecture", "test_vit")

    bundle, model = described(save(tmp_path / "w", **made), architecture)

    image = pixels(*bundle.spec.input_size)
    expected = timms_own(tmp_path / "w", image)
    for each in (model, bundle.build("cpu")):  # here, and as workers build it
        found = each(image[None]).levels["x1"][0].flatten(0, 1)
        assert found.shape == expected.shape
        assert F.cosine_similarity(found, expected, dim=-1).min() > 1 - 1e-5
    if args is not None:
        assert bundle.spec.model_args == args
    assert FeatureSpec.from_json(bundle.spec.to_json()) == bundle.spec


def test_an_extraction_uses_the_folders_statistics_and_says_them(tmp_path, capsys):
    folder = save(tmp_path / "w", data_config={**INPUT, "input_size": (3, 96, 96)}, num_heads=4)
    image = pixels(150, 96)
    Image.fromarray(image).save(tmp_path / "a.png")
    write_tar(tmp_path / "in.tar", [("a.png", (tmp_path / "a.png").read_bytes())])
    args = ["--data", str(tmp_path / "in.tar"), "--out", str(tmp_path / "f.zarr"), "--model", TINY, "--weights",
            str(folder), "--levels", "x1@float32", "--precision", "fp32", "--executor", "inline"]  # fmt: skip

    assert run([*args, "--plan"]) == 0
    assert "mean 0.1 0.2 0.3, std 0.3 0.2 0.5, bilinear, num_heads 4" in capsys.readouterr().out
    assert run(args) == 0

    store = FeatureStore.open(str(tmp_path / "f.zarr"))
    spec = store.spec
    assert (spec.mean, spec.std, spec.interpolation, spec.input_size) == (
        *(INPUT[n] for n in ("mean", "std", "interpolation")),
        (96, 96),
    )
    found, expected = torch.from_numpy(store.read("a", "x1").reshape(-1, 64)), timms_own(folder, image)
    assert F.cosine_similarity(found, expected, dim=-1).min() > 1 - 1e-5
    change_input(folder, mean=[0.5, 0.5, 0.5])
    assert run(args) == 2  # other features than those in the store


def test_the_folder_may_be_anywhere_and_its_weights_called_as_timm_calls_them(tmp_path):
    folder, fs = save(tmp_path / "w", data_config=INPUT), fsspec.filesystem("memory")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    fs.pipe_file("/described/pytorch_model.bin", (tmp_path / "pytorch_model.bin").read_bytes())
    fs.pipe_file("/described/config.json", (folder / "config.json").read_bytes())

    there, here = described("memory://described")[0], described(folder)[0]

    assert there.spec == here.spec
    assert there.spec.mean == INPUT["mean"]
    fs.rm("/described", recursive=True)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")

    with pytest.raises(WeightsUnavailable, match=r"holds model-00001-of-00002.safetensors, .*join them"):
        load_model(TINY, (64, 64), WeightsChoice.parse(str(tmp_path)), None, None)


def test_older_layouts_and_other_tags_are_read(tmp_path):
    folder = save(tmp_path / "w", data_config=INPUT)
    config = json.loads((folder / "config.json").read_text())
    flat = {"architecture": "test_vit.another_tag", "mean": [0.2, 0.2, 0.2], "input_size": [3, 64, 64]}
    (folder / "config.json").write_text(json.dumps(flat))

    expects = described(folder)[0].spec

    assert config["architecture"] == "test_vit"
    assert (expects.mean, expects.input_size) == ((0.2, 0.2, 0.2), (64, 64))
    assert expects.std == (0.229, 0.224, 0.225)  # timm's, for what such a file leaves out


# --- what is refused --------------------------------------------------------------------------------------------------

FOREIGN = {
    "damaged": ("{", "is damaged"),
    "bytes": ("\x00\x01", "is damaged"),
    "deep": ("[" * 100_000, "is damaged"),
    "list": ("[]", "isn't timm's: it holds a list"),
    "transformers": ('{"model_type": "vit", "hidden_size": 768}', r"transformers model \(model_type 'vit'\)"),
    "nameless": ('{"mean": [0, 0, 0]}', "names no architecture"),
    "upsampler": ('{"upsampler": {}, "backbone": {}}', "of a trained upsampler"),
    "odd": ('{"architecture": "test_vit", "pretrained_cfg": []}', "must be objects"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_config_that_is_not_timms_is_refused_and_beside_a_file_said(tmp_path, caplog, kind):
    folder, (text, message) = save(tmp_path / "w"), FOREIGN[kind]
    (folder / "config.json").write_text(text)

    with pytest.raises(BackboneError, match=rf"{folder}/config.json .*{message}.*give --weights the file"):
        read_description(TINY, WeightsChoice.parse(str(folder)), None)
    with caplog.at_level(logging.WARNING):
        found = read_description(TINY, WeightsChoice.parse(f"{folder}/model.safetensors"), None)
    assert f"the input is {TINY}'s own" in caplog.text
    assert (found.expects.mean, found.source) == ((0.5, 0.5, 0.5), "")


IMPOSSIBLE = {
    "architecture": (lambda f: change(f, architecture="test_vit2"), "of test_vit2; --model is test_vit"),
    "channels": (lambda f: change(f, model_args={"in_chans": 1}), "takes 1 channels"),
    "grey": (lambda f: change_input(f, input_size=[1, 64, 64]), r"input_size \[1, 64, 64\]"),
    "mean": (lambda f: change_input(f, mean=[0.5]), r"mean \[0.5\]"),
    "words": (lambda f: change_input(f, mean="abc"), "mean 'abc'"),
    "std": (lambda f: change_input(f, std=[0.5, 0.5, 0]), r"std \[0.5, 0.5, 0\]"),
    "interpolation": (lambda f: change_input(f, interpolation="hamming"), "interpolation 'hamming'"),
    "random": (lambda f: change_input(f, interpolation=["bicubic"]), r"interpolation \['bicubic'\]"),
    "files": (lambda f: change(f, model_args={"checkpoint_path": "/etc/x"}), "checkpoint_path can't be honoured"),
    "wrapper": (lambda f: change(f, model_args={"features_only": True}), "features_only can't be honoured"),
    "size": (lambda f: change(f, model_args={"img_size": "big"}), "img_size 'big'"),
    "unknown": (lambda f: change(f, model_args={"no_such_thing": 1}), "no_such_thing"),
    "others": (lambda f: change(f, model_args={"reg_tokens": 3}), "the weights don't fit"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_cannot_be_honoured_is_refused_also_beside_a_file(tmp_path, kind):
    spoil, message = IMPOSSIBLE[kind]
    folder = spoil(save(tmp_path / "w"))

    for weights in (folder, folder / "model.safetensors"):
        with pytest.raises(BackboneError, match=message):
            described(weights)


def test_a_file_takes_the_config_beside_it(tmp_path):
    save(tmp_path / "w", data_config=INPUT)
    (tmp_path / "w/model.safetensors").rename(tmp_path / "w/mine.safetensors")

    assert described(tmp_path / "w/mine.safetensors")[0].spec.mean == INPUT["mean"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
        ("preprocessor_config.json", {"do_normalize": False}),
        ("open_clip_config.json", {"preprocess_cfg": {"std": [0.9, 0.9, 0.9]}}),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_files_that_contradict_the_statistics_are_refused(tmp_path, caplog, name, content, has_config):
    folder = change(save(tmp_path / "w"), name, **content)
    if not has_config:
        (folder / "config.json").unlink()

    with pytest.raises(BackboneError, match=rf"{folder}/{name} says .* but .* says .*: remove what isn't"):
        described(folder)
    with caplog.at_level(logging.WARNING):
        described(folder / "model.safetensors")
    assert f"{folder}/{name} says" in caplog.text


def test_files_that_agree_are_taken_and_another_interpolation_is_said(tmp_path, caplog):
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.50001]}
    folder = change(save(tmp_path / "w"), "preprocessor_config.json", **statistics, resample=2)

    with caplog.at_level(logging.WARNING):
        assert described(folder)[0].spec.interpolation == "bicubic"
    assert "says interpolation bilinear, but" in caplog.text


@pytest.mark.parametrize("name", ["hf-hub:timm/test_vit.r160_in1k", "local-dir:/some/where", "timm/test_vit"])
def test_places_are_no_names(name):
    with pytest.raises(BackboneError, match=f"'{name}' is a place; name the architecture, and give --weights"):
        read_description(name, WeightsChoice.parse("pretrained"), None)


# --- whoever else loads weights ---------------------------------------------------------------------------------------


def test_training_and_evaluation_take_the_same_description(tmp_path, make_tars):
    folder = save(tmp_path / "w", data_config={**INPUT, "input_size": (3, 64, 64)}, num_heads=4)
    config = X2Config.of(method="resize_conv", data=(make_tars(1, 4),), out=str(tmp_path / "run"), val_rows=1, model=TINY,
                      weights=str(folder), size=64, precision="fp32", batch=3, executor="inline")  # fmt: skip

    setup = config.resolve().prepare(InlineExecutor())
    recipe, sizes = resolve_source(
        CorrespondenceConfig.of(model=TINY, weights=str(folder), facet="key", precision="fp32").source, (), "squash"
    )

    spec, backbone = recipe.spec((64, 64)), setup.description["backbone"]
    assert sizes == ((64, 64),)
    assert spec.mean == setup.backbone.spec.mean == tuple(backbone["mean"]) == INPUT["mean"]
    assert spec.model_args == backbone["model_args"] == {"num_heads": 4}
    image = pixels(64, 64)
    with torch.inference_mode():
        ours = setup.backbone.backbone()(setup.backbone.input(image[None], torch.device("cpu")), (5,)).layers[5]
    theirs = recipe.bundle((64, 64)).build("cpu")(image[None]).levels["x1"].float().numpy()
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-2)


def test_a_run_from_before_goes_on_where_the_folder_says_nothing_new(tmp_path, make_tars):
    data = make_tars(1, 4)
    plain = save(tmp_path / "plain")
    settings = {"method": "resize_conv", "data": (data,), "val_rows": 1, "model": TINY, "size": 64, "precision": "fp32",
                "batch": 3, "executor": "inline", "weights": str(plain)}  # fmt: skip

    X2Config.of(**settings, out=str(tmp_path / "run")).resolve().prepare(InlineExecutor())

    before = read_run(Folder(str(tmp_path / "run")))["identity"]["backbone"]
    assert set(before) == {"model", "weights", "layers", "facet", "norm", "size", "pos_embed"}


def test_the_fingerprint_of_stores_without_arguments_is_what_it_was(tmp_path):
    (tmp_path / "w").mkdir()
    safetensors.torch.save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.safetensors")

    spec = described(tmp_path / "w.safetensors")[0].spec

    assert "model_args" not in spec.to_json()
    assert FeatureSpec.from_json(spec.to_json()) == spec
