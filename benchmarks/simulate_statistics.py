"""Do the intervals and p-values of fairasr_min/stats.py hold what they promise?

    python benchmarks/simulate_statistics.py --simulations 1000
    python benchmarks/simulate_statistics.py --scale

All data is SIMULATED. Speaker s of group g says N_s words, log-normal about 150, and makes Poisson
errors at the rate r_g x_s, where x_s is the speaker's own factor: log-normal or gamma, mean 1,
standard deviation as each design says. So errors cluster in speakers, speakers are skewed, and some
talk much more than others. The truth is r_g. Prints Markdown tables. --scale times one million
utterances instead.
"""

import argparse
import math
import resource
import sys
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fairasr_min import stats  # noqa: E402

LOWEST, HIGHEST = 93, 97  # per cent: where coverage should be


def factors(rng, n, sd, shape="log-normal"):
    """(n,) of mean 1 and standard deviation sd."""
    if shape == "gamma":
        return rng.gamma(1 / sd**2, sd**2, n)
    sigma = math.sqrt(math.log1p(sd**2))
    return np.exp(rng.normal(-(sigma**2) / 2, sigma, n))


def speakers(rng, sizes, rates, sd=0.53, talk=0.53, shape="log-normal", shared=False):
    """errors, words, clusters, labels; one row a speaker, or a speaker and label if shared.

    sd and talk: of a speaker's factor and of the words, relative to the mean; 0.53 is a standard
    deviation of 0.5 of the logarithm.
    """
    group = np.repeat(np.arange(len(sizes)), sizes)
    speaker = np.arange(len(group))
    if shared:  # every speaker has every label, as with emotions
        speaker = np.concatenate([np.arange(n) for n in sizes])
    x = factors(rng, speaker.max() + 1, sd, shape)[speaker]
    words = np.maximum(1, np.round(150 * factors(rng, len(group), talk))).astype(int)
    if shared:
        x = x * factors(rng, len(group), 0.3)
    errors = rng.poisson(np.array(rates)[group] * x * words)
    return errors, words, speaker.tolist(), [f"g{g}" for g in group]


class Coverage:
    """How often intervals miss the truth on either side, and how wide they are."""

    def __init__(self):
        self.below, self.above, self.none, self.widths = 0, 0, 0, []

    def add(self, interval, truth):
        if interval is None:
            self.none += 1
            return
        self.below += interval[1] < truth
        self.above += interval[0] > truth
        self.widths.append(interval[1] - interval[0])

    def cells(self, unit=100):
        n = len(self.widths) + self.none
        covered = 100 * (1 - (self.below + self.above) / n)
        half = 196 * math.sqrt(max(covered, 1) / 100 * (1 - min(covered, 99) / 100) / n)
        missed = f"{100 * self.below / n:.1f} / {100 * self.above / n:.1f}"
        return f"{covered:.1f} ± {half:.1f} | {missed} | {unit * np.median(self.widths):.2f}"


def percentile(values):
    return np.nanquantile(values, [0.025, 0.975])


COVERAGE = {
    "50 speakers a group": dict(sizes=(50, 50, 50), rates=(0.1, 0.1, 0.1)),
    "50, other rates": dict(sizes=(50, 50, 50), rates=(0.08, 0.1, 0.2)),
    "50, gamma 0.7, words 0.7": dict(
        sizes=(50, 50, 50), rates=(0.1, 0.1, 0.2), sd=0.7, talk=0.7, shape="gamma"
    ),
    "50, very skewed: 0.9, words 0.9": dict(
        sizes=(50, 50, 50), rates=(0.1, 0.1, 0.2), sd=0.9, talk=0.9
    ),
    "50, few errors": dict(sizes=(50, 50, 50), rates=(0.01, 0.01, 0.02)),
    "200, 50 and 20 speakers": dict(sizes=(200, 50, 20), rates=(0.1, 0.1, 0.2)),
    "50 who are in all groups": dict(sizes=(50, 50, 50), rates=(0.1, 0.1, 0.2), shared=True),
    "15 who are in all groups": dict(sizes=(15, 15, 15), rates=(0.1, 0.1, 0.2), shared=True),
    "10 speakers a group": dict(sizes=(10, 10, 10), rates=(0.1, 0.1, 0.2)),
    "5 speakers a group": dict(sizes=(5, 5, 5), rates=(0.1, 0.1, 0.2)),
}


