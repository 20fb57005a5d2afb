"""Checks that need an environment of their own: `nox -s reference`."""

from __future__ import annotations

import os

import nox

nox.options.sessions = ["reference"]
nox.options.reuse_existing_virtualenvs = True

# A machine with a pinned or CPU-only torch names it here, for instance PEFT_GAUGE_TORCH="torch==2.13.0".
TORCH = os.environ.get("PEFT_GAUGE_TORCH", "torch")


@nox.session
def reference(session: nox.Session) -> None:
    """Compute the golden files of the bottleneck adapters anew with the library `adapters`, and compare.

    Apart from the main environment, because `adapters` pins an older transformers. torch goes in first, so that the
    second line keeps whatever build the first one chose. After a wanted change of the case, write the files with
    `nox -s reference -- --write`.
    """
    session.install(TORCH)
    session.install("adapters==1.3.0", "transformers==4.57.6")
    mode = [] if "--write" in session.posargs else ["--check"]
    session.run("python", "tests/reference/make_reference.py", "tests/reference", *mode)
