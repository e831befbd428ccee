"""Networks: any callable `(x_t, t, condition)` is a denoiser, these are ours."""
