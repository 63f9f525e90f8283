"""Finetunes FLIP on clicks: both towers, or one of them alone; from a pretrained FLIP or from scratch.

python examples/finetune.py --config examples/configs/ml-100k/finetune.yaml --output_dir runs/flip
python examples/finetune.py --config ... --mode id --output_dir runs/flip-id
"""

from collections.abc import Sequence

import signals_first  # noqa: F401
import numpy as np

from flip_hf import FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.runs.build import check_towers, fit_processor, new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.run import Run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import FinetuneSettings, parse_run
from flip_hf.scoring import click_logits
from flip_hf.training.evaluation import ctr_metrics, evaluate_ctr, evidence
from flip_hf.training.fusion import fit_fusion
from flip_hf.training.loop import click_goal, train


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_run(FinetuneSettings, arguments, __doc__)
    training = settings.training
    if settings.pretrained is not None:
        check_towers(settings.pretrained, settings.mode)
    run = Run(settings)
    if run.has_ended:
        run.publish()
        return

    if settings.pretrained is not None:
        processor = FlipProcessor.from_pretrained(settings.pretrained)
        log = load_click_log(settings.data, processor)
        # Clicks may be learned from another column than pretraining saw, or from its first.
        processor.label = log.label
    else:
        log = load_click_log(settings.data)
        processor = fit_processor(log, settings.model)
    with sharded_features(training.shard_features):
        if settings.pretrained is not None:
            model = FlipForCTR.from_pretrained(settings.pretrained, mode=settings.mode, **settings.model.options)
        else:
            model = new_model(FlipForCTR, settings.model, processor, settings.mode)
    rows = {split: log.encode(processor, split) for split in log.splits}
    towers = model.config.text_towers
    collator = FlipCTRCollator(processor, settings.mode, text_towers=towers)

    run.describe(log.facts, processor, model)
    result = train(
        model,
        rows["train"],
        FlipCTRCollator(processor, settings.mode, training.oov_dropout, training.seed, text_towers=towers),
        training,
        run,
        click_goal(rows["validation"].with_format("numpy")["label"][:]),
        lambda prepared, moment: evaluate_ctr(
            prepared, rows["validation"], collator, training.per_device_eval_batch_size, run.accelerator, moment
        ),
        processor,
    )
    if settings.fusion_rows == "validation" or "test" in rows:
        with sharded_features(training.shard_features):
            best = FlipForCTR.from_pretrained(run.model_folder)
        best = run.accelerator.prepare_model(best, device_placement=True, evaluation_mode=True)

    def score(split: str) -> dict[str, np.ndarray]:
        return click_logits(best, rows[split], collator, training.per_device_eval_batch_size, run.accelerator, split)

    if settings.fusion_rows == "validation":
        result["validation"] = ctr_metrics(fit_fusion(best, score("validation"), rows["validation"]))
        run.save_model(best, processor, result)
        run.log("fusion", result["validation"])
    if "test" in rows:
        # The only time that test rows are read: the best model is chosen by now.
        scores = score("test")
        run.save_scores(scores)
        result |= evidence(scores)
        run.log("test", result["test"])
    run.finish(result=result)


if __name__ == "__main__":
    run_script(main)
