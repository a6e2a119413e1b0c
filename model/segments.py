"""Sums over segments of a flat array: the events of a variable, the sets of a patient."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_pool(values_ND: Tensor, score_N: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """[num_segments, D] float32: in each segment the mean of its values, weighed by the softmax of its scores.

    Args:
        values_ND: what is pooled.
        score_N: -inf leaves a row out; every segment has a row that is not.
        segment_N: int64, the segment of each row.
    """
    with torch.autocast(values_ND.device.type, enabled=False):
        values_ND, score_N = values_ND.float(), score_N.float()
        most = score_N.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment_N, score_N.detach(), "amax")
        weight_N = (score_N - most[segment_N]).exp()
        total = weight_N.new_zeros(num_segments).index_add(0, segment_N, weight_N)
        pooled = values_ND.new_zeros(num_segments, values_ND.shape[1])
        return pooled.index_add(0, segment_N, values_ND * weight_N[:, None]) / total[:, None]
