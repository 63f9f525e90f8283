"""The training loop: its steps are those of a plain torch loop, and it logs, evaluates and saves when it should."""

import itertools
import math
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from flip_hf import FlipForCTR, FlipPretrainingCollator, FlipProcessor
from flip_hf.data.sampling import LengthGroupedBatchSampler
from flip_hf.nn.dropout import ByteDropout
from flip_hf.outputs import FlipForPreTrainingOutput
from flip_hf.training import loop
from flip_hf.training.loop import Goal, WithRowNumbers, count_items, train
from flip_hf.training.meter import Meter, Progress
from flip_hf.training.settings import TrainingSettings
from flip_hf.training.signals import Stopped, leave_signals_to_parent

NUM_ROWS, NUM_FEATURES = 22, 7


class TinyText(nn.Linear):
    """A text encoder of numbers, which notices what its dropout is while it trains."""

    _supports_attention_backend = False

    def __init__(self):
        super().__init__(3, 2)
        self.dropout = nn.Dropout(0.0)

    def forward(self, texts):
        self.dropout_in_training = type(self.dropout)
        return super().forward(texts)


class Tiny(nn.Module):
    """Linear regression of a number on a feature and a "text", with what the loop asks of a model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text_model = TinyText()
        self.feature_embeddings = nn.Embedding(NUM_FEATURES, 4)
        self.head = nn.Linear(6, 1)
        self.sharded_parameters = {}
        self.contrasts_rows = False
        self.losses = []

    @property
    def base_model(self):
        return self

    def num_items(self, batch):
        return {"rows": torch.tensor(len(batch["targets"])), "pairs": torch.tensor(2 * len(batch["targets"]))}

    def forward(self, ids, texts, targets, num_items_in_batch):
        assert self.training
        rows = self.feature_embeddings(ids)
        errors = (self.head(torch.cat([rows, self.text_model(texts)], dim=1))[:, 0] - targets).square()
        mlm, icl = errors.sum() / num_items_in_batch["rows"], errors.mean(dim=0).sqrt() / num_items_in_batch["pairs"]
        loss = mlm + icl
        self.losses.append(loss.item())
        return FlipForPreTrainingOutput(
            loss=loss,
            mlm_loss=mlm,
            icl_loss=icl,
            metrics={"accuracy": (errors.detach() < 1).float().mean()},
            feature_penalty=rows.square().sum() / len(ids),
        )


class Collator:
    """Of the rows' numbers, the numbers that the model is shown; they depend on the epoch."""

    columns = needed_columns = ("row", "input_ids")
    reads_numbers = True

    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __call__(self, rows):
        assert rows.column_names == ["row", "input_ids"]
        return self.batch(rows["row"].to_numpy(), self.epoch)

    @staticmethod
    def batch(numbers, epoch):
        random = np.random.RandomState(1)
        texts, targets = random.randn(NUM_ROWS, 3)[numbers], 3 * random.randn(NUM_ROWS)[numbers]
        return {
            "ids": torch.from_numpy((numbers + epoch) % NUM_FEATURES),
            "texts": torch.tensor(texts, dtype=torch.float32),
            "targets": torch.tensor(targets, dtype=torch.float32),
        }


class StubRun:
    """What the loop tells a run."""

    def __init__(self, accelerator, saved=None):
        self.accelerator, self.saved, self.is_main, self.folder = accelerator, saved, True, "runs/stub"
        self.record = {}
        self.logged, self.models, self.checkpoints, self.closed, self.resumed = [], [], [], 0, 0

    def resume(self, state):
        self.resumed += 1
        return self.saved

    def log(self, event, values):
        self.logged.append((event, values))

    def save_model(self, model, processor, result):
        self.models.append((processor, dict(result)))

    def save_checkpoint(self, step, state, progress, processor):
        self.checkpoints.append((step, state, progress, processor))

    def close_trackers(self):
        self.closed += 1

    def lines(self, event):
        return [values for name, values in self.logged if name == event]


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    # What comes next in this process may want another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def rows():
    lengths = [3 + i % 5 for i in range(NUM_ROWS)]
    return datasets.Dataset.from_dict(
        {"row": range(NUM_ROWS), "input_ids": [[1] * n for n in lengths], "unread": range(NUM_ROWS)}
    )


