"""The course of a variable in a patient, in a few numbers: what a tree would be given of it.

Attention pools events softly; the least, the last or the number of values is hard to say that way, and easy to count.

Shape suffixes: S sets, E events, V (patient, variable) pairs that occur, F facts.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_FACTS = 10


def course_facts(
    value_E: Tensor, number_E: Tensor, set_E: Tensor, pair_E: Tensor, minute_S: Tensor, end_V: Tensor
) -> Tensor:
    """[V, F] float32: of the values mean, standard deviation, least, greatest, first and last (the mean of those of one
    set) and whether there are any; of the events their number, and the times since the first and since the last.

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
    facts += [(count_V > 0).float(), total(torch.ones_like(x_E)).log1p()]
    minute_E = minute_S[set_E]
    for reduce, fill in (("amin", torch.inf), ("amax", -torch.inf)):
        at_V = torch.full_like(end_V, fill).scatter_reduce(0, pair_E, minute_E, reduce)
        facts.append(((end_V - at_V) / 60).log1p())
    return torch.stack(facts, dim=1)
