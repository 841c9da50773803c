"""Run in an environment of openvino-genai, without anamorph: time its denoiser at one size.

    python -I genai_static.py FOLDER INPUTS OUT f32|bf16 THREADS CALLS

FOLDER is an exported pipeline, INPUTS holds `sample.npy` [B, C, h, w] and `encoder_hidden_states.npy` [B, S, D].
The denoiser is reshaped to their sizes and compiled, as `Text2ImagePipeline.reshape` and `compile` do. Writes the last
prediction into OUT and prints one line of JSON: seconds for loading, for the first call and for each further one.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

TIMESTEP = 500


def main(folder: Path, inputs: Path, out: str, hint: str, threads: int, calls: int) -> None:
    """Load, call once, call again and again."""
    sample, states = (np.load(inputs / f"{name}.npy") for name in ("sample", "encoder_hidden_states"))
    channels = json.loads((folder / "vae_decoder" / "config.json").read_text(encoding="utf-8"))["block_out_channels"]
    pixels = 2 ** (len(channels) - 1)
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "EXECUTION_MODE_HINT": "ACCURACY" if hint == "f32" else "PERFORMANCE",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    started = time.perf_counter()
    unet = openvino_genai.UNet2DConditionModel(folder / "unet")
    unet.reshape(sample.shape[0], sample.shape[2] * pixels, sample.shape[3] * pixels, states.shape[1])
    unet.compile("CPU", **settings)
    seconds = {"load_s": time.perf_counter() - started}
    unet.set_hidden_states("encoder_hidden_states", openvino.Tensor(states))
    given, timestep = openvino.Tensor(sample), openvino.Tensor(np.array([TIMESTEP], np.int64))
    times = []
    for _ in range(1 + calls):
        started = time.perf_counter()
        prediction = unet.infer(given, timestep)
        times.append(time.perf_counter() - started)
    np.save(out, prediction.data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**seconds, "first_call_s": times[0], "calls_s": times[1:], "peak_gib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
