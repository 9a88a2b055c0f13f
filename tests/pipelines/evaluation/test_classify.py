"""Classes of images from stores' pooled vectors: what is counted, what is refused, and the numbers by other programs."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jobs import evaluate
from pipelines.config import ConfigError
from pipelines.evaluation.classify import ClassifyConfig, is_held_out
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar


def write_images(folder: Path, labels: list[str | None], first: int = 0) -> str:
    """A tar of images with these labels; of `junk`, which can't be decoded, where a label is so."""
    members = []
    for n, label in enumerate(labels, first):
        members.append((f"{n:03d}.jpg", b"junk" if label == "junk" else jpeg(n)))
        if label is not None:
            members.append((f"{n:03d}.cls", f"{label}\n".encode()))
    return str(write_tar(folder / f"{first}.tar", members))


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, str]:
    """URLs: `train` and `test`, of three classes; with a failed row, a row without label, and a class that only `test` has."""
    from pipelines.extraction.config import ExtractConfig

    folder = tmp_path_factory.mktemp("classes")
    train = [str([2, 10, 9][n % 3]) for n in range(36)] + ["junk", None]
    test = [str([2, 10, 9][n % 3]) for n in range(18)] + ["77", "junk"]
    urls = {}
    for name, labels, first in (("train", train, 0), ("test", test, 30)):
        tar = write_images(folder / "in" / name, labels, first)
        config = ExtractConfig.of(
            data=(tar,),
            out=str(folder / f"{name}.zarr"),
            model="test_vit.r160_in1k",
            weights="random",
            size="64",
            levels=("x1", "pooled"),
            precision="fp32",
            executor="inline",
            block_rows=16,
            carry=("cls",),
            max_failed_fraction=0.5,
        )
        extract(config, InlineExecutor())
        urls[name] = config.out
    return urls


def classify(out: Path, *argv: str) -> dict[str, object]:
    assert evaluate.run(["classify", *argv, "--out", str(out), "--device", "cpu"]) == 0
    return json.loads((out / "results.json").read_text())