def coverage(simulations, draws, seed):
    print("\n| design | of | 95 % interval covers % | too low / too high % | median width |")
    print("|---|---|---:|---:|---:|")
    for name, design in COVERAGE.items():
        rng = np.random.default_rng(seed)
        names = ["group WER", "group WER, percentile", "difference", "difference, percentile"]
        names += ["ratio", "overall", "macro", "gap", "gap, percentile", "deviation"]
        found = {of: Coverage() for of in names}
        truth = dict(zip(["g0", "g1", "g2"], design["rates"]))
        true_rates = np.array(design["rates"])
        for i in range(simulations):
            data = speakers(rng, **design)
            r = stats.rates_by_group(*data, draws=draws, seed=i)
            for g, estimate in r.groups.items():
                found["group WER"].add(estimate.interval, truth[g])
            for pair in r.pairs:
                a, b = truth[pair.group], truth[pair.other]
                found["difference"].add(pair.difference.interval, a - b)
                found["ratio"].add(pair.ratio.interval, a / b)
            overall = true_rates @ design["sizes"] / sum(design["sizes"])
            found["overall"].add(r.overall.interval, overall)
            found["macro"].add(r.macro.interval, true_rates.mean())
            found["gap"].add(r.gap.interval, np.ptp(true_rates))
            found["deviation"].add(r.deviation.interval, true_rates.std())
            counts = stats._count(data[:1], *data[1:], None)
            (d,) = stats._bootstrap(counts, counts.errors, draws, i)  # the same draws
            drawn = d.value + d.deviation
            for k, g in enumerate(truth):
                found["group WER, percentile"].add(percentile(drawn[:, k]), truth[g])
            for pair in ((0, 1), (0, 2), (1, 2)):
                difference = drawn[:, pair[0]] - drawn[:, pair[1]]
                exact = true_rates[pair[0]] - true_rates[pair[1]]
                found["difference, percentile"].add(percentile(difference), exact)
            found["gap, percentile"].add(
                percentile(np.ptp(drawn[:, :3], axis=1)), np.ptp(true_rates)
            )
        for of, c in found.items():
            print(f"| {name} | {of} | {c.cells(1 if of == 'ratio' else 100)} |", flush=True)


CHANGES = {
    "no gap before or after": ((0.1, 0.1, 0.1), (0.1, 0.1, 0.1)),
    "gap kept": ((0.1, 0.12, 0.2), (0.1, 0.12, 0.2)),
    "gap halved": ((0.1, 0.12, 0.2), (0.1, 0.11, 0.15)),
    "gap removed": ((0.1, 0.12, 0.2), (0.1, 0.1, 0.1)),
    "other groups worst": ((0.1, 0.12, 0.2), (0.18, 0.12, 0.1)),
}


def change_in_gap(simulations, draws, seed):
    print("\n| change | of | 95 % interval covers % | too low / too high % | median width |")
    print("|---|---|---:|---:|---:|")
    sizes = (50, 50, 50)
    for name, (rates_a, rates_b) in CHANGES.items():
        rng = np.random.default_rng(seed)
        names = ["WER of a group, A - B", "gap A - gap B", "gap A - gap B, percentile"]
        found = {of: Coverage() for of in names}
        group = np.repeat(np.arange(3), sizes)
        labels, speaker = [f"g{g}" for g in group], list(range(len(group)))
        rates_a, rates_b = np.array(rates_a), np.array(rates_b)
        truth = np.ptp(rates_a) - np.ptp(rates_b)
        for i in range(simulations):
            x = factors(rng, len(group), 0.53)
            words = np.maximum(1, np.round(150 * factors(rng, len(group), 0.53))).astype(int)
            # Who is hard for A is hard for B, but not quite as much.
            a = rng.poisson(rates_a[group] * x * words)
            b = rng.poisson(rates_b[group] * x * factors(rng, len(group), 0.2) * words)
            c = stats.compare(a, b, words, speaker, labels, draws=draws, seed=i)
            for g, exact in zip(("g0", "g1", "g2"), rates_a - rates_b):
                found[names[0]].add(c.groups[g].interval, exact)
            found[names[1]].add(c.gap_change.interval, truth)
            counts = stats._count([a, b], words, speaker, labels, None)
            both = stats._bootstrap(counts, counts.errors, draws, i)
            gap_a, gap_b = (np.ptp((d.value + d.deviation)[:, :3], axis=1) for d in both)
            found[names[2]].add(percentile(gap_a - gap_b), truth)
        for of, c in found.items():
            print(f"| {name} | {of} | {c.cells()} |", flush=True)


def uniform_p(p):
    """p of the Kolmogorov-Smirnov test of uniformity, by Kolmogorov's series."""
    p = np.sort(p)
    n = len(p)
    d = max(np.max(np.arange(1, n + 1) / n - p), np.max(p - np.arange(n) / n))
    k = np.arange(1, 101)
    return float(np.clip(2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * k**2 * n * d**2)), 0, 1))


NULLS = {
    "groups alike, 140, 50 and 10 speakers": [dict(n=140), dict(n=50), dict(n=10)],
    "20 groups alike, 10 to 29 speakers": [dict(n=10 + g) for g in range(20)],
    "equal rates; 50 vary more, 100 less": [dict(n=50, sd=0.8), dict(n=100, sd=0.3)],
    "equal rates; 50 talk 3 times as much": [dict(n=50, words=450), dict(n=100)],
    "equal rates; 50 talk more and vary more": [dict(n=50, sd=0.8, words=450), dict(n=100, sd=0.3)],
}


