"""The real huggingface_hub client against the server of these tests."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from hub.server import Fault, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session
from waiting import PATIENCE

REPO = "org/model"
WEIGHTS = bytes(range(256)) * 10


@pytest.fixture(autouse=True)
def client_settings(monkeypatch):
    """What `HubServer.environment` sets, for the client in this process, which read its environment long ago."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client wanted to wait between its attempts."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def api(hub):
    return HfApi(hub.endpoint, token="hf_owner")


def upload(api, files, message="Upload", **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message=message, **options).oid


def statuses(server, step):
    return [request.status for request in server.requests if request.step == step]


def attempts(server):
    return Counter(request.step for request in server.requests)


def test_create(hub, api):
    assert api.create_repo(REPO, private=True).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created") as conflict:
        api.create_repo(REPO)
    assert conflict.value.response.status_code == 409
    assert api.create_repo("public").repo_id == "org/public"
    assert [api.model_info(name).private for name in (REPO, "org/public")] == [True, False]
    assert api.whoami()["name"] == "org"
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit"]
    assert list(hub.files(REPO)) == [".gitattributes"]
    asked = {(request.method, request.step, request.token) for request in hub.requests}
    assert asked == {("POST", "create", "org"), ("GET", "info", "org"), ("GET", "whoami", "org")}


