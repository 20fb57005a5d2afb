#!/bin/bash
# Submits the array of shards, and the job that joins them when all have ended. A shard that fails (a ceiling that is
# passed, for instance) has saved its run too: hence afterany. A shard without a run makes the merge fail by its number.
set -euo pipefail
cd "$(dirname "$0")"
export PEFT_GAUGE_RESULTS=${PEFT_GAUGE_RESULTS:-$HOME/peft-gauge-results}
mkdir -p "$PEFT_GAUGE_RESULTS/shards" "$PEFT_GAUGE_RESULTS/history"

array=$(sbatch --parsable --export=ALL shards.sbatch)
sbatch --export=ALL --dependency="afterany:${array%%;*}" merge.sbatch "${array%%;*}"
