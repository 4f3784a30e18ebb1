"""A griffe extension for the API pages: docstrings are written in transformers' style, and `modeling/` is installed as
`mqt_llava.modeling`."""

import re
from pathlib import Path

import griffe


ROOT = Path(__file__).parents[1]
# "name (`int` or `list[int]`, *optional*, defaults to 5):" below Args, "`type`: text" or "[`Type`]: text" below Returns and Raises
ARGUMENT = re.compile(r"^    (\*{0,2}\w+) \(((?:`[^`]*`|[^`()])*)\)[:.,]", re.MULTILINE)
RESULT = re.compile(r"^    \[?(`[^`]+`(?:(?:,| or) `[^`]+`)*)\]?: ", re.MULTILINE)
RAISES = re.compile(r"(?<=^Raises:\n)(?:    .*\n?)+", re.MULTILINE)
# "[`Name`]", "[`~module.Name`]" or "`Name`"
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![(\[])|(?<![`\[])`([\w.]+)`(?![`\]])")
# The full names of what the API pages document, by the last part
DOCUMENTED = {
    path.rpartition(".")[2]: path
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
}


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        if pkg.path != "mqt_llava":
            return
        names = ("extensions", "docstring_parser", "docstring_options", "lines_collection", "modules_collection")
        shared = {name: getattr(loader, name) for name in names}
        init = ROOT / "modeling" / "__init__.py"
        folder = griffe.visit("modeling", init, "", parent=pkg, **shared)
        pkg.set_member("modeling", folder)
        for file in sorted(init.parent.glob("*_mqt_llava.py")):
            module = griffe.visit(file.stem, file, file.read_text(encoding="utf-8"), parent=folder, **shared)
            folder.set_member(file.stem, module)

        rewrite(pkg)


def rewrite(parent):
    """Convert the docstrings of everything in a module or class."""
    for child in parent.members.values():
        if child.is_alias:
            continue
        if child.is_module:  # where names in types are looked up
            for name, path in DOCUMENTED.items():
                if name not in child.members:
                    child.set_member(name, griffe.Alias(name, path))
        if child.docstring:
            function = child.members.get("__init__", child)
            defaults = {p.name: p.default for p in getattr(function, "parameters", ())}
            if any(str(decorator.value).startswith("dataclass") for decorator in getattr(child, "decorators", ())):
                defaults = {name: getattr(field, "value", None) for name, field in child.members.items()}
            defaults = {name for name, default in defaults.items() if default not in (None, "None")}
            child.docstring.value = google_style(child.docstring.value, defaults)
        rewrite(child)


def google_style(text: str, defaults: set[str]) -> str:
    """Convert a docstring from transformers' style to what griffe reads, with types as plain text and names on the API pages as links.
    `defaults` are shown from the signature."""

    def argument(match):
        kind = plain(match[2])
        return f"    {match[1]} ({kind.partition(', optional')[0] if match[1] in defaults else kind}):"

    text = RAISES.sub(lambda match: re.sub(r"^    (?! |\[?`\w+`\]?:)", " " * 8, match[0], flags=re.MULTILINE), text)
    text = ARGUMENT.sub(argument, text)
    text = RESULT.sub(lambda match: f"    {plain(match[1])}: ", text)
    return REFERENCE.sub(lambda match: link(match[1] or match[2]), text)


def link(name: str) -> str:
    """A link to a class, function or method on the API pages, by its short or full name; any other name as code only."""
    short = name.rpartition(".")[2] if name in DOCUMENTED.values() else name
    owner, _, member = short.partition(".")
    if owner not in DOCUMENTED:
        return f"`{name}`"
    return f"[`{short}`][{DOCUMENTED[owner]}{member and '.' + member}]"


def plain(kind: str) -> str:
    """Types without their backticks, as an annotation; with strings among them as text, since griffe would remove their quotes."""
    joined = (
        kind.replace(" or ", ", or ")
        if '"' in kind.partition(", *optional*")[0]
        else re.sub(r"`\]?(?:, | or )\[?`", "` | `", kind)
    )
    return re.sub(r"\[?`~?([^`]+)`\]?", r"\1", joined).replace("*optional*", "optional")