def fit(accelerator, rows, *, model=None, saved=None, values=None, goal=None, evaluate=None, collator=None, **settings):
    """Trains; the validation loss is the next of `values`, by default ever smaller."""
    values = iter(values if values is not None else (1 / n for n in itertools.count(1)))
    model, run = Tiny() if model is None else model, StubRun(accelerator, saved)
    training = TrainingSettings(
        **{"per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 0.05, **settings}
    )
    told = []

    def measure(prepared, moment):
        told.append(moment)
        return {"loss": next(values)}

    collator = Collator() if collator is None else collator
    goal = Goal("loss", larger_is_better=False) if goal is None else goal
    result = train(model, rows, collator, training, run, goal, evaluate or measure, "processor")
    return SimpleNamespace(model=model, run=run, result=result, training=training, told=told)


def order_of(rows, batch_size, seed=0, *process):
    return LengthGroupedBatchSampler(np.array([len(ids) for ids in rows["input_ids"]]), batch_size, seed, *process)


def plain_torch(rows, training, epochs, total_steps):
    """The same training without any of the package's code but its order of rows: weights, and values of each step."""
    model = Tiny()
    text, table, head = model.text_model, model.feature_embeddings, model.head
    slow, fast = {"lr": training.text_learning_rate}, {"lr": training.learning_rate}
    decayed, plain = {"weight_decay": training.weight_decay}, {"weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [
            {"params": [text.weight], **slow, **decayed},
            {"params": [text.bias], **slow, **plain},
            {"params": [head.weight], **fast, **decayed},
            {"params": [table.weight, head.bias], **fast, **plain},
        ]
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    warmup = round(training.warmup_ratio * total_steps)
    sampler = order_of(rows, training.per_device_train_batch_size, training.seed)
    steps = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches = [Collator.batch(np.array(numbers), epoch) for numbers in sampler]
        for first in range(0, len(batches), training.gradient_accumulation_steps):
            window = batches[first : first + training.gradient_accumulation_steps]
            step, num_rows = len(steps), sum(len(batch["ids"]) for batch in window)
            if step == total_steps:
                return model, steps
            factor = (
                step / warmup
                if step < warmup
                else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total_steps - warmup))
            )
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            values = {"loss": 0.0, "mlm_loss": 0.0, "icl_loss": 0.0, "accuracy": 0.0}
            for batch in window:
                items = {"rows": torch.tensor(float(num_rows)), "pairs": torch.tensor(2.0 * num_rows)}
                output = model(**batch, num_items_in_batch=items)
                (output.loss + 0.5 * training.feature_l2 * output.feature_penalty / len(window)).backward()
                for name in ("loss", "mlm_loss", "icl_loss"):
                    values[name] += output[name].item()
                values["accuracy"] += output.metrics["accuracy"].item() / len(window)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            steps.append({**values, "gradient_norm": norm.item(), "rows": num_rows, "epoch": epoch})
    return model, steps


