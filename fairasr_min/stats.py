"""How sure is a difference in word error rate? Speakers resampled and permuted. No torch here.

Arguments that recur, with one entry an utterance: `errors` and `words`, integer arrays (n,);
`clusters`, who may share errors (the speaker; hashable, never None); `labels`, the group (None
where it is missing). `keep`: the labels that are compared (all that have words, if None); the
others are only shown. `seed`: the same one gives the same numbers.

Utterances of a speaker resemble one another, so whole clusters are drawn, never utterances (Liu and
Peng 2020, arXiv:1912.09508). Sums come first, division last; rates are fractions: errors a word of
the reference, insertions into an empty reference included. What the data cannot tell is None.

Intervals are 95 %, symmetric bootstrap-t (Hall 1988, J. R. Stat. Soc. B 50:35): the deviation of
each draw is divided by its own standard error, and the 95th percentile of these |t| takes the place
of 1.96. Rates and ratios are treated on the log scale, differences as they are. In simulation
(RESULTS.md) this covers close to 95 % with skewed and unequally talkative speakers down to five a
group; plain percentiles of the draws cover less, and the fewer the speakers, the less. Intervals
of gap, deviation and change in gap cannot be had so; they are wider and cover about 95 % or more.
"""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
BLOCK = 4_000_000  # numbers drawn at a time; bounds memory


class StatisticsError(ValueError):
    """The data does not allow what was asked; the message says why."""


class Interval(NamedTuple):
    low: float
    high: float


class Estimate(NamedTuple):
    value: float | None  # None: nothing to divide by
    interval: Interval | None  # None: clusters vary too little, or are too few, to say


UNKNOWN = Estimate(None, None)


class Pair(NamedTuple):
    """The rate of `group` against that of `other`."""

    group: str
    other: str
    difference: Estimate
    ratio: Estimate
    p: float | None  # of no difference: at most 0.05 where the interval leaves out 0
    p_holm: float | None  # corrected for the number of pairs


class Rates(NamedTuple):
    overall: Estimate  # all utterances, the unlabelled too
    groups: dict[str | None, Estimate]  # every label, sorted, None last
    macro: Estimate  # mean over the compared groups
    gap: Estimate  # highest minus lowest; the interval is conservative
    deviation: Estimate  # standard deviation over groups; the interval is conservative
    pairs: list[Pair]


class Null(NamedTuple):
    """A disparity, and what it would be if labels meant nothing."""

    observed: float
    expected: float  # mean over permutations
    percentile_95: float
    p: float


class NoDifference(NamedTuple):
    p: float  # of the studentized statistic: the test to quote
    gap: Null
    deviation: Null


class Comparison(NamedTuple):
    """Rates of system A minus those of system B: positive where B errs less."""

    overall: Estimate
    groups: dict[str | None, Estimate]
    gap_a: Estimate
    gap_b: Estimate
    gap_change: Estimate  # gap of A - gap of B: positive where B is fairer; conservative interval
    pairs: list[Pair]  # what became of each difference, group - other; no ratios


class Mapsswe(NamedTuple):
    mean: float  # errors of A - errors of B, an utterance
    statistic: float | None  # None if that never varies
    p: float | None


class RateRatio(NamedTuple):
    ratio: float
    interval: Interval
    p: float


class Adjusted(NamedTuple):
    reference: str
    groups: dict[str, RateRatio]  # against the reference
    covariates: dict[str, RateRatio]  # for one unit more, or "name=category" against the first
    p: float | None  # of no difference between any groups
    utterances: int
    left_out: int  # without words, compared label or covariate


# ---- counts --------------------------------------------------------------------------------------


class _Counts(NamedTuple):
    """Sums over the utterances of one cluster and one label, in R rows sorted by cluster."""

    labels: list[str | None]  # sorted, None last
    kept: list[int]  # places of those to compare
    names: list[Hashable]  # of the clusters
    cluster: np.ndarray  # (R,)
    group: np.ndarray  # (R,) places in labels
    words: np.ndarray  # (R,)
    errors: list[np.ndarray]  # (R,) of each system


def _codes(values: Sequence[Hashable]) -> tuple[list, np.ndarray]:
    """Distinct values in order of appearance, and each entry's place among them."""
    places: dict[Hashable, int] = {}
    codes = [places.setdefault(value, len(places)) for value in values]
    return list(places), np.array(codes, dtype=np.int64)


