"""A saved folder carries its code: fresh processes without this package load it, answer alike and save it again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import mqt_llava
from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, MQTLlavaModel, MQTLlavaProcessor
from tests.small_model import NUM_QUERY_TOKENS, make_images, make_model, make_processor


NUM_VISUAL_TOKENS = [1, 7, NUM_QUERY_TOKENS, [2, 16, 5], None]
PROMPTS = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image><image>\nWhich one? ASSISTANT:"]
CODE = {
    "adaptive_mqt_llava.py",
    "budget_mqt_llava.py",
    "configuration_mqt_llava.py",
    "image_processing_mqt_llava.py",
    "modeling_mqt_llava.py",
    "processing_mqt_llava.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_mqt_llava.MQTLlavaConfig",
    "AutoImageProcessor": "image_processing_mqt_llava.MQTLlavaImageProcessor",
    "AutoModel": "modeling_mqt_llava.MQTLlavaModel",
    "AutoModelForCausalLM": "modeling_mqt_llava.MQTLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mqt_llava.MQTLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mqt_llava.MQTLlavaForConditionalGeneration",
    "AutoProcessor": "processing_mqt_llava.MQTLlavaProcessor",
}
REPO_ID = "someone/mqt-llava-tiny"

# What both sides do: answers for every m, one after the other
ANSWER = '''
def answer(model, processor, images, prompts, num_visual_tokens):
    """Generated ids with `num_visual_tokens` said to `generate`, and said to the processor."""
    rows, settings = [images[:1], images[1:]], {"max_new_tokens": 8, "do_sample": False}
    results = []
    for m in num_visual_tokens:
        inputs = processor(images=rows, text=prompts, padding=True, return_tensors="pt")
        results.append(model.generate(**inputs, num_visual_tokens=m, **settings).tolist())
        inputs = processor(images=rows, text=prompts, padding=True, return_tensors="pt", num_visual_tokens=m)
        results.append(model.generate(**inputs, **settings).tolist())
    return results
'''

# A machine where the package is not installed, however it is installed here
WITHOUT_PACKAGE = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mqt_llava":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import mqt_llava
except ImportError:
    pass
else:
    raise AssertionError("mqt_llava can be imported here")

import torch
from PIL import Image
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoTokenizer

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
task = json.loads(sys.argv[1])
images = [Image.open(path) for path in task["images"]]
result = {}
"""

LOAD = (
    ANSWER
    + """
def load(source):
    trust = {"trust_remote_code": True}
    parts = {
        "AutoConfig": AutoConfig.from_pretrained(source, **trust),
        "AutoImageProcessor": AutoImageProcessor.from_pretrained(source, **trust),
        "AutoProcessor": AutoProcessor.from_pretrained(source, **trust),
        "AutoModel": AutoModel.from_pretrained(source, **trust),
        "AutoModelForImageTextToText": AutoModelForImageTextToText.from_pretrained(source, **trust),
        "AutoModelForMultimodalLM": AutoModelForMultimodalLM.from_pretrained(source, **trust),
        "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained(source, **trust),
    }
    for part in parts.values():
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    return parts

for source, destination in task["sources"].items():
    parts = load(source)
    processor, model = parts["AutoProcessor"], parts["AutoModelForImageTextToText"]
    result[source] = {
        "classes": {name: type(part).__name__ for name, part in parts.items()},
        "answers": answer(model, processor, images, task["prompts"], task["num_visual_tokens"]),
        "causal_lm_answers": answer(parts["AutoModelForCausalLM"], processor, images, task["prompts"], [3]),
        "same_base": all(
            torch.equal(weight, model.model.state_dict()[name]) for name, weight in parts["AutoModel"].state_dict().items()
        ),
    }
    model.save_pretrained(destination)
    processor.save_pretrained(destination)
    parts["AutoModel"].save_pretrained(destination + "-base")
"""
)

REFUSE = """
result["refusals"] = {}
# The tokenizer is an ordinary one (without the `False`, transformers asks for the config, whose code it may not run)
result["tokenizer"] = type(AutoTokenizer.from_pretrained(task["refused"], trust_remote_code=False)).__module__
for auto_class in (AutoConfig, AutoProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM):
    for trust in ({}, {"trust_remote_code": False}):
        try:
            loaded = auto_class.from_pretrained(task["refused"], **trust)
        except ValueError as error:
            loaded = str(error)
        result["refusals"][f"{auto_class.__name__} {trust}"] = str(loaded)
assert not any(name.startswith("transformers_modules.") for name in sys.modules), "code was run"
"""

