"""Mutation testing: changes the code at random places and reports the changes that no test notices.

    python tests/mutants.py [--mutations 300] [--seed 0] [--least 0.9] [--jobs 2] [SOURCE ...]

mutmut makes the changes ("mutants") and runs the tests. It forks the tests of each mutant from one process that has
imported torch, and it runs only tests that call the changed function. Everything happens in temporary copies of the
repository. The exit status is 1 if a smaller share than `--least` of the mutants is killed.

Below a survivor stands the reason why no test can or should notice it, if `tests/mutants_survivors.yaml` has one.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import chdir
from pathlib import Path
from time import monotonic

import yaml

REPOSITORY = Path(__file__).parents[1]
REASONS = Path(__file__).parent / "mutants_survivors.yaml"
COPIED = ["flip_hf", "tests", "examples", "pyproject.toml", "setup.cfg"]

# A source file is tested by its own test files alone: a distant test that happens to fail does not test it.
SUITES = {
    ("tests/test_objectives.py", "tests/test_gather.py"): [
        f"flip_hf/objectives/{name}.py" for name in ("base", "icl", "mlm", "mtm", "text_mlm")
    ],
    (
        "tests/test_collators.py",
        "tests/test_masking.py",
        "tests/test_kinds.py",
        "tests/test_text_towers.py::test_a_text_is_cut_between_fields_and_nothing_is_lost",
    ): [
        "flip_hf/data/collators.py",
        "flip_hf/data/collator_checks.py",
        "flip_hf/data/encoded_rows.py",
        "flip_hf/data/masking.py",
        "flip_hf/data/sampling.py",
    ],
    ("tests/test_history.py", "tests/reported_cases/test_histories.py"): ["flip_hf/data/history.py"],
    (
        "tests/test_schema.py",
        "tests/test_one_spelling.py",
        "tests/test_kinds.py",
        "tests/reported_cases/test_values.py",
    ): ["flip_hf/data/schema.py", "flip_hf/data/spelling.py"],
    ("tests/test_gather.py",): ["flip_hf/nn/gather.py"],
    ("tests/test_loop.py",): ["flip_hf/training/loop.py", "flip_hf/training/meter.py"],
    ("tests/test_metrics.py",): [
        f"flip_hf/metrics/{name}.py" for name in ("auc", "ece", "gauc", "intervals", "logloss", "relaimpr", "uauc")
    ],
    ("tests/test_optimization.py",): ["flip_hf/training/optimization.py"],
    ("tests/test_processing.py",): [
        "flip_hf/data/dataset_encoding.py",
        "flip_hf/data/groups.py",
        "flip_hf/data/row_batches.py",
    ],
    ("tests/test_scoring.py",): ["flip_hf/scoring.py"],
}

# A section of setup.cfg in a copy. torch must not be used before a fork, so the forks come from a server that imports
# it and computes nothing.
SETTINGS = """
[mutmut]
source_paths = flip_hf
also_copy = examples
only_mutate =
    {sources}
pytest_add_cli_args_test_selection =
    {tests}
pytest_add_cli_args =
    -pno:cacheprovider
    -m=not slow and not distributed
    --hypothesis-profile=mutants
process_isolation = forkserver
timeout_constant = 2.0
use_git_change_detection = false
"""

KILLED = ("killed", "timeout", "segfault")
# mutmut calls this a timeout, too, but pytest could not run the tests: it does not find ids with a backslash.
NOT_RUN = 255


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="only these source files")
    parser.add_argument("--mutations", type=int, default=300, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--least", type=float, default=0.9, help="smallest share of killed mutants that passes")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tested at a time")
    arguments = parser.parse_args()
    started = monotonic()
    known = [source for sources in SUITES.values() for source in sources]
    if unknown := set(arguments.sources) - set(known):
        parser.error(f"{min(unknown)} is not one of {', '.join(known)}")

    reasons = read_reasons()

    outcomes: dict[str, str] = {}
    unexplained = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = {
            tests: copy(Path(folder) / str(i), tests, sources) for i, (tests, sources) in enumerate(SUITES.items())
        }
        drawn = draw(copies[next(iter(SUITES))], arguments.sources or known, arguments.mutations, arguments.seed)
        for tests, place in copies.items():
            names = [name for source in SUITES[tests] for name in drawn.get(source, [])]
            if names:
                found = run(place, names, SUITES[tests], arguments.jobs)
                outcomes |= found
                for name in names:
                    if found[name] not in KILLED:
                        shown = mutmut(place, "show", name)
                        reason = reasons.get(change(shown))
                        unexplained += reason is None
                        print(shown.rstrip(), f"Reason: {reason or 'none yet'}", sep="\n", end="\n\n", flush=True)
    score = print_table(drawn, outcomes)
    print(f"{unexplained} survivors without a reason; seed {arguments.seed}, {monotonic() - started:.0f} s")
    return 0 if score >= arguments.least else 1


def copy(place: Path, tests: tuple[str, ...], sources: list[str]) -> Path:
    """Copies what the tests need, with mutmut's settings."""
    for name in COPIED:
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
    with (place / "setup.cfg").open("a") as file:
        file.write(SETTINGS.format(sources="\n    ".join(sources), tests="\n    ".join(tests)))
    return place


