"""`hpc-absa compare`: runs a grid of schedules, batch sizes and seeds, and makes its tables."""
