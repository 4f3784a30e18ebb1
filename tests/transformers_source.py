"""transformers' own common tests: fetched from the source distribution of the installed release when they are needed.

    common = load("test_modeling_common")  # the module tests/test_modeling_common.py of transformers

The distribution holds the modules of transformers' `tests/` folder itself and none of its subfolders, so neither the tests
of `generate` nor those of `torch.export`. What the common tests import from there is stood in for, as little as they need.
"""

import importlib
import os
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
    name = f"transformers-{version}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):  # pytest-xdist has several processes ask at once
        if not (CACHE / name).exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as aside:
                with tarfile.open(download(version, aside)) as archive:
                    tests = [member for member in archive if member.name.startswith(f"{name}/tests/")]
                    archive.extractall(aside, tests, filter="data")
                package = (Path(aside) / name / "tests").rename(Path(aside) / name / PACKAGE)
                (package / "__init__.py").touch()
                package.parent.rename(CACHE / name)
    return CACHE / name


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


def load(name: str) -> types.ModuleType:
    """Import a module of transformers' `tests/` folder."""
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.append(folder)
        stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=object)
        stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=object)
        stand_in(
            f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={}
        )  # not for configs of several parts
        stand_in("fetch_hub_objects_for_ci", url_to_local_path=url_to_local_path)
    with warnings.catch_warnings():  # their markers are registered by a conftest.py that is not distributed either
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{PACKAGE}.{name}")


def stand_in(name: str, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


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
