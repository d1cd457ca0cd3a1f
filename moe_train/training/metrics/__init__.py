"""Numbers of a training, from the criterion's sums to the log files and the console."""
