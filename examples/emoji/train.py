"""Make the bundled model from nothing: pictures, vocabulary, autoencoder, denoiser, checkpoint folder.

    python examples/emoji/train.py [--work FOLDER] [--out FOLDER] [--start CHECKPOINT]

With `--start`, the autoencoder, the vocabulary and the first weights come from a finished checkpoint folder.

Everything is seeded. Each stage is skipped when its result is there, and the two trainings go on from their last
checkpoint, so an interrupted run is started again with the same command.
"""

import argparse
import shutil
from pathlib import Path

import autoencoder
import denoiser
import package
import pictures
import vocabulary

from anamorph import AutoencoderKL

HERE = Path(__file__).parent
AUTOENCODER_STEPS = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE / "work" / "emoji", help="the finished checkpoint folder")
    parser.add_argument("--start", type=Path, help="finished checkpoint folder to train further")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    data = work / "emoji64.npz"
    if not data.exists():
        pictures.render(data)
    if options.start and not (work / "vae").exists():
        AutoencoderKL.from_pretrained(options.start / "vae").save_pretrained(work / "vae")
        shutil.copytree(options.start / "tokenizer", work / "tokenizer")
    if not (work / "tokenizer" / "vocab.json").exists():
        vocabulary.train(data, work / "tokenizer")
    if not (work / "vae" / "config.json").exists():
        autoencoder.train(data, work, AUTOENCODER_STEPS)
    if not (work / "text_encoder" / "config.json").exists():
        denoiser.train(data, work, options.start)
    package.write(work, options.out)


if __name__ == "__main__":
    main()
