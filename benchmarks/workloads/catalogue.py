"""All workloads by name, in the order in which they are run."""

from workloads.images import Airbench, Dcgan, ResNet18
from workloads.tables import Dlrm, DlrmSparse, Mlp
from workloads.template import Workload
from workloads.text import Bert, Gpt, Lstm, NanoGptChar, NanoGptTiny

WORKLOADS: dict[str, type[Workload]] = {
    workload.name: workload
    for workload in (
        ResNet18, Airbench, Gpt, NanoGptChar, NanoGptTiny, Bert, Dlrm, DlrmSparse, Lstm, Dcgan, Mlp,
    )
}  # fmt: skip
QUICK = ("mlp", "nanogpt-tiny")
