"""A data set repository of the Hugging Face hub as a place that stores are copied to (storage/copies.py), by `huggingface_hub`.

Not by its `upload_large_folder`: that commits files in an order of its own, so that a reader could meet a root document before
what it describes, and keeps its state in the folder that it uploads.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.paths import Folder, InputError, Stat, StorageError, StorageOptions, filesystem
from storage.reachable import why_endpoint_unreachable
from storage.redaction import redact

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

SCHEME = "hf://"

_FILES_OF_COMMIT = 1000
"""Files of one commit: a repository takes some hundred commits an hour."""

_FORM = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<folder>.+?))?/*")


@dataclass(frozen=True)
class _Held:
    """What the hub says of a file's content: sha256 of large ones, git's name of others."""

    sha256: str
    blob: str

    def is_of(self, data: bytes) -> bool:
        """Whether it's these bytes."""
        if self.sha256:
            return hashlib.sha256(data).hexdigest() == self.sha256
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == self.blob


class HubPlace:
    """A folder of a data set's repository, or all of it: `hf://datasets/USER/NAME[@REVISION][/FOLDER]`.

    A repository that isn't there is made, private unless `public`. What was sent is committed by the thousand: of a copying that
    died in between, the hub has the large files' content by then, and isn't sent it again.
    """

    def __init__(self, url: str, options: StorageOptions | None = None, *, public: bool = False):
        form = _FORM.fullmatch(url)
        if form is None:
            raise InputError(f"{redact(url)}: a place on the hub is hf://datasets/USER/NAME, and perhaps /FOLDER")
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # a line for each part is said anyway
        self._fs, _ = filesystem(SCHEME, options)
        self._folder = Folder(url, options)
        self._repo, self._revision = form["repo"], form["revision"]
        self._prefix = f"{form['folder']}/" if form["folder"] else ""
        self._api = huggingface_hub.HfApi(endpoint=self._fs.endpoint, token=self._fs.token)
        self._public = public
        self._held: dict[str, _Held] = {}
        self._operations: list[CommitOperationAdd] = []

    @property
    def displayed(self) -> str:
        return self._folder.displayed

    def listed(self) -> Mapping[str, Stat]:
        from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        found: dict[str, Stat] = {}
        folder = self._prefix.rstrip("/") or None
        with self._reaching():
            try:
                files = self._api.list_repo_tree(self._repo, folder, recursive=True, revision=self._revision, repo_type="dataset")
                for each in files:
                    if isinstance(each, RepoFile):
                        name = each.path.removeprefix(self._prefix)
                        found[name] = Stat(each.size)
                        self._held[name] = _Held(each.lfs.sha256 if each.lfs else "", each.blob_id)
            except RemoteEntryNotFoundError:
                pass
            except RepositoryNotFoundError:
                self._api.create_repo(self._repo, repo_type="dataset", private=not self._public, exist_ok=True)
        return found

    def has(self, name: str) -> bool:
        with self._reaching():
            return self._api.file_exists(self._repo, self._prefix + name, repo_type="dataset", revision=self._revision)

    def read(self, name: str) -> bytes:
        return self._folder.read(name)

    def holds(self, name: str, data: bytes) -> bool:
        return self._held[name].is_of(data)

    def send(self, objects: Sequence[tuple[str, bytes]]) -> None:
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(self._prefix + name, data) for name, data in objects]
        with self._reaching():
            # Takes the content out of memory, but for what goes into the commit itself.
            self._api.preupload_lfs_files(self._repo, added, repo_type="dataset", revision=self._revision)
        self._operations += added
        if len(self._operations) >= _FILES_OF_COMMIT:
            self.settle()

    def settle(self) -> None:
        if self._operations:
            self._commit(self._operations, f"{len(self._operations)} files of a feature store")
            self._operations = []

    def remove(self, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        for start in range(0, len(names), _FILES_OF_COMMIT):
            some = names[start : start + _FILES_OF_COMMIT]
            self._commit([CommitOperationDelete(self._prefix + name) for name in some], f"{len(some)} files fewer")

    def _commit(self, operations: "Sequence[CommitOperationAdd | CommitOperationDelete]", message: str) -> None:
        with self._reaching():
            self._api.create_commit(self._repo, operations, commit_message=message, repo_type="dataset", revision=self._revision)
        self._fs.invalidate_cache()  # whoever reads from there in this process has listings of before

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what the hub and its client say into one sentence."""
        if reason := why_endpoint_unreachable(self._api.endpoint):
            raise StorageError(f"{self.displayed} can't be reached: {reason}; check the network, and HF_ENDPOINT")
        from huggingface_hub import errors

        try:
            yield
        except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.RevisionNotFoundError) as error:
            raise StorageError(
                f"{self.displayed}: there is none, or it isn't open to you ({_first_line(error)}); `hf auth login`, or give a "
                'token by --storage-options \'{"hf": {"token": ...}}\''
            ) from None
        except errors.HfHubHTTPError as error:
            refused = error.response.status_code in (401, 403)
            advice = "`hf auth login` with a token that may write there" if refused else "the same command goes on"
            raise StorageError(f"{self.displayed}: {redact(_first_line(error), self._folder.options)}; {advice}") from None
        # The first is of the HTTP library, which is another one in other versions.
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # type: ignore[attr-defined]
            # What failed in a thread of its own stands behind the client's word that something did.
            said = ": ".join(_first_line(each) for each in (error, error.__cause__) if each)
            raise StorageError(
                f"{self.displayed}: {redact(said, self._folder.options)} ({type(error).__name__}); the same command goes on"
            ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The client names the endpoint on a line of its own, and the server's word follows.
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1]) or type(error).__name__
