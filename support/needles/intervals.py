"""How sure is a mean? Intervals of shares, of means over whole texts, of paired differences."""

import math
import random
import statistics


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Unlike the textbook one it is right at 0 and 1 and for
    small n.

    >>> [round(x, 3) for x in wilson(10, 10)]
    [0.722, 1.0]
    """
    # [E20] (p + z2/2n +- z sqrt(p(1 - p)/n + z2/4n2)) / (1 + z2/n),   z2 = z * z, n2 = n * n
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of(*groups: list[list[float]]) -> float:
    """Mean over the groups (tasks) of the mean score of each; a group is a list of clusters."""
    # [E21] NIAH(M) = (mean of multikey + mean of multivalue + mean of multiquery) / 3
    means = [sum(map(sum, clusters)) / sum(map(len, clusters)) for clusters in groups]
    return sum(means) / len(means)


def resampled(*groups: list[list[float]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of mean_of(*groups) where the scores of a cluster (one text) depend on each
    other: whole clusters are drawn again, with replacement (percentile bootstrap).

    >>> resampled([[1, 1, 0, 1], [1, 1, 0, 1]])  # clusters that agree
    (0.75, 0.75)
    """
    # [E22] the means of `draws` sets of whole clusters, from their 2.5th to their 97.5th percentile
    rng = random.Random(0)
    means = sorted(mean_of(*(rng.choices(g, k=len(g)) for g in groups)) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def clustered(*groups: list[list[float]]) -> tuple[float, float]:
    """The wider at each end of `resampled` and Wilson's interval: clustering can only add doubt."""
    n = sum(len(cluster) for clusters in groups for cluster in clusters)
    low, high = wilson(mean_of(*groups) * n, n)
    if n == sum(map(len, groups)):  # one score per text: they are independent
        return low, high
    again = resampled(*groups)
    return min(low, again[0]), max(high, again[1])


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t: from tables, then by its expansion about the normal one
    (Abramowitz and Stegun 26.7.5), which is right to 0.1 % from 5 degrees of freedom on.

    >>> [round(student(n), 3) for n in (1, 7, 15, 23)]
    [12.706, 2.364, 2.131, 2.069]
    """
    if freedom < 5:
        return (12.706, 4.303, 3.182, 2.776)[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def paired(differences: list[float]) -> dict:
    """Mean of the differences between two models, one for each text that both were asked about,
    and its 95 % interval (Student's t); what that says ("above", "below" or "not told apart"), and
    how many texts would tell a difference of that size, in about one case of two (None: 10,000
    would not, or one text is too few to say).

    >>> paired([1.0, 2.0, 3.0, 2.0])["verdict"], paired([1.0, -2.0, 3.0, 2.0])["verdict"]
    ('above', 'not told apart')
    """
    mean, n = statistics.mean(differences), len(differences)
    found = {"mean": mean, "interval_95": None, "texts": n, "verdict": "not told apart"}
    if n == 1:
        return found | {"texts_needed": None}
    spread = statistics.stdev(differences)

    # [E30] mean +- t(n - 1) s / sqrt(n)   n texts, s the standard deviation of their differences,
    #       t(n - 1) the 97.5 % quantile of Student's t with n - 1 degrees of freedom
    def half(texts: int) -> float:  # of the interval
        return student(texts - 1) * spread / math.sqrt(texts)

    found["interval_95"] = [mean - half(n), mean + half(n)]
    if abs(mean) > half(n):
        found["verdict"] = "above" if mean > 0 else "below"
    enough = (texts for texts in range(2, 10_001) if abs(mean) > half(texts))
    return found | {"texts_needed": next(enough, None)}
