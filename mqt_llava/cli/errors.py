"""Errors of one line on stderr, with exit code 2."""

import contextlib
import sys

import typer


# Not `click.UsageError`: newer releases of typer have their own copy of click
UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]  # a base has no name in typer


@contextlib.contextmanager
def requiring(extra: str):
    """Report a package that is missing, with the extra of this package that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[{extra}]'") from None


def print_error(message: str):
    print("Error: " + " ".join(message.split()), file=sys.stderr)
