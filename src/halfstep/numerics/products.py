"""The three products of a linear layer, each with formats of its own.

    output       y  = x w^T       x [M, K], w [N, K], sums over K
    grad_input   dx = g w         g [M, N],           sums over N
    grad_weight  dw = g^T x                           sums over M

Each operand is scaled along the dimension that its product sums over, so x, w and g are each quantized twice, both times
from the numbers as they were: a copy made from the other copy would be rounded twice. Where one scale serves the whole
tensor the two copies are the same, and made once.

Defaults: fp8 takes e4m3 forward and e5m2 for the gradient that comes in, whose numbers span more binades (Micikevicius et al.
2022, arXiv 2209.05433, section 3.2); block formats take one format for all, as their blocks keep the span small (DeepSeek-V3
2024, section 3.3; Mishra et al. 2025, arXiv 2506.08027); int8 takes a scale a row. Operands in bf16 are not scaled: with
`grad_weight="bf16"`, int8 is SwitchBack (Wortsman et al. 2023, arXiv 2304.13013), whose point is that grad_weight sums over
the longest dimension and is the noisiest of the three.

A product runs in one of these ways; `choose_kernel` says which and why:

    scaled_mm   torch._scaled_mm, fp8 with one scale a tensor or row, on CUDA from compute capability 8.9
    int_mm      torch._int_mm, int8 with one scale a tensor or row: sums in int32, exact, where they are sure to fit (133,144
                products); on CUDA, and on CPUs with VNNI: on an EPYC with avx512_vnni it took half of bf16's time at 1024 x 256 x
                1024, as long at 4096 x 1024 x 1024
    bf16        emulated: the numbers, scales included, in bf16, where they are exact there (significands of 8 bits, scales
                that are powers of two) and the result is wanted in bf16
    fp32        emulated: all else. A CPU's bf16 product sums in fp32 but returns bf16; only an fp32 product returns fp32,
                which takes two to three times as long on an EPYC with avx512_bf16.

An emulated product rounds what the format rounds and nothing else: its operands hold the quantized numbers exactly (with a
scale that is no power of two, within 2^-24), it sums in fp32, and its result is rounded once to the dtype that is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from halfstep.errors import FormatError, PlanError
from halfstep.numerics.amax import AmaxHistory, find_amax
from halfstep.numerics.casting import STORAGE, ScaledTensor, Scaling, quantize
from halfstep.numerics.formats import find_format
from halfstep.numerics.noise import derive_keys, draw_noise
from halfstep.numerics.rounding import round_to

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""Operand formats without scales, and the dtype that their numbers are kept in."""
WHOLE = Scaling(kind="tensor")
MOST_TERMS = (2**31 - 1) // 127**2  # products of int8 numbers whose sum fits into int32, whatever they are


@dataclass(frozen=True, kw_only=True)
class Operand:
    """The format of one operand of a product.

    Examples:
        >>> Operand(format="nvfp4"), Operand(format="bf16").is_scaled
        (Operand(format='nvfp4', scaling=Scaling(kind='block', rows=1, columns=16, scale=''), mode='nearest_even'), False)
    """

    format: str
    scaling: Scaling = WHOLE
    mode: str = "nearest_even"

    def __post_init__(self) -> None:
        target = find_format(self.format)
        if target.element.name not in STORAGE and target.name not in PLAIN:
            raise FormatError(f"products take {', '.join(PLAIN)} and what quantize takes; got {target.name}")
        object.__setattr__(self, "format", target.name)
        if target.block and self.scaling == WHOLE:
            object.__setattr__(self, "scaling", Scaling.parse(f"1x{target.block}"))

    @property
    def is_scaled(self) -> bool:
        return self.format not in PLAIN

    @property
    def is_the_same_along_all(self) -> bool:
        """Whether the dimension that the product sums over makes no difference."""
        return (
            not self.is_scaled
            or self.scaling.kind in ("tensor", "delayed")
            or self.scaling.rows == self.scaling.columns > 0
        )


