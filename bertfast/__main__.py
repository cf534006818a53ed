"""``python -m bertfast`` is the ``bertfast`` command."""

import sys

from bertfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
