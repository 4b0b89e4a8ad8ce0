"""The reference of the library, written from its docstrings while the book is built.

    ```{api} regkit.io regkit.files
    ```

shows these modules, and those below them: of each its docstring, a table of its public names, and
every name with its signature and docstring. A name that a package hands on (`regkit.models.create`)
is shown there and not again where it is defined. `public_names` says what is public: `__all__`, or
else the functions and classes that the module defines, without an underscore in front.

    ```{command-line}
    ```

shows all commands of `regkit` with their options.

Docstrings are written in plain text with `code` in single backticks and sections such as "Args:";
`restructured` turns them into what Sphinx reads. And on every page inline code that names a public
object becomes a link to its entry, see `Links`; the sources of the pages stay as they are.
"""

import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the regkit of this folder, whatever is installed

COMMANDS = "regkit.cli"  # shown by `command-line`

# what is public ---------------------------------------------------------------------------------


def modules(name: str) -> list[str]:
    """A module and all modules below it; of "regkit" itself no others."""
    module = importlib.import_module(name)
    if name == "regkit" or not hasattr(module, "__path__"):
        return [name]
    return [name, *(m for below in _below(module) for m in modules(below))]


def _below(package: ModuleType) -> list[str]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [f"{package.__name__}.{name}" for name in names if not name.startswith("_")]


def all_modules() -> list[str]:
    """Every public module of the library, packages before what is in them."""
    below = _below(importlib.import_module("regkit"))
    return ["regkit", *(name for module in below for name in modules(module))]


def public_names(module_name: str) -> list[str]:
    """The public names of a module, in order: `__all__` without modules, or what it defines."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        names = [name for name in module.__all__ if not name.startswith("_")]
        return [name for name in names if not isinstance(getattr(module, name), ModuleType)]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module_name
        and hasattr(value, "__qualname__")
    ]


@cache
def entries() -> dict[str, str]:
    """Every full name of a public object, and the shortest one, under which it has its entry."""
    full_names = [
        (f"{module}.{name}", getattr(importlib.import_module(module), name))
        for module in all_modules()
        if module != COMMANDS
        for name in public_names(module)
    ]
    shortest: dict[int, str] = {}
    for full_name, value in sorted(full_names, key=lambda pair: pair[0].count(".")):
        shortest.setdefault(id(value), full_name)
    return {full_name: shortest[id(value)] for full_name, value in full_names}


def shown(module: str) -> list[str]:
    """The public names that have their entry with this module, and not with a package above it."""
    full_names = [f"{module}.{name}" for name in public_names(module)]
    return [name for name in full_names if entries()[name] == name]


def documented_methods(entry: str) -> list[str]:
    """The public methods and properties of a class that have a docstring of their own."""
    module, _, name = entry.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    if not inspect.isclass(value):
        return []
    return [
        name
        for name, member in vars(value).items()
        if not name.startswith("_")
        and (callable(member) or isinstance(member, property | staticmethod | classmethod))
        and member.__doc__
    ]


# docstrings -------------------------------------------------------------------------------------

SECTIONS = {"Args:": "Arguments", "Returns:": "Returns", "Raises:": "Raises", "Yields:": "Yields"}
FIELD = re.compile(r"(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*): (.*)")
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
# What reStructuredText would take for markup in plain text; *word* stays, it is emphasis here too.
MARKUP = re.compile(r"""(?<![\w*])\*\w+\*(?![\w*])|[\\*|"]|(?<=\w)_(?!\w)|--+""")


def restructured(lines: list[str], names: set[str] = frozenset()) -> list[str]:
    """A docstring of the library as reStructuredText.

    Sections and paragraphs of "name: text" become lists with the names in front, indented
    paragraphs code.

    Args:
        lines: of the docstring, its indentation removed.
        names: of the arguments or fields of the object, which a paragraph may explain.
    """
    result: list[str] = []
    for block in _blocks(lines):
        title = SECTIONS.get(block[0])
        if title:
            result += [f":{title}:", *_indented(_fields(_dedented(block[1:])) or [""]), ""]
        elif block[0].startswith("    "):
            result += ["::", "", *block, ""]
        elif block[0].startswith(">>>"):
            result += [*block, ""]
        elif (match := FIELD.match(block[0])) and set(match[1].split(", ")) <= names:
            result += [*_fields(block), ""]
        else:
            result += [*_marked(block), ""]
    return result


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs: what stands between empty lines, and each section by itself."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if not line.strip() or line in SECTIONS:
            blocks.append([])
        if line.strip():
            blocks[-1].append(line)
    return [block for block in blocks if block]


