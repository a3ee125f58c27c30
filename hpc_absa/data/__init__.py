"""Data sets: sources, the packed file, order and augmentation of samples, and the loader."""
