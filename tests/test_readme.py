"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from finetuned import finetuned
from transformers import AutoConfig, AutoTokenizer

from flip_hf import FlipConfig, FlipForCTR, FlipProcessor
from flip_hf.fetch import MINILM, resolve_pretrained
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.settings import FinetuneSettings, PretrainSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def encoder():
    return resolve_pretrained(MINILM)


def test_loading_and_scoring(encoder, tmp_path, monkeypatch, capsys):
    example, _, serving = blocks("python")
    rows = re.search(r"rows = (\[.*?\])\n", example, flags=re.DOTALL)
    assert rows is not None
    columns = {name: [value] for name, value in eval(rows[1])[0].items()}
    processor = FlipProcessor.fit(columns, list(columns), AutoTokenizer.from_pretrained(encoder))
    text = AutoConfig.from_pretrained(encoder)
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(FlipConfig(text_config=text, text_layers=1, fields=processor.fields)))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "runs" / "flip" / "model")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(example, "README.md", "exec"), namespace)
    scored = re.fullmatch(r"tensor\(\[(0\.\d+)\]\)\n", capsys.readouterr().out)
    assert scored is not None
    exec(compile(serving, "README.md", "exec"), namespace)
    served = re.fullmatch(r"\[\{'probability': (0\.\d+)\}\]\n", capsys.readouterr().out)
    assert served is not None
    assert float(served[1]) == pytest.approx(float(scored[1]), abs=1e-4)


def test_pretraining_in_python(encoder, capsys):
    torch.manual_seed(0)
    namespace = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), namespace)
    # The text encoder is the pretrained one: what it says of a sentence is what the package's own weights say.
    taken = namespace["model"].flip.text_model.embeddings.word_embeddings.weight
    assert taken.shape == (30522, 384)
    assert "icl_tabular_to_text_accuracy" in capsys.readouterr().out


def test_commands_and_configurations_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in re.findall(r"examples/\w+\.py", README):
        assert (ROOT / command).is_file(), command
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
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
