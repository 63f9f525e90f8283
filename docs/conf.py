"""How Sphinx builds the site: `make docs`."""

import dataclasses
import inspect
import os
import re
from pathlib import Path

from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

import flip_hf

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "flip_hf"
author = "The flip_hf authors"
copyright = author
version = release = flip_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# A fence without a language is no program.
highlight_language = "none"

# Single backticks in docstrings are code, and a link where they name something that the API reference describes.
default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# "Attributes:" is a list, as the members are described too.
napoleon_use_ivar = True

myst_heading_anchors = 4

html_theme = "furo"
html_title = f"flip_hf {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

# Pages of the repository that the site shows too, by the page that includes them.
SHOWN = {
    ROOT / "benchmarks" / "README.md": DOCS / "benchmarks.md",
    ROOT / "CHANGELOG.md": DOCS / "project" / "changelog.md",
    ROOT / "CONTRIBUTING.md": DOCS / "project" / "contributing.md",
    ROOT / "CODE_OF_CONDUCT.md": DOCS / "project" / "code_of_conduct.md",
    ROOT / "SECURITY.md": DOCS / "project" / "security_policy.md",
    ROOT / "README.md": DOCS / "index.md",
}


def repository() -> str | None:
    """The address of the repository's files: set by GitHub's machines, and unknown elsewhere."""
    if "GITHUB_REPOSITORY" not in os.environ:
        return None
    return "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/blob/{GITHUB_SHA}".format(**os.environ)


def mend_links(text: str, source: Path, page: Path) -> str:
    """The text of a Markdown file with links that work in the site.

    Pages link to each other by relative paths, which also work on GitHub. A link that leaves docs/ leads to the page
    that includes the file, or else to the repository. Where that has no address, only the link's text stays.

    Args:
        text: Markdown.
        source: the file that the text is from.
        page: the page of docs/ that shows the text.
    """

    def mend(link: re.Match[str]) -> str:
        shown, target, anchor = link["shown"], (source.parent / link["path"]).resolve(), link["anchor"] or ""
        target = SHOWN.get(target, target)
        if target.is_relative_to(DOCS):
            return f"[{shown}]({os.path.relpath(target, page.parent)}{anchor})"
        address = repository()
        return f"[{shown}]({address}/{target.relative_to(ROOT)}{anchor})" if address else shown

    link = re.compile(r"(?<!!)\[(?P<shown>[^\]\[]*)\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else link.sub(mend, part) for part in parts)


def _read_page(app, name, content):
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md":
        content[0] = mend_links(content[0], page, page)


def _read_included(app, path, parent, content):
    source = (DOCS / path).resolve()
    if source in SHOWN:
        content[0] = mend_links(content[0], source, SHOWN[source])


# The docstrings of attributes and properties, which napoleon would cut at their first colon.
_uncut: dict[str, list[str]] = {}


def _keep_docstring(app, what, name, object_, options, lines):
    if what in ("attribute", "property", "data"):
        _uncut[name] = list(lines)


def _mend_docstring(app, what, name, object_, options, lines):
    if name in _uncut:
        sections = GoogleDocstring(_uncut.pop(name), app.config, app, "method", name, object_, options)
        lines[:] = sections.lines()
    if what == "class" and object_.__module__.endswith(".settings"):
        lines[:] = [_with_default(line, object_) for line in lines]
    # reStructuredText wants something between code and a letter: `row`s.
    lines[:] = [re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def _with_default(line, settings):
    """A line `:param name: text` with the type and the default of that setting."""
    found = re.match(r":param (\w+): ", line)
    known = {field.name: field for field in dataclasses.fields(settings)}
    if found is None or (field := known.get(found[1])) is None:
        return line
    kind = stringify_annotation(field.type, "smart").replace("~", "")
    kind = re.sub(r"(?<![\w'])(\w+\.)+(?=\w)", "", kind)
    default = "" if field.default is dataclasses.MISSING else f", default ``{field.default!r}``"
    return f"{found[0]}(``{kind}``{default}) {line[found.end() :]}"


def _real_signature(app, what, name, object_, options, signature, returned):
    if what == "class" and object_.__module__ == "flip_hf.runs.settings":
        return "", None
    # transformers wraps its classes, whose signature then is (*args, **kwargs).
    if what == "class" and signature is not None and signature.startswith("(*args"):
        arguments = inspect.signature(object_.__init__)
        own = [parameter for parameter in arguments.parameters.values() if parameter.name != "self"]
        arguments = arguments.replace(parameters=own, return_annotation=inspect.Signature.empty)
        return stringify_signature(arguments, unqualified_typehints=True), None
    # Sphinx can't read the default that dataclasses show for a factory.
    return (signature or "").replace("<factory>", "...") or signature, returned


def setup(app):
    app.connect("source-read", _read_page)
    app.connect("include-read", _read_included)
    app.connect("autodoc-process-docstring", _keep_docstring, priority=100)
    app.connect("autodoc-process-docstring", _mend_docstring, priority=900)
    app.connect("autodoc-process-signature", _real_signature)
