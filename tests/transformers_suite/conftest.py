"""Keeps the suite to the runs that ask for it, and tells what each class passed and why tests were skipped."""

import re
from collections import Counter, defaultdict

import pytest
from transformers_suite import suite
from transformers_suite.skipping import MODELS_BUILT, OURS

MARKER = "transformers_suite"
_reports: dict[str, list] = defaultdict(list)


def pytest_ignore_collect(collection_path, config):
    if not collection_path.name.startswith("test_"):
        return None
    # The modules import what only `make test-transformers` fetches.
    if MARKER not in config.option.markexpr.replace(f"not {MARKER}", ""):
        return True
    if not suite.is_fetched():
        raise pytest.UsageError(f"transformers' tests are not in {suite.folder()}: run make test-transformers")
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == MARKER:
            item.add_marker(MARKER)


def pytest_runtest_logreport(report):
    if f"/{MARKER}/" in report.nodeid and (report.when != "setup" or report.skipped):
        _reports[report.nodeid].append(report)


def pytest_terminal_summary(terminalreporter):
    """The tables of tests/transformers_suite/README.md, in Markdown."""
    if not _reports:
        return
    outcomes, skips = defaultdict(Counter), defaultdict(Counter)
    for nodeid, reports in _reports.items():
        _, cls, test = nodeid.replace("[", "::").rstrip("]").split("::")[:3]
        parts = [report for report in reports if hasattr(report, "context")]
        outcome, reason = "passed", ""
        # A test of several parts was skipped if none of its parts was run.
        skipped = [report for report in parts or reports if report.skipped]
        if any(report.failed for report in reports):
            outcome = "failed"
        elif skipped and len(skipped) == len(parts or skipped):
            reason = skipped[0].longrepr[2].removeprefix("Skipped: ")
            outcome = "skipped by us" if reason.startswith(OURS) else "skipped by transformers"
        elif dict(reports[-1].user_properties).get(MODELS_BUILT) == 0:
            outcome = "passed without a model"
        outcomes[cls][outcome] += 1
        if reason:
            general = re.sub(r"<class '[\w.]+'>|\bFlip\w+( class)?", "this class", reason.removeprefix(OURS))
            skips[outcome, general][re.sub(r"(?<!flash_attn)_\d+(_\w+)?$", "", test)] += 1
    columns = ("passed", "passed without a model", "skipped by transformers", "skipped by us", "failed")
    write = terminalreporter.write_line
    write(f"\n| class | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for cls, numbers in outcomes.items():
        write(f"| {cls} | {' | '.join(str(numbers[column]) for column in columns)} |")
    for by in columns[2:4]:
        write(f"\n| {by} | number | tests |\n|---|---|---|")
        for (outcome, reason), tests in sorted(skips.items()):
            if outcome == by:
                write(f"| {reason} | {tests.total()} | {', '.join(f'`{test}`' for test in sorted(tests))} |")
