"""`python -m rotexport` is the command line."""

import sys

from rotexport.cli import main

sys.exit(main())
