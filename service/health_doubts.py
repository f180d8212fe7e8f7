"""What a concept health report means: its warnings in plain words, and the thresholds behind them.

Thresholds are applied when a report is read, so that changing one needs no model. Every one of them is an effect size
beside a p-value: with enough examples every difference is significant. Measured in docs/decisions/0021.
"""

from dataclasses import dataclass

from service.health_records import Agreement, Domain, Movement, Report

P = 0.05  # of movements
P_DOMAIN = 0.01  # reports are read often, and false alarms make people stop reading
LEAST_EFFECT = 0.05  # of the spread of f_v over Q: a change below it is none
LEAST_BACK = 0.1  # of the rise: a turn below it is none
SEEN = 0.2  # of the spread: a change that Q should be able to show
FEW = 20  # examples of Q
ROUGH = 0.5  # standard error of the change over the change
OUT_OF_DOMAIN = 0.7  # AUROC of the two-sample test
ALIKE = 0.5  # share of texts with a like in length
LOW_SPEARMAN = 0.2
OVER_CHANCE = 1.5  # overlap of the first hundred over what chance gives


@dataclass(frozen=True)
class Doubt:
    """``code`` for programs, ``said`` for people."""

    code: str
    said: str


def doubts(report: Report) -> tuple[Doubt, ...]:
    """Everything that speaks against trusting an attribution, most serious first; empty: nothing was found."""
    found: list[Doubt] = []
    if report.movement is not None:
        found += _movement(report, report.movement)
    if report.domain is not None:
        found += _domain(report.domain, f"Query set {report.domain.name!r}", "query_set", "It")
    if report.concept_domain is not None:
        named = f"What concept {report.concept!r} was fitted on ({report.concept_domain.name})"
        found += _domain(report.concept_domain, named, "concept", "The direction")
    if report.agreement is not None:
        found += _agreement(report, report.agreement)
    return tuple(found)


def turned(movement: Movement) -> bool:
    """Whether f_v turned inside the run, by more than chance and more than a trifle."""
    turn = movement.turn
    return turn is not None and turn.p_value <= P and abs(turn.back) >= LEAST_BACK * abs(turn.rise)


def moved(movement: Movement) -> bool | None:
    """Whether f_v changed from base to end; None: nothing to compare, or too few examples to say."""
    change = movement.change
    if change is None or change.mean.error is None:
        return None
    if change.p_value <= P:
        return change.effect is None or abs(change.effect) >= LEAST_EFFECT
    return False if 2.8 * change.mean.error <= SEEN * change.spread else None


def _movement(report: Report, movement: Movement) -> list[Doubt]:
    found = []
    change, name = movement.change, f"f_v of {report.concept!r} on {report.query_set!r}"
    if turned(movement):
        assert movement.turn is not None  # noqa: S101
        turn, at = movement.turn, movement.points[movement.turn.point].name
        way = (
            f"The index adds up {report.points} points of the run, which is what this calls for."
            if report.points > 1
            else "Build kind 'influence' over the checkpoints of the run."
        )
        found.append(
            Doubt(
                "f_v_turned",
                f"{name} turned during training: {turn.rise:+.3g} from base to {at!r}, then {turn.back:+.3g} to the "
                f"end (p {turn.p_value:.2g}). What is evaluated at the end point alone then points the wrong way. "
                f"{way}",
            )
        )
    if change is not None and change.mean.error is not None:
        value, error, spread = change.mean.value, change.mean.error, change.spread
        if moved(movement) is False:
            small = f"; its spread over the examples is {spread:.3g}" if change.p_value <= P else ""
            found.append(
                Doubt(
                    "f_v_did_not_move",
                    f"{name} did not move: {value:+.3g} ± {error:.2g} from base to end (p {change.p_value:.2g}"
                    f"{small}). Training did little to this concept here, so that rankings of what did it are mostly "
                    "noise: ask at another layer or pooling, or on queries that show the behaviour.",
                )
            )
        elif moved(movement) is None and not turned(movement):
            found.append(
                Doubt(
                    "query_set_too_small",
                    f"Query set {report.query_set!r} is too small to say whether f_v moved: {value:+.3g} ± "
                    f"{error:.2g} from base to end over {movement.examples} examples. About "
                    f"{needed(movement):,} would show a change of {SEEN:g} of the spread.",
                )
            )
        elif movement.examples >= FEW and error > ROUGH * abs(value) and not turned(movement):
            found.append(Doubt("query_set_too_small", _rough(report, value, error)))
    if movement.examples < FEW and not any(each.code == "query_set_too_small" for each in found):
        found.append(
            Doubt(
                "query_set_too_small",
                f"Query set {report.query_set!r} has {movement.examples} usable examples: below {FEW} its f_v, and "
                "every ranking by it, depends on which ones they are. A hundred are good.",
            )
        )
    return found


def _rough(report: Report, value: float, error: float) -> str:
    return (
        f"The change of f_v on {report.query_set!r}, {value:+.3g}, has a standard error of {error:.2g}: more examples "
        "make the ranking steadier."
    )


def needed(movement: Movement) -> int:
    """Examples with which a change of ``SEEN`` of the spread is found four times in five."""
    change = movement.change
    if change is None or change.mean.error is None or not change.spread:
        return FEW
    deviation = change.mean.error * movement.examples**0.5
    return max(FEW, round((2.8 * deviation / (SEEN * change.spread)) ** 2))


def out_of_domain(domain: Domain) -> bool:
    """Whether its activations lie elsewhere than the index's, whatever the lengths."""
    return domain.auroc >= OUT_OF_DOMAIN and domain.p_value <= P_DOMAIN


def _domain(domain: Domain, name: str, code: str, what: str) -> list[Doubt]:
    found = []
    if out_of_domain(domain):
        found.append(
            Doubt(
                f"{code}_out_of_domain",
                f"{name} lies outside the domain of the index: beside the concept itself and at equal lengths, a "
                f"linear classifier tells its activations from the index's with AUROC {domain.auroc:.2f} (.5 is "
                f"chance; p {domain.p_value:.2g}). {what} may measure something else than what training on these "
                "examples moves, and activations are no guide to influence there: use texts like the training data.",
            )
        )
    if domain.alike < ALIKE:
        found.append(
            Doubt(
                f"{code}_of_other_length",
                f"{name} has texts of other lengths than the index: {domain.length:,.0f} characters against "
                f"{domain.length_index:,.0f} (medians), and only {domain.alike:.0%} have a like. Means over so "
                "different lengths are hard to compare.",
            )
        )
    return found


def diverges(agreement: Agreement) -> bool:
    """Whether the two families rank no more alike than chance would, or hardly."""
    overlap = agreement.overlap
    far = overlap.by_chance * OVER_CHANCE < 1 and overlap.share < OVER_CHANCE * overlap.by_chance
    return agreement.spearman is not None and (agreement.spearman < LOW_SPEARMAN or far)


def _agreement(report: Report, agreement: Agreement) -> list[Doubt]:
    if not diverges(agreement):
        return []
    overlap = agreement.overlap
    return [
        Doubt(
            "families_diverge",
            f"Gradients and activations rank {report.index} differently for {report.concept!r}: Spearman "
            f"{agreement.spearman:.2f} over {agreement.examples:,} examples, and {overlap.share:.0%} of the first "
            f"{overlap.k} in common ({overlap.by_chance:.0%} by chance). What looks like the concept is not what moved "
            "the model toward it: read vector_filter as a search for such texts, concept_influence as the cause, and "
            "validate by retraining before removing data.",
        )
    ]
