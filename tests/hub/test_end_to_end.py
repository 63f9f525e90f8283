"""From the example script to the Hub and back, as a user does it: each step in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import clients
from hub.server import Fault, HubServer
from waiting import PATIENCE, until

from flip_hf import FlipForCTR, FlipProcessor
from flip_hf.data.sources import dataset_source
from flip_hf.hub.card import is_untouched

# One worker runs them all: each would train a model of its own.
pytestmark = pytest.mark.xdist_group("end to end")

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKEN = "hf_" + "Canary" * 6
NAME = "org/ml-100k"
ROWS = [
    {"user_id": 196, "gender": "M", "age": 49, "occupation": "writer", "zipcode": "55105", "movie_id": 242,
     "title": "Kolya (1996)", "genre": "Comedy"},
    {"user_id": "nobody", "gender": None, "age": 7, "occupation": "other", "zipcode": "0", "movie_id": 1,
     "title": "Toy Story (1995)", "genre": "Animation, Children's, Comedy"},
]  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with HubServer({TOKEN: "org", "hf_stranger": "stranger"}) as server:
        yield server


@pytest.fixture(scope="module")
def encoder(workplace):
    return workplace / "encoder"


def finetune(hub, home, encoder, output, *flags, script="finetune"):
    """The command of a tiny run on MovieLens-100K, and its environment."""
    tiny = {
        "--data.source": "movielens-100k",
        "--data.max_train_rows": 512,
        "--data.max_validation_rows": 128,
        "--model.text_encoder": encoder,
        "--model.options": '{"embedding_dim": 8, "backbone_options": {"hidden_sizes": [16]}}',
        "--training.per_device_train_batch_size": 64,
        "--training.learning_rate": 0.01,
        "--output-dir": output,
    }
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *(str(part) for pair in tiny.items() for part in pair)]
    return {"args": [*command, *flags], "env": hub.environment(home, TOKEN)}


def run(hub, home, program, name, settings=None, token=None, **environment):
    """A program of `clients` in a new process."""
    command = [sys.executable, "-c", program, name, json.dumps(settings or {}), json.dumps(ROWS)]
    environment = hub.environment(home, token) | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def answer(done):
    assert done.returncode == 0, done.stderr
    return torch.tensor(clients.parse(done.stdout))


@pytest.fixture(scope="module")
def pushed(hub, encoder, tmp_path_factory):
    """A run that was pushed when it ended: its folder, what it printed, and its model's logits."""
    folder = tmp_path_factory.mktemp("runs") / "flip"
    home = tmp_path_factory.mktemp("trainer")
    # Fetched here where it is not yet: the run knows the Hub on loopback only.
    dataset_source("movielens-100k").load()
    command = finetune(hub, home, encoder, folder, "--push-to-hub", NAME)
    done = subprocess.run(**command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    processor, model = FlipProcessor.from_pretrained(folder / "model"), FlipForCTR.from_pretrained(folder / "model")
    with torch.no_grad():
        logits = model.eval()(**processor(ROWS, return_tensors="pt")).logits
    return {"folder": folder, "home": home, "output": done.stdout + done.stderr, "logits": logits}


def test_what_the_repository_holds(hub, pushed):
    found = hub.files(NAME)
    assert set(found) - {".gitattributes"} == {
        "README.md", "run.json", "curves.png", "calibration.png", "config.json", "model.safetensors",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocabulary.parquet", "flip_hub.py",
    }  # fmt: skip
    card = found["README.md"].decode()
    assert is_untouched(card)
    assert "MovieLens-100K" in card
    record = json.loads(found["run.json"])
    assert record["result"]["test"] == json.loads((pushed["folder"] / "run.json").read_text())["result"]["test"]
    assert f"| AUC | {record['result']['test']['auc']:.4f} |" in card
    assert len([c for c in hub.commits(NAME) if c.message.startswith("Model of the run")]) == 1


def test_neither_token_nor_path_gets_out(hub, pushed):
    written = {path: path.read_bytes() for path in pushed["folder"].rglob("*") if path.is_file()}
    for name, content in [*written.items(), *hub.files(NAME).items(), ("output", pushed["output"].encode())]:
        assert TOKEN.encode() not in content, name
    for name, content in hub.files(NAME).items():
        assert str(pushed["folder"].parent).encode() not in content, name
        assert str(Path.home()).encode() + b"/" not in content, name


def test_load_by_name_then_offline_then_with_the_server_down(hub, pushed, tmp_path):
    loaded = answer(run(hub, tmp_path, clients.LOGITS, NAME))
    torch.testing.assert_close(loaded, pushed["logits"], rtol=0, atol=1e-6)
    before = len(hub.requests)
    assert torch.equal(answer(run(hub, tmp_path, clients.LOGITS, NAME, HF_HUB_OFFLINE="1")), loaded)
    assert len(hub.requests) == before, "nothing is asked offline"
    hub.stop()
    try:
        assert torch.equal(answer(run(hub, tmp_path, clients.LOGITS, NAME)), loaded)
        never = run(hub, tmp_path / "empty", clients.LOGITS, NAME)
        assert never.returncode != 0
        assert NAME in never.stderr.splitlines()[-1] or "connect" in never.stderr.lower()
    finally:
        hub.start()


def test_the_pipeline_with_trust_and_without_importing_the_package(hub, pushed, tmp_path):
    found = answer(run(hub, tmp_path, clients.PIPELINE, NAME))
    torch.testing.assert_close(found, pushed["logits"].sigmoid(), rtol=0, atol=1e-6)


def test_without_the_package_one_line_says_what_to_install(hub, pushed, tmp_path):
    hidden = "import sys; sys.modules['flip_hf'] = None\n"
    # `import flip_hf` fails as it does where it is not installed.
    program = hidden + clients.PIPELINE.replace('assert "flip_hf" not in sys.modules', "")
    done = run(hub, tmp_path, program, NAME)
    assert done.returncode != 0
    assert "pip install flip_hf" in done.stderr.splitlines()[-1]


def test_revisions(hub, pushed, encoder, tmp_path):
    first = hub.commits(NAME)[0].sha
    flags = ["--push-to-hub", NAME, "--revision", "other", "--training.seed", "1"]
    command = finetune(hub, pushed["home"], encoder, tmp_path / "run", *flags)
    subprocess.run(**command, check=True, capture_output=True, timeout=PATIENCE)
    assert hub.commits(NAME)[0].sha == first
    pinned = answer(run(hub, tmp_path / "home", clients.LOGITS, NAME, {"revision": first}))
    branch = answer(run(hub, tmp_path / "home", clients.LOGITS, NAME, {"revision": "other"}))
    torch.testing.assert_close(pinned, pushed["logits"], rtol=0, atol=1e-6)
    assert (branch - pinned).abs().min() > 1e-3
    missing = run(hub, tmp_path / "home", clients.LOGITS, NAME, {"revision": "no-such-branch"})
    assert "no-such-branch" in missing.stderr.splitlines()[-1] + missing.stderr


def test_private(hub, pushed, encoder, tmp_path):
    repo = "org/private"
    # The same run, which has ended: it is only pushed.
    command = finetune(hub, pushed["home"], encoder, pushed["folder"], "--push-to-hub", repo, "--private", "--resume")
    subprocess.run(**command, check=True, capture_output=True, timeout=PATIENCE)
    assert hub.is_private(repo)
    for token in (None, "hf_stranger"):
        refused = run(hub, tmp_path / "a", clients.LOGITS, repo, token=token)
        assert refused.returncode != 0
        assert repo in refused.stderr
    for settings, token in (({"token": TOKEN}, None), ({}, TOKEN)):
        loaded = answer(run(hub, tmp_path / "b", clients.LOGITS, repo, settings, token))
        torch.testing.assert_close(loaded, pushed["logits"], rtol=0, atol=1e-6)


def test_finetuning_starts_from_a_model_by_name(hub, pushed, encoder, tmp_path):
    repo = "org/pretrained"
    command = finetune(hub, pushed["home"], encoder, tmp_path / "pre", "--push-to-hub", repo, script="pretrain")
    subprocess.run(**command, check=True, capture_output=True, timeout=PATIENCE)
    assert "It can't predict clicks yet" in hub.files(repo)["README.md"].decode()
    command = finetune(hub, tmp_path / "home", encoder, tmp_path / "run", "--pretrained", repo)
    subprocess.run(**command, check=True, capture_output=True, timeout=PATIENCE)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["pretraining"] == json.loads(hub.files(repo)["run.json"])
    assert record["model"]["text_base_model"] == encoder.name
    refused = run(hub, tmp_path / "home", clients.PIPELINE, repo)
    assert "does not learn clicks" in refused.stderr.splitlines()[-1]


def test_killed_half_way_and_pushed_again(hub, pushed, encoder):
    repo = "org/killed"
    flags = ["--push-to-hub", repo, "--resume"]
    command = finetune(hub, pushed["home"], encoder, pushed["folder"], *flags)
    hub.fail("commit", Fault(delay=PATIENCE))
    before = len(hub.requests)
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: any(r.step == "commit" for r in hub.requests[before:]))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.mend()
    uploaded = len([r for r in hub.requests[before:] if r.step == "lfs_upload"])
    assert uploaded > 0
    done = subprocess.run(**command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert len([r for r in hub.requests[before:] if r.step == "lfs_upload"]) == uploaded, "what was sent stays sent"
    assert len([c for c in hub.commits(repo) if c.message.startswith("Model of the run")]) == 1
    assert hub.files(repo)["model.safetensors"] == (pushed["folder"] / "model" / "model.safetensors").read_bytes()
    assert not list(pushed["folder"].glob(".push-*")), "what the killed push had laid out is cleared away"


def test_every_better_model_is_pushed_and_a_failing_hub_stops_no_training(hub, pushed, encoder, tmp_path):
    repo = "org/best"
    flags = ["--push-to-hub", repo, "--push-when", "best", "--training.evaluations_per_epoch", "4"]
    flags += ["--training.patience", "9", "--training.report_to", "[]"]
    command = finetune(hub, pushed["home"], encoder, tmp_path / "run", *flags)
    # A Hub that answers 403 to one push: no further attempt helps.
    hub.fail("commit", Fault(status=403))
    done = subprocess.run(**command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "failed, and training continues" in done.stderr
    messages = [c.message for c in hub.commits(repo)]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    aucs = [e["auc"] for e in events if e["event"] == "validation"]
    better = sum(auc > max(aucs[:i], default=-1) for i, auc in enumerate(aucs))
    assert sum(m.startswith("Best model so far") for m in messages) == better - 1
    assert messages[0].startswith("Model of the run")
    assert hub.files(repo)["model.safetensors"] == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()


def test_a_push_that_fails_at_the_end_loses_nothing_and_says_how_to_go_on(hub, pushed, encoder):
    repo = "org/refused"
    flags = ["--push-to-hub", repo, "--resume"]
    command = finetune(hub, pushed["home"], encoder, pushed["folder"], *flags)
    before = {p: p.read_bytes() for p in pushed["folder"].rglob("*") if p.is_file()}
    hub.fail("commit", Fault(status=403))
    done = subprocess.run(**command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0
    assert "The model is saved in" in done.stderr
    assert "--resume true" in done.stderr
    assert {p: p.read_bytes() for p in pushed["folder"].rglob("*") if p.is_file()} == before
    subprocess.run(**command, check=True, capture_output=True, timeout=PATIENCE)
    assert "model.safetensors" in hub.files(repo)
