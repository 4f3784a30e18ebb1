"""transformers' own common tests: fetched from the source distribution of the installed release when they are needed.

    common = load("test_modeling_common")  # the module tests/test_modeling_common.py of transformers

The distribution holds the modules of transformers' `tests/` folder itself and none of its subfolders. What the common
tests import from those is stood in for here, as little as they need.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from pathlib import Path

import transformers
from filelock import FileLock

from tests.small_model import make_images


CACHE = Path(__file__).parents[1] / ".cache"
PACKAGE = "transformers_tests"  # `tests` is the name of our own


def fetch(version: str = transformers.__version__) -> Path:
    """The folder that holds transformers' tests as the package `transformers_tests`, downloaded if it is not there yet.

    Raises:
        `RuntimeError`: when the source distribution cannot be had. There is nothing to fall back on.
    """
    folder = CACHE / f"transformers-{version}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / f"transformers-{version}.lock"):  # pytest-xdist has several processes ask at once
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as aside:
                extract(download(version, aside), f"transformers-{version}/tests/", Path(aside) / "new" / PACKAGE)
                os.replace(Path(aside) / "new", folder)
    return folder


def download(version: str, folder: str) -> Path:
    """Let pip put the source distribution of transformers into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    result = subprocess.run(
        [*command, f"transformers=={version}", "--dest", folder], capture_output=True, text=True, timeout=600
    )
    archive = Path(folder) / f"transformers-{version}.tar.gz"
    if result.returncode or not archive.exists():
        raise RuntimeError(
            f"The source distribution of transformers {version}, which has the common tests, could not be downloaded: "
            f"`{' '.join(result.args)}` ended with {result.returncode}.\n{result.stderr[-2000:]}"
        )
    return archive


def extract(archive: Path, prefix: str, target: Path):
    """Extract what lies under `prefix` in a tar archive to the folder `target`."""
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=archive.parent) as aside:
        tar.extractall(aside, [member for member in tar if member.name.startswith(prefix)], filter="data")
        target.parent.mkdir(parents=True)
        shutil.move(Path(aside) / prefix, target)
    (target / "__init__.py").touch()


def load(name: str) -> types.ModuleType:
    """Import a module of transformers' `tests/` folder."""
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.append(folder)
        stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
        stand_in("fetch_hub_objects_for_ci", url_to_local_path=url_to_local_path)
    with warnings.catch_warnings():  # markers that transformers' conftest.py registers, which is not distributed either
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{PACKAGE}.{name}")


def stand_in(name: str, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


# What every config takes, with values that are not the defaults
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["MQTLlavaForConditionalGeneration"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


def url_to_local_path(url: str) -> str:
    """A picture of our own for those on the Hub that the processor tests name: tests run without a network."""
    path = CACHE / "pictures" / Path(url).name
    if path.suffix not in (".png", ".jpg"):
        return url
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            make_images(1)[0].save(Path(aside) / path.name)
            os.replace(Path(aside) / path.name, path)
    return str(path)
