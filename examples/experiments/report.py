"""Renders docs/results.md, model_cards/ and README's tables from the records in results/ and nothing else.

python examples/experiments/report.py
"""

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drawings import draw_learning, draw_matrices
from experiments import ALIGNED, RESULTS, SHOWN_DATA, Table, find_run, key_of, load_tables, name_of
from markdown_tables import markdown
from recorded import CPU, device_name, machine_name, read_lines
from significance import paired_t

from flip_hf.hub.push import write_card
from flip_hf.runs.curves import Line, draw_calibration, draw_curves
from flip_hf.runs.folder import RunFiles
from flip_hf.runs.script import run_script

# The models that model_cards/ shows, of the random split and its first seed.
CARD_MODELS = {
    "ml-100k-id-only": "dcnv2-tuned",
    "ml-100k-pretrained": "pretraining",
    "ml-100k-flip-id": "flip-id-tuned",
    "ml-100k-flip-plm": "flip-plm",
    "ml-100k-flip": "flip-tuned",
}
METRICS = {"auc": "AUC", "logloss": "LogLoss", "gauc": "GAUC", "uauc": "UAUC", "ece": "ECE"}
# Rows a second, by their name in a run's result.
SPEEDS = {"rows_per_second": "training", "test_rows_per_second": "serving"}
COMPARED = ("auc", "logloss", "gauc", "uauc")
SLICES = ("unseen user", "rare user", "unseen item", "rare item", "frequent", "seen")
# Each seed draws these splits anew from the same rows.
DRAWN = ("random", "item")
# The AUC of fewer rows says nothing.
FEW_ROWS = 50
# README's tables go between these.
PLACE = ("<!-- `make report` writes these tables -->", "<!-- up to here -->")
INTRODUCTION = """# Results

Written by `make report` from the records in `results/`; no figure was entered by hand. `make experiments` makes the
records, and goes on where it was stopped.

Where a table names no other data: MovieLens-100K with ratings of 3 dropped, split 8:1:1 at random or by item (another
split for each seed) or by time. A figure is the mean over seeds and, after ±, half of its 95% interval by Student's t,
on the splits that each seed draws anew corrected for the rows that they share (Nadeau and Bengio 2003); on the others,
where the rows are the same for all seeds, that is the spread of training alone. *Minutes* are the median wall time of
a run with those that it needs, while other runs shared the machine, and where not all seeds ran on a CPU how many ran
where.

Differences are those of the same seed and rows; *p* is that of the paired t-test over seeds, corrected likewise, but
not for the number of comparisons. Some rows ran on another machine than those that they are compared with: what that
alone does is at the end (*Run again*), and it adds to what the seeds differ by. *Rows, +/-*: on how many seeds DeLong's
test on the test rows finds the first one's AUC higher, and on how many lower, at p < 0.05. The settings are those of
`examples/configs` and `examples/experiments/models.yaml`.
"""


