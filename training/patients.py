"""Pages of single patients: what happened, what the model answered over time, and which variables moved it.

Answers over time are those for the patient's events up to and with each set.  The effect of a variable is what leaving
all of its events out changes in the last answer: with many variables it shows what the model leans on, not a cause.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from model.average import TrainedModel
from model.config import Outcome
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from pipeline.arrays import choose_evenly
from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.batch import PatientBatch
from pipeline.reports.page import draw_figure, figure_label, write_page
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically
from training.data import DataSet
from training.parallel import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ANSWERS = 96
"""Maximum number of sets after which an answer is computed; of more, evenly chosen ones, the last included."""

MAX_EFFECTS = 15
"""Variables whose effect is drawn; ``patients_<split>.json`` has all."""

Floats = npt.NDArray[np.float64]


def write_patient_pages(model: TrainedModel, data: DataSet, ids: Sequence[str], split: str, directory: Path) -> Path:
    """Write ``patients_<split>.html`` and ``.json`` about the patients with these ids; return the page.

    Of a patient with several prediction times the sample with the most events is shown.

    Raises:
        UserError: the split has no such patient with events.
    """
    world = World(0, 1, next(model.parameters()).device)
    variables = read_vocabulary(data.folder, data.manifest)["variable"].to_pylist()
    wanted: dict[str, PatientBatch] = {}
    for batch in data.open_loader(split, world=world, seed=0, shuffle=False, batch_size=1):
        who = batch.patient_id[0]
        if who in ids and (who not in wanted or batch.num_events > wanted[who].num_events):
            wanted[who] = batch
    if missing := [who for who in ids if who not in wanted]:
        raise UserError(f"--patients: {len(missing)} of {len(ids)} ids are of nobody in split {split}; look there")
    found = {who: describe_patient(model.eval(), wanted[who], variables) for who in ids}
    stem = directory / f"patients_{split}"
    write_atomically(stem.with_suffix(".json"), f"{json.dumps(found)}\n".encode())
    return write_page(
        stem.with_suffix(".html"),
        "patients.html.jinja",
        package="training",
        figures={who: draw_figure(_panels(each)) for who, each in found.items()},
        patients=found,
        split=split,
    )


@torch.no_grad()
def describe_patient(model: TrainedModel, batch: PatientBatch, variables: Sequence[str]) -> dict[str, Any]:
    """Return what is shown of one patient, as values of JSON.

    Args:
        model: in eval mode.
        batch: the patient alone, on the CPU.
        variables: names by code.

    Returns:
        ``hours`` [S] and ``num_events`` [S] of sets; ``latent`` [S, D], their posterior means; and by outcome
        ``answers``, pairs of hour and answer, and ``effects`` of variables, the greatest first.  The answer of a binary
        outcome is its probability, of classes that of the likeliest at the end, of a regression the number.
    """
    device = next(model.parameters()).device
    hours = (batch.minute.double() / 60).tolist()
    last = model(batch.to(device))
    of_class = [int(prediction[0].argmax()) if outcome.kind == "multiclass" else -1
                for outcome, prediction in zip(last.outcomes, last.predictions, strict=True)]  # fmt: skip

    def answer(part: PatientBatch) -> Floats:
        predictions = model(part.to(device), reconstruct=False).predictions
        return np.array([float(p[0, number]) for p, number in zip(predictions, of_class, strict=True)])

    sets = choose_evenly(batch.num_sets, MAX_ANSWERS)
    num_sets = torch.from_numpy(sets) + 1
    prepared = PreparedBatch.build(batch, prefixes=Prefixes(torch.zeros_like(num_sets), num_sets)).to(device)
    after_sets = model(prepared, reconstruct=False).predictions
    over_time = np.stack([p[:, c].float().cpu().numpy() for p, c in zip(after_sets, of_class, strict=True)], axis=1)
    at_end, effects = over_time[-1], dict[str, Floats]()
    for code in torch.unique(batch.code).tolist():
        keep = batch.code != code
        if keep.any():
            effects[variables[code]] = at_end - answer(batch.keep_events(keep))
    outcomes = {}
    for number, outcome in enumerate(last.outcomes):
        ranked = sorted(effects.items(), key=lambda item: -abs(item[1][number]))
        outcomes[outcome.name] = {
            "answers": [[hours[at], float(each[number])] for at, each in zip(sets, over_time, strict=True)],
            "effects": {name: float(effect[number]) for name, effect in ranked},
            "of_class": _class_name(outcome, of_class[number]),
        }
    return {
        "hours": hours,
        "num_events": batch.set_sizes.tolist(),
        "latent": last.posterior.mu.float().cpu().numpy().round(4).tolist(),
        "outcomes": outcomes,
    }


def _class_name(outcome: Outcome, number: int) -> str | None:
    return outcome.classes[number] if outcome.classes else None


def _panels(found: dict[str, Any]) -> dict[str, Any]:
    """Return what draws each panel of a patient's figure, by its title."""

    def draw_answers(axis: Axes, answers: list[list[float]]) -> None:
        hours, values = np.array(answers).T
        axis.step(hours, values, where="post")
        axis.set(xlabel="hours", ylim=(0, None))

    def draw_effects(axis: Axes, effects: dict[str, float]) -> None:
        shown = [*effects.items()][:MAX_EFFECTS]
        axis.barh([figure_label(name) for name, _ in shown], [effect for _, effect in shown])
        axis.invert_yaxis()

    def draw_latent(axis: Axes) -> None:
        axis.imshow(np.array(found["latent"]).T, aspect="auto", interpolation="nearest", cmap="RdBu", vmin=-3, vmax=3)
        axis.set(xlabel="set", ylabel="dimension")

    def draw_sets(axis: Axes) -> None:
        axis.vlines(found["hours"], 0, found["num_events"])
        axis.set(xlabel="hours", ylim=(0, None))

    panels: dict[str, Any] = {}
    for name, each in found["outcomes"].items():
        label = figure_label(name)
        panels[f"{label}: answer over time"] = functools.partial(draw_answers, answers=each["answers"])
        panels[f"{label}: change by each variable"] = functools.partial(draw_effects, effects=each["effects"])
    return panels | {"Events of each set": draw_sets, "Posterior means of sets": draw_latent}
