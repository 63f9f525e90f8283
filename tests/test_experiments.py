"""The experiments' runner and report, over runs that are made up."""

import hashlib
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict
from records import make_record
from significance import delong, paired_t

from flip_hf.data.splits import SPLITS
from flip_hf.fetch import FetchError
from flip_hf.metrics.auc import auc
from flip_hf.metrics.gauc import gauc
from flip_hf.metrics.uauc import uauc

FOLDER = Path(__file__).parents[1] / "examples" / "experiments"
MODELS = {
    "plain": {"script": "finetune", "settings": {"mode": "id"}},
    "words": {"script": "finetune", "settings": {"mode": "text"}},
    "before": {"script": "pretrain", "settings": {}},
    "both": {"script": "finetune", "after": "before", "settings": {"mode": "joint"}},
}
TABLE = {
    "title": "A table",
    "caption": "What it says.",
    "data": "movielens-100k",
    "splits": ["random"],
    "seeds": 2,
    "pictures": ["Plain", "Both"],
    "rows": {
        "Mean": ["plain", "words"],
        "Plain": "plain",
        "Both": "both",
        "Wide": {
            "model": "both",
            "first": {"model.options.embedding_dim": 64},
            "last": {"training.num_train_epochs": 3},
        },
    },
    "compare": {"Both": ["Plain", "Mean"]},
}
SUMMARY = {
    "chart": [
        {
            "title": "Random split",
            "split": "random",
            "rows": {"Plain": ["one", "Plain"], "Averaged": ["one", "Mean"], "Joint": ["one", "Both"]},
        }
    ],
    "findings": [
        {
            "topic": "Both towers",
            "table": "one",
            "split": "random",
            "pairs": [
                {"rows": ["Both", "Plain"], "names": ["Joint", "Plain"]},
                {"rows": ["Plain", "Both"], "names": ["Plain", "Joint"]},
            ],
        }
    ],
}
NUM_ROWS = 60
LABELS = (np.arange(NUM_ROWS) % 3 == 0).astype(np.float32)


def logits(model, seed):
    noise = np.random.default_rng([seed, len(model)]).normal(size=NUM_ROWS)
    return (noise + {"plain": 0.5, "words": 0.2, "both": 2.0}[model] * LABELS).astype(np.float32)


def rows():
    columns = {"user_id": np.arange(NUM_ROWS) % 7, "movie_id": np.arange(NUM_ROWS) % 5, "label": LABELS}
    table = Dataset.from_dict(columns)
    return DatasetDict({"train": table.select([i for i in range(NUM_ROWS) if i % 7 != 6]), "test": table})


