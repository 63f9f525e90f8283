"""A window of batches contrasted as one: losses and gradients are those of the one batch that holds all the rows."""

import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from flip_hf import FieldConfig, FlipConfig, FlipForPreTraining
from flip_hf.training.gradient_cache import contrast_over_window
from flip_hf.training.loop import count_items

NUM_ROWS = 24


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    """What accelerate keeps for the life of a process ends with each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(dropout=0.0, **options):
    torch.manual_seed(0)
    text = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    options = {"backbone_options": {"hidden_sizes": [16], "dropout": dropout}, **options}
    fields = [FieldConfig("user", num_features=12), FieldConfig("item", num_features=9)]
    sizes = {"embedding_dim": 8, "projection_dim": 16, "mtm_loss": "full_softmax", "contrastive_temperature": 1.0}
    return FlipForPreTraining(FlipConfig(text_config=text, fields=fields, **sizes, **options))


def make_batch():
    """24 rows of which rows 1 and 20 have the same features; masked counts differ from row to row."""
    random = torch.Generator().manual_seed(1)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    feature_ids = torch.stack([draw(2, 14, NUM_ROWS), draw(14, 23, NUM_ROWS)], dim=1)
    feature_ids[20] = feature_ids[1]
    input_ids = draw(5, 50, NUM_ROWS, 7)
    hidden = torch.rand(NUM_ROWS, 7, generator=random) < 0.3
    in_table = torch.rand(NUM_ROWS, 2, generator=random) < 0.5
    return {
        "feature_ids": feature_ids,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "masked_feature_ids": feature_ids.masked_fill(in_table, 1),
        "mtm_labels": feature_ids.masked_fill(~in_table, -100),
        "masked_input_ids": input_ids.masked_fill(hidden, 4),
        "mlm_labels": input_ids.masked_fill(~hidden, -100),
    }


def cut(batch, sizes):
    return [
        dict(zip(batch, parts, strict=True)) for parts in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("sizes", [[24], [12, 12], [8, 8, 8], [11, 1, 5, 7]])
@pytest.mark.parametrize("weights", [{"icl": 1.0}, {"mlm": 0.5, "mtm": 1.0, "icl": 1.5}])
def test_gradients_are_those_of_the_big_batch(sizes, weights):
    model, batch, accelerator = build(objectives=weights), make_batch(), Accelerator(cpu=True)
    whole = model(**batch)
    whole.loss.backward()
    expected = gradients(model)
    # Were the two rows with the same features each other's negatives, the loss would be another.
    apart = dict(batch, feature_ids=batch["feature_ids"].clone())
    apart["feature_ids"][20, 0] = 2 if batch["feature_ids"][20, 0] != 2 else 3
    views = model.contrastive_views(batch["feature_ids"], batch["input_ids"], batch["attention_mask"])
    icl = model.objectives["icl"]
    assert (icl.contrast(*views, apart["feature_ids"]).loss_sum - whole.icl_loss * NUM_ROWS).abs() > 1e-3

    model.zero_grad()
    parts = cut(batch, sizes)
    totals = count_items(model, parts, accelerator)
    losses, accuracies = [], set()
    for forward, part in zip(contrast_over_window(model, parts, accelerator), parts, strict=True):
        output = forward(**part, num_items_in_batch=totals)
        output.loss.backward()
        losses.append([output.loss.item(), output.icl_loss.item()])
        accuracies.add(output.metrics["icl_tabular_to_text_accuracy"].item())
    assert torch.tensor(losses).sum(dim=0).tolist() == pytest.approx([whole.loss.item(), whole.icl_loss.item()])
    assert accuracies == {whole.metrics["icl_tabular_to_text_accuracy"].item()}
    found = gradients(model)
    assert max(value.abs().max() for value in expected.values()) > 0.1
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_without_the_cache_they_are_not():
    model, batch, accelerator = build(objectives={"icl": 1.0}), make_batch(), Accelerator(cpu=True)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    parts = cut(batch, [8, 8, 8])
    totals = count_items(model, parts, accelerator)
    for part in parts:
        model(**part, num_items_in_batch=totals).loss.backward()
    assert max((value - expected[name]).abs().max() for name, value in gradients(model).items()) > 0.01


def test_both_passes_drop_alike():
    model, batch, accelerator = build(dropout=0.3, objectives={"icl": 1.0}), make_batch(), Accelerator(cpu=True)
    parts = cut(batch, [9, 8, 7])
    views = [part[name] for part in parts for name in ("feature_ids", "input_ids", "attention_mask")]

    def with_all_graphs(seed):
        """The graphs of all batches held at once, each drawn from the seed that the cache draws for it."""
        torch.manual_seed(seed)
        encoded = []
        for i, own in enumerate(torch.randint(2**63 - 1, (3,)).tolist()):
            torch.manual_seed(own)
            encoded.append(model.contrastive_views(*views[3 * i : 3 * i + 3]))
        output = model.objectives["icl"].contrast(*map(torch.cat, zip(*encoded, strict=True)), batch["feature_ids"])
        model.zero_grad()
        (output.loss_sum / NUM_ROWS).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, other = with_all_graphs(5), with_all_graphs(6)
    assert max((value - other[name]).abs().max() for name, value in expected.items()) > 0.01, "dropout is at work"
    model.zero_grad()
    torch.manual_seed(5)
    for forward, part in zip(contrast_over_window(model, parts, accelerator), parts, strict=True):
        forward(**part, num_items_in_batch={"icl": torch.tensor(NUM_ROWS)}).loss.backward()
    for name, value in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, value, rtol=0, atol=1e-6)
    after = torch.rand(3)
    torch.manual_seed(5)
    torch.randint(2**63 - 1, (3,))
    assert torch.equal(after, torch.rand(3)), "what the batches draw, others do not miss"


def test_running_statistics_count_a_batch_once():
    options = {"hidden_sizes": [16]}
    model = build(objectives={"icl": 1.0}, backbone="afn", backbone_options=options)
    parts, accelerator = cut(make_batch(), [12, 12]), Accelerator(cpu=True)
    start = {name: value.clone() for name, value in model.named_buffers()}
    model(**parts[0])
    model(**parts[1])
    expected = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    assert expected
    assert any((value - start[name]).abs().max() > 0.01 for name, value in expected.items())
    model.load_state_dict(start, strict=False)
    for forward, part in zip(contrast_over_window(model, parts, accelerator), parts, strict=True):
        forward(**part)
    found = dict(model.named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)} == {0.1}


PROGRAM = """
    import gc
    import importlib.util
    import json
    import sys

    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from flip_hf.training import loop
    from flip_hf.runs.device import leave_process_group
    from flip_hf.training.settings import TrainingSettings

    spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    SIZES = [[6, 5, 4], [3, 3, 3]]  # the processes need not hold equally many rows

    model = cases.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**cases.make_batch()).loss.backward()  # one process that holds all rows
    expected = cases.gradients(model)
    model.zero_grad()

    class NoRun:
        accelerator = Accelerator(cpu=True)

    assert NoRun.accelerator.num_processes == dist.get_world_size() == 2
    rank = dist.get_rank()
    parts = cases.cut(cases.make_batch(), sum(SIZES, []))[3 * rank : 3 * rank + 3]
    wrapped = NoRun.accelerator.prepare(model)
    reductions = []

    def counting(state, bucket):
        reductions.append(bucket.buffer().numel())
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, counting)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings = TrainingSettings(max_grad_norm=float("inf"), contrastive_batches="window")
    window = [(torch.zeros(len(part["feature_ids"])), part) for part in parts]
    values = loop._step(wrapped, optimizer, window, settings, NoRun(), 1)
    differences = {
        name: (before[name] - p.detach() - expected[name]).abs().max().item() for name, p in model.named_parameters()
    }
    reduced_once = sum(reductions) == sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(json.dumps({"differences": differences, "reduced_once": reduced_once, "values": values}))
    # What holds the process group goes before the group does.
    del wrapped, optimizer, model
    gc.collect()
    leave_process_group()
