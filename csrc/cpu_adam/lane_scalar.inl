// One fp32 lane, in instructions that every processor has. Lane's operations in the other instruction sets are these,
// on each of kWidth lanes at once.

struct Lane {
  using Vec = float;
  using Int = uint32_t;
  using Mask = bool;
  static constexpr size_t kWidth = 1;

  static OFFLOAD_INLINE Vec Broadcast(float x) { return x; }
  static OFFLOAD_INLINE Vec Load(const float* a) { return *a; }
  static OFFLOAD_INLINE void Store(float* a, Vec x) { *a = x; }
  static OFFLOAD_INLINE Vec Add(Vec a, Vec b) { return a + b; }
  static OFFLOAD_INLINE Vec Sub(Vec a, Vec b) { return a - b; }
  static OFFLOAD_INLINE Vec Mul(Vec a, Vec b) { return a * b; }
  static OFFLOAD_INLINE Vec Div(Vec a, Vec b) { return a / b; }
  static OFFLOAD_INLINE Vec Sqrt(Vec a) { return __builtin_sqrtf(a); }
  static OFFLOAD_INLINE Vec Fma(Vec a, Vec b, Vec c) { return __builtin_fmaf(a, b, c); }
  // Of products that are exact, so that it does not matter whether they are rounded.
  static OFFLOAD_INLINE Vec SubProduct(Vec a, Vec b, Vec c) { return a - b * c; }
  static OFFLOAD_INLINE Vec AddProduct(Vec a, Vec b, Vec c) { return a + b * c; }
  static OFFLOAD_INLINE Vec ProductSub(Vec a, Vec b, Vec c) { return a * b - c; }
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) { return (a != a || b != b) ? a + b : (a > b ? a : b); }
  static OFFLOAD_INLINE Vec Sign(Vec x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }  // zero and NaN: as is

  // ---- integers of 32 bits, modulo 2^32
  static OFFLOAD_INLINE Int Bits(Vec x) { return FloatToBits(x); }
  static OFFLOAD_INLINE Vec FromBits(Int x) { return BitsToFloat(x); }
  static OFFLOAD_INLINE Int BroadcastInt(uint32_t x) { return x; }
  static OFFLOAD_INLINE Int LoadInt(const uint32_t* a) { return *a; }
  static OFFLOAD_INLINE void StoreInt(uint32_t* a, Int x) { *a = x; }
  static OFFLOAD_INLINE Int CountEven(uint32_t first) { return first; }  // first, first + 2, ...
  static OFFLOAD_INLINE Int AddInt(Int a, Int b) { return a + b; }
  static OFFLOAD_INLINE Int SubInt(Int a, Int b) { return a - b; }
  static OFFLOAD_INLINE Int MulInt(Int a, Int b) { return a * b; }
  static OFFLOAD_INLINE Int And(Int a, Int b) { return a & b; }
  static OFFLOAD_INLINE Int Or(Int a, Int b) { return a | b; }
  static OFFLOAD_INLINE Int Xor(Int a, Int b) { return a ^ b; }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftLeft(Int x) {
    return x << kBits;
  }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftRight(Int x) {
    return x >> kBits;
  }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftRightSigned(Int x) {
    return static_cast<Int>(static_cast<int32_t>(x) >> kBits);
  }
  static OFFLOAD_INLINE Int MaxInt(Int a, Int b) { return std::max(a, b); }  // unsigned
  static OFFLOAD_INLINE uint32_t Largest(Int x) { return x; }                // of the lanes

  // ---- two 16-bit values in each lane, modulo 2^16: 2 * kWidth neighbours in memory
  static OFFLOAD_INLINE Int LoadHalves(const uint16_t* a) { return a[0] | uint32_t{a[1]} << 16; }
  static OFFLOAD_INLINE void StoreHalves(uint16_t* a, Int x) {
    a[0] = static_cast<uint16_t>(x);
    a[1] = static_cast<uint16_t>(x >> 16);
  }
  // The lower half of each lane of one, the upper half of the other.
  static OFFLOAD_INLINE Int Blend(Int lower, Int upper) { return (lower & 0xffffu) | (upper & 0xffff0000u); }
  static OFFLOAD_INLINE Int AddHalves(Int a, Int b) { return Blend(a + b, (a & 0xffff0000u) + (b & 0xffff0000u)); }
  static OFFLOAD_INLINE Int SubHalves(Int a, Int b) { return Blend(a - b, (a & 0xffff0000u) - (b & 0xffff0000u)); }
  static OFFLOAD_INLINE Int MinHalves(Int a, Int b) {  // unsigned
    return Blend(std::min(a & 0xffffu, b & 0xffffu), std::min(a & 0xffff0000u, b & 0xffff0000u));
  }
  static OFFLOAD_INLINE Int SubHalvesToZero(Int a, Int b) { return SubHalves(a, MinHalves(a, b)); }  // not below it
  static OFFLOAD_INLINE Int SpreadSignHalves(Int x) {
    return Blend((x & 0x8000u) != 0 ? 0xffffu : 0, ShiftRightSigned<31>(x));
  }
  static OFFLOAD_INLINE Int MulHalves(Int a, Int b) { return Blend(a * b, ((a >> 16) * (b >> 16)) << 16); }
  static OFFLOAD_INLINE Int AbsHalves(Int x) {
    const Int sign = SpreadSignHalves(x);
    return SubHalves(x ^ sign, sign);
  }
  static OFFLOAD_INLINE Int AndNot(Int a, Int b) { return ~a & b; }

  // ---- masks
  static OFFLOAD_INLINE Mask IsNan(Vec x) { return x != x; }
  static OFFLOAD_INLINE Mask Greater(Vec a, Vec b) { return a > b; }
  static OFFLOAD_INLINE Int Select(Mask mask, Int yes, Int no) { return mask ? yes : no; }
  static OFFLOAD_INLINE Int AddWhere(Mask mask, Int x) { return x + (mask ? 1 : 0); }

  // ---- conversions
  static OFFLOAD_INLINE Int Truncate(Vec x) { return x == x ? static_cast<Int>(static_cast<int32_t>(x)) : 0x80000000u; }
  static OFFLOAD_INLINE Vec ToFloat(Int x) { return static_cast<float>(static_cast<int32_t>(x)); }
  static OFFLOAD_INLINE Int LoadWide(const void* a) {  // 16 bits a lane
    uint16_t wide;
    std::memcpy(&wide, a, sizeof(wide));
    return wide;
  }
  // ---- bytes, 2 * kWidth neighbours in memory widened to halves
  static OFFLOAD_INLINE Int LoadBytes(const uint8_t* a) { return a[0] | Int{a[1]} << 16; }
  static OFFLOAD_INLINE Int LoadSignedBytes(const int8_t* a) {
    return Blend(static_cast<Int>(a[0]), static_cast<Int>(a[1]) << 16);
  }
  // 4 * kWidth bytes, of two pairs of vectors. Of 0 to 256: at most 255, and at least 1 where `nonzero`, which is below
  // 2^31, is not zero.
  static OFFLOAD_INLINE void StoreBytes(uint8_t* a, const Int (&x)[4], const Int (&nonzero)[4]) {
    for (int k = 0; k < 4; ++k) a[k] = static_cast<uint8_t>(x[k] > 255 ? 255 : x[k] == 0 && nonzero[k] != 0 ? 1 : x[k]);
  }
  // What StoreSignedBytes takes the signs of x and y from.
  static OFFLOAD_INLINE Int PackHalves(Int x, Int y) { return Blend(x >> 16, y); }
  // Of 0 to 127, one more where `up` has its sign bit set, at most 127, with the sign of the value in PackHalves; zero
  // where that is zero.
  static OFFLOAD_INLINE void StoreSignedBytes(uint8_t* a, const Int (&x)[4], const Int (&up)[4], Int sign01,
                                              Int sign23) {
    const Int is_negative[] = {sign01 >> 15 & 1, sign01 >> 31, sign23 >> 15 & 1, sign23 >> 31};
    for (int k = 0; k < 4; ++k) {
      const Int magnitude = std::min(x[k] + (up[k] >> 31), 127u);
      a[k] = static_cast<uint8_t>(is_negative[k] ? -magnitude : magnitude);
    }
  }
  static OFFLOAD_INLINE Vec LoadFloat16(const uint16_t* a) { return Float16ToFloat(*a); }
  static OFFLOAD_INLINE Int ToFloat16(Vec x) { return FloatToFloat16(x); }

  // ---- of two vectors, the elements at even and odd places, and back
  static OFFLOAD_INLINE void Deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
    even = a;
    odd = b;
  }
  static OFFLOAD_INLINE void Interleave(Vec even, Vec odd, Vec& a, Vec& b) {
    a = even;
    b = odd;
  }

  // ---- stores of two vectors, one after the other in memory: narrow values then fill whole registers. Integers have
  // no bits above those stored. Streaming stores, where there are any, need the alignment of their register.
  static OFFLOAD_INLINE void StorePair(uint16_t* a, Int x, Int y, bool) {
    a[0] = static_cast<uint16_t>(x);
    a[1] = static_cast<uint16_t>(y);
  }
  static OFFLOAD_INLINE void StorePair(float* a, Vec x, Vec y, bool) {
    a[0] = x;
    a[1] = y;
  }
  static OFFLOAD_INLINE void FinishStreaming() {}
};
