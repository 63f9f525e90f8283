"""Renders docs/results.md, model_cards/ and the chart of README from the records in results/ and nothing else.

python examples/experiments/report.py
"""

import argparse
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drawings import draw_learning, draw_matrices
from experiments import ALIGNED, RESULTS, SHOWN_DATA, Table, find_run, load_tables, name_of
from markdown_tables import markdown
from measures import RARE, by_seed, differences, measured, shown_p, spread, test_ratio
from recorded import CPU, device_name, machine_name, read_lines
from significance import paired_t
from summary import chart, findings, load_summary

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
# The AUC of fewer rows says nothing.
FEW_ROWS = 50
TITLE = """# Results

`make report` writes this page from the records in `results/`. No number was entered by hand.

## Results in one minute

The numbers are mean test AUCs over the seeds. *p* is the p-value of a paired t-test over the seeds, not corrected for
the number of comparisons.
"""
CHART_SHOWN = """![{}](pictures/results-light.svg)

The number beside each name is the model's mean AUC. The bar is its difference from the first model in the
panel. *Id dropout*: training hides the ids of films in half of the rows. *Text features*: each film has a precomputed
vector of its text; on the item split, ids are dropped as well.
"""
INTRODUCTION = f"""## How to read the tables

**Data.** Unless a table names other data, the rows are MovieLens-100K without the ratings of 3. The split is 8:1:1.
Each seed has its own *random* and *item* split. The *time* split is the same for all seeds.

**Values.** Each value is the mean over the seeds, ± half of the 95% confidence interval (Student's t). On the random
and the item split, the seeds share rows; the interval is corrected for that (Nadeau and Bengio 2003). On the other
splits all seeds have the same rows, and the interval shows the variance of training alone.

**Comparisons.** Differences are the first model minus the second, on the same seed and rows. *p* comes from a paired
t-test over the seeds with the same correction for shared rows, but none for the number of comparisons. *DeLong +/-*
counts the seeds on which DeLong's test on the test rows finds the first AUC higher, or lower, at p < 0.05.

**Slices.** A user or item is *unseen* if it has no training row, and *rare* if it has 1 to {RARE} training rows.
*Frequent* rows have neither an unseen nor a rare user or item. *Seen* rows have no unseen user or item. Seeds with
fewer than {FEW_ROWS} rows in a slice do not count.

**Minutes.** The median wall time of a run, pretraining and other required runs included. Other runs shared the
machine. If some seeds ran on a GPU, the table shows the number of seeds for each device.

**Machines.** Some rows ran on another machine than the rows that they are compared with.
[Repeated runs](#repeated-runs) shows how much that changes the AUC. This effect adds to the variance between seeds.

**Settings.** See `examples/configs` and `examples/experiments/models.yaml`. To make the records again, run
`make experiments`; it continues where it stopped.
"""
AGAIN = """Some recorded runs were repeated, together with the runs that they start from (`results/again.jsonl`). On the
same machine the results are identical. On another machine dropout draws other random numbers, and rounding differs.
"""
HEADINGS = {"random": "Random split", "time": "Time split", "item": "Item split", "months": "Split by months"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="of README.md, docs/ and model_cards/")
    arguments = parser.parse_args()
    runs = {line["key"]: line for line in read_lines(RESULTS / "runs.jsonl")}
    comparisons = {(line["first"], line["second"]): line for line in read_lines(RESULTS / "comparisons.jsonl")}
    folder, tables = arguments.folder / "docs", load_tables()
    summary = load_summary(tables)
    first = [TITLE, findings(tables, runs, summary["findings"])]
    if words := chart(tables, runs, summary["chart"], folder / "pictures"):
        first.append(CHART_SHOWN.format(words))
        describe_chart(arguments.folder / "README.md", words)
    parts = [INTRODUCTION, *(part for table in tables for part in render(table, runs, comparisons, folder))]
    pretraining = find_run(ALIGNED, SHOWN_DATA, "random", 0).key
    parts += [aligned(line, folder) for line in read_lines(RESULTS / "alignment.jsonl") if line["key"] == pretraining]
    parts.append(machines(runs.values()))
    if again := read_lines(RESULTS / "again.jsonl"):
        parts.append(repeated(again, runs))
    (folder / "results.md").write_text("\n".join([*first, contents(parts), *parts]), encoding="utf-8")
    for name, model in CARD_MODELS.items():
        place = arguments.folder / "model_cards" / name
        if (key := find_run(model, SHOWN_DATA, "random", 0).key) in runs:
            card(runs[key], runs, place)
        elif place.exists():
            print(f"model_cards/{name} is the card of a run that is no longer recorded: run {model} again or delete it")


