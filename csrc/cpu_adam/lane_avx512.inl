// Sixteen fp32 lanes. Included inside the AVX-512 target region.

struct VectorLane {
  using Vec = __m512;
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
  static OFFLOAD_INLINE Vec Max(Vec a, Vec b) {  // a + b is NaN in the unordered lanes
    return _mm512_mask_add_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), a, b);
  }
  static OFFLOAD_INLINE Vec Sign(Vec x) {
    const Vec one = _mm512_or_ps(_mm512_and_ps(x, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ), one);
  }

  static OFFLOAD_INLINE Vec LoadBFloat16(const uint16_t* a) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static OFFLOAD_INLINE Vec LoadFloat16(const uint16_t* a) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  }

  // See FloatToBFloat16.
  static OFFLOAD_INLINE __m256i RoundToBFloat16(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), is_odd);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
  }
  static OFFLOAD_INLINE __m512i Concatenate(__m256i first, __m256i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }
  static OFFLOAD_INLINE __m512i PackBFloat16(Vec first, Vec second) {
    return Concatenate(RoundToBFloat16(first), RoundToBFloat16(second));
  }
  static OFFLOAD_INLINE __m512i PackFloat16(Vec first, Vec second) {
    return Concatenate(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT),
                       _mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
  }

  static OFFLOAD_INLINE void StoreCopy(float* a, Vec x, bool streaming) {
    streaming ? _mm512_stream_ps(a, x) : _mm512_storeu_ps(a, x);
  }
  static OFFLOAD_INLINE void StoreCopy(uint16_t* a, __m512i x, bool streaming) {
    __m512i* destination = reinterpret_cast<__m512i*>(a);
    streaming ? _mm512_stream_si512(destination, x) : _mm512_storeu_si512(destination, x);
  }
};
