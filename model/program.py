"""The prediction of a trained model as a function of rectangles alone, which ``torch.export`` can follow.

A batch comes as [B, K, N] events of B patients with at most K sets of at most N events.  No shape depends on what is in
the tensors: each set has N slots, a patient has a pair with every code of the vocabulary, and what is only padding
belongs to a patient that does not exist, whose answer is dropped.  The layers are those of the model itself.

``python -m model.program DIR`` writes the program of a model folder beside its weights.

Shape suffixes: B patients, K sets, N events of a set, S = B · K sets, R = S · N slots, C codes, V = B · C pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from model.average import TrainedModel
from model.events import has_number
from model.features import VariableLayout, summary_features
from model.prepared import PreparedBatch
from model.ragged import SetLayout, SizeClass
from model.saved import load_model
from model.segments import Segments
from model.sequence import SequenceLayout, time_features
from pipeline.loading.batch import PatientBatch
from pipeline.schema import FIRST_CODE, PADDING_CODE, UserError

PROGRAM_FILE: Final = "program.pt2"


class DenseModel(nn.Module):
    """Predict from rectangles what the model predicts from the ragged batch, up to rounding."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, code: Tensor, value: Tensor, has_value: Tensor, minute: Tensor) -> tuple[Tensor, ...]:
        """Return the predictions [B, ·] of each outcome, as :meth:`model.config.Outcome.predict` gives them.

        Args:
            code: [B, K, N] int64; 0 = padding.  A patient's sets come first in its row; each patient has one.
            value: [B, K, N] float32, z-scored.
            has_value: [B, K, N] bool.
            minute: [B, K] float32.
        """
        code, value, has_value = (F.pad(each, (0, 1)) for each in (code, value, has_value))  # no set has one slot alone
        output = self.model(lay_out(code, value, has_value, minute, self.model.config.num_codes), reconstruct=False)
        return tuple(prediction[:-1] for prediction in output.predictions)


