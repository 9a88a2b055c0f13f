"""Are the pooled vectors of some images good for telling their classes? Weighted kNN and a linear probe, on stores.

Images are rows of stores with a pooled level; labels are a column that extraction carried from the tars (`--carry cls`). kNN is
DINO's (Caron et al., arXiv 2104.14294, section 4.1, after Wu et al., arXiv 1805.01978): cosines with all training vectors, of
which the k nearest vote with weight exp(cosine / T). The linear probe is multinomial logistic regression, as in Kornblith et al.
(arXiv 1805.08974): L-BFGS on standardised vectors, its L2 penalty chosen on a part of the training rows.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch

from operators.classifiers import LinearClassifier, knn_votes
from pipelines.config import ConfigError, Counts, Found, Free, JobConfig, absolute, require_above, require_at_least, require_out
from pipelines.features.feature_source import in_words
from pipelines.provenance import NOTHING_RUN, begin_run, planned, run_folder
from pipelines.results import Cell, Findings, Items, LeftOut, Line, Table, sides, write_results
from storage.documents import JsonValue
from storage.paths import StorageError
from storage.redaction import redact
from storage.spec import FeatureSpec, Level, Use
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

Method = Literal["knn", "linear"]

FOLDER = "folder"
"""The label that is no column: folders of images are how most small sets come."""

READ_ROWS = 8192
"""Rows that are read from a store at once."""

RESAMPLED = 10_000
"""Draws of the test rows, for the intervals."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(JobConfig):
    """kNN and a linear probe on the pooled vectors of stores, whose labels were carried from the tars."""

    data: Found[str] = ""
    """The store of training rows: a path or fsspec URL."""
    test: Found[str] = ""
    """The store of test rows; default: a part of --data's, drawn by their keys."""
    out: Free[str] = ""
    """The folder to write results.md and results.json to."""
    label: Counts[str] = "cls"
    """The column with the class, which jobs/extract.py --carry took from the samples: numbers or names. `folder`: the folder that
    the image lies in, as its key has it, where no column is called so."""
    level: Counts[str] = ""
    """The pooled level; default: the CLS vector, else the only pooled one."""
    methods: Counts[tuple[Method, ...]] = ("knn", "linear")
    """Which of both."""
    neighbours: Counts[tuple[int, ...]] = (20,)
    """k of kNN; several give a line each. DINO tries 10, 20, 100 and 200, and finds 20 best."""
    temperature: Counts[float] = 0.07
    """T of kNN's weights, exp(cosine / T)."""
    l2: Counts[tuple[float, ...]] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Penalties of the linear probe, beside the mean cross-entropy: half the squared norm of its weights, times one of these. Of
    several, the best on a tenth of the training rows."""
    held_out: Counts[float] = 0.2
    """Part of the rows that is tested on where --test names no store."""
    plan: Free[bool] = False
    """Print what would be done, then stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "neighbours")
        if not self.methods or ("knn" in self.methods and not self.neighbours) or ("linear" in self.methods and not self.l2):
            raise ConfigError("--methods, --neighbours and --l2 must name at least one each")
        require_above(0, self, "temperature")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held-out {self.held_out:g}: must be between 0 and 1")
        require_at_least(0, self, "l2")

    @property
    def places(self) -> tuple[str, ...]:
        return self.data, self.test, self.out


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows of a store that have features and a class."""

    store: FeatureStore
    level: Level
    rows: np.ndarray
    "int64 [n]"
    names: np.ndarray
    "str [n], their classes' names"
    keys: np.ndarray
    "str [n]"
    left_out: tuple[LeftOut, ...]

    def part(self, which: np.ndarray) -> "LabelledRows":
        """Those of a mask; what was left out is said once, elsewhere."""
        return LabelledRows(
            store=self.store, level=self.level, rows=self.rows[which], names=self.names[which], keys=self.keys[which], left_out=()
        )

    def vectors(self) -> torch.Tensor:
        """All vectors [n, C] in the dtype they are stored in (float32 for int8). Raises `StorageError` for NaN and infinity."""
        dtype = torch.float16 if self.level.dtype == "float16" else torch.float32
        found = torch.empty(len(self.rows), self.level.channels, dtype=dtype)
        for start in range(0, len(self.rows), READ_ROWS):
            rows = self.rows[start : start + READ_ROWS]
            values = torch.from_numpy(self.store.read(rows, self.level.name))
            if not values.isfinite().all():
                wrong = self.keys[start + int((~values.isfinite()).any(dim=1).nonzero()[0, 0])]
                raise StorageError(f"{self.store.folder.displayed}: features of {wrong!r} hold NaN or infinity")
            found[start : start + len(rows)] = values
        return found


def labelled_rows(store: FeatureStore, level_name: str, label: str) -> LabelledRows:
    """The rows of a store that can be used, and why others can't. Raises `ConfigError`."""
    level = _pooled(store, level_name)
    displayed, carried = store.folder.displayed, store.index.carried
    if label not in carried and label != FOLDER:
        there = f"it carries {', '.join(carried)}" if carried else "it carries nothing"
        raise ConfigError(
            f"{displayed} has no column {label!r}; {there}. Labels come from the tars with jobs/extract.py --carry {label}, "
            f"which takes the text members named KEY.{label}; give --label the name of one that is there, or `folder`"
        )
    rows = np.arange(len(store))
    valid = store.valid(rows)
    table = store.index.take(rows, ["key", *({label} & set(carried))])
    keys = table["key"].to_numpy(zero_copy_only=False).astype(str)
    if label in carried:
        names = pc.utf8_trim_whitespace(pc.fill_null(table[label], "")).to_numpy(zero_copy_only=False).astype(str)
    else:
        names = np.array([key.rpartition("/")[0].rpartition("/")[2] for key in keys.tolist()], str)
    labelled = names != ""
    what = "no features: its extraction failed" if store.status == "complete" else "no features: failed, or not written yet"
    left_out = LeftOut.of(f"{displayed}: {what}", keys[~valid].tolist())
    left_out += LeftOut.of(f"{displayed}: no label {label!r}", keys[valid & ~labelled].tolist())
    use = valid & labelled
    if not use.any():
        raise ConfigError(f"{displayed}: no row has both features and a label {label!r}: {'; '.join(map(str, left_out))}")
    return LabelledRows(store=store, level=level, rows=rows[use], names=names[use], keys=keys[use], left_out=left_out)


