"""Write model cards and push checkpoints to the Hub."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData


RESULTS_TITLE = "## Accuracy and compute"

ASK = """content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, num_visual_tokens={{ example_tokens }}, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""

TEMPLATE = (
    """---
{{ card_data }}
---

# {{ model_name }}

An MQT-LLaVA model ([Matryoshka Query Transformer](https://arxiv.org/abs/2405.19315)) in HuggingFace's layout: it encodes
an image into any number *m* of visual tokens from 1 to {{ num_query_tokens }}, chosen at inference. Few tokens are cheap
and coarse, many are exact.
{% if origin %}
{{ origin }}
{% endif %}
## How to use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repo = "{{ repo_id }}"
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repo, dtype="auto", trust_remote_code=True)

"""
    + ASK
    + """```

Without `num_visual_tokens` the model uses all {{ num_query_tokens }}. The code in this repository needs transformers 5.19
or newer.
{% if accuracy %}
## Accuracy and compute

{{ accuracy }}
{% endif %}"""
)

ADAPTER_TEMPLATE = (
    """---
{{ card_data }}
---

# {{ model_name }}

An adapter for the [MQT-LLaVA](https://arxiv.org/abs/2405.19315) model `{{ base }}`, trained with {{ method }}. It answers
with any number of visual tokens per image from 1 to {{ num_query_tokens }}.
{% if origin %}
{{ origin }}
{% endif %}
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{{ base }}", trust_remote_code=True)
base = AutoModelForImageTextToText.from_pretrained("{{ base }}", dtype="auto", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{{ repo_id }}")

"""
    + ASK
    + """```
"""
)


def write_card(
    folder: Path,
    repo_id: str,
    license: str | None = None,
    base_models: list[str] | None = None,
    datasets: list[str] | None = None,
    languages: list[str] | None = None,
    origin: str = "",
) -> Path:
    """Write the model card, README.md, of a checkpoint folder.

    Args:
        repo_id (`str`): The repository or folder that the usage snippet loads.
        license (`str`, *optional*): The Hub's identifier of a license (`apache-2.0`, `llama2`, ...).
        base_models (`list[str]`, *optional*): Hub repositories of the models that this one is based on; folders are left out.
        origin (`str`, *optional*): A sentence about where the weights come from.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base_models = [name for name in base_models or [] if is_repository(name)]
    num_query_tokens = config.get("num_query_tokens", 256)
    card = ModelCard.from_template(
        ModelCardData(
            license=license,
            base_model=base_models or None,
            library_name="transformers",
            pipeline_tag="image-text-to-text",
            tags=["mqt_llava", "llava", "matryoshka", "custom_code"],
            datasets=datasets or None,
            language=languages or ["en"],
        ),
        template_str=TEMPLATE,
        model_name=Path(repo_id).name,
        repo_id=repo_id,
        num_query_tokens=num_query_tokens,
        example_tokens=min(16, num_query_tokens),
        origin=origin,
        accuracy=accuracy_table(folder),
    )
    return _save(card, folder)


def write_adapter_card(
    folder: Path,
    repo_id: str,
    num_query_tokens: int,
    license: str | None = None,
    datasets: list[str] | None = None,
    languages: list[str] | None = None,
    origin: str = "",
) -> Path:
    """Write the model card of a PEFT adapter's folder, with the metadata of PEFT's own cards.

    Args:
        num_query_tokens (`int`): M of the base model in adapter_config.json.
        repo_id, license, datasets, languages, origin: as for [`write_card`].
    """
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = adapter["base_model_name_or_path"]
    names = ("language_model", "query_transformer", "vision_tower")
    parts = [name for name in names if name in str(adapter["target_modules"])]
    methods = [f"LoRA of rank {adapter['r']} on {' and '.join(parts)}"] if parts else []
    if not parts and adapter["target_modules"]:
        methods = [f"{adapter['peft_type']} on {adapter['target_modules']}"]
    methods += [f"all weights of {part}" for part in adapter["modules_to_save"] or []]
    card = ModelCard.from_template(
        ModelCardData(
            license=license,
            base_model=base,
            library_name="peft",
            pipeline_tag="image-text-to-text",
            tags=[f"base_model:adapter:{base}", "lora", "mqt_llava", "transformers"],
            datasets=datasets or None,
            language=languages or None,
        ),
        template_str=ADAPTER_TEMPLATE,
        model_name=Path(repo_id).name,
        repo_id=repo_id,
        base=base,
        method=", ".join(methods),
        num_query_tokens=num_query_tokens,
        example_tokens=min(16, num_query_tokens),
        origin=origin,
    )
    return _save(card, folder)


def _save(card: ModelCard, folder: Path) -> Path:
    path = folder / "README.md"
    path.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return path


def check_base_is_on_hub(base: str):
    """Raise a `ValueError` if the base model of an adapter to be pushed is a local folder, which others cannot load."""
    if Path(base).is_dir():
        raise ValueError(
            f"An adapter on the Hub needs a base model on the Hub, but its base is the local folder {base}: push that first."
        )


def is_repository(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def license_of(models: list[str]) -> str | None:
    """The license in the first model card that states one, or `None`. Reads the cards from the Hub."""
    return next((stated for name in models if (stated := stated_license(name))), None)


def stated_license(model: str) -> str | None:
    try:
        return ModelCard.load(model).data.license
    except Exception:  # no card, no network, invalid metadata ...
        return None


def accuracy_table(folder: Path) -> str:
    """A checkpoint's accuracy.json, `{m: {question type: percent}}`, as a Markdown table with the compute of each m."""
    path = folder / "accuracy.json"
    if not path.exists():
        return ""
    from .cost import CostModel
    from .modeling.configuration_mqt_llava import MQTLlavaConfig

    accuracy = {int(m): figures for m, figures in json.loads(path.read_text(encoding="utf-8")).items() if m.isdigit()}
    kinds = list(next(iter(accuracy.values())))
    costs = CostModel(MQTLlavaConfig.from_pretrained(folder))
    lines = [
        f"| m | {' | '.join(kinds)} | GFLOP to the first token |",
        "| ---: |" + " ---: |" * (len(kinds) + 1),
    ]
    for m in sorted(accuracy):
        figures = " | ".join(f"{accuracy[m][kind]:.1f}" for kind in kinds)
        lines.append(f"| {m} | {figures} | {costs(m).flops / 1e9:.2f} |")
    return "\n".join(lines)


