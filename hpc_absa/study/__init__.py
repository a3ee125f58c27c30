"""`hpc-absa compare`: a grid of schedules, batches and seeds, and the talk's two tables of it."""
