"""A template for engines of your own: replace what tapes are by what your engine opens."""

FORMAT = "tape"
TAPE, WEIGHTS = "tape.json", "weights.safetensors"
