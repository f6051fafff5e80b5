/* The first process of a pod, the listener that it must fail to reach, and what is asked of it. */

#pragma once

#include "system.h"

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
