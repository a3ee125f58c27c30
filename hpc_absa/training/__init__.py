"""A phase of training: the step, the probe, the decision, the checkpoint, the stop."""
