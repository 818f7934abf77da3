"""State formats in numba: the conversions of csrc/cpu_adam/codec.inl, and those of gradients and parameters.

Only the entry point in numba_kernel.py is cached on disk, and numba's cache does not follow imports: after an edit
here, touch that file too.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, arg-type, assignment"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from offload.kernels.state import BLOCK_NUMEL

# error_model: division by zero gives infinity. No fastmath: LLVM then contracts and reorders nothing.
jit: Callable[..., Any] = functools.partial(numba.njit, nogil=True, error_model="numpy")


@jit()
def widen(source, is_bfloat16, target):
    bits = target.view(np.uint32)
    if is_bfloat16:
        for i in range(source.size):
            bits[i] = np.uint32(source[i]) << np.uint32(16)
        return
    for i in range(source.size):
        half = np.uint32(source[i])
        bits[i] = (half & np.uint32(0x7FFF)) << np.uint32(13)
        target[i] *= np.float32(2.0**112)  # rebias the exponent; exact for denormals too
        if half & np.uint32(0x7C00) == np.uint32(0x7C00):
            bits[i] |= np.uint32(0x7F800000)  # infinity or NaN
        bits[i] |= (half & np.uint32(0x8000)) << np.uint32(16)


@jit()
def narrow_bfloat16(source, target):
    bits = source.view(np.uint32)
    for i in range(source.size):
        word = bits[i]
        rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        target[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@jit()
def narrow_float16(source, target):
    bits = source.view(np.uint32)
    scratch = np.empty(1, np.float32)
    scratch_bits = scratch.view(np.uint32)
    for i in range(source.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude > np.uint32(0x7F800000):
            half = np.uint32(0x7E00)
        elif magnitude >= np.uint32(0x477FF000):  # 65520 and more round to infinity
            half = np.uint32(0x7C00)
        elif magnitude < np.uint32(0x38800000):  # denormal in half precision: adding 0.5 rounds to multiples of 2**-24
            scratch_bits[0] = magnitude
            scratch[0] += np.float32(0.5)
            half = scratch_bits[0] - np.uint32(0x3F000000)
        else:  # rebias the exponent by -112, round to nearest even
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            half = (magnitude - np.uint32(0x37FFF001) + odd) >> np.uint32(13)
        target[i] = np.uint16(half | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))


@jit()
def join_master(param_bits, remainder, second, has_second, master):
    bits, second_bits = master.view(np.uint32), second.view(np.uint32)
    for i in range(master.size):
        word = np.uint32(np.uint32(param_bits[i]) << np.uint32(16)) + np.uint32(np.int32(remainder[i]))
        if has_second:
            word += second_bits[i] >> np.uint32(31)
            second_bits[i] &= np.uint32(0x7FFFFFFF)
        bits[i] = np.uint32(word)


@jit()
def split_master(master, param_bits, remainder, second, has_second):
    bits, second_bits = master.view(np.uint32), second.view(np.uint32)
    for i in range(master.size):
        word = bits[i]
        rounded = np.uint32(word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        dropped = np.int32(np.uint32(word - np.uint32(rounded << np.uint32(16))))
        if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded, dropped = np.uint32(0x7FC0), np.int32(0)
        param_bits[i] = np.uint16(rounded)
        if dropped > 0x7FFF:
            dropped = np.int32(0x7FFF)
            if has_second:
                second_bits[i] |= np.uint32(0x80000000)
        remainder[i] = np.int16(dropped)


@jit(inline="always")
def _mix(x):
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@jit()
def fill_random(first_index, key0, key1, random):
    for i in range(random.size):
        random[i] = _mix(np.uint32(first_index + i + key0)) ^ np.uint32(key1)


@jit()
def round_to_bfloat16(source, random, shift, target):
    bits = source.view(np.uint32)
    for i in range(source.size):
        word = bits[i]
        rounded = np.uint32(word + ((random[i] >> np.uint32(shift)) & np.uint32(0xFFFF))) >> np.uint32(16)
        is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        target[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@jit()
def widen_codes(codes, scales, target):
    for i in range(codes.size):
        code = np.int32(codes[i])
        target[i] = np.float32(code * abs(code)) * scales[i // BLOCK_NUMEL]


@jit()
def narrow_to_codes(source, random, shift, is_signed, codes, scales):
    """Codes as bytes, signed ones in two's complement."""
    largest_code = 127 if is_signed else 255
    bits = source.view(np.uint32)
    magnitudes = np.abs(source)
    magnitude_bits = magnitudes.view(np.uint32)
    for block in range(scales.size):
        start, stop = block * BLOCK_NUMEL, min((block + 1) * BLOCK_NUMEL, source.size)
        largest, largest_bits = np.float32(0), np.uint32(0)
        for i in range(start, stop):
            if magnitude_bits[i] > largest_bits:
                largest, largest_bits = magnitudes[i], magnitude_bits[i]
        if largest_bits >= np.uint32(0x7F800000) or largest < np.float32(2.0**-96):
            codes[start:stop] = 0
            scales[block] = np.float32(np.nan) if largest_bits >= np.uint32(0x7F800000) else np.float32(0)
            continue
        scale = largest / np.float32(largest_code * largest_code)
        scales[block] = scale
        inverse = np.float32(1) / scale
        for i in range(start, stop):
            square = magnitudes[i] * inverse
            below = np.int32(np.sqrt(square))
            threshold = np.float32((random[i] >> np.uint32(shift)) & np.uint32(0xFFFF)) * np.float32(2.0**-16)
            excess = square - np.float32(below * below)
            code = below + (1 if excess > threshold * np.float32(2 * below + 1) else 0)
            code = min(code, largest_code)
            if is_signed:
                code = -code if bits[i] >> np.uint32(31) else code
            elif code == 0 and magnitude_bits[i] != np.uint32(0):
                code = 1
            codes[i] = np.uint8(code & 0xFF)
