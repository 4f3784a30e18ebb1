"""`mqt-llava calibrate DATA`: how many visual tokens "auto" takes, chosen on questions of one's own."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError
from .models import (
    Dtype,
    ModelOption,
    check_num_visual_tokens,
    load_config,
    load_costs,
    load_model,
    name_base,
    name_checkpoint,
    parse_num_visual_tokens,
    place,
    resolve_device,
    silence_libraries,
)


TIMED = 256  # questions that are asked with the schedule, for its time
LEAST_ACCURACY = 0.1  # below it references are not what the model can say, such as captions in other words


def calibrate(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="LLaVA conversations or chat messages: JSON or JSON Lines. Of each row the last question is asked.",
        ),
    ],
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images are. Default: beside each data file.")
    ] = None,
    model: ModelOption = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR_OR_REPO", help="LoRA adapter to merge.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where generation_config.json is written. Default: into the checkpoint, or the adapter.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.01, max=50, help="Loss against all visual tokens, at most, in points (of 100).")
    ] = 0.5,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the promise.")] = 0.95,
    num_visual_tokens: Annotated[
        str | None, typer.Option(metavar="M,M,...", help="What stages may have. Default: 1, 2, 4, ..., M.")
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="How right an answer is, as `evaluate` has it.")
    ] = "exact_match",
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Compare with the answers at all visual tokens, not with references.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of an answer, at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of the weights. auto: as `ask` chooses it.")] = Dtype.auto,
    seed: Annotated[
        int,
        typer.Option(help="Of the split into pictures that propose and that test. To try several voids the promise."),
    ] = 0,
):
    """Choose the schedule of `--num-visual-tokens auto` on questions of your own, with a promise.

    Chosen is the cheapest schedule that is shown to lose at most --tolerance points against all visual tokens: in accuracy, where
    every question has an answer, else in agreement. The promise holds for pictures and questions like those of DATA.

    \b
    mqt-llava calibrate questions.json --image-folder images --model my-mqt-llava
    mqt-llava calibrate questions.jsonl --tolerance 2 --output-dir calibrated
    """
    checkpoint = name_base(adapter) if adapter and model is None else name_checkpoint(model)
    if output_dir is None and not Path(checkpoint if adapter is None else adapter).is_dir():
        raise UsageError("a repository is not written to; say where to write: --output-dir DIR")
    try:
        import numpy as np
        from tqdm import tqdm

        from ..calibration import calibrate, collect, doubling, pictures_needed, split
        from ..evaluation import answer_questions, load_metric, read_questions
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'mqt-llava[evaluate]'") from None
    silence_libraries()
    config = load_config(checkpoint)
    sizes = doubling(config.num_query_tokens)
    if num_visual_tokens is not None:
        sizes = {parse_num_visual_tokens(text) for text in num_visual_tokens.split(",")}
        for m in sizes:
            check_num_visual_tokens(m, config.num_query_tokens)
        sizes = sorted({*sizes, config.num_query_tokens})  # what others are compared with
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
            f"{number} pictures are too few to promise a loss of at most {tolerance:g} points with a confidence of "
            f"{confidence:g}: two thirds of them test, and at least {needed} are needed for that, where not one answer changes. "
            "Give more pictures, or a larger --tolerance"
        )
    folder = Path(checkpoint if adapter is None else adapter) if output_dir is None else output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    device = resolve_device(device)
    costs = load_costs(checkpoint, config)
    request = {"num_images": max(len(question.images) for question in questions), "num_text_tokens": 256}
    request |= {"num_new_tokens": max_new_tokens, "batch_size": batch_size}
    placement = place(checkpoint, config, costs, device, dtype, None, **request)
    processor, network = load_model(checkpoint, device, placement, adapter)

    has_references = not agreement and all(question.references for question in questions)
    measure = "accuracy" if has_references else "agreement"

    def right(i, text, with_all):
        return score(text, questions[i].references) if has_references else text == with_all

    seconds = dict.fromkeys(sizes, 0.0)
    try:
        with tqdm(total=len(questions) * len(sizes), unit="answer") as progress:

            def answers_with_progress():
                for answer in answer_questions(network, processor, questions, sizes, max_new_tokens, batch_size):
                    seconds[answer.num_visual_tokens] += answer.seconds / len(questions)
                    progress.update()
                    yield answer

            answers = collect(answers_with_progress(), len(questions), sizes, picture, right)
    except ValueError as error:
        raise UsageError(str(error)) from None
    accuracy = answers.right[-1].mean()
    if has_references and accuracy < LEAST_ACCURACY:
        raise UsageError(
            f"with all visual tokens {100 * accuracy:.1f} % of the answers are right by {metric}, so a loss says nothing: compare with "
            "the answers at all visual tokens, --agreement, or by another --metric"
        )
    schedule = calibrate(answers, tolerance / 100, confidence, seed)
    if schedule.num_visual_tokens == sizes[-1:]:
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
        "dtype": str(network.dtype).removeprefix("torch."),
    }
    tested = split(answers, seed)[1]  # what the schedule was not chosen on
    some = [question for question, i in zip(questions, picture) if i in set(tested.picture)][:TIMED]
    asked = list(answer_questions(network, processor, some, [schedule], max_new_tokens, batch_size))
    seconds["auto"] = sum(answer.seconds for answer in asked) / len(asked)
    print_curve(tested, schedule, seconds, measure)
    settings = network.generation_config
    settings.visual_token_schedule = schedule.to_dict()
    write_settings(settings, folder)
    print(f"written to {folder / 'generation_config.json'}")


def number_pictures(questions) -> list[int]:
    """An integer for each question, the same for all that have an image in common, with others between them or not."""
    group = {}

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


def name_image(image):
    """What tells a picture from others."""
    return os.path.realpath(image) if isinstance(image, (str, Path)) else hash(image.tobytes())


def write_settings(settings, folder: Path):
    """Written aside and moved into place. Marks of where settings came from would have them loaded without what is ours."""
    settings = {name: value for name, value in settings.to_diff_dict().items() if not name.startswith("_")}
    partial = folder / f"generation_config.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(folder / "generation_config.json")


def print_curve(answers, schedule, seconds: dict, measure: str):
    """Fixed numbers of visual tokens, the schedule, the same numbers dealt out at random, and the smallest that is as good as all."""
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
    stop = answers.stops(schedule)
    stages = " -> ".join(map(str, schedule.num_visual_tokens))
    add(f"auto: {stages}", stop, answers.language_model_tokens(schedule, stop), seconds["auto"])
    add("the same at random", np.random.default_rng(0).permutation(stop))
    add("oracle", (answers.right >= answers.right[-1]).argmax(0))
    Console().print(table)
    print("On the pictures that tested, images apart.")
    thresholds = ", ".join(f"{threshold:g}" for threshold in schedule.thresholds)
    print(f"schedule {stages}" + (f", taken from a confidence of {thresholds}" if thresholds else ""))
