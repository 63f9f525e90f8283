"""The plan of the experiments: the models of models.yaml, the tables of tables/, and the runs that they need."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from click_data import EXAMPLES, ClickData, find_data
from jobs import Job, flags

from flip_hf.standard_json import settings_json

Model: TypeAlias = str | Mapping[str, Any]

HERE = Path(__file__).resolve().parent
RESULTS = EXAMPLES.parent / "results"
# The model whose alignment of fields is recorded.
ALIGNED = "pretraining"
# The data of that model, and of the models that have cards.
SHOWN_DATA = "movielens-100k"


@dataclass(frozen=True)
class PlannedRun:
    """A run of `pretrain.py` or `finetune.py` that a table needs.

    Attributes:
        model: the model's name in models.yaml; or a mapping with that name as `model`, and with further settings:
            `first` for the run that the others start from, such as the backbone, `last` for the last run, and `teacher`
            for that of its teacher.
        data: the data set.
        split: how the rows are split, one of `flip_hf.data.splits.SPLITS`.
        seed: the seed of the split and of the run.
        script: "pretrain" or "finetune".
        settings: settings that the script's configuration file does not have.
        after: the run whose model this run starts from.
        teacher: the run whose model this run learns from.
    """

    model: Model
    data: ClickData
    split: str
    seed: int
    script: str
    settings: Mapping[str, Any]
    after: "PlannedRun | None"
    teacher: "PlannedRun | None" = None

    @cached_property
    def key(self) -> str:
        """Identifies the run by its settings, its data and the runs before it. Its record names the code's revision."""
        base = _parsed(self.data.config(self.script).read_text(encoding="utf-8"))
        depends = [base, self.data.identity, self.settings, self.after.key if self.after else None]
        if self.teacher is not None:
            depends.append(self.teacher.key)
        digest = hashlib.sha256(settings_json(depends, sort_keys=True).encode()).hexdigest()[:8]
        return f"{name_of(self.model)}-{self.split}-{self.seed}-{digest}"

    @property
    def stages(self) -> list["PlannedRun"]:
        """The runs that lead to this one, each after those that it needs, and this one at the end."""
        before = [stage for run in (self.after, self.teacher) if run is not None for stage in run.stages]
        return [*{stage.key: stage for stage in before}.values(), self]

    def folder(self, runs: Path) -> Path:
        """The folder of the run's files."""
        return runs / self.key

    def job(self, runs: Path, files: Path | None = None) -> Job:
        """The job that executes the run.

        Args:
            runs: where runs write.
            files: the folder of the data set's files; only for a data set of files.
        """
        settings = {**self.data.settings(self.split, self.seed, files), "training.seed": self.seed, **self.settings}
        for setting, run in (("pretrained", self.after), ("teacher", self.teacher)):
            if run is not None:
                settings[setting] = str(run.folder(runs) / "model")
        places = ["--config", str(self.data.config(self.script)), "--output_dir", str(self.folder(runs))]
        program = str(EXAMPLES / f"{self.script}.py")
        return Job(self.folder(runs) / "run.json", [program, *places, "--resume", "true", *flags(settings)])


