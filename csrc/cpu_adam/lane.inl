// The update of one lane, the only place where its arithmetic is written. Included inside a namespace and a target
// region per instruction set, because a template from outside may not use the instructions of the region.
//
// A Lane names a vector type Vec and one IEEE-754 operation per function, each rounding once: add, sub, mul, div,
// sqrt, fma, and max (the second operand when equal, NaN when either is). The order of operations is that of
// torch's fused CPU kernels; docs/numerics.md has it as formulas.

template <class Lane>
struct BroadcastScalars {
  using Vec = typename Lane::Vec;
  explicit OFFLOAD_INLINE BroadcastScalars(const AdamScalars& s)
      : grad_multiplier(Lane::Broadcast(s.grad_multiplier)),
        l2_decay(Lane::Broadcast(s.l2_decay)),
        param_decay(Lane::Broadcast(s.param_decay)),
        lerp_weight(Lane::Broadcast(s.lerp_weight)),
        beta2(Lane::Broadcast(s.beta2)),
        one_minus_beta2(Lane::Broadcast(s.one_minus_beta2)),
        sqrt_bias_correction2(Lane::Broadcast(s.sqrt_bias_correction2)),
        eps(Lane::Broadcast(s.eps)),
        neg_step_size(Lane::Broadcast(s.neg_step_size)),
        has_l2(s.l2_decay != 0.0f),
        lerp_from_grad(s.lerp_from_grad != 0) {}

  Vec grad_multiplier, l2_decay, param_decay, lerp_weight, beta2, one_minus_beta2;
  Vec sqrt_bias_correction2, eps, neg_step_size;
  bool has_l2, lerp_from_grad;
};

// max_exp_avg_sq is null without amsgrad. Multiplying by 1 is exact, so an absent scale or decay needs no branch;
// an absent L2 term does (0 * inf is NaN, and -0 + 0 is +0).
template <class Lane>
OFFLOAD_INLINE void UpdateLane(typename Lane::Vec& param, typename Lane::Vec& exp_avg, typename Lane::Vec& exp_avg_sq,
                               typename Lane::Vec* max_exp_avg_sq, typename Lane::Vec grad,
                               const BroadcastScalars<Lane>& s) {
  grad = Lane::Mul(grad, s.grad_multiplier);
  if (s.has_l2) grad = Lane::Fma(param, s.l2_decay, grad);
  param = Lane::Mul(param, s.param_decay);
  exp_avg = Lane::Fma(s.lerp_weight, Lane::Sub(grad, exp_avg), s.lerp_from_grad ? grad : exp_avg);
  exp_avg_sq = Lane::Fma(Lane::Mul(s.one_minus_beta2, grad), grad, Lane::Mul(exp_avg_sq, s.beta2));
  typename Lane::Vec second_moment = exp_avg_sq;
  if (max_exp_avg_sq != nullptr) second_moment = *max_exp_avg_sq = Lane::Max(*max_exp_avg_sq, exp_avg_sq);
  const typename Lane::Vec denominator =
      Lane::Add(Lane::Div(Lane::Sqrt(second_moment), s.sqrt_bias_correction2), s.eps);
  param = Lane::Add(param, Lane::Div(Lane::Mul(s.neg_step_size, exp_avg), denominator));
}
