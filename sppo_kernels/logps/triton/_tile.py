"""Device functions shared by the kernels that sweep a vocabulary.

A row is seen as groups of VEC elements (16 bytes), aligned in memory. It fills the positions
[lo, hi) of its groups. Tiles hold whole groups and are accessed 16 bytes wide. Where a row starts
or ends inside a group (EDGES), those at most two groups are a small tile of their own, [2, VEC],
accessed element by element: never a byte outside the row is touched.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_2_LOG2_E = tl.constexpr(-2.8853900817779268)


@triton.jit
def row_start(base, stride_b, stride_t, b, t, VEC: tl.constexpr, EDGES: tl.constexpr):
    """Offset of the group in which row (b, t) starts, and where in it the row starts."""
    offset = base + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    start = (offset // VEC) * VEC  # divisible by VEC in the compiler's eyes too
    lo = 0
    if EDGES:
        lo = (offset - start).to(tl.int32)
    return start, lo


@triton.jit
def positions(first_group, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Positions [GROUPS, VEC] of a tile in its row."""
    groups = first_group + tl.arange(0, GROUPS)
    return groups[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def whole_groups(first_group, lo, hi, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Which groups [GROUPS, 1] of a tile lie inside the row as a whole."""
    groups = first_group + tl.arange(0, GROUPS)
    return ((groups * VEC >= lo) & (groups < hi // VEC))[:, None]


@triton.jit
def load_tile(ptr, first_group, lo, hi, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Tile [GROUPS, VEC] in the dtype of memory; -inf outside the row's whole groups."""
    pos = positions(first_group, GROUPS, VEC)
    whole = whole_groups(first_group, lo, hi, GROUPS, VEC)
    return tl.load(ptr + pos, mask=whole, other=float("-inf"))


@triton.jit
def store_tile(ptr, tile, first_group, lo, hi, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Store the whole groups of a tile [GROUPS, VEC]."""
    pos = positions(first_group, GROUPS, VEC)
    whole = whole_groups(first_group, lo, hi, GROUPS, VEC)
    tl.store(ptr + pos, tile.to(ptr.dtype.element_ty), mask=whole)


@triton.jit
def zero_tile(
    ptr, first_group, lo, hi, GROUPS: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr
):
    """Zero a tile of a row; the first one of the row takes its edges."""
    store_tile(ptr, tl.zeros((GROUPS, VEC), tl.float32), first_group, lo, hi, GROUPS, VEC)
    if EDGES:
        pos, mask = edge_positions(lo, hi, VEC)
        mask = mask & (first_group == 0)
        tl.store(ptr + pos, tl.zeros((2, VEC), ptr.dtype.element_ty), mask=mask)


@triton.jit
def edge_positions(lo, hi, VEC: tl.constexpr):
    """Positions [2, VEC] of the first and the last group, and which are edges of the row."""
    last = hi // VEC
    group = tl.arange(0, 2) * last
    pos = group[:, None] * VEC + tl.arange(0, VEC)[None, :]
    partly = (group * VEC < lo) | (group == last)
    once = (tl.arange(0, 2) == 0) | (last > 0)
    return pos, (partly & once)[:, None] & (pos >= lo) & (pos < hi)


@triton.jit
def exp(x):
    """exp(x) in fp32 as 2^(x log2 e); below 2^-126 it is 0, which saves three instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def finite_max(m):
    """`m`, or 0 where all is -inf, so that exp(z - m) is 0 and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def expm1(x):
    """exp(x) - 1 in fp32: the Taylor series to x^9 within 0.5 of zero (remainder 3e-10)."""
    series = 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(tl.abs(x) < 0.5, series * x, exp(x) - 1.0)


@triton.jit
def tanh_and_slope(x):
    """tanh and its derivative in fp32, neither losing digits where tanh is near 0 or near 1.

    Within 0.5 of zero x + x^3 q(x^2), q through Chebyshev points (4e-9); else, with
    r = 2 e / (1 + e) and e = exp(-2|x|), tanh|x| = 1 - r and the derivative is r (2 - r).
    """
    s = x * x
    q = -0.00694294181
    q = q * s + 0.0214706827
    q = q * s - 0.0539334677
    q = q * s + 0.133332253
    q = q * s - 0.333333313
    e = tl.exp2(tl.abs(x) * MINUS_2_LOG2_E)
    r = 2.0 * e / (1.0 + e)
    small = s < 0.25
    t = tl.where(small, x + x * (s * q), tl.where(x < 0, r - 1.0, 1.0 - r))
    return t, tl.where(small, 1.0 - t * t, r * (2.0 - r))


@triton.jit
def logits(
    z,
    bias,
    pos,
    mask,
    scale,
    cap,
    inv_cap,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
):
    """u = softcap(scale * (z + bias)) of a tile and its derivative du/dz, in fp32.

    `pos` are columns, `mask` those inside the row.
    """
    u = z.to(tl.float32)
    slope = tl.full(u.shape, 1.0, tl.float32)
    if BIAS:
        u += tl.load(bias + pos, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        u *= scale
        slope *= scale
    if CAP:
        t, dt = tanh_and_slope(u * inv_cap)
        u = cap * t
        slope *= dt
    return u, slope
