"""What the queries of `mqt-llava-tiny` look at before any training."""

import math

import torch
from torch import nn
from torch.nn import functional as F


NUM_COARSE = 14  # the whole picture, its quarters, its 3 x 3 cells


def gazes(side):
    """What the queries look at to begin with, from coarse to fine, `(side * side, side * side)` masks of patches: the whole
    picture, its quarters, its 3 x 3 cells, then squares of 2 x 2 patches: first those that share no patch, in which each thing has its
    centre once, then those between, both in an order whose beginnings cover the picture evenly."""

    def box(top, left, height, width):
        mask = torch.zeros(side, side)
        mask[top : top + height, left : left + width] = 1
        return mask.flatten()

    half, cell = side // 2, -(-side // 3)
    starts = [0, (side - cell) // 2, side - cell]
    coarse = [box(0, 0, side, side)]
    coarse += [box(y, x, half, half) for y in (0, half) for x in (0, half)]
    coarse += [box(y, x, cell, cell) for y in starts for x in starts]
    squares = {(y, x): box(y, x, 2, 2) for y in range(side - 1) for x in range(side - 1)}
    apart = [squares[place] for place in squares if place[0] % 2 == place[1] % 2 == 0]
    between = [squares[place] for place in squares if place[0] % 2 or place[1] % 2]
    fine = [part[step * i % len(part)] for part, step in ((apart, 7), (between, 17)) for i in range(len(part))]
    return torch.stack([*coarse, *fine, *fine][: side * side])  # of 8 x 8 queries one has a square for the second time


@torch.no_grad()
def look_from_coarse_to_fine(query_transformer):
    """
    Begin with visual tokens that each show a part of the picture, as [`gazes`] has it.

    With small random projections every query attends evenly to all patches, and all visual tokens begin as the same average.
    Here queries and keys share a projection that tells rows and columns, a query is the mean of the positions that it looks
    at, and the values go through rotations, in which nothing is lost.
    """
    width, head_dim = query_transformer.q_proj.in_features, query_transformer.head_dim
    positions, side = query_transformer.position_embedding, math.isqrt(query_transformer.num_query_tokens)
    masks = gazes(side)
    query_transformer.query.copy_(masks / masks.sum(1, keepdim=True) @ positions - positions)

    index = torch.arange(side * side)
    lines = F.one_hot(torch.stack([index // side, index % side]), side).permute(1, 0, 2).flatten(1).float()
    keys = F.layer_norm(positions, (width,))
    # Ridge regression: a key tells its row and its column, and its own row and column match by 10 each
    read = torch.linalg.solve(keys.T @ keys + torch.eye(width), keys.T @ (lines - lines.mean(0))).T
    read = read * (10 * head_dim**0.5) ** 0.5
    rest = torch.randn(head_dim - 2 * side, width) * 0.3 * width**-0.5
    projection = torch.cat([read, rest]).repeat(width // head_dim, 1)
    for layer in (query_transformer.q_proj, query_transformer.k_proj):
        layer.weight.copy_(projection)
    nn.init.orthogonal_(query_transformer.v_proj.weight)
    nn.init.eye_(query_transformer.out_proj.weight)
    nn.init.orthogonal_(query_transformer.text_proj.weight)
