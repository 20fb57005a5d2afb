"""Names of the files in the folder that the parent and the child share."""

from __future__ import annotations

TASK = "task.json"  # function, limit_seconds
ARGUMENTS = "arguments.pickle"
PROGRESS = "progress.jsonl"  # one line per report: ["note" or "watch", metrics]
RESULT = "result.json"  # ended, value, reason, work_seconds; written whole or not at all
OUTPUT = "output.txt"  # the child's standard output and standard error
