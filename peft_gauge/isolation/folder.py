"""What is in the folder that the parent and the child share."""

from __future__ import annotations

TASK = "task.json"  # function, limit_seconds
ARGUMENTS = "arguments.pickle"
PROGRESS = "progress.jsonl"  # a line a note: ["note" or "watch", metrics]
RESULT = "result.json"  # ended, value, reason, work_seconds; there whole or not at all
OUTPUT = "output.txt"  # what the child wrote to standard output and standard error
