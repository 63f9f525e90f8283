"""A student learns from labels and from a teacher's click logits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from example_runs import EXAMPLES, lines, script
from finetuned import finetuned
from huggingface_hub.errors import StrictDataclassError
from records import make_record
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from waiting import PATIENCE

from flip_hf import FlipConfig, FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.data.distillation import TEACHER_COLUMN, student_rows
from flip_hf.hub.card import render_card
from flip_hf.runs.settings import DataSettings, EvaluateSettings, FinetuneSettings, ModelSettings, PretrainSettings
from flip_hf.runs.teacher import Teacher
from flip_hf.scoring import click_logits
from flip_hf.training import loop
from flip_hf.training.evaluation import ctr_metrics
from flip_hf.training.signals import Stopped
from flip_hf.training.trainer import FlipTrainer

LABELS = np.array([1, 0, -100, 1, -100, 0, 0], np.float32)
TEACHER = np.array([2.0, -1.5, 0.3, 8.0, -30.0, 0.0, 1.0], np.float32)


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    """What accelerate keeps for the life of a process ends with each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(processor, mode="id", **settings):
    torch.manual_seed(0)
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "vocab_size": len(processor.tokenizer)}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    backbone = {"hidden_sizes": [16], "dropout": 0.0}
    sizes = {"embedding_dim": 4, "head_dropout": 0.0, "backbone_options": backbone}
    return FlipForCTR(FlipConfig(text_config=text, fields=processor.fields, mode=mode, **sizes, **settings))


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def cross_entropy(logits, clicks):
    """Of each row, float64 (rows,)."""
    logits = np.asarray(logits, np.float64)
    return np.logaddexp(0, logits) - clicks * logits


@pytest.fixture
def batch(processor, click_rows):
    rows = {name: values[: len(LABELS)] for name, values in click_rows.items()}
    batch = FlipCTRCollator(processor)(processor.encode(rows))
    return batch | {"labels": torch.tensor(LABELS), "teacher_logits": torch.tensor(TEACHER)}