@dataclass(frozen=True)
class Table:
    """A table of docs/results.md.

    Attributes:
        name: the name of its file without the ending.
        title: the heading.
        caption: the text below the heading.
        data: the name of its data in data.yaml.
        splits: the splits that it shows.
        seeds: the number of seeds.
        rows: name of a row -> its model, or several models whose probabilities are averaged.
        compare: row -> the rows that it is tested against.
        pictures: the rows whose learning curves and calibration are drawn.
        shows: "test"; or "validation" for a table of models that were tried, whose test metrics are not shown.
        speeds: whether it shows how many rows a second were trained on and scored.
    """

    name: str
    title: str
    caption: str
    data: str
    splits: Sequence[str]
    seeds: int
    rows: Mapping[str, Model | Sequence[Model]]
    compare: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pictures: Sequence[str] = ()
    shows: str = "test"
    speeds: bool = False

    def __post_init__(self) -> None:
        if self.shows not in ("test", "validation"):
            raise ValueError(f"table {self.name!r} shows {self.shows!r}; it must be 'test' or 'validation'")
        if self.shows == "validation" and (self.compare or self.pictures):
            raise ValueError(f"table {self.name!r} shows validation rows; compare and pictures need test rows")
        compared = (row for others in self.compare.values() for row in others)
        named = {*self.pictures, *self.compare, *compared}
        if unknown := sorted(named - set(self.rows)):
            raise ValueError(f"table {self.name!r} names {', '.join(map(repr, unknown))}, which are none of its rows")

    def only(self, rows: Sequence[str]) -> "Table":
        """The table with these of its rows, which has the comparisons among them."""
        compare = {row: [other for other in others if other in rows] for row, others in self.compare.items()}
        return replace(
            self,
            rows={row: model for row, model in self.rows.items() if row in rows},
            compare={row: others for row, others in compare.items() if row in rows},
            pictures=[row for row in self.pictures if row in rows],
        )

    def models(self, row: str) -> list[Model]:
        """The model of a row, or the models that it averages."""
        shown = self.rows[row]
        return [shown] if isinstance(shown, str | Mapping) else list(shown)

    def runs(self, row: str, split: str, seed: int) -> list[PlannedRun]:
        """The run of a row, or the runs that it averages."""
        return [find_run(model, self.data, split, seed) for model in self.models(row)]


def load_tables(names: Sequence[str] = ()) -> list[Table]:
    """The tables of these names, or all.

    Raises:
        ValueError: there is no such table.
    """
    there = {path.stem: path for path in sorted((HERE / "tables").glob("*.yaml"), key=_place)}
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"there is no table {unknown[0]!r}: {', '.join(there)}")
    paths = [there[name] for name in names] or list(there.values())
    return [Table(path.stem, **yaml.safe_load(path.read_text(encoding="utf-8"))) for path in paths]


def _place(path: Path) -> tuple[float, str]:
    """A table's place among the others: by the number that its name begins with, those without one at the end."""
    number = path.stem.split("-")[0]
    return int(number) if number.isdigit() else float("inf"), path.name


def find_run(model: Model, data: str, split: str, seed: int) -> PlannedRun:
    """The run of a model on the data of that name.

    Raises:
        ValueError: there is no such model, or no such data.
    """
    models = _parsed((HERE / "models.yaml").read_text(encoding="utf-8"))
    name = name_of(model)
    if name not in models:
        raise ValueError(f"{name!r} is not in models.yaml: {', '.join(models)}")
    found = models[name]
    own = {} if isinstance(model, str) else model
    first, last = own.get("first", {}), own.get("last", {})
    after = teacher = None
    if "after" in found:
        after = find_run(_with(found["after"], first=first), data, split, seed)
    if "teacher" in found:
        teacher = find_run(_with(found["teacher"], first=first, last=own.get("teacher", {})), data, split, seed)
    settings = {**found["settings"], **({} if after else first), **last}
    return PlannedRun(model, data_of(data), split, seed, found["script"], settings, after, teacher)


def data_of(name: str) -> ClickData:
    """The data of that name in data.yaml.

    Raises:
        ValueError: there is none.
    """
    return find_data(name, HERE / "data.yaml")


def _with(name: str, **parts: Mapping[str, Any]) -> Model:
    """The model of that name with further settings."""
    given = {part: settings for part, settings in parts.items() if settings}
    return {"model": name, **given} if given else name


def key_of(runs: Sequence[PlannedRun]) -> str:
    """The key of a run, or of the average of several."""
    return " + ".join(run.key for run in runs)


@cache
def _parsed(text: str) -> Any:
    """The content of YAML text; do not change it. A report parses the same files a thousand times."""
    return yaml.safe_load(text)


def name_of(model: Model) -> str:
    """Its name in models.yaml."""
    return model if isinstance(model, str) else model["model"]
