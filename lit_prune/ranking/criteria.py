"""Criteria of importance: pure functions, tensors in, tensor out, each with its formula and source."""

from __future__ import annotations

import torch
from torch import Tensor


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""First-order Taylor importance :math:`|\theta g|` of each element.

    With the mean gradient over the calibration batches this is the criterion ``taylor``; with the mean absolute
    gradient it is ``taylor_batch``, :math:`\frac1N\sum_i|\theta g_i|`.

    Args:
        weight: A parameter, any shape.
        gradient: Its gradient, same shape.

    Reference: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017.
    """
    return (weight * gradient).abs()


def second_order(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    r"""Second-order term :math:`\tfrac12|\theta^2 h|` with the empirical-Fisher diagonal :math:`h=\frac1N\sum_i g_i^2`.

    Args:
        weight: A parameter, any shape.
        squared_gradient: Mean over batches of its squared gradient, same shape.

    Reference: LeCun et al., Optimal Brain Damage, NeurIPS 1989.
    """
    return 0.5 * (weight.square() * squared_gradient).abs()


def fisher(mask_gradient: Tensor) -> Tensor:
    r"""Empirical Fisher information of a mask of the groups, :math:`\frac1N\sum_i(\partial L_i/\partial m_j)^2`.

    A mask :math:`m_j`, 1 for a group that is there and 0 for one that is not, scales what the consumer reads of group j. Its
    derivative for sample i is :math:`\sum x\,\partial L_i/\partial x` over the sample's tokens and the group's features,
    so no weight needs a gradient (:mod:`lit_prune.calibration.mask_gradients`). Unlike a sum of element by element terms it
    knows which of them cancel. For a convolution the sum is over the spatial positions of a channel. Where the inputs of a
    consumer cannot be observed (fused experts) it is taken, for all groups, from the gradients of the weights,
    :math:`\sum_{\theta\in j}\theta g_i`, and a whole batch is one sample.

    Args:
        mask_gradient: The derivative by each group's mask, shape ``(samples, groups)``, or ``(groups,)`` for one sample.

    Returns:
        Tensor of the same shape, to be averaged over the samples.

    Reference: Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022.
    """
    return mask_gradient.square()


def taylor_2nd(weight: Tensor, gradient: Tensor, squared_gradient: Tensor) -> Tensor:
    r"""Second-order Taylor importance :math:`|\theta g| + \tfrac12|\theta^2 h|` of each element.

    At a batch size of one the second term is far smaller than the first (it is a mean of squares of small numbers), and
    the ranking is nearly that of :func:`taylor`; ``second_order`` offers the second term alone.

    Args:
        weight: A parameter, any shape.
        gradient: Its mean gradient, same shape.
        squared_gradient: Mean over batches of its squared gradient, same shape.
    """
    return taylor(weight, gradient) + second_order(weight, squared_gradient)


def wanda(weight: Tensor, activation: Tensor) -> Tensor:
    r"""Wanda importance :math:`|\theta|A` of each element, A the magnitude of the input feature that it multiplies.

    Args:
        weight: A parameter, any shape.
        activation: Magnitude of each input feature (mean absolute value, L1 or L2 norm over the calibration tokens),
            of a shape that broadcasts against ``weight``. A bias multiplies the constant 1. Every weight of a convolution's
            kernel multiplies its input channel: a group's importance is :math:`\sum_{o,t}|W_{ojt}|A_j` over outputs o and
            places t in the kernel, the channel's magnitude being taken over batch and positions.

    Reference: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024.
    """
    return weight.abs() * activation


def output_wanda(weight: Tensor, activation: Tensor) -> Tensor:
    r"""Output-side Wanda :math:`\|W_{:,j}\|_2 A_j` of each input feature j of a consumer: what removing it does to the output.

    Args:
        weight: A projection's weight, shape ``(out_features, in_features)``; of a convolution, a row for each output channel and
            place in the kernel, so that :math:`\|W_{:,j}\|_2^2=\sum_{o,t}W_{ojt}^2`.
        activation: L2 norm of each input feature over the calibration tokens, shape ``(in_features,)``.

    Returns:
        Tensor of shape ``(in_features,)``.

    Reference: Wanda-sp in An et al., Fluctuation-based Adaptive Structured Pruning for LLMs, AAAI 2024.
    """
    return weight.norm(dim=0) * activation


def fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    r"""FLAP's metric :math:`\mathrm{Var}(x_j)\,\|W_{:,j}\|_2^2` of each input feature j of a consumer.

    What the feature does beyond its mean, which a bias can make up for (``repair="bias"``).

    Args:
        weight: A projection's weight, shape ``(out_features, in_features)``; of a convolution, a row for each output channel and
            place in the kernel.
        variance: Variance of each input feature over the calibration tokens, shape ``(in_features,)``.

    Returns:
        Tensor of shape ``(in_features,)``.

    Reference: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024.
    """
    return weight.square().sum(dim=0) * variance


def reap(routed_output: Tensor) -> Tensor:
    r"""REAP's importance of an expert, :math:`\frac1{|X_j|}\sum_{x\in X_j}g_j(x)\,\|f_j(x)\|_2`.

    :math:`X_j` are the tokens that the router sends to expert j, :math:`g_j` its weight there, and :math:`f_j` the expert's
    output; 0 for an expert that no token was sent to. Once experts are removed, the router's softmax is over those that stay.

    Args:
        routed_output: That mean, shape ``(groups,)``, see :mod:`lit_prune.calibration.routed_outputs`.

    Reference: Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, 2025.
    """
    return routed_output


def magnitude(weight: Tensor) -> Tensor:
    r"""Magnitude :math:`|\theta|` of each element, a baseline that needs no data.

    Args:
        weight: A parameter, any shape.
    """
    return weight.abs()


def random(groups: int, generator: torch.Generator) -> Tensor:
    """Uniform random importance of each group, the baseline that every criterion has to beat.

    Args:
        groups: Number of groups.
        generator: Source of the numbers, on the CPU.

    Returns:
        Tensor of shape ``(groups,)``.
    """
    return torch.rand(groups, generator=generator, dtype=torch.float32)
