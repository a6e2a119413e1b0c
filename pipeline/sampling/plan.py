"""The plan of an epoch: which patients share a batch, and which rank takes them.

The plan is a pure function of (lengths, policy, seed, epoch), made for the whole job; the number of ranks decides only
how a batch is split, never what is in it.

Batches of similar lengths are made by *jittered sorting*: patients are sorted by length, each is moved by a random
distance of at most ``bucket_width`` batches, and the sequence is cut into batches.  How far a width reaches along the
sorted sequence is not constant.  With local gaps g between neighbours (events per position), m patients a batch and a
reach of w positions, padding grows as the sum of w·g and the chance that a pair meets again as the sum of m²/w; the
best trade-off is w proportional to m/√g.  So the jitter is uniform on a scale on which a patient is √g/m wide.
Measured on ICU stays, that saves a fifth of the padding of a constant reach at equal mixing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Floats, Ints, concatenate_ranges, offsets_from_sizes
from pipeline.sampling.apart import Limits, separate_copies
from pipeline.sampling.policy import Policy
from pipeline.schema import UserError

# Neighbours on each side over which gaps are averaged: enough to be smooth, few enough to follow the tails.
GAP_REACH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPlan:
    """The batches of one epoch, or one rank's part of each.

    Attributes:
        order: [P] int64, the patients (rows of the index) in the order in which they are used.
        batch_offsets: [N+1] int64, batch ``step`` is ``order[batch_offsets[step]:batch_offsets[step+1]]``.  Only a
            rank's part can be empty, if a batch has fewer patients than there are ranks.
    """

    order: Ints
    batch_offsets: Ints

    @property
    def num_batches(self) -> int:
        return len(self.batch_offsets) - 1

    @property
    def batch_sizes(self) -> Ints:
        """[N] int64, patients of each batch."""
        return np.diff(self.batch_offsets)

    def patients(self, step: int) -> Ints:
        return self.order[self.batch_offsets[step] : self.batch_offsets[step + 1]]

    def sum_per_batch(self, amount: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sums [N] over the patients of each batch of an ``amount`` [P] that every patient has."""
        return np.diff(np.concatenate([[0], np.cumsum(amount[self.order])])[self.batch_offsets])


class Purpose(IntEnum):
    """What random numbers are for: each purpose has a stream of its own."""

    PLAN = 0
    TRUNCATION = 1
    SHARD_ORDER = 2
    DRAWS = 3


def rng_for(purpose: Purpose, *, seed: int, epoch: int, group: int = 0) -> np.random.Generator:
    """Return the generator of one purpose in one group of an epoch; other streams do not depend on how it is used."""
    entropy = [seed, epoch] if purpose is Purpose.PLAN else [seed, epoch, int(purpose)]
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(group,) if group else ()))


def plan_epoch(
    num_events: Ints,
    num_sets: Ints,
    policy: Policy,
    *,
    seed: int,
    epoch: int,
    group: int = 0,
    sample: Ints | None = None,
) -> EpochPlan:
    """Return the global batches of an epoch, or of one group of it; every patient is in exactly one.

    Without ``max_events`` all batches but one have ``batch_size`` patients, so their number is the same every epoch.

    Args:
        num_events: [P] events of each patient, at least 1, after truncation.
        num_sets: [P] sets of each patient; only ``max_cost`` counts them.
        policy: how to group.
        seed: with ``epoch`` and ``group`` the only source of randomness.
        epoch: 0, 1, 2 …
        group: which of the epoch's groups the patients are; see ``pipeline.sampling.groups``.
        sample: [P] equal for patients that are copies of one sample, which are kept in different batches as far as that
            is possible; None = there are no copies.
    """
    for name, number in (("seed", seed), ("epoch", epoch)):
        if number < 0:
            raise UserError(f"--{name} {number}: must be 0 or more")
    if policy.max_events is not None and num_events.max(initial=0) > policy.max_events:
        too_long = f"--max_events {policy.max_events}: a patient has {num_events.max()} events"
        raise UserError(f"{too_long}; raise it, or cut patients with --max_sequence_length")
    rng = rng_for(Purpose.PLAN, seed=seed, epoch=epoch, group=group)
    order = _order_patients(num_events, num_sets, policy, rng)
    offsets = _cut_batches(num_events[order], num_sets[order], policy, rng)
    if sample is not None:
        order = separate_copies(order, offsets, sample, num_events, _limits(num_events, num_sets, policy))
    if policy.shuffle:
        sizes = np.diff(offsets)
        batches = rng.permutation(len(sizes))
        order = order[concatenate_ranges(offsets[batches], sizes[batches])]
        offsets = offsets_from_sizes(sizes[batches])
    return EpochPlan(order=order, batch_offsets=offsets)


