import json
import math
import os
import pickle
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from halfstep import checkpoint
from halfstep.checkpoint import change_plan, claim_folder, load_checkpoint, pack, save_checkpoint, unpack
from halfstep.errors import CheckpointError, RecordError
from halfstep.stepper import prepare

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool,
)  # fmt: skip
tensors = st.builds(
    lambda dtype, shape, fill: torch.full(shape, fill).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.floats(-100, 100),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
keys = st.text(max_size=8) | st.integers() | st.sampled_from(["$tensor", "$sparse", "$pairs", "$tuple"])
states = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=10,
)


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal in value and in kind, all the way down."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    else:
        assert actual == expected


def say_error(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- what is kept


@given(state=states)
@settings(deadline=None)
def test_unpacking_gives_back_what_was_packed(state: Any) -> None:
    taken: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(state, taken)))
    assert_equal(unpack(packed, taken), state)


@given(state=st.dictionaries(keys, states, max_size=4))
@settings(max_examples=25, deadline=None)
def test_loading_gives_back_what_was_saved(state: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    save_checkpoint(path, state)
    assert_equal(load_checkpoint(path), state)


def test_numbers_that_json_has_no_word_for_are_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": -0.0})
    state = load_checkpoint(tmp_path / "c")
    assert math.isnan(state["nan"])
    assert (state["inf"], state["minus"]) == (math.inf, -math.inf)
    assert math.copysign(1, state["zero"]) == -1


def test_tensors_keep_every_bit_also_of_nan_and_of_views(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, 1, -1], dtype=torch.int32)
    view = torch.arange(12.0).view(3, 4).t()
    shared = torch.ones(2)
    save_checkpoint(tmp_path / "c", {"bits": bits.view(torch.float32), "view": view, "a": shared, "b": shared})
    state = load_checkpoint(tmp_path / "c")
    assert torch.equal(state["bits"].view(torch.int32), bits)
    assert torch.equal(state["view"], view)
    assert torch.equal(state["a"], state["b"])


def test_parameter_is_saved_as_a_tensor_and_packing_copies() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    taken: dict[str, Tensor] = {}
    pack({"w": parameter}, taken)
    with torch.no_grad():
        parameter.fill_(5)
    assert torch.equal(taken["0"], torch.ones(2))
    assert not taken["0"].requires_grad


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j, torch.float32])
def test_value_of_another_kind_is_refused_by_name(value: object) -> None:
    with pytest.raises(CheckpointError, match=f"got {type(value).__name__}"):
        pack({"nest": [value]}, {})


