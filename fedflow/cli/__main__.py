"""`python -m fedflow.cli`: the command line without its entry point."""

import sys

from fedflow.cli.app import main

sys.exit(main())