@pytest.mark.parametrize("mode", ["id", "text", "joint"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_a_mean_over_labelled_rows_and_one_over_all_rows(processor, batch, mode, weight):
    output = build(processor, mode, distillation_weight=weight)(**batch)
    output.logits.retain_grad()
    own = {"loss": output.logits}
    if mode == "joint":
        own |= {"id_loss": output.id_logits, "text_loss": output.text_logits}
    own = {name: logits.detach().numpy() for name, logits in own.items()}
    known = LABELS >= 0
    of_labels = {name: cross_entropy(logits, LABELS)[known].sum() / 5 for name, logits in own.items()}
    of_teacher = sum(cross_entropy(logits, sigmoid(TEACHER)).sum() / 7 for logits in own.values())
    expected = (1 - weight) * sum(of_labels.values()) + weight * of_teacher
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.distillation_loss.item() == pytest.approx(of_teacher, rel=1e-5)
    for name in own.keys() - {"loss"}:
        assert output[name].item() == pytest.approx(of_labels[name], rel=1e-5)
    if mode == "joint":
        return
    output.loss.backward()
    probabilities = sigmoid(own["loss"])
    gradient = (1 - weight) * np.where(known, probabilities - LABELS, 0) / 5
    gradient += weight * (probabilities - sigmoid(TEACHER)) / 7
    np.testing.assert_allclose(output.logits.grad.numpy(), gradient, atol=1e-6)


def test_each_tower_of_a_joint_student_learns_from_the_teacher(processor, batch):
    model = build(processor, "joint", distillation_weight=1.0, fusion_gradients=False)
    model(**batch).loss.backward()
    assert model.flip.backbone.get_parameter(next(iter(dict(model.flip.backbone.named_parameters())))).grad.any()
    assert model.text_head[-1].weight.grad.any()


def test_without_a_teacher_rows_without_a_label_do_not_count(processor, batch):
    model = build(processor)
    del batch["teacher_logits"]
    whole = model(**batch)
    known = torch.tensor(LABELS >= 0)
    part = model(feature_ids=batch["feature_ids"][known], labels=batch["labels"][known])
    assert whole.loss.item() == pytest.approx(part.loss.item(), rel=1e-6)
    assert whole.distillation_loss is None
    batch["labels"] = torch.full((7,), -100.0)
    assert model(**batch).loss.item() == 0


def test_accumulated_batches_have_the_gradient_of_one(processor, batch):
    def gradient(parts):
        model = build(processor)
        counts = [model.num_items(part) for part in parts]
        assert {name: sum(count[name].item() for count in counts) for name in counts[0]} == {
            "ctr": 5,
            "distillation": 7,
        }
        items = {name: sum(count[name] for count in counts).float() for name in counts[0]}
        for part in parts:
            model(**part, num_items_in_batch=items).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    # One of the parts has no label at all.
    cuts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    parts = [{name: value[cut] for name, value in batch.items()} for cut in cuts]
    torch.testing.assert_close(gradient(parts), gradient([batch]), rtol=1e-5, atol=1e-7)


def test_one_number_can_not_count_for_both_losses(processor, batch):
    model = build(processor)
    with pytest.raises(ValueError, match="some rows have no label, and num_items_in_batch is one number"):
        model(**batch, num_items_in_batch=torch.tensor(5))
    labelled = {name: value[:2] for name, value in batch.items()}
    assert model(**labelled, num_items_in_batch=4).loss.item() == pytest.approx(model(**labelled).loss.item() / 2)


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_the_weight_is_a_share(processor, weight):
    with pytest.raises(StrictDataclassError, match=rf"distillation_weight={weight} must be in \[0, 1\]"):
        build(processor, distillation_weight=weight)


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("missing", [None, float("nan")], ids=str)
def test_the_collator_passes_logits_on_and_marks_missing_labels(processor, click_rows, missing, as_list):
    rows = processor.encode(click_rows, with_label=True).slice(0, 4).to_pylist()
    logits = [0.5, -2.0, 3.0, 0.0]
    rows = [{**row, TEACHER_COLUMN: logit} for row, logit in zip(rows, logits, strict=True)]
    expected = [row["label"] for row in rows]
    for place in (1, 2):
        rows[place]["label"], expected[place] = missing, -100
    collator = FlipCTRCollator(processor, "id")
    batch = collator(rows if as_list else pa.Table.from_pylist(rows))
    assert batch["teacher_logits"].dtype == batch["labels"].dtype == torch.float32
    assert batch["teacher_logits"].tolist() == logits
    assert batch["labels"].tolist() == expected
    rows[3]["label"] = 2.0
    with pytest.raises(ValueError, match=r"row 3.*a label must be 0 or 1"):
        collator(rows if as_list else pa.Table.from_pylist(rows))
    all_missing = [{**row, "label": None} for row in rows]
    assert collator(all_missing)["labels"].tolist() == [-100] * 4
    # Without a teacher nothing could be learned from such rows.
    without = [{name: value for name, value in row.items() if name != TEACHER_COLUMN} for row in rows]
    with pytest.raises(ValueError, match=r"row 1.*a label must be 0 or 1"):
        collator(without)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "row 1 of the batch has the teacher_logit nan"), ("high", "must hold")]
)
def test_what_is_no_logit_is_refused(processor, click_rows, value, message):
    rows = processor.encode(click_rows, with_label=True).slice(0, 2).to_pylist()
    rows = [{**row, TEACHER_COLUMN: logit} for row, logit in zip(rows, [0.5, value], strict=True)]
    with pytest.raises(ValueError, match=message):
        FlipCTRCollator(processor)(rows)


def test_unlabelled_rows_come_behind_the_labelled_and_have_their_own_numbers(processor, click_rows):
    log = Dataset.from_dict(click_rows)
    labelled = processor.encode_dataset(log.select(range(5)), group_field="user_id")
    unlabelled = processor.encode_dataset(log.select(range(3)), with_label=False)
    logits = np.arange(8, dtype=np.float32)
    rows = student_rows(labelled, unlabelled, logits)
    assert rows["row"][:].tolist() == list(range(8))
    assert rows[TEACHER_COLUMN][:].tolist() == logits.tolist()
    batch = FlipCTRCollator(processor, oov_dropout=0.3)(rows)
    assert batch["labels"].tolist() == [*click_rows["label"][:5], -100, -100, -100]
    for name in ("feature_ids", "input_ids"):
        np.testing.assert_array_equal(rows[name][5], unlabelled[name][0])
    with pytest.raises(ValueError, match="7 teacher logits for 8 rows"):
        student_rows(labelled, unlabelled, logits[:7])


