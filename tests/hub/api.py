"""What the Hub answers to each request that the client makes for a model repository."""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from hub.repository import Blob, Commit, Refused, Repository


@dataclass(frozen=True)
class Call:
    """A request: the path still quoted, the token as it was sent."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return parse_qs(self.query).get(name) == ["true"]


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))


def _content(blob: Blob, call: Call, headers: Mapping[str, str]) -> Answer:
    """A file's bytes, or those that the request asks for."""
    size = len(blob.content)
    headers = dict(headers) | {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not wanted:
        return Answer(200, blob.content, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise Refused(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Answer(206, blob.content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


@dataclass(frozen=True)
class Route:
    step: str
    methods: str
    pattern: re.Pattern[str]
    function: Callable[..., Answer]


ROUTES: list[Route] = []


def _route(step: str, methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Names the requests that a method of `Api` answers.

    Args:
        step: The name under which tests count these requests and make them fail.
        methods: HTTP methods, separated by spaces.
        pattern: Of the whole path. Its groups, unquoted, are the method's arguments; one that is absent is left out.
    """
    pattern = pattern.replace("{repo}", r"(?P<repo_id>[^/]+/[^/]+)").replace("{revision}", r"(?P<revision>[^/]+)")
    pattern = pattern.replace("{storage}", "/storage/(?P<key>[^/]+)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append(Route(step, methods, re.compile(pattern), function))
        return function

    return register


class Api:
    """The repositories, and who may do what with them.

    A user owns the namespace of the same name: it alone writes there, and reads what is private.

    Args:
        tokens: Users by their token.
        read_only: Tokens that may read only.
        chunk_bytes: Files above this size are uploaded in parts of it; None: every file in one piece.
    """

    def __init__(self, tokens: Mapping[str, str], read_only: Collection[str], chunk_bytes: int | None):
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self._tokens = tokens
        self._read_only = read_only
        self._chunk_bytes = chunk_bytes
        # Like a signed link, the address of a stored object is the permission to read or to write it.
        self._key = secrets.token_hex(8)

    def user(self, call: Call) -> str | None:
        """Whose token came with the request; None: nobody's."""
        return self._tokens.get(call.token) if call.token else None

    def route(self, call: Call) -> tuple[Route | None, dict[str, str]]:
        """Who answers a request, and the arguments that are in its path."""
        for route in ROUTES:
            found = route.pattern.fullmatch(call.path)
            if found and call.method in route.methods.split():
                return route, {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
        return None, {}

    def answer(self, call: Call) -> Answer:
        route, arguments = self.route(call)
        try:
            # A status that the client does not take for an outage: it raises at once and shows what was missing.
            if route is None:
                raise Refused(501, f"The test server does not know {call.method} {call.path}")
            # The Hub refuses an unknown token even where none is needed.
            if call.token and self.user(call) is None:
                raise Refused(401, "Invalid credentials in Authorization header")
            return route.function(self, call, **arguments)
        except Refused as refused:
            return as_json({"error": str(refused)}, refused.status, refused.headers)

    # Accounts and repositories

    @_route("whoami", "GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Answer:
        user = self._signed_in(call)
        role = "read" if call.token in self._read_only else "write"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return as_json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": access})

    @_route("validate_yaml", "POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Answer:
        missing = {"message": "empty or missing yaml metadata in repo card"}
        return as_json({"errors": [], "warnings": [] if call.json()["content"].startswith("---") else [missing]})

    @_route("create", "POST", "/api/repos/create")
    def _create(self, call: Call) -> Answer:
        wanted = call.json()
        if wanted.get("type", "model") != "model":
            raise Refused(501, f"The test server has no repositories of type {wanted['type']}")
        owner = wanted["organization"] or self._signed_in(call)
        self._may_write(call, owner)
        repo_id = f"{owner}/{wanted['name']}"
        made = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return as_json({"error": "You already created this model repo"} | made, 409)
        self.repositories[repo_id] = Repository(repo_id, wanted.get("visibility") == "private")
        return as_json(made)

    @_route("info", "GET", "/api/models/{repo}(?:/revision/{revision})?")
    def _info(self, call: Call, repo_id: str, revision: str = "main") -> Answer:
        repository = self._readable(call, repo_id)
        commit = repository.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        if call.flag("blobs"):
            siblings = [
                {"rfilename": path, "size": len(blob.content), "blobId": blob.oid}
                | ({"lfs": blob.stored | {"sha256": blob.sha256}} if blob.lfs else {})
                for path, blob in sorted(commit.tree.items())
            ]
        about = {"id": repo_id, "modelId": repo_id, "author": repository.owner, "private": repository.private}
        about |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return as_json(about | {"sha": commit.sha, "lastModified": _date(commit), "siblings": siblings})

    # Revisions

    @_route("refs", "GET", "/api/models/{repo}/refs")
    def _refs(self, call: Call, repo_id: str) -> Answer:
        repository = self._readable(call, repo_id)

        def listed(kind: str, named: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in named.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        return as_json({"branches": branches, "tags": tags, "converts": []})

    @_route("branch", "POST DELETE", "/api/models/{repo}/branch/(?P<branch>[^/]+)")
    def _branch(self, call: Call, repo_id: str, branch: str) -> Answer:
        repository = self._writable(call, repo_id)
        if call.method == "DELETE":
            return self._delete_ref(repository.branches, branch)
        return self._add_ref(repository, repository.branches, branch, call.json().get("startingPoint", "main"))

    @_route("tag", "POST DELETE", "/api/models/{repo}/tag/{revision}")
    def _tag(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._writable(call, repo_id)
        if call.method == "DELETE":
            return self._delete_ref(repository.tags, revision)
        return self._add_ref(repository, repository.tags, call.json()["tag"], revision)

    def _add_ref(self, repository: Repository, named: dict[str, str], name: str, revision: str) -> Answer:
        if name in named:
            raise Refused(409, "Reference already exists")
        named[name] = repository.at(revision).sha
        return as_json({"ref": name})

    def _delete_ref(self, named: dict[str, str], name: str) -> Answer:
        if name == "main":
            raise Refused(403, "Cannot delete the main branch")
        if name not in named:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        del named[name]
        return Answer()

    @_route("commits", "GET", "/api/models/{repo}/commits/{revision}")
    def _commits(self, call: Call, repo_id: str, revision: str) -> Answer:
        listed = [
            {"id": commit.sha, "title": commit.message, "message": commit.description, "date": _date(commit)}
            | {"authors": [{"user": commit.author}]}
            for commit in self._readable(call, repo_id).history(revision)
        ]
        return as_json(listed)

    # Reading files

    @_route("tree", "GET", "/api/models/{repo}/tree/{revision}(?:/(?P<folder>.+))?")
    def _tree(self, call: Call, repo_id: str, revision: str, folder: str = "") -> Answer:
        entries = self._readable(call, repo_id).at(revision).entries()
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refused(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): entry for path, entry in entries.items() if path.startswith(prefix)}
        return as_json([entry for path, entry in inside.items() if call.flag("recursive") or "/" not in path])

    @_route("paths_info", "POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths_info(self, call: Call, repo_id: str, revision: str) -> Answer:
        entries = self._readable(call, repo_id).at(revision).entries()
        return as_json([entries[path] for path in parse_qs(call.body.decode())["paths"] if path in entries])

    @_route("resolve", "GET HEAD", "/{repo}/resolve/{revision}/(?P<path>.+)")
    def _resolve(self, call: Call, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._readable(call, repo_id).at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.tree.get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        if not blob.lfs:
            return _content(blob, call, headers)
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.etag}"'}
        return Answer(302, b"", headers | linked | {"Location": self._storage(repo_id, blob.sha256)})

    # Writing files

    @_route("preupload", "POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, call: Call, repo_id: str, revision: str) -> Answer:
        commit = self._writable(call, repo_id).at(revision)
        modes = []
        for file in call.json()["files"]:
            lfs = commit.is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            there = commit.tree.get(file["path"])
            # By this the client knows what has not changed, and leaves it out of the commit.
            modes.append(mode | ({"oid": there.etag} if there else {}))
        return as_json({"files": modes, "commitOid": commit.sha})

    @_route("lfs_batch", "POST", r"/{repo}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call, repo_id: str) -> Answer:
        repository = self._writable(call, repo_id)
        verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/verify"}
        objects = []
        for wanted in call.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            # What is here already has nothing to do, so the client sends nothing.
            actions = {"upload": self._upload(repo_id, oid, size), "verify": verify}
            objects.append({"oid": oid, "size": size} | ({} if oid in repository.lfs else {"actions": actions}))
        return as_json({"transfer": "multipart" if self._chunk_bytes else "basic", "objects": objects})

    def _upload(self, repo_id: str, oid: str, size: int) -> dict[str, Any]:
        href = self._storage(repo_id, oid)
        if self._chunk_bytes is None or size <= self._chunk_bytes:
            return {"href": href}
        numbers = range(1, -(-size // self._chunk_bytes) + 1)
        parts = {f"{number:05}": f"{href}/{number}" for number in numbers}
        return {"href": href, "header": {"chunk_size": str(self._chunk_bytes)} | parts}

    @_route("lfs_upload", "PUT", "{storage}(?:/(?P<part>[0-9]+))?")
    def _lfs_upload(self, call: Call, key: str, repo_id: str, oid: str, part: str | None = None) -> Answer:
        repository = self._stored(call, key, repo_id)
        if part:
            repository.parts[oid, int(part)] = call.body
        else:
            self._store(repository, oid, call.body)
        return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @_route("lfs_complete", "POST", "{storage}")
    def _lfs_complete(self, call: Call, key: str, repo_id: str, oid: str) -> Answer:
        repository = self._stored(call, key, repo_id)
        # They stay, for a client that did not get the answer and asks again.
        parts = [repository.parts.get((oid, part["partNumber"]), b"") for part in call.json()["parts"]]
        self._store(repository, oid, b"".join(parts))
        return as_json({})

    def _store(self, repository: Repository, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The content does not have the sha256 that was announced")
        repository.lfs[oid] = content

    @_route("lfs_verify", "POST", r"/{repo}\.git/info/lfs/verify")
    def _lfs_verify(self, call: Call, repo_id: str) -> Answer:
        content = self._writable(call, repo_id).lfs.get(call.json()["oid"])
        if content is None or len(content) != call.json()["size"]:
            raise Refused(404, "The object was not uploaded, or not all of it")
        return as_json({})

    @_route("lfs_download", "GET HEAD", "{storage}")
    def _lfs_download(self, call: Call, key: str, repo_id: str, oid: str) -> Answer:
        return _content(Blob(self._stored(call, key, repo_id).lfs[oid], lfs=True), call, {})

    @_route("commit", "POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._writable(call, repo_id)
        if call.query:
            raise Refused(501, f"The test server does not know commits with {call.query}")
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        about = header["value"]
        if about.get("parentCommit", repository.at(revision).sha) != repository.at(revision).sha:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repository.at(revision).tree)
        for operation in operations:
            self._apply(repository, tree, operation["key"], operation["value"])
        author = self._signed_in(call)
        commit = repository.commit(revision, about["summary"], about["description"], author, tree)
        url = f"{self.endpoint}/{repo_id}/commit/{commit.sha}"
        return as_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, repository: Repository, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repository.lfs:
                raise Refused(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
            tree[path] = Blob(repository.lfs[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in tree if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise Refused(501, f"The test server does not know the operation {key}")

    # Permissions

    def _signed_in(self, call: Call) -> str:
        user = self.user(call)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return user

    def _readable(self, call: Call, repo_id: str) -> Repository:
        repository = self.repositories.get(repo_id)
        user = self.user(call)
        if repository and (not repository.private or user == repository.owner):
            return repository
        # Who may not see a repository is not told whether there is one. The client takes the 401 alone for that only
        # from an address that begins with https.
        if user:
            raise Refused(404, "Repository not found", "RepoNotFound")
        raise Refused(401, "Invalid username or password.", "RepoNotFound")

    def _writable(self, call: Call, repo_id: str) -> Repository:
        repository = self._readable(call, repo_id)
        self._may_write(call, repository.owner)
        return repository

    def _may_write(self, call: Call, namespace: str) -> None:
        if self._signed_in(call) != namespace:
            raise Refused(403, f'You don\'t have the rights to write to the namespace "{namespace}"')
        if call.token in self._read_only:
            raise Refused(403, "You must use a write token to upload to a repository")

    def _storage(self, repo_id: str, oid: str) -> str:
        # Another host for the client, as the Hub's storage is: it must neither send its token there nor look for the
        # Hub's headers.
        return f"{self.endpoint.replace('127.0.0.1', 'localhost')}/storage/{self._key}/{repo_id}/{oid}"

    def _stored(self, call: Call, key: str, repo_id: str) -> Repository:
        if key != self._key:
            raise Refused(403, "The signature of the link is wrong")
        if call.token:
            raise Refused(400, "Storage was sent a token for the Hub")
        return self.repositories[repo_id]


def _date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
