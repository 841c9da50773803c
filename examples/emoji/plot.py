"""Draw the loss curves of a finished training: python examples/emoji/plot.py WORK OUT (needs matplotlib)."""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(work: Path, out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axis, name, title in zip(axes, ("autoencoder", "denoiser"), ("autoencoder", "denoiser (v)"), strict=True):
        steps, _, loss, *_ = np.loadtxt(work / f"{name}.csv", delimiter=",", skiprows=1, unpack=True)
        axis.plot(steps, loss, color="#3b6fd4")
        axis.set(title=title, xlabel="step", ylabel="loss (moving average)", ylim=(0, 3 * np.median(loss)))
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