def _pooled(store: FeatureStore, name: str) -> Level:
    pooled = {level.name: level for level in store.spec.levels if level.grid is None}
    displayed = store.folder.displayed
    if not pooled:
        raise ConfigError(f"{displayed} has no pooled level, one vector an image; extract with --levels pooled, beside others")
    if name:
        if name not in pooled:
            raise ConfigError(f"{displayed} has no pooled level {name!r}; it has {', '.join(pooled)}")
        return pooled[name]
    of_cls = [level for level in pooled.values() if level.method == "cls"]
    if len(of_cls or pooled) > 1:
        raise ConfigError(f"{displayed} has several pooled levels, {', '.join(pooled)}; name one with --level")
    return next(iter(of_cls or pooled.values()))


def is_held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Which keys are in a part of about that share, bool [n]: by their sha256, whatever their order and number."""
    firsts = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) for key in keys]
    return np.array(firsts, np.uint64).astype(np.float64) < share * 2.0**64


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Training and test rows, and their classes."""

    train: LabelledRows
    test: LabelledRows
    classes: tuple[str, ...]
    "of the training rows; numbers in their order, else names in theirs"
    split: str
    "how test rows were chosen, in words"

    @property
    def train_labels(self) -> np.ndarray:
        return self._labels(self.train.names)

    @property
    def test_labels(self) -> np.ndarray:
        """int64 [n]; -1: a class that no training row has, which nothing can get right."""
        return self._labels(self.test.names)

    def _labels(self, names: np.ndarray) -> np.ndarray:
        number = {name: i for i, name in enumerate(self.classes)}
        unique, back = np.unique(names, return_inverse=True)
        return np.array([number.get(name, -1) for name in unique.tolist()], np.int64)[back]

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return (*self.train.left_out, *self.test.left_out)


def classification(config: ClassifyConfig) -> Classification:
    """The stores opened and held against each other. Raises `ConfigError`, `StorageError`."""
    if not config.data:
        raise ConfigError("no data: give --data a store with a pooled level and carried labels")
    store = FeatureStore.open(config.data, config.options)
    train = labelled_rows(store, config.level, config.label)
    if config.test:
        test = labelled_rows(FeatureStore.open(config.test, config.options), config.level or train.level.name, config.label)
        _require_alike(train, test)
        split = "the store of --test"
    else:
        tested = is_held_out(train.keys.tolist(), config.held_out)
        test, left_out = train.part(tested), train.left_out
        split = f"rows of --data whose key's sha256 is below {config.held_out:g} of its range (--held-out)"
        if not tested.any() or tested.all():
            raise ConfigError(f"{len(tested)} rows can't be split by --held-out {config.held_out:g}; give --test a store")
        part = train.part(~tested)
        train = LabelledRows(**{**vars(part), "left_out": left_out})
    names = np.unique(train.names).tolist()
    classes = sorted(names, key=int) if all(_is_integer(name) for name in names) else sorted(names)
    said = f"{train.store.folder.displayed}: {len(train.rows):,} training rows have {len(classes):,} values of {config.label!r}"
    if len(classes) < 2:
        raise ConfigError(f"{said}; there must be at least two classes")
    if len(classes) == len(train.rows):
        raise ConfigError(f"{said}, a different one each: that is no class. Give --label the column of one")
    return Classification(train=train, test=test, classes=tuple(classes), split=split)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isascii() and name.removeprefix("-").isdigit() and len(name) <= 18