def _count(systems, words, clusters, labels, keep) -> _Counts:
    arrays = [np.asarray(a) for a in (*systems, words)]
    if len(labels) == 0 or {(len(labels),)} != {a.shape for a in arrays} | {(len(clusters),)}:
        raise StatisticsError("errors, words, clusters and labels need one entry an utterance")
    if any(a.dtype.kind not in "iu" or a.min() < 0 for a in arrays):
        raise StatisticsError("errors and words must be counts: integers, none below 0")
    found, group = _codes(labels)
    order = sorted(range(len(found)), key=lambda i: (found[i] is None, found[i] or ""))
    found, group = [found[i] for i in order], np.argsort(order)[group]
    if unknown := set(keep or ()) - set(found):
        raise StatisticsError(f"no utterance has the label {sorted(unknown)[0]!r}")
    names, cluster = _codes(clusters)
    if None in names:
        raise StatisticsError("some utterances have no cluster: name one, or use utterances")
    rows, row = np.unique(cluster * len(found) + group, return_inverse=True)
    *errors, words = (np.bincount(row, weights=a) for a in arrays)
    cluster, group = np.divmod(rows, len(found))
    has_words = np.bincount(group, weights=words) > 0
    wanted = set(found if keep is None else keep) - {None}
    kept = [i for i, label in enumerate(found) if label in wanted and has_words[i]]
    return _Counts(found, kept, names, cluster, group, words, errors)


def large_enough(
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    min_clusters: int = 10,
    min_utterances: int = 1,
) -> list[str]:
    """The labels with so many clusters and utterances: a `keep` for the functions below."""
    utterances = Counter(label for label in labels if label is not None)
    speakers = Counter(label for _, label in set(zip(clusters, labels, strict=True)))
    enough = {g for g, n in utterances.items() if n >= min_utterances}
    return sorted(g for g in enough if speakers[g] >= min_clusters)


# ---- the bootstrap -------------------------------------------------------------------------------


class _Draws(NamedTuple):
    """K quantities: rates of each label and of everyone, or what was made of them."""

    value: np.ndarray  # (K,)
    error: np.ndarray  # (K,) standard error; its small-sample factor would cancel: left out
    deviation: np.ndarray  # (draws, K) from value; NaN in a draw without words
    errors: np.ndarray  # (draws, K) standard error in the draw


def _strata(counts: _Counts) -> list[tuple[np.ndarray, np.ndarray]]:
    """(places of labels, rows) of each set of groups that clusters tie together.

    Groups without a common cluster are drawn separately: none vanishes from a draw or changes its
    number of clusters. Those with some (every speaker has several emotions) are drawn as one.
    """
    n = len(counts.labels)
    has = np.zeros((len(counts.names), n), dtype=np.float32)
    has[counts.cluster, counts.group] = 1
    tied = has.T @ has > 0
    for _ in range(n.bit_length()):  # by way of other groups
        tied = tied.astype(np.float32) @ tied.astype(np.float32) > 0
    first = tied.argmax(axis=1)
    return [(np.flatnonzero(first == k), first[counts.group] == k) for k in np.unique(first)]


