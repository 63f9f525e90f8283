"""Imports run one way; registries and public names are what the documentation says."""

import ast
import re
import sys
from pathlib import Path

import pytest

import flip_hf

PACKAGE = Path(flip_hf.__file__).parent

# For each part, the parts of the package that it may import. A part is a module or a folder of the package.
ALLOWED = {
    "fields": set(),
    "field_checks": {"fields"},
    "outputs": set(),
    "standard_json": set(),
    "fetch": set(),
    "metrics": set(),
    "progress": set(),
    "data": {"fields", "field_checks", "fetch", "standard_json", "text_towers"},
    "checkpoint": {"fields", "data", "standard_json"},
    "text_towers": {"fields"},
    "configuration_flip": {"fields", "checkpoint", "text_towers"},
    "growth": {"fields", "nn"},
    "grown_texts": {"data", "growth"},
    "nn": {"fields"},
    "backbones": {"fields", "nn"},
    "objectives": {"fields", "configuration_flip", "nn"},
    "inputs": set(),
    "text_encoder": {"fetch", "checkpoint"},
    "click_loss": {"fields"},
    "click_training": {"nn"},
    "pretrained_model": {
        "fields",
        "field_checks",
        "configuration_flip",
        "fetch",
        "growth",
        "checkpoint",
        "hub",
        "nn",
        "text_encoder",
        "text_towers",
    },
    "towers": {"fields", "configuration_flip", "inputs", "outputs", "nn", "backbones", "pretrained_model"},
    "vector_cache": set(),
    "encoder_files": {"configuration_flip", "nn", "text_encoder"},
    "text_vectors": {
        "configuration_flip",
        "encoder_files",
        "fetch",
        "data",
        "checkpoint",
        "nn",
        "progress",
        "standard_json",
        "text_encoder",
        "towers",
        "vector_cache",
    },
    "modeling_flip": {
        "fields",
        "configuration_flip",
        "inputs",
        "outputs",
        "growth",
        "nn",
        "objectives",
        "click_loss",
        "click_training",
        "pretrained_model",
        "towers",
    },
    "processing_flip": {
        "fields",
        "field_checks",
        "configuration_flip",
        "fetch",
        "growth",
        "grown_texts",
        "data",
        "checkpoint",
        "hub",
        "standard_json",
        "text_vectors",
    },
    "scoring": {"data", "outputs", "progress"},
    "training": {"fields", "data", "metrics", "nn", "progress", "scoring", "hub", "standard_json"},
    "tower_vectors": {"data", "modeling_flip", "processing_flip", "text_towers"},
    "pipeline": {
        "fields",
        "outputs",
        "data",
        "modeling_flip",
        "processing_flip",
        "scoring",
        "text_towers",
        "tower_vectors",
    },
    "export": {"fields", "modeling_flip", "scoring"},
    "hub": {"checkpoint", "metrics", "standard_json"},
    "integrations": {"data", "modeling_flip", "pipeline", "processing_flip"},
    "runs": {
        "fields",
        "field_checks",
        "configuration_flip",
        "fetch",
        "nn",
        "backbones",
        "data",
        "modeling_flip",
        "processing_flip",
        "progress",
        "scoring",
        "training",
        "hub",
        "standard_json",
    },
    "cli": {"fields", "runs"},
    "__init__": {
        "fields",
        "configuration_flip",
        "modeling_flip",
        "processing_flip",
        "data",
        "pipeline",
        "training",
        "hub",
    },
}


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("flip_hf.")}
    return parts


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported_parts(path) - {part} <= ALLOWED[part]


def test_every_part_has_a_rule():
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert parts == set(ALLOWED)


def test_public_names_resolve():
    for name in flip_hf.__all__:
        assert getattr(flip_hf, name).__name__ == name


def test_the_configuration_needs_no_torch_of_its_own():
    imports = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE / "configuration_flip.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert "torch" not in imports


def test_nothing_writes_or_reads_a_pickle():
    forbidden = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & forbidden, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "torch.save"}, path


def test_json_is_written_in_one_place():
    # `json.dumps` writes NaN, which no other JSON reader takes.
    root = PACKAGE.parent
    programs = [path for folder in ("flip_hf", "examples", "benchmarks") for path in (root / folder).rglob("*.py")]
    writers = {path for path in programs if re.search(r"json\.dumps?\b|JSONEncoder", path.read_text(encoding="utf-8"))}
    assert writers == {PACKAGE / "standard_json.py"}


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "examples").glob("*.py")), ids=lambda path: path.name)
def test_signals_are_handled_before_a_script_imports_the_package(path):
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if not is_quick_import(node)]
    assert path.name == "signals_first.py" or ast.unparse(nodes[1]) == "import signals_first"


def is_quick_import(node: ast.stmt) -> bool:
    """Whether it imports from Python's own library alone."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return bool(names) and all(name.partition(".")[0] in sys.stdlib_module_names for name in names)