@dataclass(frozen=True, kw_only=True)
class Product:
    """The operands of one product, in the order in which they are multiplied."""

    left: Operand
    right: Operand


@dataclass(frozen=True, kw_only=True)
class Products:
    """What the three products of a layer take; for a product of two activations, the right one is the "weight".

    Examples:
        >>> products = Products.of("fp8_e4m3")
        >>> products.output.left.format, products.grad_weight.left.format
        ('fp8_e4m3', 'fp8_e5m2')
        >>> Products.of("int8", grad_weight="bf16").grad_weight.right.format            # SwitchBack
        'bf16'
    """

    output: Product  # activation, weight
    grad_input: Product  # gradient, weight
    grad_weight: Product  # gradient, activation

    @classmethod
    def of(
        cls,
        compute: str,
        *,
        gradient: str = "",
        scaling: str | Scaling = "",
        weight_scaling: str | Scaling = "",
        grad_weight: str = "",
        gradient_mode: str = "nearest_even",
    ) -> "Products":
        """The products of a compute format, with the defaults at the head of this module.

        gradient: format of the gradient that comes in; "" is fp8_e5m2 for fp8 scaled by tensor or row, else `compute`.
        scaling: a word of `Scaling`; "" is "row" for integers, a block format's own blocks, else "tensor".
        weight_scaling: the same for weights; "" is as `scaling`.
        grad_weight: format of both operands of the third product; "" is as in the others.
        gradient_mode: how gradients are rounded: "nearest_even" or "stochastic".

        Raises FormatError for formats and words that do not exist or do not go together.
        """
        target = find_format(compute)
        words = scaling or ("row" if target.kind == "integer" and not target.block else "")
        along = Scaling.parse(words or (f"1x{target.block}" if target.block else "tensor"))
        if not gradient:
            gradient = "fp8_e5m2" if target.name == "fp8_e4m3" and along.kind != "block" else target.name
        weights = Scaling.parse(weight_scaling or along)
        a = Operand(format=compute, scaling=along)
        w = Operand(format=compute, scaling=weights)
        g = Operand(format=gradient, scaling=along, mode=gradient_mode)
        third = Product(left=g, right=a)
        if grad_weight:
            third = Product(left=replace(g, format=grad_weight), right=replace(a, format=grad_weight))
        return cls(output=Product(left=a, right=w), grad_input=Product(left=g, right=w), grad_weight=third)


