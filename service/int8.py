"""Products of 8-bit rows with queries, and what may rank well by them: compiled by numba, the GIL released.

Four rows meet four planes of queries at a time: sixteen sums of products stay in registers. Processors with AVX-512
VNNI multiply 64 pairs of bytes in one instruction; others do with what LLVM makes of the same sums
(docs/decisions/0018). What the numbers bound is the business of ``service/screening.py``.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic
from numpy.typing import NDArray

from service.kernels import single
from service.rows import F16, F32

LANES = 64  # bytes that are multiplied at once: rows are padded to a multiple
TILE = 4  # rows, and planes of queries, at a time
PLANES = 2  # of a query: q ≈ 128 · high + low
WIDEST = 1 << 16  # numbers of a row whose products fit in int32
# Bytes that are fetched before they are needed: processors do not look beyond the page of 4 KiB that is read.
_AHEAD = 8192
HIGH, LOW = 127, 64  # of a query's numbers: 128 · high + low, −64 ≤ low < 64
MOST = 128 * HIGH - LOW
OFFSET = 128  # rows are stored as unsigned bytes, so much above their numbers

# (tiles, width / 64, 4, 64): the first 64 bytes of four rows, the next 64 of the same four, …; a scan reads one
# stream that way, which is twice as fast as four.
Codes = NDArray[np.uint8]
Planes = NDArray[np.int8]

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


# Products of bytes are one instruction here, and numba was not told to compile for another processor.
VNNI: bool = (
    llvm.get_host_cpu_features().get("avx512vnni", False) and not config.CPU_NAME and not config.CPU_FEATURES
)


def _sum_products(builder: Any, total: Any, codes: Any, plane: Any, *, one_instruction: bool) -> Any:
    """total (16 × int32) + products of 64 unsigned with 64 signed bytes, four neighbours to a sum."""
    sums, numbers = total.type, ir.VectorType(_I8, LANES)
    if one_instruction:
        form = ir.FunctionType(sums, [sums, numbers, numbers])
        dot = cgutils.get_or_insert_function(builder.module, form, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(dot, [total, codes, plane])
    wide = ir.VectorType(_I32, LANES)
    form = ir.FunctionType(sums, [sums, wide])
    name = f"llvm.vector.partial.reduce.add.v16i32.v{LANES}i32"
    add = cgutils.get_or_insert_function(builder.module, form, name)
    return builder.call(add, [total, builder.mul(builder.zext(codes, wide), builder.sext(plane, wide))])


def _tile(planes: int, *, one_instruction: bool) -> Any:
    """A compiled function: Σ_j code[r, j] · plane[p, j] of four rows and so many planes, as 4 × planes int32.

    Addresses in, since numba has no vectors: of the rows, laid out as ``Codes`` says, of the first plane and of the
    sums; ``width`` bytes (a multiple of 64) are a row's, and lie between planes.
    """

    @intrinsic
    def tile(_context: Any, rows: Any, queries: Any, width: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            rows, queries, width, out = arguments
            numbers, sums = ir.VectorType(_I8, LANES), ir.VectorType(_I32, 16)
            zero = ir.Constant(sums, [ir.Constant(_I32, 0)] * 16)
            totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(planes)] for _ in range(TILE)]

            def load(base: Any, at: Any) -> Any:
                address = builder.add(base, at)
                found = builder.load(builder.inttoptr(address, numbers.as_pointer()))
                found.align = 1
                return found

            form = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
            prefetch = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0i8")

            def fetch(base: Any, at: Any) -> None:
                """For reading, to keep, as data; beyond the end of memory it does nothing."""
                address = builder.inttoptr(builder.add(base, at), _I8.as_pointer())
                builder.call(prefetch, [address, _I32(0), _I32(3), _I32(1)])

            steps = builder.sdiv(width, ir.Constant(width.type, LANES))
            with cgutils.for_range(builder, steps) as loop:
                at = builder.mul(loop.index, ir.Constant(width.type, LANES))
                codes = []
                for row in range(TILE):
                    place = builder.mul(at, ir.Constant(at.type, TILE))
                    place = builder.add(place, ir.Constant(at.type, row * LANES))
                    codes.append(load(rows, place))
                    fetch(rows, builder.add(place, ir.Constant(at.type, _AHEAD)))
                for plane in range(planes):
                    place = builder.mul(width, ir.Constant(at.type, plane))
                    query = load(queries, builder.add(place, at))
                    for row in range(TILE):
                        slot = totals[row][plane]
                        more = _sum_products(
                            builder, builder.load(slot), codes[row], query, one_instruction=one_instruction
                        )
                        builder.store(more, slot)
            form = ir.FunctionType(_I32, [sums])
            reduce = cgutils.get_or_insert_function(builder.module, form, "llvm.vector.reduce.add.v16i32")
            for row in range(TILE):
                for plane in range(planes):
                    address = builder.add(out, ir.Constant(out.type, 4 * (row * planes + plane)))
                    total = builder.call(reduce, [builder.load(totals[row][plane])])
                    builder.store(total, builder.inttoptr(address, _I32.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.uintp, types.uintp, types.intp, types.uintp), generate

    return tile


@njit(**_OPTIONS)
def _kth(values: Any, count: int, k: int) -> Any:
    """The k-th largest of the first ``count`` values; −inf where there are fewer."""
    if count < k:
        return np.float32(-np.inf)
    return np.partition(values[:count], count - k)[count - k]


@njit(**_OPTIONS)
def _keep(at: int, k: int, bars: Any, rows: Any, upper: Any, lower: Any, counts: Any) -> None:
    """Raise the bar of a query to the k-th best lower bound, and forget what lies below it."""
    count = counts[at]
    bars[at] = max(bars[at], _kth(lower[at], count, k))
    kept = 0
    for number in range(count):
        if upper[at, number] >= bars[at]:
            rows[at, kept] = rows[at, number]
            upper[at, kept] = upper[at, number]
            lower[at, kept] = lower[at, number]
            kept += 1
    counts[at] = kept


def _scan(queries: int, *, one_instruction: bool) -> Any:
    """A compiled scan that takes so many queries at a time."""
    tile = _tile(PLANES * queries, one_instruction=one_instruction)

    @njit(**_OPTIONS)
    def scan(
        codes: Any,
        scale: Any,
        slack: Any,
        size: Any,
        planes: Any,
        shift: Any,
        step: Any,
        reach: Any,
        blur: Any,
        masks: Any,
        bars: Any,
        ks: Any,
        rows: Any,
        upper: Any,
        lower: Any,
        counts: Any,
    ) -> None:
        n, width, most = len(scale), planes.shape[2], rows.shape[1]
        masked = masks.shape[0] > 0
        sums = np.empty(TILE * PLANES * queries, np.int32)
        first_code, first_plane, out = codes.ctypes.data, planes.ctypes.data, sums.ctypes.data
        for first in range(0, n, TILE):
            last = min(first + TILE, n)
            for query in range(0, len(ks), queries):
                until = min(query + queries, len(ks))
                if masked and not masks[query:until, first:last].any():
                    continue
                tile(first_code + first * width, first_plane + PLANES * query * width, width, out)
                for row in range(first, last):
                    for at in range(query, until):
                        if masked and not masks[at, row]:
                            continue
                        place = ((row - first) * queries + at - query) * PLANES
                        whole = OFFSET * np.int64(sums[place]) + sums[place + 1] - shift[at]
                        about = np.float32(whole) * (scale[row] * step[at])
                        error = reach[at] * slack[row] + blur[at] * size[row]
                        if about + error < bars[at] or counts[at] > most:
                            continue  # none of the best, or given up
                        rows[at, counts[at]] = row
                        upper[at, counts[at]] = about + error
                        lower[at, counts[at]] = about - error
                        counts[at] += 1
                        if counts[at] == most:
                            _keep(at, ks[at], bars, rows, upper, lower, counts)
                            if counts[at] > most - most // 4:
                                counts[at] = most + 1  # too many look alike
        for at in range(len(ks)):
            if counts[at] <= most:
                _keep(at, ks[at], bars, rows, upper, lower, counts)

    return scan


@cache
def scan(count: int, *, one_instruction: bool = VNNI) -> Any:
    """The scan that takes one query at a time, or two; its arguments stand in ``screening.Screen.candidates``."""
    return _scan(count, one_instruction=one_instruction)


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz", "nnan", "ninf"}, error_model="numpy")
def _encode(bits: Any, inverse: Any, codes: Any, scale: Any, slack: Any, size: Any) -> None:
    """Loops apart and without a call of max: each becomes vector instructions, six times as fast together."""
    n, d = bits.shape
    row = np.empty(d, np.float32)
    for i in range(n):
        for j in range(d):
            row[j] = single(bits[i, j]) * inverse[j]
        largest = np.float32(0)
        for j in range(d):
            value = abs(row[j])
            largest = value if value > largest else largest
        unit = largest / np.float32(127)
        back = np.float32(1) / unit if largest > 0 else np.float32(0)
        missed = whole = 0.0
        for lane in range(codes.shape[1]):
            out, start = codes[i // TILE, lane, i % TILE], lane * LANES
            some_missed = some_whole = np.float32(0)  # of 64; long sums in float32 lean to one side
            for j in range(min(LANES, d - start)):
                code = np.rint(row[start + j] * back)
                out[j] = np.uint8(np.int32(code) + np.int32(OFFSET))
                rest = row[start + j] - code * unit
                some_missed += rest * rest
                some_whole += code * code
            missed += np.float64(some_missed)
            whole += np.float64(some_whole)
        scale[i], slack[i], size[i] = unit, np.sqrt(missed), np.sqrt(whole) * unit


def encode(packed: F16, inverse: F32, codes: Codes) -> tuple[F32, F32, F32]:
    """Rows (n, d) times ``inverse`` (d,), in 8 bits, into ``codes``; what is beyond n and d stays as it is.

    Returns (n,) each: the scale of a row, ‖what it misses‖, ‖what is stored‖ (times the scale).
    """
    scale, slack, size = (np.empty(len(packed), dtype=np.float32) for _ in range(3))
    _encode(packed.view(np.uint16), inverse, codes, scale, slack, size)
    return scale, slack, size


@njit(**_OPTIONS)
def _round(query: Any, levels: Any, planes: Any) -> Any:
    reach = largest = 0.0
    for j in range(len(query)):
        value = np.float64(query[j]) * levels[j]
        reach += value * value
        largest = max(largest, abs(value))
    unit = largest / MOST if largest > 0 else 1.0
    missed, total = 0.0, 0
    for j in range(len(query)):
        value = np.float64(query[j]) * levels[j]
        number = np.int64(np.rint(value / unit))
        high = (number + LOW) >> 7
        planes[0, j], planes[1, j] = high, number - 128 * high
        total += number
        missed += (value - unit * number) ** 2
    return unit, total, np.sqrt(reach), np.sqrt(missed)


def round_query(query: F32, levels: F32, planes: NDArray[np.int8]) -> tuple[float, int, float, float]:
    """``query`` (d,) times ``levels`` (d,) as t · p, p of 15 bits, into ``planes`` (2, d or more): 128 high + low.

    Returns t, Σp, the norm of what was rounded, and that of what rounding missed.
    """
    return _round(query, levels, planes)
