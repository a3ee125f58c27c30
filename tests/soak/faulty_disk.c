/* LD_PRELOAD layer: calls on files whose path holds $FAULTY_PATH fail with EIO while the file
 * $FAULTY_SWITCH/NAME exists, NAME being the call's: open, write (also pwrite), read (also pread and
 * preadv), fsync, rename. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int hit(const char *call, const char *path) {
    const char *part = getenv("FAULTY_PATH"), *folder = getenv("FAULTY_SWITCH");
    if (!part || !folder || !path || !strstr(path, part)) return 0;
    char name[4096];
    snprintf(name, sizeof name, "%s/%s", folder, call);
    int kept = errno, found = access(name, F_OK) == 0;
    errno = found ? EIO : kept;
    return found;
}

static int hit_fd(const char *call, int fd) {
    if (!getenv("FAULTY_PATH")) return 0;
    char link[64], path[4096];
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0) return 0;
    path[length] = 0;
    return hit(call, path);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

int fsync(int fd) {
    REAL(int, fsync, int);
    return hit_fd("fsync", fd) ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    return hit_fd("fsync", fd) ? -1 : real(fd);
}

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR) && hit("open", path)) return -1; \
        return real(path, flags, mode); \
    }
OPENER(open)
OPENER(open64)

#define WRITER(call, name, buffer, offset_type) \
    ssize_t name(int fd, buffer data, size_t count, offset_type at) { \
        REAL(ssize_t, name, int, buffer, size_t, offset_type); \
        return hit_fd(call, fd) ? -1 : real(fd, data, count, at); \
    }
WRITER("write", pwrite, const void *, off_t)
WRITER("write", pwrite64, const void *, off64_t)
WRITER("read", pread, void *, off_t)
WRITER("read", pread64, void *, off64_t)

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(ssize_t, preadv, int, const struct iovec *, int, off_t);
    return hit_fd("read", fd) ? -1 : real(fd, parts, count, at);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(ssize_t, preadv64, int, const struct iovec *, int, off64_t);
    return hit_fd("read", fd) ? -1 : real(fd, parts, count, at);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    REAL(ssize_t, preadv64v2, int, const struct iovec *, int, off64_t, int);
    return hit_fd("read", fd) ? -1 : real(fd, parts, count, at, flags);
}

ssize_t write(int fd, const void *data, size_t count) {
    REAL(ssize_t, write, int, const void *, size_t);
    return hit_fd("write", fd) ? -1 : real(fd, data, count);
}

ssize_t read(int fd, void *data, size_t count) {
    REAL(ssize_t, read, int, void *, size_t);
    return hit_fd("read", fd) ? -1 : real(fd, data, count);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return hit("rename", to) ? -1 : real(from, to);
}
