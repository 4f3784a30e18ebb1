"""What `pip install mqt-llava` installs: built as a release is, and used from outside of the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from mqt_llava import __version__
from mqt_llava.update import CODE


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CHECKPOINT = "mqt_llava/checkpoints/mqt-llava-tiny"
LICENCES = ["LICENSE", *(f"licenses/{path.name}" for path in ROOT.joinpath("licenses").iterdir())]


def run(*command, **options):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, since setuptools writes to where it builds, and takes what an older build left there."""
    copy = tmp_path_factory.mktemp("source") / "mqt-llava"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "docs", "tests", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """The folder of a source distribution, and of the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, source)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of an environment that has the wheel alone, and sees the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    places = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    python = Path(places["scripts"], "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    # Paths, and not folders of packages, whose own .pth files are not read: the checkout is not among them
    Path(places["purelib"], "dependencies.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
    return python


def test_has_what_the_repository_has(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not any(info.external_attr >> 16 & 0o170000 == 0o120000 for info in archive.infolist())  # links
        for name, path in CODE.items():
            for folder in ("mqt_llava/modeling", CHECKPOINT):
                assert archive.read(f"{folder}/{name}") == path.read_bytes()
        metadata = archive.read(f"mqt_llava-{__version__}.dist-info/METADATA").decode()
    packages = {"modeling": "mqt_llava/modeling", "conversion": "mqt_llava/conversion", "mqt_llava": "mqt_llava"}
    for folder, package in packages.items():
        files = (
            path for path in ROOT.joinpath(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        missing = {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in files} - set(names)
        assert not missing
    assert {name.split("/")[0] for name in names} == {
        "mqt_llava",
        "mqt_llava_cli.py",
        f"mqt_llava-{__version__}.dist-info",
    }
    assert f"\nVersion: {__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    for licence in LICENCES:
        assert f"mqt_llava-{__version__}.dist-info/licenses/{licence}" in names
        assert f"\nLicense-File: {licence}\n" in metadata


def test_source_distribution(built, wheel, source, tmp_path):
    """It has the licences, and no links; a wheel that is built without it is the same."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*LICENCES, "README.md", "CHANGELOG.md", "constraints.txt"}
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source)
    contents = []
    for path in (wheel, *tmp_path.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


def test_answers(python, tmp_path):
    """By the program that is installed, from the shipped checkpoint; and by the checkpoint's own code."""
    picture = shutil.copy(ROOT / "examples" / "scene.png", tmp_path)
    answer = run(python.with_name("mqt-llava"), "ask", picture, "How many things are there?", cwd=tmp_path)
    assert answer.strip() == "Four."
    code = """
import mqt_llava, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
assert mqt_llava.__file__.startswith(sys.prefix), mqt_llava.__file__
for auto_class in (AutoProcessor, AutoModelForImageTextToText):
    for trust in ({}, {"trust_remote_code": True}):
        print(auto_class.from_pretrained(mqt_llava.TINY_CHECKPOINT, **trust).__class__.__name__)
"""
    printed = run(python, "-c", code, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert printed.split() == ["MQTLlavaProcessor"] * 2 + ["MQTLlavaForConditionalGeneration"] * 2