def _resample(rng: np.random.Generator, table: np.ndarray, times: np.ndarray, draws: int):
    """Sums (draws, M) of n clusters drawn with replacement from n; row c of table stands for
    times[c] of them.

    Where there are few kinds of cluster (single utterances), a multinomial says how often each kind
    is drawn: the same distribution in a fraction of the time.
    """
    n = int(times.sum())
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
    """Rates of each system, (R,) errors or differences of errors, in the same draws of clusters.

    The variance of a ratio of sums is that of its residuals u = errors - rate * words (Cochran
    1977, Sampling Techniques, chapter 6). In a draw they are taken about the draw's own rate, so
    five sums suffice: of words n, u, u^2, u n and n^2.
    """
    rng = np.random.default_rng(seed)
    k = len(counts.labels) + 1
    by_group = [np.bincount(counts.group, values, k - 1) for values in (counts.words, *systems)]
    words, *errors = (np.append(values, values.sum()) for values in by_group)
    rate = np.array(errors) / np.where(words > 0, words, np.nan)  # (systems, K)
    squares = np.zeros((len(systems), k))  # sums of u^2
    sums = np.zeros((draws, len(systems), 5, k))
    for groups, rows in _strata(counts):
        cluster = np.unique(counts.cluster[rows], return_inverse=True)[1]
        table = np.zeros((cluster.max() + 1, 1 + len(systems), len(groups)))
        place = np.searchsorted(groups, counts.group[rows])
        table[cluster, :, place] = np.stack([counts.words, *systems], axis=1)[rows]
        table, times = np.unique(table, axis=0, return_counts=True)
        table = np.append(table, table.sum(axis=2, keepdims=True), axis=2)  # everyone
        columns = np.append(groups, k - 1)
        n, e = table[:, :1], table[:, 1:]
        u = e - np.nan_to_num(rate[:, columns]) * n  # (C, systems, columns)
        squares[:, columns] += np.einsum("c,csk->sk", times, u * u)
        moments = np.stack(np.broadcast_arrays(n, u, u * u, u * n, n * n), axis=2)
        drawn = _resample(rng, moments.reshape(len(table), -1), times, draws)
        sums[..., columns] += drawn.reshape(draws, *moments.shape[1:])

    out = []
    for i in range(len(systems)):
        n, u, uu, un, nn = (sums[:, i, m] for m in range(5))
        with np.errstate(divide="ignore", invalid="ignore"):
            deviation = u / n
            errors = np.sqrt(np.maximum(uu - 2 * deviation * un + deviation**2 * nn, 0)) / n
            error = np.sqrt(squares[i]) / words
        # What rounding leaves of equal rates; five sums leave more of it than residuals.
        error[error < 1e-9 * np.abs(rate[i])] = 0
        errors[errors < 1e-6 * np.abs(rate[i] + deviation)] = 0
        out.append(_Draws(rate[i], error, deviation, errors))
    return out


def _logarithm(d: _Draws) -> _Draws:
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = d.errors / (d.value + d.deviation)
        deviation = np.log1p(d.deviation / d.value)
        return _Draws(np.log(d.value), d.error / d.value, deviation, errors)


def _mean(d: _Draws, places: list[int]) -> _Draws:
    """The mean of some of the rates, as the only quantity."""
    deviation = d.deviation[:, places].mean(axis=1, keepdims=True)
    errors = np.linalg.norm(d.errors[:, places], axis=1, keepdims=True) / len(places)
    error = np.linalg.norm(d.error[places], keepdims=True) / len(places)
    return _Draws(d.value[places].mean(keepdims=True), error, deviation, errors)


class _Studentized(NamedTuple):
    value: float
    error: float
    t: np.ndarray  # (draws,) |deviation| / error of the draw; infinite where a draw cannot tell


def _studentize(d: _Draws, place: int, minus: int | None = None) -> _Studentized:
    """One of the quantities, or the difference of two.

    The errors of a difference are added as if groups had no cluster in common. Where they have, all
    draws and the sample are wrong by about the same factor, which cancels.
    """
    value, error = d.value[place], d.error[place]
    deviation, errors = d.deviation[:, place], d.errors[:, place]
    with np.errstate(divide="ignore", invalid="ignore"):
        if minus is not None:
            value, deviation = value - d.value[minus], deviation - d.deviation[:, minus]
            error, errors = np.hypot(error, d.error[minus]), np.hypot(errors, d.errors[:, minus])
        t = np.abs(deviation) / errors
    return _Studentized(float(value), float(error), np.where(np.isnan(t), np.inf, t))


def _reach(error: float, t: np.ndarray) -> float:
    """Half the width of an interval: the 95th percentile of t, in standard errors."""
    rank = math.ceil(LEVEL * (len(t) + 1)) - 1
    if not error > 0 or rank >= len(t):
        return math.inf
    return float(np.partition(t, rank)[rank]) * error


def _estimate(s: _Studentized, exp_of: float | None = None) -> Estimate:
    """exp_of: the exact quantity of which s is the logarithm."""
    reach = _reach(s.error, s.t)
    interval = Interval(s.value - reach, s.value + reach) if reach < 500 else None  # e^500
    if exp_of is not None:
        interval = interval and Interval(*map(math.exp, interval))
    value = s.value if exp_of is None else float(exp_of)
    return Estimate(value if math.isfinite(value) else None, interval)