PIPELINE = """
pipe = transformers.pipeline("image-text-to-text", model=task["pipeline"], trust_remote_code=True)
messages = [
    {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What?"}]}
]
settings = {"do_sample": False, "max_new_tokens": 8, "num_visual_tokens": 4}
result["pipeline"] = pipe(text=messages, generate_kwargs=settings, return_full_text=False)[0]["generated_text"]
"""

END = r"""
print("\nRESULT " + json.dumps(result))
"""


def fresh_process(script, task, folder):
    """Run a script where the package cannot be imported. Returns its result."""
    environment = os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + script + END, json.dumps(task)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,  # nobody is there to be asked whether the code may be trusted
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


class LocalHub:
    """Stands in for the Hub: what `push_to_hub` would upload lands in a folder, as one commit."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.commits = folder, []
        monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(HfApi, "create_commit", lambda api, *args, **kwargs: self.commit(*args, **kwargs))

    def commit(self, repo_id, operations, **kwargs):
        self.commits.append({operation.path_in_repo for operation in operations})
        for operation in operations:
            path = self.folder / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Model and processor pushed to a repository of a local stand-in for the Hub."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub = LocalHub(tmp_path_factory.mktemp("pushed"), monkeypatch)
        make_model().push_to_hub(REPO_ID)
        make_processor().push_to_hub(REPO_ID)
        MQTLlavaConfig().push_to_hub("someone/config")
    return hub


@pytest.fixture(scope="module")
def chain(tmp_path_factory, checkpoint, pushed):
    """Two fresh processes, one after the other. The first loads what this one saved and saves it again; the second loads
    that, and a repository of the Hub, as it lies in the cache after a download."""
    folder = tmp_path_factory.mktemp("chain")
    images = []
    for i, image in enumerate(make_images(3)):
        images.append(str(folder / f"{i}.png"))
        image.save(images[-1])
    cached = folder / "hub" / ("models--" + REPO_ID.replace("/", "--"))
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (pushed.folder / REPO_ID).rename(cached / "snapshots" / ("0" * 40))
    (pushed.folder / REPO_ID).symlink_to(cached / "snapshots" / ("0" * 40))

    task = {"images": images, "prompts": PROMPTS, "num_visual_tokens": NUM_VISUAL_TOKENS, "refused": str(checkpoint)}
    second, third, from_hub = (str(folder / name) for name in ("second", "third", "from_hub"))
    first_result = fresh_process(REFUSE + LOAD, task | {"sources": {str(checkpoint): second}}, folder)
    assert first_result.pop("tokenizer").startswith("transformers.")
    second_sources = {second: third, REPO_ID: from_hub}
    second_result = fresh_process(LOAD + PIPELINE, task | {"sources": second_sources, "pipeline": second}, folder)
    return SimpleNamespace(
        refusals=first_result.pop("refusals"),
        pipeline=second_result.pop("pipeline"),
        loaded={
            "by the second process": first_result[str(checkpoint)],
            "by the third process": second_result[second],
            "from the Hub": second_result[REPO_ID],
        },
        folders={
            "of this process": checkpoint,
            "of the second process": Path(second),
            "of the third process": Path(third),
            "of a repository of the Hub, saved again": Path(from_hub),
        },
        modules=folder / "modules",
    )


LOADED = ["by the second process", "by the third process", "from the Hub"]
FOLDERS = [
    "of this process",
    "of the second process",
    "of the third process",
    "of a repository of the Hub, saved again",
]


def expected_answers(num_visual_tokens):
    scope = {}
    exec(ANSWER, scope)
    return scope["answer"](make_model(), make_processor(), make_images(3), PROMPTS, num_visual_tokens)


@pytest.mark.every_version
@pytest.mark.parametrize("who", LOADED)
def test_fresh_process_answers_token_for_token_as_this_one(chain, who):
    result = chain.loaded[who]
    assert result["answers"] == expected_answers(NUM_VISUAL_TOKENS)
    assert len({str(answer) for answer in result["answers"]}) > 4  # m matters
    assert result["causal_lm_answers"] == expected_answers([3])
    assert result["same_base"]
    assert result["classes"] == {name: reference.split(".")[1] for name, reference in AUTO_MAP.items()}


def test_without_trust_a_fresh_process_refuses(chain):
    assert len(chain.refusals) == 10
    for message in chain.refusals.values():
        assert "trust_remote_code=True" in message


def test_pipeline_of_a_fresh_process(chain):
    processor, model = make_processor(), make_model()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": make_images(1)[0]}, {"type": "text", "text": "What?"}]}
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    sequences = model.generate(**inputs, num_visual_tokens=4, max_new_tokens=8, do_sample=False)
    answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chain.pipeline == answer


@pytest.mark.parametrize("which", FOLDERS)
def test_code_travels_with_the_folder(chain, which):
    """Code and `auto_map` survive saving from any process: all five classes, and none of them from elsewhere."""
    folder = chain.folders[which]
    assert {path.name for path in folder.glob("**/*.py")} == CODE
    for name in CODE:
        source = Path(sys.modules[MQTLlavaConfig.__module__].__file__).parent / name
        assert (folder / name).read_text() == source.read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["MQTLlavaForConditionalGeneration"]
    processor_config = json.loads((folder / "processor_config.json").read_text())
    assert processor_config["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    assert processor_config["processor_class"] == "MQTLlavaProcessor"
    for path in folder.glob("*.json"):
        assert "repo--" not in path.read_text() and REPO_ID not in path.read_text(), path.name
        assert "--" not in json.dumps(json.loads(path.read_text()).get("auto_map", {})), path.name
    first = chain.folders["of this process"]
    assert {path.name for path in folder.iterdir() if path.is_file()} == {path.name for path in first.iterdir()}


@pytest.mark.parametrize("which", FOLDERS[1:])
def test_folder_of_the_base_model(chain, which):
    folder = chain.folders[which].with_name(chain.folders[which].name + "-base")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["architectures"] == ["MQTLlavaModel"]
    assert (folder / "modeling_mqt_llava.py").exists()
    assert type(AutoModel.from_pretrained(folder)) is MQTLlavaModel


@pytest.mark.parametrize("which", FOLDERS)
def test_package_loads_every_folder_without_remote_code(chain, which):
    assert_loads_without_remote_code(chain.folders[which])


def test_code_was_run_from_the_given_modules_cache(chain):
    assert {path.name for path in chain.modules.glob("transformers_modules/**/*mqt_llava.py")} == CODE


def assert_loads_without_remote_code(folder):
    assert type(AutoConfig.from_pretrained(folder)) is MQTLlavaConfig
    assert type(AutoProcessor.from_pretrained(folder)) is MQTLlavaProcessor
    assert type(AutoModel.from_pretrained(folder)) is MQTLlavaModel
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is MQTLlavaForConditionalGeneration
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is MQTLlavaForConditionalGeneration


# In a process that has the package ----------------------------------------------------------------------------------------


def test_import_registers_the_auto_classes(checkpoint):
    assert type(AutoConfig.for_model("mqt_llava")) is MQTLlavaConfig
    config = make_model().config
    for auto_class, model_class in (
        (AutoModel, MQTLlavaModel),
        (AutoModelForImageTextToText, MQTLlavaForConditionalGeneration),
        (AutoModelForMultimodalLM, MQTLlavaForConditionalGeneration),
        (AutoModelForCausalLM, MQTLlavaForConditionalGeneration),
    ):
        assert type(auto_class.from_config(config)) is model_class
    assert_loads_without_remote_code(checkpoint)
    assert set(mqt_llava.__all__) >= {
        "MQTLlavaConfig",
        "MQTLlavaForConditionalGeneration",
        "MQTLlavaModel",
        "MQTLlavaProcessor",
    }


def test_remote_code_may_be_trusted_where_the_package_is_installed(checkpoint, tmp_path):
    trust = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, **trust)
    processor = AutoProcessor.from_pretrained(checkpoint, **trust)
    scope = {}
    exec(ANSWER, scope)
    assert scope["answer"](model, processor, make_images(3), PROMPTS, [3]) == expected_answers([3])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_loads_without_remote_code(tmp_path)


# Pushing to the Hub -----------------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_model_and_code(pushed):
    model, processor, config = pushed.commits
    assert model == {
        "README.md",
        "adaptive_mqt_llava.py",
        "budget_mqt_llava.py",
        "config.json",
        "configuration_mqt_llava.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_mqt_llava.py",
    }
    assert {"configuration_mqt_llava.py", "processing_mqt_llava.py"} <= processor
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= processor
    assert not {"config.json", "model.safetensors"} & processor
    assert {"config.json", "configuration_mqt_llava.py"} <= config


def test_pushed_repository_loads(pushed):
    folder = pushed.folder / REPO_ID
    assert {path.name for path in folder.glob("*.py")} == CODE
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_loads_without_remote_code(folder)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (40, 20), "red"), text="<image>?", return_tensors="pt")
    expected = make_model().generate(**inputs, num_visual_tokens=2, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**inputs, num_visual_tokens=2, max_new_tokens=6, do_sample=False), expected)
    assert type(AutoConfig.from_pretrained(pushed.folder / "someone/config")) is MQTLlavaConfig
