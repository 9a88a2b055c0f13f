"""Weights of backbones and upsamplers from wherever they are: the hub, its cache, a file or folder at any URL, or a seed.

Nothing is unpickled. Every way that weights can be missing ends in `WeightsUnavailable`, which says what to do.
"""

import argparse
import io
import json
import pickle
import re
import socket
import struct
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor

from operators.lean_timm import timm
from operators.official_weights import recognise
from operators.timm_models import BackboneError, create_model, preprocessing
from operators.vitdet import named as vitdet
from operators.vitdet.checkpoint import unpickled
from operators.vitdet.settings import DetectorError
from pipelines.features.descriptions import CONFIG, ModelDescription, describe_official, describe_weights, warn_of_statistics
from storage.documents import JsonObject, as_object
from storage.errors import RayliftError
from storage.paths import Folder, StorageError, StorageOptions, has_extension, read_file
from storage.redaction import redact
from storage.runs import named_checkpoint


class WeightsUnavailable(RayliftError):
    """The weights can't be had; the message says what to do."""


WEIGHT_FILES = ("safetensors", "pth", "pt", "bin", "ckpt", "pth.tar", "pkl")
"""Extensions of files that hold weights; any other URL is a folder with one of WEIGHT_NAMES."""

WEIGHT_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""What weights are called in a hub repository or a folder; the first one that is there is read."""


@dataclass(frozen=True, kw_only=True)
class WeightsChoice:
    """`pretrained`, `random[:seed]`, or a file or folder at a path or URL, parsed from `--weights`."""

    source: Literal["pretrained", "file", "random"]
    url: str = ""
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "WeightsChoice":
        if text == "pretrained":
            return cls(source="pretrained")
        if (match := re.fullmatch(r"random(?::([0-9]+))?", text)) and (seed := int((match[1] or "0")[:20])) < 2**63:
            return cls(source="random", seed=seed)
        if text.startswith("random:"):
            raise WeightsUnavailable(
                f"--weights {text}: the seed is a whole number, as in random:1, and below 2**63; a file of that name: ./{text}"
            )
        return cls(source="file", url=text)


def best_of_run(name: str, weights: WeightsChoice, options: StorageOptions | None) -> WeightsChoice:
    """Where a detector's training run is named, of which `name` is a backbone, its best checkpoint. Raises `CheckpointError`."""
    is_folder = weights.source == "file" and not has_extension(weights.url, *WEIGHT_FILES)
    if not is_folder or name not in vitdet.NAMES.values():
        return weights
    return replace(weights, url=named_checkpoint(weights.url, options).url)


def read_description(name: str, weights: WeightsChoice, options: StorageOptions | None) -> ModelDescription:
    """What the model expects, and how its network is built: as timm has it for `name`, or as the weights' own folder says.

    Raises `BackboneError`.
    """
    folder = _folder_of_weights(weights, options)
    if folder is None:
        return ModelDescription(name=name, expects=preprocessing(name))
    return describe_weights(name, folder, is_file=has_extension(weights.url, *WEIGHT_FILES))


def stated_license(name: str, weights: WeightsChoice, options: StorageOptions | None) -> str:
    """The weights' licence as timm's config states it, of a file as the config.json beside it does; empty where none is."""
    if weights.source == "pretrained":
        known = timm.get_pretrained_cfg(name)
        return str(known.license or "") if known else ""
    folder = _folder_of_weights(weights, options)
    try:
        config = as_object(json.loads(folder.read(CONFIG))) if folder else {}
        return str(as_object(config.get("pretrained_cfg") or config).get("license") or "")
    except (OSError, StorageError, ValueError):
        return ""


def _folder_of_weights(weights: WeightsChoice, options: StorageOptions | None) -> Folder | None:
    """Where files lie that say what weights are; None where there are none to be read."""
    path, _, query = weights.url.partition("?") if "://" in weights.url else (weights.url, "", "")
    if weights.source != "file" or query:  # a signature is for one object
        return None
    parent, slash, _ = path.rpartition("/")
    return Folder(parent or slash or "." if has_extension(path, *WEIGHT_FILES) else path, options)


def load_model(
    name: str, size: tuple[int, int], weights: WeightsChoice, revision: str | None, options: StorageOptions | None
) -> torch.nn.Module:
    """The timm model with its weights, on the CPU. Raises `WeightsUnavailable` or `BackboneError`."""
    return load_described(name, size, weights, revision, options, read_description(name, weights, options))[0]


