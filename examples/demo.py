"""Pretrains, finetunes and compares models on MovieLens-100K: runs five scripts and prints a table of results.

python examples/demo.py
python examples/demo.py --smoke      # a few seconds instead of minutes; the results are meaningless
"""

import argparse
import json
import sys
from pathlib import Path

import signals_first  # noqa: F401

from flip_hf.fetch import minilm
from flip_hf.runs.script import run_program, run_script

EXAMPLES = Path(__file__).parent
CONFIGS = EXAMPLES / "configs" / "ml-100k"
# These overrides shorten the configurations, so that the demo takes about nine minutes on two CPU cores.
BUDGET = {
    "pretrain": ["--data.max_train_rows", "24576", "--data.max_validation_rows", "1024"],
    "id": [],
    "text": ["--training.num_train_epochs", "1"],
    "joint": [],
}
SMOKE = ["--training.max_steps", "4", "--data.max_train_rows", "2048", "--data.max_validation_rows", "512"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/demo"), help="folder for the five runs (default: runs/demo)"
    )
    parser.add_argument(
        "--split", choices=["random", "time"], default="random", help="split of MovieLens-100K (default: random)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of all runs (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="take only four steps per run, as a quick check")
    arguments = parser.parse_args()

    # Fetch the configurations' text encoder first, so that the runs need no access to the Hub.
    minilm()
    folder: Path = arguments.output_dir
    pretrained = str(folder / "pretrained" / "model")
    stages = [
        ("DCNv2", "id-only", "finetune", ["--mode", "id"]),
        ("pretraining", "pretrained", "pretrain", []),
        ("FLIP_ID", "flip-id", "finetune", ["--mode", "id", "--pretrained", pretrained]),
        ("FLIP_PLM", "flip-plm", "finetune", ["--mode", "text", "--pretrained", pretrained]),
        ("FLIP", "flip", "finetune", ["--mode", "joint", "--pretrained", pretrained]),
    ]
    common = ["--data.split", arguments.split, "--data.split_seed", str(arguments.seed)]
    common += ["--training.seed", str(arguments.seed), *(SMOKE if arguments.smoke else [])]
    rows = []
    for title, name, script, flags in stages:
        budget = BUDGET["pretrain" if script == "pretrain" else flags[1]]
        config = CONFIGS / f"{script}.yaml"
        command = [str(EXAMPLES / f"{script}.py"), "--config", str(config), "--output_dir", str(folder / name)]
        # A stopped demo continues from its last checkpoint.
        command += ["--resume", "true", *flags, *budget, *common]
        print(f"\n== {title}\npython {' '.join(command)}", flush=True)
        run_program([sys.executable, *command])
        rows.append((title, folder / name))
    print(f"\n{table(rows)}\n\nThe joint model is in {folder / 'flip' / 'model'}; FlipForCTR.from_pretrained loads it.")


def table(rows: list[tuple[str, Path]]) -> str:
    """Formats the records of the runs as a Markdown table."""
    lines = [
        "| model | validation AUC | validation LogLoss | test AUC | test LogLoss | wall time | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    total = 0.0
    for title, folder in rows:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        result, seconds = record["result"], record["wall_seconds"]
        total += seconds
        cells = [
            "" if (value := result.get(split, {}).get(metric)) is None else f"{value:.4f}"
            for split in ("validation", "test")
            for metric in ("auc", "logloss")
        ]
        cells += [f"{int(seconds // 60)} min {int(seconds % 60):02d} s", f"{record['peak_memory_gib']:.1f} GiB"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append(f"| all |  |  |  |  | {int(total // 60)} min {int(total % 60):02d} s |  |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
