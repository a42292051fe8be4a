/* Records what a program asks of the disk, in order: every write, sync, truncate, create, rename and unlink of files
 * under $RECORDER_FOLDER, as one record each in $RECORDER_LOG. Preloaded (LD_PRELOAD) into an unmodified program.
 *
 * Rules:
 * 1. One lock is held across an operation and its record, so that the log's order is the order of what happened.
 * 2. A record names the file by inode and path: an inode keeps its content through a rename.
 * 3. What cannot be recorded (a shared writable mapping, sendfile, ...) is recorded as 'X': the reader refuses the log.
 * 4. -shm files are left out: SQLite rebuilds them after a power cut.
 *
 * Record: packed header below, then `path`, then `other` (a rename's target), then `length` bytes of a write.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct __attribute__((packed)) header {
    char kind; /* W rite, S ync, T runcate, A llocate, C make, R ename, U nlink, D irectory sync, X unknown */
    uint16_t path_length;
    uint16_t other_length;
    uint64_t inode;
    int64_t offset;
    int64_t length;
};

static char folder[PATH_MAX];
static size_t folder_length;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int real_open(const char *path, int flags, mode_t mode) {
    REAL(int, open64, const char *, int, ...);
    return real(path, flags, mode);
}

__attribute__((constructor)) static void start(void) {
    const char *told = getenv("RECORDER_FOLDER"), *log = getenv("RECORDER_LOG");
    if (!told || !log || !realpath(told, folder)) return;
    folder_length = strlen(folder);
    log_fd = real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

/* A log with a hole would prove nothing: a record that cannot be written ends the program. */
static void record(char kind, const char *path, const char *other, uint64_t inode, int64_t offset, int64_t length,
                   const void *data) {
    struct header head = {kind, (uint16_t)strlen(path), (uint16_t)(other ? strlen(other) : 0), inode, offset, length};
    struct iovec parts[4] = {
        {&head, sizeof head},
        {(void *)path, head.path_length},
        {(void *)(other ? other : ""), head.other_length},
        {(void *)(data ? data : ""), data ? (size_t)length : 0},
    };
    ssize_t want = (ssize_t)(sizeof head + head.path_length + head.other_length + parts[3].iov_len);
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (real(log_fd, parts, 4) != want) {
        fputs("recorder: its log cannot be written\n", stderr);
        abort();
    }
}

/* The path below the folder, or NULL where it is none of ours. */
static const char *ours(const char *path) {
    if (log_fd < 0 || !path || strncmp(path, folder, folder_length) || path[folder_length] != '/') return NULL;
    size_t length = strlen(path);
    if (length >= 4 && !strcmp(path + length - 4, "-shm")) return NULL;
    return path + folder_length + 1;
}

/* The same for an open file; `held` is room for the path. A folder itself is "". */
static const char *ours_open(int fd, char *held, struct stat *found) {
    char link[64];
    if (log_fd < 0 || fd < 0 || fd == log_fd) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, held, PATH_MAX - 1);
    if (length < 0) return NULL;
    held[length] = 0;
    if (length > 10 && !strcmp(held + length - 10, " (deleted)")) held[length - 10] = 0;
    if (fstat(fd, found)) return NULL;
    if (!strcmp(held, folder)) return "";
    return ours(held);
}

static int opened(int (*open_it)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    const char *name = ours(path);
    if (!name) return open_it(path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat before, after;
    int was = stat(path, &before) == 0;
    int fd = open_it(path, flags, mode), error = errno;
    if (fd >= 0 && !fstat(fd, &after)) {
        if (!was && (flags & O_CREAT)) record('C', name, NULL, after.st_ino, 0, 0, NULL);
        else if (was && (flags & O_TRUNC) && before.st_size) record('T', name, NULL, after.st_ino, 0, 0, NULL);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = (mode_t)va_arg(rest, int); \
            va_end(rest); \
        } \
        return opened(real, path, flags, mode); \
    }
OPENER(open)
OPENER(open64)

#define BEGIN(fd) \
    char held[PATH_MAX]; \
    struct stat found; \
    const char *name = ours_open(fd, held, &found); \
    if (name) pthread_mutex_lock(&lock)
#define END \
    int error = errno; \
    if (name) pthread_mutex_unlock(&lock); \
    errno = error

ssize_t write(int fd, const void *data, size_t length) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (fd <= 2) return real(fd, data, length);
    BEGIN(fd);
    off64_t at = name ? lseek64(fd, 0, SEEK_CUR) : 0;
    if (name && fcntl(fd, F_GETFL) & O_APPEND) at = found.st_size;
    ssize_t done = real(fd, data, length);
    if (name && done > 0) record('W', name, NULL, found.st_ino, at, done, data);
    END;
    return done;
}

