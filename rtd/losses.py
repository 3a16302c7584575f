"""Losses between the outputs of teacher and student (section 3, App. A), accurate where tiny.

These are the definitions. Training computes the same numbers block by block (``rtd.last_layer``).

With p_t = softmax(t) and p_s = softmax(s) over the m = 2^16 outputs,

    cross-entropy  H(p_t, p_s) = -sum p_t log p_s        what is minimised
    entropy        H(p)        = -sum p   log p          about log m = 11.09 for both
    KL             KL          = H(p_t, p_s) - H(p_t)    1e-7 to 1e-3: what is logged

Cross-entropy and KL have the same gradient with respect to s, p_s - p_t. The KL is not computed as
H(p_t, p_s) - H(p_t): float32 resolves numbers around 11 to 1e-6. As sum (p_s - p_t) = 0,

    KL = sum p_t phi(r),   r = log p_s - log p_t,   phi(x) = exp(x) - 1 - x >= 0,

a sum of terms of one sign, each of the size of the result. Likewise log p is kept as two numbers:
s - logmeanexp(s), about 0.1, which float32 holds to 1e-8, and the constant -log m.
"""

import math

import torch


def log_mean_exp(logits):
    """(..., m) -> (...): log(mean(exp(logits))), which is near 0 for near-uniform softmaxes."""
    highest = logits.amax(-1)
    return highest + (logits - highest.unsqueeze(-1)).exp().mean(-1).log()


def exp_minus_one_minus(x):
    """phi(x) = exp(x) - 1 - x, by its series where the difference would cancel."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return torch.where(x.abs() < 0.05, series, torch.expm1(x) - x)


def kl_terms(p_s, p_t, r):
    """p_t phi(r) with r = log(p_s / p_t): the terms whose sum is the KL.

    For |r| >= 1 they are p_s - p_t (1 + r): exp(r) may overflow there, and nothing cancels.
    """
    # autograd also goes through the branch that ``where`` drops, so r is clamped in it
    near = p_t * exp_minus_one_minus(r.clamp(-1, 1))
    return torch.where(r.abs() < 1, near, p_s - p_t * (1 + r))


def cross_entropy(student_logits, teacher_logits):
    """H(p_t, p_s) of each image: two (..., m) tensors of logits -> (...), in nats."""
    inner = (teacher_logits.softmax(-1) * student_logits).sum(-1)
    return log_mean_exp(student_logits) + math.log(student_logits.shape[-1]) - inner


def kl_divergence(student_logits, teacher_logits):
    """KL(p_t || p_s) >= 0 of each image: two (..., m) tensors of logits -> (...), in nats."""
    outputs = student_logits, teacher_logits
    log_s, log_t = (x - log_mean_exp(x).unsqueeze(-1) for x in outputs)  # log(m p_s), log(m p_t)
    p_s, p_t = (x.softmax(-1) for x in outputs)
    return kl_terms(p_s, p_t, log_s - log_t).sum(-1)


def entropy(logits):
    """H(p) of each image: (..., m) logits -> (...), in nats; log m when all outputs are equal."""
    return cross_entropy(logits, logits)


def mean_squared_error(student_logits, teacher_logits):
    """Mean over the m outputs of (s - t)^2, of each image: two (..., m) tensors -> (...)."""
    return (student_logits - teacher_logits).square().mean(-1)
