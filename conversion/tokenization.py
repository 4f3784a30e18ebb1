"""Llama tokenizers as the authors' code runs them."""

import importlib.util
import json
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast


def load_llama_tokenizer(folder, legacy: bool, image_token: str = "<image>") -> PreTrainedTokenizerFast:
    """A Llama tokenizer that gives the ids of SentencePiece, with `image_token` added as a token of its own.

    Two things differ from `LlamaTokenizer` of transformers 5:

    * Runs of spaces. SentencePiece scores pieces made of spaces below all others, so `"  this"` is `▁`, `▁this`;
      transformers ranks their merges first and gives `▁▁`, `this`.
    * With `legacy`, a text that begins with a space still gets the prefix `▁`, at the start and after special tokens.

    Args:
        folder (`str`): Folder of `tokenizer.model` and `tokenizer_config.json`.
        legacy (`bool`): What `legacy` meant when the checkpoint was trained: a missing key is `True`.
        image_token (`str`): The placeholder of an image.
    """
    slow_names = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
    specification = json.loads(slow_names.backend_tokenizer.to_str())
    merges = specification["model"]["merges"]
    specification["model"]["merges"] = sorted(merges, key=lambda merge: not "".join(merge).strip("▁"))
    backend = Tokenizer.from_str(json.dumps(specification))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={"image_token": image_token},
        legacy=legacy,  # for those who ask; what it means is in the backend
        model_max_length=slow_names.model_max_length,
        padding_side=slow_names.padding_side,
        **{name: getattr(slow_names, name) for name in names if getattr(slow_names, name) is not None},
    )


def read_pieces(path: Path):
    """The SentencePiece model in a file.

    Raises:
        `ValueError`: naming the file, where it is empty or damaged. `ImportError`: naming packages that are missing.
    """
    # without these transformers takes `tokenizer.model` for another format, and asks for tiktoken
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ImportError(f"{' and '.join(missing)} is missing, to read {path.name}: pip install 'mqt-llava[convert]'")
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
        pieces.encode("a")  # an empty file is read as a model without pieces
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no SentencePiece model, or a damaged one") from error
    return pieces


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False
