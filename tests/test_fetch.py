"""Getting named weights and files. No test here touches the network."""

import hashlib
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

import huggingface_hub
import pytest

from flip_hf import fetch
from flip_hf.fetch import (
    MINILM,
    FetchError,
    PackagedFiles,
    check_hashes,
    download,
    installed_files,
    minilm,
    pip_files,
    public_name,
    resolve_pretrained,
)
from flip_hf.runs.fetchable import FETCHABLE

CONTENT = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
CARRIER = PackagedFiles(
    distribution="carrier-of-files",
    version="1.0",
    import_name="carrier_of_files",
    folder="inner/model",
    sha256={name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()},
)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """An empty cache, an empty Hub cache, a Hub and a web that cannot be reached, and no pip."""
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no index\n")
    )
    monkeypatch.setattr(fetch, "MINILM_FILES", CARRIER)


def wheel_bytes(content=CONTENT, extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{CARRIER.import_name}/{CARRIER.folder}/{name}", data)
        for name in extra:
            archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.fixture
def pip_gives(monkeypatch):
    """Lets `pip download` succeed with the wheel given; returns the commands that were run."""

    def give(wheel):
        commands = []

        def run(command, **_):
            commands.append(command)
            dest = fetch.Path(command[command.index("--dest") + 1])
            dest.mkdir()
            (dest / "carrier_of_files-1.0-py3-none-any.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return give


def install_carrier(tmp_path, monkeypatch, content=CONTENT):
    package = tmp_path / "site" / CARRIER.import_name
    folder = package / CARRIER.folder
    folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    for name, data in content.items():
        (folder / name).write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FLIP_HF_CACHE")
    assert fetch.cache_dir() == tmp_path / "xdg" / "flip_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_dir() == tmp_path / ".cache" / "flip_hf"


def test_installed_files_are_found_without_importing(tmp_path, monkeypatch):
    with pytest.raises(FetchError, match="carrier-of-files is not installed"):
        installed_files(CARRIER)
    folder = install_carrier(tmp_path, monkeypatch)
    assert installed_files(CARRIER) == folder
    assert CARRIER.import_name not in sys.modules


def test_installed_files_that_differ_are_refused(tmp_path, monkeypatch):
    install_carrier(tmp_path, monkeypatch, CONTENT | {"model.safetensors": b"others"})
    with pytest.raises(FetchError, match=r"model\.safetensors has sha256 .* expected"):
        installed_files(CARRIER)


def test_pip_files_unpacks_only_what_is_wanted(tmp_path, pip_gives):
    commands = pip_gives(wheel_bytes(extra=["carrier_of_files/__init__.py"]))
    target = tmp_path / "cache" / "carrier"
    assert pip_files(CARRIER, target) == target
    assert visible(target) == sorted(CONTENT)
    assert visible(tmp_path / "cache") == ["carrier"]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "carrier-of-files==1.0"
    pip_files(CARRIER, target)
    assert len(commands) == 1


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (wheel_bytes(CONTENT | {"config.json": b"[]"}), r"config\.json has sha256"),
        (wheel_bytes({"config.json": b"{}"}), r"model\.safetensors"),
        (wheel_bytes(extra=["../../outside"]), r"its member '\.\./\.\./outside' leaves the archive"),
        (wheel_bytes(extra=["a\\..\\..\\outside"]), "leaves the archive"),
        (wheel_bytes(extra=["/outside"]), "leaves the archive"),
        (b"not a zip", "not a zip file"),
    ],
)
def test_a_bad_wheel_is_refused_and_leaves_nothing(tmp_path, pip_gives, wheel, message):
    pip_gives(wheel)
    with pytest.raises(FetchError, match=message):
        pip_files(CARRIER, tmp_path / "cache" / "carrier")
    assert visible(tmp_path / "cache") == []
    assert not list(tmp_path.rglob("outside"))


def test_a_damaged_copy_in_the_cache_is_replaced(tmp_path, pip_gives):
    pip_gives(wheel_bytes())
    target = tmp_path / "cache" / "carrier"
    pip_files(CARRIER, target)
    (target / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FetchError):
        check_hashes(CARRIER, target)
    pip_files(CARRIER, target)
    assert check_hashes(CARRIER, target) == target
    assert visible(tmp_path / "cache") == ["carrier"]


