"""The transformer blocks of CoCa: pre-norm, attention through torch's fused kernels, taps as outputs.

Every attention returns (output, tap); the tap holds views of tensors that exist anyway, so one that nobody keeps costs
nothing. Shapes: B batch, N query tokens, M key tokens, D width, H heads, d = D / H.
"""

import torch
from torch import Tensor, nn

from optima.coca.cache import KeysValues, SelfAttentionCache
from optima.coca.config import Activation
from optima_core.attention import attention_with_lse
from optima_core.taps import AttentionTap
from optima_kernels import linear


def split_heads(x_BND: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, d], a view."""
    batch, tokens, width = x_BND.shape
    return x_BND.view(batch, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(x_BHNd: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, D]."""
    return x_BHNd.transpose(1, 2).flatten(2)


class Linear(nn.Linear):
    """`nn.Linear` whose float32 products on a CPU are oneDNN's where that is faster: twice as fast on AMD's."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(
        self, x_BND: Tensor, *, causal: bool, mask: Tensor | None, cache: SelfAttentionCache | None = None
    ) -> tuple[Tensor, AttentionTap]:
        """mask: bool, broadcasts to [B, H, N, N], True attends; instead of `causal`, not beside it.

        cache: what came before x, to which x is added: any number of tokens at first, then one at a time.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x_BND).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.extend(k, v)
            causal = causal and q.shape[2] > 1  # a single new token is the last and sees all
        attended, lse = attention_with_lse(q, k, v, mask=mask, causal=causal)
        return self.out(merge_heads(attended)), AttentionTap(q, k, causal, mask, lse)


class CrossAttention(nn.Module):
    """Multi-head attention of sequences over contexts of any width, the same number of sequences over each context."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(context_width, 2 * width)
        self.out = Linear(width, width)

    def project(self, context_BMC: Tensor) -> KeysValues:
        """The keys and values of contexts, to be handed to `forward` instead of the contexts."""
        return KeysValues(*(split_heads(part, self.heads) for part in self.kv(context_BMC).chunk(2, dim=-1)))

    def forward(
        self, x_BND: Tensor, context: Tensor | KeysValues, *, mask: Tensor | None = None
    ) -> tuple[Tensor, AttentionTap]:
        """x [C * n, N, D] and contexts [C, M, ...]: sequences n c to n c + n - 1 attend over context c.

        No token of x sees another here, so the n sequences are one of n N queries, and a context's keys and values
        are computed once. The tap has those shapes: q [C, H, n N, d], k [C, H, M, d].
        mask: bool, broadcasts to [C, H, n N, M], True attends.
        """
        k, v = self.project(context) if isinstance(context, Tensor) else context
        q = split_heads(self.q(x_BND).reshape(k.shape[0], -1, x_BND.shape[-1]), self.heads)
        attended, lse = attention_with_lse(q, k, v, mask=mask)
        return self.out(merge_heads(attended)).reshape(x_BND.shape), AttentionTap(q, k, mask=mask, lse=lse)


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGelu}


class Mlp(nn.Sequential):
    """Linear, activation, linear."""

    def __init__(self, width: int, ratio: float, activation: Activation = "gelu") -> None:
        hidden = int(width * ratio)
        super().__init__(Linear(width, hidden), ACTIVATIONS[activation](), Linear(hidden, width))


class SelfAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation = "gelu") -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio, activation)

    def forward(
        self,
        x_BND: Tensor,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> tuple[Tensor, AttentionTap]:
        attended, tap = self.attention(self.norm_attention(x_BND), causal=causal, mask=mask, cache=cache)
        x_BND = x_BND + attended
        return x_BND + self.mlp(self.norm_mlp(x_BND)), tap


class CrossAttentionBlock(nn.Module):
    """As `SelfAttentionBlock`, but attending over the image tokens, which get a norm of their own."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, context_width: int, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, heads, context_width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio, activation)

    def project(self, context_BMC: Tensor) -> KeysValues:
        """The keys and values of contexts, to be handed to `forward` instead of the contexts."""
        return self.attention.project(self.norm_context(context_BMC))

    def forward(self, x_BND: Tensor, context: Tensor | KeysValues) -> tuple[Tensor, AttentionTap]:
        projected = self.project(context) if isinstance(context, Tensor) else context
        attended, tap = self.attention(self.norm_attention(x_BND), projected)
        x_BND = x_BND + attended
        return x_BND + self.mlp(self.norm_mlp(x_BND)), tap


class AttentionalPooler(nn.Module):
    """Learned queries that attend over a sequence: [B, M, C] -> [B, Q, D] (CoCa, section 3.2)."""

    def __init__(self, queries: int, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, heads, context_width)

    def forward(self, context_BMC: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: bool, broadcasts to [B, 1, 1, M], True attends."""
        query = self.norm_query(self.query).expand(context_BMC.shape[0], -1, -1)
        pooled: Tensor = self.attention(query, self.norm_context(context_BMC), mask=mask)[0]
        return pooled


def initialise_transformer(blocks: nn.Module, width: int, depth: int) -> None:
    """CLIP's initialisation: projections into the residual stream shrink with depth, the others with width."""
    into_residual = width**-0.5 * (2 * depth) ** -0.5
    for name, parameter in blocks.named_parameters():
        if parameter.ndim < 2:
            continue
        if name.endswith(("attention.out.weight", "mlp.2.weight")):
            nn.init.normal_(parameter, std=into_residual)
        elif name.endswith("mlp.0.weight"):
            nn.init.normal_(parameter, std=(2 * width) ** -0.5)
        else:
            nn.init.normal_(parameter, std=width**-0.5)
