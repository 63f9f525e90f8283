"""Gradients of one global batch, shared out unevenly, against those of a single process that holds all of it."""

from accelerate import Accelerator
from common import ARGUMENTS, build, check_processes, collator_of, difference, load_log, num_processes, rank, report
from torch.nn.parallel import DistributedDataParallel

from flip_hf import FlipForCTR, FlipForPreTraining

SHARES = {1: [12], 2: [7, 5], 4: [4, 1, 2, 5]}[ARGUMENTS["processes"]]
CASES = {
    "icl": (FlipForPreTraining, {"objectives": {"icl": 1.0}}),
    "pretraining": (FlipForPreTraining, {}),
    "ctr": (FlipForCTR, {}),
}

processor, rows = load_log()
batches, models, numbers, expected = {}, {}, {}, {}
for case, (cls, settings) in CASES.items():
    model = build(cls, processor, **settings)
    batches[case] = collator_of(cls, processor)([rows[i] for i in range(12)])
    numbers[case] = {name: number.float() for name, number in model.num_items(batches[case]).items()}
    model(**batches[case], num_items_in_batch=numbers[case]).loss.backward()
    expected[case] = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    models[case] = model

accelerator = Accelerator(cpu=True)
check_processes()
first, size = sum(SHARES[: rank()]), SHARES[rank()]
found = {}
for case, model in models.items():
    prepared = accelerator.prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    # Padded as the whole batch is; what each process adds is averaged over processes.
    share = {name: values[first : first + size] for name, values in batches[case].items()}
    own_numbers = {name: number / num_processes() for name, number in numbers[case].items()}
    prepared(**share, num_items_in_batch=own_numbers).loss.backward()
    found[case] = difference([p.grad for p in model.parameters()], expected[case])
report(found)
