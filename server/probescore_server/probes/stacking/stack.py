"""Computes many networks on the same rows at once: their first layers as one matrix product, later layers as a batch of products.

Networks that begin with the same layer, such as features of one sparse autoencoder, compute this layer once. All numbers are float32, on
one device, such as ``cuda:0``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from probescore_server.probes.stacking.expressions import Apply, Constant, Expression, takes_whole_rows
from probescore_server.probes.stacking.layered_network import Layer

MAX_INNER_NUMBERS = 1 << 23
"""Limits how many numbers between the layers of stacked networks are held at once, 32 MiB; longer inputs are computed in pieces."""

Layers = tuple[Layer, ...]


@dataclass(frozen=True, eq=False)
class Stack:
    """Set of networks that read the same rows and are computed together; ``stack_networks`` makes a stack.

    Attributes:
        labels: number of labels of each network.
        parts: batches of networks, each of which is computed at once.
        members: for each part the numbers of its networks, in the order of the part.
    """

    labels: tuple[int, ...]
    parts: tuple[_BatchedNetworks | _SharedFirstLayer, ...]
    members: tuple[tuple[int, ...], ...]

    def select(self, networks: Sequence[int]) -> Stack:
        """Returns a stack (networks that are computed together) of some of this stack's networks, in the order given."""
        if list(networks) == list(range(len(self.labels))):
            return self
        parts, members = [], []
        for part, known in zip(self.parts, self.members, strict=True):
            numbers = {network: number for number, network in enumerate(known)}
            places = [place for place, network in enumerate(networks) if network in numbers]
            if places:
                parts.append(part.select([numbers[networks[place]] for place in places]))
                members.append(tuple(places))
        return Stack(tuple(self.labels[network] for network in networks), tuple(parts), tuple(members))

    def score(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        """Computes the scores of all networks for some rows, in pieces of bounded size.

        Args:
            rows: activations, ``(n, width)`` float32.
            into: receives the scores, network after network, ``(n, sum of labels)`` float32 on the same device.
        """
        step = max(1, MAX_INNER_NUMBERS // self.inner_numbers)
        with _full_precision():
            for first in range(0, len(rows), step):
                into[first : first + step] = self(rows[first : first + step])

    @torch.inference_mode()
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Computes the scores of all networks of a stack, ``(n, sum of labels)``, from activations ``(n, width)``."""
        if len(self.parts) == 1 and list(self.members[0]) == list(range(len(self.labels))):
            return self.parts[0](rows)
        scores = rows.new_empty((len(rows), sum(self.labels)))
        starts = np.cumsum((0, *self.labels))
        for part, members in zip(self.parts, self.members, strict=True):
            columns = np.concatenate([np.arange(starts[member], starts[member + 1]) for member in members])
            scores[:, torch.from_numpy(columns).to(rows.device)] = part(rows)
        return scores

    @property
    def inner_numbers(self) -> int:
        """Returns how many intermediate numbers the stacked networks compute for each row of activations, in all their layers together."""
        return sum(part.inner_numbers for part in self.parts)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields every tensor that the stacked networks hold on their device, such as ``cuda:0``."""
        for part in self.parts:
            yield from part.tensors()


@dataclass(frozen=True, eq=False)
class _BatchedLayer:
    """One layer of P networks, computed as a batch: ``weight (P, out, in)``, ``bias (P, out)``, and each constant ``(P, out)``."""

    weight: torch.Tensor
    bias: torch.Tensor
    constants: tuple[torch.Tensor, ...]
    activation: Expression

    @classmethod
    def of(cls, layers: Sequence[Layer], device: torch.device) -> _BatchedLayer:
        def stacked(arrays: Sequence[NDArray[np.float32]]) -> torch.Tensor:
            return torch.from_numpy(np.stack(arrays)).to(device)

        return cls(
            stacked([layer.weight for layer in layers]),
            stacked([layer.bias for layer in layers]),
            tuple(map(stacked, zip(*(layer.constants for layer in layers), strict=True))),
            layers[0].activation,
        )

    def select(self, indices: torch.Tensor) -> _BatchedLayer:
        constants = tuple(constant[indices] for constant in self.constants)
        return replace(self, weight=self.weight[indices], bias=self.bias[indices], constants=constants)

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Applies a first layer, in which all networks read the same rows: ``(n, in)`` to ``(n, P, out)``."""
        products = torch.addmm(self.bias.flatten(), rows, self.weight.flatten(0, 1).T)
        return self._activated(products.view(len(rows), *self.bias.shape))

    def of_each(self, values: torch.Tensor) -> torch.Tensor:
        """Applies a later layer, in which each network reads its own values: ``(n, P, in)`` to ``(n, P, out)``."""
        products = torch.baddbmm(self.bias[:, None], values.transpose(0, 1), self.weight.transpose(1, 2))
        return self._activated(products.transpose(0, 1))

    def _activated(self, values: torch.Tensor) -> torch.Tensor:
        return evaluate(self.activation, values, self.constants, {})


@dataclass(frozen=True, eq=False)
class _BatchedNetworks:
    """Set of probes' networks whose layers have the same shapes and activation functions, computed as one batch."""

    layers: tuple[_BatchedLayer, ...]

    @classmethod
    def of(cls, networks: Sequence[Layers], device: torch.device) -> _BatchedNetworks:
        return cls(tuple(_BatchedLayer.of(layers, device) for layers in zip(*networks, strict=True)))

    def select(self, networks: Sequence[int]) -> _BatchedNetworks:
        indices = torch.tensor(networks, device=self.layers[0].weight.device)
        return _BatchedNetworks(tuple(layer.select(indices) for layer in self.layers))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        values = self.layers[0].of_rows(rows)
        for layer in self.layers[1:]:
            values = layer.of_each(values)
        return values.flatten(1)

    @property
    def inner_numbers(self) -> int:
        # the products, the activation's result, and one intermediate result
        return 3 * max(layer.bias.numel() for layer in self.layers)

    def tensors(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            yield from (layer.weight, layer.bias, *layer.constants)


@dataclass(frozen=True, eq=False)
class _SharedFirstLayer:
    """Set of probes' networks that begin with the same layer, which is computed once for all of them."""

    first: _BatchedNetworks
    rest: Stack

    def select(self, networks: Sequence[int]) -> _SharedFirstLayer:
        return replace(self, rest=self.rest.select(networks))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(rows))

    @property
    def inner_numbers(self) -> int:
        return self.first.inner_numbers + self.rest.inner_numbers

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.first.tensors()
        yield from self.rest.tensors()


# ------------------------------------------------------------------------------------------------------------------------ building


def stack_networks(networks: Sequence[Layers], device: torch.device) -> Stack:
    """Makes a stack (networks that are computed together) of networks of the same input width, on a device; the networks keep
    their order.
    """
    parts: list[_BatchedNetworks | _SharedFirstLayer] = []
    members: list[tuple[int, ...]] = []
    alone = []
    for group in _grouped(networks, _first_layer):
        if len(group) > 1 and _sharing_pays([networks[member] for member in group]):
            parts.append(_shared([networks[member] for member in group], device))
            members.append(tuple(group))
        else:
            alone += group
    alone.sort()
    pruned = [_pruned(networks[member]) for member in alone]
    for group in _grouped(pruned, _shape):
        parts.append(_BatchedNetworks.of([pruned[number] for number in group], device))
        members.append(tuple(alone[number] for number in group))
    return Stack(tuple(len(layers[-1].bias) for layers in networks), tuple(parts), tuple(members))


def _grouped(networks: Sequence[Layers], key: Callable[[Layers], object]) -> list[list[int]]:
    groups: dict[object, list[int]] = defaultdict(list)
    for number, layers in enumerate(networks):
        groups[key(layers)].append(number)
    return [*groups.values()]


def _first_layer(layers: Layers) -> object:
    """Returns a key that is equal for networks with the same first layer, or ``None`` for a network of one layer."""
    first = layers[0]
    if len(layers) == 1:
        return None
    digest = hashlib.sha256()
    for array in (first.weight, first.bias, *first.constants):
        digest.update(array.data)
    return first.activation, first.weight.shape, digest.digest()


def _shape(layers: Layers) -> object:
    return tuple((layer.weight.shape, layer.activation) for layer in layers)


def _used(layers: Layers) -> NDArray[np.bool_]:
    """Returns which results of a network's first layer the second layer reads, ``(out,)`` bool, so that the others need not be computed."""
    if takes_whole_rows(layers[0].activation):
        return np.ones(len(layers[0].bias), np.bool_)
    used = (layers[1].weight != 0).any(axis=0)
    used[0] |= not used.any()  # a layer has at least one result
    return np.asarray(used)


def _sharing_pays(networks: Sequence[Layers]) -> bool:
    """Returns whether it takes fewer multiplications to compute a shared first layer once than to compute it for each network.

    In the second case, each network computes only those results of the layer that the network reads.
    """
    if len(networks[0]) == 1:
        return False
    used = [_used(layers) for layers in networks]
    inputs, outputs = networks[0][0].weight.shape[1], [len(layers[1].bias) for layers in networks]
    apart = sum(int(mine.sum()) * (inputs + own) for mine, own in zip(used, outputs, strict=True))
    return bool(np.logical_or.reduce(used).sum() * (inputs + sum(outputs)) < apart)


def _shared(networks: Sequence[Layers], device: torch.device) -> _SharedFirstLayer:
    used = np.logical_or.reduce([_used(layers) for layers in networks])
    narrowed = [_narrowed(layers, used) for layers in networks]
    return _SharedFirstLayer(_BatchedNetworks.of([narrowed[0][:1]], device), stack_networks([layers[1:] for layers in narrowed], device))


def _narrowed(layers: Layers, used: NDArray[np.bool_]) -> Layers:
    """Returns a network without those results of its first layer that are not used."""
    if used.all():
        return layers
    first, second = layers[0], layers[1]
    constants = tuple(constant[used] for constant in first.constants)
    first = replace(first, weight=first.weight[used], bias=first.bias[used], constants=constants)
    return (first, replace(second, weight=np.ascontiguousarray(second.weight[:, used])), *layers[2:])


def _pruned(layers: Layers) -> Layers:
    """Returns a network without those results of each layer that no later layer reads."""
    if len(layers) == 1:
        return layers
    later = (layers[0], *_pruned(layers[1:]))
    return _narrowed(later, _used(later))


# ----------------------------------------------------------------------------------------------------------------------- computing


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keeps matrix products in full float32 within the context, without TF32 or bfloat16, whatever the process has set elsewhere."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def evaluate(
    expression: Expression, values: torch.Tensor, constants: Sequence[torch.Tensor], known: dict[Expression, torch.Tensor]
) -> torch.Tensor:
    """Evaluates an activation expression for values ``(…, width)``.

    Args:
        expression: the expression, with ``values`` as its input.
        values: results of an affine map.
        constants: constants, indexed by their numbers; each broadcasts against ``values``.
        known: results that are already computed, a dictionary keyed by expression, so that an expression that occurs twice is computed
            once.
    """
    if isinstance(expression, Apply):
        if expression not in known:
            arguments = [evaluate(argument, values, constants, known) for argument in expression.arguments]
            known[expression] = (
                _among_largest(arguments[0], expression.k) if expression.operator == "TopK" else _TORCH[expression.operator](*arguments)
            )
        return known[expression]
    return constants[int(expression.name)] if isinstance(expression, Constant) else values


def _among_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Returns which numbers are among the ``k`` largest of their row, as bool.

    Of several equal numbers, the first ones count. ONNX defines this order, and ``torch.topk`` does not follow it.
    """
    smallest = values.topk(k, dim=-1, sorted=True).values[..., -1:]
    above, equal = values > smallest, values == smallest
    room = k - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))


_TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Erf": torch.erf,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softplus": torch.nn.functional.softplus,
    "LeakyRelu": lambda x, alpha: torch.where(x < 0, alpha * x, x),
    "Elu": lambda x, alpha: torch.where(x < 0, alpha * torch.expm1(x), x),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Where": torch.where,
    "Cast": lambda condition: condition.to(torch.float32),
}
