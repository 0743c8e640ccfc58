"""`python -m flatkern`."""

import sys

from flatkern.cli import main

sys.exit(main())
