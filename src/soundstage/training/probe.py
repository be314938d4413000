"""Whose gradient it is: norms by term, modality and noise level, taken at the steps of `probe_every`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def gradients(
    terms: Mapping[str, Tensor], parameters: Sequence[Tensor], weight: Callable[[str], float]
) -> dict[str, float]:
    """Numbers to log of the terms and reports that have a graph; one backward pass each, and the graph stays.

    "grad_norm/NAME": the norm of the gradient of a term, or of the mean of a report that has values, without its
    weight. "grad_share/NAME": of each term, its weighted norm over the sum of those of all terms; a term's norm can be
    large and its share small where its weight is.
    """
    norms = {}
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        if term.ndim == 0:
            norms[name] = _norm(term, parameters)
        elif term.numel() == 2 and float(term[1].detach()) > 0:
            norms[name] = _norm(term[0] / term[1].detach(), parameters)
    pulls = {name: abs(weight(name)) * norm for name, norm in norms.items() if terms[name].ndim == 0}
    whole = sum(pulls.values())
    shares = {f"grad_share/{name}": pull / whole for name, pull in pulls.items()} if whole > 0 else {}
    return {f"grad_norm/{name}": norm for name, norm in norms.items()} | shares


def _norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    there = [gradient for gradient in found if gradient is not None]
    return float(torch.stack(torch._foreach_norm(there)).norm()) if there else 0.0
