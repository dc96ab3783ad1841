"""The directive `public` of the pages in docs/reference: names and their docstrings.

griffe reads the source and imports nothing, so a build needs neither a framework nor Horovod. A
line in the directive is one of

    ef_horovod.theory              a module: its docstring, and all that it exports
    ef_horovod.compressors         a room: what `ef_horovod` exports of it
    ef_horovod.exchange.base.Exchange        a single name

Docstrings are Markdown with the sections of Google's style.
"""

from __future__ import annotations

import ast
import logging
import re
from functools import cache
from pathlib import Path
from textwrap import dedent, indent

import griffe
from docutils.nodes import Node
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

ROOT = Path(__file__).parents[2]
ADAPTERS = ("ef_horovod.torch", "ef_horovod.tensorflow")
MODULES = (
    *ADAPTERS,
    "ef_horovod.cost",
    "ef_horovod.server",
    "ef_horovod.testing",
    "ef_horovod.theory",
)
_SECTION = re.compile(
    r"^(Args|Attributes|Raises|Returns|Yields|Examples?|References|Wire format):\n"
    r"((?:    .*(?:\n|\Z)|\n)+)",
    re.MULTILINE,
)


logging.getLogger("griffe").setLevel(logging.ERROR)  # that `__all__` is filled at run time


@cache
def package() -> griffe.Module:
    """The package as its source says."""
    return griffe.load("ef_horovod", search_paths=[ROOT], allow_inspection=False)


def at(path: str) -> griffe.Object:
    """The object with a dotted name, as its definition says."""
    found = package().modules_collection[path]
    return found.final_target if found.is_alias else found


def exports(module: str) -> dict[str, griffe.Object]:
    """What a module exports, by the name that users write, without the modules in it."""
    if module in ("ef_horovod", *ADAPTERS):  # their lists are filled at run time
        stub = ast.parse(ROOT.joinpath(*module.split("."), "__init__.pyi").read_text())
        imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
        places = {a.asname: f"{node.module}.{a.name}" for node in imports for a in node.names}
        places.pop(None, None)  # the star: all of `ef_horovod`
    else:
        places = {name: f"{module}.{name}" for name in at(module).exports or ()}
    found = {f"{module}.{name}": at(place) for name, place in places.items()}
    return {name: thing for name, thing in found.items() if not thing.is_module}


def named(line: str) -> dict[str, griffe.Object]:
    """What a line of the directive stands for, by the name that users write."""
    if line in MODULES:
        return exports(line)
    if not at(line).is_module:
        return {line: at(line)}
    everything = exports("ef_horovod").items()
    return {name: thing for name, thing in everything if thing.path.startswith(f"{line}.")}


def members(thing: griffe.Object) -> dict[str, griffe.Object]:
    """Public methods and properties that a class or a private base of it defines."""
    if not thing.is_class:
        return {}
    private = [base for base in thing.mro() if base.name.startswith("_")]
    found = {
        name: part for kind in (*reversed(private), thing) for name, part in kind.members.items()
    }
    return {
        name: part
        for name, part in found.items()
        if not name.startswith("_") and (part.is_function or "property" in part.labels)
    }


def undocumented(name: str) -> list[str]:
    """A public name, and its methods, as far as neither they nor a base have a docstring."""
    thing = at(name)
    missing = [] if thing.docstring else [name]
    for part, member in members(thing).items():
        inherited = [base.members[part] for base in thing.mro() if part in base.members]
        if not any(one.docstring for one in (member, *inherited)):
            missing.append(f"{name}.{part}")
    return missing


def markdown(thing: griffe.Object) -> str:
    """The docstring, with its sections as fields."""

    def field(section: re.Match[str]) -> str:
        title, text = section[1], dedent(section[2]).strip()
        if title.startswith("Example"):
            text = f"```{'pycon' if '>>>' in text else 'python'}\n{text}\n```"
        elif title in ("Args", "Attributes", "Raises"):
            text = re.sub(r"^(\w.*?):", r"- `\1`:", text, flags=re.MULTILINE)
        return f":{title}:\n{indent(text, '    ')}\n\n"

    return _SECTION.sub(field, thing.docstring.value) if thing.docstring else ""


def entry(name: str, thing: griffe.Object) -> str:
    """A public object, and its members that have a docstring."""
    module, _, short = name.rpartition(".")
    kind = "class" if thing.is_class else "function"
    parts = [member(part, one) for part, one in members(thing).items() if one.docstring]
    signature = thing.signature(name=short) or short
    return directive(6, kind, signature, f":module: {module}", markdown(thing), *parts)


def member(name: str, thing: griffe.Object) -> str:
    """A method or property."""
    if not thing.is_function:
        return directive(5, "property", name, "", markdown(thing))
    option = ":classmethod:" if "classmethod" in thing.labels else ""
    return directive(5, "method", thing.signature(name=name), option, markdown(thing))


def directive(fence: int, kind: str, argument: str, option: str, *content: str) -> str:
    """A directive of Sphinx's Python domain."""
    return "\n".join([f"{'`' * fence}{{py:{kind}}} {argument}", option, "", *content, "`" * fence])


class Public(SphinxDirective):
    """Shows what its lines stand for."""

    has_content = True

    def run(self) -> list[Node]:
        text = []
        for line in self.content:
            text += [markdown(at(line))] if line in MODULES else []
            for name, thing in named(line).items():
                text.append(entry(name, thing))
                for missing in undocumented(name):
                    place = self.get_location()
                    getLogger(__name__).warning("%s has no docstring", missing, location=place)
        return self.parse_text_to_nodes("\n\n".join(text))


def setup(app: Sphinx) -> None:
    app.add_directive("public", Public)
