"""A stopped and resumed run is the run that was never stopped, bit for bit; no moment to die is a bad one."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from example_runs import EXAMPLES, lines, script
from waiting import PATIENCE, until

from flip_hf import FlipForCTR
from flip_hf.data.encoded_rows import EncodedRows
from flip_hf.data.sampling import LengthGroupedBatchSampler
from flip_hf.runs.run import MEASURED, Run
from flip_hf.training import loop, signals, state
from flip_hf.training.checkpoints import Checkpoints, read_metadata, replace_folder
from flip_hf.training.signals import EXIT_STOPPED, Stopped, StopSignals

# 400 rows, so 13 steps an epoch, 7 with accumulation.
KINDS = {
    "pretrain": ("pretrain", []),
    "finetune": ("finetune", ["--training.oov_dropout", "0.2", "--training.gradient_accumulation_steps", "2"]),
}
COMMON = ["--training.num_train_epochs", "2", "--training.logging_steps", "3", "--training.evaluations_per_epoch", "2"]


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a script and has it told to stop while it takes certain steps; then checks that it did."""

    def run(name, arguments, step):
        real = loop._step

        def and_signal(*args):
            if args[-1] == step:
                # To this thread: one that is sent to the process may reach another thread first, and come later.
                signal.raise_signal(signal.SIGTERM)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_step", and_signal)
            with pytest.raises(Stopped) as stopped:
                script(name)(arguments)
        assert stopped.value.code == EXIT_STOPPED == 75

    return run


def arguments_of(workplace, kind, folder, *more):
    name, flags = KINDS[kind]
    return name, ["--config", str(workplace / "config.yaml"), "--output_dir", str(folder), *COMMON, *flags, *more]


def without_wall_clock(line):
    return {name: value for name, value in line.items() if name not in MEASURED}


def log_of(folder):
    return [without_wall_clock(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder):
    """What decides how a checkpoint goes on: every file but the one that holds times, and of that the rest."""
    progress = read_metadata(folder)["progress"]
    progress["meter"] = without_wall_clock(progress["meter"])
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "state.json"}
    return {**files, "progress": without_wall_clock(progress)}


