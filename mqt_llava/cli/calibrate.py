"""`mqt-llava calibrate DATA`: choose the schedule of "auto" on your own questions."""

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .errors import UsageError, requiring
from .models import load_config, load_costs, name_checkpoint, place_and_load, silence_libraries
from .options import Dtype, check_num_visual_tokens, parse_num_visual_tokens


TIMED = 256  # questions that measure the time of the schedule
LEAST_ACCURACY = 0.1  # below this the references are not in the model's words, as with free captions


def calibrate(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="LLaVA conversations or chat messages, as JSON or JSON Lines. The last question of each row is asked.",
        ),
    ],
    image_folder: options.ImageFolder = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for generation_config.json. Default: the checkpoint, or the adapter.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.01, max=50, help="Maximum loss against all visual tokens, in percentage points.")
    ] = 0.5,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Confidence of the guarantee.")] = 0.95,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="M,M,...", help="Numbers of visual tokens that stages may have. Default: 1, 2, 4, ..., M."
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="Metric of an answer, as for `evaluate`.")
    ] = "exact_match",
    agreement: Annotated[
        bool,
        typer.Option("--agreement", help="Compare with the answers at all visual tokens instead of the references."),
    ] = False,
    max_new_tokens: options.MaxNewTokens = 64,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    dtype: options.WeightsDtype = Dtype.auto,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the split of the pictures into some that choose schedules and others that test them. Trying several seeds "
            "voids the guarantee."
        ),
    ] = 0,
):
    """Calibrate `--num-visual-tokens auto` on your own questions.

    The result is the cheapest schedule that loses at most --tolerance points against all visual tokens, guaranteed with --confidence: in
    accuracy if every question has an answer, otherwise in agreement. The guarantee holds for pictures and questions like those in DATA.

    \b
    mqt-llava calibrate questions.json --image-folder images --model my-mqt-llava
    mqt-llava calibrate questions.jsonl --tolerance 2 --output-dir calibrated
    """
    checkpoint = name_checkpoint(model, adapter)
    if output_dir is None and not Path(checkpoint if adapter is None else adapter).is_dir():
        raise UsageError("cannot write to a repository on the Hub: choose a folder with --output-dir DIR")
    with requiring("evaluate"):
        import numpy as np
        from tqdm import tqdm

        from ..calibration import calibrate, collect, doubling, pictures_needed, split
        from ..evaluation import answer_questions, load_metric, read_questions
    silence_libraries()
    config = load_config(checkpoint)
    sizes = doubling(config.num_query_tokens)
    if num_visual_tokens is not None:
        parsed = [parse_num_visual_tokens(text) for text in num_visual_tokens.split(",")]
        sizes = [check_num_visual_tokens(m, config.num_query_tokens) for m in parsed]
        sizes = sorted({*sizes, config.num_query_tokens})  # others are compared with all
    try:
        score = load_metric(metric)
        questions = [question for question in read_questions(data, image_folder) if question.images]
    except ValueError as error:
        raise UsageError(str(error).rstrip(".")) from None
    if not questions:
        raise UsageError("no question is about an image")
    picture = number_pictures(questions)
    number, counts = max(picture) + 1, np.bincount(picture)
    needed = pictures_needed(tolerance / 100, confidence, counts.mean() / counts.max())
    if number - number // 3 < needed:
        raise UsageError(
            f"{number} pictures are too few to guarantee a loss of at most {tolerance:g} points with a confidence of "
            f"{confidence:g}: two thirds of them test, and at least {needed} are needed for that even if no answer changes. "
            "Use more pictures, or a larger --tolerance"
        )
    folder = Path(checkpoint if adapter is None else adapter) if output_dir is None else output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    request: dict[str, Any] = {
        "num_images": max(len(question.images) for question in questions),
        "num_text_tokens": 256,
    }
    request |= {"num_new_tokens": max_new_tokens, "batch_size": batch_size}
    processor, loaded = place_and_load(checkpoint, config, load_costs(config), device, dtype, adapter, **request)

    has_references = not agreement and all(question.references for question in questions)
    measure = "accuracy" if has_references else "agreement"

    def right(i, text, with_all):
        return score(text, questions[i].references) if has_references else text == with_all

    seconds: dict[int | str, float] = dict.fromkeys(sizes, 0.0)
    try:
        with tqdm(total=len(questions) * len(sizes), unit="answer") as progress:

            def answers_with_progress():
                for answer in answer_questions(loaded, processor, questions, sizes, max_new_tokens, batch_size):
                    seconds[answer.num_visual_tokens] += answer.seconds / len(questions)
                    progress.update()
                    yield answer

            answers = collect(answers_with_progress(), len(questions), sizes, picture, right)
    except ValueError as error:
        raise UsageError(str(error)) from None
    accuracy = answers.right[-1].mean()
    if has_references and accuracy < LEAST_ACCURACY:
        raise UsageError(
            f"with all visual tokens {100 * accuracy:.1f} % of the answers are right by {metric}, so a loss would mean nothing: compare with "
            "the answers at all visual tokens (--agreement), or use another --metric"
        )
    schedule = calibrate(answers, tolerance / 100, confidence, seed)
    tested = split(answers, seed)[1]  # pictures that the schedule was not chosen on
    if schedule.num_visual_tokens == sizes[-1:]:
        print_curve(tested, schedule, seconds, measure)
        raise UsageError(
            f"nothing is written: no schedule cheaper than all visual tokens could be shown to lose at most {tolerance:g} points of "
            f"{measure} with a confidence of {confidence:g}, from {len(questions)} questions about {number} pictures"
        )
    schedule.calibration = {
        "tolerance": tolerance / 100,
        "confidence": confidence,
        "measure": measure,
        "num_questions": len(questions),
        "num_pictures": number,
        "num_visual_tokens": sizes[-1],
        "max_new_tokens": max_new_tokens,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    some = [question for question, i in zip(questions, picture) if i in set(tested.picture)][:TIMED]
    asked = list(answer_questions(loaded, processor, some, [schedule], max_new_tokens, batch_size))
    seconds["auto"] = sum(answer.seconds for answer in asked) / len(asked)
    print_curve(tested, schedule, seconds, measure)
    settings = loaded.generation_config
    settings.visual_token_schedule = schedule.to_dict()
    write_settings(settings, folder)
    stages = " -> ".join(map(str, schedule.num_visual_tokens))
    thresholds = ", ".join(f"{threshold:g}" for threshold in schedule.thresholds)
    print(f"schedule {stages}" + (f", accepted from a confidence of {thresholds} on" if thresholds else ""))
    print(f"written to {folder / 'generation_config.json'}")


def number_pictures(questions) -> list[int]:
    """An integer for each question, the same for questions that share an image, directly or through others."""
    from ..evaluation.questions import name_image

    group: dict[Hashable, Hashable] = {}

    def find(name):
        while group[name] != name:
            name = group[name]
        return name

    names = [[name_image(image) for image in question.images] for question in questions]
    for of_question in names:
        for name in of_question:
            group.setdefault(name, name)
            group[find(name)] = find(of_question[0])
    index = {root: i for i, root in enumerate(dict.fromkeys(find(of_question[0]) for of_question in names))}
    return [index[find(of_question[0])] for of_question in names]


def write_settings(settings, folder: Path):
    """Write a temporary file and move it into place. Private keys are left out: with them, settings would be loaded without our own."""
    settings = {name: value for name, value in settings.to_diff_dict().items() if not name.startswith("_")}
    partial = folder / f"generation_config.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(folder / "generation_config.json")


def print_curve(answers, schedule, seconds: dict, measure: str):
    """Print a table of fixed numbers of visual tokens, the schedule, its numbers in random order, and the smallest numbers that are as good as all."""
    import numpy as np
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..modeling.adaptive_mqt_llava import VisualTokenSchedule

    table = Table(box=box.SIMPLE)
    for column in ("m", f"{measure}, %", "visual tokens", "language model tokens", "seconds"):
        table.add_column(column, justify="left" if column == "m" else "right")

    def add(name, stop, tokens=None, duration=None):
        cells = [f"{100 * answers.accuracy(stop).mean():.2f}", f"{answers.visual_tokens(stop).mean():.2f}"]
        cells += ["" if tokens is None else f"{tokens.mean():.1f}", "" if duration is None else f"{duration:.4f}"]
        table.add_row(name, *cells)

    for i, m in enumerate(answers.num_visual_tokens):
        stop = np.full(len(answers.picture), i)
        add(str(m), stop, answers.language_model_tokens(VisualTokenSchedule([m], []), stop), seconds[m])
    if "auto" in seconds:
        stages = " -> ".join(map(str, schedule.num_visual_tokens))
        stop = answers.stops(schedule)
        add(f"auto: {stages}", stop, answers.language_model_tokens(schedule, stop), seconds["auto"])
        add("the same at random", np.random.default_rng(0).permutation(stop))
    add("oracle", (answers.right >= answers.right[-1]).argmax(0))
    Console().print(table)
    print("Measured on the test pictures, without the cost of encoding images.")
