// Eight fp32 lanes. Included inside the AVX2 target region. See lane_scalar.inl.

struct Lane {
  using Vec = __m256;
  using Int = __m256i;
  using Mask = __m256i;  // all ones or zeros
  static constexpr size_t kWidth = 8;

  static OFFLOAD_INLINE Vec Broadcast(float x) { return _mm256_set1_ps(x); }
  static OFFLOAD_INLINE Vec Load(const float* a) { return _mm256_loadu_ps(a); }
  static OFFLOAD_INLINE void Store(float* a, Vec x) { _mm256_storeu_ps(a, x); }
  static OFFLOAD_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static OFFLOAD_INLINE Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static OFFLOAD_INLINE Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static OFFLOAD_INLINE Vec Div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static OFFLOAD_INLINE Vec Sqrt(Vec a) { return _mm256_sqrt_ps(a); }
  static OFFLOAD_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static OFFLOAD_INLINE Vec SubProduct(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(b, c, a); }
  static OFFLOAD_INLINE Vec AddProduct(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(b, c, a); }
  static OFFLOAD_INLINE Vec ProductSub(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) {  // or-ing with the all-ones mask of unordered lanes makes them NaN
    return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  static OFFLOAD_INLINE Vec Sign(Vec x) {
    const Vec one = _mm256_or_ps(_mm256_and_ps(x, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    return _mm256_blendv_ps(x, one, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }

  static OFFLOAD_INLINE Int Bits(Vec x) { return _mm256_castps_si256(x); }
  static OFFLOAD_INLINE Vec FromBits(Int x) { return _mm256_castsi256_ps(x); }
  static OFFLOAD_INLINE Int BroadcastInt(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static OFFLOAD_INLINE Int CountEven(uint32_t first) {
    return AddInt(BroadcastInt(first), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
  }
  static OFFLOAD_INLINE Int LoadInt(const uint32_t* a) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  }
  static OFFLOAD_INLINE void StoreInt(uint32_t* a, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), x); }
  static OFFLOAD_INLINE Int AddInt(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static OFFLOAD_INLINE Int SubInt(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static OFFLOAD_INLINE Int MulInt(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static OFFLOAD_INLINE Int And(Int a, Int b) { return _mm256_and_si256(a, b); }
  static OFFLOAD_INLINE Int Or(Int a, Int b) { return _mm256_or_si256(a, b); }
  static OFFLOAD_INLINE Int Xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftLeft(Int x) {
    return _mm256_slli_epi32(x, kBits);
  }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftRight(Int x) {
    return _mm256_srli_epi32(x, kBits);
  }
  template <int kBits>
  static OFFLOAD_INLINE Int ShiftRightSigned(Int x) {
    return _mm256_srai_epi32(x, kBits);
  }
  static OFFLOAD_INLINE Int MaxInt(Int a, Int b) { return _mm256_max_epu32(a, b); }
  static OFFLOAD_INLINE uint32_t Largest(Int x) {
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1))));
  }

  static OFFLOAD_INLINE Int LoadHalves(const uint16_t* a) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  }
  static OFFLOAD_INLINE void StoreHalves(uint16_t* a, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), x); }
  static OFFLOAD_INLINE Int Blend(Int lower, Int upper) { return _mm256_blend_epi16(lower, upper, 0xAA); }
  static OFFLOAD_INLINE Int AddHalves(Int a, Int b) { return _mm256_add_epi16(a, b); }
  static OFFLOAD_INLINE Int SubHalves(Int a, Int b) { return _mm256_sub_epi16(a, b); }
  static OFFLOAD_INLINE Int SubHalvesToZero(Int a, Int b) { return _mm256_subs_epu16(a, b); }
  static OFFLOAD_INLINE Int MinHalves(Int a, Int b) { return _mm256_min_epu16(a, b); }
  static OFFLOAD_INLINE Int SpreadSignHalves(Int x) { return _mm256_srai_epi16(x, 15); }
  static OFFLOAD_INLINE Int MulHalves(Int a, Int b) { return _mm256_mullo_epi16(a, b); }
  static OFFLOAD_INLINE Int AbsHalves(Int x) { return _mm256_abs_epi16(x); }
  static OFFLOAD_INLINE Int AndNot(Int a, Int b) { return _mm256_andnot_si256(a, b); }

  static OFFLOAD_INLINE Mask IsNan(Vec x) { return Bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
  static OFFLOAD_INLINE Mask Greater(Vec a, Vec b) { return Bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static OFFLOAD_INLINE Int Select(Mask mask, Int yes, Int no) { return _mm256_blendv_epi8(no, yes, mask); }
  static OFFLOAD_INLINE Int AddWhere(Mask mask, Int x) { return SubInt(x, mask); }

  static OFFLOAD_INLINE Int Truncate(Vec x) { return _mm256_cvttps_epi32(x); }
  static OFFLOAD_INLINE Vec ToFloat(Int x) { return _mm256_cvtepi32_ps(x); }
  static OFFLOAD_INLINE Int LoadWide(const void* a) { return _mm256_cvtepu16_epi32(Load16Bytes(a)); }
  static OFFLOAD_INLINE Int LoadBytes(const uint8_t* a) { return _mm256_cvtepu8_epi16(Load16Bytes(a)); }
  static OFFLOAD_INLINE Int LoadSignedBytes(const int8_t* a) { return _mm256_cvtepi8_epi16(Load16Bytes(a)); }
  // Saturation keeps signs, and what is zero.
  static OFFLOAD_INLINE Int PackHalves(Int x, Int y) { return _mm256_packs_epi32(x, y); }
  static OFFLOAD_INLINE void StoreBytes(uint8_t* a, const Int (&x)[4], const Int (&nonzero)[4]) {
    const Int bytes = _mm256_packus_epi16(PackHalves(x[0], x[1]), PackHalves(x[2], x[3]));
    StoreInterleaved(a, _mm256_max_epu8(bytes, _mm256_min_epu8(PackBytes(nonzero), _mm256_set1_epi8(1))));
  }
  static OFFLOAD_INLINE void StoreSignedBytes(uint8_t* a, const Int (&x)[4], const Int (&up)[4], Int sign01,
                                              Int sign23) {
    const Int is_up = _mm256_cmpgt_epi8(_mm256_setzero_si256(), PackBytes(up));
    const Int bytes = _mm256_subs_epi8(PackBytes(x), is_up);
    StoreInterleaved(a, _mm256_sign_epi8(bytes, _mm256_packs_epi16(sign01, sign23)));
  }
  static OFFLOAD_INLINE Vec LoadFloat16(const uint16_t* a) { return _mm256_cvtph_ps(Load16Bytes(a)); }
  static OFFLOAD_INLINE Int ToFloat16(Vec x) {
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static OFFLOAD_INLINE void Deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
    even = SwapMiddle(_mm256_shuffle_ps(a, b, 0x88));
    odd = SwapMiddle(_mm256_shuffle_ps(a, b, 0xDD));
  }
  static OFFLOAD_INLINE void Interleave(Vec even, Vec odd, Vec& a, Vec& b) {
    const Vec lower = _mm256_unpacklo_ps(even, odd), upper = _mm256_unpackhi_ps(even, odd);
    a = _mm256_permute2f128_ps(lower, upper, 0x20);
    b = _mm256_permute2f128_ps(lower, upper, 0x31);
  }

  static OFFLOAD_INLINE void StorePair(uint16_t* a, Int x, Int y, bool streaming) {
    const Int halves = Pack(x, y);
    __m256i* destination = reinterpret_cast<__m256i*>(a);
    streaming ? _mm256_stream_si256(destination, halves) : _mm256_storeu_si256(destination, halves);
  }
  static OFFLOAD_INLINE void StorePair(float* a, Vec x, Vec y, bool streaming) {
    streaming ? _mm256_stream_ps(a, x) : _mm256_storeu_ps(a, x);
    streaming ? _mm256_stream_ps(a + kWidth, y) : _mm256_storeu_ps(a + kWidth, y);
  }
  static OFFLOAD_INLINE void FinishStreaming() { _mm_sfence(); }

 private:
  static OFFLOAD_INLINE __m128i Load16Bytes(const void* a) { return _mm_loadu_si128(static_cast<const __m128i*>(a)); }
  static OFFLOAD_INLINE Int PackBytes(const Int (&x)[4]) {
    return _mm256_packs_epi16(PackHalves(x[0], x[1]), PackHalves(x[2], x[3]));
  }
  // Packing leaves four bytes of each vector after another in either half.
  static OFFLOAD_INLINE void StoreInterleaved(uint8_t* a, Int packed) {
    const Int pairs =
        _mm256_shuffle_epi8(packed, _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,  //
                                                     0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), _mm256_permute4x64_epi64(pairs, 0xD8));
  }
  // Of four quarters.
  static OFFLOAD_INLINE Vec SwapMiddle(Vec x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xD8));
  }
  // Sixteen 16-bit values in order: packus interleaves 128-bit halves.
  static OFFLOAD_INLINE Int Pack(Int x, Int y) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xD8); }
};