@pytest.fixture(scope="module")
def never_stopped(workplace, tmp_path_factory):
    """A run of each script that was never stopped, by its name, with the checkpoint of its last step."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "clear", lambda self: None)
        for kind in KINDS:
            folders[kind] = tmp_path_factory.mktemp(kind)
            last = "26" if kind == "pretrain" else "14"
            name, arguments = arguments_of(workplace, kind, folders[kind], "--training.save_steps", last)
            script(name)(arguments)
    return folders


@pytest.mark.parametrize("workers", [(0, 0, 0), (2, 2, 2), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    workplace, tmp_path, monkeypatch, interrupted, never_stopped, kind, workers
):
    # In the middle of an epoch, twice; after its last step, whose evaluation is then still to come; and in the next.
    stops, last = {"pretrain": ([2, 5, 13, 20], 26), "finetune": ([1, 3, 7, 12], 14)}[kind]
    for i, step in enumerate(stops):
        flags = ["--training.dataloader_num_workers", str(workers[i % 3]), "--training.save_steps", str(last)]
        interrupted(*arguments_of(workplace, kind, tmp_path, "--resume", "true", *flags), step)
        assert Checkpoints(tmp_path / "checkpoints", 2).last().name == f"step-{step}"
    monkeypatch.setattr(Checkpoints, "clear", lambda self: None)
    name, arguments = arguments_of(workplace, kind, tmp_path, "--resume", "true", *flags)
    script(name)(arguments)

    expected = never_stopped[kind]
    found, wanted = (contents(folder / "checkpoints" / f"step-{last}") for folder in (tmp_path, expected))
    assert {"model.safetensors", "optimizer.safetensors", "random.safetensors", "rates.json"} < set(found)
    for part, value in wanted.items():
        assert found[part] == value, part
    weights = Path("model") / "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (expected / weights).read_bytes()
    assert log_of(tmp_path) == log_of(expected)
    records = [json.loads((folder / "run.json").read_text()) for folder in (tmp_path, expected)]
    assert without_wall_clock(records[0]["result"]) == without_wall_clock(records[1]["result"])
    assert [record["resumed_at"] for record in records] == [stops, []]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_read_once_in_a_resumed_epoch(workplace, tmp_path, monkeypatch, interrupted, kind):
    rows, loaded = {}, []
    real, load = loop._step, EncodedRows.__getitems__

    def step(model, optimizer, window, settings, run, number):
        rows[number] = torch.cat([numbers for numbers, _ in window]).tolist()
        return real(model, optimizer, window, settings, run, number)

    def getitems(self, numbers):
        loaded.extend(numbers)
        return load(self, numbers)

    monkeypatch.setattr(loop, "_step", step)
    for stop in (2, 5):
        interrupted(*arguments_of(workplace, kind, tmp_path, "--resume", "true"), stop)
    monkeypatch.setattr(EncodedRows, "__getitems__", getitems)
    name, arguments = arguments_of(workplace, kind, tmp_path, "--resume", "true", "--training.num_train_epochs", "2")
    interrupted(name, arguments, 6)
    in_epoch = 13 if kind == "pretrain" else 7
    # Rows that earlier runs have read are not loaded again.
    assert sorted(loaded) == sorted(rows[6])
    script(name)(arguments)
    for first in (1, 1 + in_epoch):
        assert sorted(chain.from_iterable(rows[number] for number in range(first, first + in_epoch))) == list(
            range(400)
        )


def test_the_batch_order_can_begin_anywhere():
    sampler = LengthGroupedBatchSampler(np.arange(1000) % 7, 16, seed=3)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, 50)
    assert list(sampler) == whole[50:]
    sampler.set_epoch(4)
    assert list(sampler) == whole


def test_random_numbers_go_on_where_they_were():
    def draw():
        return [random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist(), random.random()]

    cpu = torch.device("cpu")
    for earlier in range(3):
        # Both generators make normal numbers in pairs, and keep the second one.
        random.gauss(0, 1)
        np.random.standard_normal(earlier)
        states = state.random_states(cpu)
        expected = [draw(), draw()]
        draw()
        state.restore_random_states(states, cpu)
        assert [draw(), draw()] == expected


def test_gradients_of_repeated_rows_do_not_depend_on_threads():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(4)
        state.seed_everything(0, torch.device("cpu"))
        ids, weights = torch.randint(0, 30, (300, 64)), torch.randn(300, 64, 32)

        def gradient():
            table = torch.zeros(1000, 32, requires_grad=True)
            (table[ids] * weights).sum().backward()
            return table.grad

        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--training.learning_rate", "0.02"], r"training\.learning_rate was 0\.01 and is 0\.02"),
        (["--model.options", '{"embedding_dim": 4}'], r"model\.options\.embedding_dim was 8 and is 4"),
        (["--data.train_file", "OTHER"], r"fingerprints\.train was '\w+' and is '\w+'"),
        (["--data.validation_file", "OTHER"], r"fingerprints\.validation was"),
        (["--training.precision", "bf16"], r"device\.precision was 'no' and is 'bf16'"),
    ],
)
def test_what_is_not_as_it_was_is_refused(workplace, tmp_path, interrupted, change, message):
    folder = tmp_path / "run"
    fixed = ["--training.precision", "fp32", "--mode", "id"]
    name, arguments = arguments_of(workplace, "finetune", folder, *fixed)
    interrupted(name, arguments, 3)
    before = contents(folder / "checkpoints" / "step-3"), (folder / "log.jsonl").read_bytes()
    table = pq.read_table(workplace / "train.parquet")
    pq.write_table(table.set_column(0, "user_id", pa.array(range(len(table)))), tmp_path / "other.parquet")
    change = [str(tmp_path / "other.parquet") if part == "OTHER" else part for part in change]
    with pytest.raises(ValueError, match=rf"step-3 can't be resumed with different settings or data: .*{message}"):
        script(name)([*arguments, "--resume", "true", *change])
    assert (contents(folder / "checkpoints" / "step-3"), (folder / "log.jsonl").read_bytes()) == before
    # The same rows in another place, or under another name, are the same data.
    shutil.copy(workplace / "train.parquet", tmp_path / "moved.parquet")
    moved = ["--data.train_file", str(tmp_path / "moved.parquet"), "--data.name", "films"]
    script(name)([*arguments, "--resume", "true", *moved])
    data = json.loads((folder / "run.json").read_text())["data"]
    assert (data["name"], data["files"]) == ("films", ["moved.parquet", "validation.parquet", "test.parquet"])


def test_a_resumed_run_may_group_its_rows(workplace, tmp_path, interrupted):
    results, models = [], []
    for kind in ("whole", "stopped"):
        folder = tmp_path / kind
        name, arguments = arguments_of(workplace, "finetune", folder, "--mode", "id", "--training.max_steps", "4")
        if kind == "stopped":
            interrupted(name, arguments, 2)
            arguments += ["--resume", "true", "--data.group_field", "user_id"]
        script(name)(arguments)
        results.append(json.loads((folder / "run.json").read_text())["result"])
        models.append((folder / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    whole, stopped = (result["test"] for result in results)
    assert stopped == whole | {"gauc": stopped["gauc"], "uauc": stopped["uauc"]}
    assert "gauc" not in whole


def test_a_run_that_died_after_its_fusion_was_fitted_fits_it_anew(workplace, tmp_path, monkeypatch):
    flags = ["--mode", "joint", "--fusion_rows", "validation", "--training.max_steps", "4"]
    runs = {}
    for kind in ("whole", "died"):
        name, arguments = arguments_of(workplace, "finetune", tmp_path / kind, "--resume", "true", *flags)
        if kind == "died":
            with monkeypatch.context() as patch:
                patch.setattr(Run, "save_scores", Mock(side_effect=MemoryError))
                with pytest.raises(MemoryError):
                    script(name)(arguments)
            assert not (tmp_path / kind / "run.json").exists()
        script(name)(arguments)
        result = json.loads((tmp_path / kind / "run.json").read_text())["result"]
        model = (tmp_path / kind / "model" / "model.safetensors").read_bytes()
        runs[kind] = {**result, "rows_per_second": None, "test_rows_per_second": None}, model
    assert runs["died"] == runs["whole"]


def test_a_resumed_run_keeps_the_goal_of_validation_rows_of_one_class(workplace, tmp_path, interrupted):
    table = pq.read_table(workplace / "validation.parquet")
    place = table.column_names.index("clicked")
    pq.write_table(table.set_column(place, "clicked", pa.array([1] * len(table))), tmp_path / "validation.parquet")
    flags = ["--mode", "id", "--data.validation_file", str(tmp_path / "validation.parquet")]
    records = []
    for kind in ("whole", "stopped"):
        name, arguments = arguments_of(workplace, "finetune", tmp_path / kind, "--resume", "true", *flags)
        if kind == "stopped":
            for step in (5, 9):
                interrupted(name, arguments, step)
        script(name)(arguments)
        records.append(json.loads((tmp_path / kind / "run.json").read_text()))
    whole, stopped = records
    assert whole["goal"] == stopped["goal"] == {"metric": "logloss", "larger_is_better": False}
    assert without_wall_clock(stopped["result"]) == without_wall_clock(whole["result"])
    losses = {line["step"]: line["logloss"] for line in lines(tmp_path / "stopped", "validation")}
    assert stopped["result"]["best_step"] == min(losses, key=losses.get)
    assert stopped["result"]["validation"]["auc"] is None


def test_another_vocabulary_and_number_of_processes_are_refused(workplace, tmp_path, interrupted):
    table = pq.read_table(workplace / "train.parquet")
    for i, rows in enumerate((table, table.slice(0, 390))):
        pq.write_table(rows, tmp_path / "train.parquet")
        name, arguments = arguments_of(workplace, "pretrain", tmp_path / f"pretrained-{i}", "--training.max_steps", "1")
        script(name)([*arguments, "--data.train_file", str(tmp_path / "train.parquet")])
    pretrained, folder = tmp_path / "pretrained-0" / "model", tmp_path / "run"
    name, arguments = arguments_of(workplace, "finetune", folder, "--pretrained", str(pretrained))
    interrupted(name, arguments, 2)
    shutil.copytree(tmp_path / "pretrained-1" / "model", pretrained, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"processor was '\w{64}' and is '\w{64}'"):
        script(name)([*arguments, "--resume", "true"])

    file = folder / "checkpoints" / "step-2" / "state.json"
    facts = json.loads(file.read_text())
    facts["identity"]["device.processes"] = 2
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"device\.processes was 2 and is 1"):
        script(name)([*arguments, "--resume", "true"])


def test_checkpoints_are_not_overwritten_by_a_run_that_does_not_resume(workplace, tmp_path, interrupted):
    name, arguments = arguments_of(workplace, "finetune", tmp_path, "--mode", "id")
    interrupted(name, arguments, 3)
    before = contents(tmp_path / "checkpoints" / "step-3")
    with pytest.raises(
        FileExistsError,
        match=r"holds an unfinished run with the last checkpoint step-3\. Continue it with --resume true",
    ):
        script(name)(arguments)
    assert contents(tmp_path / "checkpoints" / "step-3") == before


def test_a_signal_in_the_last_evaluation_stops_the_run_before_test_rows_are_read(workplace, tmp_path, monkeypatch):
    name, arguments = arguments_of(workplace, "finetune", tmp_path, "--mode", "id", "--training.max_steps", "4")

    def told(self, accelerator):
        return len(lines(tmp_path, "validation")) > 0

    with monkeypatch.context() as patched:
        patched.setattr(StopSignals, "any", told)
        with pytest.raises(Stopped):
            script(name)(arguments)
    assert Checkpoints(tmp_path / "checkpoints", 2).last().name == "step-4"
    assert lines(tmp_path, "test") == []
    script(name)([*arguments, "--resume", "true"])
    assert [line["step"] for line in lines(tmp_path, "validation")] == [4]
    assert len(lines(tmp_path, "test")) == 1


def test_a_best_model_that_is_gone_is_missed(workplace, tmp_path, interrupted):
    flags = ["--mode", "id", "--training.evaluations_per_epoch", "2"]
    name, arguments = arguments_of(workplace, "finetune", tmp_path, *flags)
    interrupted(name, arguments, 9)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="the best model so far, is missing"):
        script(name)([*arguments, "--resume", "true"])


def test_a_sharded_run_is_not_resumed(workplace, tmp_path):
    name, arguments = arguments_of(workplace, "finetune", tmp_path / "run", "--training.shard_features", "true")
    with pytest.raises(ValueError, match="sharded over processes saves no checkpoints"):
        script(name)([*arguments, "--resume", "true"])
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_ended_is_left_alone(workplace, tmp_path, monkeypatch, caplog):
    name, arguments = arguments_of(workplace, "finetune", tmp_path, "--mode", "id", "--resume", "true")
    script(name)(arguments)  # there is nothing to resume: it starts
    assert len(lines(tmp_path, "test")) == 1
    assert not (tmp_path / "checkpoints").exists()

    def everything():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}

    before = everything()
    monkeypatch.setattr(loop, "_step", None)
    with caplog.at_level(logging.INFO):
        script(name)(arguments)
    assert f"{tmp_path}: this run has finished already, so there is nothing to resume" in caplog.messages
    assert everything() == before
    with pytest.raises(ValueError, match=r"run\.json can't be resumed.*training\.num_train_epochs was 2 and is 3"):
        script(name)([*arguments, "--training.num_train_epochs", "3"])
    assert everything() == before


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(workplace, tmp_path, monkeypatch):
    real = FlipForCTR.forward
    calls = []

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        calls.extend([1] if self.training else [])
        if len(calls) == 10:
            output.loss = output.loss * float("nan")
        return output

    name, arguments = arguments_of(
        workplace, "finetune", tmp_path, "--mode", "id", "--training.gradient_accumulation_steps", "1"
    )
    arguments += ["--training.save_steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(FlipForCTR, "forward", forward)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 10"):
            script(name)(arguments)
    assert Checkpoints(tmp_path / "checkpoints", 2).last().name == "step-8"
    script(name)([*arguments, "--resume", "true"])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["resumed_at"] == [8]
    assert record["result"]["steps"] == 26


@pytest.mark.parametrize("damage", ["truncated", "missing", "no state.json", "half-written state.json"])
def test_a_checkpoint_that_is_not_complete_is_left_out(workplace, tmp_path, interrupted, never_stopped, caplog, damage):
    name, arguments = arguments_of(workplace, "pretrain", tmp_path, "--resume", "true")
    for step in (4, 9):
        interrupted(name, arguments, step)
    newest = tmp_path / "checkpoints" / "step-9"
    if damage == "truncated":
        os.truncate(newest / "optimizer.safetensors", 1000)
    elif damage == "missing":
        (newest / "random.safetensors").unlink()
    elif damage == "no state.json":
        (newest / "state.json").unlink()
    else:
        os.truncate(newest / "state.json", 100)
    script(name)(arguments)
    assert f"{newest} is incomplete and is ignored" in caplog.messages
    assert json.loads((tmp_path / "run.json").read_text())["resumed_at"] == [4]
    weights = Path("model") / "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (never_stopped["pretrain"] / weights).read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint(workplace, tmp_path, monkeypatch, never_stopped):
    name, arguments = arguments_of(workplace, "pretrain", tmp_path, "--training.save_steps", "5")
    real = state.save_file

    def save_file(tensors, path):
        if "step-15" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", save_file)
        with pytest.raises(OSError, match=r"step-15 could not be written \(.*No space left"):
            script(name)(arguments)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-5"]
    script(name)([*arguments, "--resume", "true"])
    assert log_of(tmp_path) == log_of(never_stopped["pretrain"])


def test_checkpoints_and_folders_survive_a_death_at_any_moment(tmp_path, monkeypatch):
    class Death(BaseException):
        pass

    def save(checkpoints, model, step):
        checkpoints.save(step, lambda folder: (folder / "weights").write_text(str(step) * 100), {"step": step})
        replace_folder(model, lambda folder: (folder / "weights").write_text(str(step) * 100))

    def dying(real, countdown):
        def call(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Death
            return real(*args, **kwargs)

        return call

    moments = 0
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        checkpoints, model = Checkpoints(folder / "checkpoints", 1), folder / "model"
        for step in (1, 2):
            save(checkpoints, model, step)
        countdown = [moment]
        with monkeypatch.context() as patch:
            # What changes a disk, and what a deletion is made of.
            for owner, names in ((Path, ["rename", "mkdir", "write_text"]), (os, ["fsync", "unlink", "rmdir"])):
                for name in names:
                    patch.setattr(owner, name, dying(getattr(owner, name), countdown))
            try:
                save(checkpoints, model, 3)
            except Death:
                moments += 1
            else:
                break
        last = checkpoints.last()
        assert read_metadata(last)["step"] in (2, 3)
        assert (last / "weights").read_text() in ("2" * 100, "3" * 100)
        for again in (4, 5):
            save(checkpoints, model, again)
            assert (model / "weights").read_text() == str(again) * 100
            assert [path.name for path in checkpoints.folder.iterdir()] == [f"step-{again}"]
            assert {path.name for path in folder.iterdir()} == {"checkpoints", "model"}
    assert moments > 15


def test_a_best_model_whose_replacement_died_is_there_again(workplace, tmp_path, monkeypatch, interrupted):
    name, arguments = arguments_of(workplace, "finetune", tmp_path, "--mode", "id")
    interrupted(name, arguments, 5)
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "model").rename(tmp_path / "model.new")
    (tmp_path / "model.old").mkdir()
    interrupted(name, [*arguments, "--resume", "true"], 6)
    assert weights.read_bytes() == before
    assert not list(tmp_path.glob("model.*"))


def test_a_second_interrupt_is_an_interrupt(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])
    handlers, passed_on = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []
    with pytest.raises(KeyboardInterrupt), StopSignals():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        # What a launcher passes on of the same Ctrl-C.
        now[0] += 1.0
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.1
        signal.raise_signal(signal.SIGTERM)
        passed_on.append(True)
        signal.raise_signal(signal.SIGINT)
    assert passed_on
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    entered = []
    thread = threading.Thread(target=lambda: entered.append(StopSignals().__enter__()))
    thread.start()
    thread.join()
    assert len(entered) == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_program_ignores_does_not_stop_training(ignored):
    other = signal.SIGTERM if ignored == signal.SIGINT else signal.SIGINT
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(ignored)
            assert not signals.any(Accelerator(cpu=True))
            signal.raise_signal(other)
            assert signals.any(Accelerator(cpu=True))
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_a_signal_to_all_processes_stops_a_run_with_workers(workplace, tmp_path):
    name, arguments = arguments_of(
        workplace, "finetune", tmp_path, "--mode", "id", "--training.dataloader_num_workers", "2"
    )
    endless = ["--training.num_train_epochs", "100000", "--training.logging_steps", "1"]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, *endless]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log.jsonl"
    until(lambda: process.poll() is not None or (log.exists() and log.stat().st_size))
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, errors
    step = lines(tmp_path, "train")[-1]["step"]
    assert Checkpoints(tmp_path / "checkpoints", 2).last().name == f"step-{step}"
    assert f"stopped after step {step} and saved a checkpoint" in errors


TWO_PROCESSES = """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from flip_hf.training import loop
    from example_runs import script

    name, stop_at, rows_file, *arguments = sys.argv[1:]
    real = loop._step

    def step(model, optimizer, window, settings, run, number):
        assert run.accelerator.num_processes == 2
        rank = run.accelerator.process_index
        with open(f"{rows_file}-{rank}", "a") as file:
            rows = torch.cat([numbers for numbers, _ in window]).tolist()
            file.write(json.dumps({"step": number, "rows": rows}) + "\\n")
        # One of the two is told; both must stop, at the same step.
        if rank == 1 and number == int(stop_at):
            signal.raise_signal(signal.SIGTERM)
        return real(model, optimizer, window, settings, run, number)

    loop._step = step
    try:
        script(name)(arguments)
    except SystemExit as stopped:
        print("exit code", stopped.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_stop_and_resume_together(workplace, tmp_path, kind, workers):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(TWO_PROCESSES))
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]

    def run(folder, stop_at):
        # 7 steps an epoch, 4 with accumulation.
        flags = ["--resume", "true", "--training.dataloader_num_workers", workers, "--training.precision", "fp32"]
        name, arguments = arguments_of(workplace, kind, folder, *flags)
        command = [*launch, name, str(stop_at), str(folder) + "-rows", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.count("exit code 75")

    assert run(tmp_path / "straight", 0) == 0
    assert [run(tmp_path / "stopped", stop) for stop in (2, 3, 0)] == [2, 2, 0]
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["resumed_at"] == [2, 3]
    weights = Path("model") / "model.safetensors"
    assert (tmp_path / "stopped" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "straight")

    read = [
        json.loads(line) for rank in (0, 1) for line in (tmp_path / f"stopped-rows-{rank}").read_text().splitlines()
    ]
    in_epoch = 7 if kind == "pretrain" else 4
    for first in (1, 1 + in_epoch):
        rows = (line["rows"] for line in read if first <= line["step"] < first + in_epoch)
        assert sorted(chain.from_iterable(rows)) == list(range(400))
