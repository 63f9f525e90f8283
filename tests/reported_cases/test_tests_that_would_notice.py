"""Four changes of the code that once no test noticed. Each is made in a copy, in which a test must fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# The changed file, what is replaced there (nothing: a line is added at its end) and by what, and which tests look.
CHANGES = {
    "text and table masked from one stream": (
        "flip_hf/data/collators.py",
        "",
        "\n_TEXT_STREAM = _TABULAR_STREAM\n",
        ["tests/test_masking.py"],
    ),
    "feature_l2 left out of the loss": (
        "flip_hf/training/loop.py",
        "if settings.feature_l2 and",
        "if False and",
        ["tests/test_loop.py", "tests/test_optimization.py"],
    ),
    "no warm-up": (
        "flip_hf/training/optimization.py",
        "round(settings.warmup_ratio * total_steps)",
        "0",
        ["tests/test_optimization.py"],
    ),
    "validation masks what training does": (
        "flip_hf/runs/commands.py",
        "training.seed + 1",
        "training.seed",
        ["tests/test_settings_take_effect.py"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_code_still_reads_as_the_changes_expect(name):
    file, old, _, tests = CHANGES[name]
    assert not old or (REPOSITORY / file).read_text().count(old) == 1
    assert all((REPOSITORY / test).exists() for test in tests)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_test_fails_after(name, tmp_path):
    file, old, new, tests = CHANGES[name]
    for part in ("flip_hf", "tests", "examples"):
        shutil.copytree(REPOSITORY / part, tmp_path / part)
    for part in ("pyproject.toml", "setup.cfg"):
        shutil.copy(REPOSITORY / part, tmp_path)
    code = (tmp_path / file).read_text()
    (tmp_path / file).write_text(code.replace(old, new) if old else code + new)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # 1: a test failed. Any other code says that pytest could not run them.
    assert done.returncode == 1, done.stdout[-3000:]
    assert "AssertionError" in done.stdout or "assert " in done.stdout
