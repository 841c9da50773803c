"""Where the user's cache lies.

exports/       graphs of checkpoints in an engine's format     compiled/      what engines made of graphs, see `entries`
single-files/  files of the original layout as folders         inductor/      what torch.compile keeps
profiles/      which engine was the fastest for a model        digests/       SHA-256 of large files, see `digests`
"""

import os
from pathlib import Path

CACHE = "ANAMORPH_CACHE"
"""Environment variable: the folder that takes the place of the user's cache."""


def cache_folder() -> Path:
    """ANAMORPH_CACHE, or the user's cache folder."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("anamorph"))
