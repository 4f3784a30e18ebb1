"""How the API pages read the package: docstrings are written as in transformers, and `modeling/` is installed as
`mqt_llava.modeling`."""

import re
from pathlib import Path

import griffe


ROOT = Path(__file__).parents[1]
# "name (`int` or `list[int]`, *optional*, defaults to 5):" below Args, "`type`: text" or "[`Type`]: text" below Returns and Raises
ARGUMENT = re.compile(r"^    (\*{0,2}\w+) \(((?:`[^`]*`|[^`()])*)\)[:.,]", re.MULTILINE)
RESULT = re.compile(r"^    \[?(`[^`]+`(?:(?:,| or) `[^`]+`)*)\]?: ", re.MULTILINE)
RAISES = re.compile(r"(?<=^Raises:\n)(?:    .*\n?)+", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")


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
    """The docstrings of a module or class and of everything in it."""
    for child in parent.members.values():
        if child.is_alias:
            continue
        if child.docstring:
            function = child.members.get("__init__", child)
            defaults = {p.name for p in getattr(function, "parameters", ()) if p.default not in (None, "None")}
            child.docstring.value = google_style(child.docstring.value, defaults)
        rewrite(child)


def google_style(text: str, defaults: set[str]) -> str:
    """A docstring of transformers' style as griffe reads it, with types as plain text. `defaults` are shown from the signature."""

    def argument(match):
        kind = plain(match[2])
        return f"    {match[1]} ({kind.partition(', optional')[0] if match[1] in defaults else kind}):"

    text = RAISES.sub(lambda match: re.sub(r"^    (?! |\[?`\w+`\]?:)", " " * 8, match[0], flags=re.MULTILINE), text)
    text = ARGUMENT.sub(argument, text)
    text = RESULT.sub(lambda match: f"    {plain(match[1])}: ", text)
    return REFERENCE.sub(r"`\1`", text)


def plain(kind: str) -> str:
    return re.sub(r"\[?`~?([^`]+)`\]?", r"\1", kind).replace("*optional*", "optional")
