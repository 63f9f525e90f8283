"""Pushing a model to the Hub: one commit that holds all of it, or none."""

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
"""How long to wait before each further attempt, where the Hub does not say."""

SUFFIXES = frozenset({".safetensors", ".json", ".parquet", ".md", ".png", ".py", ".txt", ".model", ".jinja"})
"""What a repository may hold: weights, settings, the vocabulary, the card, pictures, the loading code, and the files
of tokenizers. Nothing that runs when it is read."""

MAX_SHARD_SIZE = "5GB"

_CARD, _RECORD = "README.md", "run.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_TRANSIENT = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
# Of the HTTP library that the client uses: its answers and its broken connections.
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubRepo:
    """A branch of a model repository to push to.

    Every call to the Hub is made again, after a while, where the Hub is busy (429), failing (5xx) or out of reach.

    Attributes:
        repo_id: as in `org/name`.
        private: whether the repository must be private.
        revision: the branch; made from `main` where there is none.
        token: a token that may write; by default the one the Hub's client is logged in with.
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    token: str | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Makes the repository and the branch where they are missing.

        Raises:
            ValueError: `private` is set and the repository is public.
            OSError: the Hub refuses, as without a token, or can't be reached.
        """
        api = self._api
        _retried(
            f"making {self.repo_id}", lambda: api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
        )
        if self.private:
            info = _retried(f"looking at {self.repo_id}", lambda: api.repo_info(self.repo_id))
            if not info.private:
                raise ValueError(
                    f"{self.repo_id} is public, and private was asked for: change its visibility in its settings on "
                    "the Hub, or push to another repository"
                )
        if self.revision != "main":
            _retried(
                f"making the branch {self.revision}",
                lambda: api.create_branch(self.repo_id, branch=self.revision, exist_ok=True),
            )

    def push(self, folder: Path, message: str, description: str | None = None) -> str:
        """Makes the branch hold what a folder holds, in one commit, or in none where it does already.

        If the folder holds weights, those that lie there and are not in the folder are deleted, as a model of fewer or
        more shards would be read wrongly with them. A card that somebody has edited stays, and so does all else.

        Args:
            folder: what to push; checked before anything is sent.
            message: of the commit.
            description: of the commit, below the message.

        Returns:
            The commit that the branch is at.

        Raises:
            ValueError: the folder holds a file of a kind that does not belong there, or a token.
            OSError: the Hub refuses or can't be reached.
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
            # A lost answer is no double commit: the next attempt finds all files there, and the client leaves out what
            # has not changed. Of two that push at once, the parent lets only one through.
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
            "%s has a README.md that flip_hf did not write or that was edited since; it stays as it is", self.repo_id
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
    """Pushes a model, its processor, its card and the code that loads them, in one commit.

    Without `processor`, the model's files are pushed alone, with a warning: nothing reads a row for it until its
    processor is in the repository too. Without `model`, the processor's files are pushed alone. All other files there
    stay as they are.

    Args:
        repo_id: as in `org/name`.
        model: any FLIP model.
        processor: the model's.
        record: what a run wrote as `run.json`: the card is written from it.
        card: a card of your own, in Markdown, in place of the record's. Without this and `record` none is written.
        pictures: PNG files for the record's card, with their captions.
        private: make the repository private.
        revision: branch, made where there is none; by default "main".
        token: by default, and if True, the one the Hub's client is logged in with.
        commit_message: of the commit.
        commit_description: of the commit, below its message.
        max_shard_size: weights are cut into files of this size at most; a single table is not cut.
        create_pr: must be False: a push that is made again would open another pull request.
        tags: must be None: cards have the tags that flip_hf gives them.

    Returns:
        The commit's hash.

    Raises:
        ValueError: as `HubRepo.prepare` and `HubRepo.push`; there is neither a model nor a processor; or `create_pr`,
            `tags` or `token=False` is given.
        OSError: the Hub refuses or can't be reached after several attempts.
    """
    if model is None and processor is None:
        raise ValueError("nothing to push: give model, processor or both")
    if create_pr:
        raise ValueError(
            "create_pr is not supported, as a push that is made again would open another pull request; push to a "
            "branch, revision='...', and open one from there"
        )
    if tags:
        raise ValueError("tags is not supported: the card has its own; give card, or edit the card on the Hub")
    if token is False:
        raise ValueError("token=False: a push needs a token that may write; leave it out to use the one of the login")
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
            "%s got the model without its processor; push that too, processor.push_to_hub(%r), or both at once next "
            "time: model.push_to_hub(%r, processor=processor)",
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
    """Fills a folder with all that a repository holds.

    Args:
        folder: an empty one.
        save: writes the model, its processor or both into the folder.
        repo_id: where the folder will be found.
        record: as in `push_to_hub`.
        pictures: as in `push_to_hub`; those that do not exist are left out.
    """
    save(folder)
    add_loading_code(folder)
    if record is not None:
        write_card(folder, repo_id, record, pictures)


def write_card(folder: Path, repo_id: str, record: Mapping[str, Any], pictures: Mapping[Path, str]) -> None:
    """Writes a card, its pictures and the record that it is made from into a folder; arguments as in `stage`."""
    shown = {path: caption for path, caption in pictures.items() if path.exists()}
    for path in shown:
        shutil.copyfile(path, folder / path.name)
    captions = {path.name: caption for path, caption in shown.items()}
    (folder / _CARD).write_text(render_card(record, repo_id, captions), encoding="utf-8")
    text = measures_json(public_record(record), indent=2, ensure_ascii=False)
    (folder / _RECORD).write_text(text + "\n", encoding="utf-8")


def check_publishable(files: Mapping[str, Path], token: str | None = None) -> None:
    """Raises a ValueError where a file is of a kind that a repository must not hold, or holds a token of the Hub's.

    Args:
        files: by their names in the repository.
        token: one that must not be in them, beside those that look like one.
    """
    secrets = {secret.encode() for secret in (token, get_token()) if secret}
    for name, path in files.items():
        if path.is_symlink() or path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: {name!r} does not belong into a model's repository; remove it")
        if path.suffix in (".safetensors", ".parquet", ".png"):
            continue
        content = path.read_bytes()
        if _TOKEN.search(content) or any(secret in content for secret in secrets):
            raise ValueError(f"{path} holds a token of the Hub's; remove it, and revoke the token if it was shared")


def _retried(what: str, call: Callable[[], T]) -> T:
    for wait in (*WAITS_SECONDS, None):
        try:
            return call()
        except _CLIENT_ERROR as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code not in _TRANSIENT:
                raise
            if wait is None:
                raise ConnectionError(f"{what} failed {len(WAITS_SECONDS) + 1} times, at last: {error}") from error
            told = response.headers.get("Retry-After", "") if response is not None else ""
            wait = max(wait, float(told)) if told.isdigit() else wait
            logger.warning("%s: %s; again in %.0f s", what, str(error).splitlines()[0], wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