def test_pip_errors_are_told(tmp_path, monkeypatch):
    with pytest.raises(FetchError, match=r"pip download carrier-of-files==1.0: ERROR: no index"):
        pip_files(CARRIER, tmp_path / "cache" / "carrier")

    def slow(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(FetchError, match="longer than 900 seconds"):
        pip_files(CARRIER, tmp_path / "cache" / "carrier")
    assert visible(tmp_path / "cache") == []


def test_download_checks_and_replaces(tmp_path, monkeypatch):
    target = tmp_path / "cache" / "file.zip"
    expected = hashlib.md5(b"content").hexdigest()
    with pytest.raises(FetchError, match=r"https://example\.org/file\.zip: .*Name or service not known"):
        download("https://example.org/file.zip", target, "md5", expected)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"damaged"))
    with pytest.raises(FetchError, match=f"expected {expected}"):
        download("https://example.org/file.zip", target, "md5", expected)
    assert visible(target.parent) == []
    target.write_bytes(b"an older one")
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"content"))
    assert download("https://example.org/file.zip", target, "md5", expected) == target
    assert target.read_bytes() == b"content"
    assert visible(target.parent) == ["file.zip"]


def test_offline_touches_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def touched(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", touched)
    monkeypatch.setattr(urllib.request, "urlopen", touched)
    monkeypatch.setattr(subprocess, "run", touched)
    assert fetch.is_offline()
    for ask in (
        lambda: resolve_pretrained(MINILM),
        minilm,
        lambda: resolve_pretrained("org/other"),
        lambda: pip_files(CARRIER, tmp_path / "cache" / "carrier"),
        lambda: download("https://example.org/file.zip", tmp_path / "file.zip", "md5", "0"),
    ):
        with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
            ask()


REPO = "models--sentence-transformers--all-MiniLM-L6-v2"


def cached(tmp_path, content=CONTENT, revision="abc", branch="main"):
    """A snapshot as the Hub's client leaves it."""
    snapshot = tmp_path / "hub" / REPO / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name, data in content.items():
        (snapshot / name).write_bytes(data)
    (tmp_path / "hub" / REPO / "refs").mkdir(exist_ok=True)
    (tmp_path / "hub" / REPO / "refs" / branch).write_text(revision)
    return snapshot


def test_names_are_found_where_transformers_finds_them(tmp_path, monkeypatch):
    """Each place is added in turn, the last one first, and each takes precedence over those before."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **settings: asked.append((url, settings)))
    assert resolve_pretrained(MINILM, revision="next", token="hf_x") == MINILM
    (asked_url, settings), *_ = asked
    assert asked_url.endswith("/all-MiniLM-L6-v2/resolve/next/config.json")
    assert settings["token"] == "hf_x"

    snapshot = cached(tmp_path)
    assert resolve_pretrained(MINILM) == str(snapshot)
    other = cached(tmp_path, revision="def", branch="next")
    assert resolve_pretrained(MINILM, revision="next") == str(other)
    assert len(asked) == 1

    assert resolve_pretrained(str(other)) == str(other)


def test_nothing_is_installed_or_downloaded_for_a_name(tmp_path, monkeypatch, pip_gives):
    commands = pip_gives(wheel_bytes())
    install_carrier(tmp_path, monkeypatch)
    with pytest.raises(FetchError, match="Could not get the text encoder"):
        resolve_pretrained(MINILM)
    assert commands == []
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("there", "part", "lacking"),
    [
        (["config.json"], "config", None),
        (["config.json"], "tokenizer", "no tokenizer in"),
        (["config.json", "tokenizer.json"], "tokenizer", None),
        (["config.json", "vocab.txt"], "tokenizer", None),
        (["config.json", "spiece.model"], "tokenizer", None),
        (["config.json", "tokenizer.json"], "model", r"no model\.safetensors in"),
        (["config.json", "model.safetensors"], "model", None),
        (["tokenizer.json", "model.safetensors"], "tokenizer", r"no config\.json of it in"),
    ],
)
def test_a_snapshot_counts_if_it_holds_all_of_the_part(tmp_path, there, part, lacking):
    # Of a snapshot without the tokenizer's files transformers makes a tokenizer of five tokens, and says nothing.
    snapshot = cached(tmp_path, dict.fromkeys(there, b"{}"))
    if lacking is None:
        assert resolve_pretrained(MINILM, part) == str(snapshot)
    else:
        with pytest.raises(FetchError, match=lacking):
            resolve_pretrained(MINILM, part)


def test_a_snapshot_in_shards_counts_if_all_are_there(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    content = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    snapshot = cached(tmp_path, content | {"model-1.safetensors": b"x"})
    with pytest.raises(FetchError, match=r"no model-2\.safetensors in"):
        resolve_pretrained(MINILM)
    (snapshot / "model-2.safetensors").touch()
    assert resolve_pretrained(MINILM) == str(snapshot)


def test_minilm_is_put_where_its_name_is_found(tmp_path, monkeypatch, pip_gives):
    commands = pip_gives(wheel_bytes())
    folder = minilm()
    assert folder == tmp_path / "hub" / REPO / "snapshots" / "carrier-of-files-1.0"
    assert visible(folder) == sorted(CONTENT)
    assert resolve_pretrained(MINILM) == str(folder)
    assert sorted(path.name for path in (tmp_path / "hub" / REPO).iterdir()) == ["refs", "snapshots"]
    assert minilm() == folder
    assert len(commands) == 1
    (repo,) = huggingface_hub.scan_cache_dir(tmp_path / "hub").repos
    assert (repo.repo_id, repo.nb_files) == (MINILM, len(CONTENT))

    (folder / "model.safetensors").write_bytes(b"damaged")
    install_carrier(tmp_path, monkeypatch)
    assert minilm() == folder
    assert (folder / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]
    assert len(commands) == 1, "an installed package is nearer than PyPI"


def test_minilm_leaves_a_snapshot_of_the_hub_as_it_is(tmp_path, monkeypatch):
    install_carrier(tmp_path, monkeypatch)
    snapshot = cached(tmp_path, CONTENT | {"model.safetensors": b"newer ones"})
    assert minilm() == snapshot
    (snapshot / "model.safetensors").unlink()
    assert minilm().name == "carrier-of-files-1.0"
    assert resolve_pretrained(MINILM).endswith("carrier-of-files-1.0")
    assert snapshot.exists()


def test_minilm_tells_every_step(tmp_path):
    with pytest.raises(FetchError) as caught:
        minilm()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "  - local Hub cache",
        "  - installed package carrier-of-files",
        "  - PyPI",
    ]
    assert "ERROR: no index" in lines[3]
    assert "pip install --no-deps carrier-of-files==1.0" in lines[-1]
    assert not list((tmp_path / "hub" / REPO / "snapshots").iterdir())


def test_a_name_that_is_not_found_tells_every_step():
    with pytest.raises(FetchError) as caught:
        resolve_pretrained(MINILM)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["  - local folder", "  - local Hub cache", "  - Hub"]
    assert "Name or service not known" in lines[3]
    assert "`flip-hf fetch minilm`, or flip_hf.fetch.minilm(), fetches it from PyPI" in lines[-1]
    with pytest.raises(FetchError) as caught:
        resolve_pretrained("org/other")
    assert "minilm" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "org/other", "bad name//x"])
def test_resolve_pretrained_refuses_names_that_nothing_has(name):
    with pytest.raises(FetchError, match="Could not get the text encoder"):
        resolve_pretrained(name)


def test_the_public_name_says_nothing_of_the_machine(tmp_path):
    assert public_name(str(cached(tmp_path))) == MINILM
    assert public_name("org/other") == "org/other"
    (tmp_path / "encoder").mkdir()
    assert public_name(str(tmp_path / "encoder")) == "encoder"


def test_what_the_command_line_fetches_is_named():
    books = {"bookcrossing", "bookcrossing-core", "goodreads"}
    assert set(FETCHABLE) == {"minilm", "movielens-100k", "movielens-1m", *books}
    with pytest.raises(FetchError, match="Could not get GoodReads"):
        FETCHABLE["goodreads"]()
