"""Which operations run in 16 bits, which in fp32: one table for every device.

    compute    every input -> the compute format     products: the sum inside runs in fp32, only operands are rounded
    fp32       every input -> fp32                   what leaves fp16's range, what cancels, what has no 16-bit kernel
    widest     every input -> the widest of them     what joins tensors, and takes only tensors of one format
    as is      nothing is cast                       what accumulates in fp32 inside and stays in range

Micikevicius et al. 2018 (arXiv 1710.03740, section 3.3) part operations into products, reductions and pointwise ones, by
what each needs. torch.autocast has a list for each device (aten/src/ATen/autocast_mode.h and .cpp), and they differ: on
CUDA it was made for fp16, on a processor for bf16 and for what had kernels. DIFFERENCES says where torch departs from the
table, and why we do not follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Policy = Literal["compute", "fp32", "widest", "as is"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one operation gets, and why."""

    policy: Policy
    why: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Operations for which torch's list for a device says something else than the table."""

    device_type: str
    theirs: str  # torch's policy there, or "refused"
    names: str
    why: str
    overflows: tuple[str, ...] = ()  # compute formats whose range torch's policy leaves there


_GROUPS: tuple[tuple[Policy, str, str], ...] = (
    (
        "compute",
        "matrix product: the sum runs in fp32 inside, only the operands are rounded",
        "linear matmul mm bmm mv addmm addbmm baddbmm addmv addr einsum chain_matmul linalg_matmul linalg_multi_dot "
        "linalg_vecdot tensordot _addmm_activation",
    ),
    (
        "compute",
        "convolution: the sum runs in fp32 inside, only the operands are rounded",
        "conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution "
        "cudnn_convolution cudnn_convolution_transpose",
    ),
    (
        "compute",
        "attention: two products around a softmax that runs in fp32 inside",
        "scaled_dot_product_attention _scaled_dot_product_flash_attention _native_multi_head_attention",
    ),
    (
        "compute",
        "one step of a recurrent layer: products, and gates within [-1, 1]",
        "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell",
    ),
    ("compute", "slopes in fp32 would widen every activation behind it", "prelu"),
    (
        "fp32",
        "loss: a small number made from many, and where every gradient begins",
        "cross_entropy_loss nll_loss nll_loss2d mse_loss l1_loss smooth_l1_loss huber_loss kl_div ctc_loss "
        "binary_cross_entropy binary_cross_entropy_with_logits poisson_nll_loss cosine_embedding_loss "
        "hinge_embedding_loss margin_ranking_loss soft_margin_loss triplet_margin_loss multi_margin_loss "
        "multilabel_margin_loss multilabel_margin_loss_forward",
    ),
    (
        "fp32",
        "range: the result can be far larger or smaller than the input",
        "exp expm1 cosh sinh pow reciprocal",
    ),
    ("fp32", "range: a sum or product over many numbers grows with their count", "sum prod cumsum cumprod"),
    (
        "fp32",
        "range: squares, and sums of them",
        "norm frobenius_norm nuclear_norm linalg_vector_norm linalg_matrix_norm renorm dist pdist cdist "
        "cosine_similarity",
    ),
    (
        "fp32",
        "logarithms: an error of 2^-9 of a log-probability goes into the loss undiminished",
        "log log2 log10 log1p logsumexp log_softmax softplus",
    ),
    ("fp32", "steep at the ends of its domain, where 16 bits leave few numbers", "acos asin erfinv tan rsqrt"),
    (
        "fp32",
        "normalisation: mean and variance cancel, and its weights are kept in fp32",
        "layer_norm native_layer_norm group_norm rms_norm",
    ),
    (
        "fp32",
        "interpolation: the backward pass adds many pixels up in the format of the image",
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ),
    (
        "fp32",
        "coordinates: bf16 moves them by up to 1/512 of half the image",
        "grid_sampler grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback",
    ),
    (
        "fp32",
        "linear algebra: no 16-bit kernel, and errors grow with the condition number",
        "cholesky cholesky_inverse cholesky_solve inverse pinverse qr svd geqrf orgqr ormqr lu_solve _lu_with_info "
        "triangular_solve linalg_cholesky linalg_cholesky_ex linalg_cond linalg_eig linalg_eigh linalg_eigvals "
        "linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_rank linalg_qr "
        "linalg_solve linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve trace",
    ),
    (
        "fp32",
        "Fourier transforms and complex numbers: no 16-bit kernel",
        "fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_irfft fft_irfft2 fft_irfftn "
        "fft_rfft fft_rfft2 fft_rfftn stft polar view_as_complex",
    ),
    (
        "fp32",
        "pooling and padding for which torch has had no 16-bit kernel on every device",
        "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d "
        "max_unpool2d max_unpool3d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
        "replication_pad3d",
    ),
    ("fp32", "between two neighbours of a sorted list 16 bits leave no room", "quantile nanquantile"),
    ("fp32", "it rounds by itself, to a scale that is kept in fp32", "fake_quantize_per_tensor_affine"),
    (
        "widest",
        "joins tensors, and nothing is lost in the widest format",
        "cat stack index_copy index_put scatter_add",
    ),
    (
        "widest",
        "of several inputs, which must have one format",
        "addcdiv addcmul atan2 cross dot vdot bilinear",
    ),
    ("as is", "the maximum is subtracted, the sum runs in fp32 inside, the result is within [0, 1]", "softmax"),
)  # fmt: skip

