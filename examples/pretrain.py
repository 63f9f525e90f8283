"""Pretrains FLIP: aligns the two views of a click log, without labels.

python examples/pretrain.py --config examples/configs/ml-100k/pretrain.yaml --output_dir runs/pretrain
accelerate launch examples/pretrain.py --config ...
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf import FlipForPreTraining, FlipPretrainingCollator
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.processing_flip import value_tokens
from flip_hf.runs.build import fit_processor, new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.run import Run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import PretrainSettings, parse_run
from flip_hf.training.evaluation import evaluate_pretraining
from flip_hf.training.loop import Goal, train


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_run(PretrainSettings, arguments, __doc__)
    training = settings.training
    run = Run(settings)
    if run.has_ended:
        run.publish()
        return

    log = load_click_log(settings.data, needs_label=False)
    processor = fit_processor(log, settings.model)
    train_rows, validation_rows = (log.encode(processor, split, with_label=False) for split in ("train", "validation"))

    with sharded_features(training.shard_features):
        model = new_model(FlipForPreTraining, settings.model, processor)
    masking = settings.masking
    if masking.mlm_vocabulary == "seen":
        model.set_mlm_tokens(value_tokens(train_rows))
    shares = masking.text_mask_ratio, masking.tabular_mask_ratio, masking.text_mask_unit
    collator = FlipPretrainingCollator(processor, training.seed, *shares)
    # Masks that training never sees, the same at every evaluation.
    validation_collator = FlipPretrainingCollator(processor, training.seed + 1, *shares)

    run.describe(log.facts, processor, model)
    result = train(
        model,
        train_rows,
        collator,
        training,
        run,
        Goal("loss", larger_is_better=False),
        lambda prepared, moment: evaluate_pretraining(
            prepared,
            validation_rows,
            validation_collator,
            training.per_device_train_batch_size,
            run.accelerator,
            moment,
        ),
        processor,
    )
    run.finish(result=result)


if __name__ == "__main__":
    run_script(main)