def find_run(experiments, model, split, seed):
    return experiments.find_run(model, TABLE["data"], split, seed)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The modules over folders of the test's own, and the jobs that they asked for."""
    monkeypatch.syspath_prepend(str(FOLDER))
    modules = {}
    for name in ("click_data", "experiments", "measures", "summary", "run", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        modules[name] = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    experiments, run, report = (modules[name] for name in ("experiments", "run", "report"))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "one.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(MODELS))
    shutil.copy(FOLDER / "data.yaml", tmp_path)
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "CARD_MODELS", {"a-card": "both", "another": "before"})
    monkeypatch.setattr(report, "ALIGNED", "before")
    monkeypatch.setattr(run, "SCORES", tmp_path / "results" / "scores")
    for name in ("runs", "comparisons", "again"):
        monkeypatch.setattr(run, f"{name.upper()}_FILE", tmp_path / "results" / f"{name}.jsonl")
    monkeypatch.setattr(run, "rows_of", lambda run, places: rows())
    (tmp_path / "docs").mkdir()
    (tmp_path / "summary.yaml").write_text(yaml.safe_dump({"chart": [], "findings": []}))
    asked = []

    def run_jobs(jobs, processes, when_done):
        for job in jobs:
            run_job(job)
            when_done(job)

    def run_job(job):
        if not job.result.exists():
            asked.append(job.result.parent.name)
            arguments = dict(zip(job.command[1::2], job.command[2::2], strict=True))
            model, seed = job.result.parent.name.split("-")[0], int(arguments["--training.seed"])
            if "--pretrained" in arguments:
                assert Path(arguments["--pretrained"]).parent.joinpath("run.json").exists(), "stages follow each other"
            job.result.parent.mkdir(parents=True, exist_ok=True)
            if model != "before":
                scores = pa.table({"labels": LABELS, "logits": logits(model, seed)})
                pq.write_table(scores, job.result.parent / "test_scores.parquet")
            facts = make_record()
            facts["task"] = "pretraining" if model == "before" else "finetuning"
            facts["data"]["rows"] = {"train": 800, "validation": 100, "test": 100}
            facts["settings"]["output_dir"] = str(job.result.parent)
            facts["model"]["mode"] = {"plain": "id", "words": "text"}.get(model, "joint")
            facts["data"]["source"] = "movielens-100k"
            if "--teacher" in arguments:
                facts["teacher"] = {"name": "both/model", "record": make_record()}
            facts["pretraining"] = make_record()
            if model == "before":
                facts["result"] = {name: value for name, value in facts["result"].items() if "test" not in name}
            losses = {"loss": 1.5, "id_loss": 0.5, "text_loss": 0.61234, "rows_per_second": 80.0}
            steps = [{"event": "train", "step": step, "epoch": 0, **losses} for step in (10, 20)]
            log = [*steps, {"event": "validation", "step": 20, "epoch": 0, "auc": 0.75}]
            (job.result.parent / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            job.result.write_text(json.dumps(facts))

    monkeypatch.setattr(run, "run_jobs", run_jobs)
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(tmp_path / "runs")])
    return experiments, run, report, asked, tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_recorded_is_not_run_again(workplace):
    experiments, run, _, asked, folder = workplace
    run.main()
    # The last row's two stages have settings of their own.
    assert sorted(name.rsplit("-", 1)[0] for name in asked) == sorted(
        f"{model}-random-{seed}" for model in [*MODELS, "before", "both"] for seed in range(2)
    )
    records = {line["key"]: line for line in lines(run.RUNS_FILE)}
    both = records[find_run(experiments, "both", "random", 1).key]
    assert both["result"]["test"]["auc"] == pytest.approx(auc(LABELS, logits("both", 1)))
    before = records[find_run(experiments, "before", "random", 1).key]
    assert both["stages"] == [before["key"], both["key"]]
    assert (before["result"]["validation"]["auc"], "test" in before["result"]) == (0.75, False)
    assert "pretraining" not in both["run"], "it has a line of its own"
    assert str(folder) not in run.RUNS_FILE.read_text(), "no path of a machine"
    assert both["curves"]["train"]["text_loss"] == [[10, 20], [0.6123, 0.6123]]
    assert "rows_per_second" not in both["curves"]["train"]
    users = np.arange(NUM_ROWS) % 7
    clicks = 1 / (1 + np.exp(-logits("both", 1)))
    assert both["result"]["test"]["uauc"] == pytest.approx(uauc(LABELS, clicks, users))
    slices = both["result"]["slices"]
    assert slices["unseen user"]["rows"] == sum(users == 6)
    assert slices["unseen item"]["rows"] == 0
    seen = users < 6
    assert slices["seen"]["rows"] == sum(seen)
    assert slices["seen"]["uauc"] == pytest.approx(uauc(LABELS[seen], clicks[seen], users[seen]))
    compared = lines(run.COMPARISONS_FILE)
    kept = [logits(model, 0).astype(np.float16).astype(float) for model in ("plain", "words", "both")]
    clicks = [1 / (1 + np.exp(-values)) for values in kept]
    mean = (clicks[0] + clicks[1]) / 2
    found = next(line for line in compared if line["seed"] == 0 and " + " in line["second"])
    assert found["auc"]["p"] == pytest.approx(delong(LABELS, clicks[2], mean).p, rel=1e-4)

    before = [path.read_text() for path in (run.RUNS_FILE, run.COMPARISONS_FILE)]
    asked.clear()
    run.main()
    assert asked == []
    assert [path.read_text() for path in (run.RUNS_FILE, run.COMPARISONS_FILE)] == before


def test_a_row_may_have_settings_of_its_own(workplace):
    experiments, *_ = workplace
    wide = find_run(experiments, TABLE["rows"]["Wide"], "random", 0)
    assert wide.after.settings == {"model.options.embedding_dim": 64}
    assert wide.settings == {"mode": "joint", "training.num_train_epochs": 3}
    both = find_run(experiments, "both", "random", 0)
    assert (both.key, both.after.key) != (wide.key, wide.after.key)
    command = wide.job(Path("runs")).command
    assert command[command.index("--pretrained") + 1] == f"runs/{wide.after.key}/model"