class ProductState:
    """What the products of one place in a model keep from call to call, and what they ask of the world around them.

    histories: one for each operand that is scaled by "delayed", by its role: "left", "right", "gradient".
    reduce: agrees on an amax with other ranks; for scales of whole tensors.
    seed, number: of the noise, for stochastic rounding: a run's and this place's. `draws` counts on from call to call.
    weights: quantized weights that calls of the same step share.

    Examples:
        >>> state = ProductState(window=16, seed=1)
        >>> y = quantize_operand(torch.ones(2, 2), Operand(format="fp8_e4m3", scaling=Scaling.parse("delayed")), -1, state)
        >>> state.histories["left"].amaxes.amax().item()
        1.0
    """

    def __init__(
        self,
        *,
        window: int = 1024,
        margin: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        number: int = 0,
        weights: "QuantizedWeights | None" = None,
    ) -> None:
        roles = ("left", "right", "gradient")
        self.histories = {role: AmaxHistory(window=window, margin=margin, reduce=reduce) for role in roles}
        self.reduce, self.seed, self.number, self.weights = reduce, seed, number, weights
        self.draws = 0
        self.is_training = True  # False, for evaluation: a forward pass that histories and shared weights do not see

    def draw(self, x: Tensor) -> Tensor:
        """New noise of x's shape."""
        self.draws += 1
        keys = derive_keys(self.seed, self.number, self.draws)
        return draw_noise(keys, 0, x.numel(), x.device).reshape(x.shape)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"draws": self.draws, **{role: history.state_dict() for role, history in self.histories.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws = state["draws"]
        for role, history in self.histories.items():
            history.load_state_dict(state[role])


class Histories:
    """The amax histories of several places in a model, by path: copied, put back and agreed on together.

    Examples:
        >>> histories = Histories({"fc": ProductState(window=2)})
        >>> before = histories.copy()
        >>> _ = histories.states["fc"].histories["left"].follow(torch.ones(1))
        >>> histories.put_back(before); histories.states["fc"].histories["left"].amaxes.tolist()
        [0.0, 0.0]
    """

    def __init__(self, states: Mapping[str, ProductState]) -> None:
        self.states = states

    def copy(self) -> dict[str, Tensor]:
        """Path -> [3, window], a row for each operand."""
        return {path: torch.stack([h.amaxes for h in s.histories.values()]) for path, s in self.states.items()}

    def put_back(self, copies: Mapping[str, Tensor]) -> None:
        """What `copy` gave; paths that are only there or only here are left."""
        for path in self.states.keys() & copies.keys():
            for history, row in zip(self.states[path].histories.values(), copies[path], strict=True):
                history.load_state_dict({"amaxes": row})

    def agree(self, maximize: Callable[[Tensor], Tensor]) -> None:
        """Make them elementwise the largest over all ranks: one exchange of all."""
        if self.states:
            copies = self.copy()
            self.put_back(dict(zip(copies, maximize(torch.stack(list(copies.values()))), strict=True)))


class QuantizedWeights:
    """Quantized copies of weights, so that micro-batches of one step share them. `clear` it when weights have changed.

    A copy is dropped with its weight, and not used after the weight's version or place in memory has changed. That does not
    see every change: torch's fused AdamW on CPU writes without a new version, and so does everything that writes through
    `.data`. So whoever updates the weights calls `clear`.

    Examples:
        >>> cache, weight = QuantizedWeights(), torch.nn.Parameter(torch.ones(2, 2))
        >>> copy = cache.find(weight, Operand(format="int8"), -1)
        >>> cache.find(weight, Operand(format="int8"), -1) is copy
        True
        >>> cache.clear(); cache.find(weight, Operand(format="int8"), -1) is copy
        False
    """

    def __init__(self) -> None:
        self._copies: Any = WeakTensorKeyDictionary()  # weight -> {all that makes a copy what it is: copy}

    def find(self, weight: Tensor, operand: Operand, dim: int | tuple[int, ...]) -> ScaledTensor | Tensor:
        """The weight quantized for `operand` along `dim`, made anew where there is no copy of it as it is now."""
        copies: dict[Any, ScaledTensor | Tensor] = self._copies.setdefault(weight, {})
        content = (weight._version, weight.data_ptr(), weight.dtype, weight.shape)
        if (operand, dim, content) not in copies:
            for old in [key for key in copies if key[2] != content]:
                del copies[old]
            copies[operand, dim, content] = quantize_operand(weight, operand, dim)
        return copies[operand, dim, content]

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    def __len__(self) -> int:
        return sum(map(len, self._copies.values()))


def quantize_operand(
    x: Tensor, operand: Operand, dim: int | tuple[int, ...], state: ProductState | None = None, role: str = "left"
) -> ScaledTensor | Tensor:
    """`x` in the format of an operand, scaled along `dim`; in an operand format without scales, converted.

    Raises PlanError where the operand needs a `state` (delayed scaling, stochastic rounding) and none is given.
    """
    if not operand.is_scaled:
        plain = x.detach().to(PLAIN[operand.format])
        return round_to(plain, "tf32") if operand.format == "tf32" else plain
    delayed, stochastic = operand.scaling.kind == "delayed", operand.mode == "stochastic"
    if (delayed or stochastic) and state is None:
        raise PlanError(
            f"{'delayed scaling' if delayed else 'stochastic rounding'} of a product's operand needs a state; pass "
            "state=ProductState(...), one for each place in the model"
        )
    amax = None
    if state is not None and delayed:
        amax = state.histories[role].follow(x, join=state.is_training or role == "gradient")
    elif state is not None and state.reduce and operand.scaling.kind == "tensor":
        amax = find_amax(x, state.reduce)
    noise = state.draw(x) if state is not None and stochastic else None
    return quantize(x, operand.format, operand.scaling, dim=dim, amax=amax, mode=operand.mode, noise=noise)


class Copies:
    """The copies of one tensor that its products take: each along its own dimension, from the numbers as they are."""

    def __init__(
        self, x: Tensor, state: ProductState | None, role: str, weights: QuantizedWeights | None = None
    ) -> None:
        self._x, self._state, self._role = x, state, role
        self._weights = None if x.is_inference() else weights
        self._made: dict[Operand, ScaledTensor | Tensor] = {}

    def take(self, operand: Operand, dim: int | tuple[int, ...]) -> ScaledTensor | Tensor:
        """The copy for an operand whose product sums over `dim`, counted from the end."""
        if operand in self._made:
            return self._made[operand]
        if self._weights is not None and operand.mode == "nearest_even" and operand.scaling.kind != "delayed":
            copy = self._weights.find(self._x, operand, dim)
        else:
            copy = quantize_operand(self._x, operand, dim, self._state, self._role)
        if operand.is_the_same_along_all:
            self._made[operand] = copy
        return copy


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How a product is multiplied."""

    name: str  # scaled_mm | int_mm | bf16 | fp32
    is_native: bool
    why: str


def choose_kernel(left: ScaledTensor | Tensor, right: ScaledTensor | Tensor, dtype: torch.dtype) -> Kernel:
    """How left [..., M, K] times right [..., K, N] is multiplied on their device, into `dtype`.

    Examples:
        >>> x = quantize(torch.ones(2, 4), "fp8_e4m3", "tensor")
        >>> choose_kernel(x, x.mT, torch.bfloat16)
        Kernel(name='bf16', is_native=False, why='fp8 is multiplied on CUDA from compute capability 8.9; this is cpu')
    """
    why = _explain_emulation(left, right, dtype)
    if not why:
        assert isinstance(left, ScaledTensor)  # noqa: S101 - _explain_emulation found it so
        name = "int_mm" if left.values.dtype == torch.int8 else "scaled_mm"
        return Kernel(name=name, is_native=True, why=f"{left.values.device.type} multiplies {left.format.name}")
    exact = dtype == torch.bfloat16 and _is_exact_in_bf16(left) and _is_exact_in_bf16(right)
    return Kernel(name="bf16" if exact else "fp32", is_native=False, why=why)


def _is_exact_in_bf16(operand: ScaledTensor | Tensor) -> bool:
    return operand.dtype == torch.bfloat16 if isinstance(operand, Tensor) else operand.is_exact_in_bf16


def _explain_emulation(left: ScaledTensor | Tensor, right: ScaledTensor | Tensor, dtype: torch.dtype) -> str:
    """Why no native kernel takes this product; "" where one does."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return "an operand without scales"
    if left.values.dim() != 2 or right.values.dim() != 2:
        return "native kernels multiply two matrices"
    if left.scale.shape[1] != 1 or right.scale.shape[0] != 1 or left.format.block or right.format.block:
        return f"native kernels take a scale a tensor or row; got {left.scaling} and {right.scaling}"
    kinds, device = {left.format.kind, right.format.kind}, left.values.device
    if kinds == {"integer"}:
        return _explain_integers(left, right)
    if kinds != {"float"} or not (left.format.name.startswith("fp8_") and right.format.name.startswith("fp8_")):
        return f"no kernel multiplies {left.format.name} and {right.format.name}"
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return f"fp8 is multiplied on CUDA from compute capability 8.9; this is {device.type}"
    if left.format.name == right.format.name == "fp8_e5m2" or "fnuz" in left.format.name + right.format.name:
        return f"no kernel multiplies {left.format.name} and {right.format.name}"
    if left.values.shape[1] % 16 or right.values.shape[1] % 16 or not left.values.numel():
        return "fp8 kernels take multiples of 16 numbers"
    if dtype not in (torch.bfloat16, torch.float32) or (dtype != torch.bfloat16 and left.scale.numel() > 1):
        return f"fp8 kernels give bf16, with one scale a tensor also fp32; asked for {dtype}"
    if (left.scale.numel() == 1) != (right.scale.numel() == 1):
        return "fp8 kernels take two tensor scales or two scales a row"
    return ""


def _explain_integers(left: ScaledTensor, right: ScaledTensor) -> str:
    device, (rows, terms), columns = left.values.device, left.shape, right.shape[1]
    if terms > MOST_TERMS:
        return f"sums of over {MOST_TERMS:,} products of int8 numbers may not fit into int32; this one has {terms:,}"
    if device.type == "cpu":
        return "" if torch.cpu._is_vnni_supported() else "int8 is multiplied on CPUs with VNNI; this has none"
    if device.type != "cuda":
        return f"int8 is multiplied on CPUs with VNNI and on CUDA; this is {device.type}"
    return "" if rows > 16 and terms % 8 == columns % 8 == 0 and terms else "int8 kernels take multiples of 8 numbers"


def multiply(left: ScaledTensor | Tensor, right: ScaledTensor | Tensor, dtype: torch.dtype) -> Tensor:
    """left [..., M, K] times right [..., K, N], summed in fp32 or better, rounded once to `dtype`: [..., M, N].

    The head of this module says by which kernels. fp64 is computed in fp64.

    Examples:
        >>> x = quantize(torch.tensor([[1.0, 2.0]]), "fp8_e4m3", "tensor")
        >>> multiply(x, x.mT, torch.float32)
        tensor([[5.]])
    """
    kernel = choose_kernel(left, right, dtype)
    return KERNELS[kernel.name](left, right, dtype)


def multiply_slowly(left: ScaledTensor | Tensor, right: ScaledTensor | Tensor) -> Tensor:
    """The same product of the same numbers in fp64, unrounded: the readable truth."""
    return _expand(left, torch.float64) @ _expand(right, torch.float64)


def _expand(operand: ScaledTensor | Tensor, dtype: torch.dtype) -> Tensor:
    return operand.to(dtype) if isinstance(operand, Tensor) else operand.dequantize(dtype)


def expand_operands(
    left: ScaledTensor | Tensor, right: ScaledTensor | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both operands with their scales in what their product is emulated in, for a result of `dtype`: bf16, fp32 or fp64."""
    exact = dtype == torch.bfloat16 and _is_exact_in_bf16(left) and _is_exact_in_bf16(right)
    wide = torch.float64 if dtype == torch.float64 else torch.bfloat16 if exact else torch.float32
    return _expand(left, wide), _expand(right, wide)


def _multiply_expanded(left: ScaledTensor | Tensor, right: ScaledTensor | Tensor, dtype: torch.dtype) -> Tensor:
    a, b = expand_operands(left, right, dtype)
    return (a @ b).to(dtype)


def _multiply_integers(left: ScaledTensor, right: ScaledTensor, dtype: torch.dtype) -> Tensor:
    sums = torch._int_mm(left.values, right.values).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return sums.mul_(left.scale).mul_(right.scale).to(dtype)


def _multiply_scaled(left: ScaledTensor, right: ScaledTensor, dtype: torch.dtype) -> Tensor:
    a, b = left.values.contiguous(), right.values.mT.contiguous().mT  # the kernel reads both along the sum
    one = left.scale.numel() == right.scale.numel() == 1
    scale_a, scale_b = (left.scale.reshape(()), right.scale.reshape(())) if one else (left.scale, right.scale)
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


KERNELS: dict[str, Callable[[Any, Any, torch.dtype], Tensor]] = {
    "scaled_mm": _multiply_scaled, "int_mm": _multiply_integers, "bf16": _multiply_expanded, "fp32": _multiply_expanded,
}  # fmt: skip