def _require_alike(train: LabelledRows, test: LabelledRows) -> None:
    names = FeatureSpec.names(Use.LEARNED, Use.LEARNED_LATER, Use.PLACED)
    differing = train.store.spec.differences(test.store.spec, names)
    where = f"{train.store.folder.displayed} and {test.store.folder.displayed}"
    if differing:
        raise ConfigError(f"{where} hold different features:\n{differing.text('--data', '--test')}\nExtract both alike.")
    if (train.level.method, train.level.channels) != (test.level.method, test.level.channels):
        raise ConfigError(f"{where}: level {train.level.name} isn't the same kind of vector in both")


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often the class was the first guess, and among the first five."""

    name: str
    first: np.ndarray
    "bool [n], by test row"
    among_five: np.ndarray
    "bool [n]"

    @classmethod
    def of(cls, name: str, guesses: np.ndarray, labels: np.ndarray) -> "Score":
        """Of the likeliest classes [n, up to 5], the first one first."""
        right = guesses == labels[:, None]
        return cls(name=name, first=right[:, 0], among_five=right.any(axis=1))

    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the accuracy, over test rows."""
        # The mean of n resampled hits and misses is a binomial number over n.
        n = len(self.first)
        drawn = np.random.default_rng(0).binomial(n, self.first.mean(), RESAMPLED) / n
        low, high = np.percentile(drawn, [2.5, 97.5])
        return float(low), float(high)

    def by_class(self, labels: np.ndarray, n_classes: int) -> np.ndarray:
        """Accuracy of each class, [n_classes]; NaN where no test row is of it."""
        known = labels >= 0
        tested = np.bincount(labels[known], minlength=n_classes)
        right = np.bincount(labels[known], self.first[known], minlength=n_classes)
        return np.divide(right, tested, out=np.full(n_classes, np.nan), where=tested > 0)

    def values(self, labels: np.ndarray, n_classes: int) -> list[Cell]:
        """Of a line: accuracy, its interval, top-5 where there are more classes, mean over classes; in percent."""
        low, high = self.interval()
        five = 100 * float(self.among_five.mean()) if n_classes > 5 else None
        mean = 100 * float(np.nanmean(self.by_class(labels, n_classes))) if (labels >= 0).any() else None
        return [100 * float(self.first.mean()), f"{100 * low:.2f} to {100 * high:.2f}", five, mean]


COLUMNS = ("top-1, %", "95%", "top-5, %", "mean of classes, %")


def scores(config: ClassifyConfig, task: Classification) -> tuple[list[Score], dict[str, str]]:
    """Of every method; and what is to be said of how they came about."""
    device = "cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu"
    if config.cluster.device == "cuda" and device == "cpu":
        raise ConfigError("--device cuda: there is no GPU here")
    train, test = task.train.vectors(), task.test.vectors()
    labels, truth = task.train_labels, task.test_labels
    n_classes, found, said = len(task.classes), [], {}
    if "knn" in config.methods:
        for k in dict.fromkeys(config.neighbours):
            votes = knn_votes(train, torch.from_numpy(labels), test, n_classes, k, config.temperature, device=device)
            found.append(Score.of(f"kNN, k = {k}", votes.numpy(), truth))
        said["kNN"] = (
            f"cosines with all training vectors; the k nearest vote with exp(cosine / {config.temperature:g}), as DINO's"
        )
        if max(config.neighbours) > len(labels):
            said["k"] = f"there are {len(labels):,} training rows, which all vote where k is larger"
    if "linear" in config.methods:
        linear, l2, chosen = _fitted(config, task, train, labels, device)
        found.append(Score.of("linear probe", linear.guesses(test).numpy(), truth))
        said["linear probe"] = (
            f"logistic regression with bias on vectors standardised by the training rows'; L-BFGS, {linear.iterations} iterations"
            f"{'' if linear.converged else ', NOT converged'}; L2 penalty {l2:g}, {chosen}"
        )
    return found, said