# A setting apart from its default in each, so that whichever the loop passes over shows in the weights.
SETTINGS = {
    "defaults": {},
    "learning rates": {"learning_rate": 0.2, "text_learning_rate": 0.03},
    "warm-up": {"warmup_ratio": 0.5},
    "no warm-up": {"warmup_ratio": 0.0},
    "weight decay": {"weight_decay": 0.5},
    "feature penalty": {"feature_l2": 0.8},
    "feature penalty of windows": {"feature_l2": 0.8, "gradient_accumulation_steps": 3},
    "gradients clipped": {"max_grad_norm": 0.1},
    "gradients not clipped": {"max_grad_norm": 1e6},
    "accumulation": {"gradient_accumulation_steps": 4},
    "batch size": {"per_device_train_batch_size": 7},
    "seed": {"seed": 3},
    "most steps": {"max_steps": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_steps_are_those_of_plain_torch(accelerator, rows, name):
    settings = SETTINGS[name]
    found = fit(accelerator, rows, num_train_epochs=2, patience=9, logging_steps=1, **settings)
    training = found.training
    per_epoch = math.ceil(
        math.ceil(NUM_ROWS / training.per_device_train_batch_size) / training.gradient_accumulation_steps
    )
    total = min(2 * per_epoch, training.max_steps or 1000)
    expected, steps = plain_torch(rows, training, 2, total)
    for (parameter, value), other in zip(found.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=parameter)
    assert not torch.equal(found.model.head.weight, Tiny().head.weight)
    logged = found.run.lines("train")
    assert [line["step"] for line in logged] == list(range(1, total + 1))
    for line, step in zip(logged, steps, strict=True):
        assert line["epoch"] == step["epoch"]
        for value in ("loss", "mlm_loss", "icl_loss", "accuracy", "gradient_norm"):
            assert line[value] == pytest.approx(step[value], rel=1e-4), value
    assert found.result["steps"] == total


def test_rows_of_the_table_wait_until_a_batch_reads_them(accelerator, rows):
    tables = {}
    for updates in ("dense", "rows"):
        found = fit(
            accelerator, rows, feature_updates=updates, max_steps=2, per_device_train_batch_size=2, warmup_ratio=0.0
        )
        tables[updates] = found.model.feature_embeddings.weight.detach()
        sampler = order_of(rows, 2, 0)
        batches = list(sampler)[:2]
    first, second = ({i % NUM_FEATURES for i in batch} for batch in batches)
    start = Tiny().feature_embeddings.weight
    moved = {updates: (table != start).any(dim=1).nonzero()[:, 0].tolist() for updates, table in tables.items()}
    assert moved["dense"] == moved["rows"] == sorted(first | second)
    # Adam moves a row that only the first batch reads on by its moments.
    differ = (~torch.isclose(tables["dense"], tables["rows"])).any(dim=1).nonzero()[:, 0].tolist()
    assert differ == sorted(first - second) != []


def test_the_log_averages_the_steps_since_its_last_line(accelerator, rows, monkeypatch, capfd):
    now = itertools.count()
    # Each look at the clock is a second after the last: a step takes one.
    monkeypatch.setattr(loop, "monotonic", lambda: next(now))
    found = fit(accelerator, rows, num_train_epochs=2, logging_steps=4, patience=9)
    _, steps = plain_torch(rows, found.training, 2, 12)
    logged = found.run.lines("train")
    assert [line["step"] for line in logged] == [4, 8, 12]
    for i, line in enumerate(logged):
        part = steps[4 * i : 4 * i + 4]
        for name in ("loss", "mlm_loss", "icl_loss", "accuracy", "gradient_norm"):
            assert line[name] == pytest.approx(np.mean([step[name] for step in part]), rel=1e-4), name
        assert line["rows_per_second"] == round(sum(step["rows"] for step in part) / 4, 1)
        assert line["epoch"] == part[-1]["epoch"]
        assert line["memory_gib"] > 0.01
    # At the end of the cosine.
    assert logged[-1]["learning_rate"] == logged[-1]["text_learning_rate"] == 0.0
    assert logged[0]["learning_rate"] == pytest.approx(500 * logged[0]["text_learning_rate"])
    assert found.result == {
        "validation": {"loss": 0.5},
        "best_step": 12,
        "steps": 12,
        "stopped_early": False,
        "rows_per_second": round(2 * NUM_ROWS / 12, 1),
    }
    shown = "".join(capfd.readouterr())
    assert "step 6: loss 1.0000\n" in shown
    assert "step 12: loss 0.5000\n" in shown

    shorter = fit(accelerator, rows, max_steps=5, logging_steps=4).run.lines("train")
    assert [line["step"] for line in shorter] == [4, 5], "the last step is logged"
    assert shorter[-1]["loss"] == pytest.approx(steps_of(rows, 5)[-1]["loss"], rel=1e-4)


def test_the_bar_shows_steps_losses_and_speed(accelerator, rows, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **settings):
            self.settings, self.shown, self.written, self.steps, self.ended = settings, [], [], 0, False
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.ended = True

        def update(self):
            self.steps += 1

        def set_postfix(self, values):
            self.shown.append(values)

        def write(self, text):
            self.written.append(text)

    monkeypatch.setattr(loop, "progress_bar", Bar)
    saved = asdict(Progress(step=6, evaluated_step=6, best={"loss": 2.0}, best_step=6, rows=22, seconds=1.0))
    found = fit(accelerator, rows, num_train_epochs=2, saved=saved, logging_steps=4)
    (bar,) = bars
    assert bar.settings == {"total": 12, "initial": 6, "desc": "training", "unit": "step", "disable": False}
    assert bar.steps == 6
    assert bar.ended
    assert bar.written == ["step 12: loss 1.0000"]
    assert bar.shown == [
        {name: f"{line[name]:.3g}" for name in ("loss", "mlm_loss", "icl_loss", "rows_per_second")}
        for line in found.run.lines("train")
    ]
    assert len(bar.shown) == 2


def steps_of(rows, total):
    return plain_torch(rows, TrainingSettings(per_device_train_batch_size=4, learning_rate=0.05), 1, total)[1]


def test_validation_is_read_where_the_epoch_is_divided(accelerator, rows):
    found = fit(accelerator, rows, num_train_epochs=2, evaluations_per_epoch=3, patience=9)
    assert [(line["step"], line["epoch"]) for line in found.run.lines("validation")] == [
        (2, 0),
        (4, 0),
        (6, 0),
        (8, 1),
        (10, 1),
        (12, 1),
    ]
    assert found.run.lines("validation")[1]["loss"] == 0.5
    assert found.told == [f"validation at step {step}" for step in (2, 4, 6, 8, 10, 12)]
    each = fit(accelerator, rows, num_train_epochs=2, evaluations_per_epoch=6, patience=99)
    assert [(line["step"], line["epoch"]) for line in each.run.lines("validation")] == [
        (step, (step - 1) // 6) for step in range(1, 13)
    ]
    once = fit(accelerator, rows, max_steps=4)
    assert [line["step"] for line in once.run.lines("validation")] == [4], "the last step is one of them"


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_training_stops_when_validation_gets_no_better(accelerator, rows, patience):
    values = [0.5, 0.6, 0.4, 0.4, 0.7, 0.9, 0.8]
    found = fit(accelerator, rows, num_train_epochs=7, values=values, patience=patience)
    evaluations = {1: 2, 2: 5, 3: 6}[patience]
    best, at = (0.5, 6) if patience == 1 else (0.4, 18)
    assert [line["loss"] for line in found.run.lines("validation")] == values[:evaluations]
    assert {name: found.result[name] for name in ("validation", "best_step", "steps", "stopped_early")} == {
        "validation": {"loss": best},
        "best_step": at,
        "steps": 6 * evaluations,
        "stopped_early": True,
    }
    # Models are kept when they are the best so far, with what training would return then.
    kept = [6] if patience == 1 else [6, 18]
    assert [(result["best_step"], result["steps"]) for _, result in found.run.models] == [(step, step) for step in kept]
    assert {processor for processor, _ in found.run.models} == {"processor"}
    assert found.run.models[0][1]["validation"] == {"loss": 0.5}
    assert found.run.models[0][1]["stopped_early"] is True


def test_the_best_is_the_largest_where_larger_is_better(accelerator, rows):
    goal = Goal("loss", larger_is_better=True)
    found = fit(accelerator, rows, num_train_epochs=3, values=[0.5, 0.6, 0.4], goal=goal)
    assert found.result["validation"] == {"loss": 0.6}
    assert len(found.run.models) == 2
    assert goal.better(0.4, math.nan)
    assert goal.better(0.4, None)
    assert not goal.better(math.nan, 0.4)
    assert not goal.better(0.4, 0.4)
    assert not Goal("loss", larger_is_better=False).better(0.4, 0.4)


def test_checkpoints_are_saved_between_steps_and_resumed_from(accelerator, rows):
    collator = Collator()
    whole = fit(accelerator, rows, num_train_epochs=3, save_steps=4, patience=9, logging_steps=3, collator=collator)
    assert whole.run.resumed == 1
    assert [step for step, *_ in whole.run.checkpoints] == [4, 8, 12, 16]
    _, _, saved, processor = whole.run.checkpoints[1]
    assert processor == "processor"
    assert all(state.schedule.state_dict()["last_epoch"] == 18 for _, state, *_ in whole.run.checkpoints)
    assert {
        name: saved[name] for name in ("step", "evaluated_step", "best", "best_step", "without_better", "rows")
    } == {
        "step": 8,
        "evaluated_step": 6,
        "best": {"loss": 1.0},
        "best_step": 6,
        "without_better": 0,
        "rows": NUM_ROWS + sum(step["rows"] for step in steps_of_epochs(rows)[6:8]),
    }
    assert saved["meter"]["steps"] == 2, "steps 7 and 8: the log's last line is of step 6"
    assert saved["seconds"] > 0
    assert asdict(Progress.of(saved)) == saved

    loaded = []

    class Noting(Collator):
        def __call__(self, rows):
            loaded.append((self.epoch, rows["row"].to_pylist()))
            return super().__call__(rows)

    resumed = fit(accelerator, rows, num_train_epochs=3, patience=9, logging_steps=3, saved=saved, collator=Noting())
    # Only what comes after step 8 is loaded, in the order in which the whole run read it.
    sampler = order_of(rows, 4, 0)
    expected = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        expected += [(epoch, numbers) for numbers in sampler]
    assert loaded == expected[2:]
    assert [line["step"] for line in resumed.run.lines("train")] == [9, 12, 15, 18]
    assert [line["step"] for line in resumed.run.lines("validation")] == [12, 18]
    assert resumed.result["steps"] == 18


def steps_of_epochs(rows):
    return plain_torch(rows, TrainingSettings(per_device_train_batch_size=4, learning_rate=0.05), 3, 18)[1]


def test_an_evaluation_that_a_checkpoint_came_before_is_made_up_for(accelerator, rows):
    saved = asdict(Progress(step=6, evaluated_step=0, rows=22, seconds=1.0))
    found = fit(accelerator, rows, num_train_epochs=2, saved=saved)
    assert [line["step"] for line in found.run.lines("validation")] == [6, 12]
    done = fit(
        accelerator,
        rows,
        num_train_epochs=1,
        saved=saved | {"evaluated_step": 6, "best": {"loss": 2.0}, "best_step": 3},
    )
    assert done.run.logged == []
    assert done.result["validation"] == {"loss": 2.0}
    assert done.result["best_step"] == 3
    assert done.result["rows_per_second"] == 22.0


@pytest.mark.parametrize("where", ["in a step", "in an evaluation"])
def test_a_signal_ends_the_step_and_saves_a_checkpoint(accelerator, rows, where, caplog):
    calls = itertools.count(1)

    class Told(Collator):
        def __call__(self, rows):
            if where == "in a step" and next(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(rows)

    def evaluate(model, moment):
        signal.raise_signal(signal.SIGTERM)
        return {"loss": 0.5}

    run = StubRun(accelerator)
    training = TrainingSettings(per_device_train_batch_size=4, evaluations_per_epoch=2)
    caplog.set_level("INFO")
    with pytest.raises(Stopped):
        train(Tiny(), rows, Told(), training, run, Goal("loss", False), evaluate, "processor")
    assert [step for step, *_ in run.checkpoints] == [3]
    _, state, progress, processor = run.checkpoints[0]
    assert progress["step"] == 3
    assert progress["evaluated_step"] == (0 if where == "in a step" else 3)
    assert processor == "processor"
    assert state.schedule.state_dict()["last_epoch"] == 3
    assert run.closed == 1
    assert "stopped after step 3 and saved a checkpoint" in caplog.text


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_what_is_not_finite_names_step_parts_and_rows(accelerator, rows, what):
    class Breaking(Tiny):
        calls = 0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.calls += 1
            if self.calls == 4:
                # A square root has no finite gradient at zero.
                output.loss = output.loss + (math.nan if what == "loss" else (0.0 * output.loss).sqrt())
            return output

    sampler = order_of(rows, 4, 0)
    third, fourth = list(sampler)[2:4]
    read = fourth if what == "loss" else third + fourth
    with pytest.raises(FloatingPointError) as raised:
        fit(accelerator, rows, model=Breaking(), gradient_accumulation_steps=2)
    number = r"-?\d[\d.e+-]*"
    parts = (
        f"loss=nan, mlm_loss={number}, icl_loss={number}"
        if what == "loss"
        else (f"loss={number}, mlm_loss={number}, icl_loss={number}, accuracy={number}")
    )
    rest = re.escape(
        f"; rows {read}. Lower the learning rate or check these rows. Any best model and checkpoint saved so far are "
        "intact in runs/stub"
    )
    assert re.fullmatch(f"the {what} is nan at step 2: {parts}{rest}", str(raised.value))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_are_shared_once_a_step(accelerator, rows, accumulation):
    entered = []

    class Noting(OneOfTwo):
        num_processes, process_index = 1, 0

        @contextmanager
        def no_sync(self, model):
            entered.append((model, len(model.losses)))
            yield

    found = fit(
        Noting(accelerator),
        rows,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
        num_train_epochs=1,
    )
    # Six batches: all but the last one of each step.
    silent = [number for number in range(6) if number % accumulation != accumulation - 1]
    assert entered == [(found.model, number) for number in silent]


def test_a_model_without_a_table_has_no_penalty(accelerator, rows):
    class TextAlone(Tiny):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) | {"feature_penalty": None}

    with_it, without = (
        fit(accelerator, rows, model=TextAlone(), max_steps=2, feature_l2=value).model.head.weight
        for value in (0.8, 0.0)
    )
    assert torch.equal(with_it, without)


def test_workers_ignore_signals_and_draw_none_of_the_models_random_numbers(accelerator, rows):
    parent = os.getpid()

    class FromWorker(Collator):
        def __call__(self, rows):
            ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT)]
            batch = super().__call__(rows)
            return batch if all(ignored) and os.getpid() != parent else {**batch, "targets": 100 + batch["targets"]}

    before = torch.get_rng_state()
    expected = fit(accelerator, rows, max_steps=2, model=Tiny())
    found = fit(accelerator, rows, max_steps=2, dataloader_num_workers=1, collator=FromWorker(), model=Tiny())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found.model.head.weight, expected.model.head.weight)