def _p_value(s: _Studentized) -> float | None:
    """The level at which the interval just touches 0."""
    if not s.error > 0:
        return None
    return (1 + int(np.count_nonzero(s.t >= abs(s.value) / s.error))) / (1 + len(s.t))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979, Scand. J. Stat. 6:65) step-down correction; None is no test and stays None."""
    tests = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tests):
        corrected[i] = highest = max(highest, min(1.0, p * (len(tests) - rank)))
    return corrected


def _together(d: _Draws, pairs: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    """Values (P,) and errors (P,) of all differences, and the largest t (draws,) of each draw."""
    values, errors, largest = [], [], np.zeros(len(d.errors))
    for i, j in pairs:  # one after another: of many groups there are very many pairs
        s = _studentize(d, i, minus=j)
        values.append(s.value)
        errors.append(s.error)
        largest = np.maximum(largest, s.t)
    return np.array(values), np.array(errors), largest


def _reaches(errors: np.ndarray, largest: np.ndarray) -> np.ndarray | None:
    """Half-widths that hold for all differences at once; None if one of them has none."""
    return _reach(1.0, largest) * errors if errors.all() and _reach(1.0, largest) < 500 else None


def _disparities(values, errors, largest, groups: int) -> tuple[Estimate, Estimate]:
    """Gap and standard deviation over groups, from what _together says of all pairs of groups.

    Neither can be resampled: where groups are alike, the sample shows too much of both and its
    resamples more still. But where all differences lie within their bounds at once, gap and
    deviation lie within what these bounds allow.
    """
    size, reach, gap, deviation = np.abs(values), _reaches(errors, largest), None, None
    if reach is not None:
        low, high = np.maximum(size - reach, 0), size + reach
        gap = Interval(float(low.max()), float(high.max()))
        deviation = Interval(_over_groups(low, groups), _over_groups(high, groups))
    return (
        Estimate(float(size.max()), gap),
        Estimate(_over_groups(size, groups), deviation),
    )


def _over_groups(differences: np.ndarray, groups: int) -> float:
    """The standard deviation over groups, from the differences of all pairs."""
    return math.sqrt(np.sum(differences**2)) / groups


def _pairs(d: _Draws, labels: list, places: list[tuple[int, int]], ratios: bool) -> list[Pair]:
    differences, p, logarithm = [], [], _logarithm(d) if ratios else None
    ratio = [] if ratios else [UNKNOWN] * len(places)
    for i, j in places:
        s = _studentize(d, i, minus=j)
        differences.append(_estimate(s))
        p.append(_p_value(s))
        if ratios:
            exact = d.value[i] / d.value[j] if d.value[j] else math.nan
            ratio.append(_estimate(_studentize(logarithm, i, minus=j), exp_of=exact))
    names = [(labels[i], labels[j]) for i, j in places]
    return [Pair(*n, *rest) for n, *rest in zip(names, differences, ratio, p, holm(p))]


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
    """Word error rates by group and how far they are apart, every measure from the same draws.

    reference: pairs are all groups against this one, instead of each against each. A cluster may
    have several labels. Raises StatisticsError for unusable counts or labels.
    """
    counts = _count([errors], words, clusters, labels, keep)
    names, kept = counts.labels, counts.kept
    pairs = list(combinations(kept, 2))
    (d,) = _bootstrap(counts, counts.errors, draws, seed)
    log = _logarithm(d)
    *groups, overall = [_estimate(_studentize(log, i), exp_of=x) for i, x in enumerate(d.value)]
    macro = gap = deviation = UNKNOWN
    if kept:
        mean = _mean(d, kept)
        macro = _estimate(_studentize(_logarithm(mean), 0), exp_of=mean.value[0])
    if pairs:
        gap, deviation = _disparities(*_together(d, pairs), len(kept))
    if reference is not None:
        if reference not in [names[i] for i in kept]:
            raise StatisticsError(f"the reference {reference!r} is not among the groups compared")
        pairs = [(i, names.index(reference)) for i in kept if names[i] != reference]
    shown = _pairs(d, names, pairs, ratios=True)
    return Rates(overall, dict(zip(names, groups)), macro, gap, deviation, shown)


# ---- permutation ---------------------------------------------------------------------------------


def _dealt(
    rng: np.random.Generator, table: np.ndarray, sizes: np.ndarray, draws: int
) -> Iterator[np.ndarray]:
    """Sums (some draws, G, M) of the rows (n, M) dealt at random to groups of these sizes."""
    n = len(table)
    kinds, times = np.unique(table, axis=0, return_counts=True)
    if 20 * len(kinds) < n:  # as in _resample: how many of each kind a group gets
        for _ in range(draws):
            left, hands = times, []
            for size in sizes[:-1]:
                hands.append(rng.multivariate_hypergeometric(left, size))
                left = left - hands[-1]
            yield (np.array([*hands, left]) @ kinds)[None]
        return
    starts, columns = np.cumsum(sizes) - sizes, np.ascontiguousarray(table.T)
    step = max(1, BLOCK // n)
    for start in range(0, draws, step):
        rows = np.tile(np.arange(n), (min(step, draws - start), 1))
        order = rng.permuted(rows, axis=1)
        yield np.stack([np.add.reduceat(c[order], starts, axis=1) for c in columns], axis=2)


def _disparity(sums: np.ndarray, mean_square: float) -> np.ndarray:
    """Statistic, gap, standard deviation (3, draws) from the five sums (draws, G, 5) of groups."""
    e, n, ee, en, nn = np.moveaxis(sums, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(n > 0, e / n, np.nan)  # NaN: dealt no words
        # A residual of average size more keeps the variance above zero; as one residual is lost to
        # the estimated rate, it also corrects the bias.
        weight = n**2 / (np.maximum(ee - 2 * rate * en + rate**2 * nn, 0) + mean_square)
    weight, known = np.where(n > 0, weight, 0), np.where(n > 0, rate, 0)
    center = (weight * known).sum(axis=1) / weight.sum(axis=1)
    statistic = (weight * (known - center[:, None]) ** 2).sum(axis=1)
    return np.array([statistic, np.nanmax(rate, 1) - np.nanmin(rate, 1), np.nanstd(rate, 1)])


def permutation_test(
    errors: np.ndarray,
    words: np.ndarray,
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    keep: Collection[str] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> NoDifference | None:
    """What chance alone does: the labels are dealt anew to whole clusters, again and again.

    The statistic is sum_g (R_g - R)^2 / v_g: rates R_g, their cluster-robust variances v_g, and R
    the mean of the rates weighted by 1 / v_g. Where labels mean nothing at all, its p is exact
    whatever the sizes of clusters; where rates are equal but groups differ otherwise (in how much
    speakers vary), it still holds for many clusters, being studentized (Chung and Romano 2013,
    arXiv:1304.5939). That of the bare gap and deviation does not; they are there because both are
    above zero even if labels mean nothing, and `expected` says how far.

    None with fewer than two groups to compare. Raises StatisticsError where a cluster has several
    labels, as labels of whole clusters then do not exist.
    """
    counts = _count([errors], words, clusters, labels, keep)
    labelled = np.array([label is not None for label in counts.labels])[counts.group]
    several = np.flatnonzero(np.bincount(counts.cluster[labelled], minlength=1) > 1)
    if len(several):
        raise StatisticsError(
            f"no permutation test: the label varies within {len(several):,} clusters, "
            f"such as {counts.names[several[0]]!r}"
        )
    if len(counts.kept) < 2:
        return None
    if draws < 1:
        raise StatisticsError("at least one draw is needed")
    rows = np.flatnonzero(np.isin(counts.group, counts.kept))
    rows = rows[np.argsort(counts.group[rows], kind="stable")]
    sizes = np.bincount(counts.group[rows])[counts.kept]
    e, n = counts.errors[0][rows], counts.words[rows]
    table = np.stack([e, n, e * e, e * n, n * n], axis=1)
    # Of integers, so equal deals give equal sums; 1 if all clusters have the same rate.
    mean_square = float(np.mean((e * n.sum() - e.sum() * n) ** 2)) / n.sum() ** 2 or 1.0
    observed = np.add.reduceat(table, np.cumsum(sizes) - sizes, axis=0)[None]
    seen = _disparity(observed, mean_square)
    dealt = _dealt(np.random.default_rng(seed), table, sizes, draws)
    null = np.concatenate([_disparity(sums, mean_square) for sums in dealt], axis=1)
    # Sums over groups in another order differ in the last digit, which must not break a tie.
    p = (1 + np.sum(null >= seen * (1 - 1e-9), axis=1)) / (1 + draws)
    rows = zip(seen[:, 0].tolist(), null.mean(1).tolist(), np.quantile(null, 0.95, 1).tolist(), p)
    _, gap, deviation = (Null(*map(float, row)) for row in rows)
    return NoDifference(float(p[0]), gap, deviation)


# ---- two systems ---------------------------------------------------------------------------------


def _least_change(a: np.ndarray, b: np.ndarray, change: np.ndarray) -> float:
    """The least that gap(a) - gap(b) can be, from bounds (2, P) of a, b and a - b of all pairs.

    gap(b) is |b| of some pair whose |b| may be the largest. There gap(a) - |b| is at least the
    smallest gap(a) minus the largest |b|, and, as gap(a) >= |a|, at least a - b if b is positive
    and b - a if it is negative.
    """
    size = np.maximum(0, np.maximum(a[0], -a[1])).max()
    positive = np.where(b[1] >= 0, np.maximum(change[0], size - b[1]), np.inf)
    negative = np.where(b[0] <= 0, np.maximum(-change[1], size + b[0]), np.inf)
    possible = np.abs(b).max(axis=0) >= np.maximum(0, np.maximum(b[0], -b[1])).max()
    return float(np.minimum(positive, negative)[possible].min())


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
    """Does B make fewer errors than A on the same utterances, and did the disparity change?

    Rates of A - B are those of the differences in errors, so what is hard for both cancels. The
    change in the gap cannot be resampled (see _disparities: the better B, the worse), so it is
    bounded by the differences of A, those of B and their changes, all within their bounds at once.
    """
    counts = _count([errors_a, errors_b], words, clusters, labels, keep)
    a, b = counts.errors
    systems = _bootstrap(counts, [a, b, a - b], draws, seed)
    change = systems[2]
    *groups, overall = [_estimate(_studentize(change, i)) for i in range(len(change.value))]
    pairs = list(combinations(counts.kept, 2))
    gap_a = gap_b = gap_change = UNKNOWN
    if pairs:
        parts = [_together(d, pairs) for d in systems]
        gap_a, gap_b = (_disparities(*part, len(counts.kept))[0] for part in parts[:2])
        values, errors, largest = map(np.array, zip(*parts))
        reach, interval = _reaches(errors, largest.max(axis=0)), None
        if reach is not None:
            of_a, of_b, of_change = np.stack([values - reach, values + reach], axis=1)
            low = _least_change(of_a, of_b, of_change)
            interval = Interval(low, -_least_change(of_b, of_a, -of_change[::-1]))
        gap_change = Estimate(gap_a.value - gap_b.value, interval)
    shown = _pairs(change, counts.labels, pairs, ratios=False)
    groups = dict(zip(counts.labels, groups))
    return Comparison(overall, groups, gap_a, gap_b, gap_change, shown)


def mapsswe(errors_a: np.ndarray, errors_b: np.ndarray) -> Mapsswe:
    """Matched-pairs test of the errors of two systems (Gillick and Cox 1989, ICASSP).

    mean(z) / (sd(z) / sqrt(n)) against the normal distribution, z the difference in errors of each
    segment. Segments here are utterances (theirs lie between stretches that both systems got right)
    and are taken to be independent, which those of one speaker are not. For comparison with other
    work: `compare` is the test to trust. Raises StatisticsError unless both have one entry an
    utterance.
    """
    a, b = np.asarray(errors_a, dtype=np.float64), np.asarray(errors_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise StatisticsError("both systems need errors of the same utterances, at least one")
    z = a - b
    error = float(z.std(ddof=1)) / math.sqrt(len(z)) if len(z) > 1 else 0.0
    if error == 0:
        return Mapsswe(float(z.mean()), None, None)
    statistic = float(z.mean()) / error
    return Mapsswe(float(z.mean()), statistic, math.erfc(abs(statistic) / math.sqrt(2)))


# ---- other things held fixed ---------------------------------------------------------------------


def _known(value: float | str | None) -> bool:
    return isinstance(value, str) or value is not None and math.isfinite(value)


def adjust(
    errors: np.ndarray,
    words: np.ndarray,
    clusters: Sequence[Hashable],
    labels: Sequence[str | None],
    covariates: dict[str, Sequence[float | str | None]],
    keep: Collection[str] | None = None,
    reference: str | None = None,
) -> Adjusted:
    """Rate ratios between groups with covariates held fixed: Poisson regression on words.

    An utterance's errors have mean words * exp(b0 + b_group + x'b); the errors of the coefficients
    are robust to dependence within clusters, and so to more variation than Poisson's. This is the
    population average of the model of Liu, Veliche and Peng (2022, arXiv:2109.09061), who give each
    speaker a random effect instead. With fewer than some 40 clusters its intervals are too narrow.

    covariates: name -> one entry an utterance; numbers, or texts for categories. reference: the
    first label by default. Needs statsmodels: StatisticsError if it is missing, and if the model
    cannot be estimated.
    """
    try:
        from statsmodels.genmod.families import Poisson
        from statsmodels.genmod.generalized_linear_model import GLM
    except ImportError as error:
        raise StatisticsError("adjusting needs a package: pip install statsmodels") from error
    counts = _count([errors], words, clusters, labels, keep)
    compared = [counts.labels[i] for i in counts.kept]
    reference = reference if reference is not None or not compared else compared[0]
    if reference not in compared:
        raise StatisticsError(f"the reference {reference!r} is not among the groups compared")
    if any(len(values) != len(labels) for values in covariates.values()):
        raise StatisticsError("covariates need one entry an utterance")
    rows = zip(words, labels, *covariates.values())
    used = [
        i
        for i, (n, label, *values) in enumerate(rows)
        if n > 0 and label in compared and all(map(_known, values))
    ]
    errors, words = np.asarray(errors)[used], np.asarray(words)[used]
    names, cluster = _codes([clusters[i] for i in used])

    terms = {(None, None): np.ones(len(used))}  # (covariate or None, category or None)
    for name, values in {None: labels, **covariates}.items():
        values = [values[i] for i in used]
        if name and not any(isinstance(x, str) for x in values):
            terms[name, None] = np.array(values, dtype=float)
            continue
        categories = sorted(set(map(str, values)))
        first = categories[0] if name else reference
        for category in categories:
            which = np.array([str(x) == category for x in values])
            if not errors[which].any():
                raise StatisticsError(f"no errors in {category!r}: its ratio has no estimate")
            if category != first:
                terms[name, category] = which.astype(float)
    design = np.column_stack(list(terms.values()))
    norm = np.linalg.norm(design, axis=0)
    shown = ["=".join(filter(None, term)) for term in terms]
    if len(names) <= len(terms):
        raise StatisticsError(f"{len(names)} clusters are too few for {len(terms)} coefficients")
    if not norm.all() or np.linalg.matrix_rank(design / norm) < len(terms):
        raise StatisticsError(
            f"terms that never vary or repeat one another: {', '.join(shown[1:])}"
        )
    model = GLM(errors, design, family=Poisson(), exposure=words)
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": cluster}, use_t=True)
    with np.errstate(over="ignore"):
        bounds = np.exp(fit.conf_int(1 - LEVEL))
    if not (np.isfinite(bounds).all() and np.isfinite(fit.pvalues).all()):
        raise StatisticsError(
            f"no finite ratios for {', '.join(shown[1:])}: too little to go by, or a covariate on "
            "a scale so small that one unit more means nothing"
        )
    bounds = bounds.tolist()
    columns = zip(np.exp(fit.params).tolist(), (Interval(*b) for b in bounds), fit.pvalues.tolist())
    ratios = [(*term, RateRatio(*column)) for term, column in zip(zip(terms, shown), columns)][1:]
    groups = {category: ratio for (name, category), _, ratio in ratios if name is None}
    test = np.eye(len(terms))[1 : 1 + len(groups)]
    return Adjusted(
        reference=reference,
        groups=groups,
        covariates={name: ratio for (covariate, _), name, ratio in ratios if covariate},
        p=float(fit.wald_test(test, scalar=True).pvalue) if groups else None,
        utterances=len(used),
        left_out=len(labels) - len(used),
    )
