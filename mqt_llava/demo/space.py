"""Write the demo as a Space for the Hub, with or without ZeroGPU."""

import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from .. import TINY_CHECKPOINT, conversion, modeling
from ..conversion.files import new_folder
from ..hub import is_repository


APP = '''"""A demo of MQT-LLaVA: see README.md. Written by `mqt-llava demo --space`."""

try:
    import spaces  # before torch: on ZeroGPU it emulates CUDA until a GPU is assigned
except ImportError:
    spaces = None  # not on ZeroGPU

from mqt_llava import TINY_CHECKPOINT
from mqt_llava.demo.answers import Answers
from mqt_llava.demo.app import build, settings

demo = build(Answers.from_pretrained({checkpoint}), gpu=spaces and spaces.GPU)

if __name__ == "__main__":
    demo.launch(**settings())
'''
TEXT = """
# MQT-LLaVA: choose how many visual tokens an answer gets

Ask about a picture with any number of visual tokens, compare the answers, and see what they depend on. The model is
{model}; [the paper](https://arxiv.org/abs/2405.19315) describes the method.

| file | content |
| --- | --- |
| `app.py` | starts the page; on ZeroGPU, each answer requests a GPU |
| `mqt_llava/` | the package mqt-llava {version} |
| `requirements.txt` | the package's requirements |

To run it anywhere else: `pip install -r requirements.txt gradio=={gradio} && python app.py`.
"""


def write_space(folder: Path, checkpoint: str | None = None) -> list[str]:
    """
    Write a Space, to upload with `huggingface-cli upload --repo-type space NAME FOLDER`.

    Args:
        folder (`Path`): a new or empty folder.
        checkpoint (`str`, *optional*): a repository on the Hub. Defaults to the checkpoint shipped with the package.

    Returns:
        `list[str]`: the names of the files and folders that were written.

    Raises:
        `ValueError`: if the folder is not empty, the checkpoint is not the name of a Hub repository, or gradio or the package is not
            installed.
    """
    if checkpoint is not None and not is_repository(checkpoint):
        raise ValueError(
            f"a Space loads its model from the Hub, but {checkpoint} is not the name of a Hub repository (ORG/NAME): push it first"
        )
    try:
        gradio, package, needed = version("gradio"), version("mqt-llava"), requires("mqt-llava") or []
    except PackageNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'mqt-llava[demo]'") from None
    name = checkpoint or Path(TINY_CHECKPOINT).name
    data = SpaceCardData(
        title="MQT-LLaVA",
        emoji="🪆",
        colorFrom="indigo",
        colorTo="blue",
        sdk="gradio",
        sdk_version=gradio,
        app_file="app.py",
        license="apache-2.0",
        models=[checkpoint] if checkpoint else None,
        short_description="Choose how many visual tokens an answer gets",
        suggested_hardware="zero-a10g",
    )
    model = f"[{name}](https://huggingface.co/{name})" if checkpoint else f"{name}, which is part of the package"
    text = TEXT.format(model=model, version=package, gradio=gradio)
    loaded = repr(checkpoint) if checkpoint else "TINY_CHECKPOINT"
    with new_folder(folder) as partial:
        (partial / "app.py").write_text(APP.format(checkpoint=loaded), encoding="utf-8")
        (partial / "README.md").write_text(str(SpaceCard(f"---\n{data.to_yaml()}\n---\n{text}")), encoding="utf-8")
        plain = [requirement for requirement in needed if "extra ==" not in requirement]
        (partial / "requirements.txt").write_text("\n".join(plain) + "\n", encoding="utf-8")
        copy_package(partial / "mqt_llava", with_checkpoint=checkpoint is None)
    return sorted(path.name for path in folder.iterdir())


def copy_package(target: Path, with_checkpoint: bool):
    """Copy the package, whose parts may be in several folders."""
    parts = {"": Path(TINY_CHECKPOINT).parents[1]}
    parts |= {part.__name__.rpartition(".")[2]: Path(part.__path__[0]) for part in (modeling, conversion)}
    left_out = ["__pycache__", *([] if with_checkpoint else ["checkpoints"])]
    for name, source in parts.items():
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
