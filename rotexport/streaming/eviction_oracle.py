"""Eviction from its definition, in float64: what HeavyHitterAttention and SnapAttention are tested against.

One row is read call by call, because choosing happens once per call. For each key head there is a set of
tokens j >= sinks that are still held. In a call that ends before position `end`, a query at i sees the
sinks, and those held or of the call with j <= i and i - j < context. Then score(j) grows by what j drew of
attention, and of all these tokens stay: none with end - j >= context; the `recent` newest; of the others, as
many as there is room for, those of the largest score(j) |v_j|, the newer of equals.

    heavy-hitter   score(j) = sum over queries i >= j of forget^(end - 1 - i) a(i, j), all calls
    snapkv         score(j) = mean over j - 2 ... j + 2 of the sum over the last `observe` queries of a(i, j),
                   in the first call only; 0 for later tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rotexport.streaming.eviction import Eviction
from rotexport.streaming.oracle import Definition, Row, Tensor

AROUND = 2  # tokens on each side that share a score (snapkv)


@dataclass(frozen=True)
class Evicted:
    """What came out: the output [Hq, N, Dv], and the scores of held tokens by position, for each key head."""

    output: Tensor
    held: list[dict[int, float]]


def evict(definition: Definition, policy: Eviction, row: Row, calls: list[int], decay: Tensor) -> Evicted:
    """Read one row of N tokens in calls of the given sizes."""
    outputs, held = [], []
    repeat = row.query.shape[0] // row.key.shape[0]
    for head in range(row.key.shape[0]):
        own = slice(head * repeat, (head + 1) * repeat)
        part = Row(row.query[own], row.query_sink[own], row.key[head : head + 1], row.value[head : head + 1])
        reader = _Head(definition, policy, part, decay[own])
        start = 0
        for size in calls:
            reader.call(start, start + size)
            start += size
        outputs.append(reader.output)
        held.append(reader.scores)
    return Evicted(torch.cat(outputs), held)


class _Head:
    """One key head and the queries of its group."""

    def __init__(self, definition: Definition, policy: Eviction, row: Row, decay: Tensor) -> None:
        self.definition, self.policy, self.decay = definition, policy, decay.double()
        self.query, self.query_sink = row.query.double(), row.query_sink.double()
        self.key, self.value = row.key[0].double(), row.value[0].double()
        self.scores: dict[int, float] = {}
        self.output = torch.zeros(*row.query.shape[:2], row.value.shape[2], dtype=torch.float64)

    def call(self, start: int, end: int) -> None:
        """Attend from tokens start ... end - 1, then choose what stays."""
        sinks = self.definition.sinks
        fresh = range(max(start, sinks), end)
        tokens = [*self.scores, *fresh]
        drawn = dict.fromkeys(tokens, 0.0)
        for i in range(start, end):
            for j, weight in self._attend(i, tokens).items():
                drawn[j] += weight * self._importance(i, start, end)
        if self.policy.policy == "snapkv":
            drawn |= {j: _mean([drawn[k] for k in fresh if abs(k - j) <= AROUND]) for j in fresh}
        memory = self.policy.forget ** (end - start) if self.policy.policy == "heavy-hitter" else 1.0
        scores = {j: self.scores.get(j, 0.0) * memory + drawn[j] for j in tokens}
        self.scores = {j: scores[j] for j in self._chosen(scores, end)}

    def _attend(self, i: int, tokens: list[int]) -> dict[int, float]:
        """Write the outputs at position i; return the weights of its tokens, summed over the group."""
        d = self.definition
        near = [j for j in tokens if j <= i and i - j < (self.policy.context or 0)]
        sinks = [j for j in range(d.sinks) if j <= i]
        weights = dict.fromkeys(near, 0.0)
        for head in range(self.query.shape[0]):
            logits = [self._bounded(self.query_sink[head, i] @ self.key[j]) for j in sinks]
            logits += [
                self._bounded(self.query[head, i] @ self.key[j]) - self.decay[head] * (i - j) for j in near
            ]
            share = torch.stack(logits).softmax(0)
            self.output[head, i] = share @ self.value[[*sinks, *near]]
            for j, weight in zip(near, share[len(sinks) :], strict=True):
                weights[j] += float(weight)
        return weights

    def _bounded(self, product: Tensor) -> Tensor:
        logit, cap = self.definition.scale * product, self.definition.softcap
        return cap * torch.tanh(logit / cap) if cap > 0 else logit

    def _importance(self, i: int, start: int, end: int) -> float:
        if self.policy.policy == "heavy-hitter":
            return float(self.policy.forget ** (end - 1 - i))
        return float(start == 0 and end - i <= self.policy.observe)

    def _chosen(self, scores: dict[int, float], end: int) -> list[int]:
        usable = [j for j in scores if end - j < (self.policy.context or 0)]
        recent = [j for j in usable if end - j <= self.policy.recent]
        others = [j for j in usable if end - j > self.policy.recent]
        worth = {j: scores[j] * float(self.value[j].norm()) for j in others}
        others.sort(key=lambda j: (-worth[j], -j))
        return sorted(recent + others[: self.definition.window - len(recent)], reverse=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
