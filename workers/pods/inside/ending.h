/* Ending the guest, and counting what there is of it. */

#pragma once

#include "system.h"

typedef struct {
    uint64_t inode;
    int64_t next;
    unsigned short size;
    unsigned char type;
    char name[];
} Entry;

static long others(long *tasks) { /* processes beside pid 1 and this one, zombies too; -1: /proc cannot be read */
    static char buffer[16 * 1024];
    static char path[64];
    long self = call(SYS_getpid, 0, 0, 0, 0), found = 0, got;
    long fd = call(SYS_openat, AT_FDCWD, "/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    if (tasks) *tasks = 0;
    while ((got = call(SYS_getdents64, fd, buffer, sizeof buffer, 0)) > 0)
        for (long at = 0; at < got; at += ((Entry *)(buffer + at))->size) {
            const Entry *entry = (const Entry *)(buffer + at);
            long pid = number_in(entry->name);
            if (pid < 2 || pid == self) continue;
            found++;
            if (tasks) { /* Linux counts a process's threads in the links of its task directory, beside . and .. */
                struct stat state;
                char *end = put_text(put_text(put_text(path, "/proc/"), entry->name), "/task");
                *end = 0;
                long links = call(SYS_newfstatat, AT_FDCWD, path, &state, 0) == 0 ? (long)state.st_nlink - 2 : 1;
                *tasks += links > 1 ? links : 1;
            }
        }
    call(SYS_close, fd, 0, 0, 0);
    return got < 0 ? -1 : found;
}

static int kill_all(void) { /* -> whether nothing is left but pid 1 and this process */
    long until = now_ms() + KILL_WITHIN_MS;
    do {
        call(SYS_kill, -1, SIGKILL, 0, 0);
        if (others(0) == 0) return 1;
        poll_ms(0, 0, 1);
    } while (now_ms() < until);
    return 0;
}
