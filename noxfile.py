"""Checks that need environments of their own: `nox -s reference`, `matrix`, `torch`, `liger`, `cce`, `torchao`,
`tools`, `docs`."""

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


# Of each library the oldest that is supported (see pyproject.toml), one between, and the newest that there is. The
# other libraries are then the newest that go with it.
MATRIX = (
    *("peft==0.18.0", "peft==0.20.0", "peft"),
    *("transformers==4.57.1", "transformers==5.12.1", "transformers"),
    *("bitsandbytes==0.46.1", "bitsandbytes==0.48.2", "bitsandbytes"),
)
QUICK = "quick"  # the marker of what is asked of every version


@nox.session
@nox.parametrize("requirement", MATRIX, ids=MATRIX)
def matrix(session: nox.Session, requirement: str) -> None:
    """Ask the quick benchmarks of a small model with ``requirement``; `nox -s "matrix(peft==0.18.0)"` is one of them.

    Full environments, torch included: unlike the overlays of `peft-gauge ab`, they share nothing.
    """
    session.install(TORCH)
    session.install("--upgrade", requirement, "-e", ".")
    _ask_quick_benchmarks(session)


def _ask_quick_benchmarks(session: nox.Session) -> None:
    session.run("python", "-m", "pip", "list")
    asked = ["-m", QUICK, "--model=toy-llama", "--rounds=3", "--no-save"]
    session.run("python", "-m", "pytest", "benchmarks", "-q", *asked, *session.posargs)


# The oldest torch that is supported, two between (one with a transformers of its time), the newest, and the next.
# `--pre` looks for nightly builds too where pip is told of their index.
TORCHES = {
    "2.6": (["torch==2.6.0"], []),
    "2.8": (["torch==2.8.0"], []),
    "2.11": (["torch==2.11.0"], ["transformers==5.17.0"]),
    "newest": (["--upgrade", "torch"], []),
    "pre-release": (["--upgrade", "--pre", "torch"], []),
}
PLANNING = [
    "tests/internals/test_internals.py",
    "tests/unit/memory/test_tracker.py",
    *(f"tests/unit/plan/test_{name}.py" for name in ("fakes", "planner")),
]

OF_CUT_CROSS_ENTROPY = ["tests/unit/plan/test_cut_cross_entropy.py", "tests/internals/test_internals.py"]

OF_DEEPSPEED = ["tests/integration/test_zero_plan.py", "tests/internals/test_deepspeed.py"]
OF_TORCHAO = ["tests/unit/plan/test_torchao.py", "tests/internals/test_internals.py"]


@nox.session
def torchao(session: nox.Session) -> None:
    """Plan steps with torchao's optimizers, against the same on a CPU."""
    session.install(TORCH)
    session.install("-e", ".[test]", "torchao")
    session.run("python", "-m", "pytest", "-q", *OF_TORCHAO)


@nox.session
def liger(session: nox.Session) -> None:
    """Plan steps with Liger's kernels, which need Triton, against an H100's."""
    session.install(TORCH)
    session.install("-e", ".[test,trl]", "liger-kernel", "triton")
    session.run("python", "-m", "pytest", "-q", "tests/integration/test_plan_measured.py", "-k", "liger")


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Plan steps of DeepSpeed's ZeRO, against real processes of a CPU."""
    session.install(TORCH)
    session.install("-e", ".[test]", "setuptools", "wheel")
    # Its setup imports torch, and would compile CUDA's kernels.
    session.install("--no-build-isolation", "deepspeed", env={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"})
    session.run("python", "-m", "pytest", "-q", *OF_DEEPSPEED)


# Each tool with the releases that it pins, and what its import needs beyond them; never with its own torch.
OF_TOOLS = {
    "trl": ["trl==1.16.0", "transformers==5.24.0", "peft==0.21.2", "bitsandbytes==0.50.2", "datasets"],
    "llama-factory": [
        *("transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0", "datasets==4.0.0"),
        *("bitsandbytes==0.50.2", "omegaconf", "fire", "einops", "sentencepiece", "protobuf"),
    ],
    "axolotl": [
        *("transformers==5.16.1", "peft==0.20.0", "trl==1.9.0", "accelerate==1.13.0", "datasets==4.8.4"),
        *("bitsandbytes==0.50.2", "addict", "fire", "posthog==6.7.11", "pillow", "colorama", "python-dotenv", "triton"),
        *("einops", "art", "fastcore", "evaluate", "numba", "schedulefree", "wandb", "opentelemetry-sdk", "soundfile"),
        *("mistral-common", "pydantic-extra-types", "distro", "scipy", "nvidia-ml-py"),
    ],
}
OWN = {"llama-factory": ["llamafactory==0.9.5"], "axolotl": ["axolotl==0.19.0", "axolotl-contribs-mit==0.0.6"]}


@nox.session
@nox.parametrize("tool", list(OF_TOOLS), ids=list(OF_TOOLS))
def tools(session: nox.Session, tool: str) -> None:
    """Ask TRL, axolotl or LLaMA-Factory anew what they make of recipes, and compare; `nox -s "tools(axolotl)"`.

    After a wanted change of the cases or of a release, write the answers with `nox -s tools -- --write`.
    """
    session.install(TORCH)
    session.install(*OF_TOOLS[tool])
    if tool in OWN:
        session.install("--no-deps", *OWN[tool])
    mode = [] if "--write" in session.posargs else ["--check"]
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    session.run("python", "tests/tools/make_answers.py", tool, "tests/tools", *mode, env=quiet)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a site in ``site/``; a broken link fails."""
    session.install("mkdocs-material")
    session.run("mkdocs", "build", "--site-dir", "site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def cce(session: nox.Session) -> None:
    """Plan steps with Cut Cross-Entropy, which needs Triton, against its authors' measurements."""
    session.install(TORCH)
    session.install("-e", ".[test]", "cut-cross-entropy", "triton")
    session.run("python", "-m", "pytest", "-q", *OF_CUT_CROSS_ENTROPY)


@nox.session
@nox.parametrize("release", list(TORCHES), ids=list(TORCHES))
def torch(session: nox.Session, release: str) -> None:
    """Ask the quick benchmarks, and pass the tests of planning, with a torch; `nox -s "torch(2.6)"` is one of them.

    From PyPI these are CUDA builds of several GB each, which need no GPU; PIP_EXTRA_INDEX_URL can name torch's index of
    CPU builds.
    """
    build, others = TORCHES[release]
    session.install(*build)
    session.install(*others, "-e", ".")
    _ask_quick_benchmarks(session)
    session.run("python", "-m", "pytest", "-q", *PLANNING)
