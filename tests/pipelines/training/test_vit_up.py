"""ViT-Up trained by the job: the official loss and gradients, the loop, and its checkpoint in extraction."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from operators.backbone import BackboneError
from operators.objectives.vit_up import LossWeights
from operators.upsamplers import UpsamplerError
from operators.upsamplers.vit_up.head import ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.training.loop import TrainFailed, read_metrics
from pipelines.training.run import main, train_inline
from pipelines.training.vit_up import Distillation, ViTUpNet, ViTUpTraining
from storage.paths import Folder
from storage.runs import read_checkpoint
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.operators.upsamplers.test_vit_up import dinov3, golden, load_hf, under
from tests.readout_runs import continued, prepared

# --- the official loss ------------------------------------------------------------------------------------------------


def official() -> tuple[Distillation, ViTUpNet, dict[str, torch.Tensor]]:
    tensors, c = golden("training_loss")
    model = dinov3(c["D"], c["backbone_layers"], c["heads"], c["patch"], c["intermediate"], c["gated_mlp"])
    load_hf(model, under(tensors, "backbone."))
    lora = Lora(model, rank=c["lora_r"], alpha=c["lora_alpha"])
    lora.load_peft_state(
        {key: value for key, value in under(tensors, "").items() if key.startswith("backbone") and ".lora_" in key}
    )
    settings = ViTUpConfig(
        channels=c["D"],
        heads=c["heads"],
        layers=tuple(c["layer_indices"]),
        mlp_channels=c["ff"],
        hidden_size=c["lr_img_size"],
        query_size=c["query_img_in_size"],
    )
    head = ViTUpHead(settings)
    head.load_state_dict(under(tensors, "vit_up."))
    coarse = c["patch"] * c["min_embd_size"]
    task = Distillation(
        AdaptedBackbone(model, lora),
        head,
        teacher_sizes=[coarse * c["scale"] ** i for i in range(c["n_iters"])],
        chunk_blocks=c["block_chunk_size"],
        weights=LossWeights(),
    )
    return task, ViTUpNet(head, lora).eval(), tensors


def boxes_of(xy_BggT2: torch.Tensor) -> torch.Tensor:
    """The boxes whose cells' centres are these: the golden has the queries themselves."""
    cells = xy_BggT2.shape[1]
    first, last = xy_BggT2[:, 0, 0], xy_BggT2[:, -1, -1]
    size = (last - first) * cells / (cells - 1)
    return torch.cat([first - size / (2 * cells), size], dim=1)


def test_loss_and_gradients_are_the_official_ones():
    task, net, tensors = official()
    batch = (tensors["in/pixel_values"], tensors["in/pixel_values_container"], boxes_of(tensors["in/query_xy"]))

    total = task.backward(*batch)

    torch.testing.assert_close(total / 2, tensors["out/loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(task.loss(*batch), tensors["out/loss"], rtol=1e-4, atol=0)
    expected = {key.removeprefix("vit_up."): value for key, value in under(tensors, "grad/").items()}
    found = {name: parameter.grad / 2 for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert len(expected) > 40
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-4)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    assert float(norm) == pytest.approx(float(tensors["out/grad_norm"]), rel=2e-3)


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, make_tars):
    """A run of 6 training images in 2 epochs of 3 steps, timm's test_vit on canvases of 128 px."""
    data = make_tars(count=2, each=4)

    def make(**changes: object) -> ViTUpTraining:
        values: dict[str, object] = {
            "data": (data,),
            "out": str(tmp_path / "run"),
            "val_rows": 2,
            "model": "test_vit.r160_in1k",
            "weights": "random",
            "size": 128,
            "teacher_sizes": (32, 64, 128),
            "hidden_size": 64,
            "query_size": 128,
            "hidden_states": (0, 3, 6),
            "precision": "fp32",
            "net_precision": "fp32",
            "batch": 2,
            "epochs": 2,
            "warmup_steps": 2,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 4,
            "executor": "inline",
            "device": "cpu",
        }
        return ViTUpTraining.of(**{**values, **changes})

    return make


def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(small, tmp_path):
    """LoRA's dropout, the views and the schedule included."""
    found = continued(small(out=str(tmp_path / "whole")), small(out=str(tmp_path / "broken")), (3,))

    assert found.step == 6
    assert any(".lora_B." in name for name in found.model)


def test_a_start_as_the_enlargement_is_it_and_goes_on_bit_for_bit(small, tmp_path):
    changes = {"start": "enlargement", "relational_tau": 0.05, "relational_itself": True}
    whole, broken = (small(out=str(tmp_path / name), **changes) for name in ("whole", "broken"))

    continued(whole, broken, (1, 3))

    first = read_metrics(Folder(whole.out))[0]
    assert first["val_cosine"] == pytest.approx(first["val_cosine_bilinear"], abs=0.1)  # 4 rotary bands blur


def test_a_start_as_the_enlargement_needs_attention_and_images(small, tmp_path):
    with pytest.raises(ConfigError, match="--start enlargement"):
        small(start="enlargement", cross_attention=False)
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"no image at all")
    with pytest.raises(ConfigError, match=r"none of 2 images can be read \(row 0.*use --start drawn"):
        train_inline(prepared(small(data=(str(folder),), start="enlargement", val_rows=2)))


