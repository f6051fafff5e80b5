/* The bundle that comes in, and what is left that goes out. */

#pragma once

#include "ending.h"
#include "first.h"

typedef struct __attribute__((packed)) {
    uint8_t what; /* D directory, F file, X executable file, E end */
    uint16_t path_bytes;
    uint64_t size;
} Incoming;

__attribute__((noreturn)) static void upload(void) {
    static char chunk[CHUNK], path[PATH_MAX];
    Incoming next;
    if (!is_shut()) leave(OURS_FAILED); /* no byte of a guest comes in before */
    call(SYS_umask, 022, 0, 0, 0);
    if (call(SYS_chdir, "/work", 0, 0, 0) != 0) leave(OURS_FAILED);
    for (;;) {
        if (!read_all(0, &next, sizeof next)) leave(OURS_FAILED);
        if (next.what == 'E') leave(0);
        if (next.path_bytes >= sizeof path || !read_all(0, path, next.path_bytes)) leave(OURS_MISUSED);
        path[next.path_bytes] = 0;
        if (next.what == 'D') {
            if (call(SYS_mkdirat, AT_FDCWD, path, 0755, 0) != 0) leave(OURS_FAILED);
            continue;
        }
        long fd = call(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                       next.what == 'X' ? 0755 : 0644);
        if (fd < 0) leave(OURS_FAILED);
        while (next.size) {
            size_t piece = next.size < sizeof chunk ? next.size : sizeof chunk;
            if (!read_all(0, chunk, piece) || !write_all((int)fd, chunk, piece)) leave(OURS_FAILED);
            next.size -= piece;
        }
        call(SYS_close, fd, 0, 0, 0);
    }
}

static char out_buffer[CHUNK];
static size_t out_used;

static void out(const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        size_t room = sizeof out_buffer - out_used, piece = size - done < room ? size - done : room;
        memcpy(out_buffer + out_used, (const char *)data + done, piece);
        out_used += piece, done += piece;
        if (out_used == sizeof out_buffer) {
            if (!write_all(1, out_buffer, out_used)) leave(OURS_FAILED);
            out_used = 0;
        }
    }
}

static void flush(void) {
    if (!write_all(1, out_buffer, out_used)) leave(OURS_FAILED);
    out_used = 0;
}

static long open_mine(long directory, const char *name, int flags, unsigned mode) {
    /* What a guest made unreadable is its own, and so ours to open. */
    long fd = call(SYS_openat, directory, name, flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0);
    if (fd != -EACCES) return fd;
    struct stat found;
    if (call(SYS_newfstatat, directory, name, &found, AT_SYMLINK_NOFOLLOW) != 0 || S_ISLNK(found.st_mode)) return fd;
    call(SYS_fchmodat, directory, name, mode, 0);
    return call(SYS_openat, directory, name, flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0);
}

typedef struct __attribute__((packed)) {
    uint8_t what; /* D directory, F file, L link, P fifo, S socket, V device, ? neither; T: no more is told */
    uint16_t path_bytes;
    uint32_t links;
    uint64_t size;
} Found;

static long told, most_told;

static uint8_t letter(unsigned mode) {
    if (S_ISDIR(mode)) return 'D';
    if (S_ISREG(mode)) return 'F';
    if (S_ISLNK(mode)) return 'L';
    if (S_ISFIFO(mode)) return 'P';
    if (S_ISSOCK(mode)) return 'S';
    return S_ISCHR(mode) || S_ISBLK(mode) ? 'V' : '?';
}

static int tell(long directory, char *path, size_t used, size_t room, int depth, int deepest) { /* 0: enough was told */
    char buffer[4096];
    long got;
    while ((got = call(SYS_getdents64, directory, buffer, sizeof buffer, 0)) > 0)
        for (long at = 0; at < got; at += ((Entry *)(buffer + at))->size) {
            const Entry *entry = (const Entry *)(buffer + at);
            size_t bytes = length(entry->name);
            struct stat found;
            if (same(entry->name, ".") || same(entry->name, "..") || used + bytes + 1 > room) continue;
            if (call(SYS_newfstatat, directory, entry->name, &found, AT_SYMLINK_NOFOLLOW) != 0) continue;
            if (told++ >= most_told) return 0;
            memcpy(path + used, entry->name, bytes);
            Found one = {letter(found.st_mode), (uint16_t)(used + bytes), (uint32_t)found.st_nlink, (uint64_t)found.st_size};
            out(&one, sizeof one);
            out(path, used + bytes);
            if (one.what == 'D' && depth < deepest) {
                long below = open_mine(directory, entry->name, O_RDONLY | O_DIRECTORY, 0700);
                if (below < 0) continue;
                path[used + bytes] = '/';
                int more = tell(below, path, used + bytes + 1, room, depth + 1, deepest);
                call(SYS_close, below, 0, 0, 0);
                if (!more) return 0;
            }
        }
    return 1;
}