def _order_patients(num_events: Ints, num_sets: Ints, policy: Policy, rng: np.random.Generator) -> Ints:
    """Return all patients [P], those that may share a batch near one another."""
    order = rng.permutation(len(num_events)) if policy.shuffle else np.arange(len(num_events))
    if not policy.bucketing:
        return order
    order = order[np.argsort(num_events[order], kind="stable")]  # equal lengths stay in random order
    if not policy.shuffle or not len(order):
        return order
    batch_size = np.full(len(order), policy.batch_size or len(order))
    if policy.max_events is not None:
        batch_size = np.minimum(batch_size, policy.max_events // num_events[order])
    if policy.max_cost is not None:
        cost = policy.cost_model.predict(num_events[order], num_sets[order])
        fitting = (policy.max_cost - policy.cost_model.batch) // cost
        batch_size = np.minimum(batch_size, np.maximum(fitting, 1).astype(np.int64))
    position = _jitter_widths(num_events[order], batch_size).cumsum()
    return order[np.argsort(position + policy.bucket_width * rng.random(len(order)))]


def _jitter_widths(sorted_lengths: Ints, batch_size: Ints) -> Floats:
    """Return the widths [P] of patients on the scale of the jitter, in batches: √gap ÷ patients a batch."""
    rank = np.arange(len(sorted_lengths))
    low = np.maximum(rank - GAP_REACH, 0)
    high = np.minimum(rank + GAP_REACH, len(rank) - 1)
    # One more above and below the line: equal lengths have a small gap, not none.
    gap = (sorted_lengths[high] - sorted_lengths[low] + 1) / (high - low + 1)
    width = np.sqrt(gap) / batch_size
    return width * (np.sum(1 / batch_size) / width.sum())


def _cut_batches(num_events: Ints, num_sets: Ints, policy: Policy, rng: np.random.Generator) -> Ints:
    """Return the offsets [N+1] int64 of batches in an ordered sequence of patients of these lengths [P]."""
    count = len(num_events)
    max_size = policy.batch_size or count
    if policy.fixed_size:
        full, rest = divmod(count, max_size)
        sizes = np.full(full, max_size)
        if rest:
            # A random position for the smaller batch, or it would always hold the longest patients.
            sizes = np.insert(sizes, rng.integers(full + 1) if policy.shuffle else full, rest)
        return offsets_from_sizes(sizes)

    limits = _limits(num_events, num_sets, policy)
    budgets = [(np.concatenate([[0], np.cumsum(amount)]), limit) for amount, limit in limits]  # used before each
    offsets = [0]
    while (start := offsets[-1]) < count:
        stop = min(start + max_size, count)
        for used, limit in budgets:
            stop = min(stop, int(np.searchsorted(used, used[start] + limit, side="right")) - 1)
        offsets.append(max(stop, start + 1))
    return np.array(offsets, dtype=np.int64)


def _limits(num_events: Ints, num_sets: Ints, policy: Policy) -> Limits:
    """Return what patients of these lengths [P] use of what a batch may hold at most."""
    limits: list[tuple[npt.NDArray[Any], float]] = []
    if policy.max_events is not None:
        limits.append((num_events, policy.max_events))
    if policy.max_cost is not None:
        cost = policy.cost_model.predict(num_events, num_sets)
        limits.append((cost, policy.max_cost - policy.cost_model.batch))
    return limits


def split_across_ranks(plan: EpochPlan, cost: Floats, *, rank: int, world_size: int, first_step: int = 0) -> EpochPlan:
    """Return one rank's part of every batch, so that the ranks' costs in a step match.

    Patients go, most expensive first, each to the rank with the lowest cost so far (Graham 1969, longest processing
    time first).  The rank that is served first rotates with the step, so that over an epoch no rank has the most
    patients or the most expensive ones.  ``first_step`` is the epoch's number of the plan's first batch, ``cost`` [P]
    is predicted.
    """
    if world_size == 1:
        return plan
    sizes = plan.batch_sizes
    step = np.repeat(np.arange(plan.num_batches), sizes)
    cost = cost[plan.order]
    most_expensive_first = np.lexsort((-cost, step))
    load = np.zeros((plan.num_batches, world_size))
    lane = np.empty(len(plan.order), dtype=np.int64)
    for turn in range(sizes.max(initial=0)):  # all batches at once, one patient of each
        batches = np.flatnonzero(sizes > turn)
        patients = most_expensive_first[plan.batch_offsets[batches] + turn]
        lightest = load[batches].argmin(axis=1)
        load[batches, lightest] += cost[patients]
        lane[patients] = lightest
    is_own = (lane + step + first_step) % world_size == rank
    own_sizes = np.bincount(step[is_own], minlength=plan.num_batches)
    return EpochPlan(order=plan.order[is_own], batch_offsets=offsets_from_sizes(own_sizes))