def test_a_student_follows_its_teacher(workplace):
    experiments, run, _, asked, folder = workplace
    student = {"script": "finetune", "after": "before", "teacher": "both", "settings": {"mode": "id"}}
    (folder / "models.yaml").write_text(yaml.safe_dump({**MODELS, "plain": student}))
    wide = {"model.options.embedding_dim": 64}
    row = {"model": "plain", "first": wide, "last": {"training.max_steps": 5}, "teacher": {"training.max_steps": 7}}
    table = {**TABLE, "seeds": 1, "rows": {"Student": row}, "compare": {}, "pictures": []}
    (folder / "tables" / "one.yaml").write_text(yaml.safe_dump(table))
    run.main()
    found = find_run(experiments, row, "random", 0)
    assert found.teacher.after.key == found.after.key, "one pretraining"
    assert asked == [found.after.key, found.teacher.key, found.key]
    assert found.after.settings == wide
    assert found.teacher.settings == {"mode": "joint", "training.max_steps": 7}
    assert found.settings == {"mode": "id", "training.max_steps": 5}
    command = found.job(folder / "runs").command
    assert command[command.index("--teacher") + 1] == str(folder / "runs" / found.teacher.key / "model")
    assert find_run(experiments, {**row, "teacher": {}}, "random", 0).key != found.key
    record = lines(run.RUNS_FILE)[-1]
    assert record["stages"] == asked
    assert record["seconds"] == 3 * 125
    assert record["run"]["teacher"] == {"name": "both/model"}, "its record is a line of its own"


def test_a_key_is_of_the_files_and_not_of_their_place(workplace, monkeypatch):
    experiments, run, _, _, folder = workplace
    columns = {"user": [1, 1, 2], "item": ["a", "b", "b"], "label": [1, 0, 1], "title": ["A", "B", "B"]}
    hashes = {}
    for part in ("train", "validation", "test"):
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
        hashes[part] = hashlib.sha256((folder / f"{part}.parquet").read_bytes()).hexdigest()
    files = {part: {"name": f"{part}.parquet", "sha256": hashes[part]} for part in hashes}
    own = {"configs": "ml1m-months", "user": "user", "item": "item"}

    def planned():
        (folder / "data.yaml").write_text(yaml.safe_dump({"own": {**own, "files": files}}))
        return experiments.find_run("plain", "own", "months", 3)

    found = planned()
    command = found.job(Path("runs"), folder).command
    assert command[command.index("--data.test_file") + 1] == str(folder / "test.parquet")
    assert "--data.split" not in command
    assert str(folder) not in found.key
    rows = found.data.rows("months", 3, folder)
    assert rows["test"]["item"] == columns["item"]
    assert run.slices(rows, found.data, 1)["unseen user"].tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"own is files: .* train.parquet, .* --files-dir"):
        found.job(Path("runs"))
    files["train"]["sha256"] = "0" * 64
    assert planned().key != found.key
    with pytest.raises(FetchError, match=r"train.parquet has sha256 .*, expected 0000"):
        planned().job(Path("runs"), folder)
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(folder / "runs")])
    (folder / "tables" / "one.yaml").write_text(yaml.safe_dump({**TABLE, "data": "own"}))
    run.main()
    assert not run.RUNS_FILE.exists(), "without the files their tables are left out"
    (folder / "tables" / "one.yaml").write_text(yaml.safe_dump({**TABLE, "data": "another"}))
    with pytest.raises(ValueError, match=r"'another' is not in data.yaml: own"):
        run.main()


def test_a_part_of_a_table_is_run(workplace, monkeypatch):
    _, run, _, _, folder = workplace
    command = ["run.py", "--runs", str(folder / "runs"), "--seeds", "0", "--rows"]
    monkeypatch.setattr(sys, "argv", [*command, "Plain", "Both"])
    run.main()
    assert [line["model"] for line in lines(run.RUNS_FILE)] == ["plain", "before", "both"]
    assert [line["second"].split("-")[0] for line in lines(run.COMPARISONS_FILE)] == ["plain"]
    monkeypatch.setattr(sys, "argv", [*command, "Plane"])
    with pytest.raises(ValueError, match="'Plane' is no row of one"):
        run.main()


def test_what_was_run_before_a_failure_is_recorded(workplace, monkeypatch):
    _, run, *_ = workplace
    whole = run.run_jobs

    def fail_at_words(jobs, processes, when_done):
        for job in jobs:
            if "words" in job.result.parent.name:
                raise RuntimeError("1 of 3 jobs failed")
            whole([job], processes, when_done)

    monkeypatch.setattr(run, "run_jobs", fail_at_words)
    with pytest.raises(RuntimeError, match="jobs failed"):
        run.main()
    before = lines(run.RUNS_FILE)
    assert [line["model"] for line in before] == ["plain"]
    monkeypatch.setattr(run, "run_jobs", whole)
    run.main()
    keys = [line["key"] for line in lines(run.RUNS_FILE)]
    assert lines(run.RUNS_FILE)[0] == before[0]
    assert len(keys) == len(set(keys))