def test_the_loss_falls_on_a_few_images_and_is_measured(small):
    config = small(val_rows=6, batch=2, epochs=25, lr=2e-3, strength=0.0, checkpoint_every=25, validate_every=25)

    train_inline(prepared(config))

    lines = read_metrics(Folder(config.out))
    found = [line["loss"] for line in lines if "loss" in line]
    validated = [line["val_loss"] for line in lines if "val_loss" in line]
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])
    assert all(0 < line["val_cosine_bilinear"] < 1 for line in lines if "val_loss" in line)
    assert len(validated) == 2
    assert validated[-1] < validated[0]
    assert len(Folder(config.out).sizes("pictures")) == 2


@pytest.mark.parametrize("part", ["featx", "cross_attention", "lora", "relational_weight"])
def test_ablations_train(small, part):
    config = small(epochs=1, **{part: 0.0 if part == "relational_weight" else False})

    summary = train_inline(prepared(config))

    names = read_checkpoint(Folder(config.out), summary.last).model
    assert any(".lora_" in name for name in names) == (part != "lora")
    assert any(".featx." in name for name in names) == (part != "featx")
    assert any(".cross_attention." in name for name in names) == (part != "cross_attention")


def test_held_out_images_that_cannot_be_read_are_counted(small, tmp_path):
    members = [(f"{n:03d}.jpg", b"nothing" if n == 1 else jpeg(100 + n)) for n in range(4)]
    data = str(write_tar(tmp_path / "held-out.tar", members))

    summary = train_inline(prepared(small(val_data=(data,), val_rows=4, max_steps=1, max_failed_fraction=0.25)))

    assert list(summary.held_out) == ["1"]
    assert (summary.metrics["val_images"], summary.metrics["val_left_out"]) == (3, 1)
    with pytest.raises(TrainFailed, match="1 of 4 held-out images could not be read"):
        train_inline(prepared(small(val_data=(data,), val_rows=4, out=str(tmp_path / "strict"))))


def test_a_warm_up_longer_than_the_run_is_said_at_its_start_and_end(small, caplog):
    config = small(warmup_steps=2669, max_steps=2)

    printed = list(main(config))

    said = (
        "--warmup-steps 2,669 of a run of 2 steps: the learning rate rises to 2.07e-06 at most and never reaches --lr 0.0002; "
        "give fewer --warmup-steps, or train longer."
    )
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [said]
    assert f"note       {said}" in printed
    assert not prepared(small(warmup_steps=5, out=config.out + "2")).notes


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"warmup_steps": 6}, "--warmup-steps 6 of a run of 6 steps"),
        ({"max_steps": 7}, "--max-steps 7 aren't reached: --epochs 2 of 6 images end after 6 steps"),
        ({"batch": 7, "warmup_steps": 1}, "--batch 7: there are 6 images to train on"),
    ],
)
def test_settings_without_their_effect_are_named(small, changes, note):
    (found,) = prepared(small(**changes)).notes

    assert found.startswith(note)


