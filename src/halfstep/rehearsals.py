"""Hardware that need not be here: the plan that would be trained with on it, to be tried with its numerics on this machine.

A rehearsal multiplies what the hardware's units multiply: operands rounded to their formats with their scales, products
summed in fp32, results rounded to 16 bits. It says whether a model survives these numerics, which layers do not, and
which plan mends it; it says nothing about speed. What a unit does beyond that, and a rehearsal leaves out, stands in `differs`.

Sources: NVIDIA Tesla V100 white paper (2017), Tensor Cores: fp16 operands, fp32 sums; A100 white paper (2020): tf32, bf16, int8;
Transformer Engine's documentation, `DelayedScaling`: E4M3 forward, E5M2 backward, amax history; DeepSeek-V3 (arXiv
2412.19437), section 3.3: blocks of 1x128 and 128x128; AMD CDNA 3 ISA guide (2023): the FNUZ formats; OCP Microscaling
Formats 1.0 (2023) and Mishra et al. 2025 (arXiv 2506.08027): MXFP8 in E4M3 throughout; NVIDIA 2025 (arXiv 2509.25149): NVFP4.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from halfstep.errors import PlanError, describe_unknown
from halfstep.numerics.formats import find_format
from halfstep.plan import PRESETS, Plan, Rule


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A plan as some hardware would run it.

    Examples:
        >>> find_rehearsal("fp8-h100").plan.products
        'emulated'
    """

    name: str
    hardware: str
    plan: Plan
    differs: str  # what the hardware does and the rehearsal does not


def _narrow(name: str, compute: str, grad: str, **settings: str) -> Plan:
    """The 8-bit preset with other formats in its products. Blocks are for linear layers: no convolution sums by them."""
    stated = {"compute": compute, "grad": grad, **settings}
    kinds = ("linear",) if find_format(compute).block or settings.get("scaling") == "128x128" else ("linear", "conv")
    preset = PRESETS["fp8-mixed"].rules
    rules = (*(r for r in preset if r.position), *(Rule(kind=kind, **stated) for kind in kinds), preset[-1])
    return Plan(rules=rules, name=name, products="emulated")


_SUMS = "sums within a unit may be shorter than fp32 (Hopper keeps about 14 bits between its promotions, DeepSeek-V3)"
_MX = "its units scale within the product; here scaled operands are multiplied in fp32, which rounds no less exactly"

REHEARSALS: dict[str, Rehearsal] = {
    rehearsal.name: rehearsal
    for rehearsal in (
        Rehearsal(
            name="fp16-v100",
            hardware="NVIDIA V100",
            plan=replace(PRESETS["16-mixed"], name="fp16-v100", products="emulated"),
            differs="the order of sums",
        ),
        Rehearsal(
            name="tf32-a100",
            hardware="NVIDIA A100, H100",
            plan=Plan(
                rules=(Rule(kind="linear", compute="tf32"), Rule(kind="conv", compute="tf32"), Rule(compute="fp32")),
                name="tf32-a100",
                products="emulated",
            ),
            differs="operands are rounded to nearest here, as cuDNN and cuBLAS do before the unit; the unit alone truncates",
        ),
        Rehearsal(
            name="int8-a100",
            hardware="NVIDIA A100, H100",
            plan=replace(PRESETS["int8-mixed"], name="int8-a100", products="emulated"),
            differs="sums are exact 32-bit integers there and fp32 here: equal up to 2^24",
        ),
        Rehearsal(
            name="fp8-h100",
            hardware="NVIDIA H100, H200, L40S",
            plan=_narrow("fp8-h100", "fp8_e4m3", "fp8_e5m2", scaling="delayed"),
            differs=_SUMS,
        ),
        Rehearsal(
            name="fp8-h100-blocks",
            hardware="NVIDIA H100, H200",
            plan=_narrow("fp8-h100-blocks", "fp8_e4m3", "fp8_e4m3", scaling="128x128"),
            differs=_SUMS,
        ),
        Rehearsal(
            name="fp8-mi300",
            hardware="AMD MI300",
            plan=_narrow("fp8-mi300", "fp8_e4m3fnuz", "fp8_e5m2fnuz", scaling="tensor"),
            differs="the order of sums",
        ),
        Rehearsal(
            name="mxfp8-b200",
            hardware="NVIDIA B200",
            plan=_narrow("mxfp8-b200", "mxfp8_e4m3", "mxfp8_e4m3"),
            differs=_MX,
        ),
        Rehearsal(
            name="mxfp6-mi355",
            hardware="AMD MI355X",
            plan=_narrow("mxfp6-mi355", "mxfp6_e2m3", "mxfp6_e3m2"),
            differs=_MX,
        ),
        Rehearsal(
            name="nvfp4-b200",
            hardware="NVIDIA B200",
            plan=_narrow("nvfp4-b200", "nvfp4", "nvfp4"),
            differs="NVIDIA's recipe also rotates the operands of grad_weight, rounds gradients stochastically and scales "
            "weights in 16x16 blocks; without these training comes out worse here than there",
        ),
    )
}


def find_rehearsal(name: str) -> Rehearsal:
    """The rehearsal of that name, or of the plan in a file.

    Examples:
        >>> find_rehearsal("mxfp8-b200").hardware
        'NVIDIA B200'

    Raises PlanError, naming the nearest one, when there is none, and for a file that cannot be read.
    """
    if name.endswith((".toml", ".json", ".plan")):
        plan = replace(Plan.load(Path(name)), products="emulated")
        return Rehearsal(name=name, hardware="a plan of your own", plan=plan, differs="the order of sums")
    if name not in REHEARSALS:
        raise PlanError(describe_unknown("rehearsal", name, REHEARSALS))
    return REHEARSALS[name]
