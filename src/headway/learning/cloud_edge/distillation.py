"""The loss by which the edge network learns from its teacher in the cloud, and the one by which the teacher adapts itself.

    L = alpha mean_i u_i H(s_i) + beta mean_i v_i tau^2 KL(softmax(T_i / tau) || softmax(s_i / tau)) + gamma mean_i v_i CE(s_i, argmax T_i)
    u_i = exp(E_max(0) - H(s_i)),  v_i = exp(E_max(0) - H(T_i)),  without gradient through u, v and the teacher's logits T

A sample of which the teacher is sure weighs more. "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation via Selective
Entropy Distillation", 2024, arXiv 2402.17316; defaults of the released configuration.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.learning.cloud_edge.selection import entropy

TEACHER_NOT_FINITE = "the teacher's logits are not finite; lower cloud_lr or look at what is uploaded"


def entropy_loss(logits: Tensor, e_max: float | None = None) -> Tensor:
    """mean_i exp(e_max - H_i) H_i, without gradient through the weight; unweighted where ``e_max`` is None. (n, C) -> scalar; 0 for
    an empty batch."""
    H = entropy(logits)
    return _mean(H if e_max is None else (e_max - H.detach()).exp() * H)


class SelectiveEntropyDistillation(nn.Module):
    """The edge network's loss.

    Args:
        alpha, beta, gamma: weights of the student's entropy, of the divergence and of the pseudo-labels.
        tau: temperature of the divergence.
        e_max: E_max(0) in nats, the INITIAL threshold; None weighs all samples alike.

    Shapes:
        student_logits, teacher_logits: (n, C) -> scalar, float32 or wider; 0 for an empty batch.

    Raises:
        ValueError: the two differ in shape, or the teacher's logits are not finite.
    """

    def __init__(
        self,
        alpha: float = 3.0,
        beta: float = 3.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        e_max: float | None = None,
    ) -> None:
        super().__init__()
        if min(alpha, beta, gamma) < 0 or tau <= 0:
            raise ValueError(f"alpha, beta, gamma >= 0 and tau > 0; they are {alpha}, {beta}, {gamma} and {tau}")
        self.alpha, self.beta, self.gamma, self.tau, self.e_max = alpha, beta, gamma, tau, e_max

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student and teacher must tell the same samples and classes; their logits have the shapes "
                f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            )
        s, T = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (student_logits, teacher_logits.detach()))
        if not torch.compiler.is_compiling() and not torch.isfinite(T).all():
            raise ValueError(TEACHER_NOT_FINITE)
        v = torch.ones_like(T[:, 0]) if self.e_max is None else (self.e_max - entropy(T)).exp()
        log_p, log_q = F.log_softmax(T / self.tau, -1), F.log_softmax(s / self.tau, -1)
        divergence = self.tau**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        labels = F.cross_entropy(s, T.argmax(-1), reduction="none")
        return self.alpha * entropy_loss(s, self.e_max) + _mean(v * (self.beta * divergence + self.gamma * labels))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, tau={self.tau}, e_max={self.e_max}"


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(1, len(losses))
