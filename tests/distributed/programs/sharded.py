"""A feature table spread over the processes against one that is whole: start, lookups, gradients, checkpoints."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from common import (
    ARGUMENTS,
    build,
    check_processes,
    collator_of,
    difference,
    load_log,
    num_processes,
    rank,
    report,
    train_in,
)

from flip_hf import FieldConfig, FlipConfig, FlipForCTR, FlipForPreTraining
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.training.settings import TrainingSettings


def message(function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except ValueError as error:
        return str(error)
    return None


processor, rows = load_log()
# So many negatives that every field is scored exactly: nothing is drawn.
settings = {"mtm_loss": "nce", "mtm_num_negatives": 500, "backbone": "deepfm"}
wholes, batches, numbers = {}, {}, {}
for cls in (FlipForPreTraining, FlipForCTR):
    wholes[cls] = build(cls, processor, torch.float64, **settings)
    batches[cls] = collator_of(cls, processor)([rows[i] for i in range(12)])
    numbers[cls] = {name: number.float() for name, number in wholes[cls].num_items(batches[cls]).items()}
    wholes[cls](**batches[cls], num_items_in_batch=numbers[cls]).loss.backward()

accelerator = Accelerator(cpu=True)
check_processes()
share = slice(rank(), 12, num_processes())
found = {}
for cls, whole in wholes.items():
    with sharded_features():
        model = build(cls, processor, torch.float64, **settings)
    table, full = model.flip.feature_embeddings, whole.flip.feature_embeddings.weight
    first, end = table.bounds(rank())
    assert table.rows.shape == (end - first, full.shape[1])
    assert (end - first) * num_processes() < len(full) + num_processes()
    torch.testing.assert_close(table.rows, full[first:end], rtol=0, atol=0)

    own_batch = {name: values[share] for name, values in batches[cls].items()}
    looked_up = table(own_batch["feature_ids"])
    torch.testing.assert_close(looked_up, full[own_batch["feature_ids"]], rtol=0, atol=0)

    expected = {name: p.grad for name, p in whole.named_parameters() if "feature_embeddings" not in name}
    prepared = accelerator.prepare(model)
    own_numbers = {name: number / num_processes() for name, number in numbers[cls].items()}
    prepared(**own_batch, num_items_in_batch=own_numbers).loss.backward()
    others = [model.get_parameter(name).grad for name in expected]
    own_rows = difference([table.rows.grad], [full.grad[first:end]])
    assert not table.rows.grad[0].any() or first > 0
    found[cls.__name__] = [own_rows, difference(others, list(expected.values()))]

    folder = Path(ARGUMENTS["report"]).parent / cls.__name__
    model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    alone = cls.from_pretrained(folder)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[name], value, rtol=0, atol=0)
    with sharded_features():
        again = FlipForCTR.from_pretrained(folder)
    torch.testing.assert_close(again.flip.feature_embeddings.rows, full[first:end], rtol=0, atol=0)

# So few rows that the last of four processes has none, and nothing to send.
with sharded_features():
    tiny = FlipForCTR(FlipConfig(fields=[FieldConfig("a", num_features=3)], mode="id", backbone="lr"))
assert (len(tiny.flip.feature_embeddings.rows) == 0) == (rank() == 3)
accelerator.prepare(tiny)(feature_ids=torch.tensor([[3], [4]]), labels=torch.ones(2)).loss.backward()
tiny.save_pretrained(folder / "tiny")
accelerator.wait_for_everyone()
assert FlipForCTR.from_pretrained(folder / "tiny").flip.feature_embeddings.weight.shape == (5, 33)

Accelerator.distributed_type = DistributedType.FSDP
with sharded_features():
    found["errors"] = [
        message(train_in, folder / "run", model, rows, TrainingSettings(precision="fp32"), processor),
        message(build, FlipForPreTraining, processor, mtm_loss="full_softmax"),
        message(model.save_pretrained, folder, push_to_hub=True),
        message(model.resize_feature_embeddings, processor.extend({name: ["new"] for name in ARGUMENTS["fields"]})),
    ]
    config = again.config
    config.fields = [*config.fields[:-1], type(config.fields[-1])("genre", num_features=99)]
    found["errors"].append(message(FlipForCTR.from_pretrained, folder, config=config))
report(found)
