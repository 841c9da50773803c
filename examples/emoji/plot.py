"""Draw the loss curves of trainings: python examples/emoji/plot.py OUT CSV [CSV ...] (needs matplotlib)."""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(out: Path, logs: list[Path]) -> None:
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3.2), layout="constrained", squeeze=False)
    for axis, log in zip(axes[0], logs, strict=True):
        steps, _, loss, *_ = np.loadtxt(log, delimiter=",", skiprows=1, unpack=True)
        axis.plot(steps, loss, color="#3b6fd4")
        axis.set(title=log.stem, xlabel="step", ylabel="loss (moving average)", ylim=(0, 3 * np.median(loss)))
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
