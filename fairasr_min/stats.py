"""How sure is a difference in word error rate? Resampling of speakers, from counts. No torch here.

Arguments that recur, one entry an utterance: `errors` and `words` (counts), `clusters` (whoever
may share errors: the speaker; any hashable), `labels` (the group; None where it is missing).
Utterances of one speaker are not independent, so whole clusters are resampled and permuted, never
utterances (Liu and Peng 2020, arXiv:1912.09508). Rates are fractions: errors a reference word, and
insertions into an empty reference count. Sums come first, division last. What the data cannot tell
is None. The same seed gives the same numbers.

Intervals are symmetric bootstrap-t (Hall 1988, JRSS B 50:35): each draw's deviation is divided by
that draw's own standard error, and the 95th percentile of its absolute value replaces the 1.96 of
the textbook. Group rates and ratios are treated on the log scale, differences as they are. Of what
benchmarks/simulate_statistics.py compares, this alone covers close to 95 % with few, skewed and
unequally talkative speakers; plain percentiles cover too rarely.
"""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
FEW_CLUSTERS = 10  # below it intervals may cover too rarely (simulated): to be marked
BLOCK = 4_000_000  # numbers drawn at a time; bounds memory


class StatisticsError(ValueError):
    """The data does not allow what was asked; the message says why."""


class Interval(NamedTuple):
    low: float
    high: float


class Estimate(NamedTuple):
    value: float | None  # None: no word to divide by
    interval: Interval | None  # None: too little variation between clusters to say


class Pair(NamedTuple):
    """How much higher the rate of `group` is than that of `other`."""

    group: str
    other: str
    difference: Estimate
    ratio: Estimate
    p: float | None  # of no difference; below 0.05 where the interval leaves out 0
    p_holm: float | None  # corrected for the number of pairs


class Rates(NamedTuple):
    overall: Estimate  # every utterance, whatever its label
    groups: dict[str | None, Estimate]  # every label, None last
    macro: Estimate  # the mean over the kept groups; so are the next two
    gap: Estimate  # highest minus lowest; its interval is conservative
    deviation: Estimate  # standard deviation over groups; its interval is conservative
    pairs: list[Pair]


class Null(NamedTuple):
    """A measure of disparity beside what it would be if groups did not matter."""

    observed: float
    expected: float  # mean over permutations
    percentile_95: float
    p: float


class NoDifference(NamedTuple):
    p: float  # of the studentized statistic: the test to quote
    gap: Null
    deviation: Null


class Comparison(NamedTuple):
    """System A minus system B on the same utterances: positive where B errs less."""

    overall: Estimate
    groups: dict[str | None, Estimate]
    gap_a: Estimate
    gap_b: Estimate
    gap_change: Estimate  # gap of A - gap of B; positive: B is fairer; conservative interval
    pairs: list[Pair]  # change of each difference, group - other; ratio is empty


class Mapsswe(NamedTuple):
    mean: float | None  # errors an utterance, A - B
    statistic: float | None
    p: float | None


class RateRatio(NamedTuple):
    ratio: float
    interval: Interval
    p: float


class Adjusted(NamedTuple):
    reference: str
    groups: dict[str, RateRatio]  # against the reference, covariates held fixed
    covariates: dict[str, RateRatio]  # for one unit more, or against the first category
    p: float | None  # of no group effect at all; None with a single group
    utterances: int
    left_out: int  # without words, label or covariate


# ---- counts --------------------------------------------------------------------------------------


def large_enough(
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    min_clusters: int = 10,
    min_utterances: int = 1,
) -> list[str]:
    """Labels with at least so many clusters and utterances: what `keep` elsewhere expects."""
    utterances = Counter(labels)
    speakers = Counter(label for _, label in set(zip(clusters, labels, strict=True)))
    large = [
        g for g, n in utterances.items() if n >= min_utterances and speakers[g] >= min_clusters
    ]
    return sorted(g for g in large if g is not None)


