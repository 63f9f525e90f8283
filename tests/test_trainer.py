"""transformers.Trainer: its steps are those of one big batch and of the own loop; docs/how_to/trainer.md runs."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline

from flip_hf import (
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipPretrainingCollator,
    FlipProcessor,
)
from flip_hf.data.schema import InputError
from flip_hf.fetch import minilm
from flip_hf.nn.attention import CPU_ATTENTION
from flip_hf.nn.dropout import ByteDropout
from flip_hf.scoring import click_logits, probabilities
from flip_hf.training import loop
from flip_hf.training.evaluation import evaluate_ctr, evaluate_pretraining
from flip_hf.training.settings import TrainingSettings
from flip_hf.training.trainer import CollatorEpochs, FlipTrainer, click_metrics

DOCS = Path(__file__).parents[1] / "docs" / "how_to" / "trainer.md"
TEXT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NUM_ROWS = 76  # two full windows of 32 rows and one of 12, of which no batch size below is a divisor


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    """What accelerate keeps for the life of a process ends with each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def rows(processor, click_rows):
    return processor.encode_dataset(Dataset.from_dict(click_rows).select(range(NUM_ROWS)))


def build(cls, processor, **options):
    torch.manual_seed(0)
    text = {**TEXT, "vocab_size": len(processor.tokenizer)}
    backbone = {"hidden_sizes": [16], "dropout": 0.0}
    sizes = {"embedding_dim": 8, "projection_dim": 16, "head_dropout": 0.0, "backbone_options": backbone}
    return cls(FlipConfig(text_config=text, fields=processor.fields, **sizes, **options))


def in_order(kind):
    """A Trainer that reads the rows in their order, so that batches of any size hold the same rows."""

    class InOrder(kind):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    return InOrder


def arguments(folder, **settings):
    defaults = {"num_train_epochs": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "report_to": "none"}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**defaults, **settings})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, start):
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def trained(kind, model, rows, collator, folder, accumulation, **settings):
    """How the weights move in three steps of plain gradient descent over windows of 32, 32 and 12 rows."""
    start = weights(model)
    trainer = in_order(kind)(
        model,
        arguments(
            folder,
            per_device_train_batch_size=32 // accumulation,
            gradient_accumulation_steps=accumulation,
            remove_unused_columns=False,
            **settings,
        ),
        collator,
        rows,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    trainer.train()
    assert trainer.state.global_step == 3
    return moved(model, start), trainer


def of_the_loop(model, rows, collator, accumulation):
    """The same by the package's own step."""

    class NoRun:
        accelerator = Accelerator(cpu=True)

    start = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = DataLoader(rows, 32 // accumulation, collate_fn=lambda part: (torch.zeros(len(part)), collator(part)))
    settings = TrainingSettings(max_grad_norm=float("inf"))
    for step, window in enumerate(loop._windows(batches, accumulation), start=1):
        loop._step(model, optimizer, window, settings, NoRun(), step)
    return moved(model, start)


def assert_same(found, expected):
    """Each parameter moves alike: to single precision, and to a ten-thousandth of how far it moves in three steps."""
    assert set(found) == set(expected)
    for name, value in found.items():
        tolerance = 2e-6 + 1e-4 * expected[name].abs().max().item()
        assert (value - expected[name]).abs().max() < tolerance, name


def distance(found, expected):
    return max((found[name] - expected[name]).abs().max().item() for name in found)


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_finetuning_steps_are_those_of_the_whole_batch(processor, rows, tmp_path, mode):
    collator = FlipCTRCollator(processor, mode)
    expected, whole = trained(Trainer, build(FlipForCTR, processor, mode=mode), rows, collator, tmp_path, 1)
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for accumulation in (2, 4):
        model = build(FlipForCTR, processor, mode=mode)
        found, trainer = trained(Trainer, model, rows, collator, tmp_path, accumulation)
        assert_same(found, expected)
        assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
            whole.state.log_history[-1]["train_loss"], abs=1e-5
        )
    assert_same(of_the_loop(build(FlipForCTR, processor, mode=mode), rows, collator, 4), expected)


MASKED = {"objectives": {"mlm": 1.0, "mtm": 1.0}, "mtm_loss": "full_softmax"}


def test_pretraining_steps_of_flip_trainer_are_those_of_the_whole_batch(processor, rows, tmp_path):
    collator = FlipPretrainingCollator(processor, text_mask_ratio=0.3)
    expected, _ = trained(Trainer, build(FlipForPreTraining, processor, **MASKED), rows, collator, tmp_path, 1)
    for accumulation in (2, 4):
        model = build(FlipForPreTraining, processor, **MASKED)
        assert_same(trained(FlipTrainer, model, rows, collator, tmp_path, accumulation)[0], expected)
    assert_same(of_the_loop(build(FlipForPreTraining, processor, **MASKED), rows, collator, 4), expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_flip_trainer_trains_fast_on_a_cpu_and_leaves_the_model_plain(processor, rows, tmp_path, wrapped):
    seen = set()

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            text_model = plain.flip.text_model
            seen.update(type(module) for module in text_model.modules() if isinstance(module, nn.Dropout))
            seen.add(text_model.config._attn_implementation)

    model = plain = build(FlipForCTR, processor)
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["text_head"]))
    settings = arguments(tmp_path, max_steps=1, label_names=["labels"], remove_unused_columns=False)
    FlipTrainer(model, settings, FlipCTRCollator(processor), rows, callbacks=[Watching()]).train()
    assert seen == {ByteDropout, CPU_ATTENTION}
    text_model = plain.flip.text_model
    assert {type(m) for m in text_model.modules() if "Dropout" in type(m).__name__} == {nn.Dropout}
    assert text_model.config._attn_implementation == "sdpa"


