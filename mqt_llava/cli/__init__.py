"""The command line `mqt-llava`: one module for each command."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperGroup

from .ask import ask
from .calibrate import calibrate
from .card import card
from .convert import convert
from .cost import cost
from .demo import demo
from .env import env
from .errors import UsageError, print_error
from .evaluate import evaluate
from .explain import explain
from .serve import serve
from .train import finetune, train
from .update import update


class OneLineErrors(TyperGroup):
    """A group of commands that reports errors in one line, without the usage."""

    def main(self, *args, **kwargs):
        try:
            status = super().main(*args, **kwargs | {"standalone_mode": False})
            sys.stdout.flush()  # here an error can still be reported
        except UsageError as error:
            print_error(error.format_message())
            status = error.exit_code
        except (typer.Abort, KeyboardInterrupt):
            status = 130  # 128 + SIGINT, as shells report it
        except BrokenPipeError:  # as with `| head -1`: nobody reads the rest
            drop_output()
            status = 1
        except OSError as error:
            drop_output()
            print_error(str(error))
            status = 1
        sys.exit(status)


def drop_output():
    """Keep Python from writing again, at exit, what stdout did not take."""
    with contextlib.suppress(OSError):  # in tests stdout is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=OneLineErrors,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
COMMANDS: tuple[Callable, ...] = (ask, demo, convert, cost, evaluate, explain, calibrate, card, update, env)
for command in COMMANDS:
    app.command()(command)
for command, usage in (
    (finetune, "DATA... [OPTIONS]"),
    (train, "--stage 1|2 [OPTIONS]"),
    (serve, "[DIR_OR_REPO] [OPTIONS]"),
):
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}  # read by other parsers
    app.command(options_metavar=usage, add_help_option=False, context_settings=settings)(command)


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may have characters outside the terminal's encoding
    app(prog_name="mqt-llava")


def print_version(wanted: bool):
    if wanted:
        from importlib.metadata import version

        print(f"mqt-llava {version('mqt-llava')}")  # `__version__` would import torch
        raise typer.Exit


@app.callback()
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """MQT-LLaVA: one vision-language checkpoint, any number of visual tokens per image."""
    if context.invoked_subcommand is None:
        print(context.get_help())
