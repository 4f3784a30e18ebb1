"""The demo's page, in Gradio."""

import os


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, which reads it

import functools
from html import escape, unescape
from pathlib import Path

import gradio as gr

from .. import TINY_CHECKPOINT
from ..cli.errors import UsageError
from . import markup
from .answers import MAX_QUESTION, Answers


FOLDER = Path(__file__).parent / "pictures"
PICTURES = {  # with descriptions
    "scene.png": "a dog, a bear, a fish and the number 7 on red stripes",
    "10000011.png": "a moon, three pears, a banana and an octopus on purple",
    "10000008.png": "a zebra and two whales on white",
    "10000018.png": "a tiger, a star, two cacti and the number 54 on yellow",
    "10000005.png": "a moon, a pear, a key and two bicycles on stripes",
}
TINY_QUESTIONS = (
    "What is at the top left?",
    "List everything.",
    "How many things are there?",
    "What colour is the background?",
    "Which number is printed?",
)
QUESTIONS = ("What is in this picture?", "Describe the picture in detail.", "Which colours are there?")
ABOUT_TINY = """**mqt-llava-tiny** was trained from scratch on drawn pictures of emoji-style objects and printed numbers, on plain or
patterned backgrounds. In short English sentences, it can tell which objects there are, how many and where, which number is printed
and which colour the background has. It knows nothing about photographs or the world, and its answers to any other question are
nonsense. It was made to show the effect of the number of visual tokens: with few, it gets colours and counts right, with more also
what is where."""
ABOUT = """The page runs any MQT-LLaVA model. Answers can be wrong with any number of visual tokens, and more often with few. See the model
card for what the model can and cannot do."""
MAX_FILE_SIZE = "30mb"
MAX_QUEUE = 32  # waiting requests; later ones are refused with a message
KEEP_SECONDS = 3600  # for uploaded pictures


def settings() -> dict:
    """Arguments of `launch`: the page's appearance, and settings under which nothing leaves the machine or is kept."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    theme = gr.themes.Default(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono
    )
    theme.set(
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )
    return {
        "theme": theme,
        "css": markup.CSS,
        "footer_links": ["api", "settings"],
        "run_history": False,
        "allowed_paths": [str(FOLDER)],
        "max_file_size": MAX_FILE_SIZE,
        "ssr_mode": False,
        "pwa": False,
    }


def shown(function):
    """Show a function's errors on the page or in the client, if they are errors that the user can fix."""

    @functools.wraps(function)
    def checked(*args):
        try:
            yield from function(*args)
        except UsageError as error:
            message = error.format_message()
            raise gr.Error(escape(message[:1].upper() + message[1:]) + ".", print_exception=False) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "out of memory" not in str(error).lower():
                raise
            raise gr.Error("Out of memory. Fewer visual tokens or a shorter question need less.") from error

    return checked


