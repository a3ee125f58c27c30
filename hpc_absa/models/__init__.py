"""Networks and losses by name: our own, torchvision's, and the user's."""

from hpc_absa.models.losses import build_loss
from hpc_absa.models.registry import build

__all__ = ["build", "build_loss"]