def test_other_settings_make_another_run(workplace):
    _, run, _, asked, folder = workplace
    run.main()
    asked.clear()
    changed = {**MODELS, "before": {"script": "pretrain", "settings": {"training.num_train_epochs": 3}}}
    (folder / "models.yaml").write_text(yaml.safe_dump(changed))
    run.main()
    assert {name.split("-")[0] for name in asked} == {"before", "both"}, "and those that start from it"


def test_scores_are_kept_for_other_comparisons(workplace):
    _, run, _, asked, folder = workplace
    run.main()
    kept, lost = lines(run.COMPARISONS_FILE)[1:], lines(run.COMPARISONS_FILE)[0]
    run.COMPARISONS_FILE.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(folder / "runs")
    asked.clear()
    before = run.RUNS_FILE.read_text()
    run.main()
    assert asked == []
    assert lines(run.COMPARISONS_FILE)[-1] == lost
    assert run.RUNS_FILE.read_text() == before


def test_a_run_of_several_tables_is_kept_once(workplace):
    experiments, run, _, asked, folder = workplace
    wider = {**TABLE, "rows": {**TABLE["rows"], "Words": "words"}, "compare": {"Both": ["Words"]}}
    wider["rows"]["Long"] = {"model": "plain", "last": {"training.num_train_epochs": 7}}
    (folder / "tables" / "two.yaml").write_text(yaml.safe_dump(wider, sort_keys=False))
    run.main()
    kept = {path.stem: pq.read_table(path)["key"].to_pylist() for path in run.SCORES.iterdir()}
    shown = [name for name in asked if not name.startswith("before")]
    assert sorted(kept["one"] + kept["two"]) == sorted(shown)
    long = [find_run(experiments, wider["rows"]["Long"], "random", seed).key for seed in range(2)]
    assert kept["two"] == long
    second = {line["second"] for line in lines(run.COMPARISONS_FILE)}
    assert {find_run(experiments, "words", "random", seed).key for seed in range(2)} <= second


def test_a_run_whose_program_was_killed_before_its_line_is_recorded_again(workplace, monkeypatch):
    _, run, _, asked, _ = workplace
    whole = run.add_line

    def die(path, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "add_line", die)
    with pytest.raises(KeyboardInterrupt):
        run.main()
    assert (len(asked), lines(run.RUNS_FILE) if run.RUNS_FILE.exists() else []) == (1, [])
    monkeypatch.setattr(run, "add_line", whole)
    run.main()
    (path,) = run.SCORES.iterdir()
    keys = pq.read_table(path)["key"].to_pylist()
    assert len(keys) == len(set(keys))
    assert set(keys) == {line["key"] for line in lines(run.RUNS_FILE) if "test" in line["result"] and "stages" in line}


def test_recorded_runs_are_repeated(workplace, monkeypatch, capsys):
    _, run, _, _, folder = workplace
    run.main()
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(folder / "runs"), "--again", "3"])
    run.main()
    assert capsys.readouterr().out.count("again") == 3
    again = lines(run.AGAIN_FILE)
    assert all(line["again"] == pytest.approx(line["auc"]) for line in again)
    assert {line["machine"] for line in again} == {"A CPU, 1 threads a run, bf16; torch 2.13.0, transformers 5.23.0"}
    run.main()
    keys = [line["key"] for line in lines(run.AGAIN_FILE)]
    assert len(keys) == len(set(keys)) == 6, "others, the second time"


def test_rows_that_were_not_trained_on_are_unseen(workplace):
    experiments, run, *_ = workplace
    data = find_run(experiments, "plain", "random", 0).data
    all_rows, few = (run.slices(rows(), data, most) for most in (None, 3))
    assert few["unseen user"].sum() > all_rows["unseen user"].sum()
    with pytest.raises(ValueError, match="there is no table 'two': one"):
        workplace[0].load_tables(["two"])