def draw(place: Path, sources: list[str], number: int, seed: int) -> dict[str, list[str]]:
    """The names of mutants, drawn uniformly from all mutants of the sources, by source."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    # mutmut reads its settings where it is called.
    with chdir(place):
        every = [
            (source, get_mutant_name(Path(source), name))
            for source in sources
            for name in mutate_file_contents(source, Path(source).read_text()).mutant_names
        ]
    drawn: dict[str, list[str]] = {}
    for source, name in random.Random(seed).sample(every, min(number, len(every))):
        drawn.setdefault(source, []).append(name)
    return drawn


def run(place: Path, names: list[str], sources: list[str], jobs: int) -> dict[str, str]:
    """The outcome of each mutant."""
    mutmut(place, "run", "--max-children", str(jobs), *names)
    from mutmut.stats import status_by_exit_code

    codes = {}
    for source in sources:
        codes |= json.loads((place / "mutants" / f"{source}.meta").read_text())["exit_code_by_key"]
    if not_run := [name for name in names if codes[name] == NOT_RUN]:
        raise RuntimeError(
            f"pytest could not run the tests of {', '.join(not_run)}; look at the ids of their parameters"
        )
    return {name: status_by_exit_code[codes[name]] for name in names}


def mutmut(place: Path, *arguments: str) -> str:
    """What mutmut prints when it is called in a copy of the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-5000:]}")
    return done.stdout


def change(shown: str) -> tuple[str, str, str]:
    """The source file, and the code before and after a change, from what `mutmut show` prints; white space apart."""
    header, *lines = (line for line in shown.splitlines() if line[:3] == "---" or line[:1] in ("-", "+"))
    before, after = (" ".join(line[1:] for line in lines[1:] if line[0] == sign) for sign in "-+")
    return header.split()[1], normalized(before), normalized(after)


def read_reasons() -> dict[tuple[str, str, str], str]:
    """The reasons of survivors, by `change`."""
    reasons = {}
    for source, survivors in yaml.safe_load(REASONS.read_text()).items():
        code = normalized((REPOSITORY / source).read_text())
        for survivor in survivors:
            before = normalized(survivor["before"])
            if before not in code:
                sys.exit(f"{REASONS}: {source} does not hold {before!r} any more; remove this reason")
            reasons[source, before, normalized(survivor["after"])] = survivor["reason"]
    return reasons


def normalized(code: str) -> str:
    return " ".join(code.split())


def print_table(drawn: dict[str, list[str]], outcomes: dict[str, str]) -> float:
    """Prints the outcomes by source; returns the share that was killed."""
    print("| Source | Mutants | Killed | Timed out | Survived |\n|---|---|---|---|---|")
    total: Counter[str] = Counter()
    for source, names in [*sorted(drawn.items()), ("All", list(outcomes))]:
        counts = Counter(outcomes[name] for name in names)
        killed = sum(counts[outcome] for outcome in KILLED)
        print(f"| {source} | {len(names)} | {killed} | {counts['timeout']} | {len(names) - killed} |")
        total = counts
    score = sum(total[outcome] for outcome in KILLED) / total.total()
    print(f"{score:.1%} killed")
    return score


if __name__ == "__main__":
    sys.exit(main())
