"""Do the intervals of the leakage probe hold what they promise?

    python benchmarks/simulate_leakage.py

Simulated speakers, whose embeddings differ by a group in one of eight dimensions (by nothing, by
1.5, by 3 standard deviations of an utterance) and by themselves in all. Prints how often the 95 %
interval holds the mean of the balanced accuracy over all simulations.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairasr_min import embed  # noqa: E402

SIMULATIONS = 200


def simulate(seed: int, speakers: int, shift: float) -> dict:
    random = np.random.default_rng(seed)
    group = np.arange(speakers) % 2
    who = np.repeat(np.arange(speakers), random.integers(3, 18, size=speakers))
    x = random.normal(size=(len(who), 8)) + random.normal(size=(speakers, 8))[who]
    x[:, 0] += shift * group[who]
    predicted = embed.held_out(embed.probes(0)["linear"], x, group[who], who, 0)
    return embed.score(group[who], predicted, who, 0)


argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
).parse_args()
with threadpool_limits(1):
    print("| speakers | group differs by | balanced accuracy | covered | median width |")
    print("|---:|---:|---:|---:|---:|")
    for speakers in (20, 40, 100):
        for shift in (0, 1.5, 3):
            scores = [simulate(seed, speakers, shift) for seed in range(SIMULATIONS)]
            mean = np.mean([s["value"] for s in scores])
            low, high = np.array([s["interval"] for s in scores if s["interval"]]).T
            covered = ((low <= mean) & (mean <= high)).sum() / SIMULATIONS
            width = np.median(high - low)
            print(f"| {speakers} | {shift} | {mean:.3f} | {100 * covered:.1f} % | {width:.3f} |")
