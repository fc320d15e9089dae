"""`hidden_mse` on a CPU beside `F.mse_loss(F.linear(...))`: time and extra memory of forward and backward.

    python bench/bench_hidden.py [--repeats 5]

64 x 257 tokens, 768 -> 1024 features, float32: an image tower's layer at batch 64. Asked for: at most 1.0 of the time
and 0.6 of the memory.
"""

import argparse

import torch
import torch.nn.functional as F
from side_by_side import print_table
from torch import Tensor

from optima_kernels import hidden_mse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    h_s, h_t = torch.randn(64, 257, 768, requires_grad=True), torch.randn(64, 257, 1024)
    weight, bias = torch.randn(1024, 768, requires_grad=True), torch.randn(1024, requires_grad=True)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (h_s, weight, bias))

    runs = {
        "eager": lambda: gradients(F.mse_loss(F.linear(h_s, weight, bias), h_t)),
        "optima": lambda: gradients(hidden_mse(h_s, h_t, weight, bias)),
    }
    print_table(runs, repeats)


if __name__ == "__main__":
    main()
