"""The LoRA product and its backward in plain torch. Formulas: see the package."""

import torch
import torch.nn.functional as F


class LoraLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped, lora_A, lora_B, base, scaling):
        seen = x if dropped is None else dropped  # what the update reads
        ctx.save_for_backward(seen, lora_A, lora_B)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropped is not None
        # [M, K] @ [K, N] -> [M, N], then += s [M, r] @ [r, N] in place: the base just made y
        y = base(x)
        low = F.linear(seen, lora_A.to(x.dtype)).to(y.dtype)  # under autocast y is narrower than x
        y.view(-1, y.shape[-1]).addmm_(
            low.reshape(-1, low.shape[-1]), lora_B.to(y.dtype).t(), alpha=scaling
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        seen, lora_A, lora_B = ctx.saved_tensors
        s = ctx.scaling
        dy = grad.reshape(-1, grad.shape[-1])  # [M, N]
        x = seen.reshape(-1, seen.shape[-1]).to(dy.dtype)  # [M, K]
        A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        grad_x = grad_dropped = grad_A = grad_B = None
        low = dy @ B  # [M, N] @ [N, r] -> [M, r]

        # === dx = dy W + s (dy B) A ===
        if ctx.needs_input_grad[0]:
            grad_x = dy @ ctx.base.dequantize().to(dy.dtype)
            if not ctx.dropout:
                grad_x.addmm_(low, A, alpha=s)
            grad_x = grad_x.view(seen.shape).to(seen.dtype)
        if ctx.needs_input_grad[1]:
            grad_dropped = (s * (low @ A)).view(seen.shape).to(seen.dtype)

        # === dA = s (dy B)^T x,  dB = s dy^T (x A^T) ===
        if ctx.needs_input_grad[2]:
            grad_A = (low.t() @ x).to(lora_A.dtype).mul_(s)
        if ctx.needs_input_grad[3]:
            grad_B = (dy.t() @ (x @ A.t())).to(lora_B.dtype).mul_(s)
        return grad_x, grad_dropped, grad_A, grad_B, None, None
