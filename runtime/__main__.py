"""`python -m anamorph` is the command line."""

import sys

from anamorph.cli import main

sys.exit(main())