TABLE: Mapping[str, Operation] = {
    name: Operation(policy=policy, why=why) for policy, why, names in _GROUPS for name in names.split()
}
"""Operation, by its name in torch's dispatcher -> policy and reason."""

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        device_type="cpu",
        theirs="as is",
        names="exp expm1 cosh sinh pow reciprocal sum cumsum cumprod norm frobenius_norm linalg_vector_norm "
        "linalg_matrix_norm dist",
        why="made for bf16, which has fp32's range; in fp16 the results overflow",
        overflows=("fp16",),
    ),
    Difference(
        device_type="cpu",
        theirs="as is",
        names="log log2 log10 log1p logsumexp log_softmax softplus acos asin erfinv tan rsqrt renorm cosine_similarity "
        "layer_norm native_layer_norm group_norm rms_norm upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
        "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d",
        why="its kernels compute in fp32 inside and round the result once; what comes out has 8 or 11 significant bits",
    ),
    Difference(
        device_type="cpu",
        theirs="as is",
        names="pdist nuclear_norm _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        why="there is no 16-bit kernel, so torch raises an error",
    ),
    Difference(
        device_type="cpu",
        theirs="as is",
        names="mv addmv addr convolution _convolution lstm_cell gru_cell",
        why="these spellings are left out of the list: fp32 stays fp32, and mixed inputs are an error for most",
    ),
    Difference(
        device_type="cpu",
        theirs="as is",
        names="chain_matmul linalg_multi_dot tensordot bilinear cross dot vdot index_put scatter_add",
        why="inputs of two formats are an error, as when one comes from a product and the other is a weight",
    ),
    Difference(
        device_type="cuda",
        theirs="as is",
        names="cholesky cholesky_inverse cholesky_solve inverse pinverse qr svd geqrf orgqr ormqr lu_solve _lu_with_info "
        "triangular_solve linalg_cholesky linalg_cholesky_ex linalg_cond linalg_eig linalg_eigh linalg_eigvals "
        "linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_rank linalg_qr "
        "linalg_solve linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve quantile nanquantile ctc_loss",
        why="there is no 16-bit kernel, so torch raises an error",
    ),
    Difference(
        device_type="cuda",
        theirs="as is",
        names="fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_irfft fft_irfft2 fft_irfftn "
        "fft_rfft fft_rfft2 fft_rfftn stft polar view_as_complex",
        why="cuFFT transforms fp16 of some lengths only, and complex numbers of two fp16 are experimental in torch",
    ),
    Difference(
        device_type="cuda",
        theirs="as is",
        names="avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d fractional_max_pool2d "
        "fractional_max_pool3d max_unpool2d max_unpool3d reflection_pad1d reflection_pad2d replication_pad1d "
        "replication_pad2d replication_pad3d trace fake_quantize_per_tensor_affine multilabel_margin_loss_forward",
        why="most have 16-bit kernels there; that is not worth a table for each device",
    ),
    Difference(
        device_type="cuda",
        theirs="as is",
        names="_addmm_activation _native_multi_head_attention index_copy",
        why="these spellings are left out of the list: fp32 stays fp32",
    ),
    Difference(
        device_type="cuda",
        theirs="widest",
        names="grid_sampler grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback",
        why="a grid that a layer has computed arrives in 16 bits and stays so",
    ),
    Difference(device_type="cuda", theirs="widest", names="tensordot", why="it is a matrix product like the others"),
    Difference(
        device_type="cuda",
        theirs="fp32",
        names="softmax",
        why="the kernel accumulates in fp32 anyway; 16 bits out halve what attention keeps for the backward pass",
    ),
    Difference(
        device_type="cuda",
        theirs="refused",
        names="binary_cross_entropy",
        why="torch asks for binary_cross_entropy_with_logits; in fp32 the logarithm of a 16-bit probability is finite too",
    ),
)
"""Where torch's own lists depart from the table. Tests hold every row against the torch that is installed."""
