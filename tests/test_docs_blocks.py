"""What the pages of docs/ show runs as it stands there. README.md has tests of its own (`test_readme.py`)."""

import json
import re
import shlex
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from flip_hf import FlipForCTR, FlipProcessor
from flip_hf.cli import COMMANDS, main
from flip_hf.fetch import minilm
from flip_hf.runs.parsing import parse_run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Python blocks that do not run here, by their page and a part that no other block of the page has: the test that
# runs them, or the reason.
ELSEWHERE = {
    ("how_to/hub.md", "model.push_to_hub("): "tests/hub/test_push.py pushes so to a Hub on loopback",
    ("how_to/hub.md", 'model="org/name"'): "tests/hub/test_end_to_end.py pulls so from a Hub on loopback",
    ("how_to/ray.md", "import ray"): "tests/test_ray.py: needs Ray, and a bucket that does not exist",
    ("how_to/trainer.md", "FlipForPreTraining"): "tests/test_trainer.py, with what the training must reach",
    ("how_to/trainer.md", "import pandas"): "tests/test_trainer.py, with what the training must reach",
    ("tutorials/serving.md", "liked"): "tests/test_tower_vectors.py, with a model of two text towers",
}


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)


def name_of(page):
    return page.relative_to(DOCS).as_posix()


def is_elsewhere(page, block):
    return any(name == name_of(page) and part in block for name, part in ELSEWHERE)


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if any(not is_elsewhere(page, b) for b in blocks(page, "python"))]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Names are found in the Hub cache, and nobody waits for a Hub."""
    minilm()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def names(ctr_folder, click_rows, tmp_path, monkeypatch):
    """What the pages take as given: a finetuned model and its rows, training rows, a processor, an encoder."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "flip"
    place.mkdir(parents=True)
    (place / "model").symlink_to(ctr_folder)
    numbers = range(24)
    train = pd.DataFrame(
        {
            "user_id": [i % 6 for i in numbers],
            "movie_id": [i % 4 for i in numbers],
            "title": [f"Film {i % 4}" for i in numbers],
            "genre": [["Comedy", "Drama,War"][i % 2] for i in numbers],
            "label": [i % 2 for i in numbers],
        }
    )
    rows = pd.DataFrame(click_rows).head(4).to_dict("records")
    processor = FlipProcessor.fit(train, ["user_id", "title"], minilm(), label="label")
    given = {"FlipForCTR": FlipForCTR, "folder": str(ctr_folder), "rows": rows}
    return {**given, "train": train, "processor": processor, "encoder": minilm()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_runs(page, names):
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        if not is_elsewhere(page, block):
            exec(compile(block, name_of(page), "exec"), names)


def test_blocks_that_run_elsewhere_are_there():
    for (name, part), reason in ELSEWHERE.items():
        found = [block for block in blocks(DOCS / name, "python") if part in block]
        assert len(found) == 1, f"{name} has {len(found)} blocks with {part!r}: mend ELSEWHERE"
        test = re.match(r"tests/[\w/]+\.py", reason)
        assert test is None or (ROOT / test[0]).is_file(), reason


def commands(page):
    """The calls of `flip-hf` that a page shows, as lists of arguments without the program."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("flip-hf "):
                yield shlex.split(line, comments=True)[1:]


# Half a minute; other tests run the same commands.
@pytest.mark.slow
def test_the_tutorial_runs_from_its_log_to_its_scores(tmp_path, monkeypatch, capsys):
    page = DOCS / "tutorials" / "your_own_log.md"
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})
    (settings,) = blocks(page, "yaml")
    Path("ads.yaml").write_text(settings)
    for arguments in commands(page):
        AcceleratorState._reset_state(reset_partial_state=True)
        main(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    scores = pd.read_parquet("scores.parquet")
    assert len(scores) == 100
    assert set(scores) >= {"user_id", "ad_title", "probability"}
    for name in ("model", "run.json", "log.jsonl", "curves.png"):
        assert (Path("runs/ads") / name).exists()
    record = json.loads(Path("runs/ads/run.json").read_text())
    assert record["result"]["test"]["auc"] > 0.6, record["result"].keys()


def test_the_commands_of_the_first_page_are_read(ctr_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(commands(DOCS / "get_started.md"))
    Path("runs/pretrained").mkdir(parents=True)
    Path("runs/pretrained/model").symlink_to(ctr_folder)
    assert [name for name, *_ in found] == ["fetch", "finetune", "pretrain", "finetune"]
    for name, *arguments in found[1:]:
        run = parse_run(COMMANDS[name].settings, arguments)
        assert run.data.source == "movielens-100k"