def test_optimizer_and_scheduler_states_come_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    save_checkpoint(tmp_path / "c", {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    state = load_checkpoint(tmp_path / "c")
    assert_equal(state["optimizer"], optimizer.state_dict())
    assert_equal(state["schedule"], schedule.state_dict())


# --- whole or not at all


def test_new_checkpoint_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "c.safetensors"
    for number in range(3):
        save_checkpoint(path, {"number": number})
        assert load_checkpoint(path) == {"number": number}
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def test_full_disk_leaves_the_old_checkpoint_and_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": torch.ones(4000)})
    script = """
import resource, signal, sys
from pathlib import Path
import torch
from halfstep.checkpoint import save_checkpoint
from halfstep.errors import CheckpointError, RecordError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(Path(sys.argv[1]), {"w": torch.zeros(4000)})
except CheckpointError as error:
    print(error, end="")
"""
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"checkpoint {path} cannot be written" in result.stdout
    assert f"the checkpoint before is kept in {path}" in result.stdout
    assert "\n" not in result.stdout
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(4000))
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_file_in_the_way_of_the_folder_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "file" / "c.safetensors", {"w": torch.ones(1)})
    assert "\n" not in str(caught.value)
    assert "is kept" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_folder_in_the_way_of_the_file_gives_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "c", {"w": torch.ones(1)})
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"number": 1})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_checkpoint(path, {"number": 2})
    finally:
        tmp_path.chmod(0o700)
    assert load_checkpoint(path) == {"number": 1}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["error", "killed"]
)
def test_write_that_is_broken_off_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def write_half(_tensors: object, path: Path, *, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"number": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", write_half)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save_checkpoint(path, {"number": 2})
    assert load_checkpoint(path) == {"number": 1}
    save_checkpoint(path, {"number": 3})
    assert load_checkpoint(path) == {"number": 3}


@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_tensors_are_saved_as_they_are(tmp_path: Path, coalesced: bool) -> None:
    """As gradients of a table are, in an open window, and the momentum of SGD."""
    table = nn.Embedding(9, 4, sparse=True)
    table(torch.tensor([1, 5, 1])).sum().backward()
    assert table.weight.grad is not None
    sparse = table.weight.grad.coalesce() if coalesced else table.weight.grad
    save_checkpoint(tmp_path / "c", {"gradient": sparse})
    found = load_checkpoint(tmp_path / "c")["gradient"]
    assert found.is_sparse and found.is_coalesced() == coalesced and found.shape == (9, 4)
    assert torch.equal(found._indices(), sparse._indices()) and torch.equal(found._values(), sparse._values())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_layouts_that_cannot_be_saved_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got a tensor of layout torch\.sparse_csr"):
        save_checkpoint(tmp_path / "c", {"rows": torch.eye(3).to_sparse_csr()})


def test_a_table_with_momentum_changes_its_plan_and_goes_on() -> None:
    table = nn.Embedding(9, 4, sparse=True)
    stepper = prepare(table, torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9), "32-true")
    for plan in ("32-true", "bf16-mixed", "32-true"):
        assert change_plan(stepper, plan).states_changed == 0
        assert stepper.step(stepper.model(torch.tensor([1, 5, 1])).square().mean()).applied


def test_state_that_cannot_be_packed_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"number": 1})
    with pytest.raises(CheckpointError, match="got set"):
        save_checkpoint(path, {"number": {2}})
    assert load_checkpoint(path) == {"number": 1}


# --- what cannot be read


def test_missing_checkpoint_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "there is no checkpoint" in say_error(tmp_path / "nothing")


def test_checkpoint_that_was_cut_off_at_a_border_is_refused_as_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": torch.ones(50), "name": "x"})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut off or is not halfstep's" in say_error(path), length
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(50))


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 200, b"\x00" * 200, b"hello" * 50, pickle.dumps({"w": 1}), b"\x02\0\0\0\0\0\0\0{}", b"PK\x03\x04" * 20],
    ids=["ones", "zeros", "text", "pickle", "no header", "zip"],
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    say_error(tmp_path / "c")


def test_folder_is_refused(tmp_path: Path) -> None:
    say_error(tmp_path)


@pytest.mark.parametrize("header", [None, "", "{", "{}", "[]", "null", '{"schema": 1}'])
def test_safetensors_file_of_somebody_else_is_refused(tmp_path: Path, header: str | None) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "c", metadata=None if header is None else {"halfstep": header})
    say_error(tmp_path / "c")


@pytest.mark.parametrize("schema", [0, 3, "2", None, [2]])
def test_checkpoint_of_another_schema_is_refused_with_both_numbers(tmp_path: Path, schema: object) -> None:
    save_file({}, tmp_path / "c", metadata={"halfstep": json.dumps({"schema": schema, "state": {"$pairs": []}})})
    message = say_error(tmp_path / "c")
    assert f"has schema {schema}" in message
    assert "reads schema 1 and 2" in message


# --- checksum

SAMPLE = {
    "name": "x", "numbers": [1, 2.5, None, True], "w": torch.arange(12.0).view(3, 4), "scalar": torch.tensor(3),
    "narrow": torch.ones(5, dtype=torch.bfloat16), "empty": torch.zeros(0), "mask": torch.tensor([True, False]),
}  # fmt: skip


