"""A run's record."""


def make_record():
    """What a run of both towers wrote."""
    metrics = {"auc": 0.75, "logloss": 0.5, "ece": 0.01, "id_auc": 0.7, "text_auc": 0.6}
    return {
        "task": "finetuning",
        "settings": {
            "output_dir": "/home/alice/secret-project/run",
            "pretrained": None,
            "data": {"train_file": "/home/alice/secret-project/train.parquet", "fields": ["user_id"]},
            "training": {"seed": 3, "num_train_epochs": 2},
        },
        "command": ["finetune.py", "--output_dir=/home/alice/secret-project/run", "~/secret-project/a.yaml"],
        "started": "2026-01-01T00:00:00+00:00",
        "resumed_at": [40],
        "versions": {"python": "3.11", "flip_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": {
            "kind": "cpu", "processes": 2, "threads": 1, "precision": "bf16", "processor": "A CPU", "cores": 2,
            "memory_gib": 24,
        },
        "data": {
            "files": ["train.parquet", "validation.parquet", "test.parquet"],
            "rows": {"train": 1000, "validation": 100, "test": 1234},
            "fingerprints": {"train": "aa", "validation": "bb", "test": "cc"},
        },
        "model": {
            "class": "FlipForCTR", "mode": "joint", "backbone": "dcnv2", "backbone_options": {}, "embedding_dim": 8,
            "fusion": "gated", "objectives": {}, "text_base_model": "org/encoder", "text_pooling": "mean",
            "text_layers": 2, "text_size": 32, "features": 70, "parameters": {"all": 1000000},
            "fields": [{"name": "user_id", "kind": "categorical", "features": 50}],
        },
        "result": {
            "validation": metrics, "best_step": 50, "steps": 60, "stopped_early": True, "rows_per_second": 12.5,
            "test": {name: value - 0.002 for name, value in metrics.items()}, "test_rows": 1234,
            "test_intervals": {"auc": [0.741, 0.7555], "logloss": [0.48, 0.52], "ece": [0.005, 0.02]},
        },
        "wall_seconds": 125.0,
        "peak_memory_gib": 1.5,
    }  # fmt: skip
