"""What the settings of all jobs have in common: how they are declared, held, checked, and saved without secrets.

A job's settings are a frozen dataclass that holds others: `cluster` says where the work is done, and `features` what makes
features (pipelines/features/config.py), so that each setting is declared once. Flags and saved documents know nothing of that:
there, the settings of a job are one flat list of names.

Every setting says with its type whether results depend on it (`Counts`, `Found`, `Free`), and beside which others it is used
where that isn't always (`used_with`). Settings know which of them were given (`JobConfig.given`): one that was asked for is used,
or refused.
"""

import enum
import functools
import json
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import tyro

from cluster.resources import WorkerRequest
from storage.documents import JsonValue
from storage.errors import RayliftError
from storage.inputs import Listing, expand_inputs
from storage.paths import StorageOptions, is_memory, require_whole
from storage.redaction import public_options, redact
from storage.tars import MemberRules
from storage.videos import Sampling


class ConfigError(RayliftError, ValueError):
    """Settings that contradict each other or the model."""


# --- declaring --------------------------------------------------------------------------------------------------------


class Identity(enum.Enum):
    """What a setting means for a result. A training or an evaluation isn't continued under another value that counts; a store
    isn't where the `FeatureSpec`, the input or the layout that come of its settings are others."""

    COUNTS = "its value counts"
    FOUND = "what it names counts, as it is found there: weights and images by their bytes, wherever they lie"
    FREE = "where, how and how far the work is done, and what is reported of it"


T = TypeVar("T")
Counts = Annotated[T, Identity.COUNTS]
Found = Annotated[T, Identity.FOUND]
Free = Annotated[T, Identity.FREE]
Held = Annotated[T, tyro.conf.arg(name="")]
"""Settings that a job's settings hold, whose names have no prefix. `tyro.conf.arg(name=...)` of a single setting is its name in
flags and saved documents, where that isn't the field's."""

_NAMED = type(tyro.conf.arg(name=""))

Unset = Annotated[T, tyro.conf.Suppress, tyro.conf.Fixed]
"""A field of a job's settings that is no setting: flags and documents know nothing of it."""


@dataclass(frozen=True)
class UsedWith:
    """Beside which other settings a setting is used; beside others, nothing looks at it."""

    where: tuple[tuple[str, bool | tuple[JsonValue, ...]], ...]
    "pairs: the name of a setting, or of a property of the job's settings: and whether it is set, or the values that it may have"
    why: str = ""
    "it isn't used without them, or where else; default: as `where` says it"

    def holds(self, config: "JobConfig") -> bool:
        """Whether the others are so."""
        return all(_is_among(config.value(name), wanted) for name, wanted in self.where)

    def __str__(self) -> str:
        return self.why or f"it is used {' and '.join(_beside(name, wanted) for name, wanted in self.where)} only"


def used_with(why: str = "", **where: JsonValue | tuple[JsonValue, ...]) -> UsedWith:
    """A mark of a setting's type: `used_with(task="depth")`, `used_with(method=("deap", "bicubic"))`; True: where that is set
    at all, False: where it isn't."""
    return UsedWith(tuple((name, value if isinstance(value, bool | tuple) else (value,)) for name, value in where.items()), why)


def _is_among(value: object, wanted: bool | tuple[JsonValue, ...]) -> bool:
    return bool(value) == wanted if isinstance(wanted, bool) else value in wanted


def _beside(name: str, wanted: bool | tuple[JsonValue, ...]) -> str:
    if isinstance(wanted, bool):
        return f"{'with' if wanted else 'without'} {flag_of(name)}"
    *others, last = map(str, wanted)
    return f"with {flag_of(name)} {' or '.join([', '.join(others), last] if others else [last])}"


def flag_of(name: str) -> str:
    """A setting's name as command lines have it."""
    return f"--{name.replace('_', '-')}"


def said(name: str, value: object) -> str:
    """A setting with its value as command lines have them."""
    if isinstance(value, bool):
        return flag_of(name if value else f"no_{name}")
    words = value if isinstance(value, tuple) else (value,)
    return " ".join([flag_of(name), *map(str, words)])


def command_of(program: str, config: Mapping[str, JsonValue], usual: Mapping[str, JsonValue]) -> str:
    """The command line that gives settings as documents have them; `usual` are those of the program without flags."""
    given = [said(name, _words(value, usual[name])) for name, value in config.items() if name in usual and value != usual[name]]
    return " ".join([program, *given])


