"""The model's mathematics once more, written from docs/model.md with plain loops over patients, sets and events.

Slow and literal on purpose: whatever the fast code folds, groups or pads must agree with this.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import ISAB, MAB
from model.codes import CodeLinear
from model.losses import DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT, LossOptions
from model.seqsetvae import SeqSetVAE
from model.set_vae import LONGEST_POSITION_PERIOD, sinusoids
from pipeline.loading.batch import PatientBatch
from pipeline.schema import UNKNOWN_CODE


def post_attention(module: nn.Module, attended: Tensor) -> Tensor:
    a = module.norm_attention(attended)
    return module.norm_output(a + module.feed_forward.contract(F.relu(module.feed_forward.expand(a))))


def mab(module: MAB, queries: Tensor, keys: Tensor) -> Tensor:
    """[M, D], [N, D] -> [M, D] with every projection written out."""
    width = queries.shape[1] // module.heads
    heads = []
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = module.query(queries)[:, part], module.key(keys)[:, part], module.value(keys)[:, part]
        heads.append(torch.softmax(q @ k.T / math.sqrt(width), dim=1) @ v)
    return post_attention(module.post_attention, module.output(torch.cat(heads, dim=1)))


def isab(module: ISAB, x: Tensor) -> Tensor:
    return mab(module.scatter, x, mab(module.gather, module.points, x))


def event(model: SeqSetVAE, code: int, value: float, has_value: bool) -> Tensor:
    encoder = model.events
    e = encoder.embedding[code]
    r = encoder.variable.weight @ e
    direction = r / r.norm().clamp_min(1e-12)
    number = has_value and code != 1
    if encoder.event_form == "product":
        return direction * (value if number else 0.0)
    s = encoder.scale.weight @ e
    return direction + (math.asinh(value) * s / s.norm() if number else encoder.no_number)


def time_encoding(module: nn.Linear, minutes: Tensor) -> Tensor:
    """[S] -> [S, D], with periods from half an hour to twenty years in equal ratios, by Python's own sines."""
    rows = []
    for hours in (minute / 60 for minute in minutes.tolist()):
        angles = [2 * math.pi * hours / (0.5 * (2 * 24 * 365.25 * 20) ** (number / 15)) for number in range(16)]
        rows.append([*map(math.sin, angles), *map(math.cos, angles), math.asinh(hours)])
    return module(torch.tensor(rows))


@dataclass
class PatientResult:
    mu: Tensor  # [sets, D]
    logvar: Tensor
    context: Tensor
    logits: Tensor
    direction: Tensor
    magnitude: Tensor
    squared: Tensor


