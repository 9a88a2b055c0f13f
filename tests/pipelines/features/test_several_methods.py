"""Several methods in one run: each gives what it gives alone, and they share the backbone's pass."""

from operators.backbone import TimmBackbone
from operators.upsamplers import UPSAMPLERS
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.paths import Folder
from tests.pipelines.extraction.test_s3 import tree
from tests.pipelines.features.test_learned import checkpoint

OF = {"channels": 64, "patch": 16}
METHODS = {
    "x2": ("jafar", {**OF, "qk_dim": 32}),
    "x4": ("bilinear", None),
    "x8": ("naf", {"patch": 16, "dim": 32, "kernel_size": 3}),
    "x16": ("uplift", OF),
}


def test_one_run_equals_four_byte_for_byte_and_shares_the_backbones_pass(make_tars, tiny, tmp_path, monkeypatch):
    data, passes = make_tars(count=1, each=6), []
    forward = TimmBackbone.__call__
    levels = {}
    for name, (method, settings) in METHODS.items():
        assert method in UPSAMPLERS
        url = settings and checkpoint(tmp_path / method, {"method": method, **settings})
        levels[name] = f"{name}={method}:{url}" if url else f"{name}={method}"

    def run(out: str, *given: str) -> tuple[dict[str, bytes], int]:
        passes.clear()
        extract(tiny(data, facet="key", out=str(tmp_path / out), levels=given), InlineExecutor())
        return tree(Folder(str(tmp_path / out))), len(passes)

    monkeypatch.setattr(TimmBackbone, "__call__", lambda *given: (passes.append(given[1].shape[0]), forward(*given))[1])
    together, count = run("all.zarr", *levels.values())

    for name, level in levels.items():
        alone, of_one = run(f"{name}.zarr", level)
        objects = {path: data for path, data in alone.items() if path.startswith(f"{name}/") and "/c/" in path}
        assert objects
        assert {path: together[path] for path in objects} == objects
        assert of_one == count
