"""Saving, loading and scoring: what a checkpoint promises."""

import json
import shutil

import pytest
import safetensors
import torch
from finetuned import finetuned
from transformers import AutoConfig, AutoModel, BertConfig, DistilBertConfig

from flip_hf import FieldConfig, FlipConfig, FlipForCTR, FlipForPreTraining, FlipModel, FlipProcessor
from flip_hf.backbones import BACKBONES
from flip_hf.fields import IGNORED_LABEL, MASK_ID

MODES = ["joint", "id", "text"]
FIELDS = [
    FieldConfig("user", num_features=40),
    FieldConfig("item", num_features=60),
    FieldConfig("genre", num_features=6),
]
TEXT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 90,
    "max_position_embeddings": 64,
}


def make_config(**settings):
    return FlipConfig(
        **{"text_config": dict(TEXT), "fields": FIELDS, "embedding_dim": 8, "projection_dim": 16, **settings}
    )


def make_batch(num_rows=7, seed=0):
    """Rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ranges = [own[0] for own in make_config().feature_ranges]
    columns = [torch.randint(a, b, (num_rows,), generator=generator) for a, b in ranges]
    lengths = torch.randint(4, 20, (num_rows,), generator=generator)
    mask = (torch.arange(20) < lengths[:, None]).long()
    tokens = torch.randint(5, 90, (num_rows, 20), generator=generator) * mask
    return {"feature_ids": torch.stack(columns, dim=1), "input_ids": tokens, "attention_mask": mask}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(make_config())).eval()
    with torch.no_grad():
        model.fusion.id_weight.fill_(0.3)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_logits_survive_saving_and_loading(saved, tmp_path, mode):
    model, folder = saved
    batch = make_batch()
    expected = model(**batch)
    loaded = FlipForCTR.from_pretrained(folder, mode=mode).eval()
    of_mode = {"joint": expected.logits, "id": expected.id_logits, "text": expected.text_logits}[mode]
    torch.testing.assert_close(loaded(**batch).logits, of_mode, rtol=0, atol=1e-6)

    loaded.save_pretrained(tmp_path / "again")
    again = FlipForCTR.from_pretrained(tmp_path / "again").eval()
    assert again.config.mode == mode
    torch.testing.assert_close(again(**batch).logits, of_mode, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_logits_do_not_depend_on_batch_padding_or_order(saved, mode):
    _, folder = saved
    model = FlipForCTR.from_pretrained(folder, mode=mode).eval()
    batch = make_batch()
    logits = model(**batch).logits
    for i in range(len(logits)):
        alone = {name: values[i : i + 1] for name, values in batch.items()}
        torch.testing.assert_close(model(**alone).logits[0], logits[i], rtol=0, atol=1e-6)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    shuffled = {name: values[order] for name, values in batch.items()}
    torch.testing.assert_close(model(**shuffled).logits, logits[order], rtol=0, atol=1e-6)
    padded = dict(batch)
    for name in ("input_ids", "attention_mask"):
        padded[name] = torch.nn.functional.pad(batch[name], (0, 13))
    torch.testing.assert_close(model(**padded).logits, logits, rtol=0, atol=1e-6)


class _RecordingFile:
    """A safetensors file that writes down the names of the tensors that are read from it."""

    read: set[str] = set()  # noqa: RUF012

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *args):
        return self._file.__exit__(*args)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def get_tensor(self, name):
        self.read.add(name)
        return self._file.get_tensor(name)

    def get_slice(self, name):
        return _RecordingSlice(name, self._file.get_slice(name))


class _RecordingSlice:
    def __init__(self, name, part):
        self._name, self._part = name, part

    def __getitem__(self, index):
        _RecordingFile.read.add(self._name)
        return self._part[index]

    def __getattr__(self, name):
        return getattr(self._part, name)


@pytest.fixture
def tensors_read(monkeypatch):
    import transformers.modeling_utils

    real = safetensors.safe_open
    monkeypatch.setattr(_RecordingFile, "read", set())
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *a, **k: _RecordingFile(real(*a, **k)))
    return _RecordingFile


def test_id_mode_builds_and_reads_no_text_encoder(saved, tensors_read):
    model, folder = saved
    FlipForCTR.from_pretrained(folder)
    assert tensors_read.read == set(model.state_dict()), "the recorder must see what is read"

    tensors_read.read.clear()
    loaded = FlipForCTR.from_pretrained(folder, mode="id")
    assert loaded.flip.text_model is None
    assert not any("text" in name for name, _ in loaded.named_modules())
    assert tensors_read.read == set(loaded.state_dict())
    assert not any("text" in name for name in tensors_read.read)


def test_text_mode_builds_and_reads_no_feature_table(saved, tensors_read):
    _, folder = saved
    loaded = FlipForCTR.from_pretrained(folder, mode="text")
    assert loaded.flip.feature_embeddings is None
    assert loaded.flip.backbone is None
    assert not any("feature_embeddings" in name or "backbone" in name for name in tensors_read.read)


@torch.no_grad()
def test_a_tower_of_a_joint_model_is_a_model_of_the_same_modules(saved, tmp_path):
    model, folder = saved
    batch = make_batch()
    for mode, view in (("id", ["feature_ids"]), ("text", ["input_ids", "attention_mask"])):
        alone = model.in_mode(mode)
        loaded = FlipForCTR.from_pretrained(folder, mode=mode)
        assert set(alone.state_dict()) == set(loaded.state_dict())
        assert {id(p) for p in alone.parameters()} <= {id(p) for p in model.parameters()}
        assert not any(value.is_meta for value in [*alone.parameters(), *alone.buffers()])
        own_view = {name: batch[name] for name in view}
        expected = loaded(**own_view).logits
        torch.testing.assert_close(alone(**own_view).logits, expected, rtol=0, atol=1e-6)
        assert (alone.config.mode, model.config.mode, alone.training) == (mode, "joint", False)
        alone.save_pretrained(tmp_path / mode)
        again = FlipForCTR.from_pretrained(tmp_path / mode)
        torch.testing.assert_close(again(**own_view).logits, expected, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match=f"mode='{mode}' has no tower for mode='joint'"):
            alone.in_mode("joint")
    assert model.in_mode("joint") is model
    with pytest.raises(ValueError, match="no tower for mode='both'"):
        model.in_mode("both")


def test_without_fusion_gradients_towers_learn_as_if_alone(saved):
    _, folder = saved
    batch = make_batch()
    labels = torch.arange(len(batch["feature_ids"])) % 2
    model = FlipForCTR.from_pretrained(folder, fusion_gradients=False)
    joint = FlipForCTR.from_pretrained(folder)
    output, expected = model(**batch, labels=labels), joint(**batch, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss)
    for one in (output, expected):
        one.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients["fusion.id_weight"], joint.fusion.id_weight.grad)
    for mode, view in (("id", ["feature_ids"]), ("text", ["input_ids", "attention_mask"])):
        alone = FlipForCTR.from_pretrained(folder, mode=mode)
        alone(**{name: batch[name] for name in view}, labels=labels).loss.backward()
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
    id_gradient = joint.flip.feature_embeddings.weight.grad
    assert not torch.allclose(id_gradient, gradients["flip.feature_embeddings.weight"])


def test_settings_replace_those_of_the_saved_or_a_given_configuration(saved):
    _, folder = saved
    given = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    model = FlipForCTR.from_pretrained(folder, config=given, mode="id", head_dropout=0.5)
    assert (model.config.mode, model.config.head_dropout, model.flip.text_model) == ("id", 0.5, None)
    assert given.mode == "joint"
    FlipForCTR.from_pretrained(folder, mode="id").save_pretrained(folder)
    assert FlipForCTR.from_pretrained(folder, mode=None).config.mode == "id"
    assert FlipForCTR.from_pretrained(folder, config=FlipConfig.from_pretrained(folder), mode=None).config.mode == "id"
    with pytest.raises(Exception, match="mode='both' is not one of joint, id, text"):
        FlipForCTR.from_pretrained(folder, config=given, mode="both")


def test_a_model_that_has_not_learned_clicks_says_so(saved, tmp_path, caplog):
    _, folder = saved
    assert FlipForCTR.from_pretrained(folder).needs_finetuning is None
    own = "flip_hf.modeling_flip"
    assert not [record for record in caplog.records if record.name == own]
    fresh = "lacks fusion.id_weight, text_head.1.bias, text_head.1.weight, which were newly initialised"
    for cls, mode, reason in (
        (FlipForPreTraining, "joint", f"was saved by FlipForPreTraining, which does not learn clicks and {fresh}"),
        # Nothing is missing here, but what the ID-based model says of clicks is as it started.
        (FlipForPreTraining, "id", "was saved by FlipForPreTraining, which does not learn clicks"),
        (FlipModel, "id", "was saved by FlipModel, which does not learn clicks"),
    ):
        cls(make_config()).save_pretrained(tmp_path / "new")
        caplog.clear()
        model = FlipForCTR.from_pretrained(tmp_path / "new", mode=mode)
        assert model.needs_finetuning == reason
        (warning,) = [record.message for record in caplog.records if record.name == own]
        assert warning == f"{tmp_path / 'new'} {reason}: finetune it before you use its logits"
        assert model.in_mode("id").needs_finetuning == reason.removesuffix(f" and {fresh}")
    caplog.clear()
    fresh = FlipForCTR(make_config())
    fresh.save_pretrained(tmp_path / "fresh")
    for model in (fresh, FlipForCTR.from_pretrained(tmp_path / "fresh"), fresh.in_mode("id"), fresh.in_mode("text")):
        assert model.needs_finetuning.startswith("was never trained on clicks")
    assert "was never trained on clicks" in caplog.text
    gated = FlipForCTR.from_pretrained(folder, fusion="gated")
    assert gated.needs_finetuning is not None
    assert gated.in_mode("text").needs_finetuning is None
    gated.save_pretrained(tmp_path / "finetuned")
    assert gated.needs_finetuning is None


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_step_of_clicks_tells_and_steps_of_pretraining_do_not(tmp_path, backbone):
    batch = make_batch()
    pretrained = FlipForPreTraining(make_config(backbone=backbone))
    masked = {"masked_feature_ids": batch["feature_ids"], "masked_input_ids": batch["input_ids"]}
    labels = {"mtm_labels": batch["feature_ids"], "mlm_labels": batch["input_ids"]}
    optimizer = torch.optim.AdamW(pretrained.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        pretrained(**batch, **masked, **labels).loss.backward()
        optimizer.step()
    pretrained.save_pretrained(tmp_path)
    for mode in MODES:
        model = FlipForCTR.from_pretrained(tmp_path, mode=mode)
        assert model.needs_finetuning is not None
        model(**batch, labels=torch.tensor([1, 0, 0, 1, 0, 0, 1])).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-4).step()
        assert model.needs_finetuning is None
        assert model.to(torch.bfloat16).needs_finetuning is None


@pytest.mark.parametrize("backbone", BACKBONES)
def test_finetuning_starts_from_pretrained_towers(tmp_path, backbone):
    pretrained = FlipForPreTraining(make_config(backbone=backbone))
    pretrained.save_pretrained(tmp_path)
    for mode in MODES:
        model = FlipForCTR.from_pretrained(tmp_path, mode=mode)
        for name, value in model.flip.state_dict().items():
            assert torch.equal(value, pretrained.flip.state_dict()[name]), name
        if mode == "joint":
            assert model.fusion.id_weight.item() == 0.5
            assert model.text_head[1].bias.item() == 0.0
    again = FlipForPreTraining.from_pretrained(tmp_path)
    for name, value in pretrained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    base = FlipModel.from_pretrained(tmp_path)
    assert torch.equal(base.feature_embeddings.weight, pretrained.flip.feature_embeddings.weight)


def test_feature_counts_survive_saving(tmp_path):
    model = FlipForPreTraining(make_config())
    counts = torch.randint(0, 50, (model.config.num_features,), generator=torch.Generator().manual_seed(0))
    model.set_feature_counts(counts)
    model.save_pretrained(tmp_path)
    loaded = FlipForPreTraining.from_pretrained(tmp_path)
    expected = counts.clamp(min=1)
    expected[:2] = 0
    assert torch.equal(loaded.objectives["mtm"].cumulative_counts.diff(), expected)


def test_a_model_saved_in_one_mode_is_refused_in_another(saved, tmp_path):
    _, folder = saved
    FlipForCTR.from_pretrained(folder, mode="id").save_pretrained(tmp_path / "id")
    with pytest.raises(ValueError, match=r"lacks weights that mode='joint' needs: flip\.text_model"):
        FlipForCTR.from_pretrained(tmp_path / "id", mode="joint")


def test_a_config_that_disagrees_with_the_weights_is_refused(saved, tmp_path):
    _, folder = saved
    edited = tmp_path / "edited"
    shutil.copytree(folder, edited)
    config = json.loads((edited / "config.json").read_text())
    config["fields"][0]["num_features"] += 1
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"feature_embeddings\.weight has the shape \(108, 8\) .* describes \(109, 8\)"
    ):
        FlipForCTR.from_pretrained(edited)


def test_a_truncated_weight_file_is_refused(saved, tmp_path):
    _, folder = saved
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|truncat"):
        FlipForCTR.from_pretrained(folder)


def test_a_pickle_is_not_loaded(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        FlipForCTR.from_pretrained(folder)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[500, 50, 103]], r"feature_ids\[0, 0\] is 500, outside its field's range \[2, 42\)"),
        ([[5, 50, 103], [5, 5, 103]], r"feature_ids\[1, 1\] is 5, outside its field's range \[42, 102\)"),
        ([[-1, 50, 103]], r"feature_ids\[0, 0\] is -1"),
        ([[5, 50]], r"shape \(batch, 3\)"),
    ],
)
def test_feature_ids_outside_the_table_are_refused(ids, message):
    model = FlipForCTR(make_config(mode="id"))
    with pytest.raises(ValueError, match=message):
        model(feature_ids=torch.tensor(ids))


@pytest.mark.parametrize(("mode", "needs"), [("id", "feature_ids"), ("text", "input_ids"), ("joint", "feature_ids")])
def test_a_view_that_the_mode_needs_must_be_given(mode, needs):
    with pytest.raises(ValueError, match=needs):
        FlipForCTR(make_config(mode=mode))()


def test_text_encoder_is_taken_over_with_its_first_layers(tmp_path):
    torch.manual_seed(1)
    text_model = AutoModel.from_config(BertConfig(**{k: v for k, v in TEXT.items() if k != "model_type"}))
    text_model.save_pretrained(tmp_path)
    model = FlipForCTR.from_text_pretrained(str(tmp_path), make_config(text_layers=1))
    taken = model.flip.text_model.state_dict()
    assert {name.split(".")[2] for name in taken if name.startswith("encoder.layer")} == {"0"}
    for name, value in taken.items():
        assert torch.equal(value, text_model.state_dict()[name]), name
    assert model.flip.text_model.pooler is None
    assert model.config.text_config.num_hidden_layers == 1


def test_a_saved_model_does_not_say_where_its_text_encoder_lay(tmp_path, wordpiece, click_rows):
    encoder, folder = tmp_path / "encoder", tmp_path / "model"
    AutoModel.from_config(BertConfig(**{k: v for k, v in TEXT.items() if k != "model_type"})).save_pretrained(encoder)
    wordpiece.save_pretrained(encoder)
    processor = FlipProcessor.fit(click_rows, ["user_id", "title"], encoder)
    config = make_config(text_config=AutoConfig.from_pretrained(encoder), fields=processor.fields)
    FlipForCTR.from_text_pretrained(str(encoder), config).save_pretrained(folder)
    processor.save_pretrained(folder)
    # What is loaded knows this folder, and must not write that down either.
    FlipForCTR.from_pretrained(folder).save_pretrained(tmp_path / "again")
    FlipProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in [*folder.glob("*.json"), *(tmp_path / "again").glob("*.json")]:
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    assert len(list((tmp_path / "again").glob("*.json"))) == 4


def test_a_text_encoder_that_the_config_does_not_describe_is_refused(tmp_path):
    AutoModel.from_config(BertConfig(**{**TEXT, "hidden_size": 16})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hidden_size=32, but the text encoder .* has 16"):
        FlipForCTR.from_text_pretrained(str(tmp_path), make_config())


@pytest.mark.parametrize(
    "text_config",
    [
        DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=64, vocab_size=90),
        {"model_type": "roberta", **{k: v for k, v in TEXT.items() if k != "model_type"}},
        {
            "model_type": "modernbert",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 90,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ],
    ids=["distilbert", "roberta", "modernbert"],
)
def test_any_transformers_encoder_is_a_text_tower(tmp_path, text_config):
    model = FlipForPreTraining(make_config(text_config=text_config, text_layers=2)).eval()
    model.save_pretrained(tmp_path)
    ctr = FlipForCTR.from_pretrained(tmp_path).eval()
    batch = make_batch()
    assert ctr(**batch).logits.shape == (7,)
    assert ctr.config.text_config.num_hidden_layers == 2
    ctr(**batch, labels=torch.ones(7)).loss.backward()
    without = [name for name, p in ctr.named_parameters() if p.grad is None]
    assert without == []
    with torch.no_grad():
        states = ctr(**batch, output_hidden_states=True).hidden_states
        assert len(states) == 3
        torch.testing.assert_close(states[-1], ctr.flip(**batch).token_states, rtol=0, atol=0)


def test_pretraining_needs_both_towers():
    with pytest.raises(ValueError, match="mode must be 'joint'"):
        FlipForPreTraining(make_config(mode="id"))


def test_only_pretraining_with_icl_contrasts_rows():
    assert FlipForPreTraining(make_config()).contrasts_rows
    assert not FlipForPreTraining(make_config(objectives={"mlm": 1.0, "icl": 0.0})).contrasts_rows
    assert not FlipForCTR(make_config()).contrasts_rows


def test_fields_must_be_fitted():
    with pytest.raises(ValueError, match=r"field 'user' is not fitted; .*processor\.fields"):
        FlipForCTR(make_config(fields=[FieldConfig("user")]))


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = FlipForCTR(make_config(head_dropout=0.0, backbone_options={"dropout": 0.0}))
    model.config.text_config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    batch = make_batch()
    labels = torch.tensor([0.0, 1, 0, 1, 1, 0, 1])
    model(**batch, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_the_text_encoder_makes_of_a_row_is_returned_on_request(saved):
    _, folder = saved
    batch = make_batch()
    model = FlipForCTR.from_pretrained(folder, attn_implementation="eager").eval()
    text_model = model.flip.text_model
    expected = text_model(
        batch["input_ids"], batch["attention_mask"], output_hidden_states=True, output_attentions=True
    )
    plain = model(**batch)
    assert "hidden_states" not in plain
    assert "attentions" not in plain

    asked = model(**batch, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(asked.hidden_states, expected.hidden_states, rtol=0, atol=0)
    torch.testing.assert_close(asked.attentions, expected.attentions, rtol=0, atol=0)
    torch.testing.assert_close(asked.logits, plain.logits, rtol=0, atol=0)
    only_last = model(**batch, output_hidden_states=[-1]).hidden_states
    assert only_last[:-1] == (None, None)
    torch.testing.assert_close(only_last[-1], expected.hidden_states[-1], rtol=0, atol=0)

    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3
    assert "hidden_states" not in model(**batch, output_hidden_states=False)


@torch.no_grad()
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_outputs_are_tuples_on_request(saved, by):
    model, _ = saved
    batch = make_batch()
    expected = model(**batch).to_tuple()
    if by == "configuration":
        model.config.return_dict = False
    returned = model(**batch) if by == "configuration" else model(**batch, return_dict=False)
    assert type(returned) is tuple
    torch.testing.assert_close(returned, expected, rtol=0, atol=0)


def test_a_model_without_a_text_encoder_has_no_token_embeddings():
    model = FlipForCTR(make_config(mode="id"))
    for ask in (model.get_input_embeddings, lambda: model.set_input_embeddings(torch.nn.Embedding(9, 4))):
        with pytest.raises(NotImplementedError, match="mode='id' has no text encoder"):
            ask()
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()


@torch.no_grad()
@pytest.mark.parametrize("model_class", [FlipForCTR, FlipForPreTraining])
@pytest.mark.parametrize("on_disk", ["flip.feature_embeddings", "flip.text_model", ""])
def test_parts_may_lie_on_the_disk(tmp_path, model_class, on_disk):
    torch.manual_seed(0)
    model = model_class(make_config()).eval()
    model.save_pretrained(tmp_path / "model")
    parts = [f"flip.{name}" for name, _ in model.flip.named_children()]
    parts += [name for name, _ in model.named_children() if name != "flip"]
    places = dict.fromkeys(parts, "cpu") | {on_disk: "disk"} if on_disk else {"": "disk"}
    folders = {"pretrained_model_name_or_path": tmp_path / "model", "offload_folder": tmp_path / "offloaded"}
    loaded = model_class.from_pretrained(**folders, device_map=places).eval()
    assert {p.device.type for p in loaded.get_submodule(on_disk).parameters()} == {"meta"}
    batch = make_batch()
    if model_class is FlipForPreTraining:
        masked = torch.arange(len(FIELDS)) == torch.arange(7)[:, None] % len(FIELDS)
        batch["masked_feature_ids"] = batch["feature_ids"].masked_fill(masked, MASK_ID)
        batch["mtm_labels"] = batch["feature_ids"].masked_fill(~masked, IGNORED_LABEL)
        batch["masked_input_ids"] = batch["input_ids"].clone()
        batch["masked_input_ids"][:, 1] = 4
        batch["mlm_labels"] = batch["input_ids"].masked_fill(torch.arange(20) != 1, IGNORED_LABEL)
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], rtol=0, atol=1e-5)


def test_config_is_found_by_its_model_type(saved):
    _, folder = saved
    assert type(AutoConfig.from_pretrained(folder)) is FlipConfig
