/* Playing one step. */

#pragma once

#include "ending.h"
#include "first.h"

typedef struct __attribute__((packed)) {
    uint32_t strings_bytes, arguments, variables;
    uint64_t stdin_bytes, processes, open_files, file_bytes;
} Request;

static char strings[REQUEST_BYTES];
static char *vectors[STRINGS + 2];

static int frame(char kind, const char *data, size_t size) {
    char head[5] = {kind, (char)size, (char)(size >> 8), (char)(size >> 16), (char)(size >> 24)};
    return write_all(1, head, sizeof head) && write_all(1, data, size);
}

static void limit(int what, uint64_t most) {
    struct rlimit both = {most, most};
    call(SYS_prlimit64, 0, what, &both, 0);
}

static long execute(char **arguments, char **variables) { /* as execvpe(3); -> errno */
    static char path[PATH_MAX + NAME_MAX];
    const char *name = arguments[0], *search = "/usr/bin:/bin";
    long found = -ENOENT;
    for (const char *at = name; *at; at++)
        if (*at == '/') return call(SYS_execve, name, arguments, variables, 0);
    if (!*name || length(name) > NAME_MAX) return -ENOENT;
    for (char **one = variables; *one; one++)
        if (begins(*one, "PATH=")) search = *one + 5;
    while (*search) {
        char *end = path;
        while (*search && *search != ':' && end < path + PATH_MAX - 2) *end++ = *search++;
        while (*search && *search != ':') search++;
        if (*search) search++;
        if (end == path) *end++ = '.';
        end = put_text(put_text(end, "/"), name);
        *end = 0;
        long error = call(SYS_execve, path, arguments, variables, 0);
        if (error != -ENOENT && error != -ENOTDIR) found = error;
        if (error != -ENOENT && error != -ENOTDIR && error != -EACCES) return error;
    }
    return found;
}

__attribute__((noreturn)) static void be_guest(const Request *asked, const int ends[3], int said) {
    block(0);
    for (int fd = 0; fd < 3; fd++) call(SYS_dup3, ends[fd], fd, 0, 0);
    call(SYS_setsid, 0, 0, 0, 0);
    call(SYS_umask, 022, 0, 0, 0);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_FSIZE, asked->file_bytes);
    limit(RLIMIT_NOFILE, asked->open_files);
    limit(RLIMIT_NPROC, asked->processes);
    long error = call(SYS_chdir, "/work", 0, 0, 0);
    if (error == 0) error = execute(vectors, vectors + asked->arguments + 1);
    call(SYS_write, said, &error, sizeof error, 0);
    leave(127);
}

static long counted(const char *file, const char *key) { /* the number after `key` in a file of counters; -1: unknown */
    static char text[2048];
    if (read_file(file, text, sizeof text) <= 0) return -1;
    for (const char *at = text; *at; at++)
        if ((at == text || at[-1] == '\n') && begins(at, key)) return number_in(at + length(key));
    return -1;
}

static long either(long a, long b) { return a >= 0 ? a : b; }

static char *put_line(char *at, const char *key, long value) {
    if (value < 0) return at;
    return put_text(put_number(put_text(at, key), (uint64_t)value), "\n");
}

static void say_files(uint64_t files) { /* how many there are, when it is news: the engine judges, and ends us */
    static uint64_t told;
    if (files == told) return;
    told = files;
    if (!frame('f', (const char *)&files, sizeof files)) leave(OURS_FAILED);
}

static void look(long ended, long *most_tasks, long *disk_full) { /* what passes, and must be seen while it lasts */
    long tasks = 0;
    struct statfs space;
    if (others(&tasks) >= 0 && tasks + ended > *most_tasks) *most_tasks = tasks + ended;
    if (call(SYS_statfs, "/work", &space, 0, 0) != 0) return;
    if (space.f_bfree == 0) *disk_full = 1;
    say_files((uint64_t)space.f_files - (uint64_t)space.f_ffree);
}

static int pass_on(int from, char kind, size_t most) { /* 1: something came; 0: nothing now; -1: it has ended */
    static char chunk[CHUNK];
    long got = call(SYS_read, from, chunk, most < sizeof chunk ? most : sizeof chunk, 0);
    if (got == -EAGAIN || got == -EINTR) return 0;
    if (got <= 0) return -1;
    if (!frame(kind, chunk, (size_t)got)) leave(OURS_FAILED);
    return (int)got;
}

