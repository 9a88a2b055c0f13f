"""Maps stay on the device that made them: models, evaluations and readouts run on a GPU that isn't there (`pretended_gpu`), and
give what they give on the CPU, without bringing any map to the host."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.evaluation import cka, correspondence, discovery, fidelity, sharpness, similarity, video
from pipelines.evaluation import readouts as probe
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.fidelity import FidelityConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.sharpness import SharpnessConfig
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.executors import InlineExecutor
from pipelines.extraction.host import HostCopy, ModelDevice, quantised
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.features.feature_source import CachedSource
from pipelines.features.model_bundle import ModelBundle
from pipelines.training.readout import ReadoutObjective
from storage.paths import Folder
from storage.shards import encode_row
from tests.operators.test_backbone import described, photos
from tests.pipelines.features.test_learned import LIFT, checkpoint, official_file
from tests.pretended_gpu import Gpu, There, pretended_gpu
from tests.readout_runs import OF_TASK, TINY, prepared, train, training

JBU = {**LIFT, "method": "jbu"}


# --- the pretended GPU itself -----------------------------------------------------------------------------------------


def test_what_comes_to_the_host_is_noticed():
    with pretended_gpu() as gpu:
        there = torch.ones(3, 4).to("cuda") * 2
        assert (there.device.type, gpu.to_host) == ("cuda", [])
        with pytest.raises(RuntimeError, match=r"on the GPU, and \[\(3, 4\)\] on the CPU"):
            there + torch.ones(3, 4)
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        assert float(there.sum()) == 24
        assert there[0].cpu().numpy().tolist() == [2, 2, 2, 2]
        assert (gpu.to_host, gpu.largest) == ([(), (4,)], 4)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> ModelBundle:
    """All kinds of levels."""
    folder = tmp_path_factory.mktemp("files")
    lift, jbu = official_file(folder / "lift.pth"), checkpoint(folder / "jbu", JBU)
    levels = ("x1", f"x2=lift:{lift}", f"x4=jbu:{jbu}", "8x8=bilinear@float32", "x0.5@int8", "pooled")
    return described(facet="key", levels=levels)[0]


def test_a_models_rows_are_on_its_device(bundle):
    with sdpa_kernel(SDPBackend.MATH):
        expected = bundle.build("cpu")(photos(2))
    with pretended_gpu() as gpu:
        found = bundle.build("cuda")(photos(2))
        assert gpu.to_host == []
        assert {rows.device.type for rows in (found.bad, *found.levels.values())} == {"cuda"}
        assert (found.seconds.forward, found.seconds.upsample) == (1, 1)

    for name, rows in expected.levels.items():
        torch.testing.assert_close(found.levels[name].held, rows, rtol=0, atol=0)


# --- the writer -------------------------------------------------------------------------------------------------------


def test_the_writer_brings_rows_as_they_are_stored(bundle):
    levels = bundle.spec.levels
    with sdpa_kernel(SDPBackend.MATH):
        expected = bundle.build("cpu")(photos(2))
    with pretended_gpu() as gpu:
        rows = HostCopy(torch.device("cuda")).begin(bundle.build("cuda")(photos(2)), levels).wait()
        wanted = [(2, *level.row_shape) for level in levels] + [(2, level.channels) for level in levels if level.dtype == "int8"]
        assert sorted(gpu.to_host) == sorted([*wanted, (2,)])

    for level in levels:
        values = expected.levels[level.name].numpy()
        if level.dtype != "int8":
            np.testing.assert_array_equal(rows.levels[level.name], values)
            continue
        for i, row in enumerate(values):
            stored, scale, _ = encode_row(row, "int8")
            np.testing.assert_array_equal(rows.levels[level.name][i], stored)
            np.testing.assert_array_equal(rows.scales[level.name][i], scale)


def test_a_cpus_rows_are_not_copied(bundle):
    found = bundle.build("cpu")(photos(1))
    rows = HostCopy(torch.device("cpu")).begin(found, bundle.spec.levels)
    assert all(np.shares_memory(rows.levels[name], each.numpy()) for name, each in found.levels.items())


def test_batches_are_given_to_a_gpu_without_waiting_for_it(bundle):
    with pretended_gpu() as gpu:
        device = ModelDevice(bundle.build("cuda"))
        device.begin(photos(2), 2).wait()  # what is made once for all batches may be waited for
        gpu.where.clear()
        rows = device.begin(photos(2), 2)
        assert gpu.where == []
        rows.wait()
        expected = HostCopy(torch.device("cuda")).begin(bundle.build("cuda")(photos(2)), bundle.spec.levels).wait()

    for name, values in expected.levels.items():
        np.testing.assert_array_equal(rows.levels[name], values)


@pytest.mark.parametrize("scale", [1e-40, 1e-6, 1.0, 3e38])
def test_quantised_on_the_device_is_what_the_store_does(scale):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5, 7, 33, generator=random).clamp(-1, 1) * scale
    rows[0, ..., 3] = 0
    rows[2] = torch.randint(-254, 255, (5, 7, 33), generator=random) / 2 * (1 if scale == 1 else 0)  # halves are rounded to even

    steps, scales = quantised(rows)

    for row, *found in zip(rows, steps, scales, strict=True):
        for mine, stores in zip(found, encode_row(row.numpy(), "int8"), strict=False):
            assert mine.numpy().tobytes() == stores.tobytes()


# --- evaluations ------------------------------------------------------------------------------------------------------


def run_on(device: str, task, recipe, folder: Folder) -> list[dict]:
    source = CachedSource(recipe.open(device))
    assert source.device.type == device
    return [record for piece in task.pieces() for record in task.run(piece, source, folder)]


CHANNELS = 64
"""Of test_vit's maps, and of nothing else here."""


