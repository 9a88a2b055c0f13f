"""What happens before the first task, and in which order."""

import subprocess
import sys
import threading

import pytest
import torch

from pipelines.executors import InlineExecutor, executor_for, side_by_side
from pipelines.extraction.first_look import is_named_by_timm
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.features.model import FeatureModel


def test_wrong_paths_are_told_without_torch(tmp_path):
    program = (
        "import sys\nfrom jobs.extract import run\n"
        f"code = run(['--data', {str(tmp_path / 'nothing.tar')!r}, '--out', {str(tmp_path / 'out.zarr')!r}])\n"
        "print(code, [name for name in ('torch', 'timm', 'ray', 'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "2 []", done.stderr
    assert "nothing.tar" in done.stderr


def test_a_wrong_model_is_told_before_ray_starts(tmp_path, make_tars):
    program = (
        "import sys\nfrom jobs.extract import run\n"
        f"code = run(['--data', {make_tars(1, 1)!r}, '--out', {str(tmp_path / 'out.zarr')!r}, '--model', sys.argv[1]])\n"
        "print(code, 'ray' in sys.modules)\n"
    )
    for model, said in (("vit_smal_patch16_224", "vit_small_patch16_224"), ("vit_small_patch16_224.dno", "dno")):
        done = subprocess.run([sys.executable, "-c", program, model], capture_output=True, text=True, timeout=300, check=False)
        assert done.stdout.strip() == "2 False", done.stderr
        assert said in done.stderr


def test_models_are_found_in_the_text_of_timm():
    for name in (
        "vit_small_patch16_224.dino",
        "vit_small_patch16_224",
        "convnext_tiny.in12k",
        "vitdet_base",
        "eva02_tiny_patch14_224",
    ):
        assert is_named_by_timm(name), name
    for name in ("vit_small_patch16_22", "vit_small_patch16_224.dno", "create_model"):
        assert not is_named_by_timm(name), name


def test_ray_starts_here_and_imports_are_done_in_a_thread_meanwhile():
    started, threads = threading.Event(), {}

    def session():
        threads["session"] = threading.current_thread()
        assert imported.wait(60)  # so both were under way at once
        started.set()

    imported = threading.Event()

    def meanwhile():
        threads["imports"] = threading.current_thread()
        imported.set()

    side_by_side(session, meanwhile)

    assert started.is_set()
    assert threads["session"] is threading.main_thread()
    assert threads["imports"] is not threading.main_thread()


def test_an_import_that_fails_is_told():
    def meanwhile():
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    with pytest.raises(ModuleNotFoundError, match="timm"):
        side_by_side(lambda: None, meanwhile)


def test_a_run_in_this_process_asks_for_nothing_meanwhile(tiny, make_tars):
    with executor_for(tiny(make_tars()), meanwhile=pytest.fail) as executor:
        assert isinstance(executor, InlineExecutor)


class NoScanner(InlineExecutor):
    """An executor that isn't to scan."""

    def map(self, *_: object, **__: object):
        raise AssertionError("scanned elsewhere")


def test_a_small_input_is_scanned_by_the_driver(tiny, make_tars, monkeypatch):
    resolved = resolve(tiny(make_tars()))
    assert prepare(resolved, NoScanner()).index.n_rows > 0
    monkeypatch.setattr("pipelines.indexing.SMALL_INPUT", 1)
    with pytest.raises(AssertionError, match="scanned elsewhere"):
        prepare(resolved, NoScanner())


def test_a_driver_keeps_no_model(tiny, make_tars):
    """Workers have it: the driver has the arrays that it sends them."""
    prepared = prepare(resolve(tiny(make_tars())), InlineExecutor())
    run_prepared(prepared, InlineExecutor())
    assert not any(isinstance(each, torch.nn.Module | FeatureModel) for each in vars(prepared).values())
