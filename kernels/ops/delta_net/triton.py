"""The gated delta rule on a GPU, in chunks of C tokens. __init__.py has the formulas.

    local      X = A^-1 and m = (q k') P, every chunk by itself; X by its two blocks of rows
    scan       the chunks of a document in order: n = X beta (v - e^L k S), o, and the next S
    back       in reverse: dr = X' (m' dy + e^(L_last - L) k dS), dv, and the dS before
    slopes     dg, dbeta and the gradients of k k' and q k', every chunk and value head by itself
    gradients  dq and dk, every chunk and key head by itself, from all of the above

Columns of v are independent in scan and back, whose programs hold a strip of BV of them, [dk, BV]
of a state in registers. Nothing is added by two programs, so the bits are the same every time.
Inputs have 16 bits, and products are in tf32 (on AMD in fp32), which rounds no more than what is
stored.

The table of chunks, int32 [numbers, 3], has the first token of each and the bounds of its document;
document i has the rows from begin // C + i on. Rows between are zeros, whose programs end at once.
The table is written on the device, so that a CUDA graph finds the documents of the moment.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch

C = 32  # tokens of a chunk
BV = 16  # columns of v in a strip
SCAN_WARPS = 8


@triton.jit
def _chunks(DOCUMENTS, CHUNKS, C: tl.constexpr):
    """Write the rows of one document's chunks."""
    document = tl.program_id(0)
    begin, end = tl.load(DOCUMENTS + 3 * document + 1), tl.load(DOCUMENTS + 3 * document + 2)
    row = CHUNKS + 3 * (begin // C + document)
    for first in range(begin, end, C):
        tl.store(row, first)
        tl.store(row + 1, begin)
        tl.store(row + 2, end)
        row += 3


@triton.jit
def _places(X, at, end, apart, columns, D: tl.constexpr):
    """Point at rows `at` of X, at its `columns`, and mask what lies beyond `end` and D."""
    mask = (at < end)[:, None]
    if (columns.shape[0] - D) % columns.shape[0] != 0:  # not whole blocks of columns
        mask &= (columns < D)[None, :]
    return X + at.to(tl.int64)[:, None] * apart + columns[None, :], mask


@triton.jit
def _rows(X, at, end, apart, columns, D: tl.constexpr):
    """Rows `at` of X, at its `columns`, in fp32; zeros from row `end` on, and from column D on."""
    source, mask = _places(X, at, end, apart, columns, D)
    return tl.load(source, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(X, at, end, apart, columns, values, D: tl.constexpr):
    """Write rows `at` of X, at its `columns`; nothing from row `end` on, and from column D on."""
    target, mask = _places(X, at, end, apart, columns, D)
    tl.store(target, values.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _gates(G, at, end, apart):
    """L as two floats, high + low, then e^L, e^(L_last - L) and e^L_last."""
    g = tl.load(G + at.to(tl.int64) * apart, mask=at < end, other=0.0).to(tl.float64)
    L, total = tl.cumsum(g, 0), tl.sum(g, 0)
    high = L.to(tl.float32)
    low = (L - high.to(tl.float64)).to(tl.float32)
    rest = tl.exp((total - L).to(tl.float32))
    return high, low, tl.exp(high), rest, tl.exp(total.to(tl.float32))


@triton.jit
def _between(high, low, high_before, low_before):
    """e^(L_i - L_j); finite where j > i, and means nothing there."""
    L = (high[:, None] - high_before[None, :]) + (low[:, None] - low_before[None, :])
    return tl.exp(tl.minimum(L, 64.0))


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _inverse(k, beta, high, low, N: tl.constexpr, PRECISION: tl.constexpr):
    """(1 - a)^-1 of N tokens, row by row; a = -beta k k' P is strictly lower."""
    at = tl.arange(0, N)
    a = -beta[:, None] * _product(k, tl.trans(k), PRECISION) * _between(high, low, high, low)
    a = tl.where(at[None, :] < at[:, None], a, 0.0)
    x = a
    for i in range(2, N):
        row = tl.sum(tl.where((at == i)[:, None], a, 0.0), 0)
        row += tl.sum(row[:, None] * x, 0)  # the rows of x before i are done; a_ij is 0 from i on
        x = tl.where((at == i)[:, None], row[None, :], x)
    return x + tl.where(at[:, None] == at[None, :], 1.0, 0.0)


@triton.jit
def _local(
    Q, K, G, BETA, X, M, CHUNKS, heads, k_token, k_head, g_token, group: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write A^-1 to X, by its two blocks of H rows, and m to M."""
    head, chunk = tl.program_id(0), CHUNKS + 3 * tl.program_id(1)
    first, begin, end = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    if first >= end:
        return
    start, length, at = begin.to(tl.int64), end - begin, tl.arange(0, H)
    of_head = start * k_token + (head // group).to(tl.int64) * k_head
    of_gates, of_pairs = start * g_token + head, (start * heads + head) * 2 * H
    Q, K, G, BETA = Q + of_head, K + of_head, G + of_gates, BETA + of_gates
    X, M = X + of_pairs, M + of_pairs
    upper, lower, columns = first - begin + at, first - begin + H + at, tl.arange(0, BD)
    k = _rows(K, upper, length, k_token, columns, D)
    beta = tl.load(BETA + upper * g_token, mask=upper < length, other=0.0)
    high, low, _, before, _ = _gates(G, upper, length, g_token)
    x, apart = _inverse(k, beta, high, low, H, PRECISION), heads * 2 * H
    _store(X, upper, length, apart, at, x, H)
    _store(X, upper, length, apart, at + H, tl.zeros((H, H), tl.float32), H)
    beta = tl.load(BETA + lower * g_token, mask=lower < length, other=0.0)
    high, low, since, _, _ = _gates(G, lower, length, g_token)
    k_lower = _rows(K, lower, length, k_token, columns, D)
    kk = _product(k_lower, tl.trans(k), PRECISION)
    corner = -beta[:, None] * kk * (since[:, None] * before[None, :])
    x_lower = _inverse(k_lower, beta, high, low, H, PRECISION)
    corner = tl.dot(x_lower, corner, input_precision="ieee")
    corner = tl.dot(corner, x, input_precision="ieee")
    _store(X, lower, length, apart, at, corner, H)
    _store(X, lower, length, apart, at + H, x_lower, H)
    both = tl.arange(0, 2 * H)
    rows = first - begin + both
    high, low, _, _, _ = _gates(G, rows, length, g_token)
    q = _rows(Q, rows, length, k_token, columns, D)
    k_all = _rows(K, rows, length, k_token, columns, D)
    m = _product(q, tl.trans(k_all), PRECISION) * _between(high, low, high, low)
    m = tl.where(both[None, :] <= both[:, None], m, 0.0)
    _store(M, rows, length, apart, both, m, 2 * H)


@triton.jit
def _scan(
    Q, K, V, G, BETA, X, M, Y, BEFORE, AFTER, STATES, NEW, DOCUMENTS, heads, k_token, k_head,
    v_token, v_head, g_token, group: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write Y, or for backward S before every chunk to STATES and n to NEW."""
    strips = (DV + BV - 1) // BV
    head, strip, document = tl.program_id(0) // strips, tl.program_id(0) % strips, tl.program_id(1)
    begin = tl.load(DOCUMENTS + 3 * document + 1)
    length = tl.load(DOCUMENTS + 3 * document + 2) - begin
    start, key_head = begin.to(tl.int64), (head // group).to(tl.int64)
    of_head, of_gates = start * k_token + key_head * k_head, start * g_token + head
    Q, K, G, BETA = Q + of_head, K + of_head, G + of_gates, BETA + of_gates
    V += start * v_token + head.to(tl.int64) * v_head
    X, M = X + (start * heads + head) * C, M + (start * heads + head) * C
    number = (begin // C + document).to(tl.int64)
    at, dk, dv = tl.arange(0, C), tl.arange(0, BK), strip * BV + tl.arange(0, BV)
    of_rows = (start * heads + head) * DV
    of_document = (document.to(tl.int64) * heads + head) * DK * DV
    state = tl.zeros((BK, BV), tl.float32)
    if BEFORE is not None:
        state = _rows(BEFORE + of_document, dk, DK, DV, dv, DV)
    for first in range(0, length, C):
        rows = first + at
        k = _rows(K, rows, length, k_token, dk, DK)
        v = _rows(V, rows, length, v_token, dv, DV)
        x = _rows(X, rows, length, heads * C, at, C)
        beta = tl.load(BETA + rows * g_token, mask=rows < length, other=0.0)
        _, _, decay, rest, last = _gates(G, rows, length, g_token)
        n = beta[:, None] * (v - decay[:, None] * _product(k, state, PRECISION))
        n = _product(x, n, PRECISION)
        if STATES is not None:
            place = ((number + first // C) * heads + head) * DK * DV
            _store(STATES + place, dk, DK, DV, dv, state, DV)
            _store(NEW + of_rows, rows, length, heads * DV, dv, n, DV)
        if Y is not None:
            q = _rows(Q, rows, length, k_token, dk, DK)
            m = _rows(M, rows, length, heads * C, at, C)
            o = decay[:, None] * _product(q, state, PRECISION) + _product(m, n, PRECISION)
            _store(Y + of_rows, rows, length, heads * DV, dv, o, DV)
        state = state * last + _product(tl.trans(k), rest[:, None] * n, PRECISION)
    if AFTER is not None:
        _store(AFTER + of_document, dk, DK, DV, dv, state, DV)


@triton.jit
def _back(
    Q, K, DY, G, BETA, X, M, DV_, STATES, NEW, DOCUMENTS, heads, k_token, k_head, y_token, y_head,
    v_token, v_head, g_token, group: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of S behind every chunk to STATES, dr to NEW, and that of v."""
    strips = (DV + BV - 1) // BV
    head, strip, document = tl.program_id(0) // strips, tl.program_id(0) % strips, tl.program_id(1)
    begin = tl.load(DOCUMENTS + 3 * document + 1)
    length = tl.load(DOCUMENTS + 3 * document + 2) - begin
    start, key_head = begin.to(tl.int64), (head // group).to(tl.int64)
    of_head, of_gates = start * k_token + key_head * k_head, start * g_token + head
    Q, K, G, BETA = Q + of_head, K + of_head, G + of_gates, BETA + of_gates
    DY += start * y_token + head.to(tl.int64) * y_head
    DV_ += start * v_token + head.to(tl.int64) * v_head
    X, M = X + (start * heads + head) * C, M + (start * heads + head) * C
    number = (begin // C + document).to(tl.int64)
    at, dk, dv = tl.arange(0, C), tl.arange(0, BK), strip * BV + tl.arange(0, BV)
    of_rows = (start * heads + head) * DV
    state = tl.zeros((BK, BV), tl.float32)
    chunks = (length + C - 1) // C
    for i in range(0, chunks):
        chunk = chunks - 1 - i
        rows = chunk * C + at
        k = _rows(K, rows, length, k_token, dk, DK)
        q = _rows(Q, rows, length, k_token, dk, DK)
        dy = _rows(DY, rows, length, y_token, dv, DV)
        x = _rows(X, rows, length, heads * C, at, C)
        beta = tl.load(BETA + rows * g_token, mask=rows < length, other=0.0)
        _, _, decay, rest, last = _gates(G, rows, length, g_token)
        place = ((number + chunk) * heads + head) * DK * DV
        _store(STATES + place, dk, DK, DV, dv, state, DV)
        m = _rows(M, rows, length, heads * C, at, C)
        dn = _product(tl.trans(m), dy, PRECISION)
        dn += rest[:, None] * _product(k, state, PRECISION)
        dr = _product(tl.trans(x), dn, PRECISION)
        _store(NEW + of_rows, rows, length, heads * DV, dv, dr, DV)
        _store(DV_, rows, length, v_token, dv, beta[:, None] * dr, DV)
        state = state * last + _product(tl.trans(q), decay[:, None] * dy, PRECISION)
        state -= _product(tl.trans(k), (beta * decay)[:, None] * dr, PRECISION)


@triton.jit
def _pairs(
    Q, K, rows, length, k_token, DK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply k k' and q k' of a chunk."""
    dk, zeros = tl.arange(0, BK), tl.zeros((rows.shape[0], rows.shape[0]), tl.float32)
    kk, qk = zeros, zeros
    for d in range(0, DK, BK):
        k = _rows(K, rows, length, k_token, d + dk, DK)
        q = _rows(Q, rows, length, k_token, d + dk, DK)
        kk += _product(k, tl.trans(k), PRECISION)
        qk += _product(q, tl.trans(k), PRECISION)
    return kk, qk


@triton.jit
def _read(
    Q, K, STATE, GRAD, rows, length, k_token, columns, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply q S, k S and k dS at `columns` of S and of dS, and add up S dS."""
    dk, zeros = tl.arange(0, BK), tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    qs, ks, kg, along = zeros, zeros, zeros, 0.0
    for d in range(0, DK, BK):
        k = _rows(K, rows, length, k_token, d + dk, DK)
        q = _rows(Q, rows, length, k_token, d + dk, DK)
        state = _rows(STATE, d + dk, DK, DV, columns, DV)
        grad = _rows(GRAD, d + dk, DK, DV, columns, DV)
        along += tl.sum(state * grad)
        qs += _product(q, state, PRECISION)
        ks += _product(k, state, PRECISION)
        kg += _product(k, grad, PRECISION)
    return qs, ks, kg, along


@triton.jit
def _slopes(
    Q, K, V, DY, G, BETA, STATES, DSTATES, NEW, DR, DA, DM, DG, DBETA, CHUNKS, heads, k_token,
    k_head, v_token, v_head, y_token, y_head, g_token, group: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dg and dbeta, and the gradients of k k' to DA and of q k' to DM, of a chunk."""
    head, number = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = CHUNKS + 3 * number
    first, begin, end = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if first >= end:
        return
    start, length, at = begin.to(tl.int64), end - begin, tl.arange(0, C)
    rows, of_head = first - begin + at, start * k_token + head // group * k_head
    V += start * v_token + head * v_head
    DY += start * y_token + head * y_head
    place, of_rows = (number * heads + head) * DK * DV, (start * heads + head) * DV
    of_m, of_a = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    asked, read = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    written, of_v, along = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), 0.0
    Q, K = Q + of_head, K + of_head
    kk, qk = _pairs(Q, K, rows, length, k_token, DK, BK, PRECISION)
    for column in range(0, DV, BV):
        dv = column + tl.arange(0, BV)
        qs, ks, kg, more = _read(
            Q, K, STATES + place, DSTATES + place, rows, length, k_token, dv, DK, DV, BK, PRECISION
        )
        along += more
        dy = _rows(DY, rows, length, y_token, dv, DV)
        n = _rows(NEW + of_rows, rows, length, heads * DV, dv, DV)
        dr = _rows(DR + of_rows, rows, length, heads * DV, dv, DV)
        of_v += tl.sum(dr * _rows(V, rows, length, v_token, dv, DV), 1)
        of_m += _product(dy, tl.trans(n), PRECISION)
        of_a += _product(dr, tl.trans(n), PRECISION)
        asked += tl.sum(dy * qs, 1)
        read += tl.sum(dr * ks, 1)
        written += tl.sum(n * kg, 1)
    of_gates = start * g_token + head
    beta = tl.load(BETA + of_gates + rows * g_token, mask=rows < length, other=0.0)
    high, low, decay, rest, last = _gates(G + of_gates, rows, length, g_token)
    P = _between(high, low, high, low)
    before = at[None, :] < at[:, None]
    of_m = tl.where(at[None, :] <= at[:, None], of_m * P, 0.0)
    of_a = tl.where(before, -of_a * P, 0.0)
    product = of_a * kk
    slopes = tl.where(before, of_m * qk, 0.0)  # of L_i - L_j
    slopes += beta[:, None] * product
    read *= decay
    written *= rest
    slope = tl.sum(slopes, 1) - tl.sum(slopes, 0) + decay * asked - beta * read - written
    dg = last * along + tl.sum(written, 0) + tl.cumsum(slope, 0, reverse=True)
    dbeta = of_v - read + tl.sum(product, 1)
    tl.store(DG + of_gates + rows * g_token, dg, mask=rows < length)
    tl.store(DBETA + of_gates + rows * g_token, dbeta, mask=rows < length)
    of_pairs = (start * heads + head) * C
    _store(DM + of_pairs, rows, length, heads * C, at, of_m, C)
    _store(DA + of_pairs, rows, length, heads * C, at, of_a * beta[:, None], C)


@triton.jit
def _gradients(
    Q, K, DY, G, BETA, STATES, DSTATES, NEW, DR, DA, DM, DQ, DK_, CHUNKS, heads, k_token, k_head,
    y_token, y_head, dk_token, dk_head, g_token, group: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write BK columns of dq and dk of a chunk and a key head, from all value heads."""
    strips = (DK + BK - 1) // BK
    key_head, strip = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    number = tl.program_id(1).to(tl.int64)
    row = CHUNKS + 3 * number
    first, begin, end = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if first >= end:
        return
    start, length, at = begin.to(tl.int64), end - begin, tl.arange(0, C)
    rows, dk = first - begin + at, strip * BK + tl.arange(0, BK)
    of_head = start * k_token + key_head * k_head
    dq, dk_sum = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    for i in range(group):
        head = key_head * group + i
        of_gates, of_rows = start * g_token + head, (start * heads + head) * DV
        of_pairs, place = (start * heads + head) * C, (number * heads + head) * DK * DV
        beta = tl.load(BETA + of_gates + rows * g_token, mask=rows < length, other=0.0)
        _, _, decay, rest, _ = _gates(G + of_gates, rows, length, g_token)
        for column in range(0, DV, BV):
            dv = column + tl.arange(0, BV)
            state = tl.trans(_rows(STATES + place, dk, DK, DV, dv, DV))
            grad = tl.trans(_rows(DSTATES + place, dk, DK, DV, dv, DV))
            dy = _rows(DY + start * y_token + head * y_head, rows, length, y_token, dv, DV)
            n = _rows(NEW + of_rows, rows, length, heads * DV, dv, DV)
            dr = _rows(DR + of_rows, rows, length, heads * DV, dv, DV)
            dq += _product(decay[:, None] * dy, state, PRECISION)
            dk_sum += _product(rest[:, None] * n, grad, PRECISION)
            dk_sum -= _product((beta * decay)[:, None] * dr, state, PRECISION)
        of_m = _rows(DM + of_pairs, rows, length, heads * C, at, C)
        of_a = _rows(DA + of_pairs, rows, length, heads * C, at, C)
        q = _rows(Q + of_head, rows, length, k_token, dk, DK)
        k = _rows(K + of_head, rows, length, k_token, dk, DK)
        dq += _product(of_m, k, PRECISION)
        dk_sum += _product(tl.trans(of_m), q, PRECISION)
        dk_sum += _product(of_a + tl.trans(of_a), k, PRECISION)
    target = start * dk_token + key_head * dk_head
    _store(DQ + target, rows, length, dk_token, dk, dq, DK)
    _store(DK_ + target, rows, length, dk_token, dk, dk_sum, DK)


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of tokens and of heads of [N, H, D]."""
    return [stride for x in tensors for stride in x.stride()[:2]]


class Heads:
    """The tensors of some heads of a row of documents, and the launches that they share.

    q and k are normalized, fp32 [N, nk, dk] with the same strides.
    """

    def __init__(self, table: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor):
        self.q, self.k, self.v, self.gates, self.table = q, k, v, (g, beta), table
        (self.N, self.heads, DV), DK = v.shape, q.shape[2]
        self.shape = {
            "group": self.heads // q.shape[1], "DK": DK, "DV": DV, "C": C, "BV": BV,
            "BK": max(16, triton.next_power_of_2(DK)),
            "PRECISION": "tf32" if dispatch.compiles_to() == "ptx" else "ieee",
        }  # fmt: skip
        self.g_token, self.strips = g.stride(0), self.heads * -(-DV // BV)

    def fp32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    def chunks(self) -> Tensor:
        """Return the table of chunks, int32 [numbers, 3]: first, begin, end, or zeros."""
        numbers = self.N // C + len(self.table)
        found = torch.zeros((numbers, 3), dtype=torch.int32, device=self.v.device)
        dispatch.launch(_chunks, (len(self.table),), self.table, found, C, num_warps=1)
        return found

    def local(self, chunks: Tensor) -> Tensor:
        """Return A^-1 and m of every chunk, a row of C values per token: fp32 [2, N, heads, C]."""
        found, shape = self.fp32(2, self.N, self.heads, C), self.shape
        dispatch.launch(
            _local, (self.heads, len(chunks)), self.q, self.k, *self.gates, *found, chunks,
            self.heads, *_strides(self.k), self.g_token, shape["group"], shape["DK"], shape["BK"],
            C // 2, shape["PRECISION"], num_warps=4, num_stages=1,
        )  # fmt: skip
        return found

    def scan(self, local: Tensor, *written: Tensor | None) -> None:
        """Write what is asked for: y, with the state before, the state after, states and n."""
        dispatch.launch(
            _scan, (self.strips, len(self.table)), self.q, self.k, self.v, *self.gates, *local,
            *written, self.table, self.heads, *_strides(self.k, self.v), self.g_token,
            **self.shape, num_warps=SCAN_WARPS, num_stages=1,
        )  # fmt: skip

    def differentiate(
        self, chunks: Tensor, before: Tensor | None, dy: Tensor, grads: Sequence[Tensor]
    ) -> None:
        """Write the gradients of q, k, v, g and beta to `grads`."""
        dq, dk, dv, dg, dbeta = grads
        local, rows = self.local(chunks), self.fp32(2, *self.v.shape)
        states = self.fp32(2, len(chunks), self.heads, *(self.shape[name] for name in ("DK", "DV")))
        self.scan(local, None, before, None, states[0], rows[0])
        dispatch.launch(
            _back, (self.strips, len(self.table)), self.q, self.k, dy, *self.gates, *local, dv,
            states[1], rows[1], self.table, self.heads, *_strides(self.k, dy, dv), self.g_token,
            **self.shape, num_warps=SCAN_WARPS, num_stages=1,
        )  # fmt: skip
        wide = max(16, self.shape["BK"] // 2)  # two steps: one is unrolled, and spills
        given = self.q, self.k, dy, *self.gates, *states, *rows, *local
        dispatch.launch(
            _slopes, (self.heads, len(chunks)), self.q, self.k, self.v, *given[2:], dg, dbeta,
            chunks, self.heads, *_strides(self.k, self.v, dy), self.g_token,
            **self.shape | {"BK": wide}, num_warps=4, num_stages=1,
        )  # fmt: skip
        dispatch.launch(
            _gradients, (self.k.shape[1] * -(-self.k.shape[2] // wide), len(chunks)), *given, dq,
            dk, chunks, self.heads, *_strides(self.k, dy, dq), self.g_token,
            **self.shape | {"BK": wide}, num_warps=4, num_stages=1,
        )  # fmt: skip