def patient(model: SeqSetVAE, batch: PatientBatch, b: int) -> PatientResult:
    """One patient without noise."""
    width = model.config.width
    sets = []
    for s in range(int(batch.patient_offsets[b]), int(batch.patient_offsets[b + 1])):
        events = range(int(batch.set_offsets[s]), int(batch.set_offsets[s + 1]))
        sets.append(
            torch.stack(
                [event(model, int(batch.code[i]), float(batch.value[i]), bool(batch.has_value[i])) for i in events]
            )
        )
    mu, logvar = [], []
    for x in sets:
        x = x * math.sqrt(width)
        for block in model.encoder.blocks:
            x = x + isab(block, x)
        both = model.encoder.posterior(x.mean(0))
        mu.append(both[:width])
        logvar.append(both[width:].clamp(-10, 10))
    z = torch.stack(mu)

    minute = batch.minute[int(batch.patient_offsets[b]) : int(batch.patient_offsets[b + 1])]
    transformer = model.transformer
    x = transformer.norm_input(z + sinusoids(torch.arange(len(sets)), width) + time_encoding(transformer.time, minute))
    for layer in transformer.layers:
        normed = layer.norm_attention(x)
        rows = []
        for k in range(len(sets)):
            heads = []
            for head in range(layer.heads):
                size = width // layer.heads
                q, keys, v = (
                    layer.query_key_value(normed)[:, i * width + head * size : i * width + (head + 1) * size]
                    for i in range(3)
                )
                heads.append(torch.softmax(keys[: k + 1] @ q[k] / math.sqrt(size), dim=0) @ v[: k + 1])
            rows.append(torch.cat(heads))
        x = x + layer.output(torch.stack(rows))
        x = x + layer.contract(F.gelu(layer.expand(layer.norm_feed_forward(x))))
    context = transformer.norm_output(x)

    weights = torch.softmax((context * z).sum(1) / math.sqrt(width), dim=0)
    pooled = weights @ context
    if model.head.variables is not None:
        pooled = torch.cat([pooled, variable_axis(model, batch, b, sets, context)])
    pooled = model.head.norm(pooled)
    ensemble, logits = model.head.ensembles[0], torch.zeros(model.config.ensemble_heads, 2)
    for head in range(model.config.ensemble_heads):
        inputs = [pooled]
        if ensemble.summary is not None:
            total = ensemble.summary_bias[head]
            for code, features in summary_features(batch, b).items():
                encoded = torch.cat([encode_features(model, code, features), torch.ones(1)])
                total = total + encoded @ weight(model, ensemble.summary, code)[head]
            inputs.append(F.gelu(total))
        hidden = F.gelu(torch.cat(inputs) @ ensemble.hidden[head] + ensemble.hidden_bias[head])
        logits[head] = hidden @ ensemble.output[head] + ensemble.output_bias[head]
    distances = [
        decoded_distances(target.detach(), decode(model, h, len(target)))
        for target, h in zip(sets, context, strict=True)
    ]
    direction, magnitude, squared = (torch.stack(part).sum() for part in zip(*distances, strict=True))
    return PatientResult(z, torch.stack(logvar), context, logits, direction, magnitude, squared)


def weight(model: SeqSetVAE, module: CodeLinear, code: int) -> Tensor:
    """[maps, inputs, outputs], a code's own or the sum of shared matrices that its factors weigh."""
    if not module.is_factored:
        return module.weight[code]
    embedding = model.events.embedding[code]
    factors = model.head.factors.weight @ (embedding / embedding.norm())
    return torch.einsum("r,gfro->gfo", factors, module.weight.unflatten(1, (-1, len(factors))))


def encode_features(model: SeqSetVAE, code: int, features: list[float]) -> Tensor:
    """The summary features of a variable as z-scores, 4 at most, and their cosines."""
    moments = zip(features, model.head.feature_mean[code].tolist(), model.head.feature_std[code].tolist(), strict=True)
    scores = [min(max((feature - mean) / std, -4.0), 4.0) for feature, mean, std in moments]
    return torch.tensor(scores + [math.cos(score) for score in scores])


def variable_axis(model: SeqSetVAE, batch: PatientBatch, b: int, sets: list[Tensor], context: Tensor) -> Tensor:
    """The events of each variable of a patient, pooled head by head, then attention among variables and their mean."""
    axis = model.head.variables
    first = int(batch.patient_offsets[b])
    of_code: dict[int, list[Tensor]] = {}
    for k, x in enumerate(sets):
        for position, vector in enumerate(x):
            row = F.gelu(axis.event(vector * math.sqrt(model.config.width)) + axis.context(context[k]))
            of_code.setdefault(int(batch.code[int(batch.set_offsets[first + k]) + position]), []).append(row)
    variables = []
    features = summary_features(batch, b)
    for code, rows in of_code.items():
        stacked = torch.stack(rows)
        weights = torch.softmax(axis.score(stacked), dim=0)
        parts = stacked.chunk(model.config.heads, dim=1)
        pooled = torch.cat([weights[:, head] @ part for head, part in enumerate(parts)])
        encoded = encode_features(model, code, features[code])
        projected = encoded @ weight(model, axis.features, code)[0]
        pooled = torch.cat([pooled[: len(projected)] + projected, pooled[len(projected) :]])
        variables.append(axis.norm(pooled + weight(model, axis.variable, code)[0, 0]))
    x = torch.stack(variables)
    return (x + isab(axis.block, x)).mean(0)


