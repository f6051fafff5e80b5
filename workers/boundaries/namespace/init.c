/* Everything of ours that runs inside a pod: its first process, and the words that the engine has executed beside it.
 *
 *   init first IP PORT  pid 1: finds out that network policy is in force, says so in its name, reaps orphans for ever
 *   init listen PORT    pid 1 of the listener that `first` must fail to reach
 *   init reach IP PORT  pid 1 of the control: ends well once the listener was reached
 *   init wait           waits for the finding of `first` and prints it
 *   init about          which kernel this is: its version, and what it logs (gVisor names itself there)
 *   init upload         writes the files that come on stdin below /work
 *   init step           plays one step: request on stdin, frames on stdout, the step's own end as its exit status
 *   init kill           SIGKILL to every process but pid 1, until none is left
 *   init list           kill; then says what is below /work
 *   init fetch          kill; then the files that are asked for, as a tar
 *
 * A guest has the same uid. It can neither look into these processes nor write to their streams: the file's mode is 0111,
 * and a process whose program it may not read is not dumpable from its first instruction (ptrace(2), prctl(2)). It can
 * end them, all but pid 1; the node then says 137, and that is never taken for success. Freestanding: no library, nothing
 * of the image's root file system is needed. Built by hatch_build.py like gVisor's init; protocol.py is the other side.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/limits.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <netinet/in.h>
#include <time.h>

#if defined(__x86_64__)
static long call6(long number, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "+a"(number)
                     : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return number;
}
__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
#elif defined(__aarch64__)
static long call6(long number, long a, long b, long c, long d, long e, long f) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
__asm__(".globl _start\n_start: mov x29, #0\n mov x0, sp\n bl begin\n");
#else
#error "init.c knows x86_64 and aarch64"
#endif

#define call(number, a, b, c, d) call6((number), (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

enum {
    CHUNK = 64 * 1024,
    REQUEST_BYTES = 2 * 1024 * 1024,
    STRINGS = 8192,
    LOOK_MS = 100,
    SILENT_MS = 250, /* three attempts that nobody answers in this time: one lost packet is not a policy */
    SHUT_WITHIN_MS = 20 * 1000,
    KILL_WITHIN_MS = 8 * 1000,
    MAX_DEPTH = 64,
    BLOCK = 512,
};

/* Exit statuses of our own; a step's are its own. */
enum { OURS_FAILED = 70, OURS_MISUSED = 64 };

/* --- what a C library would bring ------------------------------------------------------------------------------- */