def test_the_text_encoder_trains_fast_on_a_cpu_and_is_plain_afterwards(accelerator, rows):
    text_model = fit(accelerator, rows, max_steps=2).model.text_model
    assert text_model.dropout_in_training is ByteDropout
    assert type(text_model.dropout) is nn.Dropout


def test_a_signal_does_not_end_a_worker_that_has_just_started(accelerator, rows, monkeypatch):
    def told_first(worker):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        leave_signals_to_parent(worker)

    monkeypatch.setattr(loop, "leave_signals_to_parent", told_first)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert fit(accelerator, rows, max_steps=2, dataloader_num_workers=1).result["steps"] == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before, "the parent hears signals again"


class OneOfTwo:
    """An accelerator that says that another process does the same as this one."""

    num_processes, process_index = 2, 1

    def __init__(self, accelerator, **said):
        self.accelerator = accelerator
        self.__dict__.update(said)

    def __getattr__(self, name):
        return getattr(self.accelerator, name)

    def reduce(self, values, reduction):
        assert reduction in ("sum", "mean")
        return {name: value * 2 if reduction == "sum" else value for name, value in values.items()}


def test_two_processes_share_batches_and_average_gradients(accelerator, rows, monkeypatch, capfd):
    now = itertools.count()
    monkeypatch.setattr(loop, "monotonic", lambda: next(now))
    monkeypatch.setattr(loop.StopSignals, "any", lambda self, accelerator: False)
    read = []

    class Noting(Collator):
        def __call__(self, rows):
            read.append(rows["row"].to_pylist())
            return super().__call__(rows)

    two = OneOfTwo(accelerator)
    found = fit(two, rows, max_steps=3, logging_steps=1, collator=Noting(), seed=7)
    sampler = order_of(rows, 4, 7, 2, 1)
    assert read == list(sampler)
    assert torch.initial_seed() == 8, "the second process draws other dropout than the first"
    # All rows of both, of which gradients are averaged: the sum over this process's rows is divided by half of them.
    assert [line["rows_per_second"] for line in found.run.lines("train")] == [2.0 * len(batch) for batch in read]
    assert found.result["rows_per_second"] == round(2 * sum(map(len, read)) / 3, 1)
    batch = Collator.batch(np.array(read[0]), 0)
    items = {"rows": torch.tensor(float(len(read[0]))), "pairs": torch.tensor(2.0 * len(read[0]))}
    first = Tiny()(**batch, num_items_in_batch=items)
    assert found.run.lines("train")[0]["loss"] == pytest.approx(first.loss.item(), rel=1e-5)

    counted = count_items(Tiny(), [batch, batch], two)
    assert {name: value.item() for name, value in counted.items()} == {
        "rows": 4.0 * len(read[0]),
        "pairs": 8.0 * len(read[0]),
    }
    assert all(value.is_floating_point() for value in counted.values())