def test_pretraining_steps_of_a_plain_trainer_are_means_of_means(processor, rows, tmp_path):
    collator = FlipPretrainingCollator(processor, text_mask_ratio=0.3)
    model = build(FlipForPreTraining, processor, **MASKED)
    found, _ = trained(Trainer, model, rows, collator, tmp_path, 4)

    model = build(FlipForPreTraining, processor, **MASKED)
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for window in loop._windows(DataLoader(rows, 8, collate_fn=collator), 4):
        optimizer.zero_grad()
        torch.stack([model(**batch).loss for batch in window]).mean().backward()
        optimizer.step()
    assert_same(found, moved(model, start))
    exact, _ = trained(Trainer, build(FlipForPreTraining, processor, **MASKED), rows, collator, tmp_path, 1)
    assert distance(found, exact) > 1e-3, "which is not the whole batch's"


def test_contrastive_rows_are_those_of_a_batch(processor, rows, tmp_path):
    collator = FlipPretrainingCollator(processor)
    found, _ = trained(FlipTrainer, build(FlipForPreTraining, processor), rows, collator, tmp_path, 2)
    assert_same(of_the_loop(build(FlipForPreTraining, processor), rows, collator, 2), found)


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_evaluation_gives_the_metrics(processor, rows, tmp_path, mode):
    model, collator = build(FlipForCTR, processor, mode=mode), FlipCTRCollator(processor, mode)
    # Columns that forward does not take may go: the collator needs none of them.
    settings = arguments(tmp_path, per_device_eval_batch_size=20)
    trainer = Trainer(model, settings, collator, eval_dataset=rows, compute_metrics=click_metrics)
    found = trainer.evaluate()
    expected = evaluate_ctr(model, rows, collator, 20, trainer.accelerator, "")
    assert {"auc", "logloss"} <= set(expected)
    assert ("text_auc" in expected) == (mode == "joint")
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
    parts = ("", "id_", "text_") if mode == "joint" else ("",)
    assert found["eval_loss"] == pytest.approx(sum(expected[f"{part}logloss"] for part in parts), abs=1e-5)

    without_labels = rows.remove_columns("label")
    logits = trainer.predict(without_labels).predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(**collator(list(without_labels))).logits, atol=1e-5)


