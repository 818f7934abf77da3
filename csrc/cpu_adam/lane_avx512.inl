// Sixteen fp32 lanes. Included inside the AVX-512 target region. See lane_scalar.inl.

struct Lane {
  using Vec = __m512;
  using Int = __m512i;
  using Mask = __mmask16;
  static constexpr size_t kWidth = 16;

  static OFFLOAD_INLINE Vec Broadcast(float x) { return _mm512_set1_ps(x); }
  static OFFLOAD_INLINE Vec Load(const float* a) { return _mm512_loadu_ps(a); }
  static OFFLOAD_INLINE void Store(float* a, Vec x) { _mm512_storeu_ps(a, x); }
  static OFFLOAD_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static OFFLOAD_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static OFFLOAD_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static OFFLOAD_INLINE Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static OFFLOAD_INLINE Vec Sqrt(Vec a) { return _mm512_sqrt_ps(a); }
  static OFFLOAD_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static OFFLOAD_INLINE Vec SubProduct(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(b, c, a); }
  static OFFLOAD_INLINE Vec AddProduct(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(b, c, a); }
  static OFFLOAD_INLINE Vec ProductSub(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) {  // a + b is NaN in the unordered lanes
    return _mm512_mask_add_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), a, b);
  }
  static OFFLOAD_INLINE Vec Sign(Vec x) {
    const Vec one = _mm512_or_ps(_mm512_and_ps(x, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ), one);
  }

  static OFFLOAD_INLINE Int Bits(Vec x) { return _mm512_castps_si512(x); }
  static OFFLOAD_INLINE Vec FromBits(Int x) { return _mm512_castsi512_ps(x); }
  static OFFLOAD_INLINE Int BroadcastInt(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static OFFLOAD_INLINE Int CountEven(uint32_t first) {
    return AddInt(BroadcastInt(first), _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
  }
  static OFFLOAD_INLINE Int LoadInt(const uint32_t* a) { return _mm512_loadu_si512(a); }
  static OFFLOAD_INLINE void StoreInt(uint32_t* a, Int x) { _mm512_storeu_si512(a, x); }
  static OFFLOAD_INLINE Int AddInt(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static OFFLOAD_INLINE Int SubInt(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static OFFLOAD_INLINE Int MulInt(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static OFFLOAD_INLINE Int And(Int a, Int b) { return _mm512_and_si512(a, b); }
  static OFFLOAD_INLINE Int Or(Int a, Int b) { return _mm512_or_si512(a, b); }
  static OFFLOAD_INLINE Int Xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftLeft(Int x) {
    return _mm512_slli_epi32(x, kBits);
  }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftRight(Int x) {
    return _mm512_srli_epi32(x, kBits);
  }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftRightSigned(Int x) {
    return _mm512_srai_epi32(x, kBits);
  }
  static OFFLOAD_INLINE Int MaxInt(Int a, Int b) { return _mm512_max_epu32(a, b); }
  static OFFLOAD_INLINE uint32_t Largest(Int x) { return _mm512_reduce_max_epu32(x); }

  static OFFLOAD_INLINE Int LoadHalves(const uint16_t* a) { return _mm512_loadu_si512(a); }
  static OFFLOAD_INLINE void StoreHalves(uint16_t* a, Int x) { _mm512_storeu_si512(a, x); }
  static OFFLOAD_INLINE Int Blend(Int lower, Int upper) { return _mm512_mask_mov_epi16(lower, 0xAAAAAAAA, upper); }
  static OFFLOAD_INLINE Int AddHalves(Int a, Int b) { return _mm512_add_epi16(a, b); }
  static OFFLOAD_INLINE Int SubHalves(Int a, Int b) { return _mm512_sub_epi16(a, b); }
  static OFFLOAD_INLINE Int SubHalvesToZero(Int a, Int b) { return _mm512_subs_epu16(a, b); }
  static OFFLOAD_INLINE Int MinHalves(Int a, Int b) { return _mm512_min_epu16(a, b); }
  static OFFLOAD_INLINE Int SpreadSignHalves(Int x) { return _mm512_srai_epi16(x, 15); }
  static OFFLOAD_INLINE Int MulHalves(Int a, Int b) { return _mm512_mullo_epi16(a, b); }
  static OFFLOAD_INLINE Int AbsHalves(Int x) { return _mm512_abs_epi16(x); }
  static OFFLOAD_INLINE Int AndNot(Int a, Int b) { return _mm512_andnot_si512(a, b); }

  static OFFLOAD_INLINE Mask IsNan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  static OFFLOAD_INLINE Mask Greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static OFFLOAD_INLINE Int Select(Mask mask, Int yes, Int no) { return _mm512_mask_mov_epi32(no, mask, yes); }
  static OFFLOAD_INLINE Int AddWhere(Mask mask, Int x) { return _mm512_mask_add_epi32(x, mask, x, BroadcastInt(1)); }

  static OFFLOAD_INLINE Int Truncate(Vec x) { return _mm512_cvttps_epi32(x); }
  static OFFLOAD_INLINE Vec ToFloat(Int x) { return _mm512_cvtepi32_ps(x); }
  static OFFLOAD_INLINE Int LoadWide(const void* a) { return _mm512_cvtepu16_epi32(Load32Bytes(a)); }
  static OFFLOAD_INLINE Int LoadBytes(const uint8_t* a) { return _mm512_cvtepu8_epi16(Load32Bytes(a)); }
  static OFFLOAD_INLINE Int LoadSignedBytes(const int8_t* a) { return _mm512_cvtepi8_epi16(Load32Bytes(a)); }
  // Saturation keeps signs, and what is zero.
  static OFFLOAD_INLINE Int PackHalves(Int x, Int y) { return _mm512_packs_epi32(x, y); }
  static OFFLOAD_INLINE void StoreBytes(uint8_t* a, const Int (&x)[4], const Int (&nonzero)[4]) {
    const Int bytes = _mm512_packus_epi16(PackHalves(x[0], x[1]), PackHalves(x[2], x[3]));
    const __mmask64 is_nonzero = _mm512_test_epi8_mask(PackBytes(nonzero), PackBytes(nonzero));
    StoreInterleaved(a, _mm512_mask_max_epu8(bytes, is_nonzero, bytes, _mm512_set1_epi8(1)));
  }
  static OFFLOAD_INLINE void StoreSignedBytes(uint8_t* a, const Int (&x)[4], const Int (&up)[4], Int sign01,
                                              Int sign23) {
    const Int below = PackBytes(x);
    const Int bytes = _mm512_mask_adds_epi8(below, _mm512_movepi8_mask(PackBytes(up)), below, _mm512_set1_epi8(1));
    const __mmask64 is_negative = _mm512_movepi8_mask(_mm512_packs_epi16(sign01, sign23));
    StoreInterleaved(a, _mm512_mask_sub_epi8(bytes, is_negative, _mm512_setzero_si512(), bytes));
  }
  static OFFLOAD_INLINE Vec LoadFloat16(const uint16_t* a) { return _mm512_cvtph_ps(Load32Bytes(a)); }
  static OFFLOAD_INLINE Int ToFloat16(Vec x) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static OFFLOAD_INLINE void Deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
    const Int at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, at, b);
    odd = _mm512_permutex2var_ps(a, AddInt(at, BroadcastInt(1)), b);
  }
  static OFFLOAD_INLINE void Interleave(Vec even, Vec odd, Vec& a, Vec& b) {
    const Int at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a = _mm512_permutex2var_ps(even, at, odd);
    b = _mm512_permutex2var_ps(even, AddInt(at, BroadcastInt(8)), odd);
  }

  static OFFLOAD_INLINE void StorePair(uint16_t* a, Int x, Int y, bool streaming) {
    const __m256i first = _mm512_cvtepi32_epi16(x), second = _mm512_cvtepi32_epi16(y);
    const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    __m512i* destination = reinterpret_cast<__m512i*>(a);
    streaming ? _mm512_stream_si512(destination, halves) : _mm512_storeu_si512(destination, halves);
  }
  static OFFLOAD_INLINE void StorePair(float* a, Vec x, Vec y, bool streaming) {
    streaming ? _mm512_stream_ps(a, x) : _mm512_storeu_ps(a, x);
    streaming ? _mm512_stream_ps(a + kWidth, y) : _mm512_storeu_ps(a + kWidth, y);
  }
  static OFFLOAD_INLINE void FinishStreaming() { _mm_sfence(); }

 private:
  static OFFLOAD_INLINE Int PackBytes(const Int (&x)[4]) {
    return _mm512_packs_epi16(PackHalves(x[0], x[1]), PackHalves(x[2], x[3]));
  }
  // Packing leaves four bytes of each vector after another in each quarter.
  static OFFLOAD_INLINE void StoreInterleaved(uint8_t* a, Int packed) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const Int pairs = _mm512_shuffle_epi8(packed, _mm512_broadcast_i32x4(order));
    _mm512_storeu_si512(a, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), pairs));
  }
  static OFFLOAD_INLINE __m256i Load32Bytes(const void* a) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(a));
  }
};
