"""Mirrors and shifts training images, drawn by (seed, update, image): the same after a resume, on any rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_train.tasks.seeded_uniform import AUGMENTATION, draws

_FLIP, _DOWN, _RIGHT = range(3)  # columns of the draws


def augment(
    pixels: NDArray[np.uint8], uids: NDArray[np.int64], seed: int, update: int, flip: bool, shift: int
) -> NDArray[np.uint8]:
    """Mirrors each image with probability ½ and moves it by up to ``shift`` pixels each way; edges are repeated.

    Args:
        pixels: [B, H, W, C].
        uids: [B] numbers of the images.
    """
    if not len(pixels) or not (flip or shift):
        return pixels
    uniform = draws(seed, update, uids, 3, AUGMENTATION)
    rows, columns = np.arange(pixels.shape[1]), np.arange(pixels.shape[2])
    if shift:
        steps = np.floor(uniform[:, [_DOWN, _RIGHT]] * (2 * shift + 1)).astype(np.int64) - shift
        down = np.clip(rows + steps[:, :1], 0, len(rows) - 1)
        right = np.clip(columns + steps[:, 1:], 0, len(columns) - 1)
    else:
        down, right = np.tile(rows, (len(pixels), 1)), np.tile(columns, (len(pixels), 1))
    if flip:
        mirrored = uniform[:, _FLIP] < 0.5
        right[mirrored] = right[mirrored, ::-1]
    item = np.arange(len(pixels))[:, None, None]
    return pixels[item, down[:, :, None], right[:, None, :]]
