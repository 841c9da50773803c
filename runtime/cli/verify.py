"""`anamorph verify`: compare an exported folder with the checkpoint that it was made from."""

import argparse
import json

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import DIFFERENT, OK
from anamorph.cli.export import rows, say, table
from anamorph.errors import InputError
from anamorph.plugins import get_exporter


def run(options: argparse.Namespace) -> int:
    """Repeat the certificate; the first part or step that diverges is named."""
    folder = open_checkpoint(Source(options.folder, local_files_only=True))
    if folder.artifact is None:
        raise InputError(f"{options.folder} is no exported folder; name one that `anamorph export` wrote")
    source = open_checkpoint(Source(options.model or folder.artifact.source["name"], variant=options.variant))
    checks = get_exporter([folder.artifact.format]).verify(folder, source, say)
    first = next((check for check in checks if not check.passed), None)
    if options.json:
        answer = None if first is None else {"part": first.part, "what": first.what}
        print(json.dumps({"folder": options.folder, "first_difference": answer, "certificate": rows(checks)}, indent=2))
    else:
        print(table(checks))
        verdict = "equal within tolerance" if first is None else f"the first to differ is {first.part}: {first.what}"
        print(f"\n{options.folder}: {verdict}")
    return OK if first is None else DIFFERENT
