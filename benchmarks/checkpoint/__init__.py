"""Saving a run's state: this package, torch.save and torch.distributed.checkpoint, interleaved."""
