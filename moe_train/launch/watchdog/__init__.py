"""The hang watchdog: finds ranks that make no progress, reports which and why, and ends the job."""
