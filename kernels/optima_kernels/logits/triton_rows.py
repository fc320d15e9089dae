"""The Triton kernel that turns the logits of both models into the divergence of a row and its gradient.

A program has a token. Its first walk over the vocabulary makes both log-sum-exps (and, for reverse KL, the mean that
its gradient needs) lane by lane, without a word between threads until the end; the last walk makes the terms of the
divergence, which do not cancel, and the gradient, which may lie where the student's logits do. It goes backwards: what
the first walk read last is still in the cache. Jensen-Shannon needs a walk between the two for its mean.

Rows of logits are padded to a multiple of 64 columns, so that every access is a vector whatever the vocabulary. What
the padding holds does not matter; it gets zeros for a gradient.

Names: i_ indices, o_ offsets, m_ masks, b_ tiles, l_ one number a lane, s_ strides.
"""

import triton
import triton.language as tl

# Below every logit, and finite, so that a difference of two of them is 0 and not NaN.
LOWEST = tl.constexpr(-1.0e38)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp_beyond_line(b_x):
    """e^x - 1 - x by its series, for |x| <= 0.3: what is left out is 4e-8 of it."""
    b_series = 1.0 / 120.0 + b_x * (1.0 / 720.0 + b_x * (1.0 / 5040.0))
    return b_x * b_x * (0.5 + b_x * (1.0 / 6.0 + b_x * (1.0 / 24.0 + b_x * b_series)))


@triton.jit
def _divergence_terms(b_p, b_q, b_log):
    """Terms of KL(p || q) that are not negative, with log = log(q / p): p (e^log - 1 - log), which is q - p - p log.

    Their sum is that of -p log, since p and q both sum to 1. But those are of first order where p and q are alike, and
    their sum of second: it would be lost in their rounding.
    """
    return tl.where(tl.abs(b_log) <= 0.3, b_p * _exp_beyond_line(b_log), b_q - b_p - b_p * b_log)


@triton.jit
def _log_mixture(b_log, log_beta, log_rest):
    """log(beta + rest e^log), beta + rest being 1, as accurate near 0 as elsewhere."""
    b_max = tl.maximum(log_beta, b_log + log_rest)
    b_far = b_max + tl.log(tl.exp(log_beta - b_max) + tl.exp(b_log + log_rest - b_max))
    b_x = tl.exp(log_rest) * (b_log + _exp_beyond_line(b_log))
    b_half = b_x / (2.0 + b_x)  # log(1 + x) = 2 artanh(x / (2 + x))
    b_square = b_half * b_half
    b_near = 2.0 * b_half * (1.0 + b_square * (1.0 / 3.0 + b_square * (1.0 / 5.0 + b_square * (1.0 / 7.0))))
    return tl.where(tl.abs(b_log) <= 0.3, b_near, b_far)


@triton.jit
def _mixture_terms(b_p_s, b_p_t, b_ratio, log_beta, log_rest):
    """Terms of the generalised Jensen-Shannon divergence, and log(P_s / M), with ratio = log(P_s / P_t)."""
    b_over_teacher = _log_mixture(b_ratio, log_beta, log_rest)  # log(M / P_t)
    b_over_student = -_log_mixture(-b_ratio, log_rest, log_beta)  # not the ratio less the other: both may be of 1e4
    beta, rest = tl.exp(log_beta), tl.exp(log_rest)
    b_far = rest * b_p_s * b_over_student - beta * b_p_t * b_over_teacher
    b_near = beta * b_p_t * _exp_beyond_line(b_over_teacher) + rest * b_p_s * _exp_beyond_line(-b_over_student)
    return tl.where(tl.abs(b_ratio) <= 0.3, b_near, b_far), b_over_student


@triton.jit
def _load_logits(p_z, p_bias, o_c, m_loaded, m_c, BIASED: tl.constexpr):
    """Logits in float32, LOWEST outside of the vocabulary."""
    b_z = tl.load(p_z + o_c, mask=m_loaded, other=0.0).to(tl.float32)
    if BIASED:
        b_z += tl.load(p_bias + o_c, mask=m_loaded, other=0.0)
    return tl.where(m_c, b_z, LOWEST)


