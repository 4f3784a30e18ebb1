"""Load conversations about images, in LLaVA's JSON format or as chat messages, with `datasets`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torch.utils.data import get_worker_info

from ..modeling.image_processing_mqt_llava import load_image


IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class SampleError(ValueError):
    """Raised for a sample that cannot be used, with the reason."""


def load_conversations(data_files, image_folder=None, streaming=False, needs_answer=True):
    r"""
    Read conversations about images.

    A row is either in LLaVA's format, `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A cat."}]}`, where `image` is a file, a list of files or missing; or a chat, `{"messages": [{"role":
    "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What?"}]}, ...], "images": [...]}`, where
    each `content` is a string or a list of parts. The images of a chat are in its parts or, in the same order, in `images`. If
    they have no placeholder, they are put before the first question. A chat may also be split into `prompt` and `completion`, two
    lists of turns; answers in the prompt are then not used as labels.

    Args:
        data_files (`str`, `Path` or `list[str]`):
            JSON files (one list of rows) or JSON Lines (`.jsonl`, one row per line).
        image_folder (`str` or `Path`, *optional*):
            Folder that relative image paths start from. Defaults to that of the data file.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows on demand, without a copy in the cache of `datasets`. Each file is a shard for one worker.
        needs_answer (`bool`, *optional*, defaults to `True`):
            Whether each row needs an answer. If not, it may end with a question, and its `references`, a list of strings, and its
            `category` are kept.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: rows `{"id": str, "messages": [{"role": str, "content": str, "train":
        bool}, ...], "images": [str, ...], "error": str}` for [`MQTLlavaDataCollator`]. Images are not opened. `id` names the file
        and the index of the row, `error` the reason why a row is not a valid sample.

    Raises:
        `ValueError`: if a file or folder does not exist, a file is not JSON in UTF-8, or there are no rows.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value
    from datasets.exceptions import DatasetGenerationError

    files = [str(file) for file in ([data_files] if isinstance(data_files, (str, os.PathLike)) else data_files)]
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"There is no data file {file}.")
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ValueError(f"There is no image folder {image_folder}.")
    message = {"role": Value("string"), "content": Value("string"), "train": Value("bool")}
    columns = {"id": Value("string"), "messages": List(message), "images": List(Value("string"))}
    if not needs_answer:
        columns |= {"references": List(Value("string")), "category": Value("string")}
    features = Features(columns | {"error": Value("string")})
    # `datasets` caches by arguments, so what tells a file from others of its name, now or before, must be one of them
    stats = map(os.stat, files)
    versions = [f"{os.path.realpath(f)} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for f, s in zip(files, stats)]
    arguments = {"files": files, "versions": versions, "image_folder": str(image_folder or "")}
    arguments["needs_answer"] = needs_answer
    builder = IterableDataset if streaming else Dataset
    try:
        return builder.from_generator(_read_rows, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__)) from error


def refuse_broken(dataset):
    """
    Check the rows of [`load_conversations`] before a long training run. Images are not opened.

    Raises:
        `ValueError`: for rows that are not valid samples or name a missing image file. The message has the first of them and their
            number.
    """
    broken = []
    for row in dataset.select_columns(["id", "images", "error"]):
        missing = [f"there is no image file {image}" for image in row["images"] if not os.path.isfile(image)]
        if row["error"] or missing:
            broken.append((row["id"], row["error"] or missing[0]))
    if broken:
        more = f" In total {len(broken)} samples are broken." if len(broken) > 1 else ""
        raise ValueError(f"Sample {broken[0][0]} cannot be trained on: {broken[0][1]}.{more}")


def _read_rows(files: list[str], versions: list[str], image_folder: str, needs_answer: bool) -> Iterator[dict]:
    index = None
    for file in files:
        folder = Path(image_folder or os.path.dirname(file))
        for index, row in enumerate(_parse(file)):
            name = f"{os.path.basename(file)}[{index}]"
            if isinstance(row, dict) and "id" in row:
                name += f" (id {row['id']})"
            try:
                sample = canonical_sample(row, needs_answer)
                images = [str(folder / path) for path in map(_local_path, sample["images"])]
                more = {} if needs_answer else _references(row)
                yield {"id": name, "messages": sample["messages"], "images": images, "error": None, **more}
            except SampleError as error:
                more = {} if needs_answer else {"references": [], "category": None}
                yield {"id": name, "messages": [], "images": [], "error": str(error), **more}
    if index is None:
        raise ValueError(f"There are no rows in {', '.join(files)}.")


def _references(row: dict) -> dict:
    references, category = row.get("references") or [], row.get("category")
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise SampleError(f"its `references` must be a list of texts; got {references!r}")
    return {"references": references, "category": None if category is None else str(category)}


def _parse(file: str) -> Iterator:
    try:
        with open(file, encoding="utf-8-sig") as lines:  # with or without a byte order mark
            if file.endswith(".jsonl"):
                yield from map(json.loads, filter(str.strip, lines))
                return
            rows = json.load(lines)
    except ValueError as error:
        raise ValueError(
            f"{file} cannot be read: {error}. A `.json` file must be a list of rows, a `.jsonl` file must have one row per line, in UTF-8."
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} must be a list of rows; got {type(rows).__name__}.")
    yield from rows


def _local_path(image) -> str:
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str):
        raise SampleError(f"an image in a JSON file must be the path of a file; got {image!r}")
    return path


def canonical_sample(row, needs_answer: bool = True) -> dict:
    r"""
    Convert a row in any format that [`load_conversations`] reads to `{"messages": [{"role": str, "content": str, "train": bool},
    ...], "images": [...]}`. A user's content begins with one `<image>` for each of its images; `train` tells whether an answer is
    used as a label.

    Images are not changed: they are anything that [`open_image`] accepts. `None` is dropped.

    Raises:
        `SampleError`: for a row that cannot be trained on.
    """
    row = row if isinstance(row, dict) else {}
    prompt, is_chat = [], not row.get("conversations")
    if row.get("messages") or not is_chat:
        turns = row.get("messages") or row["conversations"]
    elif row.get("prompt") and row.get("completion"):
        prompt, turns = row["prompt"], row["completion"]
        if isinstance(prompt, str) or isinstance(turns, str):
            raise SampleError("its `prompt` and `completion` must be lists of turns; got text")
    else:
        raise SampleError("it has neither `conversations` nor `messages`, nor `prompt` and `completion`")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in [*prompt, *turns]):
        raise SampleError("its turns are not a list of objects")
    images = _listed(row.get("images")) or _listed(row.get("image"))
    messages: list[dict] = []
    inline_images: list = []
    for index, turn in enumerate([*prompt, *turns]):
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value") or ""
        if not isinstance(role, str) or role not in ROLES:
            raise SampleError(f"the role of a turn must be one of {', '.join(ROLES)}; got {role!r}")
        if not isinstance(content, str):
            content = _join_parts(content, inline_images)
        train = index >= len(prompt) and turn.get("train") is not False
        messages.append({"role": ROLES[role], "content": _images_first(content), "train": train})
    if images and inline_images:
        raise SampleError("it has images both in its messages and beside them")
    images += inline_images
    if messages[0]["role"] == "assistant":  # it has no question; LLaVA's trainer skips it too
        del messages[0]
    if is_chat and images and not any(IMAGE_TOKEN in message["content"] for message in messages):
        question = next((message for message in messages if message["role"] == "user"), {"content": ""})
        question["content"] = _images_first(IMAGE_TOKEN * len(images) + question["content"])
    _check_turns(messages, needs_answer)
    num_placeholders = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if num_placeholders != len(images):
        raise SampleError(
            f"it has {len(images)} images and {num_placeholders} {IMAGE_TOKEN}; each image needs one, and no other text "
            "may have it"
        )
    return {"messages": messages, "images": images}


def _listed(images) -> list:
    images = images if isinstance(images, (list, tuple)) else [images]
    return [image for image in images if image is not None]


def _join_parts(parts: list[dict], images: list) -> str:
    """The parts of a message as one text. Images in the parts are added to `images`."""
    text = ""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise SampleError(f"the content of a turn must be a string or a list of parts; got {parts!r}")
    for part in parts:
        if part.get("type") == "text":
            text += str(part.get("text") or "")
        elif part.get("type") == "image":
            text = IMAGE_TOKEN + text
            if part.get("url"):
                raise SampleError(f"images are not downloaded; pass {part['url']} as a file")
            images += [part[key] for key in ("image", "path", "base64") if part.get(key) is not None][:1]
        else:
            raise SampleError(f'the type of a part must be "text" or "image"; got {part.get("type")!r}')
    return text


def _images_first(content: str) -> str:
    r"""`<image>\n` for each image, then the text, as in LLaVA's training."""
    count = content.count(IMAGE_TOKEN)
    return f"{IMAGE_TOKEN}\n" * count + content.replace(IMAGE_TOKEN, "").strip() if count else content


def _check_turns(messages: list[dict], needs_answer: bool):
    """Check that questions and answers alternate, after at most one system message, and that answers are text without images."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if turns is not messages and IMAGE_TOKEN in messages[0]["content"]:
        raise SampleError(f"the system message has an {IMAGE_TOKEN}")
    for index, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise SampleError(
                f"user and assistant must take turns, the user first; turn {index} is of {message['role']}"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise SampleError(f"the answer in turn {index} is empty")
        if message["role"] == "assistant" and IMAGE_TOKEN in message["content"]:
            raise SampleError(f"the answer in turn {index} has an {IMAGE_TOKEN}")
    if needs_answer and not any(message["role"] == "assistant" and message["train"] for message in turns):
        raise SampleError("it has no answer")
    if not turns:
        raise SampleError("it has no question")


def open_image(image):
    """
    Decode an image: anything that [`~mqt_llava.modeling.image_processing_mqt_llava.load_image`] accepts except URLs. The processor
    converts its colours and orientation.

    Raises:
        `SampleError`: if the file does not exist, or is not an image.
    """
    source = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if isinstance(source, str) and source.startswith(
        ("http://", "https://")
    ):  # every worker would download it in every epoch
        raise SampleError(f"images are not downloaded; pass {source} as a file")
    if get_worker_info() is not None and getattr(image, "tile", None):
        # PIL has not read it yet, and workers would share the open file and its position
        image = image.filename or getattr(image.fp, "name", None) or image
    try:
        image = load_image(image)
        if isinstance(image, Image.Image):
            image.load()
        return image
    except ValueError as error:
        text = str(error).rstrip(".")
        raise SampleError(text[0].lower() + text[1:]) from None
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        raise SampleError(f"{getattr(image, 'filename', '') or 'an image'} is damaged ({error})") from None


def with_num_visual_tokens(dataset, num_visual_tokens: int):
    """Give all rows of a dataset the same m: `eval_dataset={"m16": with_num_visual_tokens(dataset, 16)}`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows for [`MQTLlavaDataCollator`].
        num_visual_tokens (`int`): m of all images. The collator checks it.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the rows with a column `num_visual_tokens`.
    """
    return dataset.map(lambda row: {"num_visual_tokens": num_visual_tokens})
