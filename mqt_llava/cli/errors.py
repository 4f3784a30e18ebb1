"""Bad input is reported in one line on stderr, with exit code 2."""

import sys

import typer


# Not `click.UsageError`: newer releases of typer have their own copy of click
UsageError = typer.BadParameter.__base__


def print_error(message: str):
    print("Error: " + " ".join(message.split()), file=sys.stderr)
