"""Ratios of times with a confidence interval, and the verdict on one.

Rounds of one process are correlated, so medians of processes are compared, on a logarithmic scale. With several
processes per side, Welch's t interval on these medians decides. A percentile bootstrap over processes and their rounds
is too narrow: with 2, 3 and 5 processes its 95 % intervals covered a known ratio in 85, 89 and 93 % of 600
simulated comparisons (Welch's: 96 to 97 %). Also, 5 processes have too few resamples for the small error levels that a
correction for many comparisons needs.

A case's processes follow each other, so they share slow host drift, which another run does not have. Differences
between the processes do not show this common part. Its share of the variance has to be known (`in_common`), and the
variance of their mean is larger by the design effect (Kish, Survey Sampling, 1965): 1 + (n - 1)·r for n processes with
correlation r.

With one process on a side, the data do not show how much processes differ. The rounds are bootstrapped, and the
interval is widened by a spread that was measured separately.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    import numpy as np

    from peft_gauge.history.metrics import Samples
    from peft_gauge.history.rules import HostSpread

Verdict = Literal["same", "better", "worse", "inconclusive"]

LEAST_ROUNDS = 3
DRAWS = 9_999
SEED = 20_261_124
IN_COMMON = 0.45
IN_COMMON_OVER_CONTROL = 0.2
"""The share of a process median's variance that is common to all processes of a case in one run. Read from the runs
behind `benchmarks.simulation.SHARED_HOST`: the variance of ``run``, ``minutes`` and ``own_minutes`` (over the control
only the last is left) as a share of the variance of a median of 5 rounds."""

MOST_FURTHER = 100
"""A larger number of further processes is not reported: the effect is too small for the noise."""


class Estimate(Protocol):
    """The logarithm of the ratio NEW / BASE of a time, and its uncertainty."""

    @property
    def log_ratio(self) -> float: ...

    @property
    def processes(self) -> tuple[int, int]: ...

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p value of the hypothesis that the true log ratio is ``null``."""

    def interval(self, error: float) -> tuple[float, float]:
        """Confidence interval of the log ratio; it misses the true value with probability ``error``."""

    def seen(self, error: float) -> tuple[float, float]:
        """As `interval`, for these very processes, without the spread of hosts."""


@dataclass(frozen=True)
class Replicated:
    """From several processes per side, by Welch's t with ``freedom`` degrees of freedom."""

    log_ratio: float
    standard_error: float
    freedom: float
    processes: tuple[int, int]

    def p_value(self, null: float = 0.0) -> float:
        from scipy.special import stdtr

        distance = abs(self.log_ratio - null)
        if self.standard_error == 0:
            return 0.0 if distance else 1.0
        return float(2 * stdtr(self.freedom, -distance / self.standard_error))

    def interval(self, error: float) -> tuple[float, float]:
        from scipy.special import stdtrit

        half = float(stdtrit(self.freedom, 1 - error / 2)) * self.standard_error if self.standard_error else 0.0
        return self.log_ratio - half, self.log_ratio + half

    def seen(self, error: float) -> tuple[float, float]:
        return self.interval(error)


@dataclass(frozen=True)
class Single:
    """From one process on at least one side: bootstrap ``draws`` of the rounds, widened by ``log_spread`` each way."""

    log_ratio: float
    draws: np.ndarray
    log_spread: float
    processes: tuple[int, int]

    def p_value(self, null: float = 0.0) -> float:
        low = int((self.draws <= null + self.log_spread).sum())
        high = int((self.draws >= null - self.log_spread).sum())
        return min(1.0, 2 * (1 + min(low, high)) / (1 + len(self.draws)))

    def interval(self, error: float) -> tuple[float, float]:
        low, high = self.seen(error)
        return low - self.log_spread, high + self.log_spread

    def seen(self, error: float) -> tuple[float, float]:
        import numpy as np

        low, high = np.quantile(self.draws, [error / 2, 1 - error / 2])
        return float(low), float(high)


def estimate(
    base: Samples, new: Samples, spread: HostSpread, *, over_control: bool, in_common: float = 0.0
) -> Estimate:
    """The ratio NEW / BASE of process medians; ``over_control`` divides each round's time by its control's.

    Both sides must pass `why_no_estimate`. With several processes, a side's centre is the geometric mean of their
    medians; ``in_common`` is the correlation among them.
    """
    sides = [_rounds(samples, over_control) for samples in (base, new)]
    logs = [[math.log(statistics.median(rounds)) for rounds in side] for side in sides]
    log_ratio = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    processes = (len(logs[0]), len(logs[1]))
    if min(processes) < 2:
        factor = spread.over_control if over_control else spread.seconds
        return Single(log_ratio, _bootstrap(*sides), math.log(factor), processes)
    variances = [statistics.variance(side) * (1 / len(side) + _unseen(in_common)) for side in logs]
    total = sum(variances)
    parts = sum(variance**2 / (len(side) - 1) for variance, side in zip(variances, logs, strict=True))
    freedom = total**2 / parts if parts else sum(processes) - 2.0
    return Replicated(log_ratio, math.sqrt(total), freedom, processes)


def of_pairs(log_ratios: Sequence[float]) -> Replicated:
    """The ratio from several pairs of processes, each with the logarithm of one ratio: Student's t.

    A process is faster or slower than another with the same code for its whole life. Pairs of steps of the same two
    processes cannot detect this; further processes can. Raises `GaugeError` for fewer than two pairs.
    """
    count = len(log_ratios)
    if count < 2:
        raise GaugeError(f"{count} pair of processes does not show how processes differ; measure at least 2")
    error = statistics.stdev(log_ratios) / math.sqrt(count)
    return Replicated(statistics.fmean(log_ratios), error, count - 1.0, (count, count))