def _words(value: JsonValue, usual: JsonValue) -> bool | tuple[str, ...]:
    """A setting's value as a shell takes it; `usual` is its default. Where that is none, True and False are words."""
    if isinstance(value, bool) and isinstance(usual, bool):
        return value
    return tuple(shlex.quote(str(each)) for each in (value if isinstance(value, list) else [value]))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a job."""

    name: str
    "as flags (with - for _) and saved documents have it"
    path: tuple[str, ...]
    "attributes that lead to it"
    kind: object
    "its type"
    identity: Identity | None
    used_with: UsedWith | None = None
    "None: always"

    def of(self, config: object) -> JsonValue:
        """Its value."""
        value: JsonValue = functools.reduce(getattr, self.path, config)
        return value


@functools.cache
def settings_of(kind: type) -> Mapping[str, Setting]:
    """The settings of a job's class by name, in the order of their fields; those that it holds in the place of what holds
    them."""
    found: dict[str, Setting] = {}
    hints, chosen = get_type_hints(kind, include_extras=True), _type_arguments(kind)
    for each in fields(kind):
        marks = get_args(hints[each.name])[1:]
        if tyro.conf.Suppress in marks:
            continue
        plain = get_args(hints[each.name])[0] if marks else hints[each.name]
        name = next((str(getattr(mark, "name", "")) for mark in marks if isinstance(mark, _NAMED)), each.name)
        if name:
            identity = next((mark for mark in marks if isinstance(mark, Identity)), None)
            beside = next((mark for mark in marks if isinstance(mark, UsedWith)), None)
            kind_of = chosen.get(plain, plain)
            found[name] = Setting(name=name, path=(each.name,), kind=kind_of, identity=identity, used_with=beside)
        else:
            held = settings_of(plain).items()
            found |= {name: replace(setting, path=(each.name, *setting.path)) for name, setting in held}
    return found


def _type_arguments(kind: type) -> dict[Any, Any]:
    """What the type variables of its generic bases stand for."""
    bases = [base for each in kind.__mro__ for base in each.__dict__.get("__orig_bases__", ())]
    pairs = [(get_origin(base), get_args(base)) for base in bases if get_origin(base) not in (None, Generic)]
    return {name: given for origin, arguments in pairs for name, given in zip(origin.__parameters__, arguments, strict=True)}


# --- what is read ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What becomes of shards and keys that can't be taken as they are."""

    empty_shards: Found[Literal["error", "skip"]] = "error"
    """Tars that hold no image, are no tars, or can't be read: an error, or left out and counted."""
    duplicate_keys: Found[Literal["error", "rename"]] = "error"
    """Keys that repeat from shard to shard: an error; or `rename`: the shard's name (and folder, where there are several) is put
    before each key, and image files of folders have their whole names for keys, not only what is before the first dot."""

    def files(self, data: Sequence[str], options: StorageOptions, image: str | None, *, videos: bool = False) -> Listing:
        """What `data` matches, `videos` among it. Raises `InputError`."""
        return expand_inputs(data, options, image, by_place=self.duplicate_keys == "rename", videos=videos)

    def rules(self, image: str | None = None, carry: tuple[str, ...] = (), frames: Sampling | None = None) -> MemberRules:
        """Which members are taken, and how. Raises `InputError` for columns that can't be carried."""
        skip, rename = self.empty_shards == "skip", self.duplicate_keys == "rename"
        return MemberRules(image=image, carry=carry, skip_empty=skip, by_place=rename, frames=frames)


# --- where the work is done -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """The filesystem, and the Ray session."""

    storage_options: Free[str | None] = None
    """JSON for the filesystem, for example '{"endpoint_url": "http://host:9000"}', or one object per scheme. Better for
    secrets: a profile, environment variables, or fsspec's own configuration file."""
    executor: Free[Literal["auto", "ray", "inline"]] = "auto"
    """`inline` runs in this process, without Ray; `auto` is Ray, except for memory:// which only one process can see."""
    ray_address: Free[str | None] = None
    """A Ray cluster; default: the job's own under `ray job submit`, else a new local one."""
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    """`auto` takes GPUs where the cluster has any."""

    @property
    def options(self) -> dict[str, object]:
        """`storage_options` parsed. Raises `ConfigError`."""
        return parse_options(self.storage_options)