"""


SHARDED = """
    import gc
    import importlib.util
    import sys

    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from flip_hf.training.gradient_cache import contrast_over_window
    from flip_hf.training.loop import count_items
    from flip_hf.runs.device import leave_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)

    model = cases.build()
    model(**cases.make_batch()).loss.backward()  # one process that holds all rows
    expected = cases.gradients(model)
    model.zero_grad()

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size() == 2
    mesh = init_device_mesh("cpu", (2,))
    for part in [*model.flip.text_model.encoder.layer, model]:
        fully_shard(part, mesh=mesh)
    rank = dist.get_rank()
    parts = cases.cut(cases.make_batch(), [6, 5, 4, 3, 3, 3])[3 * rank : 3 * rank + 3]
    num_items = {name: total / 2 for name, total in count_items(model, parts, accelerator).items()}
    for _ in range(2):  # a second step finds the model as the first one left it
        model.zero_grad()
        for forward, part in zip(contrast_over_window(model, parts, accelerator), parts):
            forward(**part, num_items_in_batch=num_items).loss.backward()
        for name, p in model.named_parameters():
            difference = (p.grad.full_tensor() - expected[name]).abs().max()
            assert difference < 1e-6, (name, difference)
    # What holds the process group goes before the group does.
    del model, mesh, forward, part, p
    gc.collect()
    leave_process_group()
"""


def run_on_two_processes(program, folder):
    file = folder / "program.py"
    file.write_text(textwrap.dedent(program))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    done = subprocess.run([*launch, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_contrast_with_sharded_parameters(tmp_path):
    run_on_two_processes(SHARDED, tmp_path)


def test_two_processes_contrast_the_rows_of_all_their_windows(tmp_path):
    result = json.loads(run_on_two_processes(PROGRAM, tmp_path).splitlines()[-1])
    # A weight near 1 is known to 1e-7.
    assert max(result["differences"].values()) < 1e-6, result["differences"]
    assert result["reduced_once"]
    with torch.no_grad():
        whole = build()(**make_batch())
    for name in ("loss", "mlm_loss", "mtm_loss", "icl_loss"):
        assert result["values"][name] == pytest.approx(whole[name].item(), abs=1e-5), name


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_batch(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks" / "contrastive_memory.py"
    sizes = ["--rows", "8", "16", "--batch_size", "4", "--layers", "1", "--tokens", "8"]
    done = subprocess.run([sys.executable, str(program), *sizes], check=True, capture_output=True, text=True)
    table = [line for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [line.split(" | ")[0] for line in table] == ["| 8", "| 16"]
    losses = [float(loss) for line in table for loss in re.findall(r"\d+\.\d{3}\b", line)]
    # Nothing is aligned: about the logarithm of the rows, with either way of holding them.
    assert losses == pytest.approx([math.log(8)] * 2 + [math.log(16)] * 2, abs=0.7)
