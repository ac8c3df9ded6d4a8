"""`python -m attnpress.cli`: the same as the command `attnpress`."""

import sys

from attnpress.cli.parser import main

sys.exit(main())
