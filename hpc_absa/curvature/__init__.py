"""Curvature of the loss: the top eigenvalue for decisions, and the whole spectrum."""
