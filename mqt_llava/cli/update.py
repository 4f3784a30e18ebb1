"""`mqt-llava update DIR_OR_REPO`: update the code in a checkpoint to this version."""

from typing import Annotated

import typer

from .errors import UsageError


def update(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR_OR_REPO", help="A folder or a Hub repository.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change without changing it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also replace code that was edited by hand.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of the repository.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit to the repository.")] = None,
):
    """Update the code in a checkpoint to this version.

    This is the code that `trust_remote_code=True` runs. Only code files and the `auto_map` of config.json and processor_config.json change. All changes are printed first.

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
