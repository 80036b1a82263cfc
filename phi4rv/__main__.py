"""``python -m phi4rv`` lists the commands of the package."""

import sys

from phi4rv.commands import main

sys.exit(main("phi4rv"))
