"""Starts, connects and ends the processes of a job."""
