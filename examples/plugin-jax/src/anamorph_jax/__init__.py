"""JAX as an engine: PyTorch's models, traced and compiled by XLA."""
