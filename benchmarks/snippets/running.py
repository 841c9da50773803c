"""One chapter in one process: its blocks in order, in one namespace, as a notebook runs them.

    python -m anamorph.benchmarks.snippets.running JOB_FILE RESULTS_FILE

The job is JSON: `given` (code that is run first), `codes` (number -> code), the folder of `pictures`, and where drawn
pictures are `kept`. A result is one line of JSON: number, seconds, and an error where there was one. What fails leaves
its names as they are, and the next block runs.
"""

import ast
import io
import json
import sys
import time
import urllib.request
import urllib.response
import warnings
from collections.abc import Callable, Iterable
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.benchmarks.snippets.cache import picture_name

DRAWN = ("image", "images", "pil_images")
"""Names that snippets give to what they draw."""
LONGEST = 240
"""Characters of an error that are kept."""


class Shelf(urllib.request.BaseHandler):
    """Answers every address with the picture that lies for it in a folder, before others are asked."""

    handler_order = 100

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture(self, address: str) -> bytes:
        """The file; raises ConnectionError where there is none, as there is no network."""
        path = self.folder / picture_name(address)
        if not path.is_file():
            raise ConnectionError(f"no picture lies here for {address}")
        return path.read_bytes()

    def http_open(self, request: urllib.request.Request) -> Any:
        """See `urllib.request.HTTPHandler`."""
        found = io.BytesIO(self.picture(request.full_url))
        answer = urllib.response.addinfourl(found, Message(), request.full_url, 200)
        answer.msg = "OK"  # type: ignore[attr-defined]  # which the client asks for
        return answer

    https_open = http_open

    def send(self, _adapter: Any, request: Any, **_: Any) -> Any:
        """What takes the place of `requests.adapters.HTTPAdapter.send`."""
        import requests

        response = requests.Response()
        response.raw, response.status_code, response.url = io.BytesIO(self.picture(request.url)), 200, request.url
        return response


def shown(value: Any) -> None:
    """What a notebook does with the value of a block's last line."""
    if value is not None:
        repr(value)


def run(code: str, names: dict[str, Any]) -> None:
    """Execute a block; the value of a last expression is shown."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<snippet>", "exec"), names)  # the point of this module: the documentation's own code
    if isinstance(last, ast.Expr):
        shown(eval(compile(ast.Expression(last.value), "<snippet>", "eval"), names))


def drawn(names: dict[str, Any], before: dict[str, Any]) -> NDArray[np.uint8] | None:
    """The pictures [N, H, W, C] that a block has newly bound, or None."""
    for name in DRAWN:
        value = names.get(name)
        pictures = value if isinstance(value, list) else [value]
        if value is not before[name] and pictures and all(isinstance(one, Image.Image) for one in pictures):
            return np.stack([np.asarray(one) for one in pictures])
    return None


def results(codes: dict[str, str], names: dict[str, Any], keep: Callable[[str, Any], None]) -> Iterable[dict[str, Any]]:
    """Run every block; what comes of it is given out as soon as it is known."""
    for number, code in codes.items():
        before, started, error = {name: names.get(name) for name in DRAWN}, time.perf_counter(), None
        try:
            run(code, names)
        except Exception as problem:  # whatever a snippet may raise
            lines = str(problem).strip().splitlines() or [""]
            error = f"{type(problem).__name__}: {lines[0]}"[:LONGEST]
        else:
            if (pictures := drawn(names, before)) is not None:
                keep(number, pictures)
        yield {"number": int(number), "seconds": time.perf_counter() - started, "error": error}


def main(job_file: str, results_file: str) -> None:
    """Run a chapter; see above."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    _cut_off(Shelf(Path(job["pictures"])))
    warnings.simplefilter("ignore")
    kept = Path(job["kept"])
    names: dict[str, Any] = {"__name__": "__main__", "display": shown}
    run(job["given"], names)
    with Path(results_file).open("w", encoding="utf-8") as file:
        for result in results(job["codes"], names, lambda number, pictures: np.save(kept / f"{number}.npy", pictures)):
            file.write(json.dumps(result) + "\n")
            file.flush()


def _cut_off(shelf: Shelf) -> None:
    """Let pictures come from the shelf, and logins at the hub succeed without asking."""
    import huggingface_hub
    import requests

    urllib.request.install_opener(urllib.request.build_opener(shelf))
    requests.adapters.HTTPAdapter.send = lambda adapter, request, **more: shelf.send(adapter, request, **more)  # type: ignore[method-assign]
    for name in ("login", "notebook_login"):
        setattr(huggingface_hub, name, lambda *_, **__: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
