#!/usr/bin/env bash
# One night without GitHub: a fresh environment, the CUDA cases, a comparison with the last run that had cases in common.
#
#   PEFT_GAUGE_RESULTS   where runs are kept between nights (default: ~/peft-gauge-results)
#
# Exit code: pytest's where that is not 0, else compare's (1 for a regression, 2 where the runs cannot be compared).
set -euo pipefail
cd "$(dirname "$0")/../.."

results=${PEFT_GAUGE_RESULTS:-$HOME/peft-gauge-results}
mkdir -p "$results"
exec 9> "$results/.nightly.lock"
if ! flock --nonblock 9; then
  echo "another night is still on the GPU" >&2
  exit 1
fi

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
export PATH="$environment/bin:$PATH"
python -m pip install --quiet --disable-pip-version-check -e .
peft-gauge doctor --results "$results"

saved() { find "$results" -name '[0-9]*.json' | sort; }
saved > "$environment/before"
measured=0
# Without --device=cuda every case would be a skip, and the night a success, where the GPU has gone.
pytest -m gpu --device=cuda --results="$results" || measured=$?

# By name: times of files are as coarse as the clock's ticks, and another clock's on a file server.
run=$(saved | comm -13 "$environment/before" - | tail -n 1)
if [[ -z $run ]]; then
  echo "nothing was saved under $results: no case was measured" >&2
  exit "$(( measured ? measured : 1 ))"
fi

compared=0
runs=("${run%/*}"/[0-9]*.json) # those of this machine and accelerator
if (( ${#runs[@]} < 2 )); then
  echo "the first run of this machine: there is none to compare it with"
else
  peft-gauge compare "$run" || compared=$?
fi
exit "$(( measured ? measured : compared ))"
