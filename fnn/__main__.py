"""Run the command line as `python -m fnn`."""

import sys

from fnn.cli.main import main

sys.exit(main())