@pytest.mark.parametrize("mode", ["joint", "id"])
@pytest.mark.parametrize(
    "settings", [{}, {"train_sampling_strategy": "group_by_length"}], ids=["in order", "by length"]
)
def test_groups_give_metrics_within_them(processor, click_rows, tmp_path, mode, settings):
    users = [None if i % 9 == 4 else user for i, user in enumerate(click_rows["user_id"])]
    log = Dataset.from_dict(click_rows | {"user": users}).select(range(NUM_ROWS))
    rows = processor.encode_dataset(log, group_field="user")
    model, collator = build(FlipForCTR, processor, mode=mode), FlipCTRCollator(processor, mode)
    for columns in ({}, {"remove_unused_columns": False}):
        batches = {"per_device_eval_batch_size": 20, "per_device_train_batch_size": 20, "max_steps": 2}
        given = arguments(tmp_path, **batches, **settings, **columns)
        trainer = FlipTrainer(model, given, collator, rows, rows, compute_metrics=click_metrics)
        trainer.train()
        found = trainer.evaluate()
        logits = click_logits(model, rows, collator, 20)
        labels, known = logits["labels"], np.array([user is not None for user in log["user"]])
        clicks, of = probabilities(logits["logits"]), np.array(log["user"], dtype=object)
        by_user = {
            user: roc_auc_score(labels[of == user], clicks[of == user])
            for user in set(of[known].tolist())
            if len(set(labels[of == user].tolist())) == 2
        }
        assert len(by_user) > 5
        sizes = [(of == user).sum() for user in by_user]
        assert found["eval_gauc"] == pytest.approx(np.average(list(by_user.values()), weights=sizes), abs=1e-6)
        assert found["eval_uauc"] == pytest.approx(np.mean(list(by_user.values())), abs=1e-6)
        assert ("eval_text_uauc" in found) == (mode == "joint")
        assert found["eval_auc"] == pytest.approx(roc_auc_score(labels, clicks), abs=1e-6)
        predicted = trainer.predict(rows)
        assert [len(part) for part in predicted.label_ids] == [NUM_ROWS] * 2
        assert predicted.metrics["test_gauc"] == pytest.approx(found["eval_gauc"], abs=1e-6)
    assert trainer.data_collator is collator
    plain = trainer.predict(rows.remove_columns("group"))
    assert isinstance(plain.label_ids, np.ndarray)
    assert "test_gauc" not in plain.metrics


def test_a_stream_is_evaluated_within_groups(processor, click_rows, rows, tmp_path):
    stream = Dataset.from_dict(click_rows).select(range(NUM_ROWS)).to_iterable_dataset()
    model, collator = build(FlipForCTR, processor), FlipCTRCollator(processor)
    encoded = processor.encode_dataset(stream, group_field="user_id")
    given = arguments(tmp_path, per_device_eval_batch_size=20)
    found = FlipTrainer(model, given, collator, compute_metrics=click_metrics).evaluate(encoded)
    whole = processor.encode_dataset(Dataset.from_dict(click_rows).select(range(NUM_ROWS)), group_field="user_id")
    expected = evaluate_ctr(model, whole, collator, 20, Accelerator(cpu=True), "")
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_pretraining_is_evaluated_and_predicts(processor, rows, tmp_path):
    model, collator = build(FlipForPreTraining, processor), FlipPretrainingCollator(processor)
    settings = arguments(tmp_path, per_device_eval_batch_size=38, remove_unused_columns=False)
    trainer = Trainer(model, settings, collator, eval_dataset=rows)
    found = trainer.evaluate()
    with torch.no_grad():
        losses = [model(**collator(part)) for part in (list(rows)[:38], list(rows)[38:])]
    assert found["eval_loss"] == pytest.approx(np.mean([o.loss.item() for o in losses]), abs=1e-5)
    *parts, metrics = trainer.predict(rows).predictions
    assert [len(part) for part in parts] == [2, 2, 2]
    assert metrics["mlm_accuracy"].tolist() == pytest.approx([o.metrics["mlm_accuracy"].item() for o in losses])
    # What Trainer does not tell, the package does.
    told = evaluate_pretraining(model, rows, collator, 38, trainer.accelerator, "")
    assert {"icl_loss", "icl_tabular_to_text_accuracy"} <= set(told)


