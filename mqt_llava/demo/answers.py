"""The model behind the demo: answers, comparisons and explanations, without the page."""

import hashlib
import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from huggingface_hub import hf_hub_download
from PIL import Image

from ..cli.conversation import Conversation
from ..cli.errors import UsageError
from ..cli.images import load_image
from ..cli.models import load_schedule
from ..cli.options import AUTO, check_num_visual_tokens
from ..explain import EncodedImages, Explanation, explain, token_maps


MAX_PICTURES = 8  # pictures whose visual tokens are cached
MAX_SIDE = 4096  # pixels; larger pictures are scaled down
MAX_QUESTION = 2000  # characters
MAX_EXPLAINED = 64  # tokens of an explained answer


@dataclass
class Picture:
    """A picture that is encoded once for all questions and numbers of visual tokens."""

    image: Image.Image
    conversation: Conversation
    seconds: float  # that encoding took
    encoded: EncodedImages | None = None  # for explanations, with a grey picture as the baseline


class Left(Exception):
    """Raised when nobody waits for the answer any more."""


class Answers:
    """
    Answers questions about pictures, one request at a time. Requests are stateless, but the visual tokens of recent pictures and
    the keys and values of the last conversation about each are cached.

    Args:
        processor, model: as loaded by the Auto classes.
        checkpoint (`str`): the folder or repository they are from; its accuracy.json is read if it has one.
        costs (`CostModel`, *optional*): the model's.
        max_new_tokens (`int`): the maximum length of an answer.
    """

    def __init__(self, processor, model, checkpoint: str, costs=None, max_new_tokens: int = 256):
        self.processor, self.model, self.costs = processor, model, costs
        self.checkpoint, self.max_new_tokens = checkpoint, max_new_tokens
        self.num_query_tokens = model.config.num_query_tokens
        has_schedule = getattr(model.generation_config, "visual_token_schedule", None) is not None
        self.schedule = load_schedule(model) if has_schedule else None
        self.accuracy = read_accuracy(checkpoint)
        self.pictures: OrderedDict = OrderedDict()
        self.lock = threading.Lock()
        self.maps: torch.Tensor | None = None

    @classmethod
    def from_pretrained(cls, checkpoint: str, device=None, **settings) -> "Answers":
        """Load a checkpoint: on a GPU, if there is one, in the checkpoint's dtype, else on the CPU in float32."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from ..cli.models import load_costs

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        dtype = torch.float32 if device.type == "cpu" else "auto"
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=False)
        costs = load_costs(model.config)
        return cls(processor, model.to(device).eval(), checkpoint, costs, **settings)

    @property
    def name(self) -> str:
        return Path(self.checkpoint).resolve().name if Path(self.checkpoint).exists() else self.checkpoint

    @property
    def compared(self) -> list[int]:
        """The numbers of visual tokens to compare: 1, 4, 16, 64, M."""
        return [m for m in (1, 4, 16, 64) if m < self.num_query_tokens] + [self.num_query_tokens]

    def ask(self, path: str | None, question: str, num_visual_tokens=None, history=(), auto: bool = False):
        """
        Answer a question about a picture, given earlier turns.

        Args:
            path (`str`): the picture's file.
            num_visual_tokens (`int`, *optional*): m. Defaults to M.
            history (`list[dict]`): earlier turns, as `{"role": "user" or "assistant", "content": text}`.
            auto (`bool`): use as many visual tokens as the question needs, by the checkpoint's schedule.

        Yields:
            `str`: the answer so far; finally a `dict` with `answer`, `num_visual_tokens`, `prompt_tokens`, `new_tokens`, `seconds`,
            `flops` and `kv_cache_bytes`, and with `auto` also `stage` and `confidence`.

        Raises:
            `UsageError`: for errors that the user can fix.
        """
        question = check_question(question)
        messages = as_messages(history, self.processor.image_token)
        m = self.check(num_visual_tokens)
        if auto and self.schedule is None:
            raise UsageError(f"this checkpoint has no schedule for {AUTO}: `mqt-llava calibrate` makes one")

        def work(write):
            start = time.perf_counter()
            picture = self.picture(path)
            conversation = self.conversation(picture, self.schedule) if auto else picture.conversation
            conversation.messages = messages
            if not auto:  # cached visual tokens of another m are dropped
                conversation.num_visual_tokens = m
            row = conversation.ask(question, write)
            return self.with_costs(row | {"seconds": round(time.perf_counter() - start, 4)})

        return self.stream(work)

    def compare(self, path: str | None, question: str, num_visual_tokens: list[int] | None = None):
        """
        Answer a question with each of several numbers of visual tokens, without a cache.

        Yields:
            `dict`: as from [`Answers.ask`]. Each `seconds` includes the time of encoding the picture, which is measured once.
        """
        question = check_question(question)
        for m in [self.check(m) for m in num_visual_tokens or self.compared]:

            def work(write, m=m):
                picture = self.picture(path)
                row = self.conversation(picture, m).ask(question, write)
                return self.with_costs(row | {"seconds": round(row["seconds"] + picture.seconds, 4)})

            *_, row = self.stream(work)
            yield row

    def explain(self, path: str | None, question: str, num_visual_tokens: int | None = None) -> Explanation:
        """Explain the answer to a question; see [`mqt_llava.explain.explain`]."""
        question, m = check_question(question), self.check(num_visual_tokens)
        with self.lock:
            picture = self.picture(path)
            try:
                if picture.encoded is None:
                    picture.encoded = EncodedImages(self.model, self.processor, picture.image)
                return explain(self.model, self.processor, picture.encoded, question, m, max_new_tokens=MAX_EXPLAINED)
            except ValueError as error:
                raise UsageError(str(error)) from None

    def token_maps(self) -> torch.Tensor:
        """The patches that each visual token attends to, averaged over heads: `(M, side, side)`."""
        with self.lock:
            if self.maps is None:
                maps = token_maps(self.model).mean(1)
                side = round(maps.shape[1] ** 0.5)
                self.maps = maps.unflatten(-1, (side, side)).cpu()
        return self.maps

    def costs_of(self, num_visual_tokens: int, num_text_tokens: int = 40, num_new_tokens: int = 1):
        """The [`Cost`] of a question about one picture, or `None` if it is unknown."""
        if self.costs is None:
            return None
        request = {"num_text_tokens": num_text_tokens, "num_new_tokens": num_new_tokens}
        return self.costs(num_visual_tokens, **request, dtype=self.model.dtype)

    def with_costs(self, row: dict) -> dict:
        """Add the FLOPs, without any cache, and the size of the KV cache to an answer. With auto, FLOPs depend on the stages."""
        m = row["num_visual_tokens"]
        cost = self.costs_of(m, row["prompt_tokens"] - m, max(1, row["new_tokens"]))
        flops = None if cost is None or "stage" in row else cost.flops
        return row | {"flops": flops, "kv_cache_bytes": None if cost is None else cost.kv_cache_bytes}

    def check(self, num_visual_tokens) -> int:
        if isinstance(num_visual_tokens, float) and num_visual_tokens.is_integer():
            num_visual_tokens = int(num_visual_tokens)
        if num_visual_tokens is not None and type(num_visual_tokens) is not int:
            raise UsageError(f"a number of visual tokens must be an integer; got {num_visual_tokens!r}")
        return check_num_visual_tokens(num_visual_tokens, self.num_query_tokens)

    def picture(self, path: str | None) -> Picture:
        """A picture with its visual tokens. The caller must hold the lock."""
        if not path:
            raise UsageError("choose a picture first")
        try:
            key = hashlib.sha256(Path(path).read_bytes()).digest()
        except OSError:  # uploads are deleted after a while
            raise UsageError("the picture is no longer there; choose it again") from None
        if key not in self.pictures:
            image = load_image(path)
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            conversation = Conversation(
                self.processor, self.model, [image], self.num_query_tokens, self.max_new_tokens
            )
            pixel_values = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
            start = time.perf_counter()
            conversation.encode(pixel_values.to(self.model.device))
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize(self.model.device)
            self.pictures[key] = Picture(image, conversation, time.perf_counter() - start)
            while len(self.pictures) > MAX_PICTURES:
                self.pictures.popitem(last=False)
        self.pictures.move_to_end(key)
        return self.pictures[key]

    def conversation(self, picture: Picture, num_visual_tokens) -> Conversation:
        """A new conversation about an encoded picture."""
        features = picture.conversation.image_features
        return Conversation(
            self.processor, self.model, [picture.image], num_visual_tokens, self.max_new_tokens, features
        )

    def stream(self, work):
        """Run `work(write)` in a thread that holds the lock. Yield the text written so far after each piece, and finally the return
        value. If the caller stops iterating, the work stops at the next token."""
        news: SimpleQueue = SimpleQueue()
        left = threading.Event()

        def write(piece):
            if left.is_set():
                raise Left
            news.put(piece)

        def run():
            try:
                with self.lock:
                    if not left.is_set():
                        news.put(work(write))
            except Exception as error:
                news.put(error)

        threading.Thread(target=run, daemon=True).start()
        text = ""
        try:
            while True:
                item = news.get()
                if isinstance(item, Exception):
                    raise item
                if not isinstance(item, str):
                    yield item
                    return
                if item.strip():
                    text += item
                    yield text
        finally:
            left.set()


def check_question(question: str | None) -> str:
    question = (question or "").strip()
    if not question:
        raise UsageError("the question is empty")
    if len(question) > MAX_QUESTION:
        raise UsageError(f"the question has {len(question)} characters; at most {MAX_QUESTION} are allowed")
    return question


def as_messages(history, image_token: str) -> list[dict]:
    """Earlier turns as messages for the chat template, with the picture in the first one."""
    messages: list[dict] = []
    for index, turn in enumerate(history or ()):
        role = ("user", "assistant")[index % 2]
        if not isinstance(turn, dict) or turn.get("role") != role or not isinstance(turn.get("content"), str):
            raise UsageError(
                'a history must alternate {"role": "user", "content": text} and {"role": "assistant", "content": text}'
            )
        parts = [{"type": "text", "text": turn["content"].replace(image_token, "")}]
        messages.append({"role": role, "content": parts if messages else [{"type": "image"}, *parts]})
    if len(messages) % 2:
        raise UsageError("a history must end with an answer of the assistant")
    return messages


def read_accuracy(checkpoint: str) -> dict[int, float]:
    """The accuracy in % over all questions for each m, from a checkpoint's accuracy.json. Empty if it has no valid one."""
    path = Path(checkpoint, "accuracy.json")
    try:
        if not Path(checkpoint).is_dir():
            path = Path(hf_hub_download(checkpoint, path.name))
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {int(m): float(rows[m]["all"]) for m in sorted(filter(str.isdigit, rows), key=int)}
    except Exception:  # no file, no network, other content ...
        return {}
