"""The end of a graph that goes on to the next sample."""

from collections.abc import Mapping

from torch import Tensor

from anamorph.stepping import GUIDANCE, HISTORY, NOISE, WEIGHTS


def stepped(sample: Tensor, predicted: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The sums of `anamorph.stepping`: predictions [branches, N, C, h, w] -> x' [N, C, h, w], h' [K, N, C, h, w].

    Written as products element by element, in the samples' own type: engines that multiply matrices in lower precision
    leave these as they are.
    """
    guided = (given[GUIDANCE].reshape(-1, 1, 1, 1, 1) * predicted.to(sample.dtype)).sum(0)
    noise, history = given.get(NOISE), given.get(HISTORY)
    terms = (sample, guided, noise, *(() if history is None else history.unbind(0)))
    columns = given[WEIGHTS][:, :, None, None, None, None].unbind(1)
    total = columns[0] * sample
    for weight, term in zip(columns[1:], terms[1:], strict=False):
        total = total if term is None else total + weight * term
    return total[0], total[1:]
