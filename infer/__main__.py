"""``python -m infer`` lists the commands of the package."""

import sys

from phi4rv.commands import main

sys.exit(main("infer"))
