#!/usr/bin/env bash
# The first hour, or the first eight minutes, on a GPU: everything that is worth knowing of it, the most valuable first.
#
#   benchmarks/first_light.sh [--seconds 480] [--out first_light] [--model tinyllama] [--large llama-2-7b]
#                             [--weights random-gpu] [--device cuda]
#
# Parts, each with a time limit of its own; one that fails is told of, and the others go on:
#   doctor      what this machine can run
#   calibrate   CUDA context, library workspaces, allocator, speed; the plans of the later parts use it
#   tests       the instruments against what is known beforehand (pytest tests/gpu)
#   suite       pytest -m gpu within a budget, in the order of the cases' worth
#   large       the plan of a 7B against its measured LoRA and QLoRA step
#   rank        one rank of an FSDP2 step for 8 GPUs, without the other seven, against its plan (LoRA)
#   traces      the allocator's log of a step of each case beside its plan: where a plan is wrong, if it is
#   compare     the suite's run with the newest one of this machine in the checkout's results/, where there is one
#   answers     the newest answers as Markdown
#   report      one page with all of it, where the extra for pages is installed
# Everything is under the output folder: NN_part.txt, summary.txt (a line a part), calibrations/, results/, report.html.
# Random weights are drawn on the GPU, since a CPU takes 20 s for 1B; --weights real or random chooses others.
# Called again with the same folder and options, the suite goes on where it stopped. Its own dry run needs no GPU:
# --device cpu --model toy-llama.
set -u

seconds=480 out=first_light model=tinyllama large=llama-2-7b weights='' device=cuda python=${PYTHON:-python}
usage() { sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"; }
die() { echo "first_light: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --seconds | --out | --model | --large | --weights | --device)
            [ $# -ge 2 ] || die "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        *) die "unknown option $1; see --help" ;;
    esac
done
[[ $seconds =~ ^[0-9]+$ ]] && [ "$seconds" -ge 60 ] || die "--seconds must be a whole number of at least 60, not $seconds"
[[ $device = cuda || $device = cpu ]] || die "--device is cuda or cpu, not $device"
command -v timeout > /dev/null || die "the command timeout (coreutils) is missing"
mkdir -p "$out" 2> /dev/null && [ -w "$out" ] || die "$out cannot be written; name another folder with --out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || die "the checkout of peft-gauge is not where this script was"
"$python" -c 'import peft_gauge' 2> /dev/null || die "$python cannot import peft_gauge; install it, or set PYTHON"

export PEFT_GAUGE_CALIBRATIONS=${PEFT_GAUGE_CALIBRATIONS:-$out/calibrations}
began=$SECONDS number=0 failed=0
reserve=$((seconds * 10 / 100))  # for the last parts, which show what the others have found
summary=$out/summary.txt
: > "$summary"

left() { echo $((seconds - (SECONDS - began))); }

# part NAME SHARE LEAST COMMAND…: run it for at most SHARE percent of all the time, or what is left if that is at least
# LEAST seconds: less would be wasted.
part() {
    local name=$1 share=$2 least=$3 limit rest file code start=$SECONDS
    shift 3
    number=$((number + 1))
    file=$(printf '%s/%02d_%s.txt' "$out" "$number" "$name")
    limit=$((seconds * share / 100)) rest=$(($(left) - reserve))
    [ "$rest" -lt "$limit" ] && limit=$rest
    if [ "$limit" -lt "$least" ]; then
        [ "$limit" -ge 0 ] || limit=0
        printf '%-10s not begun: it needs %s s, and %s s are left\n' "$name" "$least" "$limit" | tee -a "$summary"
        return
    fi
    # An interrupt first, at which pytest saves what is done.
    timeout --signal=INT --kill-after=15 "$limit" "$@" > "$file" 2>&1
    code=$?
    local last
    last=$(grep -v '^[[:space:]]*$' "$file" | tail -n 1 | cut -c1-160)
    case $name:$code in
        *:0) ended=done ;;
        compare:2) ended="nothing to compare: $last" ;;
        *:124 | *:137) ended="stopped after its $limit s" failed=1 ;;
        *) ended="exit code $code: $last" failed=1 ;;
    esac
    printf '%-10s %4d s  %s\n' "$name" $((SECONDS - start)) "$ended" | tee -a "$summary"
}

skipped() { printf '%-10s skipped: %s\n' "$1" "$2" | tee -a "$summary"; }

gauge=("$python" -m peft_gauge.cli)
machine=$("$python" -c 'from peft_gauge.machine import machine_info; print(machine_info()["name"])' 2> /dev/null)
resume=()
[ -n "$machine" ] && compgen -G "$out/results/$machine/*.json" > /dev/null && resume=(--resume)
markers=(-m gpu)
[ "$device" = cpu ] && markers=(--device=cpu -k "$(basename "$model")-cpu")  # as -m gpu: tests of a case only
[ -n "$weights" ] || [ "$device" = cpu ] || weights=random-gpu
suite_seconds=$((seconds * 45 / 100))

part doctor 10 5 "${gauge[@]}" doctor --results "$out/results"
if [ "$device" = cuda ]; then
    part calibrate 15 10 "${gauge[@]}" calibrate
else
    skipped calibrate "a CPU has no CUDA context"
fi
part tests 30 10 "$python" -m pytest tests/gpu -m gpu -q -s
rest=$(($(left) - reserve))
[ $((rest * 3 / 4)) -lt "$suite_seconds" ] && suite_seconds=$((rest * 3 / 4))
part suite 50 15 "$python" -m pytest benchmarks --details "${markers[@]}" --model="$model" --results="$out/results" \
    --budget="$suite_seconds" ${weights:+--weights="$weights"} ${resume[@]+"${resume[@]}"}
if [ "$device" = cuda ]; then
    part large 25 25 "$python" -m pytest benchmarks/test_memory.py --details "${markers[@]}" -k test_peak --model="$large" \
        --weights=random-gpu --method=lora,qlora --batch=1 --seq=512 --results="$out/results"
else
    skipped large "a step of $large on a CPU takes too long"
fi
part rank 20 15 "$python" -m pytest benchmarks/test_one_rank.py::test_lone_rank --details --gpus=8 --device="$device" \
    --model="$model" --method=lora --results="$out/results" ${weights:+--weights="$weights"}
if compgen -G "$out/results/$machine/traces/*.json.gz" > /dev/null; then
    part traces 20 5 bash -c 'at=$1; shift; for file in "$at"/*.json.gz; do echo "== ${file##*/}"; "$@" "$file"; done' _ \
        "$out/results/$machine/traces" "${gauge[@]}" trace --top 5
else
    skipped traces "no allocator's log was recorded"
fi
reserve=0
if [ -n "$machine" ] && [ -d "results/$machine" ]; then
    part compare 10 3 "${gauge[@]}" compare "results/$machine" "$out/results/$machine"
else
    skipped compare "results/ has no earlier run of ${machine:-this machine}"
fi
part answers 10 3 "${gauge[@]}" report --markdown "$out/results"
if "$python" -c 'import altair, vl_convert' 2> /dev/null; then
    part report 20 5 "${gauge[@]}" report "$out/results" -o "$out/report.html"
else
    skipped report "altair is not installed; copy $out/results and run peft-gauge report elsewhere"
fi

echo "everything is in $out; $((SECONDS - began)) of $seconds s"
exit "$failed"
