"""Training input from packed files against torchvision."""
