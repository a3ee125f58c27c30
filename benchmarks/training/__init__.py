"""Training throughput against DDP, Horovod and Lightning."""
