"""`mqt-llava evaluate DATA`: accuracy on your own questions at several numbers of visual tokens."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .errors import UsageError, requiring
from .models import find_file, load_config, load_costs, loading, name_checkpoint, place_and_load, silence_libraries
from .options import Dtype, check_num_visual_tokens, number_of_bits, parse_num_visual_tokens


OUTPUTS = ("results.md", "results.png", "accuracy.json", ".eval_results")


def evaluate(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="LLaVA conversations or chat messages, as JSON or JSON Lines, or a TSV of VLMEvalKit.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    image_folder: options.ImageFolder = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(metavar="M,M,...", help="Numbers of visual tokens to evaluate. Default: 1, 4, 16, ..., M."),
    ] = None,
    prompt_suffix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Line to add to each question. LLaVA 1.5 was trained with 'Answer the question using a single word or phrase.'",
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="exact_match, contains, vqa_accuracy, anls, multiple_choice, or module:function, called with an answer and its references.",
        ),
    ] = "exact_match",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Accepted loss against the best accuracy, in percentage points. Default: any difference that is not significant.",
        ),
    ] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    max_new_tokens: options.MaxNewTokens = 64,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = Dtype.auto,
    load_in_4bit: options.LoadIn4bit = False,
    load_in_8bit: options.LoadIn8bit = False,
    dataset_id: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Repository of the data on the Hub. With it, .eval_results is written for the model's repository.",
        ),
    ] = None,
    task_id: Annotated[str, typer.Option(help="Task of the data on the Hub.")] = "default",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in the folder.")] = False,
):
    """Measure accuracy against the number of visual tokens.

    The questions are your own. The report also has the compute and time of each number of visual tokens.

    Results are written after every answer. If the command is interrupted, run it again to continue.

    \b
    mqt-llava evaluate questions.json --image-folder images --output-dir results
    mqt-llava evaluate MMBench_DEV_EN.tsv --metric multiple_choice --num-visual-tokens 1,4,16,64,256 --output-dir results
    """
    num_bits = number_of_bits(load_in_4bit, load_in_8bit)
    check_ids(dataset_id, task_id)
    checkpoint = name_checkpoint(model, adapter)
    with requiring("evaluate"):
        from accelerate.utils.memory import should_reduce_batch_size
        from tqdm import tqdm

        from ..evaluation import report
        from ..evaluation.answers import answer_questions
        from ..evaluation.metrics import load_metric
        from ..evaluation.questions import read_questions
    silence_libraries()
    config = load_config(checkpoint)
    num_query_tokens = config.num_query_tokens
    sizes = [4**i for i in range(5) if 4**i < num_query_tokens] + [num_query_tokens]
    if num_visual_tokens is not None:
        parsed = [parse_num_visual_tokens(text) for text in num_visual_tokens.split(",")]
        sizes = sorted({check_num_visual_tokens(m, num_query_tokens) for m in parsed})
    try:
        score = load_metric(metric)
        questions = read_questions(data, image_folder, prompt_suffix)
        without = [question.id for question in questions if not question.references]
        if without:
            raise ValueError(
                f"{len(without)} of {len(questions)} questions have no answer to compare with, {without[0]} among them."
            )
    except ValueError as error:
        raise UsageError(str(error).rstrip(".")) from None
    references = questions[0].references
    try:
        score(references[0], references)
    except Exception as error:  # anything may happen in a function of the user's
        raise UsageError(f"the metric {metric} fails on {questions[0].id}: {describe(error)}") from None
    setting = {
        "data": [f"{file.name}, sha256 {digest(file)}" for file in data],
        "images": version_of_images(questions),
        "prompt_suffix": prompt_suffix,
        "model": os.path.realpath(checkpoint) if Path(checkpoint).is_dir() else checkpoint,
        "model_files": version_of(checkpoint, "config.json"),
        "adapter": os.path.realpath(adapter) if adapter and Path(adapter).is_dir() else adapter,
        "adapter_files": adapter and version_of(adapter, "adapter_config.json"),
        "dtype": dtype.value,
        "num_bits": num_bits,
        "metric": metric,
        "num_visual_tokens": sizes,
        "max_new_tokens": max_new_tokens,
    }
    done = find_answers(output_dir, setting, overwrite)
    number_of = Counter(row["id"] for row in done)
    # The answers of a question are computed together
    done = [row for row in done if number_of[row["id"]] == len(sizes)]
    complete = {row["id"] for row in done}
    left = [question for question in questions if question.id not in complete]
    if complete:
        print(f"answered before: {len(complete)} of {len(questions)} questions", file=sys.stderr)
    costs = load_costs(config)
    if left:
        request: dict[str, Any] = {
            "num_images": max(len(question.images) for question in left),
            "num_text_tokens": 256,
        }
        request |= {"num_new_tokens": max_new_tokens, "batch_size": batch_size}
        processor, model = place_and_load(checkpoint, config, costs, device, dtype, adapter, num_bits, **request)
        start_results(output_dir, setting, done)
        right, number = sum(row["score"] for row in done), len(done)
        go_on = "the same command, without --overwrite, goes on from there"
        try:
            with (
                (output_dir / "results.jsonl").open("a", encoding="utf-8") as file,
                tqdm(total=len(questions) * len(sizes), initial=len(done), unit="answer") as progress,
            ):
                for answer in answer_questions(model, processor, left, sizes, max_new_tokens, batch_size):
                    row = to_row(left[answer.index], answer, score)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    done.append(row)
                    right, number = right + row["score"], number + 1
                    progress.set_postfix_str(f"{100 * right / number:.1f} % right", refresh=False)
                    progress.update()
        except KeyboardInterrupt:
            print(f"interrupted: {len(done)} answers are written; {go_on}", file=sys.stderr)
            raise
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise UsageError(
                f"out of memory with --batch-size {batch_size}: {len(done)} answers are written; use a smaller one: {go_on}"
            ) from None
    failed = {row["id"]: row["error"] for row in done if row.get("error")}
    if len(failed) == len(questions):
        raise UsageError("every question failed, {} among them: {}".format(*next(iter(failed.items()))))
    rows = report.summarize(done, costs)
    said = report.sentence(rows, tolerance)
    (output_dir / "results.md").write_text(f"{said}\n\n{report.markdown(rows)}", encoding="utf-8")
    (output_dir / "accuracy.json").write_text(json.dumps(report.accuracy_json(rows), indent=1) + "\n")
    report.figure(rows, output_dir / "results.png")
    if dataset_id is not None:
        report.write_eval_results(rows, output_dir, dataset_id, task_id, metric)
    print(report.markdown(rows))
    print(said)
    if failed:
        name, reason = next(iter(failed.items()))
        print(
            f"{len(failed)} questions failed and count as wrong, {name} among them: {reason} (`error` in results.jsonl)"
        )


def to_row(question, answer, score) -> dict:
    """A line of results.jsonl. If the metric fails, the answer counts as wrong."""
    value, error = 0.0, answer.error
    if error is None:
        try:
            value = score(answer.text, question.references)
        except Exception as raised:  # anything may happen in a function of the user's
            error = f"the metric fails: {describe(raised)}"
    return {
        "id": question.id,
        "num_visual_tokens": answer.num_visual_tokens,
        "question": question.messages[-1]["content"],
        "answer": answer.text,
        "references": question.references,
        "score": value,
        "confidence": answer.confidence,
        "category": question.category,
        "num_images": len(question.images),
        "num_text_tokens": answer.num_text_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "seconds": answer.seconds,
        **({"error": error} if error else {}),
    }


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def version_of(source: str, name: str) -> str:
    """What tells a checkpoint or an adapter from others under the same name: the commit of a repository, or a folder's files by size and
    time of the last change."""
    with loading(source):
        folder = find_file(source, name).parent
    if not Path(source).is_dir():
        return folder.name
    kinds = (".jinja", ".json", ".model", ".safetensors")
    return version_of_files(
        [path for path in folder.iterdir() if path.suffix in kinds and path.name != "accuracy.json"]
    )


def version_of_images(questions) -> str:
    """The same of all image files; those in a TSV are data."""
    images = {image for question in questions for image in question.images if not isinstance(image, bytes)}
    return version_of_files(list(map(Path, images)))


def version_of_files(files: list[Path]) -> str:
    found = hashlib.sha256()
    for name in sorted(map(os.path.realpath, files)):
        stat = os.stat(name)
        found.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{len(files)} files, version {found.hexdigest()[:16]}"


def check_ids(dataset_id: str | None, task_id: str):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if dataset_id is not None:
            validate_repo_id(dataset_id)
    except HFValidationError as error:
        raise UsageError(f"--dataset-id is no repository: {error}") from None
    if not re.fullmatch(r"\w[\w.-]*", task_id):
        raise UsageError(f"--task-id is made of letters, digits, '_', '-' and '.'; got {task_id!r}")


def find_answers(output_dir: Path, setting: dict, overwrite: bool) -> list[dict]:
    """The answers in a folder, after checking that they are of the same evaluation. Nothing is written."""
    from ..evaluation.report import read_results

    path, before = output_dir / "setting.json", None
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"{output_dir} is a file, not a folder")
    try:
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(before, dict) and {"metric", "num_visual_tokens"} <= before.keys():
            if overwrite:
                return []
            name = next((name for name in setting if before.get(name) != setting[name]), None)
            if name is not None:
                raise UsageError(
                    f"{output_dir} has results with another {name}: {before.get(name)}, not {setting[name]}. Use another --output-dir, or "
                    "--overwrite"
                )
            return read_results(output_dir / "results.jsonl")
    except ValueError as error:
        raise UsageError(f"the results in {output_dir} are damaged ({error}). Use another --output-dir") from None
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UsageError(f"{output_dir} is not empty and holds no results")
    return []


def start_results(output_dir: Path, setting: dict, done: list[dict]):
    """Write the answers so far, and remove what earlier runs wrote at their end."""
    from ..evaluation.report import write_results

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {output_dir}: {error.strerror}") from None
    for name in OUTPUTS:
        written = output_dir / name
        shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)
    write_results(done, output_dir / "results.jsonl")
    partial = output_dir / "setting.partial"
    partial.write_text(json.dumps(setting, indent=1) + "\n", encoding="utf-8")
    partial.replace(output_dir / "setting.json")
