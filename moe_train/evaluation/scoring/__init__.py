"""Scores of hypotheses: BLEU, chrF++, further metrics, averages, and the files and tables that hold them."""
