from __future__ import annotations

import dataclasses

from model.config import SeqSetVAEConfig
from model.losses import LossOptions
from training.card import METRICS, write_model_cards
from training.data import DataOptions
from training.options import RunOptions, TrainOptions


def test_the_model_card_says_what_was_measured_and_what_was_not() -> None:
    config = SeqSetVAEConfig.preset("small", num_codes=43)
    options = TrainOptions(
        data=DataOptions(data_dir="-"), run=RunOptions(output_dir="-"), loss=LossOptions(pos_weight=4.0)
    )
    metrics: dict[str, float | None] = dict.fromkeys(METRICS, 0.5) | {f"{name}_low": 0.4 for name in METRICS}
    metrics |= {f"{name}_high": 0.625 for name in METRICS}
    test = {**metrics, "brier": None, "num_labelled": 12, "num_positive": 3, "active_units": 60}
    summary = {"steps": 1000, "seconds": 61.4, "best": {"epoch": 2}, "test": test}
    (name, text), (tripod, checklist) = write_model_cards(config, options, {"train": 5000, "test": 12}, summary)
    assert name == "MODEL_CARD.md"
    assert "5,000 train, 12 test patients" in text
    assert "| AUROC | 0.500 | 0.400 to 0.625 |" in text
    assert "Brier" not in text  # undefined
    assert tripod == "TRIPOD_AI.md"
    for words in (
        "12 labelled patients, 3 with the outcome",
        "AUROC 0.500 (0.400 to 0.625)",
        "pos_weight 4.0",
        "| 27a–c |",
    ):
        assert words in checklist
    assert "Active units 60 of 64" in text
    assert "`--pos_weight` and `--class_weights`, shift them" in text
    (_, untested), (_, checklist) = write_model_cards(config, options, {"train": 5000}, {**summary, "test": None})
    assert "Not tested" in untested
    assert "no test split" in checklist
    assert "boosted trees" not in text + checklist
    with_trees = dataclasses.replace(config, tree_share=0.25)
    cards = write_model_cards(with_trees, options, {"train": 5000, "test": 12}, summary)
    words = "25 % that of boosted trees", "with a share of 0.25 in the logit"
    assert all(part in card for (_, card), part in zip(cards, words, strict=True))
    pretrain = dataclasses.replace(options, loss=LossOptions(objective="pretrain"))
    ((_, pretrained),) = write_model_cards(config, pretrain, {"train": 5000}, summary)
    assert "outcome head was not trained" in pretrained
