"""The child as a program.

It calls the imported module `child` and not itself, because functions import `note` from there too.
"""

import sys

from peft_gauge.isolation import child

if __name__ == "__main__":
    child.serve(sys.argv[1])
