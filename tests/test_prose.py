"""The documentation: short sentences, links that lead somewhere, one term for one thing, and every page in the site."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flip_hf
from flip_hf.backbones import BACKBONES
from flip_hf.metrics import METRICS
from flip_hf.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Pages outside docs/ whose links are checked too.
OTHERS = [
    ROOT / name
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CODE_OF_CONDUCT.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "benchmarks/README.md",
        "model_cards/README.md",
        "results/README.md",
        "tests/transformers_suite/README.md",
    )
]
MAX_WORDS = 35
# Words that the glossary avoids for one thing, and that may be written of another.
OTHER_THINGS = {
    *("attribute", "branch", "bucket", "column", "example", "instance", "interactions", "job", "request", "sample"),
    *("settings", "span", "subset", "task", "text model"),
}
# One spelling, beside the words of the glossary.
SPELLINGS = {
    r"catalogues": "catalog",
    r"click-logs?|clicklogs?": "click log",
    r"fine-tun\w+": "finetune",
    r"id models?|id-based|ID-Based": "ID-based model",
    r"pre-train\w+": "pretrain",
    r"optimizer": "optimiser",
    r"tokeniz(e[ds]?|ing)": "tokenise",
    r"HuggingFace|Huggingface": "Hugging Face",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Markdown without fenced code and comments; their lines stay, empty."""
    return re.sub(
        r"^(?P<fence>```+).*?^(?P=fence)`*$|<!--.*?-->",
        lambda found: "\n" * found[0].count("\n"),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs and list items of Markdown, without code, headings, tables and HTML."""
    lines: list[str] = []
    for line in [*without_code(text).splitlines(), ""]:
        skipped = not line.strip() or re.match(r"\s*(\||#|<|\[\^|={3,}|-{3,}$)", line)
        if skipped or re.match(r"\s*([-*+]|\d+\.)\s", line):
            if lines:
                yield " ".join(lines)
            lines = []
        if not skipped:
            lines.append(re.sub(r"^\s*([-*+]|\d+\.)\s+", "", line).strip())


def sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown. A link is the words that it shows; a piece of inline code is one word."""
    for paragraph in paragraphs(text):
        shown = re.sub(r"!?\[([^\]\[]*)\]\([^)]*\)", r"\1", re.sub(r"(`+)[^`]+\1", "CODE", paragraph))
        yield from (part for part in re.split(r"(?<=[.!?])[)\"*_]*\s+", shown) if part)


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    shown = re.sub(r"!?\[([^\]\[]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: list[str] = []
    for heading in re.findall(
        r"^#{1,6}\s+(.*?)\s*$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE
    ):
        name = slug(heading)
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)


def test_the_counting_itself():
    text = (
        "# Head\n\nOne `a b` two.\nThree [four five](x.md)! Six\n\n| a | b |\n\n- seven e\n- eight\n\n```\ncode\n```\n"
    )
    found = list(sentences(text))
    assert [words(sentence) for sentence in found] == [3, 3, 1, 2, 1]
    assert slug("Where `x` and [y](z.md) go: to A_b") == "where-x-and-y-go-to-a_b"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_sentences_are_short(page):
    long = [found for found in sentences(page.read_text(encoding="utf-8")) if words(found) > MAX_WORDS]
    assert not long, "\n".join(f"{words(found)} words: {found}" for found in long)


def avoided_words() -> dict[str, str]:
    """What the glossary says to avoid, as patterns, with the term to write instead."""
    found = {}
    for line in (DOCS / "concepts" / "glossary.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            found |= {f"{re.escape(word)}s?": cells[0] for word in re.findall(r"`([^`]+)`", cells[2])}
    for word in OTHER_THINGS:
        del found[f"{re.escape(word)}s?"]
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_one_term_for_one_thing(page):
    avoided = avoided_words()
    assert len(avoided) > 20
    prose = re.sub(r"(`+)[^`]+\1|\]\([^)]*\)", " ", without_code(page.read_text(encoding="utf-8")))
    found = [
        f"{match[0]!r}: write {wanted!r}"
        for wrong, wanted in {**avoided, **SPELLINGS}.items()
        for match in re.finditer(rf"\b({wrong})\b", prose)
    ]
    assert not found, found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    for path in re.findall(r"(?:src|srcset)=\"(?!\w+:)([^\"]+)\"", without_code(page.read_text(encoding="utf-8"))):
        assert (page.parent / path).is_file(), f"{name_of(page)}: {path}"
    for path, anchor in re.findall(
        r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", without_code(page.read_text(encoding="utf-8"))
    ):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {path}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {path}#{anchor}"


def test_mentioned_pages_are_there():
    """In messages, docstrings, comments and other pages."""
    for path in sorted(
        [
            *ROOT.glob("*.md"),
            *(p for d in ("flip_hf", "examples", "benchmarks", "tests") for p in (ROOT / d).rglob("*.*")),
        ]
    ):
        if path.suffix not in {".py", ".md", ".yaml"}:
            continue
        for name in re.findall(r"(?<![\w/.])docs/[\w/]+\.md\b", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{name_of(path)}: {name}"


def test_every_page_is_in_the_table_of_contents():
    listed = []
    for page in PAGES:
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            entries = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith(":")]
            listed += [(page.parent / f"{entry}.md").resolve() for entry in entries]
    assert sorted([*listed, DOCS / "index.md"]) == PAGES


def documented() -> set[str]:
    """Names that a directive of the API reference documents, and the modules that it documents whole."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    return {name.split(".")[-1] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, flags=re.MULTILINE)}


def test_the_api_reference_has_every_public_name():
    found = documented()
    assert set(flip_hf.__all__) <= found
    assert {model.__name__ for model in BACKBONES.values()} <= found
    assert {objective.__module__.split(".")[-1] for objective in OBJECTIVES.values()} <= found
    assert set(METRICS) <= found