def test_the_report_says_what_the_records_say(workplace, monkeypatch):
    experiments, run, report, _, folder = workplace
    output = folder / "docs" / "results.md"
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    assert "No run of this split is recorded yet" in output.read_text()
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(folder / "runs")])
    run.main()
    matrices = {"before": [[0.25, 0.5], [0.5, 0.75]], "after": [[1.0, 0.1], [0.3, 0.5]]}
    key = find_run(experiments, "before", "random", 0).key
    stale = {"key": "pretraining-random-0-00000000", "rows": 1, "fields": ["a"], "before": [[0.1]], "after": [[0.2]]}
    alignment = {"key": key, "rows": 4096, "fields": ["user", "item"], **matrices}
    (folder / "results" / "alignment.jsonl").write_text(f"{json.dumps(alignment)}\n{json.dumps(stale)}\n")
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = output.read_text()
    assert "| before pretraining | 0.500 | 0.500 |\n| after pretraining | 0.750 | 0.200 |" in text
    assert (folder / "docs" / "results" / "alignment.png").stat().st_size > 5_000
    aucs = {model: [auc(LABELS, logits(model, seed)) for seed in range(2)] for model in ("plain", "both")}
    reach = paired_t(aucs["both"], 1 / 8).high - np.mean(aucs["both"])
    assert f"| Both | {np.mean(aucs['both']):.4f} ± {reach:.4f} | " in text
    test = paired_t(np.subtract(aucs["both"], aucs["plain"]), 1 / 8)
    users = rows()["test"]["user_id"]
    gained = []
    for metric in (gauc, uauc):
        within = {
            model: [metric(LABELS, 1 / (1 + np.exp(-logits(model, seed))), np.array(users)) for seed in range(2)]
            for model in aucs
        }
        test_within = paired_t(np.subtract(within["both"], within["plain"]), 1 / 8)
        gained += [f"{test_within.difference:+.4f}", f"{test_within.p:.4f}"]
    line = re.search(r"^\| Both vs. Plain \| 2 \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
    assert line[:3] == [f"{test.difference:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", f"{test.p:.4f}"]
    assert line[-4:] == gained
    assert "| first vs. second | seeds | AUC | 95% CI | p | DeLong +/- | LogLoss | p | GAUC | p | UAUC | p |" in text
    assert "| model | AUC | LogLoss | GAUC | UAUC | ECE | seeds | minutes |" in text
    # Seven users of 60 rows, of whom one has no training row; no item is unseen.
    assert "| AUC on slice | unseen user (8 rows, seed 0) | " in text
    on_slices = re.search(r"^\| UAUC on slice \|.*\| seen \(52 rows, seed 0\) \|\n.*\n(.*)", text, re.MULTILINE)[1]
    assert on_slices.startswith("| Mean | ")
    assert re.search(r"\| 0\.\d{4} \|$", on_slices)
    for picture in ("calibration-one-random", "learning-one-random"):
        assert (folder / "docs" / "results" / f"{picture}.png").stat().st_size > 5_000
        assert f"(results/{picture}.png)" in text
    assert "fewer than 2 recorded seeds" not in text
    # Two minutes and five seconds for each of two stages.
    assert re.search(r"^\| Both \|.* \| 2 \| 4.2 \|$", text, re.MULTILINE)
    assert "## Machines\n\n- A CPU, 1 threads a run, bf16; torch 2.13.0, transformers 5.23.0: 12 runs\n" in text


def test_what_readers_see_first_is_computed_from_the_records(workplace, monkeypatch):
    *_, run, report, _, folder = workplace
    (folder / "summary.yaml").write_text(yaml.safe_dump(SUMMARY, sort_keys=False))
    readme = folder / "README.md"
    readme.write_text('Before.\n\n<img src="docs/pictures/results-light.svg" alt="Old.">\n\nAfter.\n')
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text, pictures = (folder / "docs" / "results.md").read_text(), folder / "docs" / "pictures"
    assert ("Both towers" in text, pictures.exists()) == (False, False), "there is no record yet"
    monkeypatch.setattr(sys, "argv", ["run.py", "--runs", str(folder / "runs")])
    run.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = (folder / "docs" / "results.md").read_text()
    aucs = {model: [auc(LABELS, logits(model, seed)) for seed in range(2)] for model in ("both", "plain")}
    test = paired_t(np.subtract(aucs["both"], aucs["plain"]), 100 / 800)
    assert test.p > 0.05
    facts = f"{np.mean(aucs['both']):.4f} against {np.mean(aucs['plain']):.4f}; 2 seeds, p = {test.p:.4f}"
    said = f"Joint does not differ significantly from Plain: {test.difference:+.4f} AUC ({facts})."
    assert f"\n- **Both towers.** {said} Plain does not differ significantly from Joint: " in text
    assert text.index("## Results in one minute") < text.index("## Contents") < text.index("\n## A table")
    assert (
        "- [How to read the tables](#how-to-read-the-tables)\n- [A table](#a-table)\n- [Machines](#machines)\n" in text
    )
    pages = {theme: (pictures / f"results-{theme}.svg").read_bytes() for theme in ("light", "dark")}
    assert pages["light"] != pages["dark"]
    words = re.search(r"^!\[(.*)\]\(pictures/results-light\.svg\)$", text, re.MULTILINE)[1]
    assert words.startswith("Bar chart of test AUC. Random split: Plain 0.")
    assert words.endswith(f", Joint {np.mean(aucs['both']):.4f}.")
    assert readme.read_text() == f'Before.\n\n<img src="docs/pictures/results-light.svg" alt="{words}">\n\nAfter.\n'
    report.main()
    assert pages == {theme: (pictures / f"results-{theme}.svg").read_bytes() for theme in pages}


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ([0.01, 0.011, 0.012], "A beats B by 0.0110 AUC (0.8110 against 0.8000; 3 seeds, p = 0.0027)."),
        ([-0.01, -0.011, -0.012], "A is worse than B by 0.0110 AUC (0.7890 against 0.8000; 3 seeds, p = 0.0027)."),
        ([0.01, 0.01, 0.01], "A beats B by 0.0100 AUC (0.8100 against 0.8000; 3 seeds, p < 0.0001)."),
        (
            [0.01, -0.01],
            "A does not differ significantly from B: +0.0000 AUC (0.8000 against 0.8000; 2 seeds, p = 1.0000).",
        ),
        ([0.01], ""),
    ],
)
def test_a_verdict_follows_from_the_test(workplace, over, said):
    def records(values):
        return {seed: {"split": "time", "result": {"test": {"auc": value}}} for seed, value in enumerate(values)}

    summary = sys.modules["summary"]
    assert summary.verdict(("A", "B"), records([0.8 + value for value in over]), records([0.8] * 3), {}) == said