def test_a_dropped_column_is_an_error_before_the_first_step(processor, rows, tmp_path):
    model = build(FlipForPreTraining, processor)
    trainer = Trainer(model, arguments(tmp_path), FlipPretrainingCollator(processor), rows)
    with pytest.raises(ValueError, match=r"column 'row'.*remove_unused_columns=False"):
        trainer.train()
    assert trainer.state.global_step == 0


class Recorder(FlipPretrainingCollator):
    epochs: list

    def __call__(self, rows):
        self.epochs.append(self.epoch)
        return super().__call__(rows)


def test_masks_follow_the_epoch_and_a_resumed_run_ends_alike(processor, rows, tmp_path):
    def run(name, resume=None, **settings):
        model, collator = build(FlipForPreTraining, processor), Recorder(processor)
        collator.epochs = []
        steps = {"per_device_train_batch_size": 19, "num_train_epochs": 3, "save_steps": 6, "save_strategy": "steps"}
        trainer = FlipTrainer(
            model,
            arguments(tmp_path / name, remove_unused_columns=False, **steps, **settings),
            collator,
            rows,
            callbacks=[CollatorEpochs(collator)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights(model), collator.epochs

    whole, epochs = run("whole")
    assert epochs == [0] * 4 + [1] * 4 + [2] * 4
    resumed, epochs = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-6"))
    assert set(epochs) == {1, 2}
    assert distance(resumed, whole) < 1e-5

    with pytest.raises(ValueError, match=r"dataloader_persistent_workers=True: .* set it to False"):
        run("workers", dataloader_persistent_workers=True, dataloader_num_workers=1)


def test_a_sharded_table_is_refused_when_training_begins(tmp_path):
    sharded = SimpleNamespace(sharded_parameters={"flip.feature_embeddings.rows": None})
    with pytest.raises(ValueError, match="Trainer can't train a sharded feature table"):
        CollatorEpochs(None).on_train_begin(TrainingArguments(tmp_path), None, None, model=sharded)


PROGRAM = """
    import gc
    import importlib.util
    import json
    import sys
    from pathlib import Path

    import torch
    from datasets import Dataset
    from flip_hf import FlipCTRCollator, FlipForCTR, FlipForPreTraining, FlipPretrainingCollator, FlipProcessor
    from flip_hf.runs.device import leave_process_group
    from flip_hf.training.trainer import FlipTrainer
    from transformers import Trainer

    folder = Path(sys.argv[2])
    spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    processor = FlipProcessor.from_pretrained(folder / "processor")
    log = Dataset.from_dict(json.loads((folder / "log.json").read_text()))
    rows = processor.encode_dataset(log.select(range(64)))
    kinds = {
        "ctr": (Trainer, FlipForCTR, FlipCTRCollator(processor), {}),
        "pretraining": (FlipTrainer, FlipForPreTraining, FlipPretrainingCollator(processor), cases.MASKED),
    }
    expected = {}
    for name, (_, cls, collator, options) in kinds.items():  # one process that holds all rows
        model = cases.build(cls, processor, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for start in (0, 32):
            optimizer.zero_grad()
            model(**collator([rows[i] for i in range(start, start + 32)])).loss.backward()
            optimizer.step()
        expected[name] = {n: p.detach().clone() for n, p in model.named_parameters()}
    differences = {}
    for name, (kind, cls, collator, options) in kinds.items():
        for average in (True, False):
            model = cases.build(cls, processor, **options)
            settings = cases.arguments(
                folder / name,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                remove_unused_columns=False,
                average_tokens_across_devices=average,
                save_strategy="no",
            )
            optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
            trainer = cases.in_order(kind)(model, settings, collator, rows, optimizers=optimizers)
            assert trainer.accelerator.num_processes == torch.distributed.get_world_size() == 2
            trainer.train()
            assert trainer.state.global_step == 2
            found = {n: p.detach() for n, p in model.named_parameters()}
            differences[f"{name} {average}"] = cases.distance(found, expected[name])
    if trainer.is_world_process_zero():
        print(json.dumps(differences))
    # What holds the process group goes before the group does.
    del trainer, model, found
    gc.collect()
    torch.distributed.barrier()
    leave_process_group()
"""


def test_two_processes_step_as_one(processor, click_rows, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    (tmp_path / "log.json").write_text(json.dumps(click_rows))
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run([*launch, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 4
    assert max(differences.values()) < 2e-5, differences


def test_the_documentation_runs(tmp_path, monkeypatch):
    minilm()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    ten_lines, both_stages = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    namespace = {}
    for example in (ten_lines, both_stages):
        exec(compile(example, "docs/how_to/trainer.md", "exec"), namespace)
        # Over 8 seeds it is 1.
        assert namespace["metrics"]["eval_auc"] > 0.9
    assert FlipForCTR.from_pretrained(tmp_path / "runs" / "flip" / "model").config.mode == "joint"
    row = {"user_id": 7, "title": "Heat"}
    assert pipeline("ctr-prediction", model=str(tmp_path / "runs" / "clicks"))(row)["probability"] > 0.5


def test_a_stream_for_pretraining_has_one_worker(processor, click_rows, tmp_path):
    stream = processor.encode_dataset(Dataset.from_dict(click_rows).to_iterable_dataset(num_shards=4))
    collator, model = FlipPretrainingCollator(processor), build(FlipForPreTraining, processor)
    settings = {"max_steps": 1, "remove_unused_columns": False, "save_strategy": "no"}
    two = arguments(tmp_path, dataloader_num_workers=2, **settings)
    with pytest.raises(ValueError, match="2 workers would read one stream"):
        FlipTrainer(model, two, collator, stream)
    with pytest.raises(ValueError, match="2 workers would read one stream"):
        Trainer(model, two, collator, stream, callbacks=[CollatorEpochs(collator)]).train()
    one = arguments(tmp_path, dataloader_num_workers=1, **settings)
    assert FlipTrainer(model, one, collator, stream).train().global_step == 1


@pytest.mark.parametrize("remove", [True, False])
def test_rows_without_a_label_are_refused(processor, click_rows, tmp_path, remove):
    unlabelled = processor.encode_dataset(click_rows, with_label=False)
    collator, model = FlipCTRCollator(processor), build(FlipForCTR, processor)
    with pytest.raises(ValueError, match=r"encode_dataset\(dataset, with_label=True\)"):
        FlipTrainer(model, arguments(tmp_path, remove_unused_columns=remove), collator, unlabelled).train()
    with pytest.raises(ValueError, match=r"encode_dataset\(dataset, with_label=True\)"):
        loop.train(model, unlabelled, collator, TrainingSettings(), SimpleNamespace(accelerator=None), None, None, None)
    with pytest.raises(ValueError, match=r"encode_dataset\(dataset, with_label=True\)"):
        evaluate_ctr(model, unlabelled, collator, 64, Accelerator(cpu=True), "")


FORMS = {
    "frame": pd.DataFrame,
    "dataset": Dataset.from_dict,
    "table": pa.table,
    "columns": dict,
    "dicts": lambda columns: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    "stream": lambda columns: Dataset.from_dict(columns).to_iterable_dataset(),
}


@pytest.mark.parametrize("form", [*FORMS, "file"])
@pytest.mark.parametrize("cls", [FlipForCTR, FlipForPreTraining])
def test_rows_of_any_form_train_as_encoded_ones_do(processor, click_rows, rows, tmp_path, cls, form):
    columns = {name: values[:NUM_ROWS] for name, values in click_rows.items()}
    if form == "file":
        raw = str(tmp_path / "log.parquet")
        pd.DataFrame(columns).astype({"age": "Int64"}).to_parquet(raw)
    else:
        raw = FORMS[form](columns)
    collator = FlipCTRCollator(processor) if cls is FlipForCTR else FlipPretrainingCollator(processor)
    # As Trainer gives them: removing unused columns.
    settings = {"per_device_train_batch_size": 19, "num_train_epochs": 2, "max_steps": 8, "learning_rate": 0.01}

    def run(name, **data):
        model = build(cls, processor)
        start = weights(model)
        trainer = in_order(FlipTrainer)(model, arguments(tmp_path / name, seed=0, **settings), **data)
        trainer.train()
        assert trainer.args.remove_unused_columns
        return moved(model, start), trainer.evaluate()["eval_loss"]

    expected, loss = run("encoded", data_collator=collator, train_dataset=rows, eval_dataset=rows)
    found, raw_loss = run("raw", train_dataset=raw, eval_dataset=raw, processing_class=processor)
    assert max(value.abs().max() for value in expected.values()) > 1e-2
    assert distance(found, expected) < 1e-6
    assert raw_loss == pytest.approx(loss, abs=1e-6)


def test_rows_in_memory_are_evaluated_and_predicted(processor, click_rows, rows, tmp_path):
    frame = pd.DataFrame(click_rows).iloc[:NUM_ROWS]
    trainer = FlipTrainer(build(FlipForCTR, processor), arguments(tmp_path), processing_class=processor)
    expected = evaluate_ctr(trainer.model, rows, trainer.data_collator, 8, trainer.accelerator, "")
    found = trainer.evaluate(frame)
    assert found["eval_auc"] == pytest.approx(expected["auc"], abs=1e-6)
    assert found["eval_text_logloss"] == pytest.approx(expected["text_logloss"], abs=1e-6)
    both = trainer.evaluate({"early": frame.iloc[:40], "late": frame.iloc[40:]})
    assert {"eval_early_auc", "eval_late_auc"} <= set(both)

    labelled, unlabelled = (trainer.predict(part) for part in (frame, frame.drop(columns="label")))
    assert labelled.metrics["test_auc"] == pytest.approx(expected["auc"], abs=1e-6)
    assert unlabelled.label_ids is None
    np.testing.assert_array_equal(labelled.predictions[0], unlabelled.predictions[0])
    path = tmp_path / "log.csv"
    frame.astype({"age": "Int64"}).drop(columns="label").to_csv(path, index=False)
    np.testing.assert_allclose(trainer.predict(path).predictions[0], unlabelled.predictions[0], atol=1e-6)

    with pytest.raises(InputError, match="eval_dataset, field 'label': the column is missing"):
        trainer.evaluate(frame.drop(columns="label"))
    with pytest.raises(InputError, match=r"eval_dataset\['late'\].*field 'title'"):
        trainer.evaluate({"early": frame, "late": frame.drop(columns="title")})


def test_rows_in_memory_are_evaluated_within_groups(processor, click_rows, tmp_path):
    frame = pd.DataFrame(click_rows).iloc[:NUM_ROWS]
    model, settings = build(FlipForCTR, processor), arguments(tmp_path)
    trainer = FlipTrainer(model, settings, processing_class=processor, group_field="user_id")
    whole = processor.encode_dataset(frame, group_field="user_id")
    expected = evaluate_ctr(model, whole, trainer.data_collator, 8, trainer.accelerator, "")
    assert {"gauc", "uauc", "text_uauc"} <= set(expected)
    found = trainer.evaluate(frame)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert trainer.predict(frame).metrics["test_uauc"] == pytest.approx(expected["uauc"], abs=1e-6)


def test_parts_of_eval_dataset_are_evaluated_in_training(processor, click_rows, tmp_path):
    frame = pd.DataFrame(click_rows)
    trainer = FlipTrainer(
        build(FlipForCTR, processor),
        arguments(tmp_path, eval_strategy="epoch", save_strategy="no", per_device_train_batch_size=32),
        train_dataset=frame.iloc[:64],
        eval_dataset={"seen": frame.iloc[:64], "unseen": Dataset.from_pandas(frame.iloc[64:])},
        processing_class=processor,
    )
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"eval_seen_auc", "eval_unseen_auc", "eval_unseen_id_logloss"} <= logged


def test_the_collator_is_the_models(processor, click_rows, tmp_path):
    groups = [["user_id", "gender", "age"], ["title", "genre"]]
    for options in ({"mode": "id"}, {"mode": "text"}, {"mode": "text", "text_towers": groups}, {"text_towers": groups}):
        model = build(FlipForCTR, processor, **options)
        settings = arguments(tmp_path, max_steps=1, save_strategy="no")
        FlipTrainer(model, settings, train_dataset=click_rows, processing_class=processor).train()
    collator = FlipTrainer(
        build(FlipForPreTraining, processor), arguments(tmp_path, seed=3, data_seed=5), processing_class=processor
    ).data_collator
    assert collator.seed == 5

    made = FlipTrainer(
        args=arguments(tmp_path), model_init=lambda: build(FlipForCTR, processor, mode="id"), processing_class=processor
    )
    assert made.data_collator.mode == "id"


def test_masks_follow_the_epoch_without_a_callback(processor, click_rows, tmp_path):
    collator = Recorder(processor)
    collator.epochs = []
    settings = arguments(tmp_path, per_device_train_batch_size=150, num_train_epochs=3, save_strategy="no")
    FlipTrainer(
        build(FlipForPreTraining, processor), settings, collator, click_rows, processing_class=processor
    ).train()
    assert collator.epochs == [0, 0, 1, 1, 2, 2]


def test_what_the_trainer_saves_is_loaded_by_name(processor, click_rows, tmp_path, caplog):
    frame = pd.DataFrame(click_rows)
    settings = arguments(tmp_path, learning_rate=0.01, save_strategy="epoch")
    trainer = FlipTrainer(build(FlipForCTR, processor), settings, train_dataset=frame, processing_class=processor)
    trainer.train()
    trainer.save_model()
    assert FlipProcessor.from_pretrained(tmp_path).content_hash() == processor.content_hash()
    logits = trainer.predict(frame).predictions[0]
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        clicks = pipeline("ctr-prediction", model=str(folder))(frame)
        np.testing.assert_allclose([found["probability"] for found in clicks], 1 / (1 + np.exp(-logits)), atol=1e-5)
    # transformers.Trainer sets use_cache in every configuration, which FLIP does not know.
    assert "use_cache" not in caplog.text


def test_what_the_trainer_can_not_encode_or_collate_is_said_at_once(processor, click_rows, rows, tmp_path):
    model, settings = build(FlipForCTR, processor), arguments(tmp_path)
    with pytest.raises(ValueError, match="otherwise pass encoded rows and data_collator"):
        FlipTrainer(model, settings, train_dataset=rows)
    with pytest.raises(ValueError, match="train_dataset is not encoded: pass processing_class=processor"):
        FlipTrainer(model, settings, FlipCTRCollator(processor), pd.DataFrame(click_rows))
    frame = pd.DataFrame(click_rows).assign(label=[1, 7] * 150)
    with pytest.raises(InputError, match="train_dataset, field 'label', row 1, value 7"):
        FlipTrainer(model, settings, train_dataset=frame, processing_class=processor)


def test_batches_grouped_by_length_hold_texts_of_like_length(processor, click_rows, tmp_path):
    lengths = []

    class Lengths(FlipCTRCollator):
        def __call__(self, rows):
            lengths.append([len(row["input_ids"]) for row in rows])
            return super().__call__(rows)

    settings = arguments(
        tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=30, save_strategy="no"
    )
    FlipTrainer(
        build(FlipForCTR, processor), settings, Lengths(processor), click_rows, processing_class=processor
    ).train()
    spread = np.mean([np.std(batch) for batch in lengths])
    assert spread < 0.7 * np.std(np.concatenate(lengths))
