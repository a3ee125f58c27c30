"""Networks and losses by name: built-in, torchvision's, and user-defined."""

from hpc_absa.models.registry import build, build_loss

__all__ = ["build", "build_loss"]
