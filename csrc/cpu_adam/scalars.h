// Everything about one optimizer step that is the same for every element. Computed in double by the caller and
// rounded to float once, so that no implementation rounds differently. Mirrored by offload/kernels/scalars.py and
// offload/kernels/rules.py: floats first, then flags, in the same order.
#pragma once

#include <cstdint>

namespace offload {

struct AdamScalars {
  float grad_multiplier;  // unscaling and clipping, negated to maximize
  float l2_decay;         // added to the gradient as l2_decay * p; 0 when decay is decoupled or absent
  float param_decay;      // 1 - lr * weight_decay, multiplied into p; 1 when decay is L2 or absent
  float lerp_weight;      // of the first moment, see lerp_from_grad
  float beta2;
  float one_minus_beta2;
  float sqrt_bias_correction2;  // sqrt(1 - beta2^step)
  float eps;
  float neg_step_size;     // -(lr / (1 - beta1^step))
  int32_t lerp_from_grad;  // 0: m + (1-beta1) * (g-m), as lerp_weight = 1-beta1; 1: g + (-beta1) * (g-m)
};

struct LionScalars {
  float grad_multiplier;
  float param_decay;      // 1 - lr * weight_decay
  float one_minus_beta1;  // of the direction that is taken
  float one_minus_beta2;  // of the momentum that is kept
  float neg_lr;
};

struct AdagradScalars {
  float grad_multiplier;
  float l2_decay;
  float eps;
  float neg_step_size;  // -(lr / (1 + (step - 1) * lr_decay))
};

struct SgdScalars {
  float grad_multiplier;
  float l2_decay;
  float momentum;
  float one_minus_dampening;
  float neg_lr;
  int32_t is_first;  // the momentum becomes the gradient, whatever it was
  int32_t nesterov;
};

}  // namespace offload
