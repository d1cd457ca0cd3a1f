"""The run folder: its files, what they record, and the layout of the run."""
