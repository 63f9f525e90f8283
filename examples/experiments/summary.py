"""What a reader sees first: the findings at the head of docs/results.md, and the bar chart of README.

summary.yaml names the rows of tables that each of them compares. The records give the numbers and the verdicts.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import experiments
import yaml
from drawings import Bar, draw_bars
from experiments import Table
from measures import by_seed, differences, measured, shown_p, test_ratio
from significance import paired_t

# A difference whose p is below this is called significant.
SIGNIFICANT = 0.05
CHART = "AUC above or below the backbone alone, with 95% confidence intervals"


def load_summary(tables: Iterable[Table]) -> Mapping[str, Any]:
    """The content of summary.yaml.

    Raises:
        ValueError: it names a table that does not exist, or a row that its table does not have.
    """
    path = experiments.HERE / "summary.yaml"
    loaded: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = [place for panel in loaded["chart"] for place in panel["rows"].values()]
    named += [(one["table"], row) for one in loaded["findings"] for pair in one["pairs"] for row in pair["rows"]]
    by_name = {table.name: table for table in tables}
    for table, row in named:
        if table not in by_name:
            raise ValueError(f"{path.name}: there is no table {table!r}; the tables are {', '.join(by_name)}")
        if row not in by_name[table].rows:
            raise ValueError(f"{path.name}: table {table!r} has no row {row!r}")
    return loaded


def findings(tables: Iterable[Table], runs: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown list with one sentence for each comparison. Comparisons without records are left out.

    Args:
        tables: all tables.
        runs: the records of the runs, by key.
        found: the findings of summary.yaml: `topic`, `table`, `split` and `pairs`, each of which names two rows of the
            table (`rows`) and says how to call them in a sentence (`names`).
    """
    by_name = {table.name: table for table in tables}
    lines = []
    for one in found:
        table, split = by_name[one["table"]], one["split"]
        sentences = []
        for pair in one["pairs"]:
            first, second = (by_seed(table, row, split, runs) for row in pair["rows"])
            if sentence := verdict(pair["names"], first, second, runs):
                sentences.append(sentence)
        if sentences:
            lines.append(f"- **{one['topic']}.** {' '.join(sentences)}\n")
    return "".join(lines)


def verdict(names: Sequence[str], first: Mapping[int, Any], second: Mapping[int, Any], runs: Mapping[str, Any]) -> str:
    """Says by how much the first model's AUC is above or below the second's; empty with fewer than two common seeds."""
    seeds = [seed for seed in first if seed in second]
    over = differences(first, second, "auc")
    if len(over) < 2:
        return ""
    test = paired_t(over, test_ratio(first, runs))
    values = [statistics.fmean(measured({seed: of[seed] for seed in seeds}, "test", "auc")) for of in (first, second)]
    one, other = names
    p = shown_p(test.p)
    facts = f"{values[0]:.4f} against {values[1]:.4f}; {len(over)} seeds, p {p if p.startswith('<') else f'= {p}'}"
    if test.p >= SIGNIFICANT:
        return f"{one} does not differ significantly from {other}: {test.difference:+.4f} AUC ({facts})."
    verb = "beats" if test.difference > 0 else "is worse than"
    return f"{one} {verb} {other} by {abs(test.difference):.4f} AUC ({facts})."


def chart(tables: Iterable[Table], runs: Mapping[str, Any], panels: Iterable[Mapping[str, Any]], folder: Path) -> str:
    """Draws the chart for light and for dark pages: `results-light.svg` and `results-dark.svg`.

    Args:
        tables: all tables.
        runs: the records of the runs, by key.
        panels: the chart of summary.yaml: for each panel a `title`, the `split` and `rows`, which maps a label to a
            table and its row. The first row is the one that the others are compared with.
        folder: where to write the pictures.

    Returns:
        What the chart shows, in words; empty if there was nothing to draw.
    """
    by_name = {table.name: table for table in tables}
    drawn = {}
    for panel in panels:
        found = {
            label: by_seed(by_name[name], row, panel["split"], runs) for label, (name, row) in panel["rows"].items()
        }
        if len(bars := _bars(found, runs)) > 1:
            drawn[panel["title"]] = bars
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
        for theme in ("light", "dark"):
            draw_bars(drawn, CHART, folder / f"results-{theme}.svg", dark=theme == "dark")
    shown = (f"{title}: {', '.join(f'{bar.name} {bar.auc:.4f}' for bar in bars)}." for title, bars in drawn.items())
    return " ".join(["Bar chart of test AUC.", *shown]) if drawn else ""


def _bars(found: Mapping[str, Mapping[int, Any]], runs: Mapping[str, Any]) -> list[Bar]:
    """The bars of a panel. Rows that have not all seeds of the first row are left out."""
    base = next(iter(found.values()))
    bars = []
    for label, records in found.items():
        if len(records) < 2 or not records.keys() >= base.keys():
            continue
        mean = statistics.fmean(measured(records, "test", "auc"))
        if records is base:
            bars.append(Bar(label, mean, 0.0, 0.0, 0.0))
            continue
        over = paired_t(differences(records, base, "auc"), test_ratio(records, runs))
        bars.append(Bar(label, mean, over.difference, over.low, over.high))
    return bars