def test_a_summary_names_rows_that_there_are(workplace):
    experiments, *_, folder = workplace
    summary, tables = sys.modules["summary"], experiments.load_tables()
    for changed, said in (
        ({"table": "two"}, "there is no table 'two'"),
        ({"pairs": [{"rows": ["Both", "Plane"], "names": ["a", "b"]}]}, "table 'one' has no row 'Plane'"),
    ):
        wrong = {**SUMMARY, "findings": [{**SUMMARY["findings"][0], **changed}]}
        (folder / "summary.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(ValueError, match=said):
            summary.load_summary(tables)


def test_cards_are_of_the_records(workplace, monkeypatch):
    _, run, report, _, folder = workplace
    run.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = (folder / "model_cards" / "a-card" / "README.md").read_text()
    assert f"| AUC | {auc(LABELS, logits('both', 0)):.4f} | " in text
    assert "Settings of pretraining" in text
    files = {"README.md", "run.json", "curves.png"}
    assert {path.name for path in (folder / "model_cards" / "a-card").iterdir()} == files | {"calibration.png"}
    assert {path.name for path in (folder / "model_cards" / "another").iterdir()} == files


def test_a_card_whose_run_is_not_recorded_is_named(workplace, monkeypatch, capsys):
    *_, report, _, folder = workplace
    (folder / "model_cards" / "another").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["model_cards/another"]


def test_a_table_of_what_was_tried_shows_validation_rows_alone(workplace, monkeypatch):
    _, run, report, _, folder = workplace
    tried = {name: TABLE[name] for name in ("caption", "data", "splits", "seeds")}
    tried |= {"title": "What was tried", "rows": {"Plain": "plain"}, "shows": "validation"}
    (folder / "tables" / "two.yaml").write_text(yaml.safe_dump(tried))
    run.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = (folder / "docs" / "results.md").read_text()
    section = text[text.index("\n## What was tried") : text.index("\n## Machines")]
    assert "| model | AUC, validation | LogLoss, validation | ECE, validation | seeds | minutes |" in section
    assert "| Plain | 0.7500 ± 0.0000 | " in section
    assert "AUC on slice" not in section


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shows": "validation"}, "compare and pictures need test rows"),
        ({"shows": "training"}, "shows 'training'; it must be 'test' or 'validation'"),
        ({"compare": {"Both": ["Plane"]}}, "names 'Plane', which are none of its rows"),
        ({"pictures": ["Wider"]}, "names 'Wider'"),
    ],
)
def test_a_table_must_hold_together(workplace, changed, said):
    experiments, *_, folder = workplace
    (folder / "tables" / "one.yaml").write_text(yaml.safe_dump({**TABLE, **changed}))
    with pytest.raises(ValueError, match=f"table 'one' .*{said}"):
        experiments.load_tables()