def describe_chart(page: Path, words: str) -> None:
    """Puts the words into the page as the alternative text of the chart."""
    text = page.read_text(encoding="utf-8")
    image = re.compile(r'(<img src="docs/pictures/results-light\.svg" alt=")[^"]*')
    page.write_text(image.sub(lambda found: found[1] + words, text), encoding="utf-8")


def contents(parts: Iterable[str]) -> str:
    """The list of the sections that the parts of a page begin."""
    titles = re.findall(r"^## (.+)$", "\n".join(parts), re.MULTILINE)
    return "".join(["## Contents\n\n", *(f"- [{title}](#{anchor(title)})\n" for title in titles)])


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def render(table: Table, runs: Mapping[str, Any], comparisons: Mapping[Any, Any], folder: Path) -> list[str]:
    """A table's sections, one for each split; its pictures go into `folder`."""
    parts = [f"## {table.title}\n\n{table.caption.strip()}\n"]
    for split in table.splits:
        every = {row: by_seed(table, row, split, runs) for row in table.rows}
        found = {row: records for row, records in every.items() if records}
        if not found:
            parts.append(f"### {HEADINGS[split]}\n\nNo run of this split is recorded yet.\n")
            continue
        parts.append(f"### {HEADINGS[split]}\n")
        parts.append(models_table(found, runs, table))
        compared = [name for name in recorded_metrics(found, "test") if name in COMPARED]
        tests = [
            comparison(f"{first} vs. {second}", every[first], every[second], runs, comparisons, compared)
            for first, others in table.compare.items()
            for second in others
            if every[first].keys() & every[second].keys()
        ]
        if tests:
            header = ["first vs. second", "seeds", "AUC", "95% CI", "p", "DeLong +/-"]
            header += [cell for name in compared if name != "auc" for cell in (METRICS[name], "p")]
            parts.append(markdown(header, tests) + "\n")
        if table.shows == "test":
            parts += [slices_table(found, name) for name in ("auc", "uauc") if has_slices(found, name)]
        if open_rows := [row for row, records in every.items() if len(records) < table.seeds]:
            parts.append(f"These rows have fewer than {table.seeds} recorded seeds: {'; '.join(open_rows)}.\n")
        first_seed = {row: found[row][0] for row in table.pictures if 0 in found.get(row, {})}
        if first_seed:
            parts += pictures_of(first_seed, f"{table.name}-{split}", folder)
    return parts


def pictures_of(records: Mapping[str, Any], name: str, folder: Path) -> list[str]:
    """Draws how the models of a table's rows learn and how well they are calibrated; the Markdown that shows it."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    bins = {row: record["result"]["test_calibration"] for row, record in records.items()}
    shown = []
    draw_calibration(bins, folder / "results" / f"calibration-{name}.png")
    caption = "Calibration: click rates against predicted probabilities, seed 0"
    shown.append(f"![{caption}](results/calibration-{name}.png)\n")
    if panels := panels_of(records):
        draw_learning(panels, folder / "results" / f"learning-{name}.png")
        caption = (
            "Learning curves, seed 0. The training LogLoss is a moving mean. For separately trained towers, the AUC is "
            "that before the gate is fitted."
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
        f"{name} ({next(iter(numbers[name].values())):,} rows, seed {seed})"
        if alike[name]
        else f"{name} (rows, seed {seed})"
        for name in names
    ]
    return markdown([f"{METRICS[metric]} on slice", *header], rows) + "\n"


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
        f"Linear CKA over {line['rows']:,} test rows, between a field's feature embeddings (matrix rows) and the mean "
        "hidden state of a field's tokens (columns). It is 1 if one is a rotated and scaled copy of the other."
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
    header = [
        "model; split",
        "first run on",
        "repeated on",
        "runs",
        "in the 95% CI",
        "mean AUC change",
        "largest change",
    ]
    said = "- {key}: AUC {auc:.4f}, repeated {again:.4f}, outside the CI from {interval[0]:.4f} to {interval[1]:.4f}.\n"
    outside = [said.format_map(line) for line in lines if not is_inside(line)]
    return "\n".join([f"## Repeated runs\n\n{AGAIN}\n{markdown(header, rows)}\n", *outside])


def is_inside(line: Mapping[str, Any]) -> bool:
    """Whether a run that was run again landed within the interval that it had."""
    low, high = line["interval"]
    found: bool = low <= line["again"] <= high
    return found


if __name__ == "__main__":
    run_script(main)
