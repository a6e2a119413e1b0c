"""Take a trained model along: a checkpoint, with what is known of its data set, as a model folder (``--export``)."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from model.config import SeqSetVAEConfig
from model.saved import MODEL_VERSION, SavedModel, pack_model
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import read_vocabulary
from pipeline.dataset.tasks import common_times, load_tasks
from pipeline.schema import FORMAT_VERSION
from pipeline.storage.files import write_atomically
from pipeline.storage.folder import Folder
from training.checkpoint import Checkpoint
from training.options import TrainOptions


def read_checkpoint(
    saved: Checkpoint, path: Path, folder: Folder, manifest: Manifest, *, recalibrated: bool = True
) -> SavedModel:
    """Return the trained model of a checkpoint with all that predicting needs, from the data set of its training.

    Raises:
        UserError: the data set lacks the vocabulary of the checkpoint at ``path``, or a task that it learned.
    """
    members = saved.build_members(path, manifest.vocabulary_fingerprint, recalibrated=recalibrated)
    return SavedModel(members, describe_model(saved, members[0].config, folder, manifest) | {"members": len(members)})


def describe_model(saved: Checkpoint, config: SeqSetVAEConfig, folder: Folder, manifest: Manifest) -> dict[str, Any]:
    """Return the content of ``config.json`` but for the number of members: values of JSON, none of a patient."""
    objective, data = saved.options["loss"]["objective"], saved.options["data"]
    learned = None if objective == "pretrain" else ",".join(outcome.name for outcome in config.outcomes)
    tasks = load_tasks(folder, manifest, learned)
    times = common_times(tasks)
    return {
        "version": MODEL_VERSION,
        "made_with": {"data_format": FORMAT_VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "model": config.to_dict(),
        "objective": objective,
        "preset": saved.options["model"]["preset"],
        "step": saved.step,
        "metrics": saved.metrics,
        "samples": {
            "times": times,
            "excluded_codes": list(tasks[0].excluded_codes) if tasks else [],
            "max_sequence_length": data["max_sequence_length"],
            "truncate": data["truncate"] or ("latest" if times else "earliest"),
        },
        "data": {"fingerprint": manifest.fingerprint, "options": manifest.options},
        "vocabulary_fingerprint": manifest.vocabulary_fingerprint,
        "vocabulary": read_vocabulary(folder, manifest).to_pydict(),
    }


def export_checkpoint(options: TrainOptions, manifest: Manifest) -> int:
    """Write the model folder that ``--export`` names; return 0."""
    best = Path(options.run.output_dir) / "checkpoints" / "best.pt"
    path, target = Path(options.evaluation.evaluate or best), Path(options.evaluation.export or "")
    folder, recalibrated = options.data.open_folder(), options.evaluation.recalibrate
    model = read_checkpoint(Checkpoint.load(path), path, folder, manifest, recalibrated=recalibrated)
    files = pack_model(model)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(target / name, content)
    print(f"{target}: the model of {path}; {', '.join(files)}")
    return 0
