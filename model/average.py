"""Several models of one shape as one: their answers are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from model.config import SeqSetVAEConfig
from model.events import EventEncoder
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from pipeline.loading.batch import PatientBatch


class AveragedModel(nn.Module):
    """Models of one shape, which were trained with other seeds.

    The ensemble heads of all stand side by side, so that what is predicted is the mean over models; latents and
    reconstruction are those of the first.
    """

    def __init__(self, members: Sequence[SeqSetVAE]) -> None:
        super().__init__()
        self.first, self.others = members[0], nn.ModuleList(members[1:])

    @property
    def config(self) -> SeqSetVAEConfig:
        return self.first.config

    @property
    def events(self) -> EventEncoder:
        return self.first.events

    def forward(
        self, prepared: PreparedBatch | PatientBatch, *, reconstruct: bool = True, classify: bool = True
    ) -> SeqSetVAEOutput:
        """Return what :meth:`SeqSetVAE.forward` does, with logits [B, K · models, C]."""
        output: SeqSetVAEOutput = self.first(prepared, reconstruct=reconstruct, classify=classify)
        if output.logits is None:
            return output
        logits = [output.logits, *(member(prepared, reconstruct=False).logits for member in self.others)]
        return replace(output, logits=tuple(torch.cat(each, 1) for each in zip(*logits, strict=True)))


TrainedModel: TypeAlias = SeqSetVAE | AveragedModel
"""What a checkpoint holds."""
