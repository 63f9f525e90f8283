"""Evaluation of 37 rows, which no number of processes here divides, against one pass over all of them."""

import numpy as np
import torch
from accelerate import Accelerator
from common import ARGUMENTS, build, check_processes, collator_of, load_log, report
from torch.nn.utils import parameters_to_vector
from transformers import TrainingArguments

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.scoring import click_logits
from flip_hf.training.evaluation import ctr_metrics, evaluate_pretraining
from flip_hf.training.fusion import fit_fusion
from flip_hf.training.trainer import FlipTrainer, click_metrics

GROUPS = np.random.RandomState(0).randint(-1, 6, 37)

accelerator = Accelerator(cpu=True)
check_processes()
processor, rows = load_log()
rows = rows.select(range(37))
everything = [rows[i] for i in range(37)]

model = build(FlipForCTR, processor).eval()
collator = collator_of(FlipForCTR, processor)
batch = collator(everything)
with torch.no_grad():
    output = model(**batch)
expected = {name: output[name].numpy() for name in ("logits", "id_logits", "text_logits")}
expected["labels"] = batch["labels"].numpy()
grouped = rows.add_column("group", GROUPS)
found = click_logits(accelerator.prepare(model), grouped, collator, 5, accelerator, "")
assert {len(values) for values in found.values()} == {37}
assert np.array_equal(found.pop("groups"), GROUPS)
settings = TrainingArguments(
    ARGUMENTS["folder"], per_device_eval_batch_size=5, use_cpu=True, disable_tqdm=True, report_to="none"
)
trainer = FlipTrainer(model, settings, collator, compute_metrics=click_metrics)
of_trainer = trainer.predict(grouped)
assert np.array_equal(of_trainer.label_ids[1], GROUPS)
groups = [
    [of_trainer.metrics[f"test_{name}"] for name in ("gauc", "id_uauc")],
    [ctr_metrics(expected | {"groups": GROUPS})[name] for name in ("gauc", "id_uauc")],
]
assert np.array_equal(found["labels"], expected["labels"])
logits = max(np.abs(found[name] - expected[name]).max() for name in expected)
weights = []
for scores in (found, expected):
    fitted = build(FlipForCTR, processor, fusion="gated")
    fit_fusion(fitted, scores, rows)
    weights.append(parameters_to_vector(fitted.fusion.parameters()).detach())
fusion = [(own - weights[1]).abs().max().item() for own in accelerator.gather(weights[0][None])]
assert len(fusion) == accelerator.num_processes
assert weights[1].abs().max() > 0.01, "nothing was fitted"
metrics = [[m["auc"], m["id_auc"], m["text_auc"], m["logloss"]] for m in map(ctr_metrics, (found, expected))]

model = build(FlipForPreTraining, processor, objectives={"mlm": 1.0, "mtm": 1.0, "text_mlm": 1.0}).eval()
collator = collator_of(FlipForPreTraining, processor)
with torch.no_grad():
    output = model(**collator(everything))
parts = {f"{name}_loss": output[f"{name}_loss"] for name in model.objectives}
expected = {**parts, "loss": output.loss, **output.metrics}
losses = evaluate_pretraining(accelerator.prepare(model), rows, collator, 5, accelerator, "")
assert set(losses) == set(expected)
pretraining = [[losses[name], value.item()] for name, value in expected.items()]
report({"logits": float(logits), "fusion": fusion, "metrics": metrics, "groups": groups, "pretraining": pretraining})