AGAIN = """Recorded runs that were run once more, with those that they start from (`results/again.jsonl`). On the same
machine all is the same; on another the draws of dropout are others, and rounding.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="of README.md, docs/ and model_cards/")
    arguments = parser.parse_args()
    runs = {line["key"]: line for line in read_lines(RESULTS / "runs.jsonl")}
    comparisons = {(line["first"], line["second"]): line for line in read_lines(RESULTS / "comparisons.jsonl")}
    folder, tables = arguments.folder / "docs", load_tables()
    parts = [INTRODUCTION, *(part for table in tables for part in render(table, runs, comparisons, folder))]
    pretraining = find_run(ALIGNED, SHOWN_DATA, "random", 0).key
    parts += [aligned(line, folder) for line in read_lines(RESULTS / "alignment.jsonl") if line["key"] == pretraining]
    parts.append(machines(runs.values()))
    if again := read_lines(RESULTS / "again.jsonl"):
        parts.append(repeated(again, runs))
    (folder / "results.md").write_text("\n".join(parts), encoding="utf-8")
    page = arguments.folder / "README.md"
    readme = page.read_text(encoding="utf-8")
    begin, end = (readme.index(mark) for mark in PLACE)
    shown = "\n\n".join(f"{table.title}:\n\n{headline(table, runs)}" for table in tables if table.headline)
    page.write_text(f"{readme[: begin + len(PLACE[0])]}\n\n{shown}\n\n{readme[end:]}", encoding="utf-8")
    for name, model in CARD_MODELS.items():
        place = arguments.folder / "model_cards" / name
        if (key := find_run(model, SHOWN_DATA, "random", 0).key) in runs:
            card(runs[key], runs, place)
        elif place.exists():
            print(f"model_cards/{name} is the card of a run that is no longer recorded: run {model} again or delete it")


def render(table: Table, runs: Mapping[str, Any], comparisons: Mapping[Any, Any], folder: Path) -> list[str]:
    """A table's sections, one for each split; its pictures go into `folder`."""
    parts = [f"## {table.title}\n\n{table.caption.strip()}\n"]
    for split in table.splits:
        every = {row: by_seed(table, row, split, runs) for row in table.rows}
        found = {row: records for row, records in every.items() if records}
        if not found:
            parts.append(f"### Split: {split}\n\nNo run of this split is recorded yet.\n")
            continue
        parts.append(f"### Split: {split}\n")
        parts.append(models_table(found, runs, table))
        compared = [name for name in recorded_metrics(found, "test") if name in COMPARED]
        tests = [
            comparison(f"{first} over {second}", every[first], every[second], runs, comparisons, compared)
            for first, others in table.compare.items()
            for second in others
            if every[first].keys() & every[second].keys()
        ]
        if tests:
            header = ["comparison", "seeds", "AUC", "95% interval", "p", "rows, +/-"]
            header += [cell for name in compared if name != "auc" for cell in (METRICS[name], "p")]
            parts.append(markdown(header, tests) + "\n")
        if table.shows == "test":
            parts += [slices_table(found, name) for name in ("auc", "uauc") if has_slices(found, name)]
        if open_rows := [row for row, records in every.items() if len(records) < table.seeds]:
            parts.append(f"Fewer than {table.seeds} seeds are recorded of: {'; '.join(open_rows)}.\n")
        first_seed = {row: found[row][0] for row in table.pictures if 0 in found.get(row, {})}
        if first_seed:
            parts += pictures_of(first_seed, f"{table.name}-{split}", folder)
    return parts


def by_seed(table: Table, row: str, split: str, runs: Mapping[str, Any]) -> dict[int, Any]:
    """The records of a table's row, of the seeds that have one."""
    keys = {seed: key_of(table.runs(row, split, seed)) for seed in range(table.seeds)}
    return {seed: runs[key] for seed, key in keys.items() if key in runs}


