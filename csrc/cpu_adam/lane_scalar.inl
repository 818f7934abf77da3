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
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) { return (a != a || b != b) ? a + b : (a > b ? a : b); }
  static OFFLOAD_INLINE Vec Sign(Vec x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }  // zero and NaN: as is

  // ---- integers of 32 bits, modulo 2^32
  static OFFLOAD_INLINE Int Bits(Vec x) { return FloatToBits(x); }
  static OFFLOAD_INLINE Vec FromBits(Int x) { return BitsToFloat(x); }
  static OFFLOAD_INLINE Int BroadcastInt(uint32_t x) { return x; }
  static OFFLOAD_INLINE Int CountFrom(uint32_t first) { return first; }  // first, first + 1, ...
  static OFFLOAD_INLINE Int LoadInt(const uint32_t* a) { return *a; }
  static OFFLOAD_INLINE void StoreInt(uint32_t* a, Int x) { *a = x; }
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
  static OFFLOAD_INLINE Int SpreadSign(Int x) { return static_cast<Int>(static_cast<int32_t>(x) >> 31); }
  // Of values below 2^31.
  static OFFLOAD_INLINE Int MaxInt(Int a, Int b) { return a > b ? a : b; }
  static OFFLOAD_INLINE Int MinInt(Int a, Int b) { return a < b ? a : b; }
  static OFFLOAD_INLINE uint32_t Largest(Int x) { return x; }  // of the lanes

  // ---- masks
  static OFFLOAD_INLINE Mask IsNan(Vec x) { return x != x; }
  static OFFLOAD_INLINE Mask Greater(Vec a, Vec b) { return a > b; }
  static OFFLOAD_INLINE Mask EqualInt(Int a, Int b) { return a == b; }
  static OFFLOAD_INLINE Int Select(Mask mask, Int yes, Int no) { return mask ? yes : no; }
  static OFFLOAD_INLINE Int Where(Mask mask, Int x) { return mask ? x : 0; }
  static OFFLOAD_INLINE Int AddWhere(Mask mask, Int x) { return x + (mask ? 1 : 0); }
  static OFFLOAD_INLINE Int SubWhere(Mask mask, Int x) { return x - (mask ? 1 : 0); }

  // ---- conversions
  static OFFLOAD_INLINE Int Truncate(Vec x) { return static_cast<Int>(static_cast<int32_t>(x)); }
  static OFFLOAD_INLINE Vec ToFloat(Int x) { return static_cast<float>(static_cast<int32_t>(x)); }
  static OFFLOAD_INLINE Int LoadWide(const uint16_t* a) { return *a; }
  static OFFLOAD_INLINE Int LoadWide(const int16_t* a) { return static_cast<Int>(int32_t{*a}); }
  static OFFLOAD_INLINE Int LoadWide(const uint8_t* a) { return *a; }
  static OFFLOAD_INLINE Int LoadWide(const int8_t* a) { return static_cast<Int>(int32_t{*a}); }
  static OFFLOAD_INLINE Vec LoadFloat16(const uint16_t* a) { return Float16ToFloat(*a); }
  static OFFLOAD_INLINE Int ToFloat16(Vec x) { return FloatToFloat16(x); }

  // ---- stores of two vectors, one after the other in memory: narrow values then fill whole registers. Integers have
  // no bits above those stored. Streaming stores, where there are any, need the alignment of their register.
  static OFFLOAD_INLINE void StorePair(uint16_t* a, Int x, Int y, bool) {
    a[0] = static_cast<uint16_t>(x);
    a[1] = static_cast<uint16_t>(y);
  }
  static OFFLOAD_INLINE void StorePair(uint8_t* a, Int x, Int y) {
    a[0] = static_cast<uint8_t>(x);
    a[1] = static_cast<uint8_t>(y);
  }
  static OFFLOAD_INLINE void StorePair(float* a, Vec x, Vec y, bool) {
    a[0] = x;
    a[1] = y;
  }
  static OFFLOAD_INLINE void FinishStreaming() {}
};
