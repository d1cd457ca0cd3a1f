"""Corpora, cleaning, SentencePiece, fairseq's binarised format, and the data folder that training reads.

:class:`moe_train.data.folder.DataFolder` is how the rest of the project reads prepared data.
"""