def pictures_of(records: Mapping[str, Any], name: str, folder: Path) -> list[str]:
    """Draws how the models of a table's rows learn and how well they are calibrated; the Markdown that shows it."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    bins = {row: record["result"]["test_calibration"] for row, record in records.items()}
    shown = []
    draw_calibration(bins, folder / "results" / f"calibration-{name}.png")
    caption = "Click rates against predicted probabilities, seed 0"
    shown.append(f"![{caption}](results/calibration-{name}.png)\n")
    if panels := panels_of(records):
        draw_learning(panels, folder / "results" / f"learning-{name}.png")
        caption = (
            "How the models learn, seed 0; of the training LogLoss, moving means. Of towers apart it is the AUC before "
            "a gate is fitted"
        )
        shown.append(f"![{caption}](results/learning-{name}.png)\n")
    return shown


def panels_of(records: Mapping[str, Any]) -> dict[str, dict[str, Line]]:
    """The lines of the learning curves, by panel and row."""
    losses: dict[str, dict[str, Line]] = {"id": {}, "text": {}}
    aucs: dict[str, Line] = {}
    for row, record in records.items():
        if "curves" not in record:
            continue
        train, mode = record["curves"]["train"], record["run"]["model"]["mode"]
        # A joint model's own loss is a sum of three.
        own = {"id": "id_loss", "text": "text_loss"} if mode == "joint" else {mode: "loss"}
        for tower, name in own.items():
            losses[tower][row] = train[name]
        if "auc" in record["curves"]["validation"]:
            aucs[row] = record["curves"]["validation"]["auc"]
    panels = {
        "training LogLoss, ID-based models": losses["id"],
        "training LogLoss, text encoders": losses["text"],
        "validation AUC": aucs,
    }
    return {title: lines for title, lines in panels.items() if lines}


def card(record: Mapping[str, Any], runs: Mapping[str, Any], folder: Path) -> None:
    """Writes the model card of a recorded run, with its pictures."""
    before = runs[record["stages"][0]] if len(record["stages"]) > 1 else None
    whole = {**record["run"], "result": record["result"]}
    if before is not None:
        whole["pretraining"] = {**before["run"], "result": before["result"]}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as drawn:
        shown = RunFiles(Path(drawn)).pictures
        curves, calibration = shown
        draw_curves(record["curves"], folder.name, curves)
        if "test_calibration" in record["result"]:
            draw_calibration({"model": record["result"]["test_calibration"]}, calibration)
        write_card(folder, f"your-name/{folder.name}", whole, shown)


def headline(table: Table, runs: Mapping[str, Any]) -> str:
    """The AUC of a table's headline on each split beside that of its first row; of rows with as many seeds as that."""
    rows, first = [], table.headline[0]
    bases = {split: by_seed(table, first, split, runs) for split in table.splits}
    for row in table.headline:
        cells: list[Any] = []
        for split, base in bases.items():
            found = by_seed(table, row, split, runs)
            if not found or found.keys() != base.keys():
                cells += ["", "", ""]
                continue
            ratio, over = test_ratio(found, runs), differences(found, base, "auc")
            difference = "" if row == first else f"{statistics.fmean(over):+.4f}"
            if row != first and len(over) > 1:
                difference += f" (p {shown_p(paired_t(over, ratio).p)})"
            cells += [spread(measured(found, "test", "auc"), ratio), difference, len(found)]
        if any(cells):
            rows.append([row, *cells])
    header = [cell for split in table.splits for cell in (f"AUC, {split} split", f"over {first}", "seeds")]
    return markdown(["model", *header], rows)


def models_table(found: Mapping[str, Mapping[int, Any]], runs: Mapping[str, Any], table: Table) -> str:
    """What each row of a table is worth on test rows, or on validation rows."""
    rows, shows = [], table.shows
    speeds = SPEEDS if table.speeds else {}
    names = recorded_metrics(found, shows)
    for row, records in found.items():
        cells = [spread(measured(records, shows, name), test_ratio(records, runs)) for name in names]
        cells += [median_speed(records.values(), name) for name in speeds]
        rows.append([row, *cells, len(records), minutes(records.values())])
    where = "" if shows == "test" else f", {shows}"
    header = ["model", *(METRICS[name] + where for name in names), *speeds.values(), "seeds", "minutes"]
    return markdown(header, rows) + "\n"


def median_speed(records: Iterable[Any], name: str) -> str:
    """The median of the rows a second of runs; empty for averages of runs, and for records that have none."""
    found = [record["result"][name] for record in records if name in record["result"]]
    return f"{statistics.median(found):,.0f}" if found else ""


def recorded_metrics(found: Mapping[str, Mapping[int, Any]], shows: str) -> list[str]:
    """The metrics that any of a table's records has. Some have no GAUC, and records of earlier versions no UAUC."""
    results = [record["result"].get(shows, {}) for records in found.values() for record in records.values()]
    return [name for name in METRICS if any(name in result for result in results)]


def has_slices(found: Mapping[str, Mapping[int, Any]], metric: str) -> bool:
    """Whether any of a table's records has this metric on slices."""
    records = [record for of_row in found.values() for record in of_row.values()]
    return any(metric in part for record in records for part in record["result"]["slices"].values())


