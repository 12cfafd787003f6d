/* A library for LD_PRELOAD that lets the n-th call of a kind fail, or ends the process there, as a full disk, a broken disk
 * or a kill would. Only calls on files below one folder count; it is armed and read through `struct state`, which lies in
 * memory that the processes share. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { CREATE, OPEN, READ, WRITE, FSYNC, RENAME, MKDIR, UNLINK, ALLOCATE, CLOCK, KINDS };

struct state {
    char folder[PATH_MAX];
    long counted[KINDS];
    long kind;        /* of the call that fails; -1: none */
    long at;          /* the number of it, from 1 */
    long error;       /* errno */
    long lasting;     /* whether all that follow fail, too, and the first write stores a half, as on a full disk */
    long killing;     /* whether the process is killed instead */
    long large;       /* bytes from which an allocation counts */
    long jump;        /* seconds by which the wall clock is another from there on */
    long struck;      /* how often it happened */
};
static struct state *state;

void faults_use(struct state *shared) { state = shared; }

#define NEXT(name) ({ static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name); next; })

/* Whether this call is to fail. */
static int strikes(enum kind kind) {
    long number = __atomic_add_fetch(&state->counted[kind], 1, __ATOMIC_SEQ_CST);
    int disk_is_full = state->lasting && state->kind == WRITE && state->struck && (kind == CREATE || kind == MKDIR);
    if (!disk_is_full && (kind != state->kind || (state->lasting ? number < state->at : number != state->at))) return 0;
    __atomic_add_fetch(&state->struck, 1, __ATOMIC_SEQ_CST);
    if (state->killing) kill(getpid(), SIGKILL);
    errno = (int)state->error;
    return 1;
}

static int below(const char *path) {
    return state && *state->folder && !strncmp(path, state->folder, strlen(state->folder));
}

static int named(int at, const char *path) {
    char whole[2 * PATH_MAX], folder[PATH_MAX], link[64];
    if (!state || !path) return 0;
    if (*path == '/') return below(path);
    if (at == AT_FDCWD) {
        if (syscall(SYS_getcwd, folder, sizeof folder) < 0) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        long length = syscall(SYS_readlink, link, folder, sizeof folder - 1);
        if (length < 0) return 0;
        folder[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", folder, path);
    return below(whole);
}

static int opened(int file) {
    int before = errno, found = file >= 0 && named(file, "");
    errno = before;
    return found;
}

static int opening(int at, const char *path, int flags) {
    return named(at, path) && strikes(flags & (O_CREAT | O_WRONLY | O_RDWR) ? CREATE : OPEN);
}

#define OPENER(name)                                                        \
    int name(const char *path, int flags, ...) {                           \
        va_list more; va_start(more, flags);                               \
        mode_t mode = va_arg(more, mode_t); va_end(more);                  \
        return opening(AT_FDCWD, path, flags) ? -1 : NEXT(name)(path, flags, mode); \
    }
#define OPENER_AT(name)                                                     \
    int name(int at, const char *path, int flags, ...) {                   \
        va_list more; va_start(more, flags);                               \
        mode_t mode = va_arg(more, mode_t); va_end(more);                  \
        return opening(at, path, flags) ? -1 : NEXT(name)(at, path, flags, mode); \
    }
OPENER(open)
OPENER(open64)
OPENER_AT(openat)
OPENER_AT(openat64)

static FILE *fopening(const char *path, const char *mode, FILE *(*next)(const char *, const char *)) {
    return opening(AT_FDCWD, path, *mode == 'r' ? O_RDONLY : O_WRONLY | O_CREAT) ? NULL : next(path, mode);
}
FILE *fopen(const char *path, const char *mode) { return fopening(path, mode, NEXT(fopen)); }
FILE *fopen64(const char *path, const char *mode) { return fopening(path, mode, NEXT(fopen64)); }

/* A full disk takes a part of the first write that it refuses. */
static ssize_t part_of(int file, const void *bytes, size_t size) {
    if (!state->lasting || state->struck > 1 || size < 2) return -1;
    return syscall(SYS_write, file, bytes, size / 2);
}
ssize_t write(int file, const void *bytes, size_t size) {
    if (opened(file) && strikes(WRITE)) return part_of(file, bytes, size);
    return NEXT(write)(file, bytes, size);
}
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) {
    return opened(file) && strikes(WRITE) ? -1 : NEXT(pwrite64)(file, bytes, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return opened(file) && strikes(WRITE) ? -1 : NEXT(writev)(file, parts, count);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    return opened(to) && strikes(WRITE) ? -1 : NEXT(sendfile64)(to, from, at, size);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    return opened(to) && strikes(WRITE) ? -1 : NEXT(sendfile)(to, from, at, size);
}
ssize_t read(int file, void *bytes, size_t size) {
    return opened(file) && strikes(READ) ? -1 : NEXT(read)(file, bytes, size);
}
ssize_t pread64(int file, void *bytes, size_t size, off64_t at) {
    return opened(file) && strikes(READ) ? -1 : NEXT(pread64)(file, bytes, size, at);
}
void *mmap64(void *where, size_t size, int protection, int flags, int file, off64_t at) {
    return opened(file) && strikes(READ) ? MAP_FAILED : NEXT(mmap64)(where, size, protection, flags, file, at);
}
void *mmap(void *where, size_t size, int protection, int flags, int file, off_t at) {
    return opened(file) && strikes(READ) ? MAP_FAILED : NEXT(mmap)(where, size, protection, flags, file, at);
}
int fsync(int file) { return opened(file) && strikes(FSYNC) ? -1 : NEXT(fsync)(file); }
int rename(const char *old, const char *new) {
    return named(AT_FDCWD, new) && strikes(RENAME) ? -1 : NEXT(rename)(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    return named(to, new) && strikes(RENAME) ? -1 : NEXT(renameat)(from, old, to, new);
}
int mkdir(const char *path, mode_t mode) { return named(AT_FDCWD, path) && strikes(MKDIR) ? -1 : NEXT(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) {
    return named(at, path) && strikes(MKDIR) ? -1 : NEXT(mkdirat)(at, path, mode);
}
int unlink(const char *path) { return named(AT_FDCWD, path) && strikes(UNLINK) ? -1 : NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags) {
    return named(at, path) && strikes(UNLINK) ? -1 : NEXT(unlinkat)(at, path, flags);
}

/* Torch takes the memory of tensors so. */
int posix_memalign(void **where, size_t alignment, size_t size) {
    if (state && state->large && (long)size >= state->large && strikes(ALLOCATE)) return ENOMEM;
    return NEXT(posix_memalign)(where, alignment, size);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = NEXT(clock_gettime)(clock, now);
    if (state && clock == CLOCK_REALTIME && state->jump) {
        long number = __atomic_add_fetch(&state->counted[CLOCK], 1, __ATOMIC_SEQ_CST);
        if (number >= state->at) {
            now->tv_sec += state->jump;
            __atomic_add_fetch(&state->struck, 1, __ATOMIC_SEQ_CST);
        }
    }
    return result;
}
