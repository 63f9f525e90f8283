"""The commands of `flip-hf` and of the scripts in `examples/`, one function each."""

import json
import time
from typing import Any

import numpy as np

from flip_hf.data.collators import FlipCTRCollator, FlipPretrainingCollator
from flip_hf.data.distillation import student_rows
from flip_hf.data.encoded_rows import value_tokens
from flip_hf.data.fallbacks import count_fallbacks
from flip_hf.fields import with_nearest
from flip_hf.hub.push import write_card
from flip_hf.modeling_flip import FlipForCTR, FlipForPreTraining
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.processing_flip import FlipProcessor
from flip_hf.runs.build import check_towers, fit_processor, load_finetuned, new_model
from flip_hf.runs.data import UNLABELED, load_click_log
from flip_hf.runs.device import make_accelerator
from flip_hf.runs.fetchable import FETCHABLE
from flip_hf.runs.folder import RunFiles
from flip_hf.runs.prediction import predict_file
from flip_hf.runs.run import Run
from flip_hf.runs.settings import CardSettings, EvaluateSettings, FinetuneSettings, PredictSettings, PretrainSettings
from flip_hf.runs.teacher import Teacher
from flip_hf.scoring import click_logits
from flip_hf.standard_json import measures_json
from flip_hf.training.checkpoints import replace_file
from flip_hf.training.evaluation import (
    ctr_metrics,
    evaluate_ctr,
    evaluate_pretraining,
    evidence,
    slice_masks,
    slice_metrics,
)
from flip_hf.training.fusion import fit_fusion
from flip_hf.training.loop import Goal, click_goal, train
from flip_hf.training.protocols import PreparedModel


def pretrain(settings: PretrainSettings) -> None:
    """Pretrains FLIP: aligns the ID-based model and the text encoder on a click log, without labels."""
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
    # With another seed, these masks differ from those of training. They are the same at every evaluation.
    validation_collator = FlipPretrainingCollator(processor, training.seed + 1, *shares)

    def evaluate(prepared: PreparedModel, moment: str) -> dict[str, float]:
        size = training.per_device_train_batch_size
        return evaluate_pretraining(prepared, validation_rows, validation_collator, size, run.accelerator, moment)

    run.describe(log.description, processor, model)
    goal = Goal("loss", larger_is_better=False)
    result = train(model, train_rows, collator, training, run, goal, evaluate, processor)
    run.finish(result=result)


def finetune(settings: FinetuneSettings) -> None:
    """Finetunes FLIP on clicks: both towers or one of them, from a pretrained FLIP or from scratch."""
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
        # The label column may differ from that of pretraining, which may have had none.
        processor.label = log.label
    else:
        log = load_click_log(settings.data)
        processor = fit_processor(log, settings.model)
    options = {} if settings.teacher is None else {"distillation_weight": settings.distillation_weight}
    with sharded_features(training.shard_features):
        if settings.pretrained is not None:
            options |= settings.model.options
            model = FlipForCTR.from_pretrained(settings.pretrained, mode=settings.mode, **options)
        else:
            model = new_model(FlipForCTR, settings.model, processor, settings.mode, **options)
    teacher = None if settings.teacher is None else Teacher(settings.teacher, settings)
    rows = {split: log.encode(processor, split, with_label=split != UNLABELED) for split in log.splits}
    collator = FlipCTRCollator.from_model(processor, model)
    training_collator = FlipCTRCollator.from_model(processor, model, training.oov_dropout, training.seed)

    def evaluate(prepared: PreparedModel, moment: str) -> dict[str, float]:
        size = training.per_device_eval_batch_size
        return evaluate_ctr(prepared, rows["validation"], collator, size, run.accelerator, moment)

    run.describe(log.description, processor, model)
    if teacher is not None:
        logits = run.teacher_logits(lambda: teacher.click_logits(run.accelerator))
        rows["train"] = student_rows(rows["train"], rows.pop(UNLABELED, None), logits)
        del teacher
    goal = click_goal(rows["validation"].with_format("numpy")["label"][:])
    result = train(model, rows["train"], training_collator, training, run, goal, evaluate, processor)
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
        # The test rows are read only here, after the best model was chosen.
        started = time.monotonic()
        scores = score("test")
        result["test_rows_per_second"] = round(len(rows["test"]) / (time.monotonic() - started), 1)
        run.save_scores(scores)
        result |= evidence(scores)
        run.log("test", result["test"])
    run.finish(result=result)


def evaluate(settings: EvaluateSettings) -> None:
    """Evaluates a finetuned FLIP on labelled rows and prints the metrics as JSON."""
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(settings.precision)
    model = load_finetuned(settings.model, settings.mode)
    processor = FlipProcessor.from_pretrained(settings.model)
    log = load_click_log(settings.data, processor, split=settings.rows)
    processor.label = log.label
    rows = log.encode(processor, settings.rows)
    slices = slice_masks(rows, processor.fields, settings.slices)
    collator = FlipCTRCollator.from_model(processor, model)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    scores = click_logits(model, rows, collator, settings.batch_size, accelerator, settings.rows)
    if accelerator.is_main_process:
        results: dict[str, Any] = {"rows": len(rows), "metrics": ctr_metrics(scores)}
        if slices:
            results["slices"] = slice_metrics(scores, slices)
        report = measures_json(results | {"fallbacks": count_fallbacks(rows, processor.fields)}, indent=2)
        print(report)
        if settings.output is not None:
            replace_file(settings.output, report + "\n")


def predict(settings: PredictSettings) -> None:
    """Writes click probabilities for the rows of files of any size, and prints a summary."""
    accelerator = make_accelerator(settings.precision)
    model = load_finetuned(settings.model, settings.mode)
    processor = FlipProcessor.from_pretrained(settings.model)
    collator = FlipCTRCollator.from_model(processor, model)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    summary = predict_file(model, processor, collator, settings, accelerator)
    accelerator.print(summary)


def card(settings: CardSettings) -> None:
    """Writes the model card of a finished run, with its record and pictures, to a folder; does not push it."""
    files = RunFiles(settings.run)
    record = json.loads(files.record.read_text(encoding="utf-8"))
    settings.output.mkdir(parents=True, exist_ok=True)
    write_card(settings.output, settings.repo, record, files.pictures)


def fetch(name: str) -> None:
    """Downloads the default text encoder (minilm) or a named dataset and prints its folder."""
    if name not in FETCHABLE:
        raise ValueError(f"flip-hf fetch can't download {with_nearest([name], FETCHABLE)}")
    print(FETCHABLE[name]())
