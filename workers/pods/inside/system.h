/* What a C library would bring: system calls, text, reading and writing whole. */

#pragma once

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
