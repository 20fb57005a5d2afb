"""Bundles for a node without network: the wheels it lacks, and a script that installs them next to its own packages.

`target` is the node's Python and platform, `installed` lists its packages, and `requirements` lists the project's.
`resolution` lets pip resolve the wheels, `selection` reduces them to those that the node lacks and to a size limit,
`checkout` packs the project's files, and `collection` writes the bundle. `run.sh` and `on_node.py` are copied into the
bundle and run on the node; they import nothing from this package.
"""