#define WRITER(symbol, offset_type) \
    ssize_t symbol(int fd, const void *data, size_t length, offset_type at) { \
        REAL(ssize_t, symbol, int, const void *, size_t, offset_type); \
        BEGIN(fd); \
        ssize_t done = real(fd, data, length, at); \
        if (name && done > 0) record('W', name, NULL, found.st_ino, at, done, data); \
        END; \
        return done; \
    }
WRITER(pwrite, off_t)
WRITER(pwrite64, off64_t)

#define SYNCER(symbol) \
    int symbol(int fd) { \
        REAL(int, symbol, int); \
        BEGIN(fd); \
        int failed = real(fd); \
        if (name && !failed) record(S_ISDIR(found.st_mode) ? 'D' : 'S', name, NULL, found.st_ino, 0, 0, NULL); \
        END; \
        return failed; \
    }
SYNCER(fsync)
SYNCER(fdatasync)

#define TRUNCATER(symbol, length_type) \
    int symbol(int fd, length_type length) { \
        REAL(int, symbol, int, length_type); \
        BEGIN(fd); \
        int failed = real(fd, length); \
        if (name && !failed) record('T', name, NULL, found.st_ino, length, 0, NULL); \
        END; \
        return failed; \
    }
TRUNCATER(ftruncate, off_t)
TRUNCATER(ftruncate64, off64_t)

#define ALLOCATES_BY(symbol, offset_type) \
    int symbol(int fd, offset_type at, offset_type length) { \
        REAL(int, symbol, int, offset_type, offset_type); \
        BEGIN(fd); \
        int failed = real(fd, at, length); \
        if (name && !failed) record('A', name, NULL, found.st_ino, at, length, NULL); \
        END; \
        return failed; \
    }
ALLOCATES_BY(posix_fallocate, off_t)
ALLOCATES_BY(posix_fallocate64, off64_t)

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    const char *name = ours(path);
    if (!name) return real(path);
    pthread_mutex_lock(&lock);
    struct stat found;
    int was = lstat(path, &found) == 0, failed = real(path), error = errno;
    if (was && !failed) record('U', name, NULL, found.st_ino, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed;
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    const char *name = ours(from), *other = ours(to);
    if (!name && !other) return real(from, to);
    pthread_mutex_lock(&lock);
    struct stat found;
    int was = lstat(from, &found) == 0, failed = real(from, to), error = errno;
    /* In or out of the folder: the name that is not ours is "". */
    if (was && !failed) record(name && other ? 'R' : 'X', name ? name : "", other ? other : "", found.st_ino, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed;
}

/* What is not modelled must not pass unseen. */
#define UNKNOWN(fd, what) \
    do { \
        char held_[PATH_MAX]; \
        struct stat found_; \
        const char *name_ = ours_open(fd, held_, &found_); \
        if (name_) { \
            pthread_mutex_lock(&lock); \
            record('X', name_, what, found_.st_ino, 0, 0, NULL); \
            pthread_mutex_unlock(&lock); \
        } \
    } while (0)

void *mmap64(void *at, size_t length, int protection, int flags, int fd, off64_t offset) {
    REAL(void *, mmap64, void *, size_t, int, int, int, off64_t);
    if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED)) UNKNOWN(fd, "mmap");
    return real(at, length, protection, flags, fd, offset);
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
    REAL(void *, mmap, void *, size_t, int, int, int, off_t);
    if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED)) UNKNOWN(fd, "mmap");
    return real(at, length, protection, flags, fd, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (fd > 2) UNKNOWN(fd, "writev");
    return real(fd, parts, count);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(ssize_t, pwritev, int, const struct iovec *, int, off_t);
    UNKNOWN(fd, "pwritev");
    return real(fd, parts, count, at);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t length) {
    REAL(ssize_t, sendfile64, int, int, off64_t *, size_t);
    UNKNOWN(to, "sendfile");
    return real(to, from, at, length);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t length, unsigned int flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned int);
    UNKNOWN(to, "copy_file_range");
    return real(from, at, to, there, length, flags);
}

int fallocate64(int fd, int mode, off64_t at, off64_t length) {
    REAL(int, fallocate64, int, int, off64_t, off64_t);
    UNKNOWN(fd, "fallocate");
    return real(fd, mode, at, length);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    if (ours(to) && log_fd >= 0) record('X', ours(to), "link", 0, 0, 0, NULL);
    return real(from_folder, from, to_folder, to, flags);
}