def to_rectangles(batch: PatientBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what :meth:`DenseModel.forward` takes, of a batch on the CPU."""
    patient_S, columns = batch.patient_of_set, int(batch.sets_per_patient.max())
    column_S = torch.arange(batch.num_sets) - batch.patient_offsets[patient_S]
    place_E = torch.arange(batch.num_events) - batch.set_offsets[batch.set_of_event]
    minute = batch.minute.new_zeros(batch.num_patients, columns)
    minute[patient_S, column_S] = batch.minute
    cell = patient_S[batch.set_of_event], column_S[batch.set_of_event], place_E
    events = (batch.code, batch.value, batch.has_value)
    filled = [flat.new_zeros(*minute.shape, int(batch.set_sizes.max())).index_put(cell, flat) for flat in events]
    return filled[0], filled[1], filled[2], minute


def export_program(model: TrainedModel) -> ExportedProgram:
    """Return :class:`DenseModel` as a program of PyTorch's operations on the CPU, for any B, K and N.

    ``torch.export.save`` writes it, and ``torch.export.load(…).module()`` runs it without a file of this project.
    """
    code = torch.full((2, 3, 4), FIRST_CODE)
    example = code, torch.zeros(code.shape), torch.zeros(code.shape, dtype=torch.bool), torch.zeros(code.shape[:2])
    sizes: dict[int, Any] = {axis: Dim(name, min=1) for axis, name in enumerate(("patients", "sets", "events"))}
    dynamic = (sizes, sizes, sizes, {axis: sizes[axis] for axis in (0, 1)})
    with torch.no_grad():
        return torch.export.export(DenseModel(model).eval(), example, dynamic_shapes=dynamic)


def lay_out(code: Tensor, value: Tensor, has_value: Tensor, minute: Tensor, num_codes: int) -> PreparedBatch:
    """Return rectangles as a prepared batch of B patients and one more, to whom all that is padding belongs."""
    (patients, columns, size), zero = code.shape, code.new_zeros(1)
    num_sets, num_pairs = patients * columns, patients * num_codes
    none_S, none_V, none = (zero.expand(count + 1) for count in (patients + 1, num_pairs, 0))  # offsets: only counted
    is_event = code != PADDING_CODE
    is_set = is_event.any(2)
    mask = is_event | (~is_set[:, :, None] & (torch.arange(size) == 0))
    row, set_S, pair_V = torch.arange(patients), torch.arange(num_sets), torch.arange(num_pairs)
    code_R, code_V, patient_V = code.view(-1), pair_V % num_codes, pair_V // num_codes
    pair_R = torch.arange(num_sets * size) // (columns * size) * num_codes + code_R
    occurs = torch.zeros(num_pairs).index_add(0, pair_R, is_event.view(-1).float()) > 0
    first = (
        occurs.view(patients, num_codes).int().argmax(1) + row * num_codes
    )  # stands in the place of what does not occur
    # What is padding has the variables of the first patient.
    layout = _lay_out_rectangle(occurs, patients, num_codes, torch.cat([row, zero]))
    variables = VariableLayout(pair_R, torch.where(occurs, patient_V, patients), code_V, none_S, layout)
    last_sets = torch.cat([zero, row * columns + is_set.sum(1), zero + 1])
    batch = PatientBatch.unchecked(
        code=code_R, value=value.view(-1), has_value=has_value.view(-1), minute=minute.view(-1),
        set_offsets=torch.arange(num_sets + 1) * size, patient_offsets=last_sets, patient_id=[],
    )  # fmt: skip
    sequences = SequenceLayout(
        rectangles=((patients, columns),), patient=torch.where(is_set.view(-1), set_S // columns, patients),
        position=set_S % columns, cell=set_S, offsets=none_S, tile_patient=none, tile_begin=none,
    )  # fmt: skip
    return PreparedBatch(
        batch=batch, num_patients=0, shape=None, shared=None, noise=None, sequences=sequences, variables=variables,
        sets=_lay_out_rectangle(mask.view(-1), num_sets, size, set_S),
        codes=torch.arange(num_codes), slots_of_code=Segments(code_R, none), pairs_of_code=Segments(code_V, none),
        slots_of_pair=Segments(pair_R, none_V), cell_of_pair=code_V * patients + patient_V, max_pairs=patients,
        slots_of_variable=Segments(torch.where(occurs, pair_V, first[patient_V]), none),
        value=batch.value, has_number=has_number(code_R, batch.has_value), time=time_features(batch.minute),
        features=summary_features(batch, variables),
    )  # fmt: skip


def _lay_out_rectangle(mask: Tensor, rows: int, size: int, rank: Tensor) -> SetLayout:
    """Return the layout of ``rows`` sets of ``size`` slots each; what only kernels and losses read is left empty."""
    unread = ("event_of_slot", "sizes", "counted", "num_counted", "num_single", "tile_set", "tile_begin")
    nothing = mask.new_zeros(0, dtype=torch.int64)
    return SetLayout(
        classes=(SizeClass(num_sets=rows, size=size, is_padded=True),), mask=mask, set_rank=rank,
        set_of_slot=torch.arange(mask.shape[0]) // size, set_order=torch.arange(rows),
        slot_offsets=torch.arange(rows + 1) * size, slots_of_position=Segments(nothing, nothing),
        **dict.fromkeys(unread, nothing),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``program.pt2`` into the model folder that is named; 0 = done, 2 = something the user can mend."""
    folders = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(folders) != 1:
            raise UserError("name the model folder that train.py --export wrote, and nothing else")
        path = Path(folders[0]) / PROGRAM_FILE
        torch.export.save(export_program(load_model(folders[0])), path)
    except (UserError, OSError) as error:
        print(f"python -m model.program: {error}", file=sys.stderr)
        return 2
    print(f"{path}: written by PyTorch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
