"""One step of the SRWM as parts of Triton kernels: tiles of a matrix, loaded, read, edited and stored."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def load_matrix(base, D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Load the four tiles of a `[D, E+2D+4]` matrix, zero beyond D and E."""
    i, j, g, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, 4)[None, :], tl.arange(0, M)[None, :]
    at = base + i * (E + 2 * D + 4)
    inside, inside_b, inside_y = (i < D) & (j < D), (i < D) & (g < 4), (i < D) & (c < E)
    y = tl.load(at + c, mask=inside_y, other=0.0)
    q = tl.load(at + E + j, mask=inside, other=0.0)
    k = tl.load(at + E + D + j, mask=inside, other=0.0)
    b = tl.load(at + E + 2 * D + g, mask=inside_b, other=0.0)
    return y, q, k, b


@triton.jit
def store_matrix(base, y, q, k, b, D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """Store the four tiles of a `[D, E+2D+4]` matrix."""
    i, j, g, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, 4)[None, :], tl.arange(0, M)[None, :]
    at = base + i * (E + 2 * D + 4)
    inside, inside_b, inside_y = (i < D) & (j < D), (i < D) & (g < 4), (i < D) & (c < E)
    tl.store(at + c, y, mask=inside_y)
    tl.store(at + E + j, q, mask=inside)
    tl.store(at + E + D + j, k, mask=inside)
    tl.store(at + E + 2 * D + g, b, mask=inside_b)


@triton.jit
def load_row(base, at, D: tl.constexpr, N: tl.constexpr):
    """Load row `at` of `[.., D]`, zero beyond D."""
    j = tl.arange(0, N)
    return tl.load(base + at * D + j, mask=j < D, other=0.0)


@triton.jit
def load_record(base, N: tl.constexpr, M: tl.constexpr):
    """Load a step's record: q, k, the edit by column group y, q, k, beta, and the rates."""
    j, c, g = tl.arange(0, N), tl.arange(0, M), tl.arange(0, 4)
    q, k, eq, ek = tl.load(base + j), tl.load(base + N + j), tl.load(base + 2 * N + j), tl.load(base + 3 * N + j)
    eb, rate = tl.load(base + 4 * N + M + g), tl.load(base + 4 * N + M + 4 + g)
    return q, k, tl.load(base + 4 * N + c), eq, ek, eb, rate


@triton.jit
def dot(ay, aq, ak, ab, by, bq, bk, bb):
    """Return the sum of products of two matrices, number by number."""
    wide = tl.sum(tl.sum(ay * by, 1), 0) + tl.sum(tl.sum(ab * bb, 1), 0)
    return wide + tl.sum(tl.sum(aq * bq + ak * bk, 1), 0)


@triton.jit
def edit_shift(sy, sq, sk, sb, keep, k, ey, eq, ek, eb, bound, BOUND: tl.constexpr):
    """Return `keep` of a shift and the edit, brought back to the bound, and the factor that did so; 0: none did."""
    k = k[:, None]
    sy, sq = sy * keep + k * ey[None, :], sq * keep + k * eq[None, :]
    sk, sb = sk * keep + k * ek[None, :], sb * keep + k * eb[None, :]
    scale = keep * 0
    if BOUND:
        norm = tl.sqrt(dot(sy, sq, sk, sb, sy, sq, sk, sb))
        scale = tl.where(norm >= bound, bound / tl.where(norm >= bound, norm, 1.0), 0.0)
        by = tl.where(scale > 0, scale, 1.0)
        sy, sq, sk, sb = sy * by, sq * by, sk * by, sb * by
    return sy, sq, sk, sb, scale


@triton.jit
def read(a, y, q, k, b):
    """Return `a W` by column group."""
    a = a[:, None]
    return tl.sum(a * y, 0), tl.sum(a * q, 0), tl.sum(a * k, 0), tl.sum(a * b, 0)


@triton.jit
def rows(wy, wq, wk, wb, ay, aq, ak, ab, ALIKE: tl.constexpr):
    """Return `W a`, `a` by column group; `ALIKE`: y is as wide as q and k, which saves a sum across threads."""
    sums = tl.sum(wb * ab[None, :], 1)
    if ALIKE:
        sums += tl.sum(wy * ay[None, :] + wq * aq[None, :] + wk * ak[None, :], 1)
    else:
        sums += tl.sum(wy * ay[None, :], 1) + tl.sum(wq * aq[None, :] + wk * ak[None, :], 1)
    return sums


@triton.jit
def softmax(logits, D: tl.constexpr, N: tl.constexpr):
    """Return the softmax of the first D of N numbers, 0 beyond."""
    logits = tl.where(tl.arange(0, N) < D, logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 0))
    return e / tl.sum(e, 0)


@triton.jit
def lane(v, n: tl.constexpr):
    """Return number `n` of a vector of four."""
    return tl.sum(tl.where(tl.arange(0, 4) == n, v, 0.0), 0)


@triton.jit
def step(x, wy, wq, wk, wb, D: tl.constexpr, N: tl.constexpr):
    """Return what a step reads and how it edits W: y, q, k, the rates, and the edit e by column group."""
    y, q, k, b = read(x, wy, wq, wk, wb)
    q, k, rate = softmax(q, D, N), softmax(k, D, N), 1 / (1 + tl.exp(-b))
    dy, dq, dk, db = read(q - k, wy, wq, wk, wb)
    return y, q, k, rate, dy * lane(rate, 0), dq * lane(rate, 1), dk * lane(rate, 2), db * lane(rate, 3)
