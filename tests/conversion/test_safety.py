"""Sources that are damaged or hostile are refused by name; whatever goes wrong, DST is as it was."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mqt_llava.conversion import convert, files
from tests.conversion.checkpoints import edit_json, read_weights, write_authors, write_weights


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "out"


def assert_refused(source, out, match, **options):
    """A ValueError that says `match`, and no trace at DST or beside it."""
    with pytest.raises(ValueError, match=match):
        convert(str(source), out, **options)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def shard(source, number=1):
    return sorted(source.glob("*-of-*"))[number]


# --- damaged weights ---


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0, 7, 5000, -5000])
def test_truncated_shard(source, weights, out, suffix, kept):
    write_weights(source, weights, suffix, 2)
    path = shard(source)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(source, out, path.name)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shard_of_garbage(source, weights, out, suffix):
    write_weights(source, weights, suffix, 2)
    path = shard(source)
    path.write_bytes(os.urandom(10_000))
    assert_refused(source, out, path.name)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_missing_shard(source, weights, out, suffix):
    write_weights(source, weights, suffix, 2)
    path = shard(source)
    path.unlink()
    assert_refused(source, out, path.name)


def test_shard_that_lacks_what_the_index_says(source, weights, out):
    write_weights(source, weights, shards=2)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.layers.7.mlp.up_proj.weight": next(iter(weight_map.values()))})
    assert_refused(source, out, r"model\.layers\.7\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_index_of_garbage(source, out, content):
    (source / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert_refused(source, out, r"model\.safetensors\.index\.json")


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.query_abstractor.query", "model.norm.weight"],
)
def test_missing_tensor(source, weights, out, name):
    write_weights(source, {other: tensor for other, tensor in weights.items() if other != name})
    assert_refused(source, out, name.replace("query_abstractor.", "*").rsplit("layers", 1)[-1].replace("*", ".*"))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.extra", "model.query_abstractor.beta"])
def test_unknown_tensor(source, weights, out, name):
    write_weights(source, weights | {name: torch.zeros(3)})
    assert_refused(source, out, name.removeprefix("model."))


@pytest.mark.parametrize("shape", [(), (3,), (7, 32), (49, 33)])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lm_head.weight", "lm_head"),
        ("model.layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj"),
        ("model.query_abstractor.attn.in_proj_weight", "in_proj_weight|q_proj"),
        ("model.query_abstractor.query", "query"),
        ("model.query_abstractor.proj", "proj"),
        ("model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight", "patch_embedding"),
    ],
)
def test_wrong_shape(source, weights, out, name, words, shape):
    write_weights(source, weights | {name: torch.zeros(shape, dtype=torch.bfloat16)})
    assert_refused(source, out, words)


def test_packed_tensor_that_is_not_three(source, weights, out):
    name = "model.query_abstractor.attn.in_proj_weight"
    write_weights(source, weights | {name: torch.cat([weights[name], weights[name][:1]])})
    assert_refused(source, out, r"in_proj_weight.*3073")


def test_file_with_more_than_tensors(source, weights, out):
    torch.save(weights | {"step": 7}, source / "pytorch_model.bin")
    for path in source.glob("*.safetensors*"):
        path.unlink()
    assert_refused(source, out, r"pytorch_model\.bin.*step")


# --- tokenizers ---


@pytest.mark.parametrize("content", [None, b"", b"\0" * 3000, "half"])
def test_tokenizer_that_is_missing_or_damaged(source, out, content):
    path = source / "tokenizer.model"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert_refused(source, out, r"tokenizer\.model")


def test_tokenizer_of_another_model(tokenizer_model, tmp_path, out):
    source = write_authors(tmp_path, tokenizer_model, vocab=400)
    assert_refused(source, out, r"tokenizer\.model has 300 tokens.* 400 embeddings")
    source = write_authors(tmp_path, tokenizer_model, vocab=299)
    assert_refused(source, out, r"tokenizer\.model has 300 tokens.* 299 embeddings")


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_tokenizer_without_settings(source, out, content):
    (source / "tokenizer_config.json").unlink()
    if content is not None:
        (source / "tokenizer_config.json").write_text(content)
    assert_refused(source, out, r"tokenizer_config\.json")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "processor_config.json"])
def test_tokenizer_for_the_way_back(converted, tmp_path, out, name):
    """Nothing is written before it is known to be whole."""
    shutil.copytree(converted, tmp_path / "source")
    (tmp_path / "source" / name).write_bytes(b"")
    assert_refused(tmp_path / "source", out, name.replace(".", "[.]"))


def test_tokenizer_json_that_is_damaged(converted, tmp_path, out):
    shutil.copytree(converted, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").unlink()
    (tmp_path / "source" / "tokenizer.json").write_text("{")
    assert_refused(tmp_path / "source", out, "tokenizer of .*source")


def test_no_weights_or_no_checkpoint(source, out, tmp_path):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    assert_refused(source, out, "has no weights")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", out, "no known layout")
    assert_refused(tmp_path / "nowhere", out, "nowhere")
    (source / "config.json").write_text("{")
    assert_refused(source, out, r"config\.json")


# --- hostile files ---


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_pickles_are_not_executed(source, weights, out, tmp_path, archive):
    mark = tmp_path / "executed"
    write_weights(source, weights, ".bin")
    torch.save(
        weights | {"lm_head.weight": Payload(mark)},
        source / "pytorch_model.bin",
        _use_new_zipfile_serialization=archive,
    )
    assert_refused(source, out, r"pytorch_model\.bin.*more than tensors")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark), protocol=2))
    assert_refused(source, out, r"pytorch_model\.bin.*more than tensors")
    assert not mark.exists()


def redirect(source, name):
    """Let the index name another file for one of its shards."""
    index = source / "model.safetensors.index.json"
    path = shard(source)
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={key: name if file == path.name else file for key, file in weight_map.items()})
    return path


@pytest.mark.parametrize("name", ["../{}", "{}/../../{}", "sub/{}", "/{}", ".."])
def test_index_that_leads_out(source, out, name):
    path = redirect(source, "")
    outside = source.parent / path.name
    path.rename(outside)
    named = name.format(str(outside).lstrip("/") if name.startswith("/") else path.name, path.name)
    (source / "sub").mkdir()
    (source / "sub" / path.name).symlink_to(outside)
    redirected = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    edit_json(
        source / "model.safetensors.index.json",
        weight_map={key: file or named for key, file in redirected.items()},
    )
    assert_refused(source, out, "is outside the folder")


def test_links_that_lead_out(source, out):
    path = shard(source)
    path.rename(source.parent / "elsewhere")
    path.symlink_to(source.parent / "elsewhere")
    assert_refused(source, out, f"{path.name}.*is outside the folder")
    path.unlink()
    (source.parent / "elsewhere").rename(path)
    tokenizer = source / "tokenizer.model"
    tokenizer.rename(source.parent / "secret")
    tokenizer.symlink_to(source.parent / "secret")
    assert_refused(source, out, r"tokenizer\.model.*is outside the folder")


def test_snapshot_in_the_cache_of_the_hub(source, converted, out, tmp_path):
    """Its links lead to the blobs of the same repository, and that is right."""
    repository = tmp_path / "models--someone--mqt"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(source.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    convert(str(snapshot), out, vision_tower=str(source.parent / "clip"))
    assert read_weights(out).keys() == read_weights(converted).keys()
    blob = (snapshot / "tokenizer.model").resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is outside the folder"):
        convert(str(snapshot), out, overwrite=True, vision_tower=str(source.parent / "clip"))


# --- what is at DST ---


@pytest.fixture
def taken(out):
    """A folder with a checkpoint in it."""
    out.mkdir(parents=True)
    fill(out)
    return out


def fill(folder):
    for name in ("config.json", "model-of-mine.safetensors"):
        (folder / name).write_text("mine")


def assert_untouched(taken):
    assert [path.name for path in taken.parent.iterdir()] == [taken.name]
    assert [path.read_text() for path in taken.iterdir()] == ["mine"] * 2


def test_folder_with_something_in_it(authors, taken):
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        convert(str(authors), taken)
    assert_untouched(taken)
    convert(str(authors), taken, overwrite=True)
    assert not (taken / "model-of-mine.safetensors").exists() and (taken / "model.safetensors").exists()
    assert [path.name for path in taken.parent.iterdir()] == [taken.name]


def test_failure_keeps_what_was_there(source, taken):
    shard(source).write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read"):
        convert(str(source), taken, overwrite=True)
    assert_untouched(taken)


def test_empty_folder_file_and_link(authors, out, tmp_path):
    out.mkdir(parents=True)
    convert(str(authors), out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        convert(str(authors), tmp_path / "file", overwrite=True)
    disk = tmp_path / "disk" / "models"
    disk.mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk)
    convert(str(authors), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (disk / "model.safetensors").exists()
    convert(str(authors), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (disk / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "disk", "link", "results"}
    assert [path.name for path in disk.parent.iterdir()] == ["models"]


def test_source_is_never_replaced(source, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")}
    (tmp_path / "link").symlink_to(source)
    for out in (source, source.parent, tmp_path / "link"):
        with pytest.raises(ValueError, match="source"):
            convert(str(source), out, overwrite=True)
    clip = source.parent / "clip"
    with pytest.raises(ValueError, match="clip"):
        convert(str(source), clip, vision_tower=str(clip), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")} == before


@pytest.mark.parametrize("names", [["precious.txt"], ["config.json", "README.md"], ["model.safetensors"]])
def test_what_is_no_checkpoint_is_never_replaced(authors, out, names):
    out.mkdir(parents=True)
    for name in names:
        (out / name).write_text("mine")
    with pytest.raises(
        ValueError, match=f"contains {names[0].replace('.', '[.]')}".replace("config", "README|config")
    ):
        convert(str(authors), out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", ["notes.txt", "vision_tower/notes.txt", "runs/events", ".git/config", "data.json"])
def test_what_lies_beside_a_checkpoint_is_named(authors, taken, name):
    (taken / name).parent.mkdir(exist_ok=True)
    (taken / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"contains {name.removesuffix('/events').removesuffix('/config')};"):
        convert(str(authors), taken, overwrite=True)
    assert (taken / name).read_text() == "mine"


@pytest.mark.parametrize("layout", ["ours", "theirs", "saved by transformers"])
def test_own_results_are_replaced(authors, converted, taken, layout):
    for path in taken.iterdir():
        path.unlink()
    if layout == "theirs":
        convert(str(converted), taken)
    elif layout == "ours":
        convert(str(authors), taken)
    else:
        AutoModelForImageTextToText.from_pretrained(converted).save_pretrained(taken, max_shard_size="10MB")
        AutoProcessor.from_pretrained(converted).save_pretrained(taken)
    convert(str(authors), taken, overwrite=True)
    assert (taken / "modeling_mqt_llava.py").exists() and not (taken / "vision_tower").exists()


def test_neighbours_are_left_alone(authors, taken):
    """Names that a run might have taken for its own."""
    mine = [f".{taken.name}.{end}" for end in ("partial", "old", "new", "convert-abc", "convert-live")]
    for name in mine:
        (taken.parent / name / "old").mkdir(parents=True)
        (taken.parent / name / "old" / "precious.txt").write_text("mine")
    with open(taken.parent / mine[-1] / files.MARK, "w") as mark:  # another run at the same place
        files._lock(mark)
        convert(str(authors), taken, overwrite=True)
    assert {path.name for path in taken.parent.iterdir()} == {taken.name, *mine}
    assert all((taken.parent / name / "old" / "precious.txt").exists() for name in mine)


# --- interruptions ---


CONVERT = """
import os, sys, time
from mqt_llava.conversion import convert
def progress(phase, done, total):
    if done * 2 > total:
        print("half", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], overwrite=True, max_shard_size="2MB", progress=progress)
