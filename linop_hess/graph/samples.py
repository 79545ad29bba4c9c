"""Which sample each element belongs to, so that states can be laid out sample after sample.

An element belongs to sample s where the loss reads it, by whatever way, in its term of sample s alone. Stages then fall into samples
wherever the network does (`lq.stages.base.Stage.samples`); what belongs to none, as a parameter does, only stands where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from linop_hess.graph.grouping import Group

_NONE = -1


def state_order(
    groups: Sequence[Group], parts: Sequence[int], ids: int, target: np.ndarray, samples: int
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Rank of each element in a state: sample after sample, else as they were computed.

    Parameters
    ----------
    groups : sequence of Group
    parts : sequence of int
        Into how many equal parts, in order, the stages of each group treat what they read and write by themselves.
    ids : int
        The largest element.
    target : ndarray of int
        What the loss reads, sample after sample.
    samples : int
        How many samples the loss falls into.

    Returns
    -------
    rank : ndarray of int, shape (ids + 2,)
    orders : list of ndarray of int or None
        For each group the order of its parts that makes them, too, stand sample after sample; None: they do.
    """
    rank = np.arange(ids + 2)
    orders: list[np.ndarray | None] = [None] * len(groups)
    if samples == 1:
        return rank, orders
    label = _by_first_axis(groups, ids, samples)
    if not _agree(groups, parts, label, target, samples):
        label = _by_use(groups, parts, ids, target, samples)
        orders = [_order_of_parts(group, count, label) for group, count in zip(groups, parts, strict=True)]
    rank[np.lexsort((rank, label))] = np.arange(ids + 2)
    return rank, orders


def _order_of_parts(group: Group, count: int, label: np.ndarray) -> np.ndarray | None:
    """The parts of a stage by the sample they write, where every node of the group has them alike."""
    of_parts = label[group.written].reshape(group.nodes.size, count, -1)
    first = of_parts[0, :, 0]
    alike = bool((of_parts == first[:, None]).all()) and bool((first != _NONE).all())
    return np.argsort(first, kind="stable") if alike and bool((np.diff(first) < 0).any()) else None


def _by_first_axis(groups: Sequence[Group], ids: int, samples: int) -> np.ndarray:
    """The usual case, guessed: outputs have samples as their first axis."""
    label = np.full(ids + 2, _NONE)
    for group in groups:
        size = group.outputs.shape[1]
        if size % samples == 0:
            label[group.outputs] = np.arange(size) // (size // samples)
    return label


def _agree(groups: Sequence[Group], parts: Sequence[int], label: np.ndarray, target: np.ndarray, samples: int) -> bool:
    """Whether each part of each stage reads and writes elements of one sample, and the loss reads each sample's."""
    if not np.array_equal(label[target], np.arange(target.size) // (target.size // samples)):
        return False
    for group, count in zip(groups, parts, strict=True):
        placement = group.placement
        K, written = group.nodes.size, label[group.written]
        both = [label[group.op.ids[:, placement.read]].reshape(K, count, -1), written.reshape(K, count, -1)]
        together = np.concatenate(both, 2)
        known = together != _NONE
        low = np.where(known, together, samples).min(2, initial=samples)
        high = together.max(2, initial=_NONE)
        if bool((low < high).any()):
            return False
    return True


def _by_use(groups: Sequence[Group], parts: Sequence[int], ids: int, target: np.ndarray, samples: int) -> np.ndarray:
    """From the loss backwards: what reads an element tells which samples it belongs to."""
    low, high = np.full(ids + 2, samples), np.full(ids + 2, _NONE)
    sample = np.arange(target.size) // (target.size // samples)
    np.minimum.at(low, target, sample)
    np.maximum.at(high, target, sample)
    where = [(int(node), g, k) for g, group in enumerate(groups) for k, node in enumerate(group.nodes)]
    reads = [group.op.ids[:, group.placement.read] for group in groups]
    writes = [group.written for group in groups]
    for _, g, k in sorted(where, reverse=True):
        count, read, written = parts[g], reads[g][k], writes[g][k]
        if read.size:
            each = read.size // count
            np.minimum.at(low, read, np.repeat(low[written].reshape(count, -1).min(1), each))
            np.maximum.at(high, read, np.repeat(high[written].reshape(count, -1).max(1), each))
    return np.where(low == high, low, _NONE)
