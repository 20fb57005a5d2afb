"""What a node without a network lacks: its wheels, and a script that installs them there beside what it has.

`target` is the node's Python and platform, `having` what it has, `needs` what this project needs, `resolving` asks pip
which wheels those are, `choosing` walks from the needs to the wheels that the node lacks and keeps to a limit,
`checkout` packs the project's files, and `collecting` puts the bundle together. `run.sh` and `on_node.py` go into the
bundle as they are and run on the node; they import nothing of this package.
"""