def minutes(records: Iterable[Any]) -> str:
    """The median wall time of runs with those that they start from, for each kind of device where not all are CPUs."""
    found: dict[str, list[float]] = {}
    for record in records:
        # An average of runs is none itself.
        if "run" in record:
            found.setdefault(device_name(record["run"]["device"]), []).append(record["seconds"] / 60)
    medians = {name: f"{statistics.median(times):.1f}" for name, times in sorted(found.items())}
    if set(found) <= {CPU}:
        return "".join(medians.values())
    return ", ".join(f"{median} ({len(found[name])} on {name})" for name, median in medians.items())


def comparison(
    title: str,
    first: Mapping[int, Any],
    second: Mapping[int, Any],
    runs: Mapping[str, Any],
    comparisons: Mapping[Any, Any],
    metrics: Sequence[str],
) -> list[Any]:
    """The cells of one row beside another over the seeds that have both."""
    seeds = [seed for seed in first if seed in second]
    by_rows = [tests["auc"] for seed in seeds if (tests := comparisons.get((first[seed]["key"], second[seed]["key"])))]
    sure = [tested["difference"] > 0 for tested in by_rows if tested["p"] < 0.05]
    cells: list[Any] = [title, len(seeds)]
    for name in metrics:
        found = differences(first, second, name)
        over_seeds = paired_t(found, test_ratio(first, runs)) if len(found) > 1 else None
        cells.append(f"{statistics.fmean(found):+.4f}" if found else "")
        if name == "auc":
            cells.append(f"{over_seeds.low:+.4f} to {over_seeds.high:+.4f}" if over_seeds else "")
        cells.append(shown_p(over_seeds.p) if over_seeds else "")
        if name == "auc":
            cells.append(f"{sum(sure)} / {len(sure) - sum(sure)}")
    return cells


def measured(records: Mapping[int, Any], shows: str, metric: str) -> list[float]:
    """A metric of a row's seeds, of those where it has a value."""
    values = (record["result"][shows].get(metric) for record in records.values())
    return [value for value in values if value is not None]


def differences(first: Mapping[int, Any], second: Mapping[int, Any], metric: str) -> list[float]:
    """By how much a row's test metric is above another's, over the seeds where both have a value."""
    pairs = [
        (record["result"]["test"], second[seed]["result"]["test"]) for seed, record in first.items() if seed in second
    ]
    values = [(one.get(metric), other.get(metric)) for one, other in pairs]
    return [one - other for one, other in values if one is not None and other is not None]


def test_ratio(records: Mapping[int, Any], runs: Mapping[str, Any]) -> float:
    """Test rows divided by training rows, where each seed has another split of the same rows; else 0."""
    record = next(iter(records.values()))
    if record["split"] not in DRAWN:
        return 0.0
    # Of an average the first part's.
    rows = runs[record["key"].split(" + ")[0]]["run"]["data"]["rows"]
    ratio: float = rows["test"] / rows["train"]
    return ratio


def slices_table(found: Mapping[str, Mapping[int, Any]], metric: str) -> str:
    """A metric on slices of the test rows. Records of earlier versions lack some slices."""
    seed = min(seed for records in found.values() for seed in records)
    slices = {row: {seed: record["result"]["slices"] for seed, record in of.items()} for row, of in found.items()}
    names = [name for name in SLICES if any(name in one for of_row in slices.values() for one in of_row.values())]
    numbers = {
        name: {row: of[seed][name]["rows"] for row, of in slices.items() if name in of.get(seed, {})} for name in names
    }
    # What is rare depends on the rows that were trained on.
    alike = {name: len(set(counts.values())) == 1 for name, counts in numbers.items()}
    rows = []
    for row, of_row in slices.items():
        cells = []
        for name in names:
            parts = [one[name] for one in of_row.values() if name in one]
            known = [part.get(metric) for part in parts if part["rows"] >= FEW_ROWS]
            values = [value for value in known if value is not None]
            cell = f"{statistics.fmean(values):.4f}" if values else ""
            cells.append(cell if alike[name] or row not in numbers[name] else f"{cell} ({numbers[name][row]:,})")
        rows.append([row, *cells])
    header = [
        f"{name} ({next(iter(numbers[name].values())):,} of seed {seed})" if alike[name] else f"{name} (of seed {seed})"
        for name in names
    ]
    return markdown([f"{METRICS[metric]} on rows of", *header], rows) + "\n"


