#!/bin/sh
# Install this bundle next to the packages of this node, and run a command with it. The node's packages stay unchanged.
set -u

usage() {
  cat << END
usage: ${0##*/} [--to FOLDER] [--python PYTHON] [-- COMMAND...]

Installs the bundled packages that this node lacks into a separate folder, once, and runs COMMAND with them in the
bundled checkout. Without COMMAND: prints what to do next, and runs peft-gauge doctor.

  --to FOLDER      where to install (PEFT_GAUGE_TO); default: next to the bundle, else under \$TMPDIR
  --python PYTHON  the node's Python (PEFT_GAUGE_PYTHON); default: python3, else python
END
}

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

to=${PEFT_GAUGE_TO:-}
python=${PEFT_GAUGE_PYTHON:-}
while [ $# -gt 0 ]; do
  case $1 in
    --to | --python) [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --to) to=$2 && shift 2 ;;
    --to=*) to=${1#*=} && shift ;;
    --python) python=$2 && shift 2 ;;
    --python=*) python=${1#*=} && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown argument '$1'; a command comes after --, as in: ${0##*/} -- pytest -m gpu" ;;
  esac
done

here=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd -P) || fail "the bundle's folder cannot be read"

if [ -z "$python" ]; then
  for python in python3 python ''; do
    command -v "$python" > /dev/null 2>&1 && break
  done
  [ -n "$python" ] || fail "no python3 found; load or activate one, or give it with --python"
fi
command -v "$python" > /dev/null 2>&1 || fail "$python is not a program; give the node's Python with --python"

# Any Python has to understand this part, however old it is.
problem=$("$python" -c '
import json, os, platform, sys
try:
    with open(sys.argv[1]) as file:
        wanted = json.load(file)["target"]
except (IOError, ValueError, KeyError):
    print("manifest.json is missing or broken; copy the bundle again")
    sys.exit()
found = "%d.%d" % sys.version_info[:2]
name = "%s (%s)" % (sys.argv[2], sys.executable)
other = "activate an environment that has it, or give it with --python"
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
except (AttributeError, ValueError, OSError):
    libc = ""
digits = libc.split(" ")[-1].split(".")
if platform.python_implementation() != "CPython":
    print("%s is %s, and this bundle is for CPython; %s" % (name, platform.python_implementation(), other))
elif found != wanted["python"]:
    print("%s is Python %s, and this bundle is for Python %s; %s" % (name, found, wanted["python"], other))
elif "t" in getattr(sys, "abiflags", ""):
    print("%s is a free-threaded Python, and this bundle is for the usual kind; %s" % (name, other))
elif not sys.platform.startswith("linux") or platform.machine() != wanted["machine"]:
    here = "%s on %s" % (platform.system(), platform.machine())
    print("this node is %s, and this bundle is for Linux on %s" % (here, wanted["machine"]))
elif not libc.startswith("glibc") or [int(digit) for digit in digits[:2]] < [2, wanted["glibc"]]:
    print("this node has %s, and this bundle is for glibc 2.%d or newer" % (libc or "no glibc", wanted["glibc"]))
' "$here/manifest.json" "$python") || fail "$python does not start"
[ -z "$problem" ] || fail "$problem"

ready=$("$python" "$here/on_node.py" "$here" "$to") || exit 2

# The user's PYTHONPATH is part of the node and comes first.
PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$ready/site
if [ -d "$ready/checkout" ]; then
  PYTHONPATH=$PYTHONPATH:$ready/checkout
  cd -- "$ready/checkout" || fail "$ready/checkout cannot be entered"
elif [ -f peft_gauge/cli.py ]; then
  PYTHONPATH=$PYTHONPATH:$PWD
fi
PATH=$ready/bin:$ready/site/bin:$PATH
export PATH PYTHONPATH
"$ready/bin/python" -c 'import peft_gauge' 2> /dev/null ||
  fail "this bundle has no checkout; run it in a checkout of peft-gauge"

[ $# -eq 0 ] || exec "$@"

cat << END
The bundle is installed in $ready.
Run a command with it:   sh $here/${0##*/} -- pytest -m gpu
It saves files under $PWD; paths on its command line are relative to that folder.

END
exec peft-gauge doctor