void *memcpy(void *to, const void *from, size_t size) {
    for (size_t i = 0; i < size; i++) ((char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memset(void *to, int byte, size_t size) {
    for (size_t i = 0; i < size; i++) ((char *)to)[i] = (char)byte;
    return to;
}

static size_t length(const char *text) {
    size_t n = 0;
    while (text[n]) n++;
    return n;
}

static int same(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static int begins(const char *text, const char *with) {
    while (*with)
        if (*text++ != *with++) return 0;
    return 1;
}

static long number_in(const char *text) { /* decimal digits, up to the first other character; -1 when there are none */
    long value = 0;
    if (*text < '0' || *text > '9') return -1;
    for (; *text >= '0' && *text <= '9'; text++) value = value * 10 + (*text - '0');
    return value;
}

static char *put_text(char *at, const char *text) {
    while (*text) *at++ = *text++;
    return at;
}

static char *put_number(char *at, uint64_t value) {
    char digits[24];
    int n = 0;
    do digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n) *at++ = digits[--n];
    return at;
}

__attribute__((noreturn)) static void leave(int status) {
    for (;;) call(SYS_exit_group, status, 0, 0, 0);
}

static long now_ms(void) {
    struct timespec now;
    call(SYS_clock_gettime, CLOCK_MONOTONIC, &now, 0, 0);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static long poll_ms(struct pollfd *fds, long count, long ms) {
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
    return call6(SYS_ppoll, (long)fds, count, (long)&wait, 0, 8, 0);
}

static int write_all(int fd, const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        long wrote = call(SYS_write, fd, (const char *)data + done, size - done, 0);
        if (wrote == -EINTR) continue;
        if (wrote <= 0) return 0;
        done += (size_t)wrote;
    }
    return 1;
}

static int read_all(int fd, void *data, size_t size) { /* 0: it ended before */
    for (size_t done = 0; done < size;) {
        long got = call(SYS_read, fd, (char *)data + done, size - done, 0);
        if (got == -EINTR) continue;
        if (got <= 0) return 0;
        done += (size_t)got;
    }
    return 1;
}

static long read_file(const char *path, char *into, size_t room) { /* -> its length, NUL-terminated; < 0: errno */
    long fd = call(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0), got;
    if (fd < 0) return fd;
    got = call(SYS_read, fd, into, room - 1, 0);
    call(SYS_close, fd, 0, 0, 0);
    into[got > 0 ? got : 0] = 0;
    return got;
}

static void block(uint64_t signals) {
    call(SYS_rt_sigprocmask, SIG_SETMASK, &signals, 0, sizeof signals);
}

#define BIT(signal) (1UL << ((signal) - 1))

/* --- ending the guest --------------------------------------------------------------------------------------------- */

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

/* --- pid 1 -------------------------------------------------------------------------------------------------------- */

static int parse_address(const char *text, struct sockaddr_in *address, const char *port) {
    uint32_t ip = 0;
    long number = number_in(port);
    for (int part = 0; part < 4; part++) {
        long value = number_in(text);
        if (value < 0 || value > 255) return 0;
        ip = ip << 8 | (uint32_t)value;
        while (*text >= '0' && *text <= '9') text++;
        if (*text++ != (part < 3 ? '.' : 0)) return 0;
    }
    if (number < 1 || number > 65535) return 0;
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = __builtin_bswap16((uint16_t)number),
                                    .sin_addr = {__builtin_bswap32(ip)}};
    return 1;
}

static int reached(const struct sockaddr_in *address) { /* three attempts, 80 ms apart: does any of them connect? */
    struct pollfd tries[3];
    long begun = now_ms(), used = 0, answer = 0;
    while (!answer) {
        long passed = now_ms() - begun;
        if (passed >= SILENT_MS) break;
        if (used < 3 && passed >= used * 80) {
            long fd = call(SYS_socket, AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, 0);
            if (fd < 0) leave(OURS_FAILED); /* not knowing is not the same as not reaching */
            long error = call(SYS_connect, fd, address, sizeof *address, 0);
            tries[used++] = (struct pollfd){.fd = (int)fd, .events = error == -EINPROGRESS ? POLLOUT : 0};
            if (error == 0) answer = 1;
            if (error != 0 && error != -EINPROGRESS) tries[used - 1].fd = -1, call(SYS_close, fd, 0, 0, 0);
        }
        poll_ms(tries, used, 10);
        for (long i = 0; i < used; i++)
            if (tries[i].fd >= 0 && tries[i].revents) {
                int failed = 1;
                socklen_t size = sizeof failed;
                call6(SYS_getsockopt, tries[i].fd, SOL_SOCKET, SO_ERROR, (long)&failed, (long)&size, 0);
                if (!failed && tries[i].revents & POLLOUT) answer = 1;
                call(SYS_close, tries[i].fd, 0, 0, 0);
                tries[i].fd = -1;
            }
    }
    for (long i = 0; i < used; i++)
        if (tries[i].fd >= 0) call(SYS_close, tries[i].fd, 0, 0, 0);
    return (int)answer;
}

static void find_shut(const struct sockaddr_in *listener) {
    /* The finding stands in our name, "shut TIMES MS": how often the listener was reached before, and for how long. */
    char name[32];
    long begun = now_ms(), times = 0;
    while (reached(listener)) {
        times++;
        if (now_ms() - begun > SHUT_WITHIN_MS) leave(OURS_FAILED);
        poll_ms(0, 0, 10);
    }
    char *end = put_number(put_text(name, "shut "), (uint64_t)(times > 9999 ? 9999 : times));
    end = put_number(put_text(end, " "), (uint64_t)(now_ms() - begun));
    *end = 0;
    call(SYS_prctl, PR_SET_NAME, name, 0, 0);
}

__attribute__((noreturn)) static void reap_for_ever(void) {
    uint64_t awaited = BIT(SIGCHLD) | BIT(SIGTERM);
    siginfo_t from;
    for (;;) {
        while (call(SYS_wait4, -1, 0, WNOHANG, 0) > 0) {
        }
        /* Who asks pid 1 to end from outside this pid namespace has no pid in it: the node, and no guest. */
        if (call(SYS_rt_sigtimedwait, &awaited, &from, 0, sizeof awaited) == SIGTERM && from.si_pid == 0) leave(0);
    }
}

__attribute__((noreturn)) static void be_first(const char *ip, const char *port) {
    struct sockaddr_in listener;
    if (!parse_address(ip, &listener, port)) leave(OURS_MISUSED);
    find_shut(&listener);
    reap_for_ever();
}

__attribute__((noreturn)) static void be_listener(const char *port) {
    struct sockaddr_in any;
    int yes = 1;
    if (!parse_address("0.0.0.0", &any, port)) leave(OURS_MISUSED);
    long fd = call(SYS_socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0, 0);
    call6(SYS_setsockopt, fd, SOL_SOCKET, SO_REUSEADDR, (long)&yes, sizeof yes, 0);
    if (call(SYS_bind, fd, &any, sizeof any, 0) != 0 || call(SYS_listen, fd, 512, 0, 0) != 0) leave(OURS_FAILED);
    for (;;) {
        struct pollfd waiting = {.fd = (int)fd, .events = POLLIN};
        uint64_t awaited = BIT(SIGTERM);
        siginfo_t from;
        struct timespec none = {0, 0};
        if (poll_ms(&waiting, 1, 100) > 0) {
            long one = call(SYS_accept4, fd, 0, 0, SOCK_CLOEXEC);
            if (one >= 0) call(SYS_close, one, 0, 0, 0);
        }
        if (call(SYS_rt_sigtimedwait, &awaited, &from, &none, sizeof awaited) == SIGTERM && from.si_pid == 0) leave(0);
    }
}

__attribute__((noreturn)) static void be_control(const char *ip, const char *port) {
    struct sockaddr_in listener;
    long until = now_ms() + SHUT_WITHIN_MS;
    if (!parse_address(ip, &listener, port)) leave(OURS_MISUSED);
    while (!reached(&listener))
        if (now_ms() > until) leave(OURS_FAILED);
    leave(0);
}

static int is_shut(void) { /* only pid 1 itself can change its name, and it does so once */
    char name[32];
    return read_file("/proc/1/comm", name, sizeof name) > 0 && begins(name, "shut ");
}

__attribute__((noreturn)) static void await_shut(void) {
    char name[32];
    long until = now_ms() + SHUT_WITHIN_MS;
    while (!is_shut()) {
        if (now_ms() > until) leave(OURS_FAILED);
        poll_ms(0, 0, 5);
    }
    long size = read_file("/proc/1/comm", name, sizeof name);
    leave(size > 0 && write_all(1, name, (size_t)size) ? 0 : OURS_FAILED);
}

__attribute__((noreturn)) static void say_kernel(void) {
    static char text[16 * 1024];
    long size = read_file("/proc/version", text, sizeof text);
    if (size > 0) write_all(1, text, (size_t)size);
    size = call(SYS_syslog, 3, text, sizeof text, 0); /* SYSLOG_ACTION_READ_ALL */
    if (size > 0) write_all(1, text, (size_t)size);
    leave(0);
}

/* --- the bundle --------------------------------------------------------------------------------------------------- */

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

/* --- a step ------------------------------------------------------------------------------------------------------- */

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
            long tasks = 0;
            struct statfs space;
            looked = now_ms();
            if (others(&tasks) >= 0 && tasks > most_tasks) most_tasks = tasks;
            if (call(SYS_statfs, "/work", &space, 0, 0) == 0 && space.f_bfree == 0) disk_full = 1;
        }
        if (call(SYS_wait4, child, &state, WNOHANG, &spent) == child) break;
    }
    /* What it wrote before it ended is in the pipes, never more than a pipe holds; what an orphan adds is not its. */
    for (int i = 0; i < 2; i++) {
        int from = i ? err[0] : out[0];
        long left = from < 0 ? 0 : call(SYS_fcntl, from, F_GETPIPE_SZ, 0, 0), got;
        if (left < 0) left = CHUNK;
        while (left > 0 && (got = pass_on(from, i ? 'e' : 'o', (size_t)left)) > 0) left -= got;
    }
    struct statfs space;
    if (call(SYS_statfs, "/work", &space, 0, 0) == 0 && space.f_bfree == 0) disk_full = 1;
    read_all(said[0], &failed, sizeof failed);
    int status = (int)(state & 0x7f ? 128 + (state & 0x7f) : state >> 8 & 0xff);
    char *end = report;
    if (failed) end = put_line(end, "not_started ", -failed);
    else if (state & 0x7f) end = put_line(end, "signalled ", state & 0x7f);
    else end = put_line(end, "exited ", status);
    end = put_line(end, "cpu_us ", (spent.ru_utime.tv_sec + spent.ru_stime.tv_sec) * 1000000 + spent.ru_utime.tv_usec +
                                       spent.ru_stime.tv_usec);
    end = put_line(end, "tasks ", most_tasks);
    end = put_line(end, "disk_full ", disk_full);
    end = put_line(end, "oom_kills ", either(counted("/sys/fs/cgroup/memory.events", "oom_kill "),
                                             counted("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill ")));
    end = put_line(end, "peak_bytes ", either(counted("/sys/fs/cgroup/memory.peak", ""),
                                              counted("/sys/fs/cgroup/memory/memory.max_usage_in_bytes", "")));
    if (!frame('s', report, (size_t)(end - report))) leave(OURS_FAILED);
    leave(failed ? 127 : status);
}

/* --- what is left ------------------------------------------------------------------------------------------------- */

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

__attribute__((noreturn, used)) void begin(const long *stack) {
    long count = stack[0];
    const char *const *words = (const char *const *)(stack + 1);

    block(BIT(SIGCHLD) | BIT(SIGTERM) | BIT(SIGPIPE));
    call(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0);
    if (count == 4 && same(words[1], "first")) be_first(words[2], words[3]);
    if (count == 3 && same(words[1], "listen")) be_listener(words[2]);
    if (count == 4 && same(words[1], "reach")) be_control(words[2], words[3]);
    if (count == 2 && same(words[1], "wait")) await_shut();
    if (count == 2 && same(words[1], "about")) say_kernel();
    if (count == 2 && same(words[1], "upload")) upload();
    if (count == 2 && same(words[1], "step")) step();
    if (count == 2 && same(words[1], "kill")) leave(kill_all() ? 0 : OURS_FAILED);
    if (count == 4 && same(words[1], "list")) list(number_in(words[2]), number_in(words[3]));
    if (count == 2 && same(words[1], "fetch")) fetch();
    leave(OURS_MISUSED);
}
