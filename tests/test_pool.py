"""The pool: torch's large tensors lie in it while it is open, keep their numbers, and leave no holes that nothing fits into."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import ModelError
from halfstep.machine import pool
from halfstep.machine.runtime import Arena, HeapTrimmer, read_peak_memory, release_memory, tune_process
from halfstep.numerics import kernels

GRAIN = 128
LARGE = 1 << 16  # bytes: the smallest that lies in the pool


@pytest.fixture
def opened() -> Iterator[None]:
    with pool.open_pool() as why:
        if why:
            assert not any(map(shutil.which, pool.LIBRARY.compilers)), why  # where there is a compiler there is a pool
            pytest.skip(why)
        gc.collect()
        yield


def usage() -> pool.Usage:
    found = pool.read_pool()
    assert found is not None
    return found


def make(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


@pytest.mark.usefixtures("opened")
def test_large_tensors_lie_in_the_pool_and_small_ones_do_not() -> None:
    before = usage().taken
    small, large = make(LARGE - 1), make(LARGE)
    assert usage().taken - before == LARGE + GRAIN
    assert large.data_ptr() % 64 == 0
    del large
    assert usage().taken == before
    assert small.numel() == LARGE - 1


def read_resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_freed_after_the_block_can_be_given_back() -> None:
    with pool.open_pool() as why:
        if why:
            pytest.skip(why)
        held = make(64 << 20).fill_(1)
    before = read_resident()
    del held
    pool.release_pool()
    assert before - read_resident() > 48 << 20


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_where_addresses_are_limited_there_is_no_pool(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = {getattr(resource, limit): (1 << 33, 1 << 33)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, (resource.RLIM_INFINITY,) * 2))
    with pool.open_pool() as why:
        assert limit in why
        assert pool.read_pool() is None


@pytest.mark.usefixtures("opened")
def test_a_hole_is_filled_by_a_tensor_of_its_size() -> None:
    held = [make(LARGE * (i + 1)) for i in range(8)]
    place, top = held[3].data_ptr(), usage().top
    held[3] = make(1)
    again = make(LARGE * 4)
    assert again.data_ptr() == place
    assert usage().top == top


@pytest.mark.usefixtures("opened")
def test_holes_that_touch_become_one() -> None:
    held = [make(LARGE) for _ in range(6)]
    top, holes = usage().top, usage().holes
    for i in (1, 3, 2):  # the last one lies between two holes
        held[i] = make(1)
    assert usage().holes == holes + 1
    wide = make(3 * LARGE + 2 * GRAIN)
    assert wide.data_ptr() == held[0].data_ptr() + LARGE + GRAIN
    assert usage().top == top


@pytest.mark.usefixtures("opened")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 40)), max_size=60))
def test_tensors_never_overlap_and_everything_is_given_back(moves: list[tuple[int, int]]) -> None:
    gc.collect()
    before, held = usage().taken, dict[int, torch.Tensor]()
    for slot, size in moves:
        held.pop(slot, None)
        held[slot] = torch.full((size * LARGE // 2,), slot, dtype=torch.uint8)
    assert all(bool((tensor == slot).all()) for slot, tensor in held.items())
    inside = [t for t in held.values() if t.numel() >= LARGE]
    assert usage().taken - before == sum(t.numel() + GRAIN for t in inside)
    held.clear()
    inside.clear()
    assert usage().taken == before


def test_tensors_outlive_the_block_and_those_from_before_are_freed_inside() -> None:
    early = torch.arange(LARGE)
    with pool.open_pool():
        del early
        late = torch.arange(LARGE)
        with pool.open_pool():
            assert pool.is_open() == (pool.read_pool() is not None)
        inner = torch.arange(LARGE)
    assert not pool.is_open()
    assert pool.read_pool() is None
    assert torch.equal(late, inner)
    late.resize_(2 * LARGE)
    assert int(late[LARGE - 1]) == LARGE - 1


@pytest.mark.usefixtures("opened")
def test_what_is_given_back_leaves_resident_memory() -> None:
    statm = Path("/proc/self/statm")

    def read() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    between = torch.ones(64 << 20, dtype=torch.uint8)
    above, full = torch.ones(LARGE, dtype=torch.uint8), read()
    del between
    release_memory()
    assert read() < full - (60 << 20)
    assert int(above.sum()) == LARGE


@pytest.mark.usefixtures("opened")
def test_threads_take_and_give_at_once() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(200):
            tensor = torch.full((LARGE + 1000 * (i % 7),), number, dtype=torch.uint8)
            if not bool((tensor == number).all()):
                wrong.append(number)

    before = usage().taken
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert usage().taken == before


@pytest.mark.usefixtures("opened")
def test_torchs_profiler_sees_the_memory() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        make(1 << 20)
    found = [e.self_cpu_memory_usage for e in profile.key_averages() if e.key == "aten::empty"]
    assert found and max(found) >= 1 << 20


@pytest.mark.usefixtures("opened")
def test_buffers_that_live_long_lie_in_the_pool_too() -> None:
    before, buffer = usage().taken, Arena().allocate(LARGE)
    assert usage().taken == before + LARGE + GRAIN
    assert (buffer.dtype, len(buffer)) == (torch.uint8, LARGE)


@pytest.mark.usefixtures("opened")
def test_a_heap_beside_the_pool_is_not_trimmed() -> None:
    trimmer = HeapTrimmer()
    trimmer.look()
    assert trimmer.trims == 0


def test_steps_give_the_same_numbers_in_less_memory() -> None:
    """In a process each: activations that come and go, of an odd size each."""
    code = """
import sys, torch
from halfstep.machine.runtime import read_peak_memory, tune_process
with tune_process(allocator=sys.argv[1], threads=1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[m for i in range(24) for m in (torch.nn.Linear(256, 256), torch.nn.GELU())])
    for step in range(3):
        model(torch.randn(2048 + 8 * step, 256)).square().mean().backward()
    print(float(model[0].weight.grad.sum()), read_peak_memory())
"""
    found = {}
    for name in ("glibc", "pool"):
        done = subprocess.run([sys.executable, "-c", code, name], check=True, capture_output=True, text=True)
        found[name] = done.stdout.split()
    assert found["pool"][0] == found["glibc"][0]
    if not pool.LIBRARY.start():
        pool.LIBRARY.library.functions.stop_pool()  # type: ignore[union-attr]
        assert int(found["pool"][1]) <= int(found["glibc"][1]) + (8 << 20)


def test_without_a_compiler_nothing_is_changed_and_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    monkeypatch.setitem(pool.LIBRARY.__dict__, "library", pool.LIBRARY.find(tmp_path))
    with tune_process() as found:
        assert found["pool"] == "none: no C++ compiler was found (looked for c++, g++, clang++)"
        assert not pool.is_open()


def test_another_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.platform, "system", lambda: "Darwin")
    with pool.open_pool() as why:
        assert why == "there is none for Darwin"


def test_the_pool_is_closed_after_an_error() -> None:
    with pytest.raises(KeyError), tune_process():
        raise KeyError
    assert not pool.is_open()


def test_an_unknown_allocator_is_refused() -> None:
    with pytest.raises(ModelError, match=r"allocator.*'jemalloc'.*glibc"), tune_process(allocator="jemalloc"):  # type: ignore[arg-type]
        pass
    assert read_peak_memory() > 0