def _dedented(lines: list[str]) -> list[str]:
    return inspect.cleandoc("\n".join(["", *lines])).splitlines()


def _indented(lines: list[str]) -> list[str]:
    return [f"   {line}" if line else "" for line in lines]


def _fields(lines: list[str]) -> list[str]:
    """Lines of "name: text", continued by indented ones, as a list; other text as it is."""
    if not (lines and FIELD.match(lines[0])):
        return _marked(lines)
    result: list[str] = []
    for line in lines:
        match = FIELD.match(line)
        if match:
            terms = ", ".join(f"``{name}``" for name in match[1].split(", "))
            result += [terms, f"   {match[2]}"]
        else:
            result.append(f"   {line.strip()}")
    return _marked(result)


def _marked(lines: list[str]) -> list[str]:
    """`code` as reStructuredText marks it, all other signs as themselves."""
    text = "\n".join(lines)
    result, end = "", 0
    for match in CODE.finditer(text):
        before, after = text[end : match.start()], text[match.end() : match.end() + 1]
        result += MARKUP.sub(_as_itself, before)
        space = "\\ " if result and not result[-1].isspace() else ""
        result += f"{space}``{match[2]}``" + ("\\ " if after and not after.isspace() else "")
        end = match.end()
    return (result + MARKUP.sub(_as_itself, text[end:])).splitlines()


def _as_itself(match: re.Match) -> str:
    sign = match[0]
    return sign if len(sign) > 2 and sign[0] == sign[-1] == "*" else "".join(f"\\{c}" for c in sign)


def _explained(value: Any) -> set[str]:
    """The names of the fields and arguments of an object."""
    names = set(getattr(value, "__annotations__", {}))
    try:
        names |= set(inspect.signature(value).parameters)
    except (TypeError, ValueError):  # a property, or data
        pass
    return names


def comment(name: str) -> list[str]:
    """The text of the comment "#: text" over data, here or in a module of this package."""
    home, _, short = name.rpartition(".")
    for module in modules(home):
        if lines := ModuleAnalyzer.for_module(module).find_attr_docs().get(("", short)):
            return lines
    return []


def _process_docstring(app, what, name, obj, options, lines):
    lines[:] = restructured(comment(name) if what == "data" else lines, _explained(obj))


def _process_signature(app, what, name, obj, options, signature, result):
    # Sphinx lays out what Python can read; a private field is no argument for a user.
    text = (signature or "").replace("<factory>", "...")
    return re.sub(r", _\w+: .*? = \.\.\.", "", text) or None, result