def test_another_number_of_steps_is_another_schedule(small):
    train_inline(prepared(small(epochs=1)))

    with pytest.raises(ConfigError, match="epochs .* run 1 .* now 2"):
        prepared(small(epochs=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 60}, "--hidden-size: 60 is no multiple"),
        ({"teacher_sizes": (32, 96, 128)}, "times 2, 4, 8"),
        ({"hidden_states": (0, 3)}, "the last must be 6"),
        ({"hidden_states": (3, 0, 6)}, "rising"),
        ({"strength": -1.0}, "--strength -1.0"),
        ({"l2_weight": 0.0, "cosine_weight": 0.0, "relational_weight": 0.0}, "one must be above 0"),
        ({"schedule": "constant"}, "--warmup-steps 2 needs --schedule cosine"),
    ],
)
def test_wrong_settings_name_the_flag(small, changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes).resolve()


def test_hierarchical_models_are_refused(small):
    with pytest.raises((ConfigError, BackboneError), match=r"[Hh]iera|blocks"):
        small(model="hiera_tiny_224.mae", hidden_size=224).resolve()


# --- the checkpoint in use --------------------------------------------------------------------------------------------


def test_extraction_takes_the_checkpoint_for_several_grids_of_one_pass(small, make_tars, tiny, monkeypatch):
    config = small(epochs=1)
    url = f"{config.out}/{train_inline(prepared(config)).last}"
    passes = []
    hidden = AdaptedBackbone.hidden
    monkeypatch.setattr(AdaptedBackbone, "hidden", lambda *args: passes.append(len(args[1])) or hidden(*args))

    levels = ("x1", f"x4=vit_up:{url}", f"6x10=vit_up:{url}")
    features = tiny(make_tars(count=1, each=3, folder="other"), levels=levels, encoding="float32")
    extract(features, InlineExecutor())

    store = FeatureStore.open(features.out)
    assert store.read(slice(None), "x4").shape == (3, 16, 16, 64)
    assert store.read(slice(None), "6x10").shape == (3, 6, 10, 64)
    assert sum(passes) == 3
    assert len({level.digest for level in store.spec.levels}) == 2
    coarse = store.read(slice(None), "x4").reshape(3, 4, 4, 4, 4, 64).mean(axis=(2, 4))
    assert coarse.std() > 0.01


def test_it_gives_the_features_it_was_trained_for_only(small, make_tars, tiny):
    config = small(epochs=1)
    url = f"{config.out}/{train_inline(prepared(config)).last}"
    data = make_tars(count=1, each=3, folder="other")

    with pytest.raises(UpsamplerError, match="--facet token"):
        extract(tiny(data, facet="key", levels=("x1", f"x4=vit_up:{url}")), InlineExecutor())
    with pytest.raises(UpsamplerError, match="trained on other features"):
        extract(tiny(data, weights="random:7", levels=("x1", f"x4=vit_up:{url}")), InlineExecutor())
    with pytest.raises(UpsamplerError, match="holds a vit_up, not a lift"):
        extract(tiny(data, levels=("x1", f"x4=lift:{url}")), InlineExecutor())


def test_weights_alone_are_taken_as_a_published_file(small, make_tars, tiny, tmp_path):
    """Of what shapes don't tell, the sizes are the published ones, which a small model takes, too."""
    config = small(epochs=1, hidden_states=(0, 1, 2, 3, 4, 5, 6))
    last = read_checkpoint(Folder(config.out), train_inline(prepared(config)).last)
    path = tmp_path / "vit_up.safetensors"
    safetensors.torch.save_file({name: torch.from_numpy(array) for name, array in last.model.items()}, path)
    data = make_tars(count=1, each=1, folder="other")

    extract(tiny(data, size="160", levels=("x1", f"x2=vit_up:{path}")), InlineExecutor())

    assert FeatureStore.open(tiny(data).out).read(0, "x2").shape == (20, 20, 64)
    assert json.loads((Path(config.out) / "run.json").read_text())["identity"]["method"] == "vit_up"