@triton.jit
def _join_lanes(l_max, l_sum, scale):
    """The maximum of a row, and the sum of exp2((z - max) scale) over it."""
    row_max = tl.max(l_max, 0)
    return row_max, tl.sum(tl.where(l_max > LOWEST, l_sum * tl.exp2((l_max - row_max) * scale), 0.0), 0)


@triton.jit
def row_kernel(
    z_s, z_t, bias_s, bias_t, counts, labels, factors, gate, values, gradient,
    inverse_temperature, log_beta, log_rest, part, T, V, S,
    GATED: tl.constexpr, KIND: tl.constexpr, BIASED_S: tl.constexpr, BIASED_T: tl.constexpr, COUNTED: tl.constexpr,
    LABELS: tl.constexpr, PLAIN: tl.constexpr, GRADIENT: tl.constexpr, LIMIT: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """values, rows of which lie T apart: a row's divergence, and the cross entropy of its label. gradient [., S] in the
    logits [., S]: that of temperature times divergence, or with LABELS the sum of that and of cross entropy, each times
    its one of `factors` [2]; all of it times `part`.

    KIND: 0 forward, 1 reverse, 2 Jensen-Shannon. A row whose count is 0 may hold anything and gets zeros; a label of -1
    is none. PLAIN: temperature is not 1, so that cross entropy needs a sum of its own. LIMIT, if not 0, bounds the
    gradient to what its dtype holds.
    """
    i_r = tl.program_id(0).to(tl.int64)
    p_value = values + i_r
    p_ce = values + T + i_r
    closed, ignored = False, False
    if GATED:
        closed = tl.load(gate) == 0
    if closed:
        tl.store(p_value, 0.0)
        tl.store(p_ce, 0.0)
        return
    p_s, p_t, p_g = z_s + i_r * S, z_t + i_r * S, gradient + i_r * S
    o_tile = tl.arange(0, R)[:, None] * BC + tl.arange(0, BC)[None, :]  # [R, BC]
    tiles = tl.cdiv(S, R * BC)
    if COUNTED:
        ignored = tl.load(counts + i_r) == 0
    if ignored:
        tl.store(p_value, 0.0)
        tl.store(p_ce, 0.0)
        if GRADIENT:
            for i_c in range(0, tiles):
                o_c = i_c * R * BC + o_tile
                tl.store(p_g + o_c, tl.zeros((R, BC), gradient.dtype.element_ty), mask=o_c < S)
        return
    scale = inverse_temperature * LOG2E
    label, label_logit = -1, 0.0
    if LABELS:
        label = tl.load(labels + i_r).to(tl.int32)
        o_label = tl.maximum(label, 0)
        label_logit = tl.load(p_s + o_label).to(tl.float32)  # before the gradient comes to lie there
        if BIASED_S:
            label_logit += tl.load(bias_s + o_label)

    l_max_s, l_max_t = tl.full((BC,), LOWEST, tl.float32), tl.full((BC,), LOWEST, tl.float32)
    l_sum_s, l_sum_t = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    l_plain, l_mean = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for i_c in range(0, tiles):
        o_c = i_c * R * BC + o_tile
        m_c, m_loaded = o_c < V, o_c < S
        b_s = _load_logits(p_s, bias_s, o_c, m_loaded, m_c, BIASED_S)
        b_t = _load_logits(p_t, bias_t, o_c, m_loaded, m_c, BIASED_T)
        l_next = tl.maximum(l_max_s, tl.max(b_s, 0))
        b_exp = tl.exp2((b_s - l_next[None, :]) * scale)
        l_old = tl.exp2((l_max_s - l_next) * scale)
        l_sum_s = l_sum_s * l_old + tl.sum(b_exp, 0)
        if KIND == 1:
            l_mean = l_mean * l_old + tl.sum(b_exp * (b_s - b_t), 0)
        if PLAIN:
            l_plain *= tl.exp2((l_max_s - l_next) * LOG2E)
            l_plain += tl.sum(tl.exp2((b_s - l_next[None, :]) * LOG2E), 0)
        l_max_s = l_next
        l_next = tl.maximum(l_max_t, tl.max(b_t, 0))
        l_sum_t = l_sum_t * tl.exp2((l_max_t - l_next) * scale) + tl.sum(tl.exp2((b_t - l_next[None, :]) * scale), 0)
        l_max_t = l_next
    max_s, sum_s = _join_lanes(l_max_s, l_sum_s, scale)
    max_t, sum_t = _join_lanes(l_max_t, l_sum_t, scale)
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    mean = 0.0
    if KIND == 1:  # of the difference of the logits, under the student
        mean = tl.sum(tl.where(l_max_s > LOWEST, l_mean * tl.exp2((l_max_s - max_s) * scale), 0.0), 0) / sum_s
    log_plain = log_s
    if LABELS:
        if PLAIN:
            log_plain = tl.log(_join_lanes(l_max_s, l_plain, LOG2E)[1])
        tl.store(p_ce, tl.where(label >= 0, log_plain - (label_logit - max_s), 0.0))
    else:
        tl.store(p_ce, 0.0)

    l_value = tl.zeros((BC,), tl.float32)
    if KIND == 2:
        for i_c in range(0, tiles):
            o_c = i_c * R * BC + o_tile
            m_c, m_loaded = o_c < V, o_c < S
            b_s = _load_logits(p_s, bias_s, o_c, m_loaded, m_c, BIASED_S) - max_s
            b_t = _load_logits(p_t, bias_t, o_c, m_loaded, m_c, BIASED_T) - max_t
            b_p_s, b_p_t = tl.exp(b_s * inverse_temperature - log_s), tl.exp(b_t * inverse_temperature - log_t)
            b_ratio = tl.where(m_c, (b_s - b_t) * inverse_temperature - (log_s - log_t), 0.0)
            b_terms, b_slope = _mixture_terms(b_p_s, b_p_t, b_ratio, log_beta, log_rest)
            l_value += tl.sum(tl.where(m_c, b_terms, 0.0), 0)
            l_mean += tl.sum(tl.where(m_c, b_p_s * b_slope, 0.0), 0)
        mean = tl.sum(l_mean, 0)
    label_part = part
    if LABELS:
        label_part = tl.where(label >= 0, part * tl.load(factors + 1), 0.0)
        part *= tl.load(factors)
    if KIND != 2 or GRADIENT:
        for i_c in range(0, tiles):
            o_c = (tiles - 1 - i_c) * R * BC + o_tile
            m_c, m_loaded = o_c < V, o_c < S
            b_s = _load_logits(p_s, bias_s, o_c, m_loaded, m_c, BIASED_S) - max_s
            b_t = _load_logits(p_t, bias_t, o_c, m_loaded, m_c, BIASED_T) - max_t
            b_p_s, b_p_t = tl.exp(b_s * inverse_temperature - log_s), tl.exp(b_t * inverse_temperature - log_t)
            # log(P_s / P_t): one rounded number a row is taken from a difference of logits, not two logarithms apart.
            b_ratio = (b_s - b_t) * inverse_temperature - (log_s - log_t)
            if KIND == 0:
                l_value += tl.sum(tl.where(m_c, _divergence_terms(b_p_t, b_p_s, b_ratio), 0.0), 0)
                b_slope = b_p_s - b_p_t
            if KIND == 1:
                l_value += tl.sum(tl.where(m_c, _divergence_terms(b_p_s, b_p_t, -b_ratio), 0.0), 0)
                b_slope = b_p_s * ((b_s - b_t) - (mean - (max_s - max_t))) * inverse_temperature
            if KIND == 2:
                b_slope = -_log_mixture(-b_ratio, log_rest, log_beta)
                b_slope = tl.exp(log_rest) * b_p_s * (b_slope - mean)
            if GRADIENT:
                b_slope *= part
                if LABELS:
                    b_q = b_p_s
                    if PLAIN:
                        b_q = tl.exp(b_s - log_plain)
                    b_slope += (b_q - tl.where(o_c == label, 1.0, 0.0)) * label_part
                if LIMIT:
                    b_slope = tl.minimum(tl.maximum(b_slope, -LIMIT), LIMIT)
                b_slope = tl.where(m_c, b_slope, 0.0)
                tl.store(p_g + o_c, b_slope.to(gradient.dtype.element_ty), mask=m_loaded)
    tl.store(p_value, tl.sum(l_value, 0))