@dataclass(frozen=True, kw_only=True)
class GpuConfig(SessionConfig):
    """A Ray session that may have several kinds of GPU."""

    accelerator: Free[str | None] = None
    """Only GPUs of this kind, as Ray calls it: L4, A10G, A100, H100. For clusters with several kinds."""

    def __post_init__(self) -> None:
        if self.accelerator is None:
            return
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.accelerator):
            raise ConfigError(f"--accelerator {self.accelerator!r}: give one kind of GPU as Ray calls it, for example L4")
        if self.device == "cpu" or self.executor == "inline":
            raise ConfigError(f"--accelerator {self.accelerator} chooses among a Ray cluster's GPUs; leave it out on CPU")


@dataclass(frozen=True, kw_only=True)
class ActorsConfig(SessionConfig):
    """A Ray session with a number of actors."""

    actors: Free[int | None] = None
    """Largest number of model actors; default: one per GPU, or per CPU where there is none."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "actors")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(GpuConfig, ActorsConfig):
    """Where actors run that hold a model."""

    actor_cpus: Free[int | None] = None
    """CPUs and threads of one actor; default: 1 on CPU, the node's share per GPU otherwise."""
    actor_gpus: Free[float | None] = None
    """GPUs of one actor; fractions pack several small models onto one."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "actors", "actor_cpus")
        require_gpus(self.actor_gpus, "--actor-gpus")
        super().__post_init__()

    def request(self, *, spare_cpu: bool = False) -> WorkerRequest:
        """The actors that are asked for; `spare_cpu` leaves a CPU for tasks beside them."""
        return WorkerRequest(
            device=self.device,
            actors=self.actors,
            cpus=self.actor_cpus,
            gpus=self.actor_gpus,
            accelerator=self.accelerator,
            spare_cpu=spare_cpu,
        )


# --- a job ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings of one job. `of` and `changed` take those that it holds by their own names, as flags do."""

    cluster: Held[SessionConfig] = SessionConfig()
    given: Unset[frozenset[str]] = field(default=frozenset(), compare=False, repr=False)
    "names of the settings that were said, by flags or with `of` and `changed`, be it with their default's value; see `is_given`"

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.cluster.executor == "ray":
            require_shareable(*self.places)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The settings with these values. Raises `TypeError` for names that there aren't, and `ConfigError`."""
        return cls().changed(**settings)

    def changed(self, **settings: Any) -> Self:
        """These settings with other values, as `of`."""
        known = settings_of(type(self))
        own: dict[str, Any] = {}
        held: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no setting {name}")
            first, *rest = known[name].path
            if rest:
                held.setdefault(first, {})[rest[0]] = value
            else:
                own[first] = value
        own |= {first: replace(getattr(self, first), **held[first]) for first in held}
        return replace(self, given=self.given.union(settings), **own)

    def noting(self, names: Collection[str]) -> Self:
        """These settings, of which those of `names` were given; `cell.batch` is one of the settings that `cell` holds."""
        dotted = [name.split(".", 1) for name in names if "." in name]
        held = {first: getattr(self, first).noting([rest for at, rest in dotted if at == first]) for first, _ in dotted}
        return replace(self, given=self.given.union(name for name in names if "." not in name), **held)

    def is_given(self, name: str) -> bool:
        """Whether a setting was asked for: it was given, or has another value than without anyone's word."""
        return name in self.given or self.value(name) != type(self)().value(name)

    def value(self, name: str) -> JsonValue:
        """Of a setting, or of a property, by name."""
        known = settings_of(type(self))
        found: JsonValue = known[name].of(self) if name in known else getattr(self, name)
        return found

    def without_use(self) -> dict[str, UsedWith]:
        """The settings that nothing looks at beside the others, whatever their values are, and where they are used."""
        marked = {name: setting.used_with for name, setting in settings_of(type(self)).items() if setting.used_with}
        return {name: used_with for name, used_with in marked.items() if not used_with.holds(self)}

    def unused(self) -> dict[str, UsedWith]:
        """Those of `without_use` that have another value than by default."""
        plain = type(self)()
        return {name: used_with for name, used_with in self.without_use().items() if self.value(name) != plain.value(name)}

    def require_used(self) -> None:
        """Raises `ConfigError` for a setting that nothing looks at beside the others."""
        for name, beside in self.unused().items():
            asked, back = (redact(said(name, config.value(name)), self.options) for config in (self, type(self)()))
            raise ConfigError(f"{asked} would change nothing: {beside}. Leave it out; where a preset sets it, say {back}")

    def flat(self) -> dict[str, JsonValue]:
        """All settings by name."""
        return {name: setting.of(self) for name, setting in settings_of(type(self)).items()}

    def public(self) -> dict[str, JsonValue]:
        """All settings as JSON values without credentials, for files and logs."""
        values = self.flat()
        if values["storage_options"]:
            values["storage_options"] = json.dumps(public_options(self.options))
        return {name: _redacted(value, self.options) for name, value in json.loads(json.dumps(values)).items()}

    def counted(self, *features: Identity) -> dict[str, JsonValue]:
        """Its own settings whose value counts, as `public` has them, and the settings of `features` that are marked so."""
        known, public = settings_of(type(self)), self.public()
        return {
            name: public[name]
            for name, setting in known.items()
            if setting.identity in (features if setting.path[0] == "features" else (Identity.COUNTS,))
        }

    @property
    def options(self) -> dict[str, object]:
        """`storage_options` parsed. Raises `ConfigError`."""
        return self.cluster.options

    @property
    def places(self) -> tuple[str, ...]:
        """The URLs that workers read and write."""
        raise NotImplementedError

    @property
    def is_inline(self) -> bool:
        """Whether this process does the work: where it was asked to, or other ones can't see the URLs."""
        return self.cluster.executor == "inline" or (self.cluster.executor == "auto" and any(map(is_memory, self.places)))


