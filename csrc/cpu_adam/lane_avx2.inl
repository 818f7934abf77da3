// Eight fp32 lanes. Included inside the AVX2 target region.

struct VectorLane {
  using Vec = __m256;
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
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) {  // or-ing with the all-ones mask of unordered lanes makes them NaN
    return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  static OFFLOAD_INLINE Vec Sign(Vec x) {
    const Vec one = _mm256_or_ps(_mm256_and_ps(x, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    return _mm256_blendv_ps(x, one, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }

  static OFFLOAD_INLINE Vec LoadBFloat16(const uint16_t* a) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static OFFLOAD_INLINE Vec LoadFloat16(const uint16_t* a) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
  }

  // bfloat16 in the low half of each 32-bit lane; see FloatToBFloat16.
  static OFFLOAD_INLINE __m256i RoundToBFloat16(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), is_odd);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  }
  static OFFLOAD_INLINE __m256i PackBFloat16(Vec first, Vec second) {
    // packus interleaves 128-bit halves: permute the quarters back into order.
    const __m256i packed = _mm256_packus_epi32(RoundToBFloat16(first), RoundToBFloat16(second));
    return _mm256_permute4x64_epi64(packed, 0xD8);
  }
  static OFFLOAD_INLINE __m256i PackFloat16(Vec first, Vec second) {
    return _mm256_set_m128i(_mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
  }

  static OFFLOAD_INLINE void StoreCopy(float* a, Vec x, bool streaming) {
    streaming ? _mm256_stream_ps(a, x) : _mm256_storeu_ps(a, x);
  }
  static OFFLOAD_INLINE void StoreCopy(uint16_t* a, __m256i x, bool streaming) {
    __m256i* destination = reinterpret_cast<__m256i*>(a);
    streaming ? _mm256_stream_si256(destination, x) : _mm256_storeu_si256(destination, x);
  }
};
