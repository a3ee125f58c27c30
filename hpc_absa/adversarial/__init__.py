"""Adversarial examples: inputs changed slightly so that the loss rises."""
