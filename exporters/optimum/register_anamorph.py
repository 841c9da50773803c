"""`optimum-cli export anamorph ...`: found by optimum in its namespace `optimum.commands.register`."""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from anamorph.cli import finish
from anamorph.cli.model_commands import export_arguments


class AnamorphExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`anamorph export` with the same arguments."""

    COMMAND = CommandInfo(
        name="anamorph", help="Export diffusion pipelines with Anamorph: any size, each part compared with PyTorch."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments."""
        export_arguments(parser)

    def run(self) -> None:
        """Export, and leave with the exit code of `anamorph export`."""
        self.args.command = "export"
        sys.exit(finish(self.args))


REGISTER_COMMANDS = [(AnamorphExportCommand, ExportCommand)]
