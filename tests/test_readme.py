"""What the README, and the pages that took over parts of it, show runs as it stands there."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from finetuned import finetuned
from transformers import AutoConfig, AutoTokenizer, pipeline

from flip_hf import FlipConfig, FlipForCTR, FlipProcessor
from flip_hf.cli import COMMANDS
from flip_hf.fetch import minilm
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.settings import FinetuneSettings, PretrainSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
MAX_WORDS = 900


def blocks(language, page="README.md"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Names are found in the Hub cache, and nobody waits for a Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_it_is_short():
    assert len(README.split()) < MAX_WORDS


def test_from_a_frame_to_scores(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (example,) = blocks("python")
    namespace = {}
    exec(compile(example, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    probabilities = [float(found) for found in re.findall(r"'probability': ([\d.e-]+)", printed)]
    clicked = namespace["clicks"]["clicked"].tolist()[:3]
    assert [probability > 0.5 for probability in probabilities] == [bool(click) for click in clicked]
    unseen = pipeline("ctr-prediction", model=str(tmp_path / "runs" / "clicks"))({"user_id": 1, "title": "Jaws (1975)"})
    assert 0 < unseen["probability"] < 1


def test_numbers_and_pictures_are_those_of_the_results():
    section = README[README.index("## Results") : README.index("## What it can do")]
    numbers = set(re.findall(r"\d\.\d{4}", section))
    assert len(numbers) > 10
    assert not {number for number in numbers if number not in RESULTS}
    for sentence in (
        "FLIP_ID, which costs as much to serve as DCNv2, beats",
        "FLIP does not differ significantly from DCNv2",
    ):
        assert sentence in RESULTS
    assert f'alt="{re.search(r"!.(Bar chart[^]]*).", RESULTS)[1]}"' in section, "run make report"
    for picture in re.findall(r'(?:src|srcset)="([^"]+)"', README):
        assert (ROOT / picture).is_file(), picture


def test_the_page_on_scoring(encoder, tmp_path, capsys):
    served, loaded, losses = blocks("python", "docs/how_to/pipeline.md")
    rows = [{"user_id": 196, "gender": "M", "title": "Kolya (1996)", "genre": "Comedy"}]
    columns = {name: [value] for name, value in rows[0].items()}
    processor = FlipProcessor.fit(columns, list(columns), AutoTokenizer.from_pretrained(encoder))
    text = AutoConfig.from_pretrained(encoder)
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(FlipConfig(text_config=text, text_layers=1, fields=processor.fields)))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    namespace = {"folder": str(tmp_path / "model"), "rows": rows}
    exec(compile(loaded, "pipeline.md", "exec"), namespace)
    scored = re.fullmatch(r"tensor\(\[(0\.\d+)\]\)\n", capsys.readouterr().out)
    assert scored is not None
    exec(compile(served, "pipeline.md", "exec"), namespace)
    found = re.fullmatch(r"\[\{'probability': (0\.\d+)\}\]\n", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(scored[1]), abs=1e-4)
    torch.manual_seed(0)
    exec(compile(losses, "pipeline.md", "exec"), namespace)
    # The text encoder is the pretrained one: what it says of a sentence is what the package's own weights say.
    taken = namespace["model"].flip.text_model.embeddings.word_embeddings.weight
    assert taken.shape == (30522, 384)
    assert "icl_tabular_to_text_accuracy" in capsys.readouterr().out


def test_commands_and_configurations_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = README + (ROOT / "docs" / "tutorials" / "demo.md").read_text(encoding="utf-8")
    for command in re.findall(r"examples/\w+\.py", pages):
        assert (ROOT / command).is_file(), command
    for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", pages, flags=re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    for name in re.findall(r"flip-hf ([a-z]+)", pages):
        assert name in COMMANDS, name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for kind, name in ((PretrainSettings, "pretrain"), (FinetuneSettings, "finetune")):
        run = parse_run(kind, ["--config", f"examples/configs/ml-100k/{name}.yaml", "--output_dir", "runs/x"])
        assert run.data.source == "movielens-100k"


def test_the_configuration_for_ones_own_log_is_read(tmp_path):
    (tmp_path / "ads.yaml").write_text(blocks("yaml")[0])
    run = parse_run(PretrainSettings, ["--config", str(tmp_path / "ads.yaml"), "--output_dir", "x"])
    assert run.data.fields[2] == {"name": "ad_title", "max_tokens": 32}
    assert run.training.num_train_epochs == 3


def test_the_fields_of_the_page_on_fields_are_read(tmp_path):
    (tmp_path / "ads.yaml").write_text(blocks("yaml", "docs/how_to/fields.md")[0])
    (tmp_path / "ads.yaml").open("a").write("  train_file: log.csv\n  validation_file: log.csv\n")
    run = parse_run(PretrainSettings, ["--config", str(tmp_path / "ads.yaml"), "--output_dir", "x"])
    kinds = [field["kind"] for field in run.data.fields if isinstance(field, dict) and "kind" in field]
    assert kinds == ["numeric", "multi_categorical", "sequence", "text"]
