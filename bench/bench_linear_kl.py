"""`linear_kl` on a CPU beside eager torch and Liger's chunked distillation loss: time and extra memory.

    python -m pip install --no-deps liger-kernel==0.8.5
    python bench/bench_linear_kl.py [--repeats 3] [--tokens 2048]

V = 49408, widths 512 (student) and 768 (teacher), temperature 2, float32, forward and backward. Asked for: at most 1.0
of eager's time and 0.1 of its memory, and neither more than Liger's. Liger's loss runs uncompiled, in chunks of
1024 tokens, its default; its Jensen-Shannon loss at beta 0 is the forward divergence, without the factor T^2.
"""

import argparse
import importlib.util

import torch
import torch.nn.functional as F
from side_by_side import Run, print_table
from torch import Tensor

from optima_kernels import linear_kl

TEMPERATURE = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokens, vocabulary = arguments.tokens, 49408
    h_s, h_t = torch.randn(tokens, 512, requires_grad=True), torch.randn(tokens, 768)
    w_s, w_t = (torch.randn(vocabulary, 512) / 20).requires_grad_(), torch.randn(vocabulary, 768) / 20

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (h_s, w_s))

    def eager() -> tuple[Tensor, ...]:
        log_s, log_t = ((h @ w.t() / TEMPERATURE).log_softmax(-1) for h, w in ((h_s, w_s), (h_t, w_t)))
        return gradients(F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * TEMPERATURE**2)

    runs: dict[str, Run] = {
        "eager": eager,
        "optima": lambda: gradients(linear_kl(h_s, w_s, h_t, w_t, temperature=TEMPERATURE)),
    }
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger-kernel is not installed: left out")
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=False
        )
        labels = torch.zeros(tokens, dtype=torch.int64)
        runs["liger"] = lambda: gradients(liger(h_s, w_s, h_t, w_t, labels) * TEMPERATURE**2)
    print_table(runs, arguments.repeats)


if __name__ == "__main__":
    main()
