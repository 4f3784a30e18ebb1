"""Read questions about images, with their reference answers, from common formats."""

import base64
import csv
import io
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..training.data import SampleError, load_conversations, open_image


OPTIONS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
CHOOSE = "Answer with the option's letter from the given choices directly."  # the prompt of LLaVA 1.5


@dataclass
class Question:
    """
    A question about images.

    Args:
        id (`str`): a unique name.
        messages (`list[dict]`): the conversation up to the question, with an `<image>` for each image.
        images (`list`): the images, anything that [`~mqt_llava.training.data.open_image`] accepts.
        references (`list[str]`): right answers, if any is known.
        category (`str`, *optional*): accuracy is also reported by category.
    """

    id: str
    messages: list[dict]
    images: list
    references: list[str] = field(default_factory=list)
    category: str | None = None

    def open_images(self) -> list:
        """
        Raises:
            `ValueError`: for an image that cannot be read.
        """
        return [open_image(image) for image in self.images]


def read_questions(data_files, image_folder=None) -> list[Question]:
    """
    Read questions from LLaVA's JSON and chat messages, as for [`~mqt_llava.training.data.load_conversations`], or from VLMEvalKit's
    TSV (columns `index`, `image` in base64 or `image_path`, `question`, `answer`, options `A`, `B`, ..., `hint`, `category`). In a
    conversation, the assistant's last turn is the reference; a row may have more in `references`, a list of strings, and a
    `category`.

    Args:
        data_files (`str`, `Path` or `list[str]`): one or more files in `.json`, `.jsonl` or `.tsv` format.
        image_folder (`str` or `Path`, *optional*): folder that relative image paths start from. Defaults to that of the data file.

    Returns:
        `list[Question]`: the questions. Image files are not opened.

    Raises:
        `ValueError`: for files that are missing or have no questions, for rows that are not a valid question, and for missing image
            files.
    """
    files = [Path(file) for file in ([data_files] if isinstance(data_files, (str, os.PathLike)) else data_files)]
    questions = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"There is no data file {file}.")
        read = _read_tsv if file.suffix == ".tsv" else _read_conversations
        questions += read(file, image_folder)
    if not questions:
        raise ValueError(f"There are no questions in {', '.join(map(str, files))}.")
    return questions


def _read_conversations(file: Path, image_folder) -> list[Question]:
    rows = load_conversations(file, image_folder, needs_answer=False)
    questions, broken = [], []
    for row in rows:
        missing = [image for image in row["images"] if not os.path.isfile(image)]
        if row["error"] or missing:
            broken.append(f"{row['id']}: {row['error'] or f'there is no image file {missing[0]}'}")
            continue
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        references = [messages.pop()["content"]] if messages[-1]["role"] == "assistant" else []
        references = row["references"] or references
        questions.append(Question(row["id"], messages, row["images"], references, row["category"]))
    _refuse(broken)
    return questions


def _read_tsv(file: Path, image_folder) -> list[Question]:
    csv.field_size_limit(sys.maxsize)  # rows contain images
    folder, questions, broken = Path(image_folder or file.parent), [], []
    images: dict[str | None, str] = {}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        columns = rows.fieldnames or []
        if "question" not in columns or not {"image", "image_path"} & set(columns):
            raise ValueError(
                f"{file} must have columns `question` and `image` or `image_path`; it has {', '.join(columns)}."
            )
        for number, row in enumerate(rows):
            name = f"{file.name}[{row.get('index') or number}]"
            try:
                content = row.get("image") or ""
                if re.fullmatch(r"\d+", content):  # the index of the row that has the image
                    content = images.get(content, "")
                images[row.get("index")] = content
                path = folder / row.get("image_path", "")
                if not content and not path.is_file():
                    raise SampleError(f"there is no image file {path}")
                picture = _from_base64(content) if content else path
                category = row.get("category") or None
                questions.append(Question(name, _ask(row), [picture], _answers(row), category))
            except SampleError as error:
                broken.append(f"{name}: {error}")
    _refuse(broken)
    return questions


def _from_base64(content: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(base64.b64decode(content, validate=False)))
    except Exception as error:
        raise SampleError(f"its image cannot be read ({error})") from None


def _ask(row: dict) -> list[dict]:
    options = {letter: row[letter] for letter in OPTIONS if row.get(letter)}
    lines = [row["question"]]
    if row.get("hint"):
        lines.insert(0, row["hint"])
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    lines += [CHOOSE] if options else []
    return [{"role": "user", "content": "<image>\n" + "\n".join(lines)}]


def _answers(row: dict) -> list[str]:
    answer = row.get("answer") or ""
    return [text for text in (answer, row.get(answer) if answer in OPTIONS else None) if text]


def _refuse(broken: list[str]):
    if broken:
        more = f" In total {len(broken)} questions are broken." if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}, so this question cannot be used.{more}")