def _unseen(in_common: float) -> float:
    """The common variance of values with this correlation, as a multiple of the variance observed among them."""
    return in_common / (1 - in_common)


def why_no_estimate(samples: Samples | None) -> str | None:
    """The reason why ``samples`` allow no estimate, or ``None``."""
    if samples is None:
        return "its rounds were not saved"
    if samples.rounds < LEAST_ROUNDS:
        return f"{samples.rounds} rounds are too few; at least {LEAST_ROUNDS} are needed"
    measured = [samples.seconds, samples.control_seconds or ()]
    if any(seconds <= 0 for side in measured for rounds in side for seconds in rounds):
        return "a round took 0 seconds: the clock is too coarse"
    return None


def centre_seconds(processes: Sequence[Sequence[float]]) -> float:
    """The geometric mean of the processes' medians, in seconds."""
    return math.exp(statistics.fmean(math.log(statistics.median(rounds)) for rounds in processes))


def log_centre(samples: Samples, *, over_control: bool) -> float:
    """The logarithm of the time of ``samples``, which pass `why_no_estimate`, as in `estimate`."""
    return math.log(centre_seconds(_rounds(samples, over_control)))


def _rounds(samples: Samples, over_control: bool) -> list[list[float]]:
    if not over_control:
        return [list(rounds) for rounds in samples.seconds]
    assert samples.control_seconds is not None
    beside = zip(samples.seconds, samples.control_seconds, strict=True)
    return [[one / control for one, control in zip(*process, strict=True)] for process in beside]


def _bootstrap(base: list[list[float]], new: list[list[float]]) -> np.ndarray:
    """`DRAWS` log ratios, each from resampled rounds; the same rounds always give the same draws."""
    import numpy as np

    generator = np.random.default_rng(SEED)

    def draws(side: list[list[float]]) -> np.ndarray:
        medians = []
        for rounds in side:
            drawn = np.log(rounds)[generator.integers(0, len(rounds), (DRAWS, len(rounds)))]
            medians.append(np.median(drawn, axis=1))
        return np.asarray(np.mean(medians, axis=0))

    return np.asarray(draws(new) - draws(base))


def holm_errors(p_values: Sequence[float], family_error: float) -> list[float]:
    """The error level for each of several hypotheses, so that all together keep ``family_error``.

    Holm 1979, Scandinavian Journal of Statistics 6: 65-70: from the smallest p on, error / number of those left; once a
    hypothesis is not rejected, the same level for all the rest. Unlike the false discovery rate of Benjamini and
    Hochberg, it bounds the probability of *any* false alarm; people ignore a nightly job that often raises false
    alarms.
    """
    errors = [0.0] * len(p_values)
    error, standing = 0.0, False
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not standing:
            error = family_error / (len(p_values) - place)
            standing = p_values[index] > error
        errors[index] = error
    return errors


@dataclass(frozen=True)
class Judgement:
    """The verdict on an estimate: ``ratio`` with its interval from ``low`` to ``high`` at ``error``.

    ``further``: about how many more processes per side would decide it, ``None`` if it is decided; `MOST_FURTHER` + 1
    means more than `MOST_FURTHER`.
    """

    verdict: Verdict
    ratio: float
    low: float
    high: float
    error: float
    further: int | None


def judge(
    estimate: Estimate,
    error: float,
    minimum_effect: float,
    *,
    relative_to: float = 0.0,
    in_common: float = 0.0,
) -> Judgement:
    """The verdict on a time (lower is better), after ``relative_to`` is subtracted from its log ratio.

    ``in_common``: as for the estimate; more processes do not reduce the variance that they share.

    *same*: the whole interval lies within the minimum effect of 1, either way (for 3 %: from 0.97 to 1.03). *worse* and
    *better*: the whole interval lies on one side of 1, and the ratio itself is beyond the minimum effect. Therefore a
    change of exactly the minimum effect is found in at most half of all cases, since half of the estimates lie below
    it; to find such changes reliably, set a smaller minimum effect.
    """
    low, high = (end - relative_to for end in estimate.interval(error))
    centre = estimate.log_ratio - relative_to
    least, most = math.log1p(-minimum_effect), math.log1p(minimum_effect)  # as the per cent that a reader sees
    verdict: Verdict = "inconclusive"
    if least <= low and high <= most:
        verdict = "same"
    elif low > 0 and centre > most:
        verdict = "worse"
    elif high < 0 and centre < least:
        verdict = "better"
    further = None
    if verdict == "inconclusive":
        # The spread for one process against one already contains their common part.
        unseen = _unseen(in_common) if min(estimate.processes) > 1 else 0.0
        further = _further(estimate.processes, centre, low, high, most if centre >= 0 else -least, unseen)
    return Judgement(verdict, math.exp(centre), _exp(low), _exp(high), error, further)


def _exp(value: float) -> float:
    """With two processes per side, the end of an interval can exceed all floats: then it is the largest float."""
    return math.exp(max(min(value, 700.0), -700.0))


def _further(processes: tuple[int, int], centre: float, low: float, high: float, effect: float, unseen: float) -> int:
    """The number of further processes per side until the interval would lie on one side, at a constant ratio.

    The square of its width is proportional to 1/n + ``unseen``.
    """
    needed = abs(centre) if abs(centre) > effect else effect - abs(centre)
    share = (needed / max(high - centre, centre - low)) ** 2
    now = 2 / (1 / processes[0] + 1 / processes[1])
    inverse = (1 / now + unseen) * share - unseen
    more = 1 / inverse - now if inverse > 0 else math.inf
    return max(1, math.ceil(more)) if more <= MOST_FURTHER else MOST_FURTHER + 1