def brought_maps(gpu: Gpu) -> list[tuple[int, ...]]:
    """Shapes of what came to the host with the channels of a map."""
    return [shape for shape in gpu.to_host if CHANNELS in shape]


SIZES = {"sizes": (48,), "levels": ("x1", "x2=bicubic"), "pictures": 1}
EVALUATIONS: dict[str, tuple[object, type, str, dict[str, object], int]] = {
    "lift": (correspondence, CorrespondenceConfig, "SPair-71k", {"pairs_per_category": 2}, 2 * 4),
    "vit-up": (correspondence, CorrespondenceConfig, "SPair-71k", {"protocol": "vit-up"}, 2 * 4),
    "video": (video, VideoConfig, "DAVIS", {}, 96**2),
    "discovery": (discovery, DiscoveryConfig, "VOC2007", {"tau": 0.5}, 36**2),
    "weighted": (discovery, DiscoveryConfig, "VOC2007", {"weighted": True}, 36**2),
    "cka": (cka, CkaConfig, "SPair-71k", {"sizes": (32, 48), "batch": 4}, 3),
    "similarity": (similarity, SimilarityConfig, "VOC2007", {}, 6 * 6),
    "fidelity": (fidelity, FidelityConfig, "SPair-71k", {"sizes": (32, 64)}, 4 * 4),
    "sharpness": (sharpness, SharpnessConfig, "VOC2012", {}, 6 * 6),
}
"""The module, its settings, the demo's data, and the most values that may come to the host at once: key points, label images,
the graph of the finer map's 36 tokens, terms of pairs of sizes, a map of similarities, cosines or distances."""


def run_on_both(task, recipe, folder):
    """All pieces on the CPU and as on CUDA, which must give the same and bring no map to the host; the pretended GPU."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = run_on("cpu", task, recipe, folder)
    with pretended_gpu() as gpu:
        found = run_on("cuda", task, recipe, folder)
    assert json.dumps(found) == json.dumps(expected)
    assert brought_maps(gpu) == []
    return gpu


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_compute_where_the_maps_are(name, sets, tmp_path):
    module, config_of, data, settings, most = EVALUATIONS[name]
    config = config_of.of(data=str(sets / data), out=str(tmp_path / "out"), **{**TINY, **SIZES, **settings})
    task, recipe, folder = module.prepare(config)
    gpu = run_on_both(task, recipe, folder)

    assert 1 <= gpu.largest <= most


def test_maps_of_a_store_go_to_the_device_once(sets, tmp_path, tiny):
    images, url = sets / "VOC2007/VOCdevkit/VOC2007/JPEGImages", str(tmp_path / "f.zarr")
    config = tiny(str(images), out=url, size="48", levels=("x1", "x2", "pooled"), geometry="squash")
    run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor())
    settings = {"data": str(sets / "VOC2007"), "out": str(tmp_path / "out"), "stores": (url,), **TINY}
    task, recipe, folder = discovery.prepare(DiscoveryConfig.of(**settings))
    expected = run_on("cpu", task, recipe, folder)

    with pretended_gpu() as gpu:
        found = run_on("cuda", task, recipe, folder)

    assert json.dumps(found) == json.dumps(expected)
    assert brought_maps(gpu) == []
    assert gpu.largest <= 36**2


# --- readouts ---------------------------------------------------------------------------------------------------------

SIDE = 112
JUDGED = {"segmentation": 3 * 21**2, "depth": 480 * 640, "boundaries": 1, "detection": 4 * 100, "instances": 32 * 112**2}
"""The most values that may come to the host at once: of the output, what is scored there."""


@pytest.mark.parametrize("task", OF_TASK)
def test_readouts_are_trained_and_judged_where_the_maps_are(task, sets, tmp_path):
    setup = prepared(training(sets, tmp_path / "run", task, side=SIDE))
    rows = list(setup.held_out_rows)[:2]
    arrays = setup.held_out.load(rows, None).arrays

    def computed(device: str) -> tuple[Tensor, Tensor, list[object]]:
        objective = ReadoutObjective(setup, torch.device(device))
        outputs, targets = objective._outputs(arrays), objective._targets(arrays)
        assert {outputs.device.type, *(each.device.type for each in targets.values())} == {device}
        total, _ = objective._loss(outputs, targets, 0)
        judged = [
            setup.images.task.judge(outputs[i], {name: each[i] for name, each in targets.items()}, setup.held_out.label(row))
            for i, row in enumerate(rows)
        ]
        return outputs, total, judged

    torch.manual_seed(0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        outputs, total, judged = computed("cpu")
    torch.manual_seed(0)
    with torch.no_grad(), pretended_gpu() as gpu:
        outputs_there, total_there, judged_there = computed("cuda")

    assert isinstance(total_there, There)
    torch.testing.assert_close(outputs_there.held, outputs, rtol=0, atol=0)
    torch.testing.assert_close(total_there.held, total, rtol=0, atol=0)
    assert judged_there == judged
    assert brought_maps(gpu) == []
    assert gpu.largest <= JUDGED[task]


def test_an_evaluation_of_readouts_computes_where_the_maps_are(sets, tmp_path):
    config = training(sets, tmp_path / "run", side=SIDE, max_steps=2)
    train(config)
    settings = {"data": str(sets / "VOC2012"), "readouts": (config.out,), "pictures": 1, **TINY}
    task, recipe, folder = probe.prepare(ProbeConfig.of(out=str(tmp_path / "out"), **settings))
    gpu = run_on_both(task, recipe, folder)

    assert gpu.largest <= SIDE**2  # a label image that is drawn
