"""Text: lines, language pairs, normalisation, tokenizer and vocabulary."""