def test_a_process_that_is_not_the_main_one_shows_nothing(accelerator, rows, capfd):
    run = StubRun(accelerator)
    run.is_main = False
    goal = Goal("loss", larger_is_better=False)
    training = TrainingSettings(per_device_train_batch_size=8)
    result = train(Tiny(), rows, Collator(), training, run, goal, lambda model, moment: {"loss": 1.0}, "processor")
    assert "".join(capfd.readouterr()) == ""
    assert result["steps"] == 3


def test_parameters_that_are_spread_over_processes_are_not_resumed(accelerator, rows, caplog):
    sharded = Tiny()
    sharded.sharded_parameters = {"feature_embeddings.weight": sharded.feature_embeddings.weight}
    found = fit(accelerator, rows, model=sharded, save_steps=2)
    assert found.run.resumed == 0
    assert found.run.checkpoints == []
    assert "this run saves its best model, but can't be resumed" in caplog.text
    caplog.clear()
    fit(accelerator, rows, max_steps=1)
    assert caplog.text == ""

    with pytest.raises(ValueError, match="FSDP") as caught:
        fit(OneOfTwo(accelerator, distributed_type="FSDP"), rows, model=sharded)
    assert str(caught.value) == (
        "training.shard_features and FSDP would both shard the feature table: set shard_features to false, or launch "
        "without FSDP"
    )
    # Each process changes the rows that it read of its own share.
    fit(accelerator, rows, model=sharded, feature_updates="rows", max_steps=1)


