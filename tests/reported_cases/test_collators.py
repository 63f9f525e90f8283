"""Collators, Trainer, PEFT and the pipeline: what used to train or score something else without a word."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import BertConfig, Trainer, TrainingArguments

from flip_hf import (
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipPretrainingCollator,
    FlipProcessor,
)
from flip_hf.data.encoded_rows import EncodedRows
from flip_hf.integrations.ray import BatchEncoder
from flip_hf.pipeline import CTRPredictionPipeline
from flip_hf.training.trainer import CollatorEpochs, FlipTrainer

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def log(click_rows):
    return pa.table(click_rows).slice(0, 40)


@pytest.fixture
def encoded(processor, log):
    return processor.encode_dataset(Dataset(log))


def build(cls, processor, **settings):
    torch.manual_seed(0)
    text = BertConfig(**SIZE, vocab_size=len(processor.tokenizer))
    config = {"embedding_dim": 4, "projection_dim": 8, "backbone_options": {"hidden_sizes": [8]}, **settings}
    return cls(FlipConfig(text_config=text, fields=processor.fields, **config))


def step(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()


def arguments(folder, **settings):
    return TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, max_steps=2, report_to="none", save_strategy="no", **settings
    )


# Row numbers


@pytest.mark.parametrize("as_list", [True, False])
def test_rows_encoded_one_by_one_are_not_pretrained_with_one_mask(processor, log, as_list):
    parts = [processor.encode(log.slice(i, 1)) for i in range(8)]
    rows = pa.concat_tables(parts)
    with pytest.raises(ValueError, match=r"8 different rows share row number 0,.*first_row="):
        FlipPretrainingCollator(processor)(rows.to_pylist() if as_list else rows)
    with pytest.raises(ValueError, match="8 different rows share row number 0"):
        FlipCTRCollator(processor, oov_dropout=0.5)(rows)
    FlipCTRCollator(processor)(rows)  # which depends on no number
    numbered = pa.concat_tables([processor.encode(log.slice(i, 1), first_row=i) for i in range(8)])
    FlipPretrainingCollator(processor)(numbered)


def test_a_row_that_is_drawn_twice_is_masked_alike(processor, encoded):
    collator = FlipPretrainingCollator(processor)
    batch = collator(EncodedRows(encoded, collator.columns).__getitems__([5, 3, 5]))
    assert torch.equal(batch["masked_input_ids"][0], batch["masked_input_ids"][2])


def test_joined_datasets_whose_numbers_repeat_are_not_pretrained(processor, encoded, log, tmp_path):
    other = processor.encode_dataset(Dataset(log.slice(20)))
    joined = concatenate_datasets([encoded, other])
    collator = FlipPretrainingCollator(processor)
    model, settings = build(FlipForPreTraining, processor), arguments(tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match="2 different rows share row number 0"):
        FlipTrainer(model, settings, collator, joined)
    callback = [CollatorEpochs(collator)]
    with pytest.raises(ValueError, match="2 different rows share row number 0"):
        Trainer(model, settings, collator, joined, callbacks=callback).train()
    renumbered = joined.remove_columns("row").add_column("row", list(range(len(joined))))
    FlipTrainer(model, settings, collator, renumbered, callbacks=callback).train()


def test_batches_that_ray_encodes_can_be_numbered_by_a_column(processor, log, encoded, ctr_folder):
    numbered = log.append_column("number", pa.array(range(40), pa.int32()))
    encoder = BatchEncoder(ctr_folder, row_column="number")
    rows = pa.concat_tables([encoder(numbered.slice(start, 10)) for start in (0, 10, 20, 30)])
    assert rows["row"].to_pylist() == list(range(40))
    collator = FlipPretrainingCollator(processor)
    expected = collator(EncodedRows(encoded, collator.columns).__getitems__(list(range(40))))
    found = collator(rows)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    without = BatchEncoder(ctr_folder)(log)
    with pytest.raises(
        ValueError, match=r"lack the column 'row'.*row_column for flip_hf.integrations.ray.BatchEncoder"
    ):
        collator(without)


# Padding


@pytest.mark.parametrize("mode", ["joint", "text"])
def test_mapped_rows_are_scored_without_their_padding(processor, log, mode):
    model = build(FlipForCTR, processor, mode=mode).eval()
    collator = FlipCTRCollator(processor, mode)
    mapped = Dataset(log).map(processor, batched=True, batch_size=16, remove_columns=log.column_names)
    assert len({len(row) for row in mapped["input_ids"]}) > 1 or len(mapped["input_ids"][0]) % 8 == 0
    with torch.no_grad():
        expected = model(**collator(processor.encode(log))).logits
        found = model(**collator([mapped[i] for i in range(40)])).logits
        table = EncodedRows(mapped, collator.columns).__getitems__(list(range(40)))
        by_table = model(**collator(table)).logits
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert by_table.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 1, 1], [1, 1], [0, 0, 0], [1, 2, 0]])
def test_a_mask_that_is_not_tokens_and_then_padding_is_refused(processor, encoded, mask):
    row = {**encoded[0], "input_ids": [2, 5, 3], "attention_mask": mask}
    whole = {**encoded[1], "attention_mask": np.ones_like(encoded[1]["input_ids"])}
    with pytest.raises(ValueError, match="attention_mask of row 1 of the batch"):
        FlipCTRCollator(processor)([whole, row])


def test_mapped_rows_lack_what_pretraining_needs(processor, log):
    mapped = Dataset(log).map(processor, batched=True)
    with pytest.raises(ValueError, match=r"lack the column '(row|token_field_ids)'.*FlipProcessor.encode"):
        FlipPretrainingCollator(processor)([mapped[0]])


def test_a_label_that_is_no_click_is_refused_in_rows_that_were_mapped(processor, log):
    mapped = Dataset(log).map(processor, batched=True)
    with pytest.raises(ValueError, match="a label must be 0 or 1"):
        FlipCTRCollator(processor)([{**mapped[0], "label": 3}])


# What does not belong together


def test_a_mode_that_is_none_says_where_the_mode_is(processor):
    with pytest.raises(ValueError, match=r"mode=None.*model\.config\.mode"):
        FlipCTRCollator(processor, mode=None)


@pytest.mark.parametrize("with_callback", [True, False])
def test_the_wrong_collator_is_named_under_trainer(processor, encoded, tmp_path, with_callback):
    pretraining, clicks = FlipPretrainingCollator(processor), FlipCTRCollator(processor)
    settings = arguments(tmp_path, remove_unused_columns=False)
    for cls, wrong, right in (
        (FlipForCTR, pretraining, "FlipCTRCollator"),
        (FlipForPreTraining, clicks, "FlipPretrainingCollator"),
    ):
        callbacks = [CollatorEpochs(wrong)] if with_callback else []
        with pytest.raises((TypeError, ValueError), match=rf"{right}(\.from_model)?\(processor"):
            Trainer(build(cls, processor), settings, wrong, encoded, callbacks=callbacks).train()


def test_a_collator_of_another_mode_is_refused(processor, encoded, tmp_path):
    model, collator = build(FlipForCTR, processor), FlipCTRCollator(processor, "id")
    with pytest.raises(ValueError, match=r"mode='id'.*mode='joint'"):
        FlipTrainer(model, arguments(tmp_path), collator, encoded)
    with pytest.raises(ValueError, match=r"needs input_ids and attention_mask; FlipCTRCollator"):
        Trainer(model, arguments(tmp_path), collator, encoded).train()


def test_a_processor_of_another_vocabulary_is_refused(processor, click_rows, field_names, wordpiece, tmp_path):
    fewer = pa.table(click_rows).slice(0, 20)
    other = FlipProcessor.fit(fewer, field_names, wordpiece, label="label")
    rows = other.encode_dataset(Dataset(fewer))
    with pytest.raises(ValueError, match=r"field 'user_id' has num_features=.* in the processor and .* in the model"):
        FlipTrainer(build(FlipForCTR, processor), arguments(tmp_path), FlipCTRCollator(other), rows)


def test_the_loop_refuses_what_does_not_belong_together(processor, click_rows, field_names, wordpiece, encoded):
    from flip_hf.scoring import click_logits
    from flip_hf.training.loop import train

    class NoRun:
        accelerator = None

    model = build(FlipForCTR, processor)
    for collator, match in (
        (FlipPretrainingCollator(processor), r"use FlipCTRCollator\(processor\)"),
        (FlipCTRCollator(processor, "text"), "mode='text'"),
    ):
        with pytest.raises(ValueError, match=match):
            train(model, encoded, collator, None, NoRun, None, None, processor)
        with pytest.raises(ValueError, match=match):
            click_logits(model, encoded, collator, 8, None, "")


# PEFT and Trainer's settings


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_lora_with_a_task_type_starts_from_the_models_logits_and_trains(processor, encoded, task_type, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'flip_hf[test]'")
    collator = FlipCTRCollator(processor)
    batch = collator([encoded[i] for i in range(40)])
    model = build(FlipForCTR, processor).eval()
    with torch.no_grad():
        expected = model(**batch).logits
    config = peft.LoraConfig(
        task_type=task_type, r=2, target_modules=["query", "value"], modules_to_save=["text_head", "fusion"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, expected)
    settings = arguments(tmp_path, learning_rate=0.01, remove_unused_columns=False)
    Trainer(adapted, settings, collator, encoded, callbacks=[CollatorEpochs(collator)]).train()
    merged = adapted.merge_and_unload().eval()
    with torch.no_grad():
        assert (merged(**batch).logits - expected).abs().max() > 1e-4
    assert len(CTRPredictionPipeline(merged, processor)([dict.fromkeys(processor.columns_read(), 1)])) == 1


def test_inputs_embeds_may_only_be_none(processor, encoded):
    model, batch = build(FlipForCTR, processor).eval(), FlipCTRCollator(processor)([encoded[0]])
    assert torch.equal(model(**batch, inputs_embeds=None).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="inputs_embeds must be None"):
        model(**batch, inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(TypeError, match=r"does not take token_type_ids; make its batches with FlipCTRCollator"):
        model(**batch, token_type_ids=None)


def test_label_smoothing_says_why_not(processor, encoded, tmp_path):
    collator, model = FlipCTRCollator(processor), build(FlipForCTR, processor)
    settings = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: Trainer's label smoothing needs one"):
        FlipTrainer(model, settings, collator, encoded)
    with pytest.warns(UserWarning, match="Label smoothing is not compatible"):
        trainer = Trainer(model, settings, collator, encoded)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    trainer.add_callback(CollatorEpochs(collator))
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        trainer.train()


# The pipeline


def test_workers_of_the_pipeline_say_why_not(processor, log, encoded):
    model = build(FlipForCTR, processor)
    step(model, FlipCTRCollator(processor)([encoded[i] for i in range(8)]))
    pipe = CTRPredictionPipeline(model, processor)
    with pytest.raises(ValueError, match="num_workers=2: this pipeline encodes rows in the calling process"):
        pipe(log, num_workers=2)
    with pytest.raises(ValueError, match="num_workers=2"):
        CTRPredictionPipeline(model, processor, num_workers=2)
    with pytest.raises(TypeError, match="no setting 'top_k'"):
        pipe(log, top_k=1)
    assert len(pipe(log, num_workers=0, batch_size=7)) == len(log)


def test_a_model_trained_in_memory_is_scored(processor, log, encoded, tmp_path):
    build(FlipForPreTraining, processor).save_pretrained(tmp_path)
    model = FlipForCTR.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved by FlipForPreTraining"):
        CTRPredictionPipeline(model, processor)
    step(model, FlipCTRCollator(processor)([encoded[i] for i in range(8)]))
    assert len(CTRPredictionPipeline(model, processor)(log)) == 40


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_a_fresh_model_is_not_scored_once_it_was_saved(processor, encoded, log, tmp_path, mode):
    model = build(FlipForCTR, processor, mode=mode)
    model.save_pretrained(tmp_path)
    loaded = FlipForCTR.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was never trained on clicks"):
        CTRPredictionPipeline(loaded, processor)
    step(loaded, FlipCTRCollator(processor, mode)([encoded[i] for i in range(8)]))
    loaded.save_pretrained(tmp_path)
    assert len(CTRPredictionPipeline(FlipForCTR.from_pretrained(tmp_path), processor)(log)) == 40


# Batches of one row


def test_afn_trains_on_one_row(processor, encoded):
    model = build(FlipForCTR, processor, mode="id", backbone="afn", backbone_options={"hidden_sizes": [8]})
    before = model.flip.backbone.output.bias.item()
    step(model, FlipCTRCollator(processor, "id")([encoded[0]]))
    assert model.flip.backbone.output.bias.item() != before


def test_a_processor_of_another_vocabulary_of_the_same_size_is_refused(wordpiece):
    processors = [
        FlipProcessor.fit({"user_id": values, "label": [0, 1]}, ["user_id"], wordpiece, label="label")
        for values in (["196", "22"], ["196", "23"])
    ]
    model = build(FlipForCTR, processors[0])
    # As training leaves it.
    torch.nn.init.ones_(model.text_head[-1].bias)
    CTRPredictionPipeline(model, processors[0])
    with pytest.raises(ValueError, match="the processor's fields are not the model's"):
        CTRPredictionPipeline(model, processors[1])
