"""What a concept health report means: its warnings in plain words, and the thresholds behind them.

Thresholds are applied when a report is read, so that changing one needs no model. An effect size stands beside
every p-value: with enough examples every difference is significant. How they were chosen: docs/decisions/0023.
"""

from dataclasses import dataclass

from service.health_records import Agreement, Domain, Movement, Report

P = 0.05  # of movements
P_DOMAIN = 0.01  # whoever is warned for nothing stops reading
LEAST_EFFECT = 0.05  # of the spread of f_v over Q: a change below it is none
LEAST_BACK = 0.1  # the lesser of rise and way back over the greater: a turn below it is none
SEEN = 0.2  # of the spread: the change that Q should be able to show
POWER = 2.8  # standard errors of a change that is found four times in five
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
    """What speaks against trusting attributions to the concept; empty: nothing was found."""
    found: list[Doubt | None] = []
    if report.movement is not None:
        found += [_turn(report, report.movement), _change(report, report.movement)]
    if report.domain is not None:
        name = f"Query set {report.domain.name!r}"
        found += [
            _outside(report.domain, name, "query_set", "f_v on it"),
            _lengths(report.domain, name, "query_set"),
        ]
    if report.concept_domain is not None:
        name = f"What concept {report.concept!r} was fitted on ({report.concept_domain.name})"
        found += [_outside(report.concept_domain, name, "concept", "its direction")]
        found += [_lengths(report.concept_domain, name, "concept")]
    if report.agreement is not None:
        found.append(_families(report, report.agreement))
    return tuple(each for each in found if each is not None)


def without_doubts(*parts: object | None) -> str:
    """What is said where nothing was found. ``parts`` of a report: None where one could not be made, as silence
    about what nobody measured must not pass for health.
    """
    made = sum(each is not None for each in parts)
    if not made:
        return "nothing could be measured"
    only = "" if made == len(parts) else f" in what could be measured ({made} of {len(parts)} parts)"
    return f"nothing speaks against it{only}"


# --- f_v along the run ------------------------------------------------------------------------------------


def turned(movement: Movement) -> bool:
    """Whether f_v turned inside the run, by more than chance and more than a trifle."""
    turn = movement.turn
    if turn is None or turn.p_value > P:
        return False
    less, more = sorted((abs(turn.rise), abs(turn.back)))
    return less >= LEAST_BACK * more  # a trifle before a long way back is no turn either: the end tells the way


def moved(movement: Movement) -> bool | None:
    """Whether f_v changed from base to end; None: nothing to compare, or too few examples to say."""
    change = movement.change
    if change is None or change.mean.error is None:
        return None
    if change.p_value <= P:
        return change.effect is None or abs(change.effect) >= LEAST_EFFECT
    return False if POWER * change.mean.error <= SEEN * change.spread else None


def needed(movement: Movement) -> int:
    """Examples with which a change of ``SEEN`` of the spread is found four times in five."""
    change = movement.change
    if change is None or change.mean.error is None or not change.spread:
        return FEW
    deviation = change.mean.error * movement.examples**0.5
    return max(FEW, round((POWER * deviation / (SEEN * change.spread)) ** 2))


def _turn(report: Report, movement: Movement) -> Doubt | None:
    turn = movement.turn
    if turn is None or not turned(movement):
        return None
    way = "Build kind 'influence' over the checkpoints of the run."
    if report.points > 1:
        way = f"concept_influence here adds up {report.points} points of the run, which is what this calls for."
    return Doubt(
        "f_v_turned",
        f"f_v of {report.concept!r} on {report.query_set!r} turned during training: {turn.rise:+.3g} from "
        f"{movement.points[0].name!r} to {movement.points[turn.point].name!r}, then "
        f"{turn.back:+.3g} to the end (p {turn.p_value:.2g}). An "
        f"attribution at the end point alone then points the wrong way. {way}",
    )