"""


def test_killed_in_the_middle(authors, taken):
    command = [sys.executable, "-c", CONVERT, str(authors), str(taken)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert process.returncode != 0
    assert [path.read_text() for path in taken.iterdir()] == ["mine"] * 2
    convert(str(authors), taken, overwrite=True)
    assert [path.name for path in taken.parent.iterdir()] == [taken.name]
    assert (taken / "model.safetensors").exists() and not (taken / "model-of-mine.safetensors").exists()


RENAME = """
import os, signal, sys
from pathlib import Path
from mqt_llava.conversion.files import new_folder
def replace(self, target, replace=Path.replace):
    if self.name == "new":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = replace
with new_folder(Path(sys.argv[1]), overwrite=True):
    pass
"""


def test_killed_while_the_folder_takes_its_place(authors, taken):
    """Between two renames DST is aside. The next run brings it back, whatever becomes of that run."""
    subprocess.run([sys.executable, "-c", RENAME, str(taken)])
    assert not taken.exists()
    with pytest.raises(ValueError, match="not empty"):
        convert(str(authors), taken)
    assert_untouched(taken)


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk(authors, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "20m") as disk:
        taken = disk / "results" / "out"
        taken.mkdir(parents=True)
        fill(taken)
        with pytest.raises(ValueError, match=r"take 0\.03 GB.* has 0\.02 GB left"):
            convert(str(authors), taken, overwrite=True)
        assert_untouched(taken)
        # others may fill a disk meanwhile
        monkeypatch.setattr(import_module("mqt_llava.conversion.convert"), "check_space", lambda folder, nbytes: None)
        for max_shard_size in ("5GB", "2MB"):
            with pytest.raises(OSError, match=r"[Nn]o space left"):
                convert(str(authors), taken, overwrite=True, max_shard_size=max_shard_size)
            assert_untouched(taken)
        convert(str(authors.parent / "ckpt"), tmp_path / "out")


def test_failing_write(authors, taken, monkeypatch):
    def write_all(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", write_all)
    with pytest.raises(OSError, match="No space"):
        convert(str(authors), taken, overwrite=True)
    assert_untouched(taken)