def test_updates_of_rows_on_several_processes_need_a_sharded_table(accelerator, rows):
    with pytest.raises(ValueError, match="rows") as caught:
        fit(OneOfTwo(accelerator), rows, feature_updates="rows")
    assert str(caught.value) == (
        "training.feature_updates='rows' on several processes needs a sharded feature table: set "
        "training.shard_features to true, or training.feature_updates to 'dense'"
    )


def test_rows_are_numbered_and_belong_to_the_collator(accelerator, rows):
    class OfAnotherPackage(Collator):
        columns = ("input_ids",)

    with pytest.raises(ValueError, match="row") as caught:
        fit(accelerator, rows.remove_columns("row"), collator=OfAnotherPackage())
    assert str(caught.value) == (
        "the encoded rows lack the column 'row', which errors need to name rows: encode with "
        "processor.encode_dataset, or number the rows with rows.add_column('row', list(range(len(rows))))"
    )


@pytest.mark.parametrize(
    ("labels", "goal"),
    [([0, 1, 1], Goal("auc", True)), ([0, 0], Goal("logloss", False)), ([1.0, 1.0, 1.0], Goal("logloss", False))],
)
def test_auc_is_the_goal_where_it_is_defined(labels, goal, caplog):
    assert loop.click_goal(np.array(labels)) == goal
    expected = (
        f"all {len(labels)} validation rows have the label {labels[0]:.0f}, so AUC is undefined; LogLoss chooses the "
        "best model"
    )
    assert caplog.messages == ([] if goal.metric == "auc" else [expected])


