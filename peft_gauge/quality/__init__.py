"""What a method learns: tasks, training under equal conditions, sweeps over settings and seeds, and the trade-off.

Cost alone cannot say which rank or which modules to train. The instrument is proven on a task of known truth
(`planted`) before it is asked about a real model (`tasks`).
"""
