"""`python -m fastseg`: the command line where the `fastseg` script is not on the path."""

import sys

from fastseg.cli import main

sys.exit(main())
