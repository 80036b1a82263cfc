import sys

from benchmarks.report.results import main

if __name__ == "__main__":
    sys.exit(main())
