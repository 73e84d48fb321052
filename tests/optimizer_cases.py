"""Optimizers to try a cut with: all of pytorch-optimizer, torch.optim and schedulefree, and how a test builds and steps them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import schedulefree
import torch
from torch import nn

Build = Callable[[nn.Module], Any]

# a large eps, so that rounding in tiny gradients is not blown up to whole steps
_EPS = {"eps": 1e-2}
TORCH: dict[str, Build] = {
    "torch Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.1),
    "torch Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-3),
    "torch Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-3, eps=1e-2),
    "torch Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, amsgrad=True, eps=1e-2),
    "torch AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True, eps=1e-2),
    "torch Adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=1e-3, eps=1e-2),
    "torch ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=1e-2),
    "torch Muon": lambda m: [
        torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-3),
        torch.optim.AdamW([p for p in m.parameters() if p.dim() != 2], lr=1e-3, eps=1e-2),
    ],
    "torch NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3, eps=1e-2),
    "torch RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=1e-3, eps=1e-2),
    "torch RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True, eps=1e-2),
    "torch Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-4),
    "torch SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "schedulefree AdamW": lambda m: schedulefree.AdamWScheduleFree(m.parameters(), lr=1e-3, eps=1e-2),
    "schedulefree SGD": lambda m: schedulefree.SGDScheduleFree(m.parameters(), lr=1e-2),
    "schedulefree RAdam": lambda m: schedulefree.RAdamScheduleFree(m.parameters(), lr=1e-3, eps=1e-2),
    "schedulefree wrapper": lambda m: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(m.parameters(), lr=1e-2)),
    "Lookahead": lambda m: pytorch_optimizer.Lookahead(
        torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9), k=2, pullback_momentum="pullback"
    ),
    "SAM": lambda m: pytorch_optimizer.SAM(m.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.9),
    "WSAM": lambda m: pytorch_optimizer.WSAM(m, m.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.9),
    "LookSAM": lambda m: pytorch_optimizer.LookSAM(m.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.9),
    "TRAC": lambda m: pytorch_optimizer.TRAC(torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-2), s_prev=1.0),
    "OrthoGrad": lambda m: pytorch_optimizer.OrthoGrad(torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-2)),
    "PCGrad": lambda m: pytorch_optimizer.PCGrad(torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-2)),
}
_FIRST = {f"dadapt{kind}": {"d0": 1e-3} for kind in ("adagrad", "adam", "adan", "lion", "sgd")}
# without these, next to nothing moves in a few steps
OPTIONS: dict[str, dict[str, Any]] = {
    **_FIRST,
    "adamg": {"lr": 1.0},
    "adamod": {"lr": 1e-2, "beta3": 0.5},
    "adashift": {"keep_num": 2},
    "lars": {"lr": 1.0},
    "prodigy": {"d0": 1e-3},
}
# made with the model, or with a rank, or in a way of their own
_BY_HAND: dict[str, Build] = {
    "adammini": lambda m: pytorch_optimizer.AdamMini(m, lr=1e-3, num_embeds=16, num_heads=4, num_query_groups=2),
    "lomo": lambda m: pytorch_optimizer.LOMO(m, lr=1e-2),
    "adalomo": lambda m: pytorch_optimizer.AdaLOMO(m, lr=1e-3, loss_scale=1.0),
    "magma": lambda m: pytorch_optimizer.Magma(torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-2)),
    "bsam": lambda m: pytorch_optimizer.BSAM(m.parameters(), num_data=8, lr=1e-3),
    "galore": lambda m: pytorch_optimizer.GaLore(
        [
            {
                "params": [p for p in m.parameters() if p.dim() == 2],
                "rank": 4,
                "update_proj_gap": 2,
                "scale": 1.0,
                "projection_type": "std",
            }
        ],
        lr=1e-3,
    ),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    "demo": lambda m: pytorch_optimizer.DeMo(m.parameters(), lr=1e-3),
    "spectralsphere": lambda m: pytorch_optimizer.SpectralSphere([p for p in m.parameters() if p.dim() == 2], lr=1e-3),
    "scalableshampoo": lambda m: pytorch_optimizer.ScalableShampoo(
        m.parameters(), lr=1e-3, start_preconditioning_step=1, preconditioning_compute_steps=1
    ),
}


def _from_collection(name: str) -> Build:
    kind: Any = pytorch_optimizer.load_optimizer(name)

    def build(model: nn.Module) -> Any:
        parameters = list(model.parameters())
        split = [
            {"params": [p for p in parameters if p.dim() == 2], "use_muon": True},
            {"params": [p for p in parameters if p.dim() != 2], "use_muon": False},
        ]
        for given, options in (
            *([(parameters, OPTIONS[name])] if name in OPTIONS else ()),
            (parameters, {"lr": 1e-3, **_EPS}),
            (parameters, {"lr": 1e-3}),
            (parameters, {}),
            (parameters, {"lr": 1e-3, "num_iterations": 20}),
            (split, {"lr": 1e-3}),
        ):
            try:
                return kind(given, **options)
            except (TypeError, RuntimeError, KeyError, ValueError):
                continue
        raise AssertionError(f"{name} cannot be built")

    return build


NAMES = [str(name) for name in pytorch_optimizer.get_supported_optimizers()]
BUILDERS: dict[str, Build] = {**{n: _BY_HAND.get(n) or _from_collection(n) for n in NAMES}, **TORCH}


def step(model: nn.Module, optimizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """One step of training by one optimizer or several, as each of them wants it."""
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for each in optimizers:
        if hasattr(each, "train"):
            each.train()
    names = {type(each).__name__ for each in optimizers}
    fused = bool(names & {"LOMO", "AdaLOMO"})
    graph = bool(names & {"AdaHessian", "SophiaH"})

    def closure() -> torch.Tensor:
        for each in optimizers:
            each.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "PCGrad" in names:
                optimizers[0].pc_backward([loss, 0.5 * loss])
            elif fused:
                optimizers[0].fused_backward(loss, optimizers[0].lr)
            else:
                loss.backward(create_graph=graph)
        return loss

    loss = closure()
    if "AliG" in names:
        optimizers[0].step(lambda: float(loss))
        return loss.detach()
    wants_closure = names & {"LBFGS", "SAM", "WSAM", "LookSAM", "BSAM"}
    for each in () if fused else optimizers:
        each.step(closure) if wants_closure else each.step()
    for parameter in model.parameters() if graph else ():
        parameter.grad = None
    return loss.detach()
