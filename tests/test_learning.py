"""Each objective learns: 256 rows are fitted until fields, tokens and rows are recovered."""

import pytest
import torch

from flip_hf import FieldConfig, FlipConfig, FlipForPreTraining
from flip_hf.data.masking import masked_fields

SIZES = [40, 60, 3, 20]
NUM_ROWS = 256


@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
def test_256_rows_are_learnt_by_heart(loss):
    torch.manual_seed(0)
    fields = [FieldConfig(f"field{i}", num_features=n + 2) for i, n in enumerate(SIZES)]
    text = {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 140,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = FlipConfig(
        text_config=text,
        fields=fields,
        embedding_dim=16,
        projection_dim=64,
        mtm_loss=loss,
        mtm_num_negatives=24,
        backbone_options={"hidden_sizes": [64], "cross_layers": 2, "low_rank": 16, "dropout": 0.0},
    )
    model = FlipForPreTraining(config)
    firsts = torch.tensor([ranges[0][0] for ranges in config.feature_ranges])
    # The first two fields together tell a row from all others, and the last two follow from them.
    pairs = torch.randperm(SIZES[0] * SIZES[1])[:NUM_ROWS]
    user, item = pairs // SIZES[1], pairs % SIZES[1]
    values = torch.stack([user, item, user % SIZES[2], (user + item) % SIZES[3]], dim=1)
    feature_ids = values + firsts + 2
    model.set_feature_counts(torch.bincount(feature_ids.flatten(), minlength=config.num_features))
    # [CLS], then each field's name and one token of its value.
    names = torch.arange(130, 134).expand(NUM_ROWS, 4)
    tokens = torch.stack([names, values + torch.tensor([5, 45, 105, 108])], dim=2).flatten(1)
    input_ids = torch.cat([torch.full((NUM_ROWS, 1), 2), tokens], dim=1)
    token_fields = torch.tensor([-1, -1, 0, -1, 1, -1, 2, -1, 3]).expand(NUM_ROWS, 9)

    def batch(epoch):
        rows = torch.arange(NUM_ROWS).numpy()
        in_text, in_table = (torch.from_numpy(masked_fields(0, epoch, rows, 4, 0.25, stream=s)) for s in (0, 1))
        hidden = torch.cat([in_text, torch.zeros(NUM_ROWS, 1, dtype=torch.bool)], dim=1).gather(1, token_fields % 5)
        return {
            "feature_ids": feature_ids,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "masked_feature_ids": feature_ids.masked_fill(in_table, 1),
            "mtm_labels": feature_ids.masked_fill(~in_table, -100),
            "masked_input_ids": input_ids.masked_fill(hidden, 4),
            "mlm_labels": input_ids.masked_fill(~hidden, -100),
        }

    # Over 8 seeds, "nce" recovers more than 96% after 100 steps; it may take four times as many.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    names = ["mlm_accuracy", "mtm_accuracy", "icl_tabular_to_text_accuracy", "icl_text_to_tabular_accuracy"]
    for step in range(400):
        model(**batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            head = model.objectives["mtm"]
            head.loss = "full_softmax"  # among all features of the field, not only among those sampled
            with torch.no_grad():
                metrics = {name: model.eval()(**batch(1_000_000)).metrics[name].item() for name in names}
            head.loss = loss
            model.train()
            if min(metrics.values()) > 0.95:
                break
    assert min(metrics.values()) > 0.95, metrics
