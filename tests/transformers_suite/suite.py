"""transformers' own generic tests: fetched from its source distribution, imported as a package, never committed.

The distribution has the modules at the top of transformers' `tests/` and none of its folders. What the modules import
from there is stood in for, so the tests that lie there do not run: export, generation, pipelines.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from flip_hf.fetch import PIP_TOTAL_TIMEOUT_S, FetchError, cache_dir, check_file

VERSION = "5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
MODULES = ("test_modeling_common", "test_training_mixin", "test_configuration_common", "test_processing_common")

_PACKAGE = "transformers_tests"
_ARCHIVE = f"transformers-{VERSION}.tar.gz"
# By the name of the module that is not there: what is imported from it.
_STAND_INS = {
    f"{_PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{_PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # Read for configurations without sub-configurations only.
    f"{_PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    # Names samples of images, sounds and videos.
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def folder() -> Path:
    """Where the modules are, or would be."""
    return cache_dir() / "tests" / f"transformers-{VERSION}"


def is_fetched() -> bool:
    """Whether `fetch` was run."""
    return all((folder() / f"{name}.py").is_file() for name in MODULES)


def fetch() -> Path:
    """Gets the source distribution from PyPI unless it is in the cache, and unpacks the modules.

    Raises:
        FetchError: pip failed, or the distribution is not the one whose hash is written here.
    """
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    archive = target / _ARCHIVE
    with FileLock(target / ".lock"):
        if not archive.is_file():
            _download(archive)
        check_file(archive, "sha256", SHA256)
        with tarfile.open(archive) as members:
            for name in MODULES:
                source = members.extractfile(f"transformers-{VERSION}/tests/{name}.py")
                assert source is not None
                (target / f"{name}.py").write_bytes(source.read())
        # transformers imports itself anew from the folder of its tests, and wants a package there.
        (target / "__init__.py").touch()
    return target


def _download(archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".fetch-") as temporary:
        requirements = Path(temporary) / "requirements.txt"
        # With a hash pip runs nothing of a distribution that has another one.
        requirements.write_text(f"transformers=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", "transformers", "--require-hashes", "--dest", temporary]
        try:
            done = subprocess.run(
                [*command, "-r", str(requirements)], capture_output=True, text=True, timeout=PIP_TOTAL_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"pip download took longer than {PIP_TOTAL_TIMEOUT_S:.0f} seconds") from error
        if done.returncode != 0:
            raise FetchError(f"pip download transformers=={VERSION}: {done.stderr.strip()}")
        (Path(temporary) / _ARCHIVE).replace(archive)


def load(name: str) -> ModuleType:
    """Imports one of `MODULES`."""
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(folder())]
        sys.modules[_PACKAGE] = package
        for module_name, contents in _STAND_INS.items():
            parent, _, own = module_name.rpartition(".")
            if parent != _PACKAGE and parent:
                sys.modules.setdefault(parent, ModuleType(parent))
            sys.modules[module_name] = ModuleType(own)
            vars(sys.modules[module_name]).update(contents)
    return importlib.import_module(f"{_PACKAGE}.{name}")


if __name__ == "__main__":
    print(fetch())
