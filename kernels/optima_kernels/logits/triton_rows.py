"""The Triton kernel that turns the logits of both models into the divergence of a row and its gradient.

A program has a token. Its first walk over the vocabulary makes both log-sum-exps (and, for reverse KL, the mean that
its gradient needs) lane by lane, without a word between threads until the end; the last walk makes the terms of the
divergence, which do not cancel, and the gradient, which may lie where the student's logits do. It goes backwards: what
the first walk read last is still in the cache. Jensen-Shannon needs a walk between the two for its mean.

Exponentials are powers of two of `(z - maximum) scale`, scale being log2(e) over temperature: beside a maximum of 1e4,
`z scale` would keep three digits after the point.

Rows of logits are padded to a multiple of 64 columns, so that every access is a vector whatever the vocabulary. What
the padding holds does not matter; it gets zeros for a gradient. Only the last tile has to look where a row ends.

Names: i_ indices, o_ offsets, b_ tiles [BC], l_ what a lane keeps from tile to tile [BC], p_ pointers.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A logit outside of the vocabulary, and the maximum of a lane before its first: finite, so that no difference is NaN.
NO_LOGIT, NO_MAXIMUM = tl.constexpr(-1.0e30), tl.constexpr(-1.0e38)
# Logarithms (to base 2) of ratios nearer to 0 than this are treated by series.
NEAR = tl.constexpr(0.43)


@triton.jit
def _load_logits(p_z, p_bias, o_c, V, S, BIASED: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        b_z = tl.load(p_z + o_c, mask=o_c < S, other=0.0).to(tl.float32)
        if BIASED:
            b_z += tl.load(p_bias + o_c, mask=o_c < S, other=0.0)
        b_z = tl.where(o_c < V, b_z, NO_LOGIT)
    else:
        b_z = tl.load(p_z + o_c).to(tl.float32)
        if BIASED:
            b_z += tl.load(p_bias + o_c)
    return b_z


@triton.jit
def _add_powers(b_z, l_max, l_sum, scale):
    """Adds 2^((z - max) scale) to the sum of each lane, whose maximum may rise; also how much the sum fell then, and
    the powers."""
    l_next = tl.maximum(l_max, b_z)
    b_power = tl.exp2((b_z - l_next) * scale)
    l_fall = tl.exp2((l_max - l_next) * scale)
    return l_next, l_sum * l_fall + b_power, l_fall, b_power


@triton.jit
def _join_lanes(l_max, l_sum, scale):
    """The maximum of a row, and its sum. Lanes that never met a word do not count."""
    row_max = tl.max(l_max, 0)
    return row_max, tl.sum(tl.where(l_max > NO_LOGIT, l_sum * tl.exp2((l_max - row_max) * scale), 0.0), 0)


@triton.jit
def _exp_beyond_line(b_x):
    """2^x - 1 - x ln(2) by its series, for |x| <= NEAR: what is left out is 1e-6 of it."""
    b_series = 1.3333558146428443e-3 + b_x * 1.5403530393381606e-4
    b_series = 5.5504108664821576e-2 + b_x * (9.618129107628477e-3 + b_x * b_series)
    return b_x * b_x * (0.24022650695910072 + b_x * b_series)


@triton.jit
def _divergence_terms(b_p, b_q, b_log):
    """Terms of KL(p || q) that are not negative, with log = log2(q / p): p (q/p - 1 - ln(q/p)), which is q - p - p ln.

    Their sum is that of -p ln, since p and q both sum to 1. But those are of first order where p and q are alike, and
    their sum of second: it would be lost in their rounding.
    """
    return tl.where(tl.abs(b_log) <= NEAR, b_p * _exp_beyond_line(b_log), (b_q - b_p) - b_p * (b_log * LN2))


@triton.jit
def _log_mixture(b_log, beta):
    """ln(M / P_t) and ln(P_s / M) from log2(P_s / P_t), M = beta P_t + (1 - beta) P_s.

    The smaller in size is the logarithm of 1 less a part of (1 - smaller ratio), as accurate near 0 as elsewhere; the
    other is what it leaves of ln(P_s / P_t), which has its sign and is larger.
    """
    b_part, b_rest = tl.where(b_log > 0, beta, 1.0 - beta), tl.where(b_log > 0, 1.0 - beta, beta)
    b_below = -tl.abs(b_log)
    b_power = tl.exp2(b_below)
    b_x = b_part * tl.where(b_below >= -NEAR, b_below * LN2 + _exp_beyond_line(b_below), b_power - 1.0)
    b_half = b_x / (2.0 + b_x)  # ln(1 + x) = 2 artanh(x / (2 + x))
    b_square = b_half * b_half
    b_series = 1.0 / 3.0 + b_square * (1.0 / 5.0 + b_square * (1.0 / 7.0 + b_square * (1.0 / 9.0)))
    b_small = tl.where(b_x > -0.4, 2.0 * b_half * (1.0 + b_square * b_series), tl.log(b_rest + b_part * b_power))
    b_large = b_log * LN2
    return tl.where(b_log > 0, b_large + b_small, b_small), tl.where(b_log > 0, -b_small, b_large - b_small)


@triton.jit
def _mixture_terms(b_p_s, b_p_t, b_log, beta):
    """Terms of the generalised Jensen-Shannon divergence, and ln(P_s / M)."""
    b_over_teacher, b_over_student = _log_mixture(b_log, beta)
    b_far = (1.0 - beta) * b_p_s * b_over_student - beta * b_p_t * b_over_teacher
    b_near = beta * b_p_t * _exp_beyond_line(b_over_teacher * LOG2E)
    b_near += (1.0 - beta) * b_p_s * _exp_beyond_line(-b_over_student * LOG2E)
    return tl.where(tl.abs(b_log) <= NEAR, b_near, b_far), b_over_student


@triton.jit
def _first_tile(
    p_s, p_t, bias_s, bias_t, o_c, V, S, scale, l_max_s, l_sum_s, l_max_t, l_sum_t, l_sum, l_mean,
    KIND: tl.constexpr, BIASED_S: tl.constexpr, BIASED_T: tl.constexpr, PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the sums of the student, the teacher, the student at a temperature of 1, and of the differences of
    the logits under the student."""
    b_s = _load_logits(p_s, bias_s, o_c, V, S, BIASED_S, MASKED)
    b_t = _load_logits(p_t, bias_t, o_c, V, S, BIASED_T, MASKED)
    if PLAIN:
        _, l_sum, _, _ = _add_powers(b_s, l_max_s, l_sum, LOG2E)
    l_max_s, l_sum_s, l_fall, b_power = _add_powers(b_s, l_max_s, l_sum_s, scale)
    if KIND == 1:
        l_mean = l_mean * l_fall + b_power * (b_s - b_t)
    l_max_t, l_sum_t, _, _ = _add_powers(b_t, l_max_t, l_sum_t, scale)
    return l_max_s, l_sum_s, l_max_t, l_sum_t, l_sum, l_mean