def test_upload_small_lfs_and_multipart(tmp_path, waits):
    files = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "empty.txt": b""}
    files |= {"model.safetensors": WEIGHTS, "sub/small.bin": b"x" * 1000, "sub/binary": b"\0binary"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    with HubServer({"hf_owner": "org"}, chunk_bytes=1000) as server:
        api = HfApi(server.endpoint, token="hf_owner")
        api.create_repo(REPO)
        server.fail("lfs_complete", Fault(drop="after"))
        first = api.upload_folder(repo_id=REPO, folder_path=tmp_path, commit_message="Everything")
        assert {path: server.files(REPO)[path] for path in files} == files
        head, initial = server.commits(REPO)
        assert (head.sha, head.message, head.parent) == (first.oid, "Everything", initial.sha)
        large = [path for path, blob in sorted(head.tree.items()) if blob.lfs]
        assert large == ["model.safetensors", "sub/binary", "sub/small.bin"]
        # 2560 bytes are three parts; the two smaller files are one request each.
        uploads = [request for request in server.requests if request.step == "lfs_upload"]
        assert Counter(Path(request.path).name.isdigit() for request in uploads) == {True: 3, False: 2}
        assert {request.token for request in uploads} == {None}
        assert (statuses(server, "lfs_complete"), waits) == ([None, 200], [1])
        assert statuses(server, "lfs_verify") == [200] * 3

        before = attempts(server)
        again = api.upload_folder(repo_id=REPO, folder_path=tmp_path, commit_message="Again")
        assert again.oid == first.oid
        assert len(server.commits(REPO)) == 2
        # The client has the card checked for the folder and again for the commit.
        assert attempts(server) - before == {"validate_yaml": 2, "preupload": 1, "lfs_batch": 1, "info": 1}


def test_large_file_must_be_what_was_announced(hub, api):
    api.create_repo(REPO)
    announced = UploadInfo.from_bytes(WEIGHTS)
    action, *_ = post_lfs_batch_info([announced], "hf_owner", "model", REPO, endpoint=hub.endpoint)[0]
    link, verify = (action["actions"][name]["href"] for name in ("upload", "verify"))
    assert get_session().put(link, content=WEIGHTS[:-1]).status_code == 400
    assert get_session().put(link, content=WEIGHTS, headers={"Authorization": "Bearer hf_owner"}).status_code == 400
    assert get_session().get(link.replace("/storage/", "/storage/0")).status_code == 403

    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    api.preupload_lfs_files(REPO, [operation])
    assert statuses(hub, "lfs_upload") == [400, 400, 200]
    ours = {"headers": {"Authorization": "Bearer hf_owner"}}
    shorter = {"oid": announced.sha256.hex(), "size": announced.size - 1}
    assert get_session().post(verify, json=shorter, **ours).status_code == 404
    missing = {"path": "other.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}
    lines = [{"key": "header", "value": {"summary": "x", "description": ""}}, {"key": "lfsFile", "value": missing}]
    url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    body = "\n".join(map(json.dumps, lines))
    refused = get_session().post(url, content=body, **ours)
    assert refused.status_code == 400
    assert "other.bin" in refused.json()["error"]
    assert len(hub.commits(REPO)) == 1

    # What is there already is committed without being sent again.
    upload(api, {"model.safetensors": WEIGHTS})
    assert statuses(hub, "lfs_upload") == [400, 400, 200]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


def test_tree_and_paths_info(hub, api):
    api.create_repo(REPO)
    upload(api, {"config.json": b"{}", "sub/deep/model.safetensors": WEIGHTS})
    assert api.list_repo_files(REPO) == [".gitattributes", "config.json", "sub/deep/model.safetensors"]
    tree = {entry.path: type(entry).__name__ for entry in api.list_repo_tree(REPO)}
    assert tree == {".gitattributes": "RepoFile", "config.json": "RepoFile", "sub": "RepoFolder"}
    inside = [entry.path for entry in api.list_repo_tree(REPO, "sub", recursive=True)]
    assert inside == ["sub/deep", "sub/deep/model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError, match="日本 does not exist"):
        list(api.list_repo_tree(REPO, "日本"))

    small, large = api.get_paths_info(REPO, ["config.json", "sub/deep/model.safetensors", "nowhere"])
    # git hash-object of "{}".
    assert (small.size, small.blob_id, small.lfs) == (2, "9e26dfeeb6e641a33dae4961196235bdb965b21b", None)
    assert (large.lfs.size, large.lfs.sha256) == (len(WEIGHTS), UploadInfo.from_bytes(WEIGHTS).sha256.hex())
    siblings = {sibling.rfilename: sibling for sibling in api.model_info(REPO, files_metadata=True).siblings}
    assert siblings["config.json"].blob_id == small.blob_id
    assert siblings["sub/deep/model.safetensors"].lfs["sha256"] == large.lfs.sha256
    assert api.file_exists(REPO, "config.json")
    assert not api.file_exists(REPO, "nowhere")


def test_delete_files_and_folders(hub, api):
    api.create_repo(REPO)
    upload(api, {"a": b"a", "sub/b": b"b", "sub/c": b"c", "subway": b"d"})
    operations = [CommitOperationDelete("a"), CommitOperationDelete("sub/"), CommitOperationAdd("new", b"new")]
    api.create_commit(REPO, operations, commit_message="Tidy up", commit_description="At last")
    assert sorted(hub.files(REPO)) == [".gitattributes", "new", "subway"]
    with pytest.raises(RemoteEntryNotFoundError, match="trailing '/'"):
        api.delete_file("sub", REPO)
    listed = [(commit.title, commit.message, commit.authors) for commit in api.list_repo_commits(REPO)]
    assert listed == [("Tidy up", "At last", ["org"]), ("Upload", "", ["org"]), ("initial commit", "", ["system"])]


def test_revisions(hub, api, tmp_path):
    api.create_repo(REPO)
    first = upload(api, {"model.safetensors": b"first", "config.json": b"1"})
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="try/this", revision=first)
    second = hub.add_commit(REPO, {"model.safetensors": b"second", "config.json": b"2"}, message="Second").sha
    aside = upload(api, {"config.json": b"3"}, revision="try/this")

    def pulled(revision, name="config.json"):
        return Path(api.hf_hub_download(REPO, name, revision=revision, cache_dir=tmp_path)).read_bytes()

    contents = [pulled(revision) for revision in (first, "v1", "main", second, "try/this")]
    assert contents == [b"1", b"1", b"2", b"2", b"3"]
    assert [pulled(revision, "model.safetensors") for revision in ("v1", "main")] == [b"first", b"second"]
    assert [api.model_info(REPO, revision=name).sha for name in ("v1", "main", "try/this")] == [first, second, aside]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/this": aside}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]
    assert [commit.commit_id for commit in api.list_repo_commits(REPO, revision="try/this")][:2] == [aside, first]

    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="try/this")
    api.create_branch(REPO, branch="try/this", exist_ok=True)
    api.delete_branch(REPO, branch="try/this")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError, match="main branch"):
        api.delete_branch(REPO, branch="main")
    for lost in ("try/this", "v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=lost)
    with pytest.raises(RevisionNotFoundError):
        upload(api, {"config.json": b"4"}, revision="try/this")
    with pytest.raises(RevisionNotFoundError):
        upload(api, {"config.json": b"4"}, revision=first)
    assert pulled(aside) == b"3"
    with pytest.raises(RemoteEntryNotFoundError):
        pulled(second, "nowhere")
    # The client remembers, for the commit that the answer named, that the file is not there.
    assert list(tmp_path.glob(f"*/.no_exist/{second}/nowhere"))


def test_private_repository(hub, api, tmp_path):
    api.create_repo(REPO, private=True)
    upload(api, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    options = {"endpoint": hub.endpoint, "cache_dir": tmp_path}
    for name in ("config.json", "model.safetensors"):
        for token, status in ((False, 401), ("hf_other", 404)):
            with pytest.raises(RepositoryNotFoundError) as refused:
                hf_hub_download(REPO, name, token=token, **options)
            assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        hf_hub_download(REPO, "config.json", token="hf_wrong", **options)
    assert refused.value.response.status_code == 401
    assert not isinstance(refused.value, RepositoryNotFoundError)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO, token=False)
    assert Path(hf_hub_download(REPO, "model.safetensors", token="hf_reader", **options)).read_bytes() == WEIGHTS
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


@pytest.mark.parametrize(
    ("token", "status", "message"),
    [("hf_reader", 403, "write token"), ("hf_other", 403, "rights"), (False, 401, "Invalid username")],
)
def test_who_may_write(hub, monkeypatch, token, status, message):
    hub.create(REPO)
    api = HfApi(hub.endpoint, token=token)
    for write in (
        lambda: api.create_repo("org/another"),
        lambda: api.create_branch(REPO, branch="b"),
        lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO),
    ):
        with pytest.raises(HfHubHTTPError, match=message) as refused:
            write()
        assert refused.value.response.status_code == status
    # It is there already, and the token may see it.
    if token:
        # Here, and only here, the client forgets which Hub it was made for.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert len(hub.commits(REPO)) == 1


