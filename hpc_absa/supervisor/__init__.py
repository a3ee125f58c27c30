"""Launches phases, reads how they ended, relaunches with more ranks, restarts after failures."""
