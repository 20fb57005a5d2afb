"""The child as a program: a function that notes does so through the module that it imports, which this one is not."""

import sys

from peft_gauge.isolation import child

if __name__ == "__main__":
    child.serve(sys.argv[1])