def vectors(url: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 vectors, labels and keys of the rows that have both."""
    store = FeatureStore.open(url)
    labels = [each["cls"] for each in store.index.take(np.arange(len(store)), ["cls"]).to_pylist()]
    use = store.valid() & np.array([label is not None for label in labels])
    keys = store.index.take(np.arange(len(store)), ["key"])["key"].to_numpy(zero_copy_only=False)
    values = store.read(slice(None), "pooled", missing="nan").astype(np.float64)
    return values[use], np.array([int(labels[i]) for i in np.flatnonzero(use)]), keys[use]


def knn_of_scikit_learn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    """Its cosine distance is 1 - cosine."""
    classifier = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine")
    return classifier.fit(train, labels).predict(test)


@pytest.mark.parametrize("k", [1, 20])
def test_accuracy_of_neighbours_is_scikit_learns(stores, tmp_path, k):
    found = classify(tmp_path / "out", "--data", stores["train"], "--test", stores["test"], "--neighbours", str(k))

    (train, labels, _), (test, truth, _) = vectors(stores["train"]), vectors(stores["test"])
    expected = knn_of_scikit_learn(train, labels, test, k) == truth
    knn, linear, commonest = found["tables"][0]["lines"]
    assert [line["features"] for line in (knn, linear, commonest)] == [f"kNN, k = {k}", "linear probe", "commonest class"]
    assert knn["values"][0] == pytest.approx(100 * expected.mean())
    by_class = [100 * expected[truth == name].mean() for name in (2, 9, 10)]
    assert knn["values"][3] == pytest.approx(np.mean(by_class))
    low, high = map(float, knn["values"][1].split(" to "))
    assert low <= knn["values"][0] <= high
    assert [each["class"] for each in found["details"]["classes"]] == ["2", "9", "10"]
    assert [each["top-1"][f"kNN, k = {k}"] * 100 for each in found["details"]["classes"]] == pytest.approx(by_class)


def test_what_no_score_is_of_is_counted_and_what_flatters_it_is_said(stores, tmp_path, capsys):
    found = classify(tmp_path / "out", "--data", stores["train"], "--test", stores["test"])

    assert found["items"]["scored"] == {"test images": 19, "training images": 36, "classes": 3}
    reasons = {each["reason"].split(": ", 1)[1]: (each["count"], each["first"]) for each in found["items"]["left_out"]}
    assert found["items"]["left_out_count"] == 3
    assert reasons["no label 'cls'"] == (1, "037")
    notes = " ".join(found["tables"][0]["notes"])
    assert "1 test rows are of classes that no training row has (the first: 77), and count as wrong" in notes
    # Images 30 to 35 are in both tars.
    assert "6 test rows are, byte for byte, images of training rows" in notes
    assert "byte for byte" in capsys.readouterr().out


def test_one_store_is_split_by_its_keys(stores, tmp_path):
    found = classify(tmp_path / "out", "--data", stores["train"], "--held-out", "0.3", "--methods", "knn")

    values, labels, keys = vectors(stores["train"])
    tested = is_held_out(keys.tolist(), 0.3)
    expected = knn_of_scikit_learn(values[~tested], labels[~tested], values[tested], 20) == labels[tested]
    assert found["items"]["scored"]["test images"] == tested.sum()
    assert 0 < tested.sum() < 20
    assert found["tables"][0]["lines"][0]["values"][0] == pytest.approx(100 * expected.mean())
    # A row's part doesn't depend on the others.
    assert is_held_out(keys[::-1].tolist(), 0.3).tolist() == tested[::-1].tolist()
    assert is_held_out([str(n) for n in range(10_000)], 0.2).mean() == pytest.approx(0.2, abs=0.02)


def test_the_same_command_again_and_other_settings(stores, tmp_path, capsys):
    first = classify(tmp_path / "out", "--data", stores["train"], "--methods", "knn")

    assert classify(tmp_path / "out", "--data", stores["train"], "--methods", "knn") == first
    argv = ["classify", "--data", stores["train"], "--methods", "knn", "--out", str(tmp_path / "out")]
    assert evaluate.run([*argv, "--neighbours", "3"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    assert evaluate.run([*argv[:-1], str(tmp_path / "other"), "--plan"]) == 0
    assert "3 classes" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no data: give --data a store"),
        (["--data", "{train}", "--label", "class"], "has no column 'class'; it carries cls"),
        (["--data", "{train}", "--level", "x1"], "has no pooled level 'x1'; it has pooled"),
        (["--data", "{train}", "--held-out", "1e-9"], "can't be split by --held-out 1e-09"),
        (["--data", "{nothing}"], "there is no feature store at"),
    ],
)
def test_mistakes_end_in_words(stores, tmp_path, capsys, argv, words):
    argv = [each.format(**stores, nothing=str(tmp_path / "nothing")) for each in argv]

    assert evaluate.run(["classify", *argv, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"held_out": 2.0}, "must be between 0 and 1"),
        ({"neighbours": (20, 0)}, "must be at least 1"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"methods": ()}, "must name at least one"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        ClassifyConfig.of(**settings)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["cat"] * 6, "there must be at least two classes"),
        ([f"caption {n}" for n in range(6)], "a different one each: that is no class"),
        ([None] * 6, "no row has both features and a label 'cls'"),
    ],
)
def test_labels_that_are_no_classes_end_in_words(tmp_path, tiny, capsys, labels, words):
    config = tiny(write_images(tmp_path / "in", labels), carry=("cls",), levels=("x1", "pooled"))
    extract(config, InlineExecutor())

    argv = ["classify", "--data", config.out, "--out", str(tmp_path / "out"), "--held-out", "0.4"]
    assert evaluate.run(argv) == 2
    assert words in capsys.readouterr().err


def test_names_are_classes_and_stores_of_other_features_are_refused(tmp_path, tiny, stores, capsys):
    labels = [["cat", "dog"][n % 2] for n in range(24)]
    config = tiny(write_images(tmp_path / "in", labels), carry=("cls",), levels=("x1", "pooled@int8"), size="96")
    extract(config, InlineExecutor())

    found = classify(tmp_path / "out", "--data", config.out, "--held-out", "0.4")
    assert [each["class"] for each in found["details"]["classes"]] == ["cat", "dog"]
    assert "NOT converged" not in found["choices"]["linear probe"]
    argv = ["classify", "--data", stores["train"], "--test", config.out, "--out", str(tmp_path / "two")]
    assert evaluate.run(argv) == 2
    assert "hold different features" in capsys.readouterr().err


def test_folders_are_classes(tmp_path, tiny):
    for n in range(24):
        photo = tmp_path / "in/birds" / ["crow", "jay"][n % 2] / f"{n}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(jpeg(n))
    (tmp_path / "in/stray.jpg").write_bytes(jpeg(99))
    config = tiny(str(tmp_path / "in"), levels=("x1", "pooled"))
    extract(config, InlineExecutor())

    found = classify(tmp_path / "out", "--data", config.out, "--label", "folder", "--held-out", "0.4")

    assert [(each["class"], each["training_images"] + each["test_images"]) for each in found["details"]["classes"]] == [
        ("crow", 12),
        ("jay", 12),
    ]
    assert [each["first"] for each in found["items"]["left_out"]] == ["stray"]