def _redacted(value: JsonValue, options: StorageOptions) -> JsonValue:
    """JSON values with credentials blanked in every text."""
    if isinstance(value, str):
        return redact(value, options)
    if isinstance(value, Mapping):
        return {name: _redacted(each, options) for name, each in value.items()}
    return [_redacted(each, options) for each in value] if isinstance(value, list) else value


# --- checking ---------------------------------------------------------------------------------------------------------


def require_at_least(least: float, config: object, *names: str) -> None:
    """Raises `ConfigError` for a setting, or one of its values, below `least`; None means that it wasn't given."""
    for name in names:
        value = getattr(config, name)
        for each in value if isinstance(value, tuple) else [value]:
            if each is not None and each < least:
                raise ConfigError(f"{flag_of(name)} {each}: must be at least {least}")


def require_above(least: float, config: object, *names: str) -> None:
    """Raises `ConfigError` for a setting that isn't above `least`; None means that it wasn't given."""
    for name in names:
        if (value := getattr(config, name)) is not None and not value > least:  # NaN isn't
            raise ConfigError(f"{flag_of(name)} {value}: must be above {least}")


def require_numbers(config: object) -> None:
    """Raises `ConfigError` for a setting, or one of its values, that is NaN or infinite, which comparisons don't find and
    trainings go on with; and for whole numbers that 64 bits don't hold, as libraries have them."""
    for name, setting in settings_of(type(config)).items():
        value = setting.of(config)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ConfigError(f"{flag_of(name)} {each}: must be a finite number")
            if isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ConfigError(f"{flag_of(name)} {each}: must be below 2**63")


def require_gpus(gpus: float | None, flag: str) -> None:
    """Raises `ConfigError` for GPUs of one worker that Ray can't give."""
    if gpus is not None and not (0 < gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise ConfigError(f"{flag} {gpus:g}: must be a part of one GPU, or a whole number of them")


def require_out(out: str, what: str) -> None:
    """Raises `ConfigError` where no output is named, or the disk's root, as with variables that aren't set; `what` is to be
    given."""
    if not out.strip():
        raise ConfigError(f"no output: give --out {what}")
    if set(out) == {"/"}:
        raise ConfigError(f"--out {out} is the disk's root, as with a variable that isn't set; give --out {what}")


def require_shareable(*urls: str) -> None:
    """Raises `ConfigError` for a URL that other processes can't see."""
    if any(map(is_memory, urls)):
        raise ConfigError("memory:// can be seen by one process only; use --executor inline, or another URL")


def absolute(url: str) -> str:
    """A path so that other processes on this machine, with other working directories, find it, too. Raises `InputError`."""
    require_whole(url)
    return url if "://" in url else str(Path(url).expanduser().resolve())


def parse_options(text: str | None) -> dict[str, object]:
    """--storage-options parsed. Raises `ConfigError`, without repeating the text: it may hold secrets."""
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"--storage-options is not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(options, dict):
        raise ConfigError("--storage-options must be a JSON object")
    return options