def _skip_member(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which their class explains."""
    return True if type(obj).__name__ == "_tuplegetter" else None


# pages ------------------------------------------------------------------------------------------


class Api(SphinxDirective):
    """The entries of modules, each in a section of its own."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        names = [name for argument in self.arguments[0].split() for name in modules(argument)]
        text = "\n".join(line for name in names for line in self.section(name))
        return _parsed(self, text)

    def section(self, module: str) -> list[str]:
        """Markdown for one module."""
        names = shown(module)
        # a function of this name has taken the module's place in its package
        hidden = ["   :no-index:"] if module in entries() else []
        lines = [f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", *hidden, ""]
        if len(names) > 1:
            lines += [".. autosummary::", "   :nosignatures:", ""]
            lines += [*(f"   {name.removeprefix(module + '.')}" for name in names), ""]
        for name in names:
            value = getattr(importlib.import_module(module), name.rpartition(".")[2])
            kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
            options = {"class": ["   :members:"], "data": ["   :no-value:"]}.get(kind, [])
            lines += [f".. auto{kind}:: {name}", *options, ""]
        return [*lines, "```", ""]


def _parsed(directive: SphinxDirective, markdown: str) -> list[nodes.Node]:
    """The nodes of a text with headings, in place of a directive."""
    parent = nodes.section()
    parent.document = directive.state.document
    lines = StringList(markdown.splitlines(), "reference")
    nested_parse_with_titles(directive.state, lines, parent)
    return parent.children


class CommandLine(SphinxDirective):
    """All commands with their arguments and options, in a section each."""

    def run(self):
        import typer

        command = typer.main.get_command(importlib.import_module(COMMANDS).app)
        text = "\n".join(_command(command, typer.Context(command, info_name="regkit")))
        return _parsed(self, text)


def _command(command: Any, context: Any, depth: int = 2) -> list[str]:
    """Markdown for one command and those below it."""
    name = context.command_path
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    rows = [record for record in records if record]
    lines = [f"{'#' * depth} {name}", "", *(command.help or "").splitlines(), ""]
    lines += ["```text", usage, "```", ""]
    lines += ["::::{list-table}", ":widths: 30 70", ":class: regkit-options", ""]
    lines += [line for name, text in rows for line in (f"* - `{name}`", f"  - {text or ''}")]
    lines += ["::::", ""]
    for below in getattr(command, "commands", {}).values():
        inner = type(context)(below, info_name=below.name, parent=context)
        lines += _command(below, inner, depth + 1)
    return lines


# links ------------------------------------------------------------------------------------------

# Names of these modules may stand alone in a chapter; those of others have the module in front.
ALONE = ("spatial", "losses", "metrics", "models", "data", "transform", "training")
NAME = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?")


@cache
def chapter_names() -> dict[str, str]:
    """What a chapter may write, and the entry that it means: in full, `spatial.warp`, or `warp`."""
    names = {module: module for module in all_modules() if module not in ("regkit", COMMANDS)}
    names |= entries()
    for entry in set(entries().values()):
        names |= {f"{entry}.{method}": f"{entry}.{method}" for method in documented_methods(entry)}
    for full_name, entry in list(names.items()):
        if full_name.count(".") > 1:  # `data` alone may be anything
            names.setdefault(full_name.removeprefix("regkit."), entry)
    alone: dict[str, set[str]] = {}
    for module in ("regkit", *(f"regkit.{room}" for room in ALONE)):
        for name in public_names(module):
            alone.setdefault(name, set()).add(entries()[f"{module}.{name}"])
    for name, meant in alone.items():
        if len(meant) == 1:
            names.setdefault(name, *meant)
    return names


class Links(SphinxTransform):
    """Inline code that names a public object leads to its entry.

    In a chapter the first time on the page, and not where a cell of the page gives the name to
    something else. In the reference each time; a name without a module is then one of the same
    module or package, and never an argument.
    """

    default_priority = 400
    left_alone = (nodes.reference, nodes.title, addnodes.pending_xref)

    def apply(self, **kwargs: Any) -> None:
        if self.env.docname == "book/reference/command_line":
            return  # `train` there is a command
        reference = self.env.docname.startswith("book/reference/")
        taken = set() if reference else _assigned(self.document)
        seen: set[str] = set()
        for literal in list(self.document.findall(nodes.literal)):
            match = NAME.fullmatch(literal.astext())
            if match is None or match[1] in taken or self._stays(literal):
                continue
            name = match[1]
            entry = _meant_in_reference(literal, name) if reference else chapter_names().get(name)
            if entry and (reference or entry not in seen):
                seen.add(entry)
                target = {"refdomain": "py", "reftype": "obj", "reftarget": entry}
                link = addnodes.pending_xref("", refexplicit=True, refwarn=True, **target)
                literal.replace_self(link)
                link += literal

    def _stays(self, node: nodes.Node) -> bool:
        """Whether a node is in a link or a heading already, or in the output of a cell."""
        while node := node.parent:
            if isinstance(node, self.left_alone) or "cell_output" in node.get("classes", ()):
                return True
            if isinstance(node, nodes.document):
                return False
        return False


def _assigned(document: nodes.document) -> set[str]:
    """Names that the code on a page gives to something of its own."""
    code = "\n".join(block.astext() for block in document.findall(nodes.literal_block))
    names = re.findall(r"\b(?:def|class|as|for) +(\w+)", code)
    for left in re.findall(r"^ *([\w, ]+?) *=(?!=)", code, re.MULTILINE):
        names += left.replace(",", " ").split()
    return set(names)


def _arguments(signature: addnodes.desc_signature) -> set[str]:
    return {
        part.astext()
        for argument in signature.findall(addnodes.desc_parameter)
        for part in argument.children[:2]  # the name, or a star and the name
        if isinstance(part, addnodes.desc_sig_name)
    }


def _meant_in_reference(literal: nodes.literal, name: str) -> str | None:
    """The entry that code in a docstring means, if any: never an argument of the function."""
    if "." in name and name in chapter_names():
        return chapter_names()[name]
    node = literal.parent
    while not isinstance(node, nodes.section):
        if isinstance(node, addnodes.desc) and name in _arguments(node[0]):
            return None
        node = node.parent
    module = node.next_node(nodes.title).astext()
    package = module.rpartition(".")[0]
    return entries().get(f"{module}.{name}") or entries().get(f"{package}.{name}")


def setup(app):
    app.add_transform(Links)
    app.add_directive("api", Api)
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip_member)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