def show_results(folder: Path, results: Path) -> list[str]:
    """Add the results of `mqt-llava evaluate` to the model card of a checkpoint or an adapter.

    Args:
        folder (`Path`): the checkpoint or adapter. The section "Accuracy and compute" of its README.md is added or replaced.
        results (`Path`): the folder that `mqt-llava evaluate` wrote. Its accuracy.json and `.eval_results` are copied.

    Returns:
        `list[str]`: the names of the files that were written.

    Raises:
        `ValueError`: if `folder` has no checkpoint, adapter or model card, or if `results` has no results.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder} is neither a checkpoint nor an adapter: it has no config.json and no adapter_config.json"
        )
    if not all((results / name).is_file() for name in ("results.md", "accuracy.json")):
        raise ValueError(f"{results} has no results: `mqt-llava evaluate` writes results.md and accuracy.json")
    readme = folder / "README.md"
    if not readme.exists():
        raise ValueError(f"{folder} has no model card, README.md: `convert`, `finetune` and `push_to_hub` write one")
    section = f"{RESULTS_TITLE}\n\n{(results / 'results.md').read_text(encoding='utf-8').strip()}\n"
    try:
        card, *others = re.split(
            rf"^{RESULTS_TITLE}$", readme.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{readme} is not UTF-8: {error}") from None
    rest = "".join(others)
    following = re.search(r"^#{1,2} ", rest, re.MULTILINE)
    section += "\n" + rest[following.start() :] if following else ""
    partial = readme.with_suffix(".partial")
    partial.write_text(f"{card.rstrip()}\n\n{section}", encoding="utf-8")
    partial.replace(readme)
    written = ["README.md"]
    entries = sorted((results / ".eval_results").glob("*.yaml"))
    for pattern in {re.sub(r"\d+_visual_tokens", "*_visual_tokens", entry.name) for entry in entries}:
        for older in (folder / ".eval_results").glob(pattern):  # of other numbers of visual tokens
            older.unlink()
    for path in [results / "accuracy.json", *entries]:
        name = path.relative_to(results)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
        written.append(str(name))
    return written


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload MQT-LLaVA",
    token: str | None = None,
) -> str:
    """Upload a checkpoint folder to the Hub in one commit.

    Args:
        private (`bool`, *optional*): Whether a new repository is private. Defaults to the organisation's setting.
        revision (`str`, *optional*): The branch, which is created if it doesn't exist.

    Returns:
        `str`: the URL of the repository.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return f"{api.endpoint}/{repo_id}"