def test_a_run_records_its_goal(accelerator, rows):
    goal = Goal("loss", larger_is_better=False)
    assert fit(accelerator, rows, max_steps=1, goal=goal).run.record["goal"] == asdict(goal)


def test_a_metric_that_is_null_in_a_checkpoint_is_nan():
    saved = asdict(Progress(step=3, best={"auc": math.nan, "loss": 0.5}, meter=Meter({"loss": 1.0}, 2, 8, 0.5)))
    found = Progress.of({**saved, "best": {"auc": None, "loss": 0.5}})
    assert math.isnan(found.best.pop("auc"))
    assert found.best == {"loss": 0.5}
    assert found.meter == Meter({"loss": 1.0}, steps=2, rows=8, seconds=0.5)
    assert found.step == 3


def test_a_window_is_contrasted_as_a_whole(accelerator, rows, monkeypatch):
    with pytest.raises(ValueError, match="window") as caught:
        fit(accelerator, rows, contrastive_batches="window")
    assert str(caught.value) == (
        "training.contrastive_batches is 'window', but this model has no contrastive objective; use it only for "
        "pretraining, with a positive weight of icl in model.options.objectives"
    )
    model = Tiny()
    model.contrasts_rows = True
    windows, told = [], []

    def contrast(prepared, batches, by):
        windows.append(len(batches))
        assert by is accelerator
        return [lambda i=i, **inputs: told.append(i) or prepared(**inputs) for i in range(len(batches))]

    monkeypatch.setattr(loop, "contrast_over_window", contrast)
    found = fit(accelerator, rows, model=model, contrastive_batches="window", gradient_accumulation_steps=4)
    assert windows == [4, 2]
    assert told == [0, 1, 2, 3, 0, 1]
    assert torch.equal(found.model.head.weight, fit(accelerator, rows, gradient_accumulation_steps=4).model.head.weight)
    assert windows == [4, 2], "and only if that is asked for"


