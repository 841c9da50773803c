"""JAX as an engine: PyTorch's models, translated by torchax and compiled by XLA."""
