"""`mqt-llava update DIR_OR_REPO`: today's code into a checkpoint that carries older code."""

from typing import Annotated

import typer

from .errors import UsageError


def update(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR_OR_REPO", help="A folder or a repository of the Hub.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace code that was edited by hand, too.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of the repository.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Of the commit to the repository.")] = None,
):
    """Put this version's code into a checkpoint, so that `trust_remote_code=True` runs it.

    Only code files and the `auto_map` of config.json and processor_config.json are touched. What changes is shown first.

    \b
    mqt-llava update my-mqt-llava --dry-run
    mqt-llava update someone/my-mqt-llava
    """
    from .. import __version__
    from ..update import apply_update, plan_update

    try:
        planned = plan_update(checkpoint, revision)
        if not planned.files:
            print(f"{checkpoint} has the code of mqt-llava {__version__} already")
            return
        width = max(map(len, planned.changes))
        for name, change in planned.changes.items():
            print(f"{name:<{width}}  {change}")
        if dry_run:
            print("nothing was written")
            return
        place = apply_update(planned, force, revision, commit_message)
    except (ValueError, OSError) as error:  # the Hub's errors are OSErrors
        raise UsageError(str(error)) from error
    print(f"updated to mqt-llava {__version__}: {place}")
