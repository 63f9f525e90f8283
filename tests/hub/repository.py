"""A model repository as the Hub keeps it: commits that never change, and branches and tags that point at them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

LFS_SUFFIXES = (
    *("7z", "arrow", "bin", "bz2", "ckpt", "ftz", "gz", "h5", "joblib", "mlmodel", "model", "msgpack", "npy", "npz"),
    *("onnx", "ot", "parquet", "pb", "pickle", "pkl", "pt", "pth", "rar", "safetensors", "tar", "tflite", "tgz"),
    *("wasm", "xz", "zip", "zst"),
)
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
# The Hub refuses larger files that are not in large file storage.
LARGEST_REGULAR_BYTES = 10_000_000


class Refused(Exception):
    """A request that the Hub does not fulfil.

    Args:
        status: HTTP status.
        message: What the client shows to its user.
        code: The Hub's `X-Error-Code`, from which the client chooses its exception.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        # A header holds no other characters; a message may name a file.
        shown = {"X-Error-Message": message.encode("ascii", "replace").decode()}
        self.headers = dict(headers or {}) | shown | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Blob:
    """A file: its bytes, and whether git holds them or large file storage, with a pointer in git."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        if not self.lfs:
            return self.content
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of the blob: of the pointer, for a file in large file storage."""
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        """The Hub's name of the content, by which a client knows whether it has it already."""
        return self.sha256 if self.lfs else self.oid

    @property
    def stored(self) -> dict[str, int]:
        """The sizes of a file in large file storage, as the Hub lists them."""
        return {"size": len(self.content), "pointerSize": len(self.in_git)}

    def listed(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        return entry | ({"lfs": self.stored | {"oid": self.sha256}} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    """A commit with the whole tree as it left it."""

    sha: str
    parent: str | None
    message: str
    description: str
    author: str
    tree: Mapping[str, Blob]
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        """Whether a file that is to be added here belongs into large file storage.

        Args:
            path: The file's path in the repository.
            size: Its length in bytes.
            sample: Its first bytes.
        """
        attributes = self.tree[".gitattributes"].content.decode().splitlines()
        patterns = [line.split()[0] for line in attributes if "filter=lfs" in line]
        large = size > LARGEST_REGULAR_BYTES or b"\0" in sample
        return size > 0 and (large or any(fnmatch(PurePosixPath(path).name, pattern) for pattern in patterns))

    def entries(self) -> dict[str, dict[str, Any]]:
        """Every file and folder by its path, as the Hub lists it."""
        folders: dict[str, list[str]] = {}
        for path, blob in self.tree.items():
            for parent in PurePosixPath(path).parents[:-1]:
                folders.setdefault(str(parent), []).append(f"{path} {blob.oid}")
        listed = {path: blob.listed(path) for path, blob in self.tree.items()}
        for folder, content in folders.items():
            oid = hashlib.sha1("\n".join(sorted(content)).encode()).hexdigest()
            listed[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        return dict(sorted(listed.items()))


class Repository:
    """The history of one model, and its large files by their sha256.

    Args:
        repo_id: `namespace/name`.
        private: Whether only the owner of the namespace sees it.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id = repo_id
        self.private = private
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}
        # Parts of large files, by the sha256 of the whole and the number of the part.
        self.parts: dict[tuple[str, int], bytes] = {}
        self._commits: dict[str, Commit] = {}
        first = self._add(None, "initial commit", "", "system", {".gitattributes": Blob(GITATTRIBUTES, lfs=False)})
        self.branches["main"] = first.sha

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full sha names; refused if there is none."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self._commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self._commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """The commits that led to a revision, the newest first."""
        commit: Commit | None = self.at(revision)
        while commit:
            yield commit
            commit = self._commits[commit.parent] if commit.parent else None

    def commit(self, branch: str, message: str, description: str, author: str, tree: Mapping[str, Blob]) -> Commit:
        """Puts a new commit on a branch. One that changes nothing is a commit like any other, as it is on the Hub."""
        if branch not in self.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        commit = self._add(self.branches[branch], message, description, author, tree)
        self.branches[branch] = commit.sha
        return commit

    def _add(self, parent: str | None, message: str, description: str, author: str, tree: Mapping[str, Blob]) -> Commit:
        # The number of the commit stands for git's date: the same tree can be committed twice on the same parent.
        parts: Iterable[str] = [f"{path} {blob.oid}" for path, blob in sorted(tree.items())]
        named = "\n".join([self.repo_id, str(len(self._commits)), str(parent), message, *parts])
        commit = Commit(hashlib.sha1(named.encode()).hexdigest(), parent, message, description, author, dict(tree))
        self._commits[commit.sha] = commit
        return commit