def load_described(
    name: str,
    size: tuple[int, int],
    weights: WeightsChoice,
    revision: str | None,
    options: StorageOptions | None,
    description: ModelDescription,
) -> tuple[torch.nn.Module, ModelDescription]:
    """`load_model`, and `description` (`read_description`) with what a file of weights tells beyond it.

    Raises `WeightsUnavailable` or `BackboneError`.
    """
    if weights.source == "random":
        return create_model(name, size, None, weights.seed), description
    if weights.source == "pretrained":
        return create_model(name, size, _hub_state_dict(name, revision), None), description
    state: Mapping[str, Tensor] = read_state_dict(weights.url, options)
    try:
        if official := recognise(state):
            description, state = describe_official(description, official)
        else:
            warn_of_statistics(description, state)
    except BackboneError as error:
        raise BackboneError(f"{redact(weights.url, options)}: {error}") from None
    return create_model(name, size, state, None, description.model_args), description


def read_state_dict(url: str, options: StorageOptions | None = None) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or torch file, of a `.pkl` of arrays, or of a folder that holds one of WEIGHT_NAMES, at a URL.

    Torch files are read with weights_only=True, and of a pickle nothing is called but what makes arrays. Raises
    `WeightsUnavailable`.
    """
    displayed = redact(url, options)
    if not has_extension(url, *WEIGHT_FILES):
        folder = Folder(url, options)
        name, data = _read_first(folder, displayed)
        return _parse_state_dict(data, displayed, is_safetensors=has_extension(name, "safetensors"))
    try:
        data = read_file(url, options)
    except FileNotFoundError as error:
        raise WeightsUnavailable(f"no weights at {displayed}: {error}") from None
    if has_extension(url, "pkl"):
        try:
            return unpickled(data)
        except DetectorError as error:
            raise WeightsUnavailable(f"{displayed}: {error}") from None
    return _parse_state_dict(data, displayed, is_safetensors=has_extension(url, "safetensors"))


def _read_first(folder: Folder, displayed: str) -> tuple[str, bytes]:
    """Name and bytes of the folder's weights. Raises `WeightsUnavailable`, which says what is there instead."""
    for name in WEIGHT_NAMES:
        try:
            return name, folder.read(name)
        except FileNotFoundError:
            continue
    try:
        there = sorted(folder.sizes(""))
    except (StorageError, OSError):  # web servers and some buckets list nothing
        there = []
    holds = f"; it holds {', '.join(there[:8])}{' ...' if len(there) > 8 else ''}" if there else ""
    if any(name.endswith(".index.json") for name in there):
        holds += ". Weights in several files aren't read: join them"
    raise WeightsUnavailable(
        f"no weights at {displayed}: {WEIGHT_NAMES[0]} does not exist, nor {', '.join(WEIGHT_NAMES[1:])}{holds}"
    )


