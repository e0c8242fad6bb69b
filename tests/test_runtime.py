"""Process settings are set inside the block and as before after it, also after an exception."""

import ctypes
import platform
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from halfstep.machine import runtime
from halfstep.machine.runtime import Arena, HeapTrimmer, read_peak_memory, tune_process

CAN_FLUSH = torch.set_flush_denormal(False)
needs_flush = pytest.mark.skipif(not CAN_FLUSH, reason="the processor cannot flush denormals")


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, int]]:
    """What the C library was asked for, in order; it is not touched."""
    asked: list[dict[int, int]] = []

    def mallopt(values: dict[int, int]) -> bool:
        asked.append(values)
        return True

    monkeypatch.setattr(runtime, "_mallopt", mallopt)
    return asked


def flushes() -> bool:
    return bool((torch.tensor([1e-40]) * 1.0).item() == 0.0)


def test_threads_are_set_inside_and_restored_after() -> None:
    before = torch.get_num_threads()
    with tune_process(allocator=False, threads=before + 1) as settings:
        assert torch.get_num_threads() == before + 1
        assert settings == {"threads": f"{before + 1}: as asked"}
    assert torch.get_num_threads() == before


def test_threads_are_restored_after_an_exception() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), tune_process(allocator=False, threads=before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_threads_that_are_not_asked_for_are_left_alone() -> None:
    before = torch.get_num_threads()
    with tune_process(allocator=False):
        torch.set_num_threads(before + 1)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before + 1


@needs_flush
def test_denormals_are_flushed_inside_and_kept_after() -> None:
    assert not flushes()
    with tune_process(allocator=False, flush_denormals=True) as settings:
        assert flushes()
        assert settings == {"flush_denormals": "on in this thread and those that it starts: subnormals cost cycles"}
    assert not flushes()


@needs_flush
def test_denormals_are_kept_after_an_exception() -> None:
    with pytest.raises(KeyError), tune_process(allocator=False, flush_denormals=True):
        raise KeyError
    assert not flushes()


@needs_flush
def test_denormals_that_were_flushed_before_are_flushed_after() -> None:
    torch.set_flush_denormal(True)
    try:
        with tune_process(allocator=False, flush_denormals=True):
            assert flushes()
        assert flushes()
    finally:
        torch.set_flush_denormal(False)


def test_flush_that_the_processor_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: False)
    with tune_process(allocator=False, flush_denormals=True) as settings:
        assert settings == {"flush_denormals": "untouched: the processor cannot"}


def test_nothing_is_touched_when_nothing_is_asked_for(allocator: list[dict[int, int]]) -> None:
    with tune_process(allocator=False) as settings:
        assert settings == {}
    assert allocator == []


def test_allocator_goes_back_to_what_glibc_comes_to_by_itself(allocator: list[dict[int, int]]) -> None:
    with tune_process(allocator="glibc") as settings:
        assert settings == {"allocator": "glibc keeps freed blocks"}
        assert allocator == [runtime._KEEP_BLOCKS]
    assert allocator == [runtime._KEEP_BLOCKS, runtime._GROWN]


def test_allocator_goes_back_after_an_exception(allocator: list[dict[int, int]]) -> None:
    with pytest.raises(KeyError), tune_process():
        raise KeyError
    assert allocator == [runtime._KEEP_BLOCKS, runtime._GROWN]


def test_setting_that_is_refused_takes_the_ones_before_it_back(allocator: list[dict[int, int]]) -> None:
    before = torch.get_num_threads()
    with pytest.raises((RuntimeError, ValueError)), tune_process(threads=0):
        pass
    assert torch.get_num_threads() == before
    assert allocator in ([], [runtime._KEEP_BLOCKS, runtime._GROWN])


def test_an_inner_block_leaves_the_allocator_to_the_outer_one(allocator: list[dict[int, int]]) -> None:
    with tune_process(allocator="glibc"):
        with tune_process(allocator="glibc") as settings:
            assert settings == {"allocator": "glibc keeps freed blocks"}
        assert allocator == [runtime._KEEP_BLOCKS]
    assert allocator == [runtime._KEEP_BLOCKS, runtime._GROWN]


