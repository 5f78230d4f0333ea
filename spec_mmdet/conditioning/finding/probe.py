"""Find the layout of an unknown attention module by experiment.

With its keys at zero, the output of any attention does not depend on its queries; with its values at zero, it depends
on neither. So a random copy of the module is run in double precision with the assumed keys (or values) at zero, and
autograd shows on which rows the output depends. A layout with a single wrong row shows a dependence that should not
exist.
"""

from __future__ import annotations

import copy
import math
import re
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .layouts import BY_GROUP, BY_ROLE, GATED, fit_template
from .names import NamedLayer
from .rows import Layout, RowSelection
from .running import Call, make_calls

_POSITIONS = re.compile('rel_|_rel|pos')

# Gradients below this part of the largest count as zero: they are exact but for sums in a different order.
_TOLERANCE = 1e-9


def probe_layouts(
    attention: nn.Module, layers: list[NamedLayer], call: Call | None = None
) -> tuple[tuple[Layout, ...], bool] | None:
    """Find the layouts that an attention module's behaviour confirms: by role, by head, by group, or with a gate.

    The module is called with ``call``, in double precision, or else with random tokens.

    Returns:
        The layout of each layer, and whether the heads are confirmed, too; None if the module does not run on the
        inputs, or no layout is confirmed.
    """
    candidates = dict.fromkeys(
        layouts for template in (BY_ROLE, BY_GROUP, GATED) for layouts in fit_template(template, attention, layers)
    )
    probe = start_probe(attention, layers, call)
    confirmed = [layouts for layouts in candidates if probe.confirms(layouts)] if probe else []
    by_heads = [layouts for layouts in confirmed if probe.confirms_heads(layouts)]
    return ((by_heads or confirmed)[0], bool(by_heads)) if confirmed else None


def start_probe(attention: nn.Module, layers: list[NamedLayer], call: Call | None = None) -> Probe | None:
    """Make a probe of a module and the first inputs that it runs on; None if there are none."""
    try:
        probe = Probe(attention, layers)
    except Exception:  # a module may contain anything
        return None
    calls = (
        [_replace_tokens(call, layers)] if call else make_calls(attention, layers[0].shape[1], torch.zeros(0).double())
    )
    for inputs in calls:
        with suppress(Exception):  # the module may not take these inputs
            probe.begin(inputs)
            return probe
    return None