def _change(report: Report, movement: Movement) -> Doubt | None:
    change, n = movement.change, movement.examples
    if change is not None and change.mean.error is not None and not turned(movement):
        value, error = change.mean.value, change.mean.error
        said = f"{value:+.3g} ± {error:.2g} from {movement.points[0].name!r} to the end (p {change.p_value:.2g})"
        if moved(movement) is False:
            return Doubt(
                "f_v_did_not_move",
                f"f_v of {report.concept!r} on {report.query_set!r} did not move: {said}, where examples spread by "
                f"{change.spread:.3g}. Training did little to this concept here, and rankings of what did it are "
                "mostly noise: ask at another layer or pooling, or on queries that show the behaviour.",
            )
        if moved(movement) is None:
            return Doubt(
                "query_set_too_small",
                f"Query set {report.query_set!r} is too small to say whether f_v moved: {said} over {n} examples. "
                f"About {needed(movement):,} would show a change of {SEEN:g} of their spread.",
            )
        if error > ROUGH * abs(value):
            return Doubt(
                "query_set_too_small",
                f"The change of f_v on {report.query_set!r} is uncertain by half and more: {said} over {n} "
                "examples. More of them make rankings steadier.",
            )
    if n < FEW:
        return Doubt(
            "query_set_too_small",
            f"Query set {report.query_set!r} has {n} usable examples: with fewer than {FEW}, f_v and every ranking "
            "by it depend on which ones they are. A hundred are good.",
        )
    return None


# --- domains ----------------------------------------------------------------------------------------------


def out_of_domain(domain: Domain) -> bool:
    """Whether the activations lie elsewhere than the index's, whatever the lengths."""
    return domain.auroc >= OUT_OF_DOMAIN and domain.p_value <= P_DOMAIN


def lengths_differ(domain: Domain) -> bool:
    """Whether most texts have no like in length in the index."""
    return domain.alike < ALIKE


def _outside(domain: Domain, name: str, code: str, what: str) -> Doubt | None:
    if not out_of_domain(domain):
        return None
    how = (
        "at like lengths and with the concept removed" if not lengths_differ(domain) else "with the concept removed"
    )
    return Doubt(
        f"{code}_out_of_domain",
        f"{name} lies outside the domain of the index, or covers a narrow part of it: a linear classifier tells "
        f"its activations from those of the index's examples with AUROC {domain.auroc:.2f} (.5 is chance; p "
        f"{domain.p_value:.2g}), {how}. There {what} may mean something else than in the training data, and "
        "activations say little about influence: use texts like those that were trained on.",
    )


def _lengths(domain: Domain, name: str, code: str) -> Doubt | None:
    if not lengths_differ(domain):
        return None
    return Doubt(
        f"{code}_of_other_length",
        f"{name} has texts of other lengths than the index: {domain.length:,.0f} characters against "
        f"{domain.length_index:,.0f} (medians), and {domain.alike:.0%} of them have a like. Means over so "
        "different lengths are hard to compare.",
    )


# --- two families -----------------------------------------------------------------------------------------


def diverges(agreement: Agreement) -> bool:
    """Whether gradients and activations rank hardly more alike than chance would."""
    rho = agreement.spearman
    if rho is None:
        return False
    chance = OVER_CHANCE * agreement.by_chance
    return rho < LOW_SPEARMAN or (chance < 1 and agreement.overlap < chance)


def _families(report: Report, agreement: Agreement) -> Doubt | None:
    if not diverges(agreement):
        return None
    return Doubt(
        "families_diverge",
        f"Gradients and activations rank {report.index} differently for {report.concept!r}: Spearman "
        f"{agreement.spearman:.2f} over {agreement.examples:,} examples, and {agreement.overlap:.0%} of the first "
        f"{agreement.k} in common ({agreement.by_chance:.0%} by chance). What looks like the concept is not what "
        "moved the model toward it: read vector_filter as a search for such texts and concept_influence as an "
        "estimate of causes, and validate by retraining before you remove data.",
    )
