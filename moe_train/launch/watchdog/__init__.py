"""The hang watchdog: finds ranks that no longer make progress, says which one and why, and ends the job."""
