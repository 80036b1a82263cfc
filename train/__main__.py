"""``python -m train`` lists the commands of the package."""

import sys

from phi4rv.commands import main

sys.exit(main("train"))
