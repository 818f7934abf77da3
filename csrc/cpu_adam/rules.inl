// The update rules, the only place where their arithmetic is written. Included by kernel.inl, so once per instruction
// set: code from outside its target region may not use its instructions.
//
// Lane names a vector type Vec and one IEEE-754 operation per function, each rounding once: add, sub, mul, div, sqrt,
// fma, sign, and max (the second operand when equal, NaN when either is). The order of operations is that of torch's
// fused CPU kernels where torch has one; docs/numerics.md has it as formulas.
//
// A rule keeps a first moment (of any sign), a second one (never negative), the largest of the second ones, or none,
// and says which. Where it has none, what it is handed is not touched. Multiplying by 1 is exact, so an absent scale or
// decay needs no branch; an absent L2 term does (0 * inf is NaN, and -0 + 0 is +0).

template <bool kAmsgrad>
class AdamRule {
 public:
  using Scalars = AdamScalars;
  using Vec = Lane::Vec;
  static constexpr bool kHasFirst = true, kHasSecond = true, kHasMaxSecond = kAmsgrad;

  explicit OFFLOAD_INLINE AdamRule(const Scalars& s)
      : grad_multiplier(Lane::Broadcast(s.grad_multiplier)),
        l2_decay(Lane::Broadcast(s.l2_decay)),
        param_decay(Lane::Broadcast(s.param_decay)),
        lerp_weight(Lane::Broadcast(s.lerp_weight)),
        beta2(Lane::Broadcast(s.beta2)),
        one_minus_beta2(Lane::Broadcast(s.one_minus_beta2)),
        sqrt_bias_correction2(Lane::Broadcast(s.sqrt_bias_correction2)),
        eps(Lane::Broadcast(s.eps)),
        neg_step_size(Lane::Broadcast(s.neg_step_size)),
        has_l2((FloatToBits(s.l2_decay) << 1) != 0),
        lerp_from_grad(s.lerp_from_grad != 0) {}

  OFFLOAD_INLINE void Step(Vec& param, Vec& exp_avg, Vec& exp_avg_sq, Vec& max_exp_avg_sq, Vec grad) const {
    grad = Lane::Mul(grad, grad_multiplier);
    if (OFFLOAD_UNLIKELY(has_l2)) grad = Lane::Fma(param, l2_decay, grad);
    param = Lane::Mul(param, param_decay);
    exp_avg = Lane::Fma(lerp_weight, Lane::Sub(grad, exp_avg), OFFLOAD_UNLIKELY(lerp_from_grad) ? grad : exp_avg);
    exp_avg_sq = Lane::Fma(Lane::Mul(one_minus_beta2, grad), grad, Lane::Mul(exp_avg_sq, beta2));
    Vec second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) second_moment = max_exp_avg_sq = Lane::Max(max_exp_avg_sq, exp_avg_sq);
    const Vec denominator = Lane::Add(Lane::Div(Lane::Sqrt(second_moment), sqrt_bias_correction2), eps);
    param = Lane::Add(param, Lane::Div(Lane::Mul(neg_step_size, exp_avg), denominator));
  }

 private:
  Vec grad_multiplier, l2_decay, param_decay, lerp_weight, beta2, one_minus_beta2;
  Vec sqrt_bias_correction2, eps, neg_step_size;
  bool has_l2, lerp_from_grad;
};

using Adam = AdamRule<false>;
using AdamAmsgrad = AdamRule<true>;

class Lion {
 public:
  using Scalars = LionScalars;
  using Vec = Lane::Vec;
  static constexpr bool kHasFirst = true, kHasSecond = false, kHasMaxSecond = false;

  explicit OFFLOAD_INLINE Lion(const Scalars& s)
      : grad_multiplier(Lane::Broadcast(s.grad_multiplier)),
        param_decay(Lane::Broadcast(s.param_decay)),
        one_minus_beta1(Lane::Broadcast(s.one_minus_beta1)),
        one_minus_beta2(Lane::Broadcast(s.one_minus_beta2)),
        neg_lr(Lane::Broadcast(s.neg_lr)) {}

