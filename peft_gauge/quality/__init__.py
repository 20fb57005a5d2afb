"""Quality of training: tasks, training under equal conditions, sweeps over settings and seeds, and trade-offs.

Cost alone does not show which rank to use or which modules to train. The sweep is first validated on a synthetic task
with a known answer (`planted`), then applied to real models (`tasks`).
"""
