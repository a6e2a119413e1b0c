"""A look at latents: how patients lie in them, which dimensions speak, and which variables are reconstructed well."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from model.losses import kl_per_dimension
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAEOutput
from model.set_vae import Posterior
from pipeline.arrays import choose_evenly, is_labelled
from pipeline.loading.batch import PatientBatch
from pipeline.reports.page import draw_figure, figure_label, write_page
from training.parallel import World
from training.predictions import labels_of_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PATIENTS = 5000
"""Patients that are drawn; of more, evenly chosen ones."""

MAX_VARIABLES = 20
"""Variables whose error is drawn, the most frequent; the table below the figure has all."""

PAIRS = 1 << 22
"""Pairs of an event and a decoded vector that are compared at once."""

FLOATS = pa.list_(pa.float32())
LATENTS = pa.schema([("patient_id", pa.string()), ("minute", pa.float32()), ("mu", FLOATS), ("logvar", FLOATS)])

Floats = npt.NDArray[np.float64]


class LatentSums:
    """What is gathered of the batches of a split.

    The mean over a patient's sets stands for the patient; errors are squared distances of events to the nearest vector
    that was decoded for their set.
    """

    def __init__(self, width: int, num_codes: int) -> None:
        self.kl_D, self.num_sets = np.zeros(width), 0
        self.error_C, self.num_C = np.zeros(num_codes), np.zeros(num_codes)
        self.patient_BD, self.label_B = [np.zeros((0, width))], [np.zeros(0)]

    def add(self, prepared: PreparedBatch, output: SeqSetVAEOutput) -> None:
        """Add one batch and what the model made of it."""
        batch, (mu_SD, _) = prepared.batch.to("cpu"), output.posterior
        self.kl_D += kl_per_dimension(output.posterior).sum(0).double().cpu().numpy()
        self.num_sets += batch.num_sets
        total_BD = mu_SD.new_zeros(batch.num_patients, mu_SD.shape[1], dtype=torch.float64)
        total_BD.index_add_(0, batch.patient_of_set.to(mu_SD.device), mu_SD.double())
        self.patient_BD.append(total_BD.cpu().numpy() / batch.sets_per_patient.numpy()[:, None])
        self.label_B.append(labels_of_batch(batch, output.outcomes)[0][batch.whole_samples.numpy()])
        if output.decoded is not None:
            error_E = nearest_errors(prepared, output).double().cpu().numpy()
            code = batch.code.numpy()
            self.error_C += np.bincount(code, error_E, len(self.error_C))
            self.num_C += np.bincount(code, minlength=len(self.num_C))

    def combine(self, world: World) -> None:
        """Add up what all ranks have gathered."""
        ranks = world.gather(self)
        for name in ("kl_D", "num_sets", "error_C", "num_C"):
            setattr(self, name, sum(getattr(rank, name) for rank in ranks))
        self.patient_BD = [rows for rank in ranks for rows in rank.patient_BD]
        self.label_B = [labels for rank in ranks for labels in rank.label_B]

    def summarize(self, variables: Sequence[str]) -> dict[str, Any]:
        """Return the KL divergence of each dimension of a set, in nats, and the error by variable, the most frequent
        first.
        """
        frequent = sorted(np.flatnonzero(self.num_C).tolist(), key=lambda code: -self.num_C[code])
        errors = {variables[code]: float(self.error_C[code] / self.num_C[code]) for code in frequent}
        kl = (self.kl_D / max(self.num_sets, 1)).tolist()
        return {"kl_by_dimension": kl, "reconstruction_error_by_variable": errors}

    def write_page(self, path: Path, found: dict[str, Any], name: str) -> Path:
        """Write a page of what was found, and of where patients lie, coloured by their label."""
        patient_BD, label_B = np.concatenate(self.patient_BD), np.concatenate(self.label_B)
        chosen = choose_evenly(len(label_B), MAX_PATIENTS)
        views = project(patient_BD[chosen])
        panels: dict[str, Any] = {
            title: functools.partial(_draw_patients, place=place, label=label_B[chosen])
            for title, place in views.items()
        }
        panels["KL divergence by dimension, nats"] = functools.partial(_draw_kl, kl=found["kl_by_dimension"])
        errors = found["reconstruction_error_by_variable"]
        if errors:
            panels["Reconstruction error by variable"] = functools.partial(_draw_errors, errors=errors)
        figure = draw_figure(panels)
        context = {"name": name, "figure_of_latents": figure, "errors": errors, "num_patients": len(label_B)}
        return write_page(path, "latents.html.jinja", package="training", **context)


def nearest_errors(prepared: PreparedBatch, output: SeqSetVAEOutput) -> Tensor:
    """Return [E] float32, the squared distance of each event to the nearest vector decoded for its set."""
    assert output.decoded is not None
    batch, sets = prepared.batch, prepared.sets
    slots = torch.nonzero(sets.mask)[:, 0]
    slot_of_event = torch.empty(batch.num_events, dtype=torch.int64, device=slots.device)
    slot_of_event[sets.event_of_slot[slots]] = slots
    error_E = output.decoded.new_zeros(batch.num_events, dtype=torch.float32)
    sizes = batch.set_sizes
    for size in torch.unique(sizes).tolist():
        for own in torch.nonzero(sizes == size)[:, 0].split(max(1, PAIRS // size**2)):
            events = batch.set_offsets[own][:, None] + torch.arange(size, device=own.device)
            rows = slot_of_event[events]
            pairs = torch.cdist(output.events[rows].float(), output.decoded[rows].float())
            error_E[events] = pairs.amin(2).square()
    return error_E


def latent_rows(batch: PatientBatch, posterior: Posterior) -> pa.Table:
    """Return a row a set: whose it is, when, and the posterior of its latent."""
    ids = pa.array(batch.patient_id, pa.string()).take(pa.array(batch.patient_of_set.numpy()))
    wide = [pa.array(list(part.float().cpu().numpy()), FLOATS) for part in posterior]
    return pa.table([ids, pa.array(batch.minute.numpy()), *wide], schema=LATENTS)


def project(x_BD: Floats) -> dict[str, Floats]:
    """Return places [B, 2] of patients by the title of the view: principal components, and UMAP if it is installed."""
    if len(x_BD) < 3:
        return {}
    centred = x_BD - x_BD.mean(0)
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    share = strength[:2] ** 2 / max((strength**2).sum(), 1e-300)
    views = {f"Principal components, {share.sum():.0%} of the variance": (left * strength)[:, :2]}
    if importlib.util.find_spec("umap"):
        umap = importlib.import_module("umap")
        views["UMAP"] = np.asarray(umap.UMAP(random_state=0).fit_transform(x_BD), np.float64)
    return views


def _draw_patients(axis: Axes, place: Floats, label: Floats) -> None:
    known = is_labelled(label)
    across, up = place.T
    axis.scatter(across[~known], up[~known], s=4, color="0.8", label="unlabelled" if (~known).any() else None)
    values = np.unique(label[known])
    if len(values) <= 10:
        for number, value in enumerate(values):
            own = known & (label == value)
            axis.scatter(across[own], up[own], s=4, color=f"C{number}", label=f"label {value:g}")
    else:
        axis.scatter(across[known], up[known], s=4, c=label[known], cmap="viridis")


def _draw_kl(axis: Axes, kl: list[float]) -> None:
    axis.bar(range(len(kl)), sorted(kl, reverse=True))
    axis.set(xlabel="dimensions, in order")


def _draw_errors(axis: Axes, errors: dict[str, float]) -> None:
    shown = [*errors.items()][:MAX_VARIABLES]
    axis.barh([figure_label(name) for name, _ in shown], [error for _, error in shown])
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
