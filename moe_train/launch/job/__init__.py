"""What every process of a job has: environment, device, network, job store, failure reports."""
