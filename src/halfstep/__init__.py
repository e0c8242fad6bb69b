"""Train neural networks in mixed precision: measured, safe, and proved against fp32.

    stepper = halfstep.prepare(model, optimizer, "auto")
    for x, y in loader:
        with stepper.autocast():
            loss = loss_fn(stepper.model(x), y)
        outcome = stepper.step(loss)

Names are loaded when they are first used (PEP 562), so that reading a plan or a record never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfstep.control.sensitivity import choose_plan as choose_plan
    from halfstep.conversion import Conversion as Conversion
    from halfstep.conversion import convert as convert
    from halfstep.errors import HalfstepError as HalfstepError
    from halfstep.machine.hardware import probe_hardware as probe_hardware
    from halfstep.machine.runtime import tune_process as tune_process
    from halfstep.mechanisms.grad_scaler import GradScaler as GradScaler
    from halfstep.numerics.formats import find_format as find_format
    from halfstep.plan import Plan as Plan
    from halfstep.plan import Rule as Rule
    from halfstep.records import HardwareProfile as HardwareProfile
    from halfstep.records import StepOutcome as StepOutcome
    from halfstep.stepper import Stepper as Stepper
    from halfstep.stepper import prepare as prepare

_HOMES = {
    "Conversion": "conversion",
    "GradScaler": "mechanisms.grad_scaler",
    "HalfstepError": "errors",
    "HardwareProfile": "records",
    "Plan": "plan",
    "Rule": "plan",
    "StepOutcome": "records",
    "Stepper": "stepper",
    "choose_plan": "control.sensitivity",
    "convert": "conversion",
    "find_format": "numerics.formats",
    "prepare": "stepper",
    "probe_hardware": "machine.hardware",
    "tune_process": "machine.runtime",
}

__version__ = "0.1.0"
__all__ = [
    "Conversion",
    "GradScaler",
    "HalfstepError",
    "HardwareProfile",
    "Plan",
    "Rule",
    "StepOutcome",
    "Stepper",
    "choose_plan",
    "convert",
    "find_format",
    "prepare",
    "probe_hardware",
    "tune_process",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfstep' has no attribute '{name}'")
    return getattr(importlib.import_module(f"halfstep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
