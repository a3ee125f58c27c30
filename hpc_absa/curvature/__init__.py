"""Curvature of the loss: its top eigenvalue for decisions, its spectrum for people."""