def build(answers: Answers, gpu=None) -> gr.Blocks:
    """
    Build the page.

    Args:
        answers (`Answers`): runs the model.
        gpu (`Callable`, *optional*): a decorator for functions that run the model, such as `spaces.GPU`.
    """
    num_query_tokens = answers.num_query_tokens
    is_tiny = Path(answers.checkpoint).exists() and Path(answers.checkpoint).samefile(TINY_CHECKPOINT)
    model = {"concurrency_id": "model", "concurrency_limit": 1}
    page_only = {"api_visibility": "private"}

    def computes(function):
        function = shown(function)
        return gpu(function) if gpu else function  # outermost, since ZeroGPU's process returns only `gr.Error`

    @computes
    def show_answer(picture, question, m, chat, auto):
        chat = answered(chat)
        news_of_answer = answers.ask(picture, question, m, turns_of(chat), auto)  # raises before anything is shown
        chat = [*chat, message("user", question)]
        yield chat
        for news in news_of_answer:
            if isinstance(news, str):
                yield [*chat, message("assistant", news)]
            else:
                lines = [news["answer"], markup.summary(news)]
                if "stage" in news:
                    lines.append(markup.reason(news, answers.schedule))
                yield [*chat, message("assistant", *lines)]

    @computes
    def show_comparison(picture, question, m, chat):
        rows = []
        for row in answers.compare(picture, question or last_question(chat)):
            rows.append(row)
            yield markup.comparison(rows, len(answers.compared), m, num_query_tokens)

    @computes
    def show_heat(picture, question, m, chat):
        explanation = answers.explain(picture, question or last_question(chat), m)
        asked = f"“{explanation.question}” {markup.tokens(m)}: “{explanation.answer}”"
        maps = markup.map_grid(answers.token_maps(), m)
        yield f"<p>{escape(asked)}</p>" + markup.heat_maps(explanation), maps

    @computes
    def api_ask(image, question, num_visual_tokens, history, auto):
        """Answer a question about a picture with a chosen number of visual tokens.

        Args:
            image: The picture, a file or a URL.
            question: What to ask about it.
            num_visual_tokens: Number of visual tokens for the picture. Few are cheap and coarse, many are exact.
            history: Earlier turns: a list of {"role": "user" or "assistant", "content": text}.
            auto: Use as many visual tokens as the question needs, if the checkpoint has a schedule.

        Returns:
            The answer with its number of visual tokens, seconds, compute and the size of its KV cache. While it is generated, the answer
            so far.
        """
        for news in answers.ask(image, question, num_visual_tokens, history, auto):
            yield {"answer": news} if isinstance(news, str) else news

    @computes
    def api_compare(image, question):
        """Answer a question about a picture with 1, 4, 16, 64 and all visual tokens.

        Args:
            image: The picture, a file or a URL.
            question: What to ask about it.

        Returns:
            An answer for each number of visual tokens, with seconds, compute and the size of its KV cache.
        """
        rows = []
        for row in answers.compare(image, question):
            rows.append(row)
            yield rows

    @computes
    def api_explain(image, question, num_visual_tokens):
        """Answer a question about a picture, and find which parts of the picture the answer depends on.

        Args:
            image: The picture, a file or a URL.
            question: What to ask about it.
            num_visual_tokens: Number of visual tokens for the picture.

        Returns:
            The answer, its words, and a heat map for the whole answer and for each word: rows of patches from the top, with each patch's
            share of the evidence. The padding that makes the picture square is included.
        """
        explanation = answers.explain(image, question, num_visual_tokens)
        yield {
            "answer": explanation.answer,
            "words": explanation.words,
            "heat": explanation.heat()[0].tolist(),
            "heat_of_words": [explanation.heat(word)[0].tolist() for word in range(len(explanation.words))],
        }

    @functools.cache
    def describe(m):
        return markup.describe(m, answers.costs_of(m), answers.accuracy), markup.accuracy_chart(answers.accuracy, m)

    with gr.Blocks(title="MQT-LLaVA", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(
            f"# MQT-LLaVA: choose how many visual tokens an answer gets\n\n"
            f"Ask about a picture. The slider sets how many visual tokens, 1 to {num_query_tokens}, represent the picture. "
            f"Few are cheap and coarse, many are exact. Model: **{escape(answers.name)}**, on {escape(place_of(answers.model))}."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = picture_input()
                to_try = gr.HTML(
                    markup.pictures_to_try({FOLDER / name: what for name, what in PICTURES.items()}),
                    js_on_load=markup.CHOOSE_PICTURE,
                    elem_id="pictures",
                )
                question = gr.Textbox(
                    label="Question",
                    placeholder="What do you want to know?",
                    max_length=MAX_QUESTION,
                    lines=1,
                    max_lines=4,
                    elem_id="question",
                )
                m = gr.Slider(
                    1,
                    num_query_tokens,
                    value=num_query_tokens,
                    step=1,
                    precision=0,
                    label="Visual tokens (m)",
                    buttons=[],
                    elem_id="m",
                )
                auto = gr.Checkbox(
                    False,
                    label="Auto: as many as the question needs",
                    visible=answers.schedule is not None,
                    elem_id="auto",
                )
                meaning = gr.HTML(describe(num_query_tokens)[0], elem_id="meaning")
                gr.Examples(
                    [[text] for text in (TINY_QUESTIONS if is_tiny else QUESTIONS)],
                    question,
                    label="Questions to try",
                    api_visibility="private",
                    cache_examples=False,
                )
            with gr.Column(scale=3, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Ask", id="ask"):
                        chat = gr.Chatbot(
                            label="Conversation",
                            height=440,
                            buttons=[],
                            render_markdown=False,  # Markdown from a model could load remote images; see `message`
                            latex_delimiters=[],
                            placeholder="Choose a picture, type a question, and press Enter.",
                            elem_id="chat",
                        )
                        with gr.Row():
                            ask_button = gr.Button(
                                "Ask", variant="primary", scale=1, min_width=70, elem_id="ask-button"
                            )
                            stop_button = gr.Button("Stop", scale=1, min_width=70, elem_id="stop-button")
                            clear_button = gr.Button("Start over", scale=1, min_width=125, elem_id="clear-button")
                    with gr.Tab("Compare", id="compare"):
                        gr.Markdown(
                            f"The same question with {listed(answers.compared)} visual tokens, without the turns before it."
                        )
                        compare_button = gr.Button("Compare", variant="primary", elem_id="compare-button")
                        cards = gr.HTML(elem_id="cards", min_height=40)
                        gr.Markdown(
                            "## How often it is right\n\nThis checkpoint, on its own test questions, by the number of visual tokens."
                        )
                        chart = gr.HTML(describe(num_query_tokens)[1], elem_id="chart")
                    with gr.Tab("What it looks at", id="look"):
                        gr.Markdown(
                            "Which parts of the picture the answer rests on, for all of it and word by word. It is evidence, not proof. With few "
                            "visual tokens it is as coarse as they are, and a word that needs no picture stays grey."
                        )
                        look_button = gr.Button("Show what it looks at", variant="primary", elem_id="look-button")
                        heat = gr.HTML(elem_id="heat", js_on_load=markup.SHOW_WORDS, min_height=40)
                        with gr.Accordion("What each visual token reads", open=False):
                            gr.Markdown(
                                "Which patches of the picture each visual token reads, the first at the top left. The checkpoint fixes it: it is "
                                "the same for every picture. Faint: tokens that the slider leaves out."
                            )
                            maps = gr.HTML(
                                markup.hint("They are shown with the first answer that is explained."), elem_id="maps"
                            )
                with gr.Accordion("What this model can and cannot do", open=False):
                    gr.Markdown(ABOUT_TINY if is_tiny else ABOUT)

        def take(chosen: gr.EventData):
            if chosen.name not in PICTURES:
                raise gr.Error("There is no such picture.")
            return str(FOLDER / chosen.name)

        to_try.select(take, None, picture, queue=False, show_progress="hidden", **page_only)
        inputs = [picture, question, m, chat]
        asked = gr.on(
            [ask_button.click, question.submit],
            show_answer,
            [*inputs, auto],
            chat,
            show_progress="minimal",
            **model,
            **page_only,
        )
        # Changes that don't need the server run in the browser at once, so that none can arrive after the next question
        asked.success(None, None, question, js="() => ''", **page_only)
        stop_button.click(None, cancels=[asked], **page_only)
        # (`picture.change` fires once the picture has loaded, which may be after a question about it)
        anew = [clear_button.click, to_try.select, picture.input]
        gr.on(anew, None, None, chat, js="() => [[]]", cancels=[asked], **page_only)
        compare_button.click(show_comparison, inputs, cards, show_progress="minimal", **model, **page_only)
        look_button.click(show_heat, inputs, [heat, maps], show_progress="minimal", **model, **page_only)
        m.change(describe, m, [meaning, chart], queue=False, show_progress="hidden", **page_only)
        auto.change(
            lambda on: gr.Slider(interactive=not on), auto, m, queue=False, show_progress="hidden", **page_only
        )

        # For programs: the same without the page
        with gr.Row(visible=False):
            history, result, call = gr.JSON([], label="history"), gr.JSON(label="result"), gr.Button()
        call.click(api_ask, [picture, question, m, history, auto], result, api_name="ask", **model)
        call.click(api_compare, [picture, question], result, api_name="compare", **model)
        call.click(api_explain, [picture, question, m], result, api_name="explain", **model)
    return page.queue(max_size=MAX_QUEUE)


def picture_input() -> gr.Image:
    """An image input that passes on the path of any file. A broken one is reported when a question is asked. (Gradio's own decoding
    would only report "Error", and for a subclass, Gradio would write a file next to this one.)"""
    picture = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard", "webcam"],
        label="Picture",
        height=280,
        buttons=["fullscreen"],
        alt_text="The picture that questions are about",
        elem_id="picture",
    )
    picture.preprocess = lambda data: data and data.path
    return picture


def place_of(model) -> str:
    device = "the CPU" if model.device.type == "cpu" else str(model.device)
    number = markup.amount(model.num_parameters(), "").strip()
    return f"{device} ({number} parameters, {str(model.dtype).removeprefix('torch.')})"


def listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def message(role: str, *lines: str) -> dict:
    """A turn of the conversation on the page: what is said, and lines about it. Escaped, since the component renders HTML."""
    return {"role": role, "content": [escape(line) for line in lines]}


def text_of(turn: dict) -> str:
    """What was said in a turn, without the lines about it."""
    said = turn["content"][0]
    return unescape(said if isinstance(said, str) else said["text"])


def answered(chat: list[dict]) -> list[dict]:
    """The conversation without a last question that was refused or stopped, and so has no answer."""
    return chat[:-1] if chat and chat[-1]["role"] == "user" else chat


def turns_of(chat: list[dict]) -> list[dict]:
    return [{"role": turn["role"], "content": text_of(turn)} for turn in chat]


def last_question(chat: list[dict]) -> str:
    return next((text_of(turn) for turn in reversed(chat) if turn["role"] == "user"), "")