def test_rows_are_compared_on_the_seeds_that_both_have(workplace, monkeypatch):
    experiments, run, report, _, folder = workplace
    table = {**TABLE, "splits": ["random", "time"], "rows": {"Plain": "plain", "Both": "both"}, "pictures": []}
    (folder / "tables" / "one.yaml").write_text(
        yaml.safe_dump({**table, "compare": {"Both": ["Plain"]}}, sort_keys=False)
    )
    run.main()
    lost = find_run(experiments, "both", "random", 1).key
    kept = [line for line in run.RUNS_FILE.read_text().splitlines(keepends=True) if f'"key": "{lost}"' not in line]
    run.RUNS_FILE.write_text("".join(kept))
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    over = [auc(LABELS, logits("both", seed)) - auc(LABELS, logits("plain", seed)) for seed in range(2)]
    random, time = (folder / "docs" / "results.md").read_text().split("### Time split")
    assert re.search(rf"^\| Both vs. Plain \| 1 \| {re.escape(f'{over[0]:+.4f}')} \|  \|  \| ", random, re.MULTILINE)
    assert "These rows have fewer than 2 recorded seeds: Both." in random
    # On the time split all seeds have the same rows.
    test = paired_t(over)
    assert (
        f"| Both vs. Plain | 2 | {test.difference:+.4f} | {test.low:+.4f} to {test.high:+.4f} | {test.p:.4f} | " in time
    )
    by_rows = [line["auc"] for line in lines(run.COMPARISONS_FILE) if line["split"] == "time"]
    better = sum(found["p"] < 0.05 and found["difference"] > 0 for found in by_rows)
    assert re.search(rf"^\| Both vs. Plain .* \| {better} / 0 \| ", time, re.MULTILINE)