def test_parent_commit(hub, api):
    hub.create(REPO)
    seen = api.model_info(REPO).sha
    theirs = hub.add_commit(REPO, {"config.json": b"theirs"}, message="Somebody else")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        upload(api, {"config.json": b"ours"}, parent_commit=seen)
    assert refused.value.response.status_code == 412
    assert hub.files(REPO)["config.json"] == b"theirs"
    ours = upload(api, {"config.json": b"ours"}, parent_commit=theirs.sha)
    assert [commit.sha for commit in hub.commits(REPO)] == [ours, theirs.sha, seen]
    assert hub.commits(REPO)[0].parent == theirs.sha


def test_faults_that_the_client_sits_out(hub, api, waits):
    hub.create(REPO)
    hub.fail("preupload", Fault(status=503, times=2))
    hub.fail("lfs_batch", Fault(status=429, retry_after=5))
    hub.fail("lfs_upload", Fault(status=500))
    hub.fail("lfs_upload", Fault(drop="before"))
    hub.fail("lfs_verify", Fault(drop="after"))
    upload(api, {"model.safetensors": WEIGHTS})
    assert statuses(hub, "preupload") == [503, 503, 200]
    assert statuses(hub, "lfs_batch") == [429, 200]
    assert statuses(hub, "lfs_upload") == [500, None, 200]
    assert statuses(hub, "lfs_verify") == [None, 200]
    assert statuses(hub, "commit") == [200]
    # The client adds a second to what Retry-After says.
    assert waits == [1, 2, 6, 1, 2, 1]
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


def test_faults_that_the_client_reports(hub, api, waits):
    hub.create(REPO)
    for status in (503, 429, 500):
        hub.fail("commit", Fault(status=status, retry_after=1))
        with pytest.raises(HfHubHTTPError) as failed:
            upload(api, {"config.json": b"{}"})
        assert failed.value.response.status_code == status
    assert failed.value.response.headers["Retry-After"] == "1"
    hub.fail("commit", Fault(drop="before"))
    with pytest.raises(httpx2.RemoteProtocolError):
        upload(api, {"config.json": b"{}"})
    assert len(hub.commits(REPO)) == 1

    hub.fail("commit", Fault(drop="after"))
    with pytest.raises(httpx2.RemoteProtocolError):
        upload(api, {"config.json": b"{}"}, message="Landed")
    assert [commit.message for commit in hub.commits(REPO)] == ["Landed", "initial commit"]
    # Sent again without a look at what is there, it is another commit, and empty.
    url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    lines = b'{"key": "header", "value": {"summary": "Twice", "description": ""}}\n'
    get_session().post(url, content=lines, headers={"Authorization": "Bearer hf_owner"})
    twice, landed, _ = hub.commits(REPO)
    assert (twice.message, twice.tree) == ("Twice", landed.tree)

    hub.fail("create", Fault(status=503))
    with pytest.raises(HfHubHTTPError):
        api.create_repo("org/another")
    hub.fail("info", Fault(status=503))
    with pytest.raises(HfHubHTTPError):
        api.model_info(REPO)
    hub.fail("info", Fault(delay=0.5))
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info(REPO, timeout=0.1)
    assert waits == []
    with pytest.raises(ValueError, match="No step is called 'comit'"):
        hub.fail("comit", Fault(status=503))
    for nothing in ({"times": 3}, {"status": 503, "times": 0}, {"drop": "later"}):
        with pytest.raises(ValueError, match="Nothing would go wrong"):
            Fault(**nothing)
    hub.fail("validate_yaml", Fault(status=400))
    with pytest.raises(ValueError, match="Invalid metadata"):
        upload(api, {"README.md": b"text"})


