"""How strongly residuals of a ControlNet count where no prompt says what its picture shows. No PyTorch here."""


def guess_scales(count: int) -> tuple[float, ...]:
    """From 0.1 for the first residual to 1 for that of the middle, evenly on a logarithmic scale.

    Source: Zhang et al. 2023 (arXiv:2302.05543), section 3.3, and the weights of its published code.
    """
    return tuple(10.0 ** (index / (count - 1) - 1.0) for index in range(count))
