"""The same cases under other library versions: A against B, and the first release that is worse.

`requirements` reads what a side asks for, `build` makes an environment of it, `worker` runs in one, `pairs` judges two
clocks that tick in turn, `measuring` puts these together for one case, `bisecting` searches the releases of a library,
and `state` keeps what is finished.
"""
