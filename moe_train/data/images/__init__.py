"""Labelled images: IDX files, folders of class folders, and scikit-learn's digits."""

from __future__ import annotations

from moe_train.data.images.base import Images, ImageSet
from moe_train.data.images.open_images import DIGITS, open_images

__all__ = ["DIGITS", "ImageSet", "Images", "open_images"]