  OFFLOAD_INLINE void Step(Vec& param, Vec& exp_avg, Vec&, Vec&, Vec grad) const {
    grad = Lane::Mul(grad, grad_multiplier);
    const Vec towards_grad = Lane::Sub(grad, exp_avg);
    const Vec direction = Lane::Sign(Lane::Fma(one_minus_beta1, towards_grad, exp_avg));
    param = Lane::Add(Lane::Mul(param, param_decay), Lane::Mul(neg_lr, direction));
    exp_avg = Lane::Fma(one_minus_beta2, towards_grad, exp_avg);
  }

 private:
  Vec grad_multiplier, param_decay, one_minus_beta1, one_minus_beta2, neg_lr;
};

class Adagrad {
 public:
  using Scalars = AdagradScalars;
  using Vec = Lane::Vec;
  static constexpr bool kHasFirst = false, kHasSecond = true, kHasMaxSecond = false;

  explicit OFFLOAD_INLINE Adagrad(const Scalars& s)
      : grad_multiplier(Lane::Broadcast(s.grad_multiplier)),
        l2_decay(Lane::Broadcast(s.l2_decay)),
        eps(Lane::Broadcast(s.eps)),
        neg_step_size(Lane::Broadcast(s.neg_step_size)),
        has_l2((FloatToBits(s.l2_decay) << 1) != 0) {}

  OFFLOAD_INLINE void Step(Vec& param, Vec&, Vec& sum, Vec&, Vec grad) const {
    grad = Lane::Mul(grad, grad_multiplier);
    if (OFFLOAD_UNLIKELY(has_l2)) grad = Lane::Fma(param, l2_decay, grad);
    sum = Lane::Fma(grad, grad, sum);
    param = Lane::Add(param, Lane::Div(Lane::Mul(neg_step_size, grad), Lane::Add(Lane::Sqrt(sum), eps)));
  }

 private:
  Vec grad_multiplier, l2_decay, eps, neg_step_size;
  bool has_l2;
};

// Without momentum there is no state but the master.
template <bool kMomentum>
class SgdRule {
 public:
  using Scalars = SgdScalars;
  using Vec = Lane::Vec;
  static constexpr bool kHasFirst = kMomentum, kHasSecond = false, kHasMaxSecond = false;

  explicit OFFLOAD_INLINE SgdRule(const Scalars& s)
      : grad_multiplier(Lane::Broadcast(s.grad_multiplier)),
        l2_decay(Lane::Broadcast(s.l2_decay)),
        momentum(Lane::Broadcast(s.momentum)),
        one_minus_dampening(Lane::Broadcast(s.one_minus_dampening)),
        neg_lr(Lane::Broadcast(s.neg_lr)),
        has_l2((FloatToBits(s.l2_decay) << 1) != 0),
        is_first(s.is_first != 0),
        nesterov(s.nesterov != 0) {}

  OFFLOAD_INLINE void Step(Vec& param, Vec& buffer, Vec&, Vec&, Vec grad) const {
    grad = Lane::Mul(grad, grad_multiplier);
    if (OFFLOAD_UNLIKELY(has_l2)) grad = Lane::Fma(param, l2_decay, grad);
    if constexpr (kMomentum) {
      buffer = is_first ? grad : Lane::Fma(one_minus_dampening, grad, Lane::Mul(buffer, momentum));
      grad = nesterov ? Lane::Fma(buffer, momentum, grad) : buffer;
    }
    param = Lane::Fma(grad, neg_lr, param);
  }

 private:
  Vec grad_multiplier, l2_decay, momentum, one_minus_dampening, neg_lr;
  bool has_l2, is_first, nesterov;
};

using Sgd = SgdRule<false>;
using SgdMomentum = SgdRule<true>;
