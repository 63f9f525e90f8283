"""Measures the effect of the options that save training time on AUC and LogLoss: runs with and without each option.

python benchmarks/options.py --output-dir runs/options

MovieLens-100K, random split. `feature_updates` is measured with DCNv2. `mlm_vocabulary` is measured with pretraining at
the demo's budget (one layer of MiniLM, 24,576 rows) and then finetuning FLIP_ID. Finished runs are not repeated.
"""

import argparse
from pathlib import Path

from shared import example, flags, machine, markdown, mean_and_deviation, run_jobs

PRETRAINING = {"data.max_train_rows": 24576, "data.max_validation_rows": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/options"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    folder, seeds = arguments.output_dir, range(arguments.seeds)

    pretrained = {
        (value, seed): example(
            "pretrain",
            folder / f"mlm_vocabulary-{value}-{seed}",
            *flags({**PRETRAINING, "masking.mlm_vocabulary": value, "training.seed": seed}),
        )
        for value in ("all", "seen")
        for seed in seeds
    }
    run_jobs(pretrained.values(), arguments.processes)
    alone = {
        (value, seed): example(
            "finetune",
            folder / f"feature_updates-{value}-{seed}",
            *flags({"mode": "id", "training.feature_updates": value, "training.seed": seed}),
        )
        for value in ("dense", "rows")
        for seed in seeds
    }
    aligned = {
        (value, seed): example(
            "finetune",
            folder / f"flip-id-{value}-{seed}",
            *flags({"mode": "id", "pretrained": str(job.result.parent / "model"), "training.seed": seed}),
        )
        for (value, seed), job in pretrained.items()
    }
    run_jobs([*alone.values(), *aligned.values()], arguments.processes)

    rows = []
    for option, jobs in (("feature_updates", alone), ("mlm_vocabulary", aligned)):
        for value in dict.fromkeys(value for value, _ in jobs):
            tests = [jobs[value, seed].load_result()["result"]["test"] for seed in seeds]
            speed = jobs if option == "feature_updates" else pretrained
            rates = [speed[value, seed].load_result()["result"]["rows_per_second"] for seed in seeds]
            cells = [mean_and_deviation([test[metric] for test in tests]) for metric in ("auc", "logloss")]
            rows.append([option, value, *cells, f"{sum(rates) / len(rates):,.0f}"])
    header = ["option", "value", "test AUC", "test LogLoss", "rows/s in training"]
    print(f"\n{markdown(header, rows)}\n\n{arguments.seeds} seeds. {machine()}.")


if __name__ == "__main__":
    main()
