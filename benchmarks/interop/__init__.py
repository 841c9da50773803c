"""Whether other tools open our folders and draw our pictures from them, and we theirs.

    python -m anamorph.benchmarks.interop [--root build/peers]

expects the environments that `make peers` builds below the root, one for each of the `.txt` files in
`benchmarks/peers`. What lies here as `peer_*.py` runs inside them and never imports anamorph.
"""