def test_rows_without_a_label_are_not_evaluated():
    scores = {"labels": LABELS, "logits": TEACHER}
    with pytest.raises(ValueError, match="some rows have no label, and an evaluation needs one"):
        ctr_metrics(scores)


# ---- runs


@pytest.fixture(scope="module")
def teacher(workplace, tmp_path_factory):
    """A joint model of all fields that a run has finetuned; the folder of the run."""
    folder = tmp_path_factory.mktemp("teacher") / "flip"
    script("finetune")(["--config", str(workplace / "config.yaml"), "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def pairs(workplace):
    """A file of rows without labels: other users and films than those of the training rows among them."""
    table = pq.read_table(workplace / "test.parquet").drop_columns("clicked")
    users = pc.add(table["user_id"], 20)
    path = workplace / "pairs.parquet"
    pq.write_table(table.set_column(0, "user_id", users), path)
    return path


def finetune(workplace, folder, *flags):
    script("finetune")(["--config", str(workplace / "config.yaml"), "--output_dir", str(folder), *map(str, flags)])
    return folder


def logits_of(teacher, *files):
    """The teacher's logits of the rows of some files."""
    processor = FlipProcessor.from_pretrained(teacher / "model")
    model = FlipForCTR.from_pretrained(teacher / "model")
    collator = FlipCTRCollator.from_model(processor, model)
    return np.concatenate(
        [click_logits(model, processor.encode(pq.read_table(file)), collator, 64)["logits"] for file in files]
    )


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("unlabelled", [False, True])
def test_a_student_of_fewer_fields_learns_from_a_joint_teacher(workplace, teacher, pairs, tmp_path, unlabelled):
    student = ["--mode", "id", "--data.fields", "[user_id, kind]", "--training.precision", "fp32"]
    flags = [*student, "--teacher", teacher / "model", "--distillation_weight", 0.75]
    files = [workplace / "train.parquet"]
    if unlabelled:
        flags += ["--data.unlabeled_file", pairs]
        files.append(pairs)
    folder = finetune(workplace, tmp_path / "student", *flags)
    kept = pq.read_table(folder / "teacher_logits.parquet")[TEACHER_COLUMN].to_numpy()
    np.testing.assert_allclose(kept, logits_of(teacher, *files), atol=1e-5)

    record = json.loads((folder / "run.json").read_text())
    expected = {"train": 400, "validation": 120, "test": 120} | ({"unlabeled": 120} if unlabelled else {})
    assert record["data"]["rows"] == expected
    assert set(record["data"]["fingerprints"]) == set(expected)
    assert record["result"]["steps"] == -(-(400 + 120 * unlabelled) // 32)
    assert (record["teacher"]["name"], record["teacher"]["mode"]) == ("flip/model", "joint")
    assert record["teacher"]["record"]["result"]["test"]["auc"] > 0
    assert str(teacher) not in json.dumps(record["teacher"])
    assert all(line["distillation_loss"] > 0 for line in lines(folder, "train"))
    assert "test" in record["result"]
    card = render_card(record, "org/student", {})
    assert "The model also learned from a teacher: flip/model, an ID-based model and a text encoder" in card
    assert "a share of 0.75 in the loss" in card

    model = FlipForCTR.from_pretrained(folder / "model")
    assert [f.name for f in model.config.fields] == ["user_id", "kind"]
    assert model.flip.text_model is None
    alone = finetune(workplace, tmp_path / "alone", *student)
    assert weights(alone) != weights(folder)
    assert not (alone / "teacher_logits.parquet").exists()
    assert "distillation_loss" not in lines(alone, "train")[0]


def test_a_student_of_its_teacher_alone_comes_near_to_it(workplace, teacher, pairs, tmp_path):
    flags = ["--mode", "id", "--training.num_train_epochs", 8, "--training.patience", 9]
    flags += ["--data.unlabeled_file", pairs, "--teacher", teacher / "model"]
    test = workplace / "test.parquet"
    # The labels say the opposite of what the teacher learned.
    table = pq.read_table(workplace / "train.parquet")
    turned = tmp_path / "turned.parquet"
    pq.write_table(table.set_column(3, "clicked", pc.subtract(1, table["clicked"])), turned)
    found = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        finetune(workplace, folder, *flags, "--data.train_file", turned, "--distillation_weight", weight)
        found[weight] = np.corrcoef(logits_of(folder, test), logits_of(teacher, test))[0, 1]
    assert found[1.0] > 0.8
    assert found[0.0] < 0


def test_a_student_may_start_from_its_teacher(workplace, teacher, tmp_path):
    same = teacher / "model"
    folder = finetune(workplace, tmp_path, "--mode", "id", "--pretrained", same, "--teacher", same)
    assert json.loads((folder / "run.json").read_text())["result"]["validation"]["auc"] > 0.5


@pytest.mark.parametrize("mode", ["joint", "text"])
def test_students_of_other_modes_learn_too(workplace, teacher, pairs, tmp_path, mode):
    flags = ["--mode", mode, "--teacher", teacher / "model", "--data.unlabeled_file", pairs]
    folder = finetune(workplace, tmp_path, *flags)
    assert all(line["distillation_loss"] > 0 for line in lines(folder, "train"))


def test_a_resumed_run_has_the_logits_that_it_began_with(workplace, teacher, pairs, tmp_path, monkeypatch):
    flags = ["--mode", "id", "--teacher", teacher / "model", "--data.unlabeled_file", pairs]
    flags += ["--training.oov_dropout", 0.2, "--training.num_train_epochs", 2]
    whole = finetune(workplace, tmp_path / "whole", *flags)

    real = loop._step

    def stopping(*arguments):
        if arguments[-1] == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    stopped = tmp_path / "stopped"
    monkeypatch.setattr(loop, "_step", stopping)
    with pytest.raises(Stopped):
        finetune(workplace, stopped, *flags)
    monkeypatch.setattr(loop, "_step", real)
    monkeypatch.setattr(Teacher, "click_logits", lambda *_: pytest.fail("the teacher scored the rows again"))
    kept = stopped / "teacher_logits.parquet"
    aside = kept.rename(tmp_path / "aside.parquet")
    with pytest.raises(FileNotFoundError, match=r"teacher_logits\.parquet is missing, and resuming"):
        finetune(workplace, stopped, *flags, "--resume", "true")
    aside.rename(kept)
    with pytest.raises(ValueError, match=r"distillation_weight was 0\.\d+ and is 0\.25"):
        finetune(workplace, stopped, *flags, "--distillation_weight", 0.25, "--resume", "true")
    finetune(workplace, stopped, *flags, "--resume", "true")
    assert weights(stopped) == weights(whole)
    assert json.loads((stopped / "run.json").read_text())["resumed_at"] == [6]


def test_what_can_not_be_is_said_before_anything_is_replaced(workplace, teacher, pairs, tmp_path, processor):
    earlier = finetune(workplace, tmp_path / "earlier", "--mode", "id")
    before = (earlier / "run.json").read_bytes()
    untrained = tmp_path / "untrained"
    for part in (build(processor), processor):
        part.save_pretrained(untrained)
    with pytest.raises(ValueError, match="was never trained on clicks"):
        finetune(workplace, earlier, "--mode", "id", "--teacher", untrained)
    other = tmp_path / "other"
    for part in (finetuned(build(processor)), processor):
        part.save_pretrained(other)
    with pytest.raises(ValueError, match=rf"teacher={other} can't read the rows of this run: .*'?gender'?"):
        finetune(workplace, earlier, "--mode", "id", "--teacher", other)
    lacking = tmp_path / "lacking.parquet"
    pq.write_table(pq.read_table(pairs).drop_columns("title"), lacking)
    flags = ["--mode", "id", "--data.fields", "[user_id]", "--teacher", teacher / "model"]
    with pytest.raises(ValueError, match=r"lacking\.parquet.*title"):
        finetune(workplace, earlier, *flags, "--data.unlabeled_file", lacking)
    assert (earlier / "run.json").read_bytes() == before


def test_settings_of_a_teacher_need_one(teacher, tmp_path):
    data, name = DataSettings(train_file="a.csv", unlabeled_file="b.csv"), str(teacher / "model")
    with pytest.raises(ValueError, match=r"data\.unlabeled_file is only for finetuning with a teacher; set teacher"):
        FinetuneSettings(output_dir=tmp_path, data=data)
    with pytest.raises(ValueError, match=r"data\.unlabeled_file is only for.*add these files to data\.train_file"):
        PretrainSettings(output_dir=tmp_path, data=data)
    with pytest.raises(ValueError, match=r"data\.unlabeled_file is only for.*an evaluation needs labels"):
        EvaluateSettings(model=name, data=data)
    with pytest.raises(ValueError, match=r"distillation_weight=0\.3 needs a teacher: set teacher"):
        FinetuneSettings(output_dir=tmp_path, distillation_weight=0.3)
    with pytest.raises(ValueError, match=r"^distillation_weight=1\.5 must be from 0 to 1$"):
        FinetuneSettings(output_dir=tmp_path, teacher=name, distillation_weight=1.5)
    with pytest.raises(ValueError, match=r"teacher=.*holds no model.*did you mean .*model\?"):
        FinetuneSettings(output_dir=tmp_path, teacher=str(teacher))
    with pytest.raises(ValueError, match=r"teacher=.* is inside output_dir=.*would overwrite it"):
        FinetuneSettings(output_dir=teacher, teacher=name)
    with pytest.raises(ValueError, match=r"options\.distillation_weight can't be set: set distillation_weight"):
        ModelSettings(options={"distillation_weight": 0.9})
    assert FinetuneSettings(output_dir=tmp_path, teacher=name, data=data).mode == "joint"


def test_a_card_of_a_run_without_a_teacher_names_none():
    assert "teacher" not in render_card(make_record(), "org/name", {})


@pytest.mark.distributed
def test_two_processes_share_the_teachers_work(workplace, teacher, pairs, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--config", workplace / "config.yaml", "--output_dir", tmp_path, "--mode", "id", "--teacher"]
    flags += [teacher / "model", "--data.unlabeled_file", pairs, "--training.precision", "fp32"]
    # 520 rows in batches of 48 are no whole number for two processes.
    flags += ["--training.per_device_eval_batch_size", 48]
    subprocess.run([*launch, str(EXAMPLES / "finetune.py"), *map(str, flags)], check=True, timeout=PATIENCE)
    assert json.loads((tmp_path / "run.json").read_text())["device"]["processes"] == 2
    kept = pq.read_table(tmp_path / "teacher_logits.parquet")[TEACHER_COLUMN].to_numpy()
    np.testing.assert_allclose(kept, logits_of(teacher, workplace / "train.parquet", pairs), atol=1e-5)
    assert lines(tmp_path, "train")[-1]["distillation_loss"] > 0


# ---- Trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_flip_trainer_learns_from_a_column_of_logits(processor, click_rows, tmp_path: Path, accumulation):
    log = Dataset.from_dict(click_rows)
    labelled, unlabelled = log.select(range(6)), log.select(range(6, 16))
    logits = np.linspace(-3, 3, 16, dtype=np.float32)
    rows = student_rows(
        processor.encode_dataset(labelled), processor.encode_dataset(unlabelled, with_label=False), logits
    )

    class InOrder(FlipTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset or self.train_dataset)

    model = build(processor, distillation_weight=0.6)
    expected = build(processor, distillation_weight=0.6)
    expected(**FlipCTRCollator(processor, "id")(rows)).loss.backward()
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    InOrder(model, arguments, train_dataset=rows, processing_class=processor, optimizers=(optimizer, None)).train()
    for name, p in expected.named_parameters():
        torch.testing.assert_close(start[name] - model.get_parameter(name).detach(), p.grad, rtol=1e-4, atol=1e-6)
