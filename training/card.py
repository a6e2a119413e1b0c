"""The model card of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import torch

from model.config import SeqSetVAEConfig
from pipeline.schema import FIRST_CODE
from training.options import TrainOptions

METRICS = {"auroc": "AUROC", "auprc": "AUPRC", "min_se_ppv": "min(Se, +P)", "brier": "Brier", "ece": "ECE"}


def write_model_card(
    config: SeqSetVAEConfig,
    options: TrainOptions,
    num_samples: Mapping[str, int],
    summary: Mapping[str, Any],
    unit: str = "patients",
) -> str:
    """Return what someone who is handed the checkpoint must know, in Markdown (Mitchell et al. 2019, arXiv:1810.03993).

    ``num_samples`` has the number of samples of each split, which are called ``unit``, and ``summary`` what
    ``summary.json`` has.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.jinja").render(
        loss=options.loss,
        metrics=METRICS,
        num_samples=num_samples,
        preset=options.model.preset,
        seed=options.run.seed,
        summary=summary,
        torch_version=torch.__version__,
        unit=unit,
        variables=config.num_codes - FIRST_CODE,
        width=config.width,
    )
