"""Update the code in a checkpoint that was saved with an older version of this package."""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from . import modeling
from .modeling.configuration_mqt_llava import AUTO_MAP, __version__


CODE = {path.name: path for path in sorted(Path(modeling.__file__).parent.glob("*_mqt_llava.py"))}
# SHA-256 of every code file that earlier versions of this package saved with checkpoints
HISTORY = json.loads(Path(__file__).with_name("code_history.json").read_text(encoding="utf-8"))


@dataclass
class Update:
    """The changes of an update.

    Args:
        source (`str`): the folder or repository.
        version (`str`, *optional*): the version of the checkpoint's code; `None` if there is no code, or if it is unknown.
        files (`dict[str, bytes]`): the new contents of the files that change.
        changes (`dict[str, str]`): for each of these files, a description of the change.
        edited (`list[str]`): code files that match no version of this package.
    """

    source: str
    version: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)
    edited: list[str] = field(default_factory=list)


def plan_update(source: str, revision: str | None = None, token: str | None = None) -> Update:
    """Find out what an update would change, without changing anything.

    Args:
        source (`str`): a folder or a Hub repository.
        revision (`str`, *optional*): a branch, tag or commit of the repository.

    Raises:
        `ValueError`: if this is not an MQT-LLaVA checkpoint, or if its code is in another repository.
    """

    def read(name: str) -> bytes | None:
        if os.path.isdir(source):
            path = Path(source, name)
            return path.read_bytes() if path.exists() else None
        try:
            return Path(hf_hub_download(source, name, revision=revision, token=token)).read_bytes()
        except EntryNotFoundError:
            return None

    config = read("config.json")
    if config is None or json.loads(config).get("model_type") != "mqt_llava":
        raise ValueError(f"{source} is not an MQT-LLaVA checkpoint: it has no config.json with model_type 'mqt_llava'")
    elsewhere = {name.partition("--")[0] for name in json.loads(config).get("auto_map", {}).values() if "--" in name}
    if elsewhere:
        raise ValueError(f"{source} uses the code of {', '.join(sorted(elsewhere))}: update that one")

    update = Update(source)
    for name, path in CODE.items():
        old, new = read(name), path.read_bytes()
        if old is None:
            update.changes[name] = "new"
        elif _digest(old) == _digest(new):
            update.version = __version__
            continue
        else:
            version = _version_of(name, old)
            update.version = version or update.version
            update.edited += [] if version else [name]
            before, after = (code.decode(errors="replace").splitlines() for code in (old, new))
            lines = [line[0] for line in difflib.ndiff(before, after)]
            origin = f"from {version}" if version else "edited by hand"
            update.changes[name] = f"{origin}, {lines.count('+')} lines added, {lines.count('-')} removed"
        update.files[name] = new
    processor = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    for name, auto_map in (("processor_config.json", processor), ("config.json", AUTO_MAP)):
        content = read(name)
        if content is None:
            continue
        settings = json.loads(content)
        missing = [entry for entry in auto_map if settings.get("auto_map", {}).get(entry) != auto_map[entry]]
        if missing:
            settings["auto_map"] = {**settings.get("auto_map", {}), **auto_map}
            update.files[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
            update.changes[name] = f"auto_map: {', '.join(missing)} added"
    return update


def apply_update(update: Update, force: bool = False, revision=None, commit_message=None, token=None) -> str:
    """Apply an update from [`plan_update`] to its folder, or to its repository as one commit.

    Args:
        force (`bool`, *optional*, defaults to `False`): also replace code that was edited by hand.

    Returns:
        `str`: the folder, or the URL of the commit.

    Raises:
        `ValueError`: for code that was edited by hand, unless `force` is set.
    """
    if update.edited and not force:
        raise ValueError(
            f"{', '.join(update.edited)} in {update.source} match no version of mqt-llava, so they were edited by hand. "
            "--force replaces them"
        )
    if os.path.isdir(update.source):
        # All files are written before any is moved. The config files, which refer to the code, are moved last
        names = sorted(update.files, key=lambda name: name.endswith(".json"))
        asides = {name: Path(update.source, f"{name}.{os.getpid()}.partial") for name in names}
        try:
            for name, aside in asides.items():
                aside.write_bytes(update.files[name])
            for name, aside in asides.items():
                os.replace(aside, Path(update.source, name))
        finally:
            for aside in asides.values():
                aside.unlink(missing_ok=True)
        return update.source
    operations = [CommitOperationAdd(name, content) for name, content in update.files.items()]
    commit = HfApi(token=token).create_commit(
        update.source,
        operations,
        commit_message=commit_message or f"Update the code to mqt-llava {__version__}",
        revision=revision,
    )
    return str(commit.commit_url)


def _digest(code: bytes) -> str:
    return hashlib.sha256(code.replace(b"\r\n", b"\n")).hexdigest()


def _version_of(name: str, code: bytes) -> str | None:
    """The version of this package that a file is from, or `None`."""
    return next((version for version, files in HISTORY.items() if _digest(code) in files.get(name, ())), None)
