"""Pushes a model to the Hub in a single commit."""

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from flip_hf.checkpoint.loading_code import add_loading_code
from flip_hf.hub.card import is_untouched, marked, public_record, render_card
from flip_hf.standard_json import measures_json

WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each further attempt, unless the Hub asks to wait longer."""

SUFFIXES = frozenset({".safetensors", ".json", ".parquet", ".md", ".png", ".py", ".txt", ".model", ".jinja"})
"""The kinds of files that may be pushed: weights, settings, the vocabulary, the card, pictures, the loading code and
files of tokenizers. None of these formats runs code when it is read."""

MAX_SHARD_SIZE = "5GB"

_CARD, _RECORD = "README.md", "run.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_TRANSIENT = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
# The HTTP library's base class for error responses and broken connections.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubRepo:
    """A branch of a Hub repository to push to.

    If the Hub is busy (429), fails (5xx) or is unreachable, each call is retried with growing delays.

    Attributes:
        repo_id: name of the repository, such as `org/name`.
        private: whether the repository must be private.
        revision: name of the branch, created from `main` if needed.
        token: token with write access; the default is that of `hf auth login`.
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    token: str | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Creates the repository and the branch if they do not exist.

        Raises:
            ValueError: `private` is set, but the repository is public.
            OSError: the Hub refuses, for example without a token, or is unreachable.
        """
        api = self._api
        _retried(
            f"creating {self.repo_id}",
            lambda: api.create_repo(self.repo_id, private=self.private or None, exist_ok=True),
        )
        if self.private:
            info = _retried(f"reading the settings of {self.repo_id}", lambda: api.repo_info(self.repo_id))
            if not info.private:
                raise ValueError(
                    f"private is set, but {self.repo_id} is public: change its visibility in its settings on the Hub, "
                    "or push to another repository"
                )
        if self.revision != "main":
            _retried(
                f"creating the branch {self.revision}",
                lambda: api.create_branch(self.repo_id, branch=self.revision, exist_ok=True),
            )

    def push(self, folder: Path, message: str, description: str | None = None) -> str:
        """Uploads a folder in a single commit; makes no commit if nothing has changed.

        If the folder holds weights, the commit deletes other weight files on the branch, because old shards would mix
        with the new ones. It keeps all other files on the branch, and a model card that somebody has edited.

        Args:
            folder: folder to push; all files are checked before the first is sent.
            message: message of the commit.
            description: description of the commit, below its message.

        Returns:
            The hash of the branch's latest commit.

        Raises:
            ValueError: the folder holds a file of a kind that must not be pushed, or a token.
            OSError: the Hub refuses or is unreachable.
        """
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        check_publishable(files, self.token)

        def commit() -> str:
            api = self._api
            head: str = api.repo_info(self.repo_id, revision=self.revision).sha or ""
            there = set(api.list_repo_files(self.repo_id, revision=head))
            operations: list[Any] = [
                CommitOperationAdd(name, path)
                for name, path in files.items()
                if name != _CARD or _CARD not in there or self._may_replace_card(head)
            ]
            if any(map(_WEIGHTS.fullmatch, files)):
                operations += [
                    CommitOperationDelete(name) for name in sorted(there - set(files)) if _WEIGHTS.fullmatch(name)
                ]
            # If the response is lost, retrying makes no second commit, because the client skips unchanged files. With
            # `parent_commit`, only one of two simultaneous pushes succeeds.
            done = api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                revision=self.revision,
                parent_commit=head,
            )
            return done.oid

        return _retried(f"pushing to {self.repo_id}", commit)

    @property
    def _api(self) -> HfApi:
        return HfApi(token=self.token, library_name="flip_hf")

    def _may_replace_card(self, head: str) -> bool:
        path = hf_hub_download(self.repo_id, _CARD, revision=head, token=self.token)
        if is_untouched(Path(path).read_text(encoding="utf-8")):
            return True
        logger.warning(
            "%s keeps its README.md, because flip_hf did not write it or somebody has edited it", self.repo_id
        )
        return False


def push_to_hub(
    repo_id: str,
    *,
    model: Any = None,
    processor: Any = None,
    record: Mapping[str, Any] | None = None,
    card: str | None = None,
    pictures: Mapping[Path, str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Push a FLIP model",
    commit_description: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
) -> str:
    """Pushes a model, its processor, a model card and the loading code to the Hub, in one commit.

    Without `processor`, it pushes only the model's files and logs a warning, because the model can't score rows without
    a processor. Without `model`, it pushes only the processor's files. Other files in the repository do not change.

    Args:
        repo_id: name of the repository, such as `org/name`.
        model: any FLIP model.
        processor: the model's processor.
        record: record of a run (`run.json`), from which the card is written.
        card: your own model card, in Markdown, instead of one from the record. With neither `card` nor `record`, no
            card is written.
        pictures: PNG files for the card from the record, with their captions.
        private: whether the repository must be private.
        revision: branch to push to, created if needed; the default is "main".
        token: token with write access; None and True use that of `hf auth login`.
        commit_message: message of the commit.
        commit_description: description of the commit, below its message.
        max_shard_size: maximum size of a weights file; larger weights are split into shards. A single tensor is never
            split.
        create_pr: must be False, because retrying would open another pull request.
        tags: must be None, because flip_hf sets the tags of the card.

    Returns:
        The hash of the commit.

    Raises:
        ValueError: as in `HubRepo.prepare` and `HubRepo.push`; `model` and `processor` are both None; or `create_pr`,
            `tags` or `token=False` is given.
        OSError: the Hub refuses, or is unreachable after several attempts.
    """
    if model is None and processor is None:
        raise ValueError("nothing to push: pass model, processor or both")
    if create_pr:
        raise ValueError(
            "create_pr is not supported, because retrying would open another pull request; push to a branch with "
            "revision='...', and open a pull request from there"
        )
    if tags:
        raise ValueError("tags is not supported, because the card has its own; pass card, or edit the card on the Hub")
    if token is False:
        raise ValueError("token=False: a push needs a token with write access; leave it out to use your login's token")
    repo = HubRepo(repo_id, bool(private), revision or "main", None if token is True else token)

    def save(folder: Path) -> None:
        for part in (model, processor):
            if part is not None:
                part.save_pretrained(folder, max_shard_size=max_shard_size)

    repo.prepare()
    with tempfile.TemporaryDirectory() as name:
        stage(Path(name), save, repo_id, record, pictures or {})
        if card is not None:
            (Path(name) / _CARD).write_text(marked(card), encoding="utf-8")
        commit = repo.push(Path(name), commit_message, commit_description)
    if processor is None:
        logger.warning(
            "%s has the model without its processor. Push the processor too: processor.push_to_hub(%r). Next time, "
            "push both: model.push_to_hub(%r, processor=processor)",
            *[repo_id] * 3,
        )
    return commit


def stage(
    folder: Path,
    save: Callable[[Path], object],
    repo_id: str,
    record: Mapping[str, Any] | None,
    pictures: Mapping[Path, str],
) -> None:
    """Fills a folder with all files to push.

    Args:
        folder: an empty folder.
        save: writes the model, its processor or both into the folder.
        repo_id: name of the repository that the folder will be pushed to.
        record: as in `push_to_hub`.
        pictures: as in `push_to_hub`; missing files are skipped.
    """
    save(folder)
    add_loading_code(folder)
    if record is not None:
        write_card(folder, repo_id, record, pictures)


def write_card(folder: Path, repo_id: str, record: Mapping[str, Any], pictures: Mapping[Path, str]) -> None:
    """Writes a model card, its pictures and the record to a folder; arguments as in `stage`."""
    shown = {path: caption for path, caption in pictures.items() if path.exists()}
    for path in shown:
        shutil.copyfile(path, folder / path.name)
    captions = {path.name: caption for path, caption in shown.items()}
    (folder / _CARD).write_text(render_card(record, repo_id, captions), encoding="utf-8")
    text = measures_json(public_record(record), indent=2, ensure_ascii=False)
    (folder / _RECORD).write_text(text + "\n", encoding="utf-8")


def check_publishable(files: Mapping[str, Path], token: str | None = None) -> None:
    """Raises ValueError if a file is of a kind that must not be pushed, or contains a Hub token.

    Args:
        files: the files by their names in the repository.
        token: a token to look for, besides strings that look like Hub tokens.
    """
    secrets = {secret.encode() for secret in (token, get_token()) if secret}
    for name, path in files.items():
        if path.is_symlink() or path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: {name!r} must not be pushed to a model repository; remove it")
        if path.suffix in (".safetensors", ".parquet", ".png"):
            continue
        content = path.read_bytes()
        if _TOKEN.search(content) or any(secret in content for secret in secrets):
            raise ValueError(f"{path} contains a Hub token; remove the token, and revoke it if it was shared")


def _retried(what: str, call: Callable[[], T]) -> T:
    for wait in (*WAITS_SECONDS, None):
        try:
            return call()
        except _CLIENT_ERROR as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code not in _TRANSIENT:
                raise
            if wait is None:
                raise ConnectionError(f"{what} failed {len(WAITS_SECONDS) + 1} times; last error: {error}") from error
            told = response.headers.get("Retry-After", "") if response is not None else ""
            wait = max(wait, float(told)) if told.isdigit() else wait
            logger.warning("%s failed (%s); retrying in %.0f s", what, str(error).splitlines()[0], wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
