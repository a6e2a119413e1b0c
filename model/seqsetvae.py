"""SeqSetVAE: a set VAE over each set, a causal transformer over the sets, a decoder and an outcome head.

Patients in, everything a loss or a gauge needs out; there is no loop over patients or sets.

Shape suffixes: B patients, S sets, E events, R rows of the set layout, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.profiler import record_function as part

from model.config import SeqSetVAEConfig
from model.events import EventEncoder
from model.losses import LossCounts, LossWeights, chamfer_sums, cross_entropy_sum, kl_per_dimension, kl_sum
from model.noise import PatientNoise, patient_keys
from model.outcome import OutcomeHead, VariableLayout
from model.ragged import SetLayout
from model.sequence import CausalTransformer, SequenceLayout
from model.set_vae import Posterior, SetDecoder, SetEncoder
from pipeline.loading.batch import PatientBatch

_SAMPLE_SALT = 0


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A batch with the shapes that its sizes decide, worked out on the CPU and moved to the device together.

    Waiting for a GPU to say how large a set is would stall every step; so this is made from a batch on the CPU.
    """

    batch: PatientBatch
    sets: SetLayout
    sequences: SequenceLayout
    variables: VariableLayout
    patient_key: Tensor

    @classmethod
    def of(cls, batch: PatientBatch) -> ModelInput:
        on_cpu = batch.to("cpu")
        sets = SetLayout.build(on_cpu.set_offsets)
        given = cls(
            on_cpu,
            sets,
            SequenceLayout.build(on_cpu.patient_offsets),
            VariableLayout.build(on_cpu),
            patient_keys(batch.patient_id),
        )
        return given.to(batch.code.device)

    def to(self, device: torch.device | str) -> ModelInput:
        return ModelInput(
            self.batch.to(device, non_blocking=True),
            self.sets.to(device),
            self.sequences.to(device),
            self.variables.to(device),
            self.patient_key.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqSetVAEOutput:
    """What one forward pass gives.

    Attributes:
        posteriors: of each level, [S, D] each, in the batch's order of sets; the last is the set's.
        context: [S, D], the transformer's output h.
        members: [B, K, 2], logits of each end of the head.
        events: [R, D], what was to be reconstructed, in rows of the set layout; no gradient.
        decoded: [R, D], what was reconstructed.
        sets: the layout of those rows.
    """

    posteriors: list[Posterior]
    context: Tensor
    members: Tensor
    events: Tensor
    decoded: Tensor
    sets: SetLayout

    @property
    def probability(self) -> Tensor:
        """[B] float32, of the outcome: the mean of the members'."""
        return self.members.float().softmax(2)[:, :, 1].mean(1)


class SeqSetVAE(nn.Module):
    """The model of design §7.

    Args:
        config: its shape.
        embeddings: [num_codes, embedding_dim] float32, given embeddings of the variables.
    """

    def __init__(self, config: SeqSetVAEConfig, embeddings: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.events = EventEncoder(config, embeddings)
        self.encoder = SetEncoder(config)
        self.transformer = CausalTransformer(config)
        self.decoder = SetDecoder(config)
        self.head = OutcomeHead(config)
        self.gradient_checkpointing = False

    def forward(
        self, patients: PatientBatch | ModelInput, *, seed: int | None = None, step: int = 0
    ) -> SeqSetVAEOutput:
        """Outputs of every patient of a batch.

        Args:
            patients: the batch, on the model's device; a :class:`ModelInput` spares a GPU one wait.
            seed: of the posterior's sample and of dropout at ``step``; None = no noise: latents are means.
        """
        given = patients if isinstance(patients, ModelInput) else ModelInput.of(patients)
        batch, sets, sequences = given.batch, given.sets, given.sequences
        checkpointed = self.gradient_checkpointing
        noise = None if seed is None else PatientNoise.of_step(seed, step, given.patient_key)
        set_noise = None if noise is None else noise.at(sequences.patient, sequences.place)
        with part("encoder"):
            row = sets.event_of_row
            events_RD = self.events(batch.code[row], batch.value[row], batch.has_value[row])
            posteriors = [
                Posterior(p.mu[sets.set_rank], p.logvar[sets.set_rank])
                for p in self.encoder(events_RD, sets, checkpointed=checkpointed)
            ]
            z_SD = posteriors[-1].mu
            if set_noise is not None:
                z_SD = z_SD + (posteriors[-1].logvar / 2).exp() * set_noise.normal(_SAMPLE_SALT, z_SD.shape[1])
        with part("transformer"):
            context_SD = self.transformer(z_SD, batch.minute, sequences, set_noise, checkpointed=checkpointed)
        with part("decoder"):
            decoded_RD = self.decoder(context_SD[sets.set_order], sets, checkpointed=checkpointed)
        with part("head"):
            members_BK2 = self.head(batch, events_RD, context_SD, z_SD, sets, sequences, given.variables, noise)
        return SeqSetVAEOutput(
            posteriors=posteriors,
            context=context_SD,
            members=members_BK2,
            events=events_RD.detach(),
            decoded=decoded_RD,
            sets=sets,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """One batch's share of the losses; over all ranks each adds up to the loss of the global batch.

    Attributes:
        total: what is differentiated.
        reconstruction, kl, classification: its parts before their weights, without gradient.
        kl_levels: [levels], KL divergence a set without free bits, without gradient.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    classification: Tensor
    kl_levels: Tensor

    def __add__(self, other: Losses) -> Losses:
        """Of two parts of a batch together."""
        return Losses(**{name.name: getattr(self, name.name) + getattr(other, name.name) for name in fields(self)})


def losses(
    output: SeqSetVAEOutput, label_B: Tensor, weights: LossWeights, counts: LossCounts, *, beta: float
) -> Losses:
    """Sums over this batch divided by the counts of the global batch.

    Args:
        label_B: [B] int64, -1 = unlabelled.
        beta: weight of the KL divergence at this step.
    """
    direction, magnitude, squared = chamfer_sums(output.events, output.decoded, output.sets)
    parts = weights.direction * direction + weights.magnitude * magnitude + weights.squared * squared
    reconstruction = parts / max(counts.num_events, 1)
    kl = kl_sum(output.posteriors, weights.free_bits) / max(counts.num_sets, 1)
    members = output.members.shape[1]
    of_members = cross_entropy_sum(output.members.flatten(0, 1), label_B.repeat_interleave(members), weights.positive)
    classification = of_members / members / max(counts.num_labelled, 1)
    total = weights.vae * (reconstruction + beta * kl) + weights.classification * classification
    with torch.no_grad():
        levels = torch.stack([kl_per_dimension(p).sum() for p in output.posteriors]) / max(counts.num_sets, 1)
    return Losses(
        total=total,
        reconstruction=reconstruction.detach(),
        kl=kl.detach(),
        classification=classification.detach(),
        kl_levels=levels,
    )
