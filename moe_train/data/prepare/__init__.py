"""The stages of moe-prepare, from a corpus to a data folder."""
