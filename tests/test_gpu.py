import pytest
import torch
from torch import nn

import halfstep
from halfstep.machine.hardware import probe_hardware
from halfstep.numerics.formats import FORMATS, Format
from halfstep.numerics.noise import derive_keys, draw_noise
from halfstep.numerics.rounding import MODES, round_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "plan",
    ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "auto", "compute=bf16 storage=bf16 master=split"],
)
def test_every_precision_trains_on_a_gpu(plan: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10)).cuda()
    stepper = halfstep.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), plan, clip=1.0)
    teacher = torch.randn(64, 10, device="cuda")
    losses = []
    for _ in range(100):
        x = torch.randn(256, 64, device="cuda")
        with stepper.autocast():
            loss = nn.functional.cross_entropy(stepper.model(x), (x @ teacher).argmax(1))
        stepper.step(loss)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_split_is_the_same_on_gpu_and_cpu() -> None:
    weights = torch.randn(10_000)
    lives = []
    for device in ("cpu", "cuda"):
        layer = nn.Linear(100, 100, bias=False)
        layer.weight.data = weights.view(100, 100).clone().to(device)
        halfstep.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0), "compute=bf16 storage=bf16 master=split")
        lives.append(layer.weight.detach().cpu())
        assert torch.equal(layer.state_dict()["weight"].cpu(), weights.view(100, 100))
    assert torch.equal(*lives)


def test_the_probe_judges_every_format_on_a_gpu() -> None:
    profile = probe_hardware("cuda")
    assert "Tensor Cores" in profile.unit
    assert all(capability.why for capability in profile.capabilities)


def test_scaler_serves_weights_on_several_devices() -> None:
    weights = [nn.Parameter(torch.ones(3, device=device)) for device in ("cuda", "cpu")]
    optimizer = torch.optim.SGD(weights, lr=0.25)
    scaler = halfstep.GradScaler("cuda", 8.0)
    for factor, left in ((1.0, 0.75), (torch.inf, 0.75), (1.0, 0.5)):
        optimizer.zero_grad()
        scaler.scale(weights[0].sum() + factor * weights[1].sum().cuda()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert [weight.tolist() for weight in weights] == [[left] * 3] * 2
        assert scaler.get_outcome().tensors == (("param_groups[0]['params'][1]",) if factor == torch.inf else ())
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("format", [format for format in FORMATS.values() if not format.block], ids=lambda f: f.name)
def test_rounding_is_the_same_on_gpu_and_cpu(format: Format) -> None:
    x = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    noise = draw_noise(derive_keys(0, 0, 0), 0, x.numel())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for mode in MODES:
            draws = noise if mode == "stochastic" else None
            expected = round_to(x.to(dtype), format, mode=mode, noise=draws)
            found = round_to(x.to(dtype).cuda(), format, mode=mode, noise=None if draws is None else draws.cuda()).cpu()
            assert torch.equal(found.nan_to_num(12345.0), expected.nan_to_num(12345.0)), mode
            assert torch.equal(found.isnan(), expected.isnan()), mode
