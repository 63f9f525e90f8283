"""No secret of the environment or of the Hub's own files turns up in what a run leaves or prints."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_runs import EXAMPLES
from waiting import PATIENCE

SECRETS = {
    "HF_TOKEN": "hf_" + "CanaryInTheEnvironmentOfTheRunAbcd",
    "WANDB_API_KEY": "feedfacecafe" * 3 + "beef",
    "AWS_SECRET_ACCESS_KEY": "CanaryOfAnotherService/0123456789abcdef",
}
STORED = "hf_" + "CanaryThatWasStoredByHfAuthLoginXy"

# A run takes its checkpoints away when it ends; what is in them counts too.
KEEPING_CHECKPOINTS = """
import runpy, sys
from flip_hf.training.checkpoints import Checkpoints
Checkpoints.clear = lambda self: None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def environment(tmp_path):
    """One with secrets, a token that `hf auth login` stored, and no network."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(STORED)
    (tmp_path / "hf" / "stored_tokens").write_text(f"[canary]\nhf_token = {STORED}\n")
    places = {"HF_HOME": str(tmp_path / "hf"), "FLIP_HF_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **SECRETS, **places}


def run(code_or_script, arguments, environment):
    command = [sys.executable, *code_or_script, *arguments]
    return subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE)


def holding(folder, secret):
    """The files that hold a secret, by name or content; what Parquet compresses is unpacked."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes() + str(path.relative_to(folder)).encode()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            data += str(table.to_pydict()).encode() + str(table.schema).encode()
        if secret.encode() in data:
            found.append(path.relative_to(folder).as_posix())
    return found


@pytest.mark.parametrize("token", [SECRETS["HF_TOKEN"], None], ids=["in the environment", "stored"])
def test_a_run_leaves_and_prints_no_secret(workplace, tmp_path, environment, token):
    if token is None:
        del environment["HF_TOKEN"]
    output = tmp_path / "run"
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(output)]
    arguments += ["--training.max_steps", "6", "--training.save_steps", "3"]
    done = run(["-c", KEEPING_CHECKPOINTS, str(EXAMPLES / "finetune.py")], arguments, environment)
    assert done.returncode == 0, done.stderr.decode()

    written = {path.relative_to(output).parts[0] for path in output.rglob("*") if path.is_file()}
    files = {"log.jsonl", "run.json", "test_scores.parquet", "curves.png", "calibration.png"}
    assert written == {"model", "checkpoints", "tensorboard", *files}
    # The search finds what is there: a field's name is in these.
    assert {"run.json", "model/config.json", "model/vocabulary.parquet"} <= set(holding(output, "user_id"))
    for secret in (*SECRETS.values(), STORED):
        assert holding(output, secret) == []
        assert secret.encode() not in done.stdout + done.stderr


def test_an_error_prints_no_secret(workplace, tmp_path, environment):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    done = run([str(EXAMPLES / "finetune.py")], [*arguments, "--model.text_encoder", "org/private"], environment)
    assert done.returncode != 0
    assert b"Could not get the text encoder 'org/private'" in done.stderr
    for secret in (*SECRETS.values(), STORED):
        assert secret.encode() not in done.stdout + done.stderr
        assert holding(tmp_path / "run", secret) == []


def test_what_is_looked_for_would_be_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "plain.bin").write_bytes(b"\x00" + STORED.encode() + b"\xff")
    pq.write_table(pa.table({"x": [STORED] * 3}), tmp_path / "b.parquet", compression="zstd")
    (tmp_path / STORED).write_text("")
    assert holding(tmp_path, STORED) == ["a/plain.bin", "b.parquet", STORED]
