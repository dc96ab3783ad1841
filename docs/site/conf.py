"""Settings of Sphinx; `launch/docs` builds the site.

Its source is the root of the repository, so that links between Markdown files, and to files that
are no pages, lead to the same places here as on a code host. Nothing is downloaded.
"""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

from docutils.nodes import document
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # reference.py

_about = configparser.ConfigParser()
_about.read(ROOT / "setup.cfg")
project = _about["metadata"]["name"]
release = _about["metadata"]["version"]

extensions = ["myst_parser", "reference"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md"]
exclude_patterns = [".*", "build"]
suppress_warnings = ["myst.header"]  # pages may leave a level of headings out
myst_enable_extensions = ["fieldlist"]  # of docstrings
myst_heading_anchors = 4
myst_ref_domains = ["std"]  # a link is a file or a heading, never a name of the reference
smartquotes = False  # quotes are code more often than not

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_copyright = False
html_additional_pages = {"index": "index.html"}
templates_path = ["templates"]
python_maximum_signature_line_length = 90

# The sidebar. A page that is missing here is an error.
CONTENTS = {
    "Use": """
        training torch-distributed methods compressors server cost-model when-it-helps cluster
        docker gpu timeline promises
    """,
    "Reference": """
        reference/README reference/torch reference/tensorflow reference/server
        reference/compressors reference/methods reference/simulation reference/exchanges
        reference/cost reference/theory reference/testing
    """,
    "Results": """
        results/README results/demo results/bandwidth results/ef21 results/ef21-w
        results/ef21-variants results/doublesqueeze results/ecx results/hard-threshold
        results/saddle results/server results/learning
    """,
    "Design": """
        design design/building design/compression design/contracts design/exchanges
        design/extensions design/server design/tensorflow design/torch design/transports
        wire-format
    """,
    "Project": "../CONTRIBUTING ../CHANGELOG",
}


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the sidebar's table behind the text of the first page, where it is not shown."""
    if page == root_doc:
        for caption, names in CONTENTS.items():
            pages = "\n".join(f"/docs/{name}" for name in names.split())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def folders_as_text(app: Sphinx, tree: document) -> None:
    """Links to folders, which a code host lists and this site does not, become plain text."""
    folder = Path(tree["source"]).parent
    for link in list(tree.findall(pending_xref)):
        if link["reftype"] == "myst" and (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("doctree-read", folders_as_text)
