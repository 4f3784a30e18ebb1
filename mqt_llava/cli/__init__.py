"""The command line `mqt-llava`: one module for each command."""

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from .. import __version__
from .ask import ask
from .convert import convert
from .cost import cost
from .errors import UsageError, print_error
from .finetune import finetune
from .serve import serve
from .train import train
from .update import update


class OneLineErrors(TyperGroup):
    """A group of commands that says in one line what is wrong, without the usage before it."""

    def main(self, *args, **kwargs):
        try:
            status = super().main(*args, **kwargs | {"standalone_mode": False})
        except UsageError as error:
            print_error(error)
            status = error.exit_code
        except typer.Abort:
            status = 1
        sys.exit(status)


app = typer.Typer(cls=OneLineErrors, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
app.command()(ask)
app.command()(finetune)
app.command()(convert)
app.command()(cost)
app.command()(update)
for handed_on in (serve, train):
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(add_help_option=False, context_settings=settings)(handed_on)


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may have characters that the terminal's encoding lacks
    app(prog_name="mqt-llava")


def print_version(wanted: bool):
    if wanted:
        print(f"mqt-llava {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """MQT-LLaVA: one vision-language checkpoint, any number of visual tokens per image."""
