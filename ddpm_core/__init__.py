"""The mathematics of denoising diffusion: schedules, losses, samplers, networks. Needs torch and einops, nothing else.

Shapes: x is (b, ...), t is (b,) int64 in [0, T). Randomness is an argument; nothing here reads a file, an environment
variable or a rank.

Any callable `(x_t, t, condition)` is a denoiser, on data of any rank: `UNet` and `DiT` are only ours. A plain function
on vectors, trained (had it weights) and sampled:

    >>> import torch
    >>> def denoiser(x_t, t, condition):
    ...     return torch.full_like(x_t, 0.5)  # its prediction of x0
    >>> schedule, noise = register_schedule(beta_schedule="cosine"), torch.randn(11, 4, 2)
    >>> t = torch.tensor([0, 300, 600, 999])
    >>> p_losses(denoiser, schedule, torch.zeros(4, 2), t, noise[0], parameterization="x0").loss
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    >>> sample_ddpm(denoiser, schedule, noise[0], noise.__getitem__, parameterization="x0", num_steps=10).shape
    torch.Size([4, 2])
"""

from ddpm_core.conditioning import (
    ClassEmbedding,
    Condition,
    Conditions,
    ContextConcat,
    composite,
    drop_conditions,
    drop_labels,
    timestep_embedding,
)
from ddpm_core.dictionaries import ExactEmbedding, NearestEmbedding, QuantizedEmbedding, take_auxiliary_loss
from ddpm_core.ema import EMA
from ddpm_core.first_stage import (
    FirstStageLoss,
    LatentScale,
    adaptive_weight,
    first_stage_loss,
    hinge_loss,
    kl_to_standard_normal,
    perceptual_distance,
    reparameterize,
)
from ddpm_core.frechet import Moments, frechet_distance, frechet_distance_of_features
from ddpm_core.guidance import AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance, Denoiser, IntervalGuidance
from ddpm_core.inception_score import ClassSums, InceptionScore
from ddpm_core.kernel import KernelDistance, kernel_distance, kernel_inception_distance
from ddpm_core.likelihood import BitsPerDim, bits_per_dim, discretised_gaussian_log_likelihood
from ddpm_core.losses import (
    LOSS_TYPES,
    DiffusionLoss,
    classifier_loss,
    get_loss,
    min_snr_weights,
    p_losses,
    weighted_loss,
)
from ddpm_core.neighbours import NeighbourScores, neighbour_scores
from ddpm_core.nn.autoencoder import KLAutoencoder, PatchDiscriminator
from ddpm_core.nn.classifier import NoisyClassifier
from ddpm_core.nn.cost import Cost, count_cost
from ddpm_core.nn.dit import DiT
from ddpm_core.nn.network import DenoisingNetwork
from ddpm_core.nn.unet import UNet
from ddpm_core.noising import learned_log_variance, q_posterior, q_sample
from ddpm_core.restoration.ddrm import restore_ddrm
from ddpm_core.restoration.operators import (
    Colourise,
    Deblur,
    Denoise,
    Inpaint,
    LinearOperator,
    Separable,
    SuperResolve,
    gaussian_kernel,
)
from ddpm_core.samplers.ddim import invert_ddim, sample_ddim, slerp
from ddpm_core.samplers.ddpm import sample_ddpm
from ddpm_core.samplers.dpm_solver import sample_dpm_solver
from ddpm_core.samplers.grid import SPACINGS, make_timesteps
from ddpm_core.samplers.heun import sample_heun
from ddpm_core.schedules import (
    BETA_SCHEDULES,
    NoiseSchedule,
    make_betas,
    register_schedule,
    rescale_zero_terminal_snr,
)
from ddpm_core.targets import (
    PARAMETERIZATIONS,
    predict_noise_from_start,
    predict_start_from_noise,
    split_output,
    to_target,
    to_x0,
)
from ddpm_core.timesteps import LossAwareTimesteps, stratified_timesteps, uniform_timesteps

__all__ = [
    "BETA_SCHEDULES",
    "EMA",
    "LOSS_TYPES",
    "PARAMETERIZATIONS",
    "SPACINGS",
    "AutoGuidance",
    "BitsPerDim",
    "ClassEmbedding",
    "ClassSums",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Colourise",
    "Condition",
    "Conditions",
    "ContextConcat",
    "Cost",
    "Deblur",
    "Denoise",
    "Denoiser",
    "DenoisingNetwork",
    "DiT",
    "DiffusionLoss",
    "ExactEmbedding",
    "FirstStageLoss",
    "InceptionScore",
    "Inpaint",
    "IntervalGuidance",
    "KLAutoencoder",
    "KernelDistance",
    "LatentScale",
    "LinearOperator",
    "LossAwareTimesteps",
    "Moments",
    "NearestEmbedding",
    "NeighbourScores",
    "NoiseSchedule",
    "NoisyClassifier",
    "PatchDiscriminator",
    "QuantizedEmbedding",
    "Separable",
    "SuperResolve",
    "UNet",
    "adaptive_weight",
    "bits_per_dim",
    "classifier_loss",
    "composite",
    "count_cost",
    "discretised_gaussian_log_likelihood",
    "drop_conditions",
    "drop_labels",
    "first_stage_loss",
    "frechet_distance",
    "frechet_distance_of_features",
    "gaussian_kernel",
    "get_loss",
    "hinge_loss",
    "invert_ddim",
    "kernel_distance",
    "kernel_inception_distance",
    "kl_to_standard_normal",
    "learned_log_variance",
    "make_betas",
    "make_timesteps",
    "min_snr_weights",
    "neighbour_scores",
    "p_losses",
    "perceptual_distance",
    "predict_noise_from_start",
    "predict_start_from_noise",
    "q_posterior",
    "q_sample",
    "register_schedule",
    "reparameterize",
    "rescale_zero_terminal_snr",
    "restore_ddrm",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpm_solver",
    "sample_heun",
    "slerp",
    "split_output",
    "stratified_timesteps",
    "take_auxiliary_loss",
    "timestep_embedding",
    "to_target",
    "to_x0",
    "uniform_timesteps",
    "weighted_loss",
]
