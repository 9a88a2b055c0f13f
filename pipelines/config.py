"""What the settings of all jobs have in common: how they are checked, and shown without secrets."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from storage.errors import RayliftError
from storage.paths import is_memory, public_options, redact


class ConfigError(RayliftError, ValueError):
    """Settings that contradict each other or the model."""


def require_at_least(least: float, config: Any, *names: str) -> None:
    """Raises `ConfigError` for a setting, or one of its values, below `least`; None means that it wasn't given."""
    for name in names:
        value = getattr(config, name)
        for each in value if isinstance(value, tuple) else [value]:
            if each is not None and each < least:
                raise ConfigError(f"--{name.replace('_', '-')} {each}: must be at least {least}")


def require_gpus(config: Any, gpus: float | None = None, flag: str = "") -> None:
    """Raises `ConfigError` for GPUs of one worker that Ray can't give, and for a kind of GPU where none is used.

    `config` has `device`, `executor` and `accelerator`."""
    if gpus is not None and not (0 < gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise ConfigError(f"{flag} {gpus:g}: must be a part of one GPU, or a whole number of them")
    if config.accelerator is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.accelerator):
        raise ConfigError(f"--accelerator {config.accelerator!r}: give one kind of GPU as Ray calls it, for example L4")
    if config.device == "cpu" or config.executor == "inline":
        raise ConfigError(f"--accelerator {config.accelerator} chooses among a Ray cluster's GPUs; leave it out on CPU")


def require_shareable(*urls: str) -> None:
    """Raises `ConfigError` for a URL that other processes can't see."""
    if any(map(is_memory, urls)):
        raise ConfigError("memory:// can be seen by one process only; use --executor inline, or another URL")


def runs_inline(executor: str, *urls: str) -> bool:
    """Whether this process does the work: where it was told to, or other ones can't see the URLs."""
    return executor == "inline" or (executor == "auto" and any(map(is_memory, urls)))


def absolute(url: str) -> str:
    """A path so that other processes on this machine, with other working directories, find it, too."""
    return url if "://" in url else str(Path(url).expanduser().resolve())


def public_settings(config: Any, *urls: str) -> dict[str, Any]:
    """All fields of a config as JSON values, without credentials; `urls` are those that hold a URL, or several."""
    shown = {f.name: getattr(config, f.name) for f in fields(config)}
    if config.storage_options:
        shown["storage_options"] = json.dumps(public_options(config.options))
    for name in urls:
        value = shown[name]
        shown[name] = (
            redact(value, config.options) if isinstance(value, str) else [redact(u, config.options) for u in value]
        )
    return json.loads(json.dumps(shown))


def parse_options(text: str | None) -> dict[str, Any]:
    """--storage-options parsed. Raises `ConfigError`, without repeating the text: it may hold secrets."""
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"--storage-options is not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(options, dict):
        raise ConfigError("--storage-options must be a JSON object")
    return options
