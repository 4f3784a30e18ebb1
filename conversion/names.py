"""The mapping between the authors' tensors and ours, for both directions."""

import torch

from .files import LazyTensor


AUTHORS_QUERY_TRANSFORMER = "model.query_abstractor."
AUTHORS_VISION_TOWER = "model.vision_tower.vision_tower."
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
BUFFERS = (
    ".embeddings.position_ids",
    ".rotary_emb.inv_freq",
)  # saved by older versions of transformers, which newer ones compute

# Names, or prefixes if they end with a dot. In our model, a CLIP tower has no `vision_model.` prefix.
PREFIXES = {
    "model.query_abstractor.query": "model.query_transformer.query",
    "model.query_abstractor.pos_embed": "model.query_transformer.position_embedding",
    "model.query_abstractor.ln_q.": "model.query_transformer.query_norm.",
    "model.query_abstractor.ln_k.": "model.query_transformer.key_norm.",
    "model.query_abstractor.ln_v.": "model.query_transformer.value_norm.",
    "model.query_abstractor.attn.out_proj.": "model.query_transformer.out_proj.",
    "model.query_abstractor.proj": "model.query_transformer.text_proj.weight",  # transposed
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
# The authors' `attn.in_proj_weight` and `attn.in_proj_bias` each stack three of our tensors
AUTHORS_PACKED = "model.query_abstractor.attn.in_proj_"
PACKED = ("q_proj", "k_proj", "v_proj")
TRANSPOSED = "model.query_abstractor.proj"


def from_authors(tensors: dict[str, LazyTensor], new_rows: int = 0) -> dict[str, LazyTensor]:
    """Convert the authors' tensors to ours. Embeddings get `new_rows` rows at the end.

    Raises:
        `ValueError`: for a tensor with an unknown name or an unexpected shape.
    """
    return {new: made for name, tensor in tensors.items() for new, made in _ours(name, tensor, new_rows).items()}


def _ours(name: str, tensor: LazyTensor, new_rows: int) -> dict[str, LazyTensor]:
    try:
        if name.startswith(AUTHORS_PACKED):
            kind = name.removeprefix(AUTHORS_PACKED)
            return {
                f"model.query_transformer.{part}.{kind}": tensor.map(
                    lambda packed, i=i: packed.unflatten(0, (3, -1))[i]
                )
                for i, part in enumerate(PACKED)
            }
        if name == TRANSPOSED:
            tensor = tensor.map(torch.t)
        elif name in EMBEDDINGS:
            tensor = add_rows(tensor, new_rows)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{name} has the shape {tensor.shape}, which cannot be converted: {error}") from error
    return {rename(name): tensor}


def to_authors(tensors: dict[str, LazyTensor], vocab_size: int) -> dict[str, LazyTensor]:
    """Convert our tensors to the authors': the inverse of [`from_authors`]."""
    theirs = {}
    reverse = {new: old for old, new in PREFIXES.items()}
    for name, tensor in tensors.items():
        part, _, kind = name.removeprefix("model.query_transformer.").partition(".")
        if part in PACKED:
            if part == PACKED[0]:

                def packed(parts=[tensors[f"model.query_transformer.{part}.{kind}"] for part in PACKED]):
                    return torch.cat([part.load() for part in parts])

                shape = (3 * tensor.shape[0], *tensor.shape[1:])
                theirs[AUTHORS_PACKED + kind] = LazyTensor(shape, tensor.dtype, packed)
            continue
        official = rename(name, reverse)
        if official == TRANSPOSED:
            tensor = tensor.map(torch.t)
        elif official in EMBEDDINGS:
            tensor = tensor.map(lambda rows: rows[:vocab_size])
        theirs[official] = tensor
    return theirs


def rename(name: str, prefixes: dict[str, str] = PREFIXES) -> str:
    for old, new in prefixes.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    raise ValueError(f"unknown tensor {name}")


def add_rows(embedding: LazyTensor, new_rows: int) -> LazyTensor:
    """Append rows to an embedding, each the mean of the existing rows.

    In `lm_head`, the logit of a new token is then the mean of all logits, so its probability is at most 1 / `vocab_size` and the
    probabilities of other tokens hardly change.
    """
    if not new_rows:
        return embedding

    def extend(rows):
        mean = sum(chunk.sum(0, dtype=torch.float32) for chunk in rows.split(4096)) / len(rows)
        return torch.cat([rows, mean.to(rows.dtype).expand(new_rows, -1)])

    return embedding.map(extend)