def test_ranges(hub, api, waits, tmp_path, monkeypatch):
    # What has arrived of a piece that is not complete is lost to the client.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5)
    hub.create(REPO)
    hub.add_commit(REPO, {"model.safetensors": WEIGHTS, "vocabulary.json": b"0123456789"}, message="Weights")
    for step, name in (("lfs_download", "model.safetensors"), ("resolve", "vocabulary.json")):
        hub.requests.clear()
        if step == "resolve":
            # For the HEAD, which has no body that could be cut.
            hub.fail(step, Fault(delay=0.01))
        hub.fail(step, Fault(drop="middle"))
        path = api.hf_hub_download(REPO, name, cache_dir=tmp_path)
        assert Path(path).read_bytes() == hub.files(REPO)[name]
        assert [(request.method, request.status) for request in hub.requests][1:] == [("GET", 200), ("GET", 206)]
    assert waits == [1, 1]

    url = f"{hub.endpoint}/{REPO}/resolve/main/vocabulary.json"
    for asked, status, answer, where in [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-20", 206, b"89", "bytes 8-9/10"),
    ]:
        got = get_session().get(url, headers={"Range": asked})
        assert (got.status_code, got.content, got.headers["Content-Range"]) == (status, answer, where)
    beyond = get_session().get(url, headers={"Range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */10")


def test_down_and_up_again(hub, api, tmp_path):
    hub.create(REPO)
    hub.add_commit(REPO, {"config.json": b"1"}, message="First")
    options = {"repo_id": REPO, "filename": "config.json", "cache_dir": tmp_path}
    path = api.hf_hub_download(**options)
    endpoint, asked = hub.endpoint, len(hub.requests)
    hub.stop()
    assert api.hf_hub_download(**options) == path
    with pytest.raises(httpx2.ConnectError):
        api.model_info(REPO)
    hub.add_commit(REPO, {"config.json": b"2"}, message="Second")
    assert len(hub.requests) == asked
    hub.start()
    assert hub.endpoint == endpoint
    assert Path(api.hf_hub_download(**options)).read_bytes() == b"2"
    assert [commit.message for commit in hub.commits(REPO)] == ["Second", "First", "initial commit"]


def test_stop_ends_what_hangs(hub, api):
    hub.fail("create", Fault(delay=PATIENCE))
    creation = api.run_as_future(api.create_repo, REPO)
    while not hub.requests:
        assert not creation.done()
    hub.stop()
    with pytest.raises(httpx2.RemoteProtocolError):
        creation.result(timeout=PATIENCE)
    hub.start()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)


def test_what_the_server_does_not_know_it_says(hub, api):
    hub.create(REPO)
    for beyond in (
        lambda: api.create_repo("org/data", repo_type="dataset"),
        lambda: api.dataset_info("org/data"),
        lambda: upload(api, {"config.json": b"{}"}, create_pr=True),
    ):
        with pytest.raises(HfHubHTTPError, match="The test server"):
            beyond()
    assert hub.requests[1].step is None
    assert len(hub.commits(REPO)) == 1


PULL = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
folder = Path(snapshot_download(sys.argv[1], revision=sys.argv[2]))
files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
print(json.dumps([folder.name, files]))
"""


def test_snapshot_in_a_process_of_its_own(hub, tmp_path, monkeypatch):
    hub.create(REPO, private=True)
    pinned = hub.add_commit(REPO, {"config.json": b"1", "sub/model.safetensors": b"weights"}, message="First").sha
    hub.add_commit(REPO, {"config.json": b"2"}, message="Second")
    # What the environment of the tests says about another Hub does not reach the process.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    def pull(**more):
        environment = hub.environment(tmp_path, token="hf_reader") | more
        command = [sys.executable, "-c", PULL, REPO, pinned]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    commit, files = pull()
    assert commit == pinned
    assert files.pop(".gitattributes").startswith("*.7z filter=lfs")
    assert files == {"config.json": "1", "sub/model.safetensors": "weights"}
    assert attempts(hub)["tree"] == 1
    assert statuses(hub, "lfs_download") == [200]
    asked = len(hub.requests)
    assert pull(HF_HUB_OFFLINE="1")[0] == pinned
    assert len(hub.requests) == asked
    assert "HF_TOKEN" not in hub.environment(tmp_path)


def test_nothing_cached_nothing_found(hub, monkeypatch, tmp_path):
    hub.create(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json", endpoint=hub.endpoint, cache_dir=tmp_path)
    assert hub.requests == []
