"""Pushing with the real client: one commit or none, whatever goes wrong."""

import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import clients
from hub.server import Fault, HubServer

from flip_hf.hub.card import is_untouched

ROOT = Path(__file__).parents[2]

TOKEN = "hf_" + "owner" * 7
STEPS = ["create", "info", "tree", "preupload", "lfs_batch", "lfs_upload", "commit"]
FAULTS = {
    "500": Fault(status=500),
    "503 twice": Fault(status=503, times=2),
    "429": Fault(status=429, retry_after=1),
    "dropped": Fault(drop="before"),
    "lost answer": Fault(drop="after"),
}


@pytest.fixture(scope="module")
def hub():
    """One for the module: a client's process knows one address. Each test has a repository of its own."""
    with HubServer({TOKEN: "org", "hf_reader": "org"}, read_only=["hf_reader"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Calls a function in a process whose Hub is the server."""
    settings = hub.environment(tmp_path_factory.mktemp("home"), TOKEN)
    with mock.patch.dict(os.environ, settings, clear=True):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(int).result()
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *map(str, args), **kwargs).result()


@pytest.fixture
def folder(tmp_path):
    """Small and large files."""
    content = {"config.json": b"{}", "README.md": b"# A card\n", "model.safetensors": os.urandom(4096)}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files(hub, repo, revision="main"):
    return {name: data for name, data in hub.files(repo, revision).items() if name != ".gitattributes"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", STEPS)
def test_whatever_goes_wrong_there_is_one_commit(hub, client, folder, step, fault):
    repo = f"org/{step}-{fault.replace(' ', '-')}"
    before = len(hub.requests)
    hub.fail(step, FAULTS[fault])
    commit = client(clients.push, folder, repo)
    assert any(r.step == step and r.status != 200 for r in hub.requests[before:]), "the fault was not met"
    head, *others = hub.commits(repo)
    assert commit == head.sha
    assert [c.message for c in [head, *others]].count("A push") == 1
    assert files(hub, repo) == held(folder)


def test_pushing_again_makes_no_commit(hub, client, folder):
    commit = client(clients.push, folder, "org/again")
    assert client(clients.push, folder, "org/again") == commit
    assert [c.message for c in hub.commits("org/again")].count("A push") == 1


def test_weights_of_another_number_of_shards_do_not_stay(hub, client, folder):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (folder / name).write_bytes(name.encode())
    (folder / "model.safetensors").unlink()
    client(clients.push, folder, "org/shards")
    hub.add_commit("org/shards", {"notes.txt": b"mine", "pytorch_model.bin": b"theirs"}, message="By hand")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(b"one")
    client(clients.push, folder, "org/shards")
    assert files(hub, "org/shards") == held(folder) | {"notes.txt": b"mine", "pytorch_model.bin": b"theirs"}


def test_a_model_in_shards_is_pushed_and_loads_by_name(hub, client, ctr_folder):
    commit = client(clients.push_model, ctr_folder, "org/large", max_shard_size="20KB")
    head = hub.commits("org/large")[0]
    assert (commit, head.message) == (head.sha, "Push a FLIP model")
    shards = [name for name in files(hub, "org/large") if name.startswith("model-")]
    assert len(shards) >= 3
    assert {"model.safetensors.index.json", "config.json", "vocabulary.parquet", "flip_hub.py"} <= set(
        files(hub, "org/large")
    )
    assert client(clients.weights, "org/large") == client(clients.weights, ctr_folder)


MODEL = {"config.json", "model.safetensors"}
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocabulary.parquet"}


def test_the_models_own_method_makes_one_commit_of_all(hub, client, ctr_folder):
    record = json.loads((ROOT / "model_cards" / "ml-100k-flip" / "run.json").read_text())
    settings = {"commit_message": "All of it", "commit_description": "Both", "private": True, "revision": "next"}
    commit = client(clients.push_together, ctr_folder, "org/method", record=record, **settings)
    head = hub.commits("org/method", "next")[0]
    assert (head.sha, head.message.splitlines()[0]) == (commit, "All of it")
    found = files(hub, "org/method", "next")
    assert set(found) == MODEL | PROCESSOR | {"README.md", "run.json", "flip_hub.py"}
    assert is_untouched(found["README.md"].decode())
    assert json.loads(found["config.json"])["auto_map"] == {"AutoConfig": "flip_hub.FlipConfig"}
    assert hub.is_private("org/method")


def test_a_model_and_its_processor_may_follow_each_other(hub, client, ctr_folder):
    of_model, of_processor, told = client(clients.push_apart, ctr_folder, "org/apart")
    assert told == [
        "org/apart has the model without its processor. Push the processor too: processor.push_to_hub('org/apart'). "
        "Next time, push both: model.push_to_hub('org/apart', processor=processor)"
    ]
    last, first, *_ = hub.commits("org/apart")
    assert (first.sha, last.sha) == (of_model, of_processor)
    assert last.message == "Push a FLIP processor"
    # The model's weights stay where a processor is pushed.
    client(clients.push_model, ctr_folder, "org/at-once")
    assert files(hub, "org/apart") == files(hub, "org/at-once")


def test_a_pipeline_pushes_what_it_was_made_of(hub, client, ctr_folder):
    client(clients.push_pipeline, ctr_folder, "org/pipe")
    assert set(files(hub, "org/pipe")) == MODEL | PROCESSOR | {"flip_hub.py"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"create_pr": True}, "ValueError: create_pr is not supported.*push to a branch with revision="),
        ({"tags": ["ctr"]}, "ValueError: tags is not supported, because the card has its own"),
        ({"token": False}, "ValueError: token=False: a push needs a token"),
        ({"safe_serialization": True}, "TypeError: .*unexpected keyword argument 'safe_serialization'"),
    ],
)
def test_what_can_not_be_honoured_is_refused_before_anything_is_made(hub, client, ctr_folder, settings, said):
    before = len(hub.requests)
    assert re.match(said, client(clients.push_together, ctr_folder, "org/refused", **settings))
    assert len(hub.requests) == before


def test_the_trainer_pushes_the_same_without_its_pickles(hub, client, ctr_folder, tmp_path):
    folder = tmp_path / "clicks"
    commit, repo = client(clients.push_trainer, ctr_folder, folder, dataset="Ads of 2024")
    assert repo == "org/clicks"
    assert (folder / "training_args.bin").is_file()
    head = hub.commits(repo)[0]
    assert (head.sha, head.message) == (commit, "End of training")
    found = files(hub, repo)
    assert set(found) == MODEL | PROCESSOR | {"README.md", "flip_hub.py"}
    card = found["README.md"].decode()
    assert "library_name: flip_hf" in card
    assert "Ads of 2024" in card
    assert is_untouched(card)
    assert hub.is_private(repo)
    assert client(clients.weights, folder) == client(clients.weights, repo)

    record = json.loads((ROOT / "model_cards" / "ml-100k-flip" / "run.json").read_text())
    client(clients.push_trainer, ctr_folder, folder, record=record)
    assert "MovieLens-100K" in files(hub, repo)["README.md"].decode()
    assert client(clients.push_trainer, ctr_folder, folder, blocking=False)[0].startswith("ValueError: blocking=False")


def test_a_trainer_that_pushes_as_it_trains_pushes_no_pickles(hub, client, ctr_folder, click_rows, tmp_path):
    pq.write_table(pa.table(click_rows).slice(0, 32), tmp_path / "rows.parquet")
    repo = client(clients.train_and_push, ctr_folder, tmp_path / "passing", tmp_path / "rows.parquet")
    messages = [commit.message for commit in hub.commits(repo)]
    assert messages[:2] == ["Training in progress, step 2", "Training in progress, step 1"]
    assert set(files(hub, repo)) == MODEL | PROCESSOR | {"README.md", "flip_hub.py"}


def test_a_card_edited_by_hand_stays(hub, client, folder):
    client(clients.push, folder, "org/card")
    hub.add_commit("org/card", {"README.md": b"# Mine\n"}, message="By hand")
    (folder / "config.json").write_text('{"a": 1}')
    client(clients.push, folder, "org/card")
    assert files(hub, "org/card")["README.md"] == b"# Mine\n"
    assert files(hub, "org/card")["config.json"] == b'{"a": 1}'


def test_a_card_that_can_not_be_read_is_not_replaced(hub, client, folder):
    client(clients.push, folder, "org/unread")
    hub.add_commit("org/unread", {"README.md": b"# Mine\n"}, message="By hand")
    (folder / "config.json").write_text('{"a": 1}')
    hub.fail("resolve", Fault(status=503, times=200))
    try:
        found = client(clients.push, folder, "org/unread")
    finally:
        hub.mend()
    assert "Error: " in found
    assert hub.commits("org/unread")[0].message == "By hand"


def test_somebody_else_pushes_at_the_same_time(hub, client, folder):
    client(clients.push, folder, "org/race")
    theirs = {"notes.txt": b"theirs"}
    hub.fail("commit", Fault(meanwhile=lambda: hub.add_commit("org/race", theirs, message="Theirs")))
    (folder / "config.json").write_text('{"a": 1}')
    client(clients.push, folder, "org/race")
    assert [c.message for c in hub.commits("org/race")][:3] == ["A push", "Theirs", "A push"]
    assert files(hub, "org/race") == held(folder) | theirs


def test_a_branch_is_made(hub, client, folder):
    client(clients.push, folder, "org/branch")
    (folder / "config.json").write_text('{"a": 1}')
    client(clients.push, folder, "org/branch", revision="next")
    assert files(hub, "org/branch")["config.json"] == b"{}"
    assert files(hub, "org/branch", "next")["config.json"] == b'{"a": 1}'


def test_private_means_private(hub, client, folder):
    client(clients.push, folder, "org/hidden", private=True)
    assert hub.is_private("org/hidden")
    client(clients.push, folder, "org/open")
    assert not hub.is_private("org/open")
    (folder / "config.json").write_text('{"a": 1}')
    found = client(clients.push, folder, "org/open", private=True)
    assert found.startswith("ValueError: private is set, but org/open is public")
    assert files(hub, "org/open")["config.json"] == b"{}"


@pytest.mark.parametrize("token", ["hf_reader", "hf_nobody"])
def test_a_token_that_may_not_write_is_told_at_once(hub, client, folder, token):
    before = len(hub.requests)
    found = client(clients.push, folder, "org/not-mine", token=token)
    assert "Error: " in found
    assert token not in found
    assert len(hub.requests) - before <= 3, "no attempt is made again"


def test_what_does_not_belong_is_refused_before_anything_is_sent(hub, client, folder):
    client(clients.push, folder, "org/clean")
    for name, content, said in (
        ("optimizer.bin", b"x", "'optimizer.bin' must not be pushed to a model repository"),
        ("training_args.pkl", b"x", "'training_args.pkl' must not be pushed"),
        ("config.json", json.dumps({"x": TOKEN}).encode(), "config.json contains a Hub token"),
        ("vocab.txt", b"a hf_" + b"A1b2C3d4E5" * 3 + b" z", "vocab.txt contains a Hub token"),
    ):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        found = client(clients.push, folder, "org/clean")
        assert said in found
        assert TOKEN not in found
        (folder / name).write_bytes(kept) if kept else (folder / name).unlink()
    (folder / "run.json").symlink_to("/etc/hostname")
    assert "'run.json' must not be pushed" in client(clients.push, folder, "org/clean")
    assert len([c for c in hub.commits("org/clean") if c.message == "A push"]) == 1
