"""Adversarial examples: inputs moved a little so that the loss rises."""