def test_slices_of_other_training_rows_show_their_counts(workplace, monkeypatch):
    _, run, report, _, folder = workplace
    few = {"model": "plain", "last": {"data.max_train_rows": 3}}
    table = {**TABLE, "rows": {"Plain": "plain", "Few": few}, "compare": {}, "pictures": []}
    (folder / "tables" / "one.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    run.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = (folder / "docs" / "results.md").read_text()
    header, _, plain, other = text[text.index("| AUC on slice") :].splitlines()[:4]
    assert header.split(" | ")[1] == "unseen user (rows, seed 0)"
    # Of 60 rows of 7 users those of one have no training row, of four none among the first three: too few for an AUC.
    assert [line.split("|")[2].split() for line in (plain, other)] == [["(8)"], ["(33)"]]


def test_records_of_before_uauc_and_the_slice_of_seen_rows_are_shown(workplace, monkeypatch):
    _, run, report, _, folder = workplace
    run.main()

    def without(value):
        if not isinstance(value, dict):
            return value
        return {name: without(inner) for name, inner in value.items() if name not in ("uauc", "seen")}

    old = [without(line) for line in lines(run.RUNS_FILE)]
    run.RUNS_FILE.write_text("".join(json.dumps(line) + "\n" for line in old))
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = (folder / "docs" / "results.md").read_text()
    assert "UAUC" not in text
    assert "| rare item (" in text
    assert not re.search(r"\| seen \(", text)


def test_a_split_that_each_seed_draws_anew_corrects_for_shared_rows(workplace):
    *_, report, _, _ = workplace
    runs = {"one": {"run": {"data": {"rows": {"train": 800, "test": 100}}}}}
    ratios = {split: report.test_ratio({0: {"key": "one", "split": split}}, runs) for split in SPLITS}
    assert ratios == {"random": 1 / 8, "item": 1 / 8, "time": 0, "months": 0}


def test_speeds_are_shown_where_a_table_asks_for_them(workplace, monkeypatch):
    _, run, report, _, folder = workplace
    (folder / "tables" / "one.yaml").write_text(yaml.safe_dump({**TABLE, "speeds": True}, sort_keys=False))
    run.main()
    old = [json.loads(line) for line in run.RUNS_FILE.read_text().splitlines()]
    for line in old:
        if line["model"] == "both":
            line["result"]["test_rows_per_second"] = 1234.5
    run.RUNS_FILE.write_text("".join(json.dumps(line) + "\n" for line in old))
    monkeypatch.setattr(sys, "argv", ["report.py", "--folder", str(folder)])
    report.main()
    text = (folder / "docs" / "results.md").read_text()
    assert "| ECE | training | serving | seeds | minutes |" in text
    assert re.search(r"^\| Both \|.* \| 12 \| 1,234 \| 2 \| 4.2 \|$", text, re.MULTILINE)
    assert re.search(r"^\| Mean \|.* \|  \|  \| 2 \|  \|$", text, re.MULTILINE), "it is no run"


def test_minutes_are_those_of_each_device(workplace):
    *_, report, _, _ = workplace

    def ran(seconds, **device):
        return {"run": {"device": device}, "seconds": seconds}

    on_cpu, average = [ran(240, kind="cpu"), ran(360, kind="cpu", accelerators=["unused"])], {"key": "an average"}
    on_gpu = [ran(36, kind="cuda", accelerators=["A GPU", "A GPU"]), ran(42, kind="mps")]
    assert report.minutes([*on_cpu, average]) == "5.0"
    assert report.minutes([*on_cpu, *on_gpu]) == "0.6 (1 on A GPU), 5.0 (2 on CPU), 0.7 (1 on mps)"
    assert report.minutes([average]) == ""


def test_what_ran_again_is_told_by_model_and_machines(workplace):
    *_, report, _, _ = workplace

    def ran(kind):
        versions = {"torch": "2.11.0", "transformers": "5.23.0"}
        return {"device": {"kind": kind, "processor": "A CPU", "threads": 4, "precision": "no"}, "versions": versions}

    runs = {
        "one": {"model": "plain", "split": "time", "run": ran("cpu")},
        "two": {
            "model": {"model": "both", "last": {"training.num_train_epochs": 3}},
            "split": "random",
            "run": ran("cuda"),
        },
    }
    runs["three"] = runs["two"]
    lines = [
        {"key": key, "auc": 0.8, "again": again, "interval": [0.79, 0.81], "machine": "Another"}
        for key, again in (("one", 0.8), ("two", 0.804), ("three", 0.812))
    ]
    text = report.repeated(lines, runs)
    by = "torch 2.11.0, transformers 5.23.0"
    assert f"| plain; time | A CPU, 4 threads a run, fp32; {by} | Another | 1 | 1 | +0.0000 | 0.0000 |" in text
    shown = "both, training.num_train_epochs: 3; random"
    assert f"| {shown} | cuda, fp32; {by} | Another | 2 | 1 | +0.0080 | 0.0120 |" in text
    assert text.endswith("- three: AUC 0.8000, repeated 0.8120, outside the CI from 0.7900 to 0.8100.\n")


def test_learning_curves_are_those_of_the_towers(workplace):
    _, run, report, *_ = workplace
    run.main()
    records = {line["model"]: line for line in lines(run.RUNS_FILE) if line["seed"] == 0 and type(line["model"]) is str}
    panels = report.panels_of({name: records[name] for name in ("plain", "words", "both")})
    assert {title: set(found) for title, found in panels.items()} == {
        "training LogLoss, ID-based models": {"plain", "both"},
        "training LogLoss, text encoders": {"words", "both"},
        "validation AUC": {"plain", "words", "both"},
    }
    losses = panels["training LogLoss, ID-based models"]
    assert (losses["plain"], losses["both"]) == ([[10, 20], [1.5, 1.5]], [[10, 20], [0.5, 0.5]])


def test_every_table_names_models_that_there_are(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    experiments = importlib.import_module("experiments")
    tables = experiments.load_tables()
    importlib.import_module("summary").load_summary(tables)
    names = [table.name for table in tables]
    assert names.index("2-ablations") < names.index("10-cold-start") < names.index("tried")
    for table in tables:
        assert {*table.compare, *(row for rows in table.compare.values() for row in rows)} <= set(table.rows)
        for row in table.rows:
            for model in table.models(row):
                run = experiments.find_run(model, table.data, table.splits[0], 0)
                # Files are given when they are run.
                assert run.data.files or run.job(Path("runs")).command
                for stage in run.stages:
                    data = yaml.safe_load(stage.data.config(stage.script).read_text())["data"]
                    assert data["name" if stage.data.files else "source"] == table.data
                # finetune.yaml names a backbone too, which a pretrained model of another one can't take.
                backbones = {stage.settings.get("model.options.backbone") for stage in run.stages}
                assert len(backbones) == 1, row
