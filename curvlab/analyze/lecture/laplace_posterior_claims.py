"""Claims about the sequential Laplace posterior, and the conditions under which they are judged."""

from collections.abc import Callable, Sequence

from curvlab.analyze.frame.analysis import Record
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.values import divide, number, where
from curvlab.analyze.lecture.laplace_posterior_options import LABELS, LaplacePosteriorConfig
from curvlab.results import Claim, require_direction

#: Split R-hat above which the chains do not agree (Gelman et al. 2013, section 11.4, ask for 1.1).
RHAT = 1.05
#: Effective draws for each chain below which the means are not known (Gelman et al. 2013, section 11.5).
EFFECTIVE = 10
_EXACT_ENOUGH = 0.1  # nats
_PREDICTIVE = 0.05  # of a probability


def claims(found: Sequence[Record], diagnostics: Sequence[Record], config: LaplacePosteriorConfig) -> list[Claim]:
    """Return the claims with their verdicts; a claim whose model was not run is not tested.

    Args:
        found: Records as ``table.json`` has them.
        diagnostics: Records as ``diagnostics.json`` has them.
        config: Configuration of the run.
    """
    slides = read_published("lecture")["laplace_posterior"]
    sampled = where(diagnostics, model="network")
    # A number that is missing, of chains that did not move, is not at most and not at least a bound.
    agree = all(number(row["rhat"]) <= RHAT for row in sampled)
    enough = all(number(row["ess"]) >= EFFECTIVE * config.chains for row in sampled)
    ours = {"chunks": config.chunks, "sampler": _describe_sampler(agree, enough)}
    gates = {
        model: require_direction(ours, slides["conditions"], slides["direction"][model])
        for model in slides["direction"]
    }

    def values(model: str, structure: str, key: str, chunk: int = config.chunks) -> list[float]:
        mine = where(found, model=model, structure=structure, chunk=chunk)
        return [number(row[key]) for seed in config.seeds for row in where(mine, seed=seed)]

    def judge(
        model: str,
        text: str,
        source: str,
        ours: Sequence[float],
        test: Callable[[float], bool],
        printed: str | None = None,
    ) -> Claim:
        return Claim.of(text, slides["sources"][source], ours, test, printed, gates[model])

    def ratios(model: str, key: str, one: str, other: str) -> list[float]:
        pairs = zip(values(model, one, key), values(model, other, key), strict=True)
        return [divide(a, b) for a, b in pairs]

    answers = []
    for structure in ("diag", "kfac", "full"):
        last, first = (values("logistic", structure, "kl", chunk) for chunk in (config.chunks, 1))
        answers.append(
            judge(
                "logistic",
                f"The approximation introduces errors over time, {LABELS[structure]} (divergence from the exact "
                "posterior after the last chunk over that after the first)",
                "sequential",
                [divide(a, b) for a, b in zip(last, first, strict=True)],
                lambda x: x > 1,
            )
        )
    answers += [
        judge(
            "logistic",
            f"The posterior is a Gaussian around the mode (full, divergence at most {_EXACT_ENOUGH:g} nats at the end)",
            "laplace",
            values("logistic", "full", "kl"),
            lambda x: x <= _EXACT_ENOUGH,
        ),
        judge(
            "logistic",
            "Its covariance is F (divergence with F over that with the inverse of F, full, at the end)",
            "laplace",
            [
                divide(a, b)
                for a, b in zip(
                    values("logistic", "full", "kl_as_printed"), values("logistic", "full", "kl"), strict=True
                )
            ],
            lambda x: x < 1,
            "covariance F",
        ),
        *(
            judge(
                "logistic",
                f"{LABELS[structure][0].upper()}{LABELS[structure][1:]} curvature is closer to the exact posterior "
                "than the diagonal (divergence over that of the diagonal, at the end)",
                "ours",
                ratios("logistic", "kl", structure, "diag"),
                lambda x: x < 1,
            )
            for structure in ("kfac", "full")
        ),
        judge(
            "network",
            f"A network's probabilities are those of the exact posterior (full, mean difference at most "
            f"{_PREDICTIVE:g})",
            "laplace",
            values("network", "full", "predictive_error"),
            lambda x: x <= _PREDICTIVE,
        ),
        judge(
            "network",
            "Full curvature gives a network's probabilities more exactly than the diagonal (difference over that of "
            "the diagonal, at the end)",
            "ours",
            ratios("network", "predictive_error", "full", "diag"),
            lambda x: x < 1,
        ),
    ]
    return answers


def _describe_sampler(agree: bool, enough: bool) -> str:
    if not agree:
        return f"R-hat above {RHAT:g} or undefined"
    bound = "at least" if enough else "below"
    return f"R-hat at most {RHAT:g} and effective sample size {bound} {EFFECTIVE} per chain"
