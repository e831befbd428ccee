"""Draws docs/images/loss.png from plots/loss.csv: `python docs/pictures.py`, after a default run."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent


def main() -> None:
    """The loss curve of the committed run."""
    table = np.genfromtxt(ROOT / "plots/loss.csv", delimiter=",", names=True)
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(table["images"], table["loss"], lw=1.2)
    axes.set(xlabel="images seen", ylabel="training loss (v, mean squared)", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs/images/loss.png", dpi=110)


if __name__ == "__main__":
    main()