class Probe:
    """A random copy of an attention module in double precision, whose projections can be set to zero."""

    def __init__(self, attention: nn.Module, layers: list[NamedLayer]) -> None:
        self.attention, self.layers = copy.deepcopy(attention), layers
        if any(parameter.is_meta for parameter in attention.parameters()):
            self.attention.to_empty(device='cpu')  # its values are not used
        self.attention.cpu().double()
        self.attention.eval()
        generator = torch.Generator().manual_seed(0)
        self.parameters = {}
        for name, parameter in self.attention.named_parameters(remove_duplicate=False):
            value = torch.zeros_like(parameter)
            if parameter.ndim > 1 and _POSITIONS.search(name):
                pass  # relative positions can act as further keys
            elif parameter.ndim > 1:
                value.normal_(generator=generator).div_(math.sqrt(parameter[0].numel()))
            elif not name.endswith('bias'):
                value.uniform_(0.5, 1.5, generator=generator)
            self.parameters[name] = value
        for module in self.attention.modules():
            if hasattr(module, 'reset_running_stats'):
                module.reset_running_stats()
        # Two draws, because the role of the values shows only when queries and keys change. A few columns suffice.
        self.rows, self.others = (
            [torch.randn(x.shape[0], min(x.shape[1], 8), generator=generator).double() / 8**0.5 for x in layers]
            for _ in range(2)
        )

    def begin(self, call: Call) -> None:
        """Use these inputs from here on; errors of the module on them are raised."""
        self.args, self.kwargs = call
        self.cotangent: Tensor | None = None
        self.signs = [1]
        self.largest = max(grad.abs().max().item() for grad in self._gradients(self.rows))
        if not self._depends().all():
            self.signs = [1, -1]  # a ReLU behind the attention may have left nothing of some values
        self.matters = self._depends()
        # With all projections at zero, softmax attention averages the values: the output depends only on these.
        self.at_zero = self._differ(self._gradients([torch.zeros_like(x) for x in self.rows]))

    @torch.enable_grad()
    def _gradients(self, rows: list[Tensor]) -> list[Tensor]:
        """Gradients of a random sum of the output with respect to each layer's rows, at these values of the rows."""
        leaves, parameters = [x.clone().requires_grad_() for x in rows], dict(self.parameters)
        for leaf, layer in zip(leaves, self.layers):
            rows = nn.functional.pad(leaf, (0, layer.shape[1] - leaf.shape[1]))
            selection = RowSelection(layer.roles, transposed=layer.transposed)
            parameters[layer.parameter] = selection.put(rows, self.parameters[layer.parameter])
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = torch.func.functional_call(self.attention, parameters, args, kwargs)
        out = next(x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad)
        if self.cotangent is None:
            self.cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found = torch.autograd.grad((out * self.cotangent).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]

    def _depends(self, zero: list[Tensor] | None = None, change: list[Tensor] | None = None) -> Tensor:
        """Return whether the output depends on each row, for the concatenated rows of all layers.

        Args:
            zero: for each layer, a mask of rows to set to zero.
            change: for each layer, a mask of rows to change: does this affect how the output depends on each row?
        """
        found = torch.zeros(sum(len(rows) for rows in self.rows), dtype=torch.bool)
        for sign in self.signs:
            rows = [sign * x for x in self.rows]
            if zero is not None:
                rows = [x.masked_fill(at[:, None], 0) for x, at in zip(rows, zero)]
            gradients = self._gradients(rows)
            if change is not None:
                rows = [torch.where(at[:, None], other, x) for x, other, at in zip(rows, self.others, change)]
                gradients = [after - before for after, before in zip(self._gradients(rows), gradients)]
            found |= self._differ(gradients)
        return found

    def _differ(self, gradients: list[Tensor]) -> Tensor:
        return torch.cat([grad.abs().amax(1) for grad in gradients]) > _TOLERANCE * self.largest

    def confirms(self, layouts: tuple[Layout, ...]) -> bool:
        """Return whether these layouts describe the rows of queries, keys and values correctly."""
        role, _ = _spread(layouts)
        whole, split = torch.cat(role), [role_ == 1 for role_ in role]
        Q, K, V, other = (whole == i for i in range(4))
        if not self.matters[~other].all():
            return False
        if self.at_zero.any() and not torch.equal(self.at_zero[~other], V[~other]):
            return False
        without_K = self._depends(split)
        if without_K[Q].any() or not without_K[other].all():
            return False
        without_V = self._depends([role_ == 2 for role_ in role])
        if without_V[Q | K].any():
            return False
        # The values take part through the attention's weights; rows that do not belong to another branch.
        return bool(self._depends(change=[x <= 1 for x in role])[V].all())

    def confirms_heads(self, layouts: tuple[Layout, ...]) -> bool:
        """Return whether the layouts assign rows to heads correctly, given that the roles are confirmed."""
        role, head = _spread(layouts)
        Q = torch.cat(role) == 0
        counts = [max(int(h[r == i].max()) + 1 for r, h in zip(role, head) if (r == i).any()) for i in range(3)]
        share = counts[0] // counts[1]
        of_query = torch.cat(head)[Q] // share
        # Keep the heads of keys whose number has this bit: the output must depend only on their queries.
        for bit in range((counts[1] - 1).bit_length()):
            expected = (of_query >> bit & 1) == 1
            of_keys, of_values = (
                self._depends([(r == i) & (h >> bit & 1 == 0) for r, h in zip(role, head)])[Q] for i in (1, 2)
            )
            # If the weights of heads are mixed (CaiT's talking heads), all heads depend on any value.
            if not torch.equal(of_keys, expected) or not (of_values.all() or torch.equal(of_values, expected)):
                return False
        return True


def _spread(layouts: tuple[Layout, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the index of the role in 'QKV-' and the number of the head, for the rows of each layer."""
    role, head, seen = [], [], dict.fromkeys('QKV-', 0)
    for layout in layouts:
        numbers = []
        for name, count in layout:
            numbers += [(('QKV-').index(name), seen[name])] * count
            seen[name] += 1
        role.append(torch.tensor([r for r, _ in numbers]))
        head.append(torch.tensor([h for _, h in numbers]))
    return role, head


def _replace_tokens(call: Call, layers: list[NamedLayer]) -> Call:
    """Replace the tokens of a recorded call by random ones: in a new model they can be too small or too similar."""
    generator = torch.Generator().manual_seed(2)
    widths = {layer.shape[1] for layer in layers}

    def replace(x: object) -> object:
        tokens = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and widths & {x.shape[-1], x.shape[1]}
        return torch.randn(x.shape, generator=generator).to(x) if tokens else x

    args, kwargs = call
    return tree_map(replace, args), {k: v if 'position' in k else tree_map(replace, v) for k, v in kwargs.items()}