__attribute__((noreturn)) static void step(void) {
    static char chunk[CHUNK], report[512];
    Request asked;
    int in[2], out[2], err[2], said[2];
    size_t held = 0, used = 0;
    long most_tasks = 0, disk_full = 0, failed = 0, state = 0, child, looked = 0;
    struct rusage spent;
    uint64_t child_ended = BIT(SIGCHLD);

    if (!is_shut()) leave(OURS_FAILED);
    if (!read_all(0, &asked, sizeof asked) || asked.strings_bytes > sizeof strings || asked.arguments < 1 ||
        (uint64_t)asked.arguments + asked.variables > STRINGS || !read_all(0, strings, asked.strings_bytes))
        leave(OURS_MISUSED);
    char *at = strings, **slot = vectors;
    for (uint32_t i = 0; i < asked.arguments + asked.variables; i++) { /* each ends with a NUL within the block */
        if (i == asked.arguments) *slot++ = 0;
        *slot++ = at;
        while (at < strings + asked.strings_bytes && *at) at++;
        if (at++ >= strings + asked.strings_bytes) leave(OURS_MISUSED);
    }
    *slot = 0;
    if (!asked.variables) *++slot = 0;

    block(child_ended);
    long ended = call(SYS_signalfd4, -1, &child_ended, sizeof child_ended, O_CLOEXEC | O_NONBLOCK);
    if (ended < 0 || call(SYS_pipe2, in, O_CLOEXEC, 0, 0) || call(SYS_pipe2, out, O_CLOEXEC, 0, 0) ||
        call(SYS_pipe2, err, O_CLOEXEC, 0, 0) || call(SYS_pipe2, said, O_CLOEXEC, 0, 0))
        leave(OURS_FAILED);
    long begun = now_ms();
    child = call6(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
    if (child < 0) leave(OURS_FAILED);
    if (child == 0) be_guest(&asked, (int[3]){in[0], out[1], err[1]}, said[1]);
    call(SYS_close, in[0], 0, 0, 0), call(SYS_close, out[1], 0, 0, 0);
    call(SYS_close, err[1], 0, 0, 0), call(SYS_close, said[1], 0, 0, 0);
    call(SYS_fcntl, in[1], F_SETFL, O_NONBLOCK, 0), call(SYS_fcntl, out[0], F_SETFL, O_NONBLOCK, 0);
    call(SYS_fcntl, err[0], F_SETFL, O_NONBLOCK, 0);
    block(child_ended | BIT(SIGPIPE));

    for (;;) {
        if (in[1] >= 0 && held == used && asked.stdin_bytes == 0) call(SYS_close, in[1], 0, 0, 0), in[1] = -1;
        /* stdin is watched when there is nothing to pass on as well: when it ends, the engine has gone. */
        struct pollfd fds[] = {{.fd = (int)ended, .events = POLLIN},
                               {.fd = out[0], .events = POLLIN},
                               {.fd = err[0], .events = POLLIN},
                               {.fd = held > used ? -1 : 0, .events = POLLIN},
                               {.fd = held > used ? in[1] : -1, .events = POLLOUT}};
        poll_ms(fds, 5, LOOK_MS);
        if (fds[1].revents && pass_on(out[0], 'o', CHUNK) < 0) call(SYS_close, out[0], 0, 0, 0), out[0] = -1;
        if (fds[2].revents && pass_on(err[0], 'e', CHUNK) < 0) call(SYS_close, err[0], 0, 0, 0), err[0] = -1;
        if (fds[3].revents) {
            size_t room = in[1] >= 0 && asked.stdin_bytes < sizeof chunk ? asked.stdin_bytes : sizeof chunk;
            long got = call(SYS_read, 0, chunk, room ? room : 1, 0);
            if (got == 0 || (got < 0 && got != -EINTR && got != -EAGAIN)) {
                call(SYS_kill, -1, SIGKILL, 0, 0); /* once: the engine may be about to have it done, and to be told so */
                leave(OURS_FAILED);
            }
            if (got > 0) {
                asked.stdin_bytes -= (uint64_t)got < asked.stdin_bytes ? (uint64_t)got : asked.stdin_bytes;
                used = 0, held = in[1] >= 0 ? (size_t)got : 0;
            }
        }
        if (fds[4].revents && in[1] >= 0) {
            long wrote = call(SYS_write, in[1], chunk + used, held - used, 0);
            if (wrote > 0) used += (size_t)wrote;
            if (wrote < 0 && wrote != -EAGAIN && wrote != -EINTR) { /* it reads no more: what is left is thrown away */
                call(SYS_close, in[1], 0, 0, 0);
                in[1] = -1, used = held = 0;
            }
        }
        if (now_ms() >= looked + LOOK_MS) {
            looked = now_ms();
            look(0, &most_tasks, &disk_full);
        }
        if (call(SYS_wait4, child, &state, WNOHANG, &spent) == child) break;
    }
    long took_ms = now_ms() - begun;
    look(1, &most_tasks, &disk_full); /* what ended was there beside those that it left: a shell that cannot fork ends */
    /* What it wrote before it ended is in the pipes, never more than a pipe holds; what an orphan adds is not its. */
    for (int i = 0; i < 2; i++) {
        int from = i ? err[0] : out[0];
        long left = from < 0 ? 0 : call(SYS_fcntl, from, F_GETPIPE_SZ, 0, 0), got;
        if (left < 0) left = CHUNK;
        while (left > 0 && (got = pass_on(from, i ? 'e' : 'o', (size_t)left)) > 0) left -= got;
    }
    read_all(said[0], &failed, sizeof failed);
    int status = (int)(state & 0x7f ? 128 + (state & 0x7f) : state >> 8 & 0xff);
    char *end = report;
    if (failed) end = put_line(end, "not_started ", -failed);
    else if (state & 0x7f) end = put_line(end, "signalled ", state & 0x7f);
    else end = put_line(end, "exited ", status);
    end = put_line(end, "cpu_us ", (spent.ru_utime.tv_sec + spent.ru_stime.tv_sec) * 1000000 + spent.ru_utime.tv_usec +
                                       spent.ru_stime.tv_usec);
    end = put_line(end, "took_ms ", took_ms);
    end = put_line(end, "tasks ", most_tasks);
    end = put_line(end, "disk_full ", disk_full);
    end = put_line(end, "oom_kills ", either(counted("/sys/fs/cgroup/memory.events", "oom_kill "),
                                             counted("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill ")));
    end = put_line(end, "peak_bytes ", either(counted("/sys/fs/cgroup/memory.peak", ""),
                                              counted("/sys/fs/cgroup/memory/memory.max_usage_in_bytes", "")));
    if (!frame('s', report, (size_t)(end - report))) leave(OURS_FAILED);
    leave(failed ? 127 : status);
}