def read_config(folder: Folder, entry: str) -> JsonObject:
    """A checkpoint's config.json, which must have settings of `entry`: what it is of. Raises `WeightsUnavailable`."""
    try:
        config = json.loads(folder.read("config.json"))
    except FileNotFoundError:
        raise WeightsUnavailable(f"{folder.displayed} has weights but no config.json, which says what they are") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or one within the other without end
        raise WeightsUnavailable(f"{folder.displayed} is no trained {entry}: {type(error).__name__}: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get(entry), dict):
        has = ", ".join(config) if isinstance(config, dict) else ""
        raise WeightsUnavailable(
            f"{folder.displayed} is no trained {entry}: its config.json has no settings of a {entry}"
            + (f"; it has {has}" if has else "")
        )
    return config


def _parse_state_dict(data: bytes, displayed: str, *, is_safetensors: bool) -> dict[str, Tensor]:
    if is_safetensors:
        try:
            return _unwrapped(safetensors.torch.load(data), displayed)
        except safetensors.SafetensorError as error:
            raise WeightsUnavailable(f"{displayed} is no whole safetensors file: {error}") from None
    _require_torch_file(data, displayed)
    try:
        # Training checkpoints often hold the program's arguments: a bag of attributes, which executes nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, struct.error) as error:
        # torch advises over several lines; which object it met is in one of them.
        met = re.search(r"Unsupported \w+: [^\n]*?(?= was |\n|$)", str(error))
        reason = met[0] if met else str(error).partition("\n")[0]
        raise WeightsUnavailable(
            f"{displayed} can't be read as plain tensors (weights_only): {type(error).__name__}: {reason}. Where you "
            "trust it, save its tensors apart: safetensors.torch.save_file(torch.load(FILE, weights_only=False)['state_dict'], "
            "'weights.safetensors')"
        ) from None
    for key in ("state_dict", "model", "teacher", "jafar"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        held = ", ".join(map(str, loaded)) if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise WeightsUnavailable(
            f"{displayed} holds no state dict of tensors, alone or under state_dict, model or teacher; it holds "
            + textwrap.shorten(held or "nothing", 200, placeholder=" ...")
        )
    return _unwrapped(loaded, displayed)


def _require_torch_file(data: bytes, displayed: str) -> None:
    """Raises `WeightsUnavailable` for what begins neither as a zip nor as a pickle or a tar, as torch's files do."""
    if data[:2] == b"PK" or data[:1] == b"\x80" or data[257:262] == b"ustar":
        return
    if data.startswith(b"version https://git-lfs"):
        raise WeightsUnavailable(f"{displayed} is a pointer of Git LFS, not the file itself; fetch that (git lfs pull)")
    raise WeightsUnavailable(
        f"{displayed} is no file of torch's: it "
        + (f"begins with {textwrap.shorten(repr(data[:60]), 80, placeholder=' ...')}" if data else "is empty")
        + "; download it again"
    )


_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")
"""What torch's parallel and compiled modules put before names."""


def _unwrapped(state: Mapping[str, Tensor], displayed: str) -> dict[str, Tensor]:
    """Without what wrappers put before names. Raises `WeightsUnavailable` where two names become one."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = _WRAPPED.sub("", name)
        if plain in found:
            raise WeightsUnavailable(f"{displayed} holds {plain} twice, once as a wrapped module; save one of them")
        found[plain] = value.detach()
    return found


def _hub_state_dict(name: str, revision: str | None) -> dict[str, Tensor]:
    """The hub's file for a timm name: from the local cache where it is there, else downloaded."""
    config = timm.get_pretrained_cfg(name)
    repo = config.hf_hub_id if config else None
    if not repo:
        raise WeightsUnavailable(
            f"timm knows no hub repository for {name}; give --weights a file"
            + (f", or a name with a tag such as {name}.<tag>" if timm.list_pretrained(f"{name}.*") else "")
        )
    repo, _, pinned = repo.partition("@")
    revision = revision or pinned or None
    advice = f"Fetch it where there is a network (hf download {repo}) and give --weights the folder, or use --weights random"
    for file in (config.hf_hub_filename,) if getattr(config, "hf_hub_filename", None) else WEIGHT_NAMES:
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return _parse_state_dict(Path(cached).read_bytes(), cached, is_safetensors=file.endswith(".safetensors"))
    _require_host(huggingface_hub.constants.ENDPOINT, f"pretrained weights of {name}", advice)
    error: Exception | None = None
    for file in WEIGHT_NAMES:
        try:
            path = huggingface_hub.hf_hub_download(repo, file, revision=revision)
            return _parse_state_dict(Path(path).read_bytes(), path, is_safetensors=file.endswith(".safetensors"))
        except GatedRepoError:
            page = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
            raise WeightsUnavailable(f"{repo} is gated: accept its terms at {page}, then `hf auth login`") from None
        except RepositoryNotFoundError:
            raise WeightsUnavailable(f"the hub has no repository {repo} (or it is private). {advice}") from None
        except LocalEntryNotFoundError as caught:
            raise WeightsUnavailable(f"pretrained weights of {name} can't be reached: {caught}. {advice}") from None
        except HfHubHTTPError as caught:
            error = caught
    raise WeightsUnavailable(f"none of {', '.join(WEIGHT_NAMES)} could be had from {repo}: {error}. {advice}")


def _require_host(endpoint: str, what: str, advice: str) -> None:
    """Fail at once where the hub's name does not resolve; its client would retry for most of a minute."""
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    if urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise WeightsUnavailable(f"{what} can't be reached: no network to {host} ({error.strerror or error}). {advice}") from None
