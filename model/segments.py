"""Attention pooling over segments of a flat array: the events of a variable, the sets of a patient."""

from __future__ import annotations

import torch
from torch import Tensor

from model.precision import full_precision


def attention_pool(values_ND: Tensor, score_N: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """Return [num_segments, D] float32, the mean of the values of each segment, weighted by the softmax of its scores.

    Args:
        values_ND: the values that are pooled.
        score_N: the score of each row; -inf leaves a row out, and every segment has a finite one.
        segment_N: int64, the segment of each row.
        num_segments: the number of segments.
    """
    with full_precision(values_ND.device):
        values_ND, score_N = values_ND.float(), score_N.float()
        maximum = score_N.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment_N, score_N.detach(), "amax")
        weight_N = (score_N - maximum[segment_N]).exp()
        total = weight_N.new_zeros(num_segments).index_add(0, segment_N, weight_N)
        pooled = values_ND.new_zeros(num_segments, values_ND.shape[1])
        return pooled.index_add(0, segment_N, values_ND * weight_N[:, None]) / total[:, None]
