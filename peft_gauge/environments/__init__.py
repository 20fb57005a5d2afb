"""The same cases under other library versions: A/B tests, and bisection of a library's releases.

`requirements` parses one side, `build` makes its environment, `worker` is a process in it, `pairs` compares steps that
alternate between two processes, `measurement` measures cases on two sides, `decision` saves and compares them,
`self_check` measures what the host can resolve, `bisection` and `probe` search releases, and `state` saves finished
work.
"""