@pytest.mark.parametrize("most", [1 << 30, 32 << 20, 0])
def test_glibc_that_refuses_a_threshold_is_asked_for_less_or_left_alone(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other thresholds that it took would have ended its own adjustment of this one."""
    taken: dict[int, int] = {}

    class Libc:
        def mallopt(self, key: int, value: int) -> int:
            if key == runtime._M_MMAP_THRESHOLD and value > most:
                return 0
            taken[key] = value
            return 1

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.30"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    with tune_process(allocator="glibc") as settings:
        assert settings["allocator"].startswith("glibc keeps" if most else "untouched")
        assert taken == ({**runtime._KEEP_BLOCKS, runtime._M_MMAP_THRESHOLD: most} if most else {})
    assert taken == (runtime._GROWN if most else {})


def test_defaults_name_every_threshold_that_is_moved() -> None:
    assert runtime._GROWN.keys() == runtime._KEEP_BLOCKS.keys()


def test_allocator_of_another_c_library_is_left_alone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with tune_process(allocator="glibc") as settings:
        assert settings == {"allocator": "untouched: the C library does not take it"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_takes_the_thresholds() -> None:
    assert runtime._mallopt(runtime._KEEP_BLOCKS)
    assert runtime._mallopt(runtime._GROWN)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_peak_memory_grows_by_what_is_allocated_and_does_not_shrink() -> None:
    code = (
        "import torch\n"
        "from halfstep.machine.runtime import read_peak_memory\n"
        "held = torch.ones(4 << 20)\n"  # past the peak of importing
        "before = read_peak_memory()\n"
        "block = torch.ones(16 << 20)\n"
        "with_block = read_peak_memory()\n"
        "del block\n"
        "print(before, with_block, read_peak_memory())\n"
    )
    before, with_block, after = map(int, run_python(code).split())
    assert 48 << 20 <= with_block - before <= 96 << 20
    assert abs(after - with_block) <= 1 << 20  # the kernel counts in batches


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_the_systems_own_figure() -> None:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    assert abs(read_peak_memory() - peak) <= 2 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_of_a_child_does_not_count_what_its_parent_held() -> None:
    held = torch.ones(64 << 20)  # 256 MB
    code = "from halfstep.machine.runtime import read_peak_memory; print(read_peak_memory())"
    alone, parent = int(run_python(code)), read_peak_memory()
    assert held.nbytes == 256 << 20
    assert alone < parent


def test_buffers_of_an_arena_do_not_overlap_and_slabs_go_with_their_last_buffer() -> None:
    arena = Arena(slab=1 << 12)
    buffers = [arena.allocate(count).fill_(number) for number, count in enumerate((100, 1, 3000, 2000, 10_000, 64))]
    assert [set(buffer.tolist()) for buffer in buffers] == [{number} for number in range(6)]
    assert all(buffer.data_ptr() % 64 == 0 for buffer in buffers)
    starts = [buffer.data_ptr() for buffer in buffers]
    assert starts[1] == starts[0] + 128 and starts[2] == starts[1] + 64
    assert arena.allocate(0).numel() == 0
    assert arena._current is not None
    slab = weakref.ref(arena._current)
    del arena
    assert slab() is not None
    del buffers[-1]
    assert slab() is None


def test_an_arena_serves_threads() -> None:
    arena = Arena(slab=1 << 16)
    found: list[tuple[int, torch.Tensor]] = []

    def fill(number: int) -> None:
        found.extend((number, arena.allocate(50).fill_(number)) for _ in range(200))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800
    assert all(set(buffer.tolist()) == {number} for number, buffer in found)


def test_the_heap_is_trimmed_when_it_grew_by_an_eighth_beyond_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([800, 640, 640, 700, 721, 700, 750, 788, 640])
    monkeypatch.setattr(runtime, "release_memory", lambda: None)
    monkeypatch.setattr(HeapTrimmer, "_read_resident", lambda _: next(resident))
    trimmer = HeapTrimmer()
    trimmer._works = True
    trims = []
    for _ in range(6):
        trimmer.look()
        trims.append(trimmer.trims)
    # 800 -> 640, limit 720; 640 and 700 are below; 721 -> 700, limit 787.5; 750 below; 788 -> 640, the limit stays
    assert trims == [1, 1, 1, 2, 2, 3]
    assert trimmer._limit == 787.5


def test_where_the_heap_cannot_be_trimmed_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("", ""))
    trimmer = HeapTrimmer()
    trimmer.look()
    assert trimmer.trims == 0
