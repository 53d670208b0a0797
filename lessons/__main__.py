"""python -m lessons doctor | list | start | check | hint | show | reset | export | course"""

import sys

from lessons._lib.commands import main

if __name__ == "__main__":
    sys.exit(main())
