"""The course of a variable in a patient, in a few numbers: what a tree would be given of it.

Attention pools events softly; the least, the last or the number of values is hard to say that way, and easy to count.

Shape suffixes: S sets, E events, V (patient, variable) pairs that occur, F facts.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_FACTS = 11

RECENT_MINUTES = 12 * 60
"""In which the weight of a value in the mean of the recent ones falls to 1/e."""


def course_facts(
    value_E: Tensor, number_E: Tensor, set_E: Tensor, pair_E: Tensor, minute_S: Tensor, end_V: Tensor
) -> Tensor:
    """[V, F] float32: of the values mean, standard deviation, least, greatest, first and last (the mean of those of one
    set), mean of the recent ones and whether there are any; of the events their number, and the times since the first
    and since the last.

    Values go through asinh, counts and hours through log(1 + x), so that all are of like size.

    Args:
        value_E: z-scores.
        number_E: bool, whether the event has a number that counts.
        set_E: int64, the set of each event; sets of a patient stand in the order of time.
        pair_E: int64, the pair of each event; every pair has one.
        minute_S: of each set.
        end_V: minute of the last set of each pair's patient.
    """
    zero_V = torch.zeros_like(end_V)

    def total(amount_E: Tensor, pair: Tensor = pair_E) -> Tensor:
        return zero_V.index_add(0, pair, amount_E)

    def extreme(amount_E: Tensor, reduce: str, fill: float | int) -> Tensor:
        """Over the events of each pair; 0 where it has only such as hold ``fill``."""
        found = amount_E.new_full(zero_V.shape, fill).scatter_reduce(0, pair_E, amount_E, reduce)
        return found.masked_fill(found == fill, 0)

    weight_E = number_E.float()
    x_E = value_E.float().asinh() * weight_E
    count_V = total(weight_E)
    share_V = count_V.clamp_min(1)
    mean_V = total(x_E) / share_V
    std_V = (total((x_E - mean_V[pair_E]).square() * weight_E) / share_V).sqrt()
    infinite = x_E.new_tensor(torch.inf)
    facts = [mean_V, std_V]
    facts.append(extreme(torch.where(number_E, x_E, infinite), "amin", torch.inf))
    facts.append(extreme(torch.where(number_E, x_E, -infinite), "amax", -torch.inf))
    for reduce, nowhere in (("amin", len(minute_S)), ("amax", -1)):
        of_pair = extreme(torch.where(number_E, set_E, torch.full_like(set_E, nowhere)), reduce, nowhere)
        there_E = weight_E * (set_E == of_pair[pair_E])
        facts.append(total(x_E * there_E) / total(there_E).clamp_min(1))
    minute_E = minute_S[set_E]
    # By the time before the variable's own last value: before the patient's last set all weights could be nothing.
    newest_V = extreme(torch.where(number_E, minute_E, -infinite), "amax", -torch.inf)
    recent_E = ((minute_E - newest_V[pair_E]) / RECENT_MINUTES).clamp(max=0).exp() * weight_E
    facts.append(total(x_E * recent_E) / total(recent_E).clamp_min(1))  # the last value weighs 1
    facts += [(count_V > 0).float(), total(torch.ones_like(x_E)).log1p()]
    for reduce, fill in (("amin", torch.inf), ("amax", -torch.inf)):
        at_V = torch.full_like(end_V, fill).scatter_reduce(0, pair_E, minute_E, reduce)
        facts.append(((end_V - at_V) / 60).log1p())
    return torch.stack(facts, dim=1)
