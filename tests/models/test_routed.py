"""What all models with sparse blocks share."""

from __future__ import annotations

from moe_train.models.routed import block_names
from tests.models.helpers import small_model


def test_blocks_are_named_by_their_layers() -> None:
    assert block_names(small_model("switch", sparse_layers="odd", decoder_sparse_layers="all")) == {
        0: "encoder layer 1",
        1: "decoder layer 0",
        2: "decoder layer 1",
    }
    inserted = small_model("xmoe", sparse_layers="insert_after:1", decoder_sparse_layers="none")
    assert block_names(inserted) == {0: "after encoder layer 0"}
    assert block_names(small_model("dense", sparse_layers="none", decoder_sparse_layers="none")) == {}
