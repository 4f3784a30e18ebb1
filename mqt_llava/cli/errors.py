"""Bad input gets one line on stderr and exit code 2."""

import sys

import typer


# Not `click.UsageError`: newer releases of typer carry click inside
UsageError = typer.BadParameter.__base__


def print_error(message: str):
    print("Error: " + " ".join(message.split()), file=sys.stderr)