def _fitted(
    config: ClassifyConfig, task: Classification, train: torch.Tensor, labels: np.ndarray, device: str
) -> tuple[LinearClassifier, float, str]:
    """The probe of all training rows with the best penalty, and how that was chosen."""
    penalties, targets = tuple(dict.fromkeys(config.l2)), torch.from_numpy(labels)
    best, chosen = penalties[0], "as given"
    tried = is_held_out([f"l2/{key}" for key in task.train.keys.tolist()], 0.1)
    if len(penalties) > 1 and tried.any() and len(np.unique(labels[~tried])) > 1:
        mask = torch.from_numpy(tried)
        part, part_targets = train[~mask], targets[~mask]
        right = {}
        for l2 in penalties:
            tested = LinearClassifier.fit(part, part_targets, len(task.classes), l2, device=device).guesses(train[mask])
            right[l2] = float((tested[:, 0] == targets[mask]).double().mean())
        best = max(penalties, key=lambda l2: (right[l2], l2))  # of equals, the stronger
        chosen = f"the best of {', '.join(f'{each:g}' for each in penalties)} on {int(tried.sum()):,} of the training rows"
    elif len(penalties) > 1:
        best, chosen = max(penalties), "the strongest, as there are too few training rows to choose on"
    return LinearClassifier.fit(train, targets, len(task.classes), best, device=device), best, chosen


def _shared_images(task: Classification) -> int:
    """Test rows whose image's bytes are also a training row's; rows of old stores have no digests, and aren't counted."""
    digests = [
        rows.store.records(rows.rows, ["digest"])["digest"].to_numpy(zero_copy_only=False) for rows in (task.train, task.test)
    ]
    known = {digest for digest in digests[0] if digest is not None}
    return sum(digest in known for digest in digests[1])


# --- the job ----------------------------------------------------------------------------------------------------------


def main(config: ClassifyConfig) -> Iterator[str]:
    """Classify, write what was found, and say it; with --plan, say what would be done."""
    config.require_used()
    require_out(config.out, "a folder")
    task = classification(config)
    if config.plan:
        with planned(config, config.out):
            displayed = task.train.store.folder.displayed
            yield f"training   {len(task.train.rows):,} rows of {displayed}, {len(task.classes):,} classes"
            yield f"test       {len(task.test.rows):,} rows: {task.split}"
            size = (len(task.train.rows) + len(task.test.rows)) * task.train.level.channels * 4
            yield f"features   {in_words(task.train.store.spec)}; vectors take up to {size / 2**30:.1f} GiB of memory"
            yield from map(str, task.left_out)
            yield NOTHING_RUN
        return
    folder = run_folder(absolute(config.out), config.options, "evaluation")
    identity: dict[str, JsonValue] = {
        "task": "classify",
        **config.counted(),
        "train": task.train.store.root.fingerprint,
        "test": task.test.store.root.fingerprint,
    }
    begin_run(folder, identity, config.public())
    yield write_results(folder, "classify", config.public(), {"spec": task.train.store.spec.to_json()}, _find(config, task))
    yield f"written to {redact(config.out, config.options)}"


def _find(config: ClassifyConfig, task: Classification) -> Findings:
    found, said = scores(config, task)
    spec, truth, n_classes = task.train.store.spec, task.test_labels, len(task.classes)
    most = int(np.bincount(task.train_labels, minlength=n_classes).argmax())
    always = Score.of("commonest class", np.full((len(truth), 1), most), truth)
    lines = tuple(
        Line(
            features=each.name,
            input_px=sides(spec.input_size),
            stride=spec.stride,
            grid=task.train.level.name,
            values=tuple(each.values(truth, n_classes)),
        )
        for each in (*found, always)
    )
    notes = []
    if unknown := int((truth < 0).sum()):
        first = task.test.names[truth < 0][0]
        notes.append(f"{unknown:,} test rows are of classes that no training row has (the first: {first}), and count as wrong")
    if shared := _shared_images(task):
        notes.append(f"{shared:,} test rows are, byte for byte, images of training rows: the scores are too good")
    for note in notes:
        logger.warning("%s", note)
    title = f"Classes ({config.label}) of images by their vector {task.train.level.name}"
    return Findings(
        tables=(Table(title=title, columns=COLUMNS, lines=lines, notes=tuple(notes)),),
        items=Items(
            scored={"test images": len(truth), "training images": len(task.train.rows), "classes": n_classes},
            left_out=task.left_out,
        ),
        choices={
            "backbone": in_words(spec),
            "vector": f"{task.train.level.name} ({task.train.level.method}), {task.train.level.channels} values",
            "test rows": task.split,
            **said,
            "top-5": "a line has it where there are more than five classes",
            "95%": f"bootstrap over test rows, {RESAMPLED:,} draws",
        },
        details={"classes": _by_class(task, found)},
    )


def _by_class(task: Classification, found: Sequence[Score]) -> list[JsonValue]:
    truth, n_classes = task.test_labels, len(task.classes)
    trained = np.bincount(task.train_labels, minlength=n_classes)
    tested = np.bincount(truth[truth >= 0], minlength=n_classes)
    shares = {each.name: each.by_class(truth, n_classes) for each in found}
    return [
        {
            "class": name,
            "training_images": int(trained[i]),
            "test_images": int(tested[i]),
            "top-1": {method: float(share[i]) for method, share in shares.items()},
        }
        for i, name in enumerate(task.classes)
    ]