def summary_features(batch: PatientBatch, b: int) -> dict[int, list[float]]:
    """The summary features of each variable of a patient, from lists of its values by set."""
    first, last = int(batch.patient_offsets[b]), int(batch.patient_offsets[b + 1])
    events: dict[int, list[tuple[int, float | None]]] = {}  # of each variable: set and value
    for s in range(first, last):
        for e in range(int(batch.set_offsets[s]), int(batch.set_offsets[s + 1])):
            code = int(batch.code[e])
            number = bool(batch.has_value[e]) and code != UNKNOWN_CODE
            events.setdefault(code, []).append((s, math.asinh(float(batch.value[e])) if number else None))
    features = {}
    for code, course in events.items():
        values = [value for _, value in course if value is not None]
        with_number = [s for s, value in course if value is not None]

        def of_set(s: int, course: list[tuple[int, float | None]] = course) -> float:
            return statistics.fmean(value for at, value in course if at == s and value is not None)

        hours = [float(batch.minute[last - 1] - batch.minute[s]) / 60 for s, _ in course]
        numbers = [0.0] * 8
        if values:
            numbers = [statistics.fmean(values), statistics.pstdev(values), min(values), max(values)]
            newest = float(batch.minute[with_number[-1]])
            weights = [math.exp((float(batch.minute[s]) - newest) / (12 * 60)) for s in with_number]
            recent = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
            numbers += [of_set(with_number[0]), of_set(with_number[-1]), recent, 1.0]
        features[code] = [*numbers, math.log1p(len(course)), math.log1p(max(hours)), math.log1p(min(hours))]
    return features


def decode(model: SeqSetVAE, h: Tensor, count: int) -> Tensor:
    decoder = model.decoder
    rows = []
    for position in sinusoids(torch.arange(count), model.config.width, LONGEST_POSITION_PERIOD):
        gate = decoder.gate(h) + decoder.seed(position)
        rows += [decoder.joint(gate * torch.sigmoid(gate) * decoder.value(h))]
    y = torch.stack(rows)
    for block in decoder.blocks:
        y = y + isab(block, y)
    dense = decoder.feed_forward
    return decoder.output(y + dense.contract(F.relu(dense.expand(decoder.norm(y)))))


def decoded_distances(target: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chamfer sums of direction, magnitude and squared L2 of one set, pair by pair."""

    def direction(t: Tensor, y: Tensor) -> Tensor:
        return 1 - (t @ y) / (t.norm().clamp_min(1e-6) * y.norm().clamp_min(1e-6))

    def magnitude(t: Tensor, y: Tensor) -> Tensor:
        return (t.norm() - y.norm()).abs()

    def squared(t: Tensor, y: Tensor) -> Tensor:
        return (t - y).square().sum()

    sums = []
    for distance in (direction, magnitude, squared):
        forth = sum(min(distance(t, y) for y in output) for t in target)
        back = sum(min(distance(t, y) for t in target) for y in output)
        sums.append(forth + back)
    return sums[0], sums[1], sums[2]


def total_loss(model: SeqSetVAE, batch: PatientBatch, options: LossOptions, beta: float) -> Tensor:
    """The loss of a batch, a global sum by a global count for each part."""
    results = [patient(model, batch, b) for b in range(batch.num_patients)]
    reconstruction = torch.stack(
        [DIRECTION_WEIGHT * r.direction + MAGNITUDE_WEIGHT * r.magnitude + SQUARED_WEIGHT * r.squared for r in results]
    ).sum()
    kl = torch.zeros(())
    for result in results:
        for m, v in zip(result.mu, result.logvar, strict=True):
            for d in range(len(m)):
                kl = kl + (0.5 * (v[d].exp() + m[d] ** 2 - 1 - v[d])).clamp_min(options.free_bits)
    labelled = [(r.logits, int(label)) for r, label in zip(results, batch.label, strict=True) if label >= 0]
    crossed = torch.stack([-torch.log_softmax(logits, 1)[:, label].mean() for logits, label in labelled]).sum()
    return options.effective_vae_weight * (
        reconstruction / batch.num_events + beta * kl / batch.num_sets
    ) + options.effective_outcome_weight * crossed / len(labelled)
