"""TensorBoard's files of a training run."""

import tempfile

from pipelines.training.watch import EventFile
from storage.paths import Folder


def test_events_lie_with_the_run_and_nowhere_else(tmp_path, monkeypatch):
    """A killed run would leave those of a temporary folder behind."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "tmp")
    folder = Folder(str(tmp_path / "run"))
    one, other = EventFile(folder, 0), EventFile(folder, 40)

    one.add(1, {"first_loss": 0.5})
    one.save()
    one.add(2, {"second_loss": 0.25})
    other.add(41, {"third_loss": 0.125})
    one.save()
    other.save()
    one.close()
    other.close()

    names = sorted(folder.sizes("tensorboard"), key=lambda name: name.rsplit(".", 1)[-1])  # the step that they begin at
    early, late = (folder.read(f"tensorboard/{name}") for name in names)
    assert b"first_loss" in early
    assert b"second_loss" in early
    assert b"third_loss" in late
    assert b"first_loss" not in late
    assert list((tmp_path / "tmp").iterdir()) == []