def _codes(values: Sequence[Hashable]) -> tuple[list, np.ndarray]:
    """Distinct values in order of appearance, and each entry's place among them."""
    places: dict[Hashable, int] = {}
    codes = [places.setdefault(value, len(places)) for value in values]
    return list(places), np.array(codes, dtype=np.int64)


class _Counts(NamedTuple):
    """Sums over the utterances of one cluster and one label; rows sorted by cluster."""

    labels: list[str | None]  # sorted, None last
    names: list[Hashable]  # of the clusters
    cluster: np.ndarray  # (R,) of a row
    group: np.ndarray  # (R,)
    words: np.ndarray  # (R,)
    errors: list[np.ndarray]  # one (R,) a system


def _count(systems, words, clusters, labels, keep) -> tuple[_Counts, list[int]]:
    """The rows everything below rests on, and the columns of the groups to compare."""
    arrays = [np.asarray(a) for a in (*systems, words)]
    n = len(labels)
    if n == 0 or any(a.shape != (n,) for a in arrays) or len(clusters) != n:
        raise StatisticsError("errors, words, clusters and labels need one entry an utterance")
    if any(a.dtype.kind not in "iu" or a.min() < 0 for a in arrays):
        raise StatisticsError("errors and words must be counts: integers, none below 0")
    found, group = _codes(labels)
    order = sorted(range(len(found)), key=lambda i: (found[i] is None, found[i] or ""))
    group = np.argsort(order)[group]
    found = [found[i] for i in order]
    if unknown := set(keep or ()) - set(found):
        raise StatisticsError(f"no utterance has the label {sorted(unknown)[0]!r}")
    names, cluster = _codes(clusters)
    rows, row = np.unique(cluster * len(found) + group, return_inverse=True)
    *errors, words = (np.bincount(row, weights=a) for a in arrays)
    counts = _Counts(found, names, rows // len(found), rows % len(found), words, errors)
    has_words = np.bincount(counts.group, weights=words) > 0
    kept = [
        i
        for i, label in enumerate(found)
        if label is not None and has_words[i] and (keep is None or label in keep)
    ]
    return counts, kept


# ---- the bootstrap -------------------------------------------------------------------------------


class _Draws(NamedTuple):
    """K rates: one a label, then everyone's. Of one system, or of the difference of two."""

    rate: np.ndarray  # (K,)
    error: np.ndarray  # (K,) standard error; its small-sample factor would cancel and is left out
    correlation: np.ndarray  # (K, K) between rates; not 0 where groups share clusters
    deviation: np.ndarray  # (draws, K) rate in the draw - rate; NaN without words
    errors: np.ndarray  # (draws, K) standard error in the draw


def _strata(counts: _Counts) -> list[tuple[np.ndarray, np.ndarray]]:
    """(groups, rows of counts) of each set of groups that clusters tie together.

    Groups that share no cluster are drawn from separately: none vanishes from a draw or changes its
    number of clusters. Groups that share some (emotion: every speaker has several) must be drawn
    from together.
    """
    n = len(counts.labels)
    has = np.zeros((len(counts.names), n), dtype=np.float32)
    has[counts.cluster, counts.group] = 1
    tied = has.T @ has > 0
    for _ in range(n.bit_length()):  # tied by way of other groups
        tied = tied.astype(np.float32) @ tied.astype(np.float32) > 0
    first = tied.argmax(axis=1)
    return [(np.flatnonzero(first == k), first[counts.group] == k) for k in np.unique(first)]


def _resample(rng: np.random.Generator, table: np.ndarray, times: np.ndarray, draws: int):
    """Sums (draws, M) of as many rows as there are, drawn with replacement from table (C, M).

    times: (C,) how many clusters each row stands for. Where few kinds of cluster make up many
    clusters (single utterances), the kinds are counted by a multinomial: the same distribution.
    """
    n = times.sum()
    few = 20 * len(table) < n
    if not few:
        table = np.repeat(table, times, axis=0)
    sums = np.empty((draws, table.shape[1]))
    step = max(1, BLOCK // len(table))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        if few:
            drawn = rng.multinomial(n, times / n, size)
        else:
            index = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            drawn = np.bincount(index.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = drawn.astype(np.float64) @ table
    return sums


def _bootstrap(counts: _Counts, systems: list[np.ndarray], draws: int, seed: int) -> list[_Draws]:
    """The same draws of clusters for all systems, each of them (R,) errors or differences."""
    if draws < 1:
        raise StatisticsError("at least one draw is needed")
    rng = np.random.default_rng(seed)
    k = len(counts.labels) + 1
    by_group = [np.bincount(counts.group, values, k - 1) for values in (counts.words, *systems)]
    words, *errors = (np.append(values, values.sum()) for values in by_group)
    rate = np.array(errors) / np.where(words > 0, words, np.nan)  # (systems, K)
    covariance = np.zeros((len(systems), k, k))  # times words^2
    sums = np.zeros((draws, len(systems), 5, k))
    for groups, rows in _strata(counts):
        cluster = np.unique(counts.cluster[rows], return_inverse=True)[1]
        place = (cluster, slice(None), np.searchsorted(groups, counts.group[rows]))
        table = np.zeros((cluster.max() + 1, 1 + len(systems), len(groups)))
        table[place] = np.stack([counts.words[rows], *(e[rows] for e in systems)], axis=1)
        table, times = np.unique(table, axis=0, return_counts=True)
        table = np.append(table, table.sum(axis=2, keepdims=True), axis=2)  # everyone
        columns = np.append(groups, k - 1)
        n, e = table[:, :1], table[:, 1:]
        u = e - np.nan_to_num(rate[:, columns]) * n  # (C, systems, columns) errors in excess
        for i in range(len(systems)):
            covariance[i][np.ix_(columns, columns)] += (u[:, i].T * times) @ u[:, i]
        moments = np.stack(np.broadcast_arrays(n, u, u * u, u * n, n * n), axis=2)
        drawn = _resample(rng, moments.reshape(len(table), -1), times, draws)
        sums[..., columns] += drawn.reshape(draws, *moments.shape[1:])

    out = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(len(systems)):
            n, u, uu, un, nn = (sums[:, i, m] for m in range(5))
            # The variance of a ratio of sums is that of its residuals (Cochran 1977, section 6.3),
            # about the draw's own rate: u - deviation * n.
            deviation = u / n
            errors = np.sqrt(np.maximum(uu - 2 * deviation * un + deviation**2 * nn, 0)) / n
            spread = np.sqrt(np.diag(covariance[i]))
            error = spread / words
            error[error < 1e-9 * np.abs(rate[i])] = 0  # rounding
            errors[errors < 1e-9 * np.abs(rate[i] + deviation)] = 0
            correlation = np.nan_to_num(covariance[i] / np.outer(spread, spread))
            out.append(_Draws(rate[i], error, correlation, deviation, errors))
    return out


class _Studentized(NamedTuple):
    value: float
    error: float
    t: np.ndarray  # (draws,) |deviation| / standard error of the draw; infinite: it cannot tell


def _studentize(d: _Draws, columns: Sequence[int], weights: Sequence[float], log=False):
    """A weighted sum of rates, or of their logarithms, and its studentized deviations."""
    c, w = list(columns), np.array(weights, dtype=float)
    rate, error, deviation, errors = d.rate[c], d.error[c], d.deviation[:, c], d.errors[:, c]
    with np.errstate(divide="ignore", invalid="ignore"):
        if log:
            errors, deviation = errors / (rate + deviation), np.log1p(deviation / rate)
            rate, error = np.log(rate), error / rate
        correlation = d.correlation[np.ix_(c, c)]
        scaled = np.vstack([error, errors]) * w
        every = np.sqrt(np.maximum(((scaled @ correlation) * scaled).sum(axis=1), 0))
        t = np.abs(deviation @ w) / every[1:]
    return _Studentized(float(rate @ w), float(every[0]), np.where(np.isnan(t), np.inf, t))


def _quantile(t: np.ndarray) -> float:
    rank = math.ceil(LEVEL * (len(t) + 1)) - 1
    return float(np.partition(t, rank)[rank]) if rank < len(t) else math.inf


def _estimate(s: _Studentized, log: bool = False) -> Estimate:
    if math.isnan(s.value) or math.isinf(s.value):
        return Estimate(0.0 if s.value == -math.inf else None, None)
    reach = _quantile(s.t) * s.error if s.error > 0 else math.inf
    low, high = s.value - reach, s.value + reach
    change = math.exp if log else float
    interval = Interval(change(low), change(high)) if reach < 500 else None
    return Estimate(change(s.value), interval)


def _simultaneous(parts: list[_Studentized]) -> float:
    """What all deviations together stay below in 95 % of draws (the maximum of |t|)."""
    return _quantile(np.max([s.t for s in parts], axis=0))


def _disparities(values: np.ndarray, reach: np.ndarray, groups: int) -> tuple[Estimate, Estimate]:
    """Gap and standard deviation over groups, from the differences (P,) of all pairs of groups.

    Neither has a usable distribution of its own (both are too high where groups are alike), but
    where all differences lie within their bounds at once, so do these.
    """
    low, high = np.maximum(np.abs(values) - reach, 0), np.abs(values) + reach
    gap, deviation = np.abs(values).max(), math.sqrt((values**2).sum()) / groups
    if not np.isfinite(reach).all():
        return Estimate(float(gap), None), Estimate(deviation, None)
    bounds = Interval(math.sqrt((low**2).sum()) / groups, math.sqrt((high**2).sum()) / groups)
    return (
        Estimate(float(gap), Interval(float(low.max()), float(high.max()))),
        Estimate(deviation, bounds),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979, Scand. J. Stat. 6:65) step-down correction; None is no test and stays None."""
    tests = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tests):
        highest = max(highest, min(1.0, p * (len(tests) - rank)))
        corrected[i] = highest
    return corrected


def _pairs(d: _Draws, labels: list, kept: list[int], reference: str | None, ratios: bool):
    if reference is None:
        chosen = list(combinations(kept, 2))
    else:
        chosen = [(i, labels.index(reference)) for i in kept if labels[i] != reference]
    differences = [_studentize(d, pair, (1, -1)) for pair in chosen]
    p_values = [_p(s) for s in differences]
    out = []
    for (i, j), s, p, p_holm in zip(chosen, differences, p_values, holm(p_values)):
        ratio = _studentize(d, (i, j), (1, -1), log=True) if ratios else None
        ratio = _estimate(ratio, log=True) if ratios else Estimate(None, None)
        out.append(Pair(labels[i], labels[j], _estimate(s), ratio, p, p_holm))
    return out


def _p(s: _Studentized) -> float | None:
    if not s.error > 0:
        return None
    return (1 + np.count_nonzero(s.t >= abs(s.value) / s.error)) / (1 + len(s.t))


def rates_by_group(
    errors: np.ndarray,
    words: np.ndarray,
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    keep: Collection[str] | None = None,
    reference: str | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Rates:
    """Word error rates with 95 % intervals, and how far apart the groups are.

    keep: the labels that enter macro, gap, deviation and pairs (all that have words, if None); the
    others are only shown. reference: pair every group with this one instead of with every other.
    A speaker may have several labels. Raises StatisticsError for unusable counts or labels.
    """
    counts, kept = _count([errors], words, clusters, labels, keep)
    if reference is not None and reference not in [counts.labels[i] for i in kept]:
        raise StatisticsError(f"the reference group {reference!r} is not among those compared")
    (d,) = _bootstrap(counts, counts.errors, draws, seed)
    every = [_estimate(_studentize(d, [i], [1], log=True), log=True) for i in range(len(d.rate))]
    macro = gap = deviation = Estimate(None, None)
    if kept:
        macro = _estimate(_studentize(d, kept, [1 / len(kept)] * len(kept)))
    if len(kept) > 1:
        differences = [_studentize(d, pair, (1, -1)) for pair in combinations(kept, 2)]
        values = np.array([s.value for s in differences])
        reach = _simultaneous(differences) * np.array([s.error for s in differences])
        gap, deviation = _disparities(values, reach, len(kept))
    pairs = _pairs(d, counts.labels, kept, reference, ratios=True)
    groups = dict(zip(counts.labels, every))
    return Rates(every[-1], groups, macro, gap, deviation, pairs)


# ---- permutation ---------------------------------------------------------------------------------


def _permuted(rng: np.random.Generator, table: np.ndarray, sizes: np.ndarray, draws: int):
    """Sums (some draws, G, M) of the rows (S, M) dealt at random to groups of these sizes."""
    n = len(table)
    kinds, times = np.unique(table, axis=0, return_counts=True)
    if 20 * len(kinds) < n:  # as in _resample: how many of each kind a group is dealt
        for _ in range(draws):
            left, dealt = times, []
            for size in sizes[:-1]:
                dealt.append(rng.multivariate_hypergeometric(left, size))
                left = left - dealt[-1]
            yield (np.array([*dealt, left]) @ kinds)[None]
        return
    starts = np.cumsum(sizes) - sizes
    columns = np.ascontiguousarray(table.T)
    step = max(1, BLOCK // n)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        order = rng.permuted(np.tile(np.arange(n), (size, 1)), axis=1)
        yield np.stack([np.add.reduceat(c[order], starts, axis=1) for c in columns], axis=2)


def _measures(sums: np.ndarray, mean_square: float) -> np.ndarray:
    """Statistic, gap and standard deviation (3, draws) of groups' sums (draws, G, 5)."""
    e, n, ee, en, nn = np.moveaxis(sums, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = e / n
        # One more cluster of average residual a group keeps the variance above zero.
        weight = n**2 / (np.maximum(ee - 2 * rate * en + rate**2 * nn, 0) + mean_square)
    weight, filled = np.where(n > 0, weight, 0), np.where(n > 0, rate, 0)
    center = (weight * filled).sum(axis=1) / weight.sum(axis=1)
    statistic = (weight * (filled - center[:, None]) ** 2).sum(axis=1)
    gap = np.nanmax(rate, axis=1) - np.nanmin(rate, axis=1)
    return np.array([statistic, gap, np.nanstd(rate, axis=1)])


def permutation_test(
    errors: np.ndarray,
    words: np.ndarray,
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    keep: Collection[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> NoDifference | None:
    """What chance alone does: labels are dealt anew to whole clusters, `draws` times.

    The statistic is sum_g (R_g - R)^2 / v_g, of the rates R_g, their cluster-robust variances v_g
    and their mean R weighted by 1 / v_g. If labels say nothing at all about speakers, the test is
    exact whatever the sizes of clusters. Studentized, it is also right with many clusters if rates
    are equal but groups differ otherwise, say in how much they talk (Chung and Romano 2013,
    arXiv:1304.5939), which the bare gap's p is not.

    A max-min gap is above zero even where nobody is treated differently: `expected` says how far.
    None with fewer than two groups to compare. Raises StatisticsError where a cluster has several
    labels: dealing whole clusters then means nothing.
    """
    counts, kept = _count([errors], words, clusters, labels, keep)
    labelled = counts.cluster[[counts.labels[g] is not None for g in counts.group]]
    several = np.flatnonzero(np.bincount(labelled) > 1)
    if len(several):
        raise StatisticsError(
            f"no permutation test: the label varies within {len(several):,} clusters, "
            f"such as {counts.names[several[0]]!r}"
        )
    if len(kept) < 2:
        return None
    rows = np.isin(counts.group, kept)
    rows = np.flatnonzero(rows)[np.argsort(counts.group[rows], kind="stable")]
    e, n = counts.errors[0][rows], counts.words[rows]
    table = np.stack([e, n, e * e, e * n, n * n], axis=1)
    sizes = np.bincount(counts.group[rows])[kept]
    mean_square = float(np.mean((e - e.sum() / n.sum() * n) ** 2))
    observed = np.add.reduceat(table, np.cumsum(sizes) - sizes, axis=0)
    if mean_square < 1e-18 * e.sum():  # all clusters have one and the same rate
        mean_square = 1.0
    rng = np.random.default_rng(seed)
    null = [_measures(sums, mean_square) for sums in _permuted(rng, table, sizes, draws)]
    null, seen = np.concatenate(null, axis=1), _measures(observed[None], mean_square)
    # Differently ordered sums differ in the last digits, which must not break ties.
    at_least = (null >= seen * (1 - 1e-9)).sum(axis=1)
    p = (1 + at_least) / (1 + null.shape[1])
    top = np.quantile(null, 0.95, axis=1)
    about = [
        Null(float(seen[i, 0]), float(null[i].mean()), float(top[i]), float(p[i])) for i in (1, 2)
    ]
    return NoDifference(float(p[0]), *about)


# ---- two systems ---------------------------------------------------------------------------------


def _least(a: np.ndarray, b: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Lower bound of |a| - |b|, from bounds (2, P) of a, of b and of a - b."""
    a_least = np.maximum(0, np.maximum(a[0], -a[1]))
    b_positive = np.maximum(change[0], a_least - b[1])
    b_negative = np.maximum(-change[1], a_least + b[0])
    return np.minimum(
        np.where(b[1] >= 0, b_positive, np.inf), np.where(b[0] <= 0, b_negative, np.inf)
    )


def _largest(bounds: np.ndarray) -> np.ndarray:
    """(P,) which differences may be the largest in size, given bounds (2, P) of each."""
    least = np.maximum(0, np.maximum(bounds[0], -bounds[1]))
    return np.abs(bounds).max(axis=0) >= least.max()


def compare(
    errors_a: np.ndarray,
    errors_b: np.ndarray,
    words: np.ndarray,
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    keep: Collection[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Did B reduce the error rates of A, and the disparity between groups? Paired by utterance.

    The change in the gap is bounded without assuming which groups are worst and best: with all
    differences of A, of B and all changes within their bounds at once (95 % of samples), the
    change in gap is at least |a| - |b| of the pair that B separates most, and at most that of the
    pair that A separates most.
    """
    counts, kept = _count([errors_a, errors_b], words, clusters, labels, keep)
    a, b = counts.errors
    systems = _bootstrap(counts, [a, b, a - b], draws, seed)
    change = systems[2]
    every = [_estimate(_studentize(change, [i], [1])) for i in range(len(change.rate))]
    gaps = [Estimate(None, None)] * 3
    if len(kept) > 1:
        pairs = list(combinations(kept, 2))
        parts = [[_studentize(d, pair, (1, -1)) for pair in pairs] for d in systems]
        values, se = np.array([[(s.value, s.error) for s in part] for part in parts]).transpose(
            2, 0, 1
        )
        for i in (0, 1):
            gaps[i] = _disparities(values[i], _simultaneous(parts[i]) * se[i], len(kept))[0]
        reach = _simultaneous([s for part in parts for s in part]) * se
        difference, interval = gaps[0].value - gaps[1].value, None
        if np.isfinite(reach).all():
            bounds = np.stack([values - reach, values + reach], axis=1)  # (3, 2, P)
            low = _least(bounds[0], bounds[1], bounds[2])[_largest(bounds[1])].min()
            high = -_least(bounds[1], bounds[0], -bounds[2, ::-1])[_largest(bounds[0])].min()
            interval = Interval(float(low), float(high))
        gaps[2] = Estimate(difference, interval)
    pairs = _pairs(change, counts.labels, kept, None, ratios=False)
    return Comparison(every[-1], dict(zip(counts.labels, every)), *gaps, pairs)


def mapsswe(errors_a: np.ndarray, errors_b: np.ndarray) -> Mapsswe:
    """Matched pairs test of two systems' errors (Gillick and Cox 1989, ICASSP, section 3).

    mean(Z) / (sd(Z) / sqrt(n)) against the normal distribution, Z the difference in errors of a
    segment. Segments here are utterances, not stretches between correct words, and are taken as
    independent, which utterances of one speaker are not: given for comparison with other work;
    `compare` is the test to trust.
    """
    z = np.asarray(errors_a, dtype=np.float64) - np.asarray(errors_b)
    if z.ndim != 1 or len(z) == 0:
        raise StatisticsError("both systems need errors for the same utterances, at least one")
    mean, sd = float(z.mean()), float(z.std(ddof=1)) if len(z) > 1 else 0.0
    if sd == 0:
        return Mapsswe(mean, None, None)
    statistic = mean / (sd / math.sqrt(len(z)))
    return Mapsswe(mean, statistic, math.erfc(abs(statistic) / math.sqrt(2)))


# ---- adjusted for other things -------------------------------------------------------------------


def adjust(
    errors: np.ndarray,
    words: np.ndarray,
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    covariates: dict[str, Sequence[float | str | None]],
    keep: Collection[str] | None = None,
    reference: str | None = None,
) -> Adjusted:
    """Rate ratios of the groups with covariates held fixed: Poisson regression, exposure = words.

    Each utterance's errors are Poisson with mean words * exp(b0 + b_group + x'b); standard errors
    are robust to dependence within clusters, and thereby to more variation than Poisson has. This
    is the population-averaged relative of the model with a random effect for each speaker of Liu,
    Veliche and Peng (2022, arXiv:2109.09061, eq. 3), and needs some 40 clusters to be right.
    Covariates are numbers, or texts as categories; the reference is the first label by default.
    Utterances without words, label or a covariate are left out and counted.

    Needs statsmodels; StatisticsError if it is missing, or if the model cannot be estimated.
    """
    try:
        from statsmodels.genmod.families import Poisson
        from statsmodels.genmod.generalized_linear_model import GLM
    except ImportError as error:
        raise StatisticsError("adjusting needs a package: pip install statsmodels") from error
    counts, kept = _count([errors], words, clusters, labels, keep)
    compared = [counts.labels[i] for i in kept]
    if reference is None and compared:
        reference = compared[0]
    if reference not in compared:
        raise StatisticsError(f"the reference group {reference!r} is not among those compared")
    for name, values in covariates.items():
        if len(values) != len(labels):
            raise StatisticsError(f"covariate {name}: one value an utterance is needed")
    values = zip(*covariates.values(), strict=True) if covariates else [()] * len(labels)
    used = [
        i
        for i, (n, label, row) in enumerate(zip(words, labels, values, strict=True))
        if n > 0 and label in compared and not any(x is None or x != x for x in row)
    ]
    errors, words = np.asarray(errors)[used], np.asarray(words)[used]
    names, cluster = _codes([clusters[i] for i in used])

    terms, baselines = {}, {reference}
    for name, values in {"": labels, **covariates}.items():
        values = [values[i] for i in used]
        if name and not any(isinstance(x, str) for x in values):
            terms[name] = np.array(values, dtype=float)
            continue
        categories = sorted(set(map(str, values)))
        baselines |= {f"{name}={categories[0]}"} if name else set()
        for category in categories:
            which = np.array([str(x) == category for x in values])
            if not errors[which].any():
                raise StatisticsError(f"{name} {category}: no errors, so no ratio to estimate")
            terms[f"{name}={category}" if name else category] = which.astype(float)
    terms = {name: column for name, column in terms.items() if name not in baselines}
    design = np.column_stack([np.ones(len(used)), *terms.values()])
    norm = np.linalg.norm(design, axis=0)
    if len(names) <= len(norm):
        raise StatisticsError(f"{len(names)} clusters are too few for {len(norm)} terms")
    if not norm.all() or np.linalg.matrix_rank(design / norm) < len(norm):
        raise StatisticsError(f"terms that never vary or repeat one another: {', '.join(terms)}")
    model = GLM(errors, design, family=Poisson(), exposure=words)
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": cluster}, use_t=True)
    bounds = fit.conf_int(1 - LEVEL)
    ratios = {
        name: RateRatio(
            math.exp(fit.params[i]), Interval(*map(math.exp, bounds[i])), fit.pvalues[i]
        )
        for i, name in enumerate(terms, start=1)
    }
    groups = {g: ratios.pop(g) for g in compared if g in ratios}
    contrast = np.eye(len(norm))[1 : 1 + len(groups)]
    p = float(fit.wald_test(contrast, scalar=True).pvalue) if groups else None
    return Adjusted(reference, groups, ratios, p, len(used), len(labels) - len(used))
