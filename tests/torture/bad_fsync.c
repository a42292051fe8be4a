/* Fails the BAD_SYNC_AT-th fsync or fdatasync (and the BAD_SYNC_FOR - 1 after it) of a file under BAD_SYNC_FOLDER with
 * EIO, and does not sync then: as a kernel does that could not write the pages back, and has marked them clean all the
 * same. Each sync and each close of such a file is written to BAD_SYNC_LOG, a line each: `sync FD RESULT PATH`,
 * `close FD`. Preloaded (LD_PRELOAD) into an unmodified program. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int log_fd = -1;
static long seen, first, last;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void start(void) {
    const char *told = getenv("BAD_SYNC_FOLDER"), *log = getenv("BAD_SYNC_LOG");
    const char *at = getenv("BAD_SYNC_AT"), *runs = getenv("BAD_SYNC_FOR");
    if (!told || !log || !realpath(told, folder)) return;
    first = at ? atol(at) : 0;
    last = first + (runs ? atol(runs) : 1) - 1;
    log_fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

static int ours(int fd, char *path) {
    char link[64];
    if (log_fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static void say(const char *line) {
    size_t length = strlen(line);
    if (write(log_fd, line, length) != (ssize_t)length) abort(); /* a log with a hole proves nothing */
}

static int synced(int fd, int (*real)(int)) {
    char path[PATH_MAX], line[PATH_MAX + 64];
    if (!ours(fd, path)) return real(fd);
    pthread_mutex_lock(&lock);
    seen++;
    int bad = first && seen >= first && seen <= last;
    int result = bad ? -1 : real(fd);
    int error = bad ? EIO : errno;
    snprintf(line, sizeof line, "sync %d %d %s\n", fd, result, path);
    say(line);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int fsync(int fd) { return synced(fd, (int (*)(int))dlsym(RTLD_NEXT, "fsync")); }
int fdatasync(int fd) { return synced(fd, (int (*)(int))dlsym(RTLD_NEXT, "fdatasync")); }

int close(int fd) {
    char path[PATH_MAX], line[64];
    if (fd != log_fd && ours(fd, path)) {
        snprintf(line, sizeof line, "close %d\n", fd);
        pthread_mutex_lock(&lock);
        say(line);
        pthread_mutex_unlock(&lock);
    }
    return ((int (*)(int))dlsym(RTLD_NEXT, "close"))(fd);
}