def null_p_values(simulations, draws, seed):
    print("\n| no difference in rate | p of | p <= 1 % | p <= 5 % | p <= 10 % | uniform: KS p |")
    print("|---|---|---:|---:|---:|---:|")
    for name, groups in NULLS.items():
        rng = np.random.default_rng(seed)
        found = {"permutation, studentized": [], "permutation, gap": [], "pair (bootstrap)": []}
        for i in range(simulations):
            words, errors, labels = [], [], []
            for g, design in enumerate(groups):
                n = design["n"]
                w = np.maximum(1, design.get("words", 150) * factors(rng, n, 0.8)).astype(int)
                words.append(w)
                errors.append(rng.poisson(0.1 * factors(rng, n, design.get("sd", 0.53)) * w))
                labels += [f"g{g:02}"] * n
            words, errors = np.concatenate(words), np.concatenate(errors)
            data = errors, words, list(range(len(words))), labels
            test = stats.permutation_test(*data, draws=draws, seed=i)
            found["permutation, studentized"].append(test.p)
            found["permutation, gap"].append(test.gap.p)
            pairs = stats.rates_by_group(*data, draws=draws, seed=i, keep={"g00", "g01"}).pairs
            found["pair (bootstrap)"].append(pairs[0].p)
        for of, p in found.items():
            p = np.array(p)
            shares = " | ".join(f"{100 * np.mean(p <= level):.1f}" for level in (0.01, 0.05, 0.1))
            print(f"| {name} | {of} | {shares} | {uniform_p(p):.3f} |", flush=True)


def power(simulations, draws, seed):
    """Theory: the difference is normal about d with the variance of two ratios of sums,
    v = sum over groups of (r^2 var(x) E[N^2] + r E[N]) / (n E[N]^2), and the test rejects at 5 %
    where |difference| > 1.96 sqrt(v): power = F(d / sqrt(v) - 1.96) + F(-d / sqrt(v) - 1.96).
    """
    print(
        "\n| rates % (50 speakers each) | power by theory % | permutation % | pair (bootstrap) % |"
    )
    print("|---|---:|---:|---:|")
    sd, talk, n, mean = 0.53, 0.53, 50, 150
    for other in (0.1, 0.115, 0.125, 0.135, 0.15):
        rates = np.array([0.1, other])
        v = rates**2 * sd**2 * mean**2 * (1 + talk**2) + rates * mean
        z = (other - 0.1) / math.sqrt((v / (n * mean**2)).sum())
        normal = NormalDist()
        theory = normal.cdf(z - 1.96) + normal.cdf(-z - 1.96)
        rng, found = np.random.default_rng(seed), np.zeros(2)
        for i in range(simulations):
            data = speakers(rng, (n, n), rates, sd, talk)
            found[0] += stats.permutation_test(*data, draws=draws, seed=i).p <= 0.05
            found[1] += stats.rates_by_group(*data, draws=draws, seed=i).pairs[0].p <= 0.05
        shares = " | ".join(f"{100 * share:.1f}" for share in found / simulations)
        print(f"| 10 and {100 * other:.1f} | {100 * theory:.1f} | {shares} |", flush=True)


def scale(seed):
    print("\n| one million utterances | clusters | what | seconds | peak memory so far GB |")
    print("|---|---|---|---:|---:|")
    n, n_speakers, n_groups = 1_000_000, 50_000, 20
    rng = np.random.default_rng(seed)
    speaker = rng.integers(n_speakers, size=n)
    words = 1 + rng.poisson(9, n)
    errors = rng.poisson(0.1 * factors(rng, n_speakers, 0.53)[speaker] * words)
    better = rng.binomial(errors, 0.8)
    of_speaker = rng.integers(n_groups, size=n_speakers)[speaker]
    own = [f"g{g}" for g in of_speaker]
    mixed = [f"g{g}" for g in rng.integers(n_groups, size=n)]
    cases = {
        "a speaker has one of 20 labels": ("50,000 speakers", speaker.tolist(), own),
        "a speaker has several of 20 labels": ("50,000 speakers", speaker.tolist(), mixed),
        "no speakers known": ("1,000,000 utterances", list(range(n)), own),
    }
    for case, (what, clusters, labels) in cases.items():
        calls = {
            "rates_by_group": lambda: stats.rates_by_group(errors, words, clusters, labels),  # noqa: B023
            "permutation_test": lambda: stats.permutation_test(errors, words, clusters, labels),  # noqa: B023
            "compare": lambda: stats.compare(errors, better, words, clusters, labels),  # noqa: B023
        }
        if labels is mixed:
            del calls["permutation_test"]  # refused
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"| {case} | {what} | {name} | {seconds:.1f} | {peak:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000, help="data sets a design")
    parser.add_argument("--draws", type=int, default=999, help="resamples of each data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", action="store_true", help="time one million utterances instead")
    args = parser.parse_args()
    if args.scale:
        print(f"SIMULATED data; seed {args.seed}, 10,000 draws")
        return scale(args.seed)
    print(f"SIMULATED data; seed {args.seed}, {args.simulations} simulations, {args.draws} draws")
    for study in (coverage, change_in_gap, null_p_values, power):
        start = time.perf_counter()
        study(args.simulations, args.draws, args.seed)
        print(f"\n{study.__name__}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