def find_regions(content: bytes) -> dict[str, tuple[int, int]]:
    """Where the parts of a checkpoint lie: (first byte, byte behind the last)."""
    data = 8 + int.from_bytes(content[:8], "little")
    metadata = content.index(b"__metadata__"), content.index(b"}", content.index(b"sha256")) + 1
    digest = content.index(b'"sha256":"') + 10
    return {
        "length": (0, 8), "metadata": metadata, "digest": (digest, digest + 64), "tensor table": (metadata[1], data),
        "tensor bytes": (data, len(content)),
    }  # fmt: skip


@pytest.mark.parametrize("region", ["length", "metadata", "digest", "tensor table", "tensor bytes"])
def test_flipped_bit_is_found_wherever_it_lies(tmp_path: Path, region: str) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, SAMPLE)
    whole = path.read_bytes()
    first, behind = find_regions(whole)[region]
    noise = random.Random(region)
    for place in noise.sample(range(8 * first, 8 * behind), min(200, 8 * (behind - first))):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "use an older copy" in str(error) and "\n" not in str(error)
        else:
            assert chr(whole[place // 8]) == " ", f"bit {place} is not padding"
            assert_equal(state, SAMPLE)


@given(cut=st.integers(0, 10_000))
@settings(deadline=None)
def test_checkpoint_that_was_cut_off_at_any_length_is_refused(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    save_checkpoint(path, SAMPLE)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    say_error(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"2.5", b"3.5"), (b'"F32"', b'"I32"'), (b"[3,4]", b"[4,3]"), (b"sha256", b"sha255"),
        (b'\\"schema\\": 2', b'\\"schema\\": 1'),
    ],
    ids=["number", "dtype", "shape", "checksum taken away", "schema"],
)  # fmt: skip
def test_file_that_was_edited_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, SAMPLE)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    assert "its checksum does not match" in say_error(path)


def test_tensors_that_changed_places_are_found(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2), "b": torch.ones(2)})
    path.write_bytes(
        path.read_bytes().replace(b'"0":{', b'"9":{').replace(b'"1":{', b'"0":{').replace(b'"9":{', b'"1":{')
    )
    assert "its checksum does not match" in say_error(path)


def test_checkpoint_of_schema_1_which_has_no_checksum_is_read(tmp_path: Path) -> None:
    taken: dict[str, Tensor] = {}
    content = {"schema": 1, "state": pack(SAMPLE, taken)}
    save_file(taken, tmp_path / "c", metadata={"halfstep": json.dumps(content)})
    assert_equal(load_checkpoint(tmp_path / "c"), SAMPLE)


def test_file_and_folder_are_forced_to_disk_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    force, rename = os.fsync, Path.replace

    def note_force(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        force(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_force)
    monkeypatch.setattr(Path, "replace", note_rename)
    save_checkpoint(tmp_path / "run" / "c", {"number": 1})
    assert events == ["file", "rename", "folder"]


def test_folder_that_cannot_be_forced_to_disk_is_left_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        save_checkpoint(tmp_path / "c", {"number": 1})
    assert load_checkpoint(tmp_path / "c") == {"number": 1}


def test_checkpoint_whose_tensor_is_gone_is_refused(tmp_path: Path) -> None:
    state = {"schema": 1, "state": {"$pairs": [["w", {"$tensor": "0"}]]}}
    save_file({}, tmp_path / "c", metadata={"halfstep": json.dumps(state)})
    say_error(tmp_path / "c")


# --- folders


def test_folder_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    lock = claim_folder(tmp_path / "run")
    with pytest.raises(
        RecordError, match=r"run is in use by another process; wait until it ends, or give another --out"
    ):
        claim_folder(tmp_path / "run")
    claim_folder(tmp_path / "other").release()
    lock.release()
    claim_folder(tmp_path / "run").release()


def test_lock_of_a_process_that_was_killed_does_not_count(tmp_path: Path) -> None:
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RecordError, match="in use by another process"):
            claim_folder(tmp_path)
        other.kill()
    assert (tmp_path / ".lock").exists()
    claim_folder(tmp_path).release()
