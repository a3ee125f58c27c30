"""`hpc-absa serve`: a live, read-only web page over running and finished runs."""
