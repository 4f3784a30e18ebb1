"""Read questions about images, with their reference answers, from common formats."""

import ast
import base64
import contextlib
import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..training.data import SampleError, canonical_sample, load_conversations, open_image


OPTIONS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# VLMEvalKit's prompts for LLaVA 1.5
CHOOSE = "Answer with the option's letter from the given choices directly."
CHOOSE_IN_CHINESE = "请直接回答选项字母。"
LONGEST_INDEX = 64  # a shorter `image` is the index of the row that has it, as in VLMEvalKit


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


def name_image(image) -> Hashable:
    """What identifies an image among those of many questions: its file, its content, or itself."""
    if isinstance(image, (str, os.PathLike)):
        return os.path.realpath(image)
    return image if isinstance(image, bytes) else id(image)


def read_questions(data_files, image_folder=None, prompt_suffix: str | None = None) -> list[Question]:
    """
    Read questions from LLaVA's JSON and chat messages, as for [`~mqt_llava.training.data.load_conversations`], or from VLMEvalKit's
    TSV. In a conversation, the assistant's last turn is the reference; a row may have more in `references`, a list of strings, and a
    `category`.

    A TSV has the columns `index`, `image` (base64, or the index of the row that has the same) or `image_path`, `question`, `answer`,
    and, if there are any, options `A`, `B`, ..., `hint` and `category`. Cells with several images or answers are lists, as Python
    writes them. The prompt is that of VLMEvalKit for LLaVA 1.5 where there are options, else the bare question.

    Args:
        data_files (`str`, `Path` or `list[str]`): one or more files in `.json`, `.jsonl` or `.tsv` format.
        image_folder (`str` or `Path`, *optional*): folder that relative image paths start from. Defaults to that of the data file.
        prompt_suffix (`str`, *optional*): a line to add to each question, such as LLaVA 1.5's "Answer the question using a single word
            or phrase."

    Returns:
        `list[Question]`: the questions. Image files are not opened.

    Raises:
        `ValueError`: for files that are missing or have no questions, for rows that are not a valid question or have the name of
            another, and for missing image files.
    """
    files = [Path(file) for file in ([data_files] if isinstance(data_files, (str, os.PathLike)) else data_files)]
    questions = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"There is no data file {file}.")
        read = _read_tsv if file.suffix.lower() == ".tsv" else _read_conversations
        try:
            of_file = read(file, image_folder)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if sum(other.name == file.name for other in files) > 1:
            for question in of_file:
                question.id = f"{file.parent}/{question.id}"
        questions += of_file
    if not questions:
        raise ValueError(f"There are no questions in {', '.join(map(str, files))}.")
    names = Counter(question.id for question in questions)
    if len(names) < len(questions):
        raise ValueError(f"There are {names.most_common(1)[0][1]} questions named {names.most_common(1)[0][0]}.")
    for question in questions:
        question.references = [text for text in question.references if text.strip()]
    for question in questions if prompt_suffix else []:
        question.messages[-1]["content"] += f"\n{prompt_suffix}"
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
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t", restval="")
        columns = reader.fieldnames or []
        if "question" not in columns or not {"image", "image_path"} & set(columns):
            raise ValueError(
                f"{file} must have columns `question` and `image` or `image_path`; it has {', '.join(columns)}."
            )
        rows = [{name: "" if text == "nan" else text for name, text in row.items()} for row in reader]
    image_of = {row.get("index"): row.get("image", "") for row in rows}
    decoded: dict[str, bytes] = {}  # rows with the same image share it

    def decode(content: str) -> bytes:
        if content not in decoded:
            try:
                decoded[content] = base64.b64decode("".join(content.rpartition(",")[2].split()), validate=True)
                Image.open(io.BytesIO(decoded[content]))
            except Exception as error:  # decoders raise all kinds of exceptions
                raise SampleError(f"its image cannot be read ({error})") from None
        return decoded[content]

    for number, row in enumerate(rows):
        name = f"{file.name}[{row.get('index') or number}]"
        try:
            content, passed = row.get("image", ""), set()
            while content and len(content) <= LONGEST_INDEX:
                if content in passed or content not in image_of:
                    raise SampleError(f"its image is that of row {content}, which has none")
                passed.add(content)
                content = image_of[content]
            images: list = [decode(one) for one in _listed(content)]
            if not images:
                images = [folder / path for path in _listed(row.get("image_path", ""))]
                missing = [path for path in images if not path.is_file()]
                if missing:
                    raise SampleError(f"there is no image file {missing[0]}")
            if not images:
                raise SampleError("it has no image")
            if not row["question"]:
                raise SampleError("it has no question")
            sample = canonical_sample({"messages": [{"role": "user", "content": _ask(row)}], "images": images}, False)
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in sample["messages"]]
            questions.append(Question(name, messages, images, _answers(row), row.get("category") or None))
        except SampleError as error:
            broken.append(f"{name}: {error}")
    _refuse(broken)
    return questions


def _listed(cell: str) -> list[str]:
    """A cell with one text, or with several as a Python list."""
    if cell.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            texts = ast.literal_eval(cell)
            if all(isinstance(text, str) for text in texts):
                return texts
    return [cell] if cell else []


def _ask(row: dict) -> str:
    options = {letter: row[letter] for letter in OPTIONS if row.get(letter)}
    lines = [row["question"]]
    if row.get("hint"):
        lines.insert(0, row["hint"])
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    if options:
        lines.append(CHOOSE_IN_CHINESE if re.search(r"[\u4e00-\u9fff]", "\n".join(lines)) else CHOOSE)
    return "\n".join(lines)


def _answers(row: dict) -> list[str]:
    answers = _listed(row.get("answer") or row.get("answers") or "")
    letters = [answer.strip("() .").upper() for answer in answers]
    return [*answers, *(row[letter] for letter in letters if letter in OPTIONS and row.get(letter))]


def _refuse(broken: list[str]):
    if broken:
        more = f" In total {len(broken)} questions are broken." if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}, so this question cannot be used.{more}")
