/* The allocator of machine/pool.py, which says what it does and why. */
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr size_t SMALLEST = 1 << 16; /* bytes; below that the C library has bins that fit */
constexpr size_t GRAIN = 128;        /* two cache lines: what is adjacent is fetched in pairs */
constexpr size_t PAGE = 2 << 20;     /* of memory that is given back: a huge page, or many small ones */

/* One stretch of reserved addresses, filled from below. Offsets count from its beginning; `top` is where the part that has never
 * been taken, or has been given back at the end, begins. */
class Pool {
  public:
    bool reserve(size_t bytes) {
        if (base) return true;
        for (; bytes >= (size_t)1 << 30; bytes /= 2) { /* less where the process may not have as many addresses */
            void *found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (found == MAP_FAILED) continue;
            madvise(found, bytes, MADV_HUGEPAGE); /* in vain where the system has none */
            base = (char *)found, size = bytes;
            return true;
        }
        return false;
    }

    bool holds(const void *place) const { return base && (const char *)place >= base && (const char *)place < base + size; }

    /* nullptr where nothing is left. A grain more than is needed keeps tensors of a power of two from all beginning at the same place
     * of a page, where loads wait for stores that only look like theirs. */
    void *take(size_t bytes) {
        size_t length = (bytes + GRAIN - 1) / GRAIN * GRAIN + GRAIN, at = 0;
        std::lock_guard<std::mutex> guard(lock);
        auto best = by_length.lower_bound({length, 0});
        if (best != by_length.end()) {
            auto [have, place] = *best;
            drop_hole(place, have);
            if (have > length) add_hole(place + length, have - length);
            at = place;
        } else {
            if (length > size - top) return nullptr;
            at = top, top += length, highest = std::max(highest, top);
        }
        taken[at] = length, used += length;
        return base + at;
    }

    void give(void *place) {
        std::lock_guard<std::mutex> guard(lock);
        size_t at = (size_t)((char *)place - base);
        auto mine = taken.find(at);
        size_t length = mine->second;
        taken.erase(mine), used -= length;
        auto next = holes.lower_bound(at);
        if (next != holes.end() && next->first == at + length) {
            size_t more = next->second;
            drop_hole(at + length, more), length += more;
        }
        auto before = holes.lower_bound(at);
        if (before != holes.begin() && (--before)->first + before->second == at) {
            size_t start = before->first, more = before->second;
            drop_hole(start, more), at = start, length += more;
        }
        if (at + length == top) top = at;
        else add_hole(at, length);
    }

    /* Pages in which nothing lies go back to the system. */
    void release() {
        std::lock_guard<std::mutex> guard(lock);
        for (auto &[at, length] : holes) forget(at, at + length);
        forget(top, highest);
        highest = top;
    }

    void read(int64_t *numbers) {
        std::lock_guard<std::mutex> guard(lock);
        numbers[0] = (int64_t)used, numbers[1] = (int64_t)top, numbers[2] = (int64_t)holes.size(), numbers[3] = (int64_t)size;
    }

    std::mutex lock;

  private:
    void add_hole(size_t at, size_t length) { holes[at] = length, by_length.insert({length, at}); }
    void drop_hole(size_t at, size_t length) { holes.erase(at), by_length.erase({length, at}); }

    void forget(size_t start, size_t end) {
        start = (start + PAGE - 1) / PAGE * PAGE, end = end / PAGE * PAGE;
        if (start < end) madvise(base + start, end - start, MADV_DONTNEED);
    }

    char *base = nullptr;
    size_t size = 0, top = 0, highest = 0, used = 0;
    std::map<size_t, size_t> holes;                 /* place -> length */
    std::set<std::pair<size_t, size_t>> by_length;  /* the same; the lowest of equally long ones first */
    std::unordered_map<size_t, size_t> taken;       /* place -> length */
};

Pool &pool = *new Pool; /* never destroyed: tensors may live as long as the process */
c10::Allocator *former = nullptr;
int depth = 0; /* of blocks that asked for it */

void give(void *place) {
    if (!pool.holds(place)) return former->raw_deallocate(place);
    c10::profiledCPUMemoryReporter().Delete(place);
    pool.give(place);
}

struct PoolAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void *place = bytes < SMALLEST ? nullptr : pool.take(bytes);
        if (!place) return former->allocate(bytes);
        c10::profiledCPUMemoryReporter().New(place, bytes);
        return {place, place, &give, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give; }
    void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

PoolAllocator &allocator = *new PoolAllocator;

} // namespace

extern "C" {

/* done: 1 where torch now allocates from the pool. */
void start_pool(int64_t bytes, int64_t *done) {
    *done = 0;
    if (!former) {
        c10::Allocator *now = c10::GetCPUAllocator();
        if (!now->raw_deleter() || !pool.reserve((size_t)bytes)) return;
        former = now;
        /* a child that is forked while another thread holds the lock would wait for ever */
        pthread_atfork([] { pool.lock.lock(); }, [] { pool.lock.unlock(); }, [] { pool.lock.unlock(); });
    }
    if (depth++ == 0) c10::SetCPUAllocator(&allocator, 255);
    *done = 1;
}

void stop_pool() {
    if (--depth == 0 && c10::GetCPUAllocator() == &allocator) c10::SetCPUAllocator(former, 255);
}

void release_pool() { pool.release(); }

/* numbers: bytes taken, bytes up to the end of the last one, holes between them, bytes of addresses. */
void read_pool(int64_t *numbers) { pool.read(numbers); }

}
