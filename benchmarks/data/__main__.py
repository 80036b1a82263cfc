import sys

from benchmarks.data.loading_and_packing import main

if __name__ == "__main__":
    sys.exit(main())