__attribute__((noreturn)) static void list(long deepest, long most) {
    static char path[MAX_DEPTH * (NAME_MAX + 1)];
    if (!kill_all()) leave(OURS_FAILED);
    most_told = most;
    long work = open_mine(AT_FDCWD, "/work", O_RDONLY | O_DIRECTORY, 0700);
    if (work < 0 || deepest < 1 || deepest > MAX_DEPTH) leave(OURS_FAILED);
    Found end = {tell(work, path, 0, sizeof path, 1, (int)deepest) ? 'E' : 'T', 0, 0, 0};
    out(&end, sizeof end);
    flush();
    leave(0);
}

static void put_octal(char *field, int digits, uint64_t value) {
    for (int i = digits - 1; i >= 0; i--, value >>= 3) field[i] = (char)('0' + (value & 7));
}

static void send_file(long fd, uint32_t index, uint64_t size) { /* a member whose name is a number: ours, no guest's */
    static char chunk[CHUNK], zeros[BLOCK];
    char head[BLOCK] = {0};
    *put_number(head, index) = 0;
    put_octal(head + 100, 7, 0644), put_octal(head + 108, 7, 0), put_octal(head + 116, 7, 0);
    put_octal(head + 124, 11, size), put_octal(head + 136, 11, 0);
    head[156] = '0';
    memcpy(head + 257, "ustar\0" "00", 8);
    put_octal(head + 329, 7, 0), put_octal(head + 337, 7, 0);
    memset(head + 148, ' ', 8);
    unsigned sum = 0;
    for (int i = 0; i < BLOCK; i++) sum += (unsigned char)head[i];
    put_octal(head + 148, 6, sum), head[154] = 0;
    out(head, sizeof head);
    for (uint64_t left = size; left;) {
        long got = call(SYS_read, fd, chunk, left < sizeof chunk ? left : sizeof chunk, 0);
        if (got <= 0) leave(OURS_FAILED); /* nothing runs any more that could have cut it short */
        out(chunk, (size_t)got);
        left -= (uint64_t)got;
    }
    out(zeros, (BLOCK - size % BLOCK) % BLOCK);
}

__attribute__((noreturn)) static void fetch(void) {
    /* stdin: a count, then for each file the length of its path, and the path */
    static char path[MAX_DEPTH * (NAME_MAX + 1)], zeros[2 * BLOCK];
    uint32_t count;
    uint16_t bytes;
    if (!kill_all() || !read_all(0, &count, sizeof count)) leave(OURS_FAILED);
    for (uint32_t index = 0; index < count; index++) {
        if (!read_all(0, &bytes, sizeof bytes) || bytes >= sizeof path || !read_all(0, path, bytes)) leave(OURS_MISUSED);
        path[bytes] = 0;
        long at = call(SYS_openat, AT_FDCWD, "/work", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0), next;
        char *part = path;
        for (char *end = path; at >= 0; end++) { /* one part at a time, and through no link */
            if (*end && *end != '/') continue;
            int last = !*end;
            *end = 0;
            next = open_mine(at, part, last ? O_RDONLY : O_RDONLY | O_DIRECTORY, last ? 0600 : 0700);
            call(SYS_close, at, 0, 0, 0);
            at = next;
            part = end + 1;
            if (last) break;
        }
        struct stat found;
        if (at >= 0 && call(SYS_fstat, at, &found, 0, 0) == 0 && S_ISREG(found.st_mode) && found.st_nlink == 1)
            send_file(at, index, (uint64_t)found.st_size);
        if (at >= 0) call(SYS_close, at, 0, 0, 0);
    }
    out(zeros, sizeof zeros);
    flush();
    leave(0);
}
