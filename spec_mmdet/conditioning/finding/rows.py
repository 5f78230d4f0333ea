"""Rows of a weight that are query, key and value projections, and the notation for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True)
class RowSelection:
    """Rows of one weight that hold projections of one shape."""

    roles: str  # the projections, for instance 'QKV', 'KV' or 'Q'
    heads: int | None = None  # number of heads of each of them; None if unknown
    index: tuple[int, ...] | None = None  # their rows, by projection and head; None for all rows in the stored order
    transposed: bool = False  # whether the rows are the weight's last dimension, as in transformers' Conv1D

    def take(self, weight: Tensor) -> Tensor:
        """The projections one below the other, shape (projections * D, k), of a weight as its layer stores it."""
        rows = weight.flatten(1)  # 1 x 1 convolutions have more dimensions
        rows = rows.mT if self.transposed else rows
        return rows if self.index is None else rows[torch.tensor(self.index, device=weight.device)]

    def put(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Inverse of :meth:`take`: a tensor in the form of ``weight``, with zeros in all other rows."""
        if self.index is not None:
            outputs = weight.shape[-1 if self.transposed else 0]
            index = torch.tensor(self.index, device=weight.device)
            rows = rows.new_zeros(outputs, rows.shape[1]).index_copy(0, index, rows)
        return (rows.mT if self.transposed else rows).reshape(weight.shape)


# A layout: the blocks of rows of a weight, in order; each a role 'Q', 'K' or 'V', or '-' for other rows, and its number
# of rows. Each block belongs to one head.
Layout = tuple[tuple[str, int], ...]


def parse_layout(text: str) -> Layout:
    """Parse a layout in the notation of users.

    A block of rows is a role (q, k, v, or - for other rows) and its number of rows. A number before a block, or before
    a group in parentheses, repeats it. Each block belongs to one head. For instance, with two heads:

        '2q32 2k32 2v32'     all of Q, then all of K, then all of V: as in timm's ViT
        '2(q16 k16 v64)'     head by head: as in GPT-NeoX and TinyViT
        '2(4q64 k64 v64)'    eight heads of queries that share two of keys and values
        '2(q64 -64)'         each head's queries and then a gate

    Raises:
        InputError: if the text does not follow this notation.
    """
    blocks: list[tuple[str, int]] = []
    rest = text.strip()
    while rest:
        item = re.match(r'(\d*)(?:([qkv-])(\d+)(?=\s|$)|\()', rest, re.IGNORECASE)
        if item is None:
            raise InputError(f"layout {text!r} cannot be read at {rest!r}; write for instance '8q32 8k32 8v32'")
        times, end = int(item[1] or 1), item.end()
        if item[2]:
            inner: Layout = ((item[2].upper(), int(item[3])),)
        else:
            depth = 1
            while depth and end < len(rest):
                depth += {'(': 1, ')': -1}.get(rest[end], 0)
                end += 1
            if depth:
                raise InputError(f'layout {text!r}: a parenthesis is not closed')
            inner = parse_layout(rest[item.end() : end - 1])
        blocks += times * inner
        rest = rest[end:].strip()
    return tuple(blocks)


def select_rows(layout: Layout, transposed: bool = False) -> list[RowSelection]:
    """Select the rows of a layout, projections of one shape together, in the order Q, K, V.

    Raises:
        InputError: if one role's blocks have different numbers of rows.
    """
    rows: dict[str, list[range]] = {}
    start = 0
    for role, count in layout:
        rows.setdefault(role, []).append(range(start, start + count))
        start += count
    rows.pop('-', None)
    by_shape: dict[tuple[int, int], str] = {}
    for role in sorted(rows, key='QKV'.index):
        if len({len(block) for block in rows[role]}) > 1:
            raise InputError(f'the heads of {role} have different numbers of rows: {[len(b) for b in rows[role]]}')
        shape = len(rows[role]), len(rows[role][0])
        by_shape[shape] = by_shape.get(shape, '') + role
    found = []
    for (heads, _), roles in by_shape.items():
        index: tuple[int, ...] | None = tuple(row for role in roles for block in rows[role] for row in block)
        if index == tuple(range(start)):
            index = None
        found.append(RowSelection(roles, heads, index, transposed))
    return found
