"""A folder with loading code: loaded where flip_hf was never imported, where it is, and where it is not installed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports

import flip_hf
from flip_hf import FlipConfig, FlipForCTR, FlipProcessor
from flip_hf.checkpoint.loading_code import add_loading_code

ROW = {"user_id": 3, "gender": "M", "age": 20, "title": "42", "genre": "drama"}
CODE = "flip_hub.py"
REPOSITORY = "some-org/flip-1.0"


@pytest.fixture(scope="module")
def place(tmp_path_factory, ctr_folder):
    """`plain`, a saved model; `model`, the same with loading code, which a cache of the Hub in `hf` holds too."""
    place = tmp_path_factory.mktemp("place")
    for name in ("plain", "model"):
        shutil.copytree(ctr_folder, place / name)
    add_loading_code(place / "model")
    cached = place / "hf" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(place / "model", cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    return place


@pytest.fixture(scope="module")
def expected(place):
    return pipeline("ctr-prediction", model=place / "plain")(ROW)["probability"]


@pytest.fixture(scope="module")
def results(place):
    """What tests/trusting.py says of each case."""
    model, again = str(place / "model"), str(place / "again")
    parts = ["processor", "model"]
    cases = {
        "config": {"folder": model, "loads": ["config"]},
        "base": {"folder": model, "loads": ["base"]},
        "model": {"folder": model, "loads": ["model", "processor"], "row": ROW},
        "processor": {"folder": model, "loads": parts, "row": ROW},
        "pipeline": {"folder": model, "loads": ["pipeline"], "row": ROW},
        "repository": {"folder": REPOSITORY, "loads": ["pipeline"], "row": ROW},
        "parts saved": {
            "folder": model,
            "loads": parts,
            "saves": f"{again}/parts",
            "plain": [str(place / "plain"), f"{again}/plain"],
        },
        "pipeline saved": {"folder": model, "loads": ["pipeline"], "saves": f"{again}/pipeline"},
        "parts again": {"folder": f"{again}/parts", "loads": parts, "row": ROW},
        "pipeline again": {"folder": f"{again}/pipeline", "loads": ["pipeline"], "row": ROW},
        **{f"no {what}": {"folder": model, "loads": [what], "hidden": True} for what in ("pipeline", "model", *parts)},
    }
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flip_hf.__file__).parents[1]),
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        # Processes are forked, which threads do not survive.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).with_name("trusting.py")), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def auto_map(path):
    return json.loads(path.read_text()).get("auto_map", {})


@pytest.mark.parametrize(
    ("case", "types"),
    [
        ("config", ["configuration_flip.FlipConfig"]),
        ("base", ["towers.FlipModel"]),
        ("model", ["modeling_flip.FlipForCTR", "processing_flip.FlipProcessor"]),
        ("processor", ["processing_flip.FlipProcessor", "modeling_flip.FlipForCTR"]),
        ("pipeline", ["pipeline.CTRPredictionPipeline"]),
        ("repository", ["pipeline.CTRPredictionPipeline"]),
        ("parts again", ["processing_flip.FlipProcessor", "modeling_flip.FlipForCTR"]),
        ("pipeline again", ["pipeline.CTRPredictionPipeline"]),
    ],
)
def test_it_loads_where_flip_hf_was_never_imported(results, expected, case, types):
    assert results[case]["types"] == [f"flip_hf.{name}" for name in types]
    if "probability" in results[case]:
        assert results[case]["probability"] == pytest.approx(expected, abs=1e-6)
    assert ("probability" in results[case]) == (case not in ("config", "base"))


@pytest.mark.parametrize("what", ["pipeline", "model", "processor"])
def test_where_flip_hf_is_not_installed_one_line_says_how_to_install_it(results, what):
    assert results[f"no {what}"] == {"error": "this checkpoint needs the package flip_hf: pip install flip_hf"}


def test_what_came_with_loading_code_is_saved_with_it_and_nothing_else_is(results, place):
    assert set(results) >= {"parts saved", "pipeline saved"}
    code = (Path(flip_hf.__file__).parent / "checkpoint" / CODE).read_text()
    for name in ("parts", "pipeline"):
        folder = place / "again" / name
        assert [path.read_text() for path in folder.glob("*.py")] == [code]
        for file in ("config.json", "processor_config.json"):
            assert auto_map(folder / file) == auto_map(place / "model" / file) != {}
    plain = place / "again" / "plain"
    assert {path.name for path in plain.iterdir()} == {path.name for path in (place / "plain").iterdir()}
    assert not any(auto_map(plain / file) for file in ("config.json", "processor_config.json", "tokenizer_config.json"))


def test_it_loads_without_trust_where_flip_hf_is_imported(place, expected, tmp_path):
    folder = place / "model"
    assert type(AutoConfig.from_pretrained(folder)) is FlipConfig
    assert type(AutoProcessor.from_pretrained(folder)) is FlipProcessor
    assert type(AutoModelForSequenceClassification.from_pretrained(folder, mode="id")) is FlipForCTR
    for settings in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        pipe = pipeline("ctr-prediction", model=folder, **settings)
        assert pipe(ROW)["probability"] == pytest.approx(expected, abs=1e-6)
    model, processor = FlipForCTR.from_pretrained(folder), FlipProcessor.from_pretrained(folder)
    assert processor.content_hash() == FlipProcessor.from_pretrained(place / "plain").content_hash()
    assert pipeline("ctr-prediction", model=model, processor=processor)(ROW)["probability"] == pytest.approx(expected)
    model.in_mode("id").save_pretrained(tmp_path)
    assert (tmp_path / CODE).is_file()
    assert [cls._auto_class for cls in (FlipConfig, FlipForCTR, FlipProcessor)] == [None] * 3


def test_adding_it_changes_nothing_but_the_map(place, tmp_path):
    folder = place / "model"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {path.name for path in (place / "plain").iterdir()} | {CODE}
    for name in ("config.json", "processor_config.json"):
        with_code = json.loads(before[name])
        assert all(name.startswith("flip_hub.Flip") for name in with_code.pop("auto_map").values())
        assert with_code == json.loads((place / "plain" / name).read_text())
    shutil.copytree(folder, tmp_path / "twice")
    add_loading_code(tmp_path / "twice")
    assert {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()} == before


def test_either_part_gets_loading_code_alone(place, tmp_path):
    for name in ("config.json", "processor_config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match="save the model and its processor there first"):
            add_loading_code(folder)
        shutil.copyfile(place / "plain" / name, folder / name)
        add_loading_code(folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted([name, CODE])
        assert (folder / name).read_bytes() == (place / "model" / name).read_bytes()


def test_the_code_asks_for_no_package_before_it_can_say_what_is_missing(place):
    code = place / "model" / CODE
    # transformers looks these up before it runs the code, and fails in its own words.
    assert get_imports(code) == ["typing"]
    assert not [n for n in ast.walk(ast.parse(code.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