@triton.jit
def _middle_tile(
    p_s, p_t, bias_s, bias_t, o_c, V, S, scale, max_s, max_t, inverse_s, inverse_t, shift, beta,
    BIASED_S: tl.constexpr, BIASED_T: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a tile adds to the Jensen-Shannon divergence, and to the mean of ln(P_s / M) under the student."""
    b_s = _load_logits(p_s, bias_s, o_c, V, S, BIASED_S, MASKED)
    b_t = _load_logits(p_t, bias_t, o_c, V, S, BIASED_T, MASKED)
    b_s, b_t = b_s - max_s, b_t - max_t
    b_p_s, b_p_t = tl.exp2(b_s * scale) * inverse_s, tl.exp2(b_t * scale) * inverse_t
    b_terms, b_over = _mixture_terms(b_p_s, b_p_t, (b_s - b_t) * scale - shift, beta)
    b_over *= b_p_s
    if MASKED:
        b_terms, b_over = tl.where(o_c < V, b_terms, 0.0), tl.where(o_c < V, b_over, 0.0)
    return b_terms, b_over


@triton.jit
def _last_tile(
    p_s, p_t, p_g, bias_s, bias_t, o_c, V, S, scale, max_s, max_t, inverse_s, inverse_t, shift, mean,
    inverse_temperature, beta, part, label, label_part, inverse,
    KIND: tl.constexpr, BIASED_S: tl.constexpr, BIASED_T: tl.constexpr, LABELS: tl.constexpr, PLAIN: tl.constexpr,
    GRADIENT: tl.constexpr, LIMIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a tile; what it adds to the divergence, but for Jensen-Shannon's."""
    b_s = _load_logits(p_s, bias_s, o_c, V, S, BIASED_S, MASKED)
    b_t = _load_logits(p_t, bias_t, o_c, V, S, BIASED_T, MASKED)
    b_s, b_t = b_s - max_s, b_t - max_t
    b_p_s, b_p_t = tl.exp2(b_s * scale) * inverse_s, tl.exp2(b_t * scale) * inverse_t
    # log2(P_s / P_t): one rounded number a row is taken from a difference of logits, not two logarithms apart.
    b_log = (b_s - b_t) * scale - shift
    b_terms = tl.zeros_like(b_log)
    if KIND == 0:
        b_terms = _divergence_terms(b_p_t, b_p_s, b_log)
        b_slope = b_p_s - b_p_t
    if KIND == 1:
        b_terms = _divergence_terms(b_p_s, b_p_t, -b_log)
        b_slope = b_p_s * (((b_s - b_t) - mean) * inverse_temperature)
    if KIND == 2:
        b_slope = (1.0 - beta) * b_p_s * (_log_mixture(b_log, beta)[1] - mean)
    if MASKED:
        b_terms = tl.where(o_c < V, b_terms, 0.0)
    if GRADIENT:
        b_slope *= part
        if LABELS:
            b_q = b_p_s
            if PLAIN:
                b_q = tl.exp2(b_s * LOG2E) * inverse
            b_slope += (b_q - tl.where(o_c == label, 1.0, 0.0)) * label_part
        if LIMIT:
            b_slope = tl.minimum(tl.maximum(b_slope, -LIMIT), LIMIT)
        if MASKED:
            b_slope = tl.where(o_c < V, b_slope, 0.0)
            tl.store(p_g + o_c, b_slope.to(p_g.dtype.element_ty), mask=o_c < S)
        else:
            tl.store(p_g + o_c, b_slope.to(p_g.dtype.element_ty))
    return b_terms


@triton.jit
def row_kernel(
    z_s, z_t, bias_s, bias_t, counts, labels, factors, gate, values, gradient,
    inverse_temperature, beta, part, T, V, S,
    GATED: tl.constexpr, KIND: tl.constexpr, BIASED_S: tl.constexpr, BIASED_T: tl.constexpr, COUNTED: tl.constexpr,
    LABELS: tl.constexpr, PLAIN: tl.constexpr, GRADIENT: tl.constexpr, LIMIT: tl.constexpr,
    BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """values, rows of which lie T apart: a row's divergence, and the cross entropy of its label. gradient [., S] in the
    logits [., S]: that of temperature times divergence, or with LABELS the sum of that and of cross entropy, each times
    its one of `factors` [2]; all of it times `part`.

    KIND: 0 forward, 1 reverse, 2 Jensen-Shannon. A row whose count is 0 may hold anything and gets zeros; a label of -1
    is none. PLAIN: temperature is not 1, so that cross entropy needs a sum of its own. LIMIT, if not 0, bounds the
    gradient to what its dtype holds.
    """
    i_r = tl.program_id(0).to(tl.int64)
    p_value, p_cross_entropy = values + i_r, values + T + i_r
    p_s, p_t, p_g = z_s + i_r * S, z_t + i_r * S, gradient + i_r * S
    o_tile = tl.arange(0, BC)
    full = V // BC  # tiles; one more is not, and may be empty
    closed, ignored = False, False
    if GATED:
        closed = tl.load(gate) == 0
    if closed:
        tl.store(p_value, 0.0)
        tl.store(p_cross_entropy, 0.0)
        return
    if COUNTED:
        ignored = tl.load(counts + i_r) == 0
    if ignored:
        tl.store(p_value, 0.0)
        tl.store(p_cross_entropy, 0.0)
        if GRADIENT:
            for i_c in range(0, full + 1):
                o_c = i_c * BC + o_tile
                tl.store(p_g + o_c, tl.zeros((BC,), gradient.dtype.element_ty), mask=o_c < S)
        return
    scale = inverse_temperature * LOG2E
    label, label_logit = -1, 0.0
    if LABELS:
        label = tl.load(labels + i_r).to(tl.int32)
        o_label = tl.maximum(label, 0)
        label_logit = tl.load(p_s + o_label).to(tl.float32)  # before the gradient comes to lie there
        if BIASED_S:
            label_logit += tl.load(bias_s + o_label)

    l_max_s = tl.full((BC,), NO_MAXIMUM, tl.float32)
    l_max_t = l_max_s
    l_sum_s = tl.zeros((BC,), tl.float32)
    l_sum_t, l_sum, l_mean = l_sum_s, l_sum_s, l_sum_s
    for i_c in tl.range(0, full, num_stages=STAGES):
        l_max_s, l_sum_s, l_max_t, l_sum_t, l_sum, l_mean = _first_tile(
            p_s, p_t, bias_s, bias_t, i_c * BC + o_tile, V, S, scale, l_max_s, l_sum_s, l_max_t, l_sum_t, l_sum,
            l_mean, KIND, BIASED_S, BIASED_T, PLAIN, False,
        )  # fmt: skip
    l_max_s, l_sum_s, l_max_t, l_sum_t, l_sum, l_mean = _first_tile(
        p_s, p_t, bias_s, bias_t, full * BC + o_tile, V, S, scale, l_max_s, l_sum_s, l_max_t, l_sum_t, l_sum,
        l_mean, KIND, BIASED_S, BIASED_T, PLAIN, True,
    )  # fmt: skip
    max_s, sum_s = _join_lanes(l_max_s, l_sum_s, scale)
    max_t, sum_t = _join_lanes(l_max_t, l_sum_t, scale)
    inverse_s, inverse_t = 1.0 / sum_s, 1.0 / sum_t
    shift = tl.log2(sum_s) - tl.log2(sum_t)
    mean = 0.0
    if KIND == 1:
        mean = _join_lanes(l_max_s, l_mean, scale)[1] * inverse_s - (max_s - max_t)
    cross_entropy, sum = 0.0, sum_s
    if LABELS:
        if PLAIN:
            sum = _join_lanes(l_max_s, l_sum, LOG2E)[1]
        cross_entropy = tl.where(label >= 0, tl.log(sum) - (label_logit - max_s), 0.0)
    tl.store(p_cross_entropy, cross_entropy)
    inverse = 1.0 / sum

    l_value = tl.zeros((BC,), tl.float32)
    if KIND == 2:
        l_mean = tl.zeros((BC,), tl.float32)
        for i_c in tl.range(0, full, num_stages=STAGES):
            l_terms, l_over = _middle_tile(
                p_s, p_t, bias_s, bias_t, i_c * BC + o_tile, V, S, scale, max_s, max_t, inverse_s,
                inverse_t, shift, beta, BIASED_S, BIASED_T, False,
            )  # fmt: skip
            l_value += l_terms
            l_mean += l_over
        l_terms, l_over = _middle_tile(
            p_s, p_t, bias_s, bias_t, full * BC + o_tile, V, S, scale, max_s, max_t, inverse_s,
            inverse_t, shift, beta, BIASED_S, BIASED_T, True,
        )  # fmt: skip
        l_value += l_terms
        mean = tl.sum(l_mean + l_over, 0)

    label_part = part
    if LABELS:
        label_part = tl.where(label >= 0, part * tl.load(factors + 1), 0.0)
        part *= tl.load(factors)
    if KIND != 2 or GRADIENT:
        l_value += _last_tile(
            p_s, p_t, p_g, bias_s, bias_t, full * BC + o_tile, V, S, scale, max_s, max_t, inverse_s,
            inverse_t, shift, mean, inverse_temperature, beta, part, label, label_part, inverse,
            KIND, BIASED_S, BIASED_T, LABELS, PLAIN, GRADIENT, LIMIT, True,
        )  # fmt: skip
        for i_c in tl.range(0, full, num_stages=STAGES):
            l_value += _last_tile(
                p_s, p_t, p_g, bias_s, bias_t, (full - 1 - i_c) * BC + o_tile, V, S, scale, max_s,
                max_t, inverse_s, inverse_t, shift, mean, inverse_temperature, beta, part, label, label_part,
                inverse, KIND, BIASED_S, BIASED_T, LABELS, PLAIN, GRADIENT, LIMIT, False,
            )  # fmt: skip
    tl.store(p_value, tl.sum(l_value, 0))
