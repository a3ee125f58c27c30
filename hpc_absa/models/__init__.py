"""Networks and losses by name: built-in, torchvision's, and user-defined."""

from hpc_absa.models.losses import build_loss
from hpc_absa.models.registry import build

__all__ = ["build", "build_loss"]
