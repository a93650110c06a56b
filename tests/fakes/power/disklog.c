// Writes down what a process does to the agent's file and its log: each write, each truncation and
// each completed sync, in their order. Preloaded (LD_PRELOAD) by tests/fakes/power_loss.py, which
// makes of it what a disk may hold after the power went.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <stdio.h>

struct __attribute__((packed)) entry {
    char kind;   // w write, t truncate, s sync
    char file;   // d the file, w its write-ahead log
    double time; // of CLOCK_MONOTONIC
    uint64_t at, size;
};

static int log_fd = -1;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("DISK_LOG");
    if (path) log_fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static int ends(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && !strcmp(text + a - b, end);
}

static char file_of(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (log_fd < 0 || size < 0) return 0;
    path[size] = 0;
    return ends(path, "/agent.db") ? 'd' : ends(path, "/agent.db-wal") ? 'w' : 0;
}

static void note(char kind, char file, uint64_t at, const void *data, uint64_t size) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    struct entry head = {kind, file, now.tv_sec + now.tv_nsec / 1e9, at, size};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, data ? size : 0}};
    if (syscall(SYS_writev, log_fd, parts, data ? 2 : 1) < 0) abort();
}

ssize_t write(int fd, const void *data, size_t size) {
    char file = fd == log_fd ? 0 : file_of(fd);
    off_t at = file ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = syscall(SYS_write, fd, data, size);
    if (file && done > 0) note('w', file, at, data, done);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    char file = file_of(fd);
    ssize_t done = syscall(SYS_pwrite64, fd, data, size, at);
    if (file && done > 0) note('w', file, at, data, done);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return pwrite64(fd, data, size, at);
}

int ftruncate64(int fd, off64_t size) {
    char file = file_of(fd);
    int failed = syscall(SYS_ftruncate, fd, size);
    if (file && !failed) note('t', file, size, NULL, 0);
    return failed;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int sync_by(long number, int fd) {
    char file = file_of(fd);
    int failed = syscall(number, fd);
    if (file && !failed) note('s', file, 0, NULL, 0);
    return failed;
}

int fsync(int fd) { return sync_by(SYS_fsync, fd); }
int fdatasync(int fd) { return sync_by(SYS_fdatasync, fd); }
