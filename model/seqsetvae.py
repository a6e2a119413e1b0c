"""SeqSetVAE: a set VAE over each set, a causal transformer over the sets, a decoder and an outcome head.

There is no loop over patients or sets.

Shape suffixes: B patients, S sets, R slots of the set layout, D width, K ensemble heads, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.profiler import record_function

from model.attention import ISAB, NOT_FOLDED, Folded, fold_projections
from model.config import Outcome, SeqSetVAEConfig
from model.events import EventEncoder
from model.kernels.ops import uses_kernels
from model.outcome import OutcomeHead
from model.prepared import PreparedBatch
from model.ragged import SetLayout
from model.segments import take_unique
from model.sequence import CausalTransformer
from model.set_vae import Posterior, SetDecoder, SetEncoder
from pipeline.loading.batch import PatientBatch

_SAMPLE_SALT = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqSetVAEOutput:
    """The output of one forward pass.

    Attributes:
        posterior: of the latents, [S, D] each, in the batch's order of sets.
        context: [S, D], the output h of the transformer.
        logits: [B, K, C] of the ensemble heads of each outcome; None if none was predicted.
        outcomes: what these are.
        events: [R, D], the encoded events, which are to be reconstructed; without gradient.
        decoded: [R, D], their reconstruction; None if there was none.
        sets: the layout of the slots.
    """

    posterior: Posterior
    context: Tensor
    logits: tuple[Tensor, ...] | None
    outcomes: tuple[Outcome, ...]
    events: Tensor
    decoded: Tensor | None
    sets: SetLayout

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """[B, C] float32 of each outcome, as :meth:`Outcome.predict` gives it."""
        assert self.logits is not None, "the forward pass was called with classify=False"
        return tuple(outcome.predict(logits) for outcome, logits in zip(self.outcomes, self.logits, strict=True))

    def first(self, num_samples: int) -> SeqSetVAEOutput:
        """Return the output with the outcomes of the first samples alone."""
        return replace(self, logits=self.logits and tuple(each[:num_samples] for each in self.logits))

    @property
    def probability(self) -> Tensor:
        """[B] float32, the probability of class 1 of the first outcome, where it is of classes."""
        return self.predictions[0][:, 1]


class SeqSetVAE(nn.Module):
    """The model that docs/model.md describes.

    In training mode the posterior is sampled and dropout applied, by the noise of the prepared batch; in evaluation
    mode latents are the means and there is no noise.

    Args:
        config: the shape.
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
        self, prepared: PreparedBatch | PatientBatch, *, reconstruct: bool = True, classify: bool = True
    ) -> SeqSetVAEOutput:
        """Return the outputs of every patient of a batch.

        Args:
            prepared: a batch on the model's device; a plain :class:`PatientBatch` is prepared first, without noise.
            reconstruct: whether to decode sets.
            classify: whether to predict the outcomes.

        Raises:
            ValueError: the model is in training mode and the batch was prepared without noise.
        """
        if isinstance(prepared, PatientBatch):
            prepared = PreparedBatch.build(prepared.to("cpu")).to(prepared.code.device)
        noise = prepared.noise if self.training else None
        if self.training and noise is None:
            raise ValueError("training needs noise: prepare the batch with a seed, or call model.eval()")
        sets, sequences = prepared.sets, prepared.sequences
        checkpointed, decoded_RD, logits = self.gradient_checkpointing, None, None
        with record_function("encoder"):
            folded = self._fold_projections(reconstruct, classify) if uses_kernels(sets.mask.device) else NOT_FOLDED
            embedding_UE = take_unique(self.events.embedding, prepared.codes)
            events_RD = self.events(embedding_UE, prepared.slots_of_code, prepared.value, prepared.has_number)
            sorted_posterior = self.encoder(events_RD, sets, folded, checkpointed=checkpointed)
            posterior = Posterior(*map(sets.unsort_sets, sorted_posterior))
            z_SD = posterior.mu
            if noise is not None:
                z_SD = z_SD + (posterior.logvar / 2).exp() * noise.set.normal(_SAMPLE_SALT, z_SD.shape[1])
        with record_function("transformer"):
            set_noise = None if noise is None else noise.set
            context_SD = self.transformer(z_SD, prepared.time, sequences, set_noise, checkpointed=checkpointed)
        if reconstruct:
            with record_function("decoder"):
                decoded_RD = self.decoder(sets.sort_sets(context_SD), sets, folded, checkpointed=checkpointed)
        if classify:
            with record_function("head"):
                logits = self.head(
                    prepared, embedding_UE, events_RD, context_SD, z_SD, noise, folded, checkpointed=checkpointed
                )
        return SeqSetVAEOutput(
            posterior=posterior,
            context=context_SD,
            logits=logits,
            outcomes=self.config.outcomes,
            events=events_RD.detach(),
            decoded=decoded_RD,
            sets=sets,
        )

    def _fold_projections(self, reconstruct: bool, classify: bool) -> Folded:
        """Return the projections of all blocks that will run."""
        parts = [self.encoder, *([self.decoder] if reconstruct else []), *([self.head] if classify else [])]
        blocks = [module for part in parts for module in part.modules() if isinstance(module, ISAB)]
        return dict(zip(blocks, fold_projections(blocks), strict=True))
