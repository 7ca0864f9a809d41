"""Fits probes that pool inside their ONNX graph, because a nonlinear function of the mean is not the mean of that function over tokens.

Each probe takes the activations of many rollouts and the offset of each rollout (``cu_seqlens``), and gives one score for each rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probescore.types import ScoreUnit
from probescore_probes.exporting import ProbeFunction, torch_probe
from probescore_probes.fitting.linear_kinds import Linear, Scaler

MLP, MEAN_OF_SIGMOIDS = POOLING_KINDS = ("mlp", "mean-of-sigmoids")
_UNITS = 64
_STEPS = 300
_DECAY = 0.1


class MeanMlp(nn.Module):
    """Torch module with one layer of hidden units over the standardised mean of a rollout's activations."""

    def __init__(self, scaler: Scaler) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(scaler.mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(scaler.deviation, dtype=torch.float32))
        self.hidden = nn.Linear(len(scaler.mean), _UNITS)
        self.output = nn.Linear(_UNITS, 1)

    def of_means(self, means: Tensor) -> Tensor:
        """Computes the perceptron's logits ``(rollouts,)`` from mean activations ``(rollouts, width)``."""
        scaled = (means - self.get_buffer("mean")) / self.get_buffer("deviation")
        return self.output(torch.nn.functional.gelu(self.hidden(scaled)))[:, 0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Computes the perceptron's logits ``(rollouts,)`` from the activations ``(tokens, width)`` of concatenated rollouts."""
        return self.of_means(means_of(x, cu_seqlens))


class MeanOfSigmoids(nn.Module):
    """Torch module that averages the probabilities of several logistic regressions, each of a rollout's mean activation at one tap (place
    in the model).
    """

    def __init__(self, probes: Sequence[Linear]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(np.stack([probe.weight for probe in probes]), dtype=torch.float32))
        self.register_buffer("biases", torch.tensor([probe.bias for probe in probes], dtype=torch.float32))

    def of_means(self, means: Sequence[Tensor]) -> Tensor:
        """Computes the probe's probabilities ``(rollouts,)`` from mean activations ``(rollouts, width)`` at each tap (place in
        the model).
        """
        weights, biases = self.get_buffer("weights"), self.get_buffer("biases")
        chances = [torch.sigmoid(rows @ weights[index] + biases[index]) for index, rows in enumerate(means)]
        return torch.stack(chances).mean(dim=0)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Computes the probe's probabilities ``(rollouts,)`` from activations ``(tokens, width)`` at each tap (place in the model),
        followed by ``cu_seqlens``, the offsets of the rollouts.
        """
        *taps, cu_seqlens = inputs
        return self.of_means([means_of(rows, cu_seqlens) for rows in taps])


def means_of(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Computes the mean activation of each rollout, ``(rollouts, width)``."""
    row = torch.arange(x.shape[0])
    member = ((row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])).to(x.dtype)
    return member @ x / member.sum(dim=1, keepdim=True)


def fit_mlp(rows: NDArray[np.float32], positive: NDArray[np.bool_], weights: NDArray[np.float64], seed: int = 0) -> MeanMlp:
    """Fits a ``MeanMlp``, a perceptron with one hidden layer, to mean activations ``(n, width)``.

    It trains in full batches, with weight decay instead of early stopping.
    """
    torch.manual_seed(seed)
    module = MeanMlp(Scaler.of(rows, weights))
    means = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    labels = torch.from_numpy(positive.astype(np.float32))
    counted = torch.from_numpy((weights / weights.mean()).astype(np.float32))
    loss_of = nn.BCEWithLogitsLoss(weight=counted)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=_DECAY)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        loss_of(module.of_means(means), labels).backward()
        optimiser.step()
    return module.eval()


def score_mlp(module: MeanMlp, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Computes logits ``(n,)`` of a ``MeanMlp`` perceptron from mean activations ``(n, width)``."""
    with torch.inference_mode():
        return module.of_means(torch.from_numpy(np.ascontiguousarray(rows, np.float32))).double().numpy()


def score_sigmoids(probes: Sequence[Linear], rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Computes probabilities ``(n,)`` of a ``MeanOfSigmoids`` from mean activations ``(n, width)`` at each tap (place in the model)."""
    with np.errstate(over="ignore"):
        chances = np.stack([1 / (1 + np.exp(-probe.score(means))) for probe, means in zip(probes, rows, strict=True)])
    mean: NDArray[np.float64] = chances.mean(axis=0)
    return mean


def mlp_function(module: MeanMlp) -> ProbeFunction:
    """Returns a ``MeanMlp`` (a perceptron over mean activations) as the function that is written into a probe file."""
    return torch_probe(module, unit=ScoreUnit.LOGIT)


def sigmoids_function(probes: Sequence[Linear]) -> ProbeFunction:
    """Returns a ``MeanOfSigmoids`` (an average of logistic regressions) as the function that is written into a probe file."""
    return torch_probe(MeanOfSigmoids(probes), unit=ScoreUnit.PROBABILITY)