def aligned(line: Mapping[str, Any], folder: Path) -> str:
    """How alike the views of the fields are before and after pretraining."""
    fields, picture = line["fields"], Path("results") / "alignment.png"
    (folder / picture).parent.mkdir(parents=True, exist_ok=True)
    matrices = {f"{name} pretraining": line[name] for name in ("before", "after")}
    draw_matrices(matrices, fields, fields, folder / picture)
    own = {name: statistics.fmean(matrix[i][i] for i in range(len(fields))) for name, matrix in matrices.items()}
    others = {
        name: statistics.fmean(v for i, values in enumerate(matrix) for j, v in enumerate(values) if i != j)
        for name, matrix in matrices.items()
    }
    rows = [[name, f"{own[name]:.3f}", f"{others[name]:.3f}"] for name in matrices]
    explained = (
        "Linear CKA between a field's feature embeddings (rows) and the mean state of a field's tokens (columns) over "
        f"{line['rows']:,} test rows: 1 where one tells the other up to a turn and a scale."
    )
    table = markdown(["", "own field", "other fields"], rows)
    return f"## Alignment of fields\n\n{explained}\n\n{table}\n\n![Alignment of fields]({picture})\n"


def machines(records: Iterable[Any]) -> str:
    """What the runs ran on, and how many ran there."""
    counts = Counter(machine_name(record["run"]) for record in records if "run" in record)
    return "## Machines\n\n" + "\n".join(f"- {name}: {number} runs" for name, number in counts.items()) + "\n"


def repeated(lines: Sequence[Any], runs: Mapping[str, Any]) -> str:
    """How recorded runs came out once more, by the model and the machines; and each that left its interval."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for line in lines:
        record = runs[line["key"]]
        settings = {} if isinstance(record["model"], str) else record["model"].get("last", {})
        model = ", ".join([name_of(record["model"]), *(f"{name}: {value}" for name, value in settings.items())])
        group = f"{model}; {record['split']}", machine_name(record["run"]), line["machine"]
        groups.setdefault(group, []).append(line)
    rows = []
    for group, found in groups.items():
        over = [line["again"] - line["auc"] for line in found]
        inside = sum(map(is_inside, found))
        rows.append([*group, len(found), inside, f"{statistics.fmean(over):+.4f}", f"{max(map(abs, over)):.4f}"])
    header = ["model; split", "first on", "again on", "runs", "in its 95% interval", "AUC higher by", "at most"]
    outside = [
        "- {key}: {auc:.4f}, again {again:.4f}, outside {interval[0]:.4f} to {interval[1]:.4f}.\n".format_map(line)
        for line in lines
        if not is_inside(line)
    ]
    return "\n".join([f"## Run again\n\n{AGAIN}\n{markdown(header, rows)}\n", *outside])


def is_inside(line: Mapping[str, Any]) -> bool:
    """Whether a run that was run again landed within the interval that it had."""
    low, high = line["interval"]
    found: bool = low <= line["again"] <= high
    return found


def spread(values: Sequence[float], ratio: float) -> str:
    """Mean and half of its 95% interval over seeds; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4f}"
    if len(values) < 2:
        return mean
    found = paired_t(values, ratio)
    return f"{mean} ± {found.high - found.difference:.4f}"


def shown_p(p: float) -> str:
    """A probability as tables show it."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


if __name__ == "__main__":
    run_script(main)