def test_the_text_encoder_is_compiled_where_it_is_asked_for(accelerator, rows, monkeypatch):
    compiled = []
    monkeypatch.setattr(loop, "compile_text_encoder", lambda model, device: compiled.append((model, device.type)))
    fit(accelerator, rows, max_steps=1)
    assert compiled == []
    model = Tiny()
    fit(accelerator, rows, max_steps=1, torch_compile=True, model=model)
    assert compiled == [(model, "cpu")]


def test_a_meter_averages_over_steps_and_rows_over_time():
    meter = Meter()
    meter.add({"loss": 1.0}, rows=3, seconds=0.5)
    meter.add({"loss": 2.0, "other": 4.0}, rows=5, seconds=1.5)
    assert meter.averages() == {"loss": 1.5, "other": 2.0, "rows_per_second": 4.0}
    assert meter == Meter({"loss": 3.0, "other": 4.0}, steps=2, rows=8, seconds=2.0)


def test_a_batch_comes_with_the_numbers_of_its_rows(rows):
    numbers, batch = WithRowNumbers(lambda table: table["input_ids"].to_pylist())(rows.with_format("arrow")[3:5])
    assert numbers.tolist() == [3, 4]
    assert batch == rows["input_ids"][3:5]


def test_a_collator_of_another_model_is_refused_before_anything_begins(ctr_folder, click_rows):
    model, processor = FlipForCTR.from_pretrained(ctr_folder), FlipProcessor.from_pretrained(ctr_folder)
    rows, collator = processor.encode_dataset(click_rows), FlipPretrainingCollator(processor)
    run = SimpleNamespace(accelerator=None)
    with pytest.raises(ValueError, match="FlipPretrainingCollator makes batches for FlipForPreTraining"):
        train(model, rows, collator, TrainingSettings(), run, None, None, processor)
